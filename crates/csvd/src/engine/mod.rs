//! The cluster engine on this node: its copy of the database, its voter, its connections, and the loops between them.
//!
//! ```text
//!  other nodes ── net server ── handler ──┬─ raft voter ── machine ── Db ──┬─ agents (one thread per volume) ── csvfs, LUN
//!       ▲                                 └─ heartbeats, reports ──┐       └─ manager (on the leader): verdicts, plan, voters
//!       └────────── Peers: calls, beats ◄──────────────────────────┘        │           │ proposals
//!                                                                groups (one thread) ── resource hosts
//! ```
//!
//! Everything is level-triggered: each loop looks at the database and at what is there, and does the next step; a lost
//! proposal or a crash in between is made up for in the next round. Decisions are pure functions of `csv-cluster`.
//!
//! Failure: a database that fails (disk) stops the node for good: the voter answers nobody, agents stop csvfs's I/O, and
//! the other nodes take over.

pub(crate) mod agent;
mod arrivals;
pub(crate) mod backup;
pub(crate) mod check;
mod contact;
pub(crate) mod forced;
pub(crate) mod forward;
pub(crate) mod groups;
pub(crate) mod handler;
pub(crate) mod identity;
pub(crate) mod incarnation;
pub(crate) mod lifecycle;
pub(crate) mod local;
mod luns;
pub(crate) mod machine;
pub(crate) mod manager;
pub(crate) mod propose;
pub(crate) mod reservation;
pub(crate) mod transport;
mod version;
pub(crate) mod volumes;
pub(crate) mod witness;

use crate::events::EventLog;
use anyhow::{Context, Result};
use csv_cluster::db::{Command, NodeState, Settings};
use csv_cluster::failover::NodeReport;
use csv_cluster::membership::Heartbeats;
use csv_cluster::quorum::{VoterId, majority};
use csv_net::{PeerAddr, Peers, PeersOptions, Secrets, ServerHandle, ServerOptions};
use csv_raft::{Handle, Options, SnapshotRule, Timing};
use csv_types::NodeId;
use csv_types::config::LocalConfig;
use groups::Groups;
use identity::Identity;
use incarnation::Incarnation;
use machine::{Db, Machine};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::runtime::Handle as Runtime;
use transport::{LocalVoter, LocalWitness, Net};
use volumes::Volumes;
use witness::driver::DiskWitness;

/// For the vote of a node that stops to be taken.
const VOTE_LIMIT: Duration = Duration::from_secs(5);

/// Milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    let age = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis());
    u64::try_from(age).unwrap_or(u64::MAX)
}

/// Milliseconds since the machine booted, by a clock that goes on while it is suspended (`CLOCK_BOOTTIME`): the others do not
/// wait longer for a node that stands still.
pub(crate) fn boot_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (secs, nanos) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    secs * 1000 + nanos / 1_000_000
}

/// Number of the last event in the log, which is this node's from now on.
fn newest_event(events: &std::sync::Mutex<EventLog>, node: NodeId) -> u64 {
    let mut log = events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    log.set_node(node);
    log.after(0).last().map_or(0, |event| event.seq)
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) config: LocalConfig,
    pub(crate) identity: Identity,
    pub(crate) db: Db,
    pub(crate) events: Arc<std::sync::Mutex<EventLog>>,
    pub(crate) incarnation: Incarnation,
    pub(crate) volumes: Volumes,
    pub(crate) groups: Groups,
    pub(crate) runtime: Runtime,
    raft: Handle,
    peers: Peers,
    secrets: Arc<Secrets>,
    /// This node's own voter, for the witness's.
    own: LocalVoter,
    /// The witness's voter, where it runs here.
    pub(crate) witness: LocalWitness,
    pub(crate) disk_witness: DiskWitness,
    /// Held while a witness comes in, so that the leader does not add one meanwhile.
    changing_witness: tokio::sync::Mutex<()>,
    heartbeats: Mutex<Heartbeats>,
    /// What each node said of itself last.
    reports: Mutex<BTreeMap<NodeId, NodeReport>>,
    own_report: Mutex<NodeReport>,
    beats_sent: AtomicU64,
    /// Number of the last local event that the cluster was told.
    forwarded: Mutex<u64>,
    /// The manager looks again.
    planning: tokio::sync::Notify,
    /// The last one of [`Engine::next_mark`].
    mark: AtomicU64,
    /// Why this node must do no I/O, if so.
    cut_off: Mutex<Option<String>>,
    /// Since when, by `now_ms`.
    cut_off_at_ms: AtomicU64,
    /// When the engine last looked at itself, by `now_ms`.
    looked_at_ms: AtomicU64,
    /// The first contact with the majority is still waited for: nothing is done, and nothing stopped, yet.
    starting: AtomicBool,
    /// When this node was last known to be in contact with a majority, by `now_ms`.
    last_contact_ms: Mutex<Option<u64>>,
    /// What its leader says of its quorum.
    confirmed: Mutex<contact::Confirmed>,
    /// This node stood still, and nothing has gone to the majority and back since.
    slept: Mutex<contact::Slept>,
    /// It is being looked whether this node may begin a new life.
    renewing: AtomicBool,
    /// The engine ends: loops return.
    stopping: AtomicBool,
    /// By `boot_ms`.
    started_ms: u64,
    server: tokio::sync::Mutex<Option<ServerHandle>>,
}

impl Engine {
    /// Starts everything for a node that is in a cluster.
    pub(crate) async fn start(
        config: LocalConfig,
        identity: Identity,
        events: Arc<std::sync::Mutex<EventLog>>,
    ) -> Result<Arc<Engine>> {
        let secrets = Arc::new(Secrets::load(&config.secrets_dir).with_context(|| {
            format!("the node's secrets in {} cannot be used", config.secrets_dir.display())
        })?);
        let me = csv_raft::Identity { cluster: identity.cluster_id, voter: identity.node.0.into() };
        forced::carry_out(&config, &identity, me)?;
        let storage = csv_raft::storage::directory::open(&identity::raft_dir(&config.state_dir), me)?;
        let peers = Peers::new(secrets.clone(), PeersOptions::default());
        let (witness, own): (LocalWitness, LocalVoter) = (Arc::default(), Arc::default());
        let net = Arc::new(Net {
            me: identity.node.0.into(),
            node: identity.node,
            peers: peers.clone(),
            witness: witness.clone(),
            own: own.clone(),
            witness_at: Mutex::default(),
        });
        let db = Db::new();
        let raft = Handle::start(Options {
            storage,
            state_machine: Box::new(Machine(db.clone())),
            transport: net,
            timing: Timing::default(),
            snapshots: SnapshotRule::default(),
            gate: None,
        })
        .await?;
        *own.lock() = Some(raft.clone());
        let incarnation = Incarnation::load(&config.run_dir)?;
        let newest = newest_event(&events, identity.node);
        let engine = Arc::new(Engine {
            volumes: Volumes::new(&config),
            groups: Groups::new(),
            heartbeats: Mutex::new(Heartbeats::new(&Settings::default(), 0)),
            reports: Mutex::default(),
            own_report: Mutex::default(),
            beats_sent: AtomicU64::new(0),
            forwarded: Mutex::new(newest),
            planning: tokio::sync::Notify::new(),
            cut_off: Mutex::new(Some("this node has just started".into())),
            cut_off_at_ms: AtomicU64::new(0),
            mark: AtomicU64::new(0),
            looked_at_ms: AtomicU64::new(0),
            starting: AtomicBool::new(true),
            last_contact_ms: Mutex::new(None),
            confirmed: Mutex::default(),
            slept: Mutex::default(),
            renewing: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            started_ms: boot_ms(),
            server: tokio::sync::Mutex::new(None),
            runtime: Runtime::current(),
            config,
            identity,
            db,
            events,
            incarnation,
            raft,
            peers,
            secrets,
            own,
            witness,
            disk_witness: DiskWitness::new(),
            changing_witness: tokio::sync::Mutex::new(()),
        });
        engine.open().await?;
        Ok(engine)
    }

    async fn open(self: &Arc<Self>) -> Result<()> {
        let addr = self.listen_addr().await?;
        let handler = Arc::new(handler::NodeHandler(self.clone()));
        let options = ServerOptions { addr, secrets: self.secrets.clone(), handler };
        *self.server.lock().await = Some(csv_net::serve(options).await?);
        self.set_peers();
        let period = Duration::from_millis(self.db.read().settings.heartbeat_ms);
        self.peers.start_beats(Arc::new(handler::Beats(self.clone())), period);
        tokio::spawn(self.clone().follow_database());
        tokio::spawn(self.clone().follow_volumes());
        tokio::spawn(self.clone().manage());
        tokio::spawn(self.clone().watch_self());
        tokio::spawn(self.clone().tell_version());
        self.groups.start(self)?;
        DiskWitness::start(self)?;
        Ok(())
    }

    /// The way to the other voters, for the witness's on this node.
    pub(crate) fn witness_net(&self) -> Net {
        Net {
            me: VoterId::WITNESS.0,
            node: self.identity.node,
            peers: self.peers.clone(),
            witness: LocalWitness::default(),
            own: self.own.clone(),
            witness_at: Mutex::default(),
        }
    }

    async fn listen_addr(&self) -> Result<SocketAddr> {
        let own = self.db.read().nodes.get(&self.me()).map(|node| node.addr);
        let addr = own.or(self.config.addr).context(
            "this node has no address: set `addr` in the section [local] of /etc/csv/csv.toml and start csvd again",
        )?;
        Ok(SocketAddr::new(addr, self.config.cluster_port))
    }

    /// This node.
    pub(crate) fn me(&self) -> NodeId {
        self.identity.node
    }

    pub(crate) fn raft(&self) -> &Handle {
        &self.raft
    }

    pub(crate) fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Milliseconds since the engine was started, those included in which the machine was suspended.
    pub(crate) fn now_ms(&self) -> u64 {
        boot_ms().saturating_sub(self.started_ms)
    }

    /// Why this node must do no I/O, if so.
    pub(crate) fn cut_off(&self) -> Option<String> {
        self.cut_off.lock().clone()
    }

    /// A number that is greater than all that were given before, in this csvd and in earlier ones.
    pub(crate) fn next_mark(&self) -> u64 {
        let now = unix_ms();
        let next = |mark: u64| Some((mark + 1).max(now));
        let before = self.mark.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).unwrap_or(now);
        (before + 1).max(now)
    }

    /// A local event, for this node's log.
    pub(crate) fn event(&self, subject: &str, kind: &str, message: String) {
        self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(subject, kind, message);
    }

    /// Where every node is, by the database; before there is one, as it was told at joining.
    fn addresses(&self) -> BTreeMap<NodeId, PeerAddr> {
        let db = self.db.read();
        let port = self.config.cluster_port;
        let mut known: BTreeMap<NodeId, PeerAddr> = db
            .nodes
            .values()
            .map(|node| {
                let addr = SocketAddr::new(node.addr, port);
                (node.id, PeerAddr { name: node.name.clone(), addr })
            })
            .collect();
        if known.len() < 2 {
            for member in &self.identity.members {
                let addr = PeerAddr { name: member.name.clone(), addr: member.addr };
                known.entry(member.node).or_insert(addr);
            }
        }
        known
    }

    fn set_peers(&self) {
        let addresses = self.addresses();
        let mut reachable = addresses.clone();
        reachable.extend(witness::node::address(&self.db.read(), self.config.cluster_port));
        self.peers.set(&reachable);
        let others: BTreeSet<NodeId> = addresses.into_keys().filter(|node| *node != self.me()).collect();
        let mut heartbeats = self.heartbeats.lock();
        heartbeats.set_peers(&others);
        heartbeats.set_thresholds(&self.db.read().settings);
    }

    /// Carries changes of the database to whoever has to act on them.
    async fn follow_database(self: Arc<Self>) {
        let mut changes = self.db.changes();
        let mut period = 0;
        loop {
            self.set_peers();
            let heartbeat_ms = self.db.read().settings.heartbeat_ms;
            if heartbeat_ms != period {
                period = heartbeat_ms;
                self.peers.start_beats(Arc::new(handler::Beats(self.clone())), Duration::from_millis(period));
            }
            self.volumes.wake_all();
            if self.is_stopping() || changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Volumes come and go. That may take long (a LUN that does not answer, an agent at a step), so it is done where nobody
    /// waits for it.
    async fn follow_volumes(self: Arc<Self>) {
        let mut changes = self.db.changes();
        loop {
            let engine = self.clone();
            let done = tokio::task::spawn_blocking(move || engine.volumes.reconcile(&engine)).await;
            if done.is_err() {
                tracing::error!("a fault in csvd (above); it is tried again at the next change");
            }
            if self.is_stopping() {
                return;
            }
            match tokio::time::timeout(arrivals::LOOK_EVERY, changes.changed()).await {
                // A LUN tells nobody that it has come.
                Err(_) | Ok(Ok(())) => {}
                Ok(Err(_)) => return,
            }
        }
    }

    /// Begins a new life if this node was given up. Every csvfs is asked for that, and may not answer: the loop that
    /// looks for contact does not wait for it.
    fn renew_incarnation_aside(self: &Arc<Self>) {
        if self.is_up() || self.renewing.swap(true, Ordering::AcqRel) {
            return;
        }
        let engine = self.clone();
        tokio::task::spawn_blocking(move || {
            engine.renew_incarnation();
            engine.renewing.store(false, Ordering::Release);
        });
    }

    /// See the field.
    pub(crate) fn is_starting(&self) -> bool {
        self.starting.load(Ordering::Acquire)
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Is this node up, in the incarnation that it has now?
    pub(crate) fn is_up(&self) -> bool {
        let incarnation = self.incarnation.get();
        let db = self.db.read();
        db.nodes.get(&self.me()).is_some_and(|node| {
            matches!(node.state, NodeState::Up | NodeState::Isolated) && node.incarnation == incarnation
        })
    }

    /// When this node was last known to be in contact with a majority, by `now_ms`.
    pub(crate) fn last_contact(&self) -> Option<u64> {
        *self.last_contact_ms.lock()
    }

    /// The first half of a stop in good order: groups and volumes move to other nodes, and so do the vote and the lead, so that
    /// those who stay have a majority without this node.
    pub(crate) async fn give_away(&self, limit: Duration) {
        let (node, incarnation) = (self.me(), self.incarnation.get());
        if self.propose(Command::NodeLeave { node, incarnation }, limit).await.is_err() {
            return;
        }
        let deadline = tokio::time::Instant::now() + limit;
        let mut changes = self.db.changes();
        while self.has_something() {
            if tokio::time::timeout_at(deadline, changes.changed()).await.is_err() {
                break;
            }
        }
        if !self.is_expendable(VOTE_LIMIT).await {
            self.event(
                "",
                "vote-kept",
                "this node stops with its vote; the others may have to do without".to_owned(),
            );
        }
        if self.raft.metrics().role == csv_raft::Role::Leader
            && self.raft.step_down(VOTE_LIMIT).await.is_err()
        {
            tracing::warn!("nobody has taken the lead over yet");
        }
    }

    /// Does this node own a volume or a group?
    pub(crate) fn has_something(&self) -> bool {
        let db = self.db.read();
        !db.volumes_of(self.me()).is_empty() || !db.groups_of(self.me()).is_empty()
    }

    /// The second half, when csvfs has ended: this node gives its keys back, so that nobody need fence it, and says that it
    /// is down. What does not succeed here the others find out by its silence.
    pub(crate) async fn say_goodbye(&self, limit: Duration) {
        let (node, incarnation) = (self.me(), self.incarnation.get());
        for (name, generation) in self.give_keys_back() {
            let withdraw = Command::VolumeWithdraw { name, node, incarnation, generation };
            let _told = self.propose(withdraw, limit).await;
        }
        let reason = "csvd was stopped".to_owned();
        let _told = self.propose(Command::NodeDown { node, incarnation, reason, planned: true }, limit).await;
    }

    /// When csvfs has ended: takes this node's keys off the LUNs. Of which volumes, and which generations. A key stays where
    /// the file system is still mounted: what is written there must not fail.
    pub(crate) fn give_keys_back(&self) -> Vec<(String, u32)> {
        let mut back = Vec::new();
        for (name, generation, key) in self.memberships() {
            let device = volumes::find_lun(&self.config, &name, self.volume_id(&name));
            let Some(device) = device else { continue };
            match unregister(&device, key) {
                Ok(()) => back.push((name, generation)),
                Err(error) => tracing::warn!(volume = name, "the key stays on the LUN: {error:#}"),
            }
        }
        back
    }

    fn volume_id(&self, name: &str) -> csv_types::VolumeId {
        self.db.read().volumes.get(name).map_or(csv_types::VolumeId(uuid::Uuid::nil()), |volume| volume.id)
    }

    /// Volumes that this node may write, with generation and key.
    fn memberships(&self) -> Vec<(String, u32, u64)> {
        let db = self.db.read();
        let of = |volume: &csv_cluster::db::Volume| {
            let member = volume.admitted(self.me())?;
            Some((volume.name.clone(), member.generation, db.key_of(volume, self.me())?))
        };
        db.volumes.values().filter_map(of).collect()
    }

    /// Waits until this node has no vote, and the others have a majority without the witness that runs on it. Not for ever.
    async fn is_expendable(&self, limit: Duration) -> bool {
        let witness = self.witness.lock().is_some();
        let expendable = |metrics: &csv_raft::Metrics| is_expendable(self.me(), witness, &metrics.voters);
        self.raft.wait_for(limit, expendable).await.is_ok()
    }

    /// Ends everything; the engine is of no use afterwards.
    pub(crate) async fn shutdown(&self) {
        self.stopping.store(true, Ordering::Release);
        self.volumes.wake_all();
        self.peers.stop_beats();
        self.disk_witness.stop().await;
        self.raft.shutdown().await;
        if let Some(server) = self.server.lock().await.take() {
            server.stop().await;
        }
    }
}

fn unregister(device: &std::path::Path, key: u64) -> Result<()> {
    if let Some(user) = csv_lun::is_mounted(device)? {
        anyhow::bail!("{} is still in use: {user}", device.display());
    }
    csv_lun::reservation::Reservations::open(device)?.unregister(key)?;
    Ok(())
}

/// Has that node no vote, and have the others a majority without it and the witness that runs there?
fn is_expendable(node: NodeId, witness: bool, voters: &[BTreeSet<u64>]) -> bool {
    let own = u64::from(node.0);
    let stays = |voter: &&u64| **voter != own && !(witness && **voter == VoterId::WITNESS.0);
    voters
        .iter()
        .all(|voters| !voters.contains(&own) && voters.iter().filter(stays).count() >= majority(voters.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_on() {
        let before = boot_ms();
        assert!(before > 0 && boot_ms() >= before);
    }

    #[test]
    fn a_node_goes_when_the_others_have_a_majority_without_it() {
        let w = VoterId::WITNESS.0;
        let goes = |witness: bool, voters: &[&[u64]]| {
            let voters: Vec<_> = voters.iter().map(|set| set.iter().copied().collect()).collect();
            is_expendable(NodeId(1), witness, &voters)
        };
        assert!(!goes(false, &[&[1]]), "the only vote of a pair");
        assert!(!goes(false, &[&[1, 2], &[2]]), "half of a change");
        assert!(goes(false, &[&[2]]));
        assert!(!goes(true, &[&[2, w]]), "the witness goes with it");
        assert!(goes(false, &[&[2, w]]));
        assert!(goes(true, &[&[2, 3, w]]));
    }
}
