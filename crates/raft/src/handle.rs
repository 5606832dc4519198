//! A running instance, and all that csvd does with it.
//!
//! ```text
//! csvd ── propose, linearizable_read, change_voters ──> Handle ──> openraft ──> LogStore ──> storage
//! peers' csvd ── Transport ──> csvd ── serve ─────────────┘           └──> Network ──> Transport ──> peers
//! ```
//!
//! Failure: when the storage fails, an answer is not let out by the gate, or openraft meets an error in itself,
//! the instance stops for good, [`Handle::fatal`] says so, and nothing is answered any more.

use crate::error::{Leader, ProposeError, ReadError, StartError, Stop};
use crate::machine::Machine;
use crate::metrics::{Metrics, Role};
use crate::network::{Acks, Network};
use crate::options::{Options, Timing};
use crate::store::{LogStore, Store};
use crate::transport::Gate;
use crate::types::{Command, Identity, RaftNode, TypeConfig, VoterId};
use crate::wire::Incoming;
use openraft::error::{
    ChangeMembershipError, CheckIsLeaderError, ClientWriteError, Fatal, ForwardToLeader, RaftError,
};
use openraft::{ChangeMembers, Raft};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};

/// Longest command.
pub const COMMAND_BYTES_MAX: usize = 1 << 20;
/// Commands that may wait for their answer at once; more are refused.
pub const PROPOSALS_MAX: usize = 256;

/// A running voter or learner. Clones are the same instance; it stops when the last one is gone.
#[derive(Clone)]
pub struct Handle {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) raft: Raft<TypeConfig>,
    pub(crate) me: Identity,
    pub(crate) store: Arc<Store>,
    timing: Timing,
    acks: Arc<Acks>,
    pub(crate) gate: Option<Arc<dyn Gate>>,
    pub(crate) incoming: Mutex<Incoming>,
    /// When a message of a leader was last taken.
    pub(crate) heard: Mutex<Option<Instant>>,
    proposals: Semaphore,
    electable: AtomicBool,
    stopped: watch::Receiver<Option<Stop>>,
    /// Closed when this is dropped: the supervisor shuts openraft down.
    _alive: watch::Sender<()>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("me", &self.inner.me).finish_non_exhaustive()
    }
}

impl Handle {
    /// Starts an instance on its storage: the state machine is put into the state of the snapshot, and the entries
    /// that are known to be committed are applied. It may be behind what it was before until a leader is heard.
    /// Must be called in a tokio runtime.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(options: Options) -> Result<Handle, StartError> {
        let Options { storage, state_machine, transport, timing, snapshots, gate } = options;
        let config = Arc::new(timing.config(snapshots)?);
        let me = storage.identity();
        for warning in &storage.warnings {
            tracing::warn!("{warning}");
        }
        let store = Store::new(storage);
        let machine = Machine::new(store.clone(), state_machine)
            .map_err(|why| StartError::Restore { identity: me, why })?;
        let acks = Arc::new(Acks::default());
        let network = Network { transport, me, acks: acks.clone() };
        let raft = Raft::new(me.voter, config, network, LogStore(store.clone()), machine)
            .await
            .map_err(|e| StartError::Fatal(e.to_string()))?;
        let (alive, alive_watch) = watch::channel(());
        let (stop, stopped) = watch::channel(None);
        tokio::spawn(supervise(raft.clone(), store.clone(), alive_watch, stop));
        let inner = Inner {
            raft,
            me,
            store,
            timing,
            acks,
            gate,
            incoming: Mutex::default(),
            heard: Mutex::new(None),
            proposals: Semaphore::new(PROPOSALS_MAX),
            electable: AtomicBool::new(true),
            stopped,
            _alive: alive,
        };
        Ok(Handle { inner: Arc::new(inner) })
    }

    /// Whose instance this is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.inner.me
    }

    /// Makes the first members of a new cluster, on one empty instance, once.
    ///
    /// # Errors
    /// `Rejected` when this instance is not empty or not among the members.
    pub async fn initialize(&self, members: BTreeMap<VoterId, RaftNode>) -> Result<(), ProposeError> {
        self.inner.raft.initialize(members).await.map_err(|e| match e {
            RaftError::APIError(e) => ProposeError::Rejected(e.to_string()),
            RaftError::Fatal(e) => ProposeError::Fatal(self.fatal_text(&e)),
        })
    }

    /// Puts a command into the log and waits until it is committed and applied here.
    ///
    /// # Errors
    /// See [`ProposeError`]; only `NotLeader` and `Rejected` mean that it did not and will not happen.
    pub async fn propose(&self, command: &[u8], timeout: Duration) -> Result<Vec<u8>, ProposeError> {
        if command.len() > COMMAND_BYTES_MAX {
            let text = format!("a command of {} bytes is longer than {COMMAND_BYTES_MAX}", command.len());
            return Err(ProposeError::Rejected(text));
        }
        let Ok(_permit) = self.inner.proposals.try_acquire() else {
            return Err(ProposeError::Rejected(format!("{PROPOSALS_MAX} commands are waiting already")));
        };
        let (command, appended) = Command::watched(command);
        let write = self.inner.raft.client_write(command);
        let Ok(result) = tokio::time::timeout(timeout, write).await else {
            return Err(ProposeError::Unknown(format!("no answer within {} ms", timeout.as_millis())));
        };
        match result {
            Ok(response) => Ok(response.data.0),
            // An entry that this leader lost to another one can still come back by a third.
            Err(RaftError::APIError(_)) if appended.load(Ordering::Acquire) => {
                Err(ProposeError::Unknown("another node took the lead meanwhile".to_owned()))
            }
            Err(e) => Err(self.propose_error(e)),
        }
    }

    /// Confirms with a majority that this voter still leads, and that its state machine has everything that was
    /// committed before the call. Returns the last applied index.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn linearizable_read(&self, timeout: Duration) -> Result<Option<u64>, ReadError> {
        let Ok(result) = tokio::time::timeout(timeout, self.inner.raft.ensure_linearizable()).await else {
            return Err(ReadError::NoQuorum(format!("no answer within {} ms", timeout.as_millis())));
        };
        match result {
            // The metrics may be a moment behind what was waited for.
            Ok(read) => Ok(self.metrics().applied.max(read.map(|id| id.index))),
            Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(forward))) => {
                Err(ReadError::NotLeader { leader: leader(forward) })
            }
            Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(e))) => {
                Err(ReadError::NoQuorum(e.to_string()))
            }
            Err(RaftError::Fatal(e)) => Err(ReadError::Fatal(self.fatal_text(&e))),
        }
    }

    /// Adds a member that gets the log and does not vote. Returns when that is committed; how far the member has
    /// got is seen in [`Metrics::followers`].
    ///
    /// # Errors
    /// See [`ProposeError`]; `Rejected` while another change is under way.
    pub async fn add_learner(
        &self,
        id: VoterId,
        node: RaftNode,
        timeout: Duration,
    ) -> Result<(), ProposeError> {
        self.change(ChangeMembers::AddNodes(BTreeMap::from([(id, node)])), timeout).await
    }

    /// Changes name or address of a member. The new address must lead to the same voter.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn set_node(&self, id: VoterId, node: RaftNode, timeout: Duration) -> Result<(), ProposeError> {
        if !self.metrics().nodes.contains_key(&id) {
            return Err(ProposeError::Rejected(format!("voter {id} is not a member")));
        }
        self.change(ChangeMembers::SetNodes(BTreeMap::from([(id, node)])), timeout).await
    }

    /// Makes these the voters, all of which must be members already; who is none of them becomes a learner. While
    /// the change is under way a majority of the old ones and of the new ones is needed. A change that was left in
    /// the middle is ended by asking for it again. A leader that is no voter any more leads on, without counting
    /// itself, until it is removed or steps down.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn change_voters(
        &self,
        voters: BTreeSet<VoterId>,
        timeout: Duration,
    ) -> Result<(), ProposeError> {
        if voters.is_empty() {
            return Err(ProposeError::Rejected("a cluster needs a voter".to_owned()));
        }
        self.change(ChangeMembers::ReplaceAllVoters(voters), timeout).await
    }

    /// Removes learners.
    ///
    /// # Errors
    /// See [`ProposeError`]; `Rejected` when one of them votes.
    pub async fn remove_nodes(&self, ids: BTreeSet<VoterId>, timeout: Duration) -> Result<(), ProposeError> {
        if let Some(voter) = self.metrics().voter_ids().intersection(&ids).next() {
            return Err(ProposeError::Rejected(format!("{voter} still votes: take its vote away first")));
        }
        self.change(ChangeMembers::RemoveNodes(ids), timeout).await
    }

    async fn change(
        &self,
        change: ChangeMembers<VoterId, RaftNode>,
        timeout: Duration,
    ) -> Result<(), ProposeError> {
        let led = self.metrics().role == Role::Leader;
        let changed = self.inner.raft.change_membership(change, true);
        let Ok(result) = tokio::time::timeout(timeout, changed).await else {
            return Err(ProposeError::Unknown(format!("no answer within {} ms", timeout.as_millis())));
        };
        match result {
            Ok(_) => Ok(()),
            // Half of the change may be done.
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) if led => {
                Err(ProposeError::Unknown("another node took the lead meanwhile".to_owned()))
            }
            Err(e) => Err(self.propose_error(e)),
        }
    }

    fn propose_error(&self, e: RaftError<VoterId, ClientWriteError<VoterId, RaftNode>>) -> ProposeError {
        match e {
            RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
                ProposeError::NotLeader { leader: leader(forward) }
            }
            RaftError::APIError(ClientWriteError::ChangeMembershipError(e)) => {
                ProposeError::Rejected(match e {
                    ChangeMembershipError::InProgress(_) => {
                        "another change of the members is under way: try again when it is over".to_owned()
                    }
                    e @ (ChangeMembershipError::EmptyMembership(_)
                    | ChangeMembershipError::LearnerNotFound(_)) => e.to_string(),
                })
            }
            RaftError::Fatal(e) => ProposeError::Fatal(self.fatal_text(&e)),
        }
    }

    /// The first cause, when it is known.
    pub(crate) fn fatal_text(&self, e: &Fatal<VoterId>) -> String {
        self.inner.store.failed().borrow().clone().unwrap_or_else(|| e.to_string())
    }

    /// State of the instance now.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let age = self.inner.heard.lock().map(|heard| heard.elapsed().as_millis());
        let leader_age_ms = age.map(|ms| u64::try_from(ms).unwrap_or(u64::MAX));
        let raft = self.inner.raft.metrics();
        let metrics = raft.borrow();
        Metrics::new(&metrics, &self.inner.acks, leader_age_ms, self.inner.timing.lease_ms())
    }

    /// For waiting until role, term, leader or members change; then ask for [`Handle::metrics`].
    #[must_use]
    pub fn changes(&self) -> Changes {
        Changes(self.inner.raft.server_metrics(), self.inner.stopped.clone())
    }

    /// Waits until the metrics fulfil a condition, which is looked at whenever anything changes.
    ///
    /// # Errors
    /// The last metrics, when it does not come about in time or the instance stopped.
    pub async fn wait_for(
        &self,
        timeout: Duration,
        mut condition: impl FnMut(&Metrics) -> bool,
    ) -> Result<Metrics, Box<Metrics>> {
        let mut changes = self.inner.raft.metrics();
        let wait = async {
            loop {
                changes.mark_unchanged();
                let metrics = self.metrics();
                if condition(&metrics) {
                    return Some(metrics);
                }
                changes.changed().await.ok()?;
            }
        };
        tokio::time::timeout(timeout, wait).await.ok().flatten().ok_or_else(|| Box::new(self.metrics()))
    }

    /// Takes a snapshot, after which the log is purged. Returns at once.
    ///
    /// # Errors
    /// `Fatal` when the instance has stopped.
    pub async fn trigger_snapshot(&self) -> Result<(), ProposeError> {
        let triggered = self.inner.raft.trigger().snapshot().await;
        triggered.map_err(|e| ProposeError::Fatal(self.fatal_text(&e)))
    }

    /// Stands for election now. Voters that heard a leader within the lease refuse. Returns at once.
    ///
    /// # Errors
    /// `Fatal` when the instance has stopped.
    pub async fn trigger_elect(&self) -> Result<(), ProposeError> {
        let triggered = self.inner.raft.trigger().elect().await;
        triggered.map_err(|e| ProposeError::Fatal(self.fatal_text(&e)))
    }

    /// May this voter stand for election by itself? At first it may. A witness leads only when nobody else can.
    pub fn set_electable(&self, electable: bool) {
        self.inner.electable.store(electable, Ordering::Relaxed);
        self.inner.raft.runtime_config().elect(electable);
    }

    /// Lets somebody else lead: sends no heartbeats and does not stand for election until another leader is heard,
    /// which takes an election time. Does nothing when this voter does not lead. Commands that are proposed here
    /// meanwhile put it off.
    ///
    /// # Errors
    /// The last metrics, when nobody took over in time; this voter leads on then.
    pub async fn step_down(&self, timeout: Duration) -> Result<(), Box<Metrics>> {
        if self.metrics().role != Role::Leader {
            return Ok(());
        }
        let quiet = Quiet(&self.inner);
        quiet.set(false);
        let id = self.inner.me.voter;
        self.wait_for(timeout, |m| m.leader.is_some_and(|leader| leader != id)).await.map(drop)
    }

    /// Stops the instance and waits for it. Its storage can be opened again afterwards.
    pub async fn shutdown(&self) {
        // Its only error is a task that panicked, which the supervisor reports.
        let _ = self.inner.raft.shutdown().await;
        self.fatal().await;
    }

    /// Why the instance has stopped, if it has.
    #[must_use]
    pub fn stopped(&self) -> Option<Stop> {
        self.inner.stopped.borrow().clone()
    }

    /// Resolves when the instance has stopped, with the reason.
    pub async fn fatal(&self) -> Stop {
        wait_stopped(self.inner.stopped.clone()).await
    }
}

/// Heartbeats and elections of an instance are off until this is dropped, also when its future is.
struct Quiet<'a>(&'a Inner);

impl Quiet<'_> {
    fn set(&self, on: bool) {
        let config = self.0.raft.runtime_config();
        config.heartbeat(on);
        config.elect(on && self.0.electable.load(Ordering::Relaxed));
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        self.set(true);
    }
}

fn leader(forward: ForwardToLeader<VoterId, RaftNode>) -> Leader {
    Some((forward.leader_id?, forward.leader_node?))
}

/// Tells when role, term, leader or members of an instance changed.
#[derive(Debug, Clone)]
pub struct Changes(
    watch::Receiver<openraft::metrics::RaftServerMetrics<VoterId, RaftNode>>,
    watch::Receiver<Option<Stop>>,
);

impl Changes {
    /// Waits for the next change; `false` when the instance has stopped.
    pub async fn changed(&mut self) -> bool {
        tokio::select! {
            changed = self.0.changed() => changed.is_ok(),
            _ = wait_stopped(self.1.clone()) => false,
        }
    }
}

async fn wait_stopped(mut stopped: watch::Receiver<Option<Stop>>) -> Stop {
    let stop = stopped.wait_for(Option::is_some).await.ok().and_then(|stop| stop.clone());
    // The sender goes without a word only when the runtime goes.
    stop.unwrap_or(Stop::Shutdown)
}

async fn until_set(failed: &mut watch::Receiver<Option<String>>) {
    // The sender lives as long as the store.
    let _ = failed.wait_for(Option::is_some).await;
}

/// Ends openraft when the storage failed or nobody needs it, asks for snapshots when the storage is pressed, and
/// says in the end why it ended.
async fn supervise(
    raft: Raft<TypeConfig>,
    store: Arc<Store>,
    mut alive: watch::Receiver<()>,
    stop: watch::Sender<Option<Stop>>,
) {
    let mut failed = store.failed();
    let mut changes = raft.server_metrics();
    loop {
        tokio::select! {
            () = until_set(&mut failed) => break,
            _ = alive.changed() => break,
            // Ends when openraft ended by itself.
            changed = changes.changed() => if changed.is_err() { break },
            () = store.pressed.notified() => {
                if raft.trigger().snapshot().await.is_err() { break }
            }
        }
    }
    // Whether it stopped, failed or panicked stands in the metrics.
    let _ = raft.shutdown().await;
    match &raft.metrics().borrow().running_state {
        Ok(()) => store.fail("the consensus ended by an error in itself"),
        Err(Fatal::Stopped) => {}
        Err(e @ (Fatal::StorageError(_) | Fatal::Panicked)) => store.fail(&e.to_string()),
    }
    store.close().await;
    let why = failed.borrow().clone();
    stop.send_replace(Some(why.map_or(Stop::Shutdown, Stop::Fatal)));
}
