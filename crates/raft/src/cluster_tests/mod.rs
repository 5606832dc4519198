//! Whole clusters of instances in one process, with a network and disks that fail.

mod crashes;
mod forced;
mod idle;
pub(crate) mod machine;
mod members;
mod net;

use crate::error::{ProposeError, Stop};
use crate::handle::Handle;
use crate::metrics::{Metrics, Role};
use crate::options::{Options, SnapshotRule, Timing};
use crate::storage::faulty::{Fault, FaultyBlocks, FaultyDisk};
use crate::storage::{OpenStorage, blocks, directory};
use crate::transport::Gate;
use crate::types::{Identity, RaftNode, VoterId};
use machine::ListMachine;
use net::{MemTransport, Net};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Nothing in a test waits longer for something that must come.
const PATIENCE: Duration = Duration::from_secs(60);
const ATTEMPT: Duration = Duration::from_secs(3);

#[derive(Clone)]
enum Place {
    Memory(FaultyDisk),
    Blocks(FaultyBlocks),
    Directory(PathBuf),
}

impl Place {
    fn create(&self, identity: Identity) {
        match self {
            Place::Memory(disk) => directory::create_on(&mut disk.clone(), identity).unwrap(),
            Place::Blocks(region) => blocks::format(&mut region.clone(), identity).unwrap(),
            Place::Directory(path) => directory::create(path, identity).unwrap(),
        }
    }

    fn open(&self, identity: Identity) -> OpenStorage {
        match self {
            Place::Memory(disk) => directory::open_with(Box::new(disk.clone()), identity, 100_000).unwrap(),
            Place::Blocks(region) => blocks::open(Box::new(region.clone()), identity).unwrap(),
            Place::Directory(path) => directory::open(path, identity).unwrap(),
        }
    }
}

struct Cluster {
    id: uuid::Uuid,
    net: Arc<Net>,
    places: BTreeMap<VoterId, Place>,
    machines: BTreeMap<VoterId, ListMachine>,
    timing: Timing,
    snapshots: SnapshotRule,
    gate: Option<Arc<dyn Gate>>,
}

fn node(id: VoterId) -> RaftNode {
    RaftNode { name: format!("n{id}"), addr: format!("mem:{id}") }
}

impl Cluster {
    fn new() -> Self {
        Cluster {
            id: uuid::Uuid::new_v4(),
            net: Arc::default(),
            places: BTreeMap::new(),
            machines: BTreeMap::new(),
            timing: Timing {
                heartbeat_ms: 120,
                election_min_ms: 480,
                election_max_ms: 900,
                snapshot_ms: 10_000,
            },
            snapshots: SnapshotRule { every_entries: 40, keep_entries: 10 },
            gate: None,
        }
    }

    /// `count` voters on disks in memory, numbered from 1.
    async fn of(count: u64) -> Self {
        let mut cluster = Cluster::new();
        for id in 1..=count {
            cluster.create(id, Place::Memory(FaultyDisk::default()));
            cluster.start(id).await;
        }
        cluster.initialize().await;
        cluster
    }

    async fn initialize(&self) {
        let members = self.places.keys().map(|id| (*id, node(*id))).collect();
        self.handle(1).initialize(members).await.unwrap();
    }

    fn create(&mut self, id: VoterId, place: Place) {
        place.create(Identity { cluster: self.id, voter: id });
        self.places.insert(id, place);
    }

    async fn start(&mut self, id: VoterId) {
        let storage = self.places[&id].open(Identity { cluster: self.id, voter: id });
        let machine = ListMachine::default();
        self.machines.insert(id, machine.clone());
        let options = Options {
            storage,
            state_machine: Box::new(machine),
            transport: Arc::new(MemTransport { net: self.net.clone(), me: id }),
            timing: self.timing,
            snapshots: self.snapshots,
            gate: self.gate.clone(),
        };
        let handle = Handle::start(options).await.unwrap();
        self.net.running.lock().insert(id, handle);
    }

    /// The power of a node goes.
    async fn crash(&self, id: VoterId, seed: u64) {
        let disk = match &self.places[&id] {
            Place::Memory(disk) => Some(disk.clone()),
            Place::Blocks(_) | Place::Directory(_) => None,
        };
        if let Some(disk) = &disk {
            disk.set_fault(1, Fault::Crash);
        }
        let handle = self.net.running.lock().remove(&id).unwrap();
        handle.shutdown().await;
        if let Some(disk) = disk {
            disk.crash(seed);
        }
    }

    fn handle(&self, id: VoterId) -> Handle {
        self.net.running.lock()[&id].clone()
    }

    fn handles(&self) -> Vec<Handle> {
        self.net.running.lock().values().cloned().collect()
    }

    /// Waits for a leader that a majority follows; not one of `not`.
    async fn leader_but(&self, not: &[VoterId]) -> Handle {
        let find = async {
            loop {
                for handle in self.handles() {
                    let metrics = handle.metrics();
                    if metrics.role == Role::Leader && metrics.has_quorum() && !not.contains(&metrics.id) {
                        return handle;
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, find).await.expect("a leader")
    }

    async fn leader(&self) -> Handle {
        self.leader_but(&[]).await
    }

    /// Proposes until it is confirmed; only a command that surely did not happen is proposed again.
    async fn propose(&self, command: &[u8]) {
        let end = tokio::time::Instant::now() + PATIENCE;
        while tokio::time::Instant::now() < end {
            match self.leader().await.propose(command, ATTEMPT).await {
                Ok(_) => return,
                Err(ProposeError::NotLeader { .. } | ProposeError::Rejected(_)) => {}
                Err(e @ (ProposeError::Unknown(_) | ProposeError::Fatal(_))) => panic!("{e}"),
            }
        }
        panic!("nothing was confirmed");
    }

    /// Waits until a node's machine has everything that the leader's has.
    async fn caught_up(&self, id: VoterId) {
        let applied = self.leader().await.linearizable_read(PATIENCE).await.unwrap();
        let handle = self.handle(id);
        handle.wait_for(PATIENCE, |m| m.applied >= applied).await.expect("it catches up");
    }
}

fn has_leader(metrics: &Metrics, leader: VoterId) -> bool {
    metrics.leader == Some(leader)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_is_replaced_and_comes_back_from_disk() {
    let dirs = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new();
    for id in 1..=3 {
        cluster.create(id, Place::Directory(dirs.path().join(id.to_string())));
        cluster.start(id).await;
    }
    cluster.initialize().await;
    let old = cluster.leader().await.identity().voter;
    for i in 0..100u32 {
        cluster.propose(&i.to_le_bytes()).await;
    }
    cluster.crash(old, 0).await;
    let new = cluster.leader_but(&[old]).await;
    cluster.propose(b"after").await;
    let follower = cluster.handles().into_iter().find(|h| h.identity() != new.identity()).unwrap();
    follower.wait_for(PATIENCE, |m| has_leader(m, new.identity().voter)).await.unwrap();
    let refused = follower.propose(b"x", ATTEMPT).await.unwrap_err();
    let ProposeError::NotLeader { leader: Some((leader, leader_node)) } = refused else {
        panic!("{refused}")
    };
    assert_eq!((leader, leader_node), (new.identity().voter, node(new.identity().voter)));

    cluster.start(old).await;
    cluster.caught_up(old).await;
    let list = cluster.machines[&old].list();
    assert_eq!(list.len(), 101);
    assert_eq!(list[100], b"after");
    // The snapshots are at work.
    assert!(cluster.handle(old).metrics().purged.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_error_stops_its_node_only() {
    let cluster = Cluster::of(3).await;
    cluster.propose(b"before").await;
    let leader = cluster.leader().await;
    let id = leader.identity().voter;
    let Place::Memory(disk) = &cluster.places[&id] else { panic!() };
    disk.set_fault(1, Fault::Error(std::io::ErrorKind::StorageFull));
    let error = leader.propose(b"lost", ATTEMPT).await.unwrap_err();
    assert!(matches!(error, ProposeError::Fatal(_) | ProposeError::Unknown(_)), "{error}");
    let Stop::Fatal(why) = leader.fatal().await else { panic!("it goes on") };
    assert!(why.contains("no space left") && why.contains("log-"), "{why}");
    assert_eq!(leader.metrics().role, Role::Stopped);
    let again = leader.propose(b"more", ATTEMPT).await.unwrap_err();
    assert!(matches!(&again, ProposeError::Fatal(text) if text.contains("no space left")), "{again}");
    cluster.net.running.lock().remove(&id);
    cluster.leader_but(&[id]).await;
    cluster.propose(b"after").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_knows_it() {
    let cluster = Cluster::of(3).await;
    let old = cluster.leader().await;
    let id = old.identity().voter;
    cluster.net.isolate(id);
    old.wait_for(PATIENCE, |m| !m.has_quorum()).await.unwrap();
    let unknown = old.propose(b"nowhere", Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(unknown, ProposeError::Unknown(_)), "{unknown}");
    assert!(old.linearizable_read(ATTEMPT).await.is_err());
    let before = old.metrics().last_log;
    let in_its_log = tokio::spawn({
        let old = old.clone();
        async move { old.propose(b"nowhere either", PATIENCE).await }
    });
    old.wait_for(PATIENCE, |m| m.last_log > before).await.unwrap();
    cluster.leader_but(&[id]).await;
    cluster.propose(b"majority").await;
    cluster.net.heal();
    old.wait_for(PATIENCE, |m| m.role == Role::Follower && m.has_quorum()).await.unwrap();
    cluster.caught_up(id).await;
    assert_eq!(cluster.machines[&id].list(), [b"majority"]);
    // Another leader took it out of this log, but a third one could still have had it.
    let lost = in_its_log.await.unwrap().unwrap_err();
    assert!(matches!(&lost, ProposeError::Unknown(why) if why.contains("lead")), "{lost}");
}

/// What csvd makes of a follower's metrics and of the word of its leader, which comes with heartbeats.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_in_a_minority_does_not_take_its_old_leader_for_the_majority() {
    let cluster = Cluster::of(5).await;
    let old = cluster.leader().await;
    let id = old.identity().voter;
    let follower = cluster.handle(if id == 1 { 2 } else { 1 });
    let with = follower.identity().voter;
    follower.wait_for(PATIENCE, |m| m.leader == Some(id) && m.leader_age_ms.is_some()).await.unwrap();
    assert!(follower.metrics().contact_age_ms(Some(0)).is_some());
    for other in (1..=5).filter(|other| ![id, with].contains(other)) {
        for one in [id, with] {
            cluster.net.faults.lock().cut.extend([(one, other), (other, one)]);
        }
    }
    old.wait_for(PATIENCE, |m| !m.has_quorum()).await.unwrap();
    let confirmed = std::time::Instant::now();
    let new = cluster.leader_but(&[id]).await;
    assert_ne!(new.identity().voter, with);
    // It hears the old leader as before, and goes by what that says of its quorum.
    let before = follower.wait_for(PATIENCE, |m| m.leader == Some(id) && m.has_quorum()).await.unwrap();
    assert_eq!(before.role, Role::Follower);
    let age = u64::try_from(confirmed.elapsed().as_millis()).unwrap();
    assert!(before.contact_age_ms(Some(age)) >= Some(age));
    assert_eq!(before.contact_age_ms(None), None);
    assert!(!old.metrics().has_quorum());
    cluster.net.heal();
    follower.wait_for(PATIENCE, |m| m.leader.is_some_and(|leader| leader != id)).await.unwrap();
}

/// The others do not hear the leader, but it hears them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_not_heard_is_replaced() {
    let cluster = Cluster::of(3).await;
    let old = cluster.leader().await.identity().voter;
    for other in 1..=3 {
        cluster.net.faults.lock().cut.insert((old, other));
    }
    cluster.leader_but(&[old]).await;
    cluster.propose(b"goes on").await;
    cluster.net.heal();
    cluster.caught_up(old).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lead_is_handed_over() {
    let cluster = Cluster::of(3).await;
    let old = cluster.leader().await;
    let id = old.identity().voter;
    let mut changes = old.changes();
    old.step_down(PATIENCE).await.unwrap();
    assert!(changes.changed().await);
    let new = cluster.leader_but(&[id]).await;
    cluster.propose(b"after").await;
    // Without this the heartbeats of the old one would be off for good.
    new.step_down(PATIENCE).await.unwrap();
    cluster.leader_but(&[new.identity().voter]).await;
    cluster.propose(b"and after").await;
    old.shutdown().await;
    while changes.changed().await {}
    assert_eq!(old.fatal().await, Stop::Shutdown);
}

/// Who asks for the lead gets it as soon as the lease of the last leader is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_election_can_be_asked_for() {
    let mut cluster = Cluster::new();
    for id in 1..=3 {
        cluster.create(id, Place::Memory(FaultyDisk::default()));
        cluster.start(id).await;
        cluster.handle(id).set_electable(id == 1);
    }
    cluster.initialize().await;
    cluster.leader_but(&[2, 3]).await;
    cluster.crash(1, 0).await;
    let candidate = cluster.handle(2);
    let elect = async {
        while candidate.metrics().role != Role::Leader {
            candidate.trigger_elect().await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(PATIENCE, elect).await.expect("it leads");
    assert_eq!(cluster.leader().await.identity().voter, 2);
}

struct Closed;

impl Gate for Closed {
    fn verify(&self) -> crate::transport::BoxFuture<'_, bool> {
        Box::pin(async { false })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_behind_a_closed_gate_says_nothing_and_stops() {
    let mut cluster = Cluster::new();
    for id in 1..=3 {
        cluster.create(id, Place::Memory(FaultyDisk::default()));
        cluster.gate = if id == 3 { Some(Arc::new(Closed)) } else { None };
        cluster.start(id).await;
    }
    let gated = cluster.handle(3);
    cluster.initialize().await;
    cluster.propose(b"by two of three").await;
    assert!(matches!(gated.fatal().await, Stop::Fatal(why) if why.contains("gate")));
    let leader = cluster.leader().await;
    assert_eq!(leader.metrics().followers[&3].ack_age_ms, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_and_a_witness_on_a_block_region() {
    let mut cluster = Cluster::new();
    for id in [1, 2] {
        cluster.create(id, Place::Memory(FaultyDisk::default()));
    }
    cluster.create(3, Place::Blocks(FaultyBlocks::new(4 << 20)));
    for id in 1..=3 {
        cluster.start(id).await;
    }
    cluster.handle(3).set_electable(false);
    cluster.initialize().await;
    cluster.leader_but(&[3]).await;
    for i in 0..150u32 {
        cluster.propose(&i.to_le_bytes()).await;
    }
    let lost = cluster.leader().await.identity().voter;
    cluster.crash(lost, 1).await;
    // The witness moves: stops here, starts there, with all that it had.
    cluster.crash(3, 1).await;
    cluster.start(3).await;
    cluster.leader_but(&[lost]).await;
    cluster.propose(b"two of three").await;
    cluster.start(lost).await;
    cluster.caught_up(lost).await;
    cluster.caught_up(3).await;
    assert_eq!(cluster.machines[&3].list(), cluster.machines[&lost].list());
    assert_eq!(cluster.machines[&3].list().len(), 151);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_is_refused() {
    let cluster = Cluster::of(1).await;
    let leader = cluster.leader().await;
    let rejected = |r: Result<(), ProposeError>| matches!(r, Err(ProposeError::Rejected(_)));
    assert!(rejected(leader.initialize(BTreeMap::from([(1, node(1))])).await));
    assert!(rejected(leader.change_voters(BTreeSet::new(), ATTEMPT).await));
    assert!(rejected(leader.change_voters(BTreeSet::from([1, 9]), ATTEMPT).await));
    assert!(rejected(leader.remove_nodes(BTreeSet::from([1]), ATTEMPT).await));
    assert!(rejected(leader.set_node(9, node(9), ATTEMPT).await));
    let long = vec![0; crate::COMMAND_BYTES_MAX + 1];
    assert!(matches!(leader.propose(&long, ATTEMPT).await, Err(ProposeError::Rejected(_))));
    assert_eq!(leader.metrics().quorum_age_ms, Some(0));
    leader.shutdown().await;
    assert_eq!(leader.fatal().await, Stop::Shutdown);
}
