//! Members come and go.

use super::{ATTEMPT, Cluster, FaultyDisk, Identity, ListMachine, PATIENCE, Place, directory, node};
use crate::error::ProposeError;
use crate::types::VoterId;
use std::collections::BTreeSet;

impl Cluster {
    /// Starts an empty node and makes it a learner.
    async fn add(&mut self, id: VoterId) {
        self.create(id, Place::Memory(FaultyDisk::default()));
        self.start(id).await;
        self.leader().await.add_learner(id, node(id), PATIENCE).await.unwrap();
    }

    async fn set_voters(&self, voters: &[VoterId]) {
        let voters: BTreeSet<VoterId> = voters.iter().copied().collect();
        for _ in 0..20 {
            match self.leader().await.change_voters(voters.clone(), PATIENCE).await {
                Ok(()) => return,
                Err(ProposeError::Fatal(e)) => panic!("{e}"),
                // The leader changed; the change is asked for until it is done.
                Err(_) => {}
            }
        }
        panic!("the voters cannot be changed to {voters:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn voters_change_one_at_a_time() {
    let mut cluster = Cluster::of(1).await;
    let mut voters = vec![1];
    for id in 2..=5 {
        cluster.add(id).await;
        voters.push(id);
        cluster.set_voters(&voters).await;
        cluster.propose(&[u8::try_from(id).unwrap()]).await;
    }
    let leader = cluster.leader().await;
    assert_eq!(leader.metrics().voters, [BTreeSet::from([1, 2, 3, 4, 5])]);
    // The leader gives up its own vote, and then leaves.
    let gone = leader.identity().voter;
    voters.retain(|id| *id != gone);
    cluster.set_voters(&voters).await;
    cluster.propose(b"led by one without a vote").await;
    leader.step_down(PATIENCE).await.unwrap();
    let leader = cluster.leader_but(&[gone]).await;
    leader.remove_nodes(BTreeSet::from([gone]), ATTEMPT).await.unwrap();
    assert!(!leader.metrics().nodes.contains_key(&gone));
    cluster.crash(gone, 0).await;
    while voters.len() > 1 {
        let gone = voters.pop().unwrap();
        cluster.set_voters(&voters).await;
        cluster.propose(b"fewer").await;
        assert!(cluster.leader().await.metrics().learners.contains(&gone));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_that_is_far_behind_gets_the_snapshot() {
    let mut cluster = Cluster::of(1).await;
    // A snapshot of more than two pieces.
    for i in 0..100 {
        cluster.propose(&vec![i; 25_000]).await;
    }
    let leader = cluster.leader().await;
    leader.wait_for(PATIENCE, |m| m.purged.is_some()).await.unwrap();
    {
        let mut faults = cluster.net.faults.lock();
        (faults.lost, faults.doubled, faults.delay_ms_max) = (0.1, 0.2, 10);
    }
    cluster.add(2).await;
    cluster.caught_up(2).await;
    assert!(cluster.handle(2).metrics().snapshot.is_some());
    assert_eq!(cluster.machines[&2].list(), cluster.machines[&1].list());
    // And it stands on its own after a restart.
    cluster.crash(2, 5).await;
    cluster.start(2).await;
    cluster.caught_up(2).await;
    assert_eq!(cluster.machines[&2].list(), cluster.machines[&1].list());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_begins_with_a_state_and_grows() {
    let before = ListMachine::default();
    let old: Vec<Vec<u8>> = (0..30).map(|i| vec![i; 3]).collect();
    *before.0.lock() = old.clone();
    let mut cluster = Cluster::new();
    let disk = FaultyDisk::default();
    let me = Identity { cluster: cluster.id, voter: 2 };
    let state = crate::types::StateMachine::snapshot(&before);
    directory::create_with_on(&mut disk.clone(), me, node(2), state.clone()).unwrap();
    let again = directory::create_with_on(&mut disk.clone(), me, node(2), state);
    assert!(again.unwrap_err().to_string().contains("not empty"));
    cluster.places.insert(2, Place::Memory(disk));
    cluster.start(2).await;
    cluster.propose(b"new").await;
    assert_eq!(cluster.machines[&2].list(), [old, vec![b"new".to_vec()]].concat());
    cluster.add(3).await;
    cluster.caught_up(3).await;
    assert_eq!(cluster.machines[&3].list(), cluster.machines[&2].list());
    cluster.crash(2, 1).await;
    cluster.start(2).await;
    cluster.propose(b"after a crash").await;
    assert_eq!(cluster.machines[&2].list().len(), 32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_a_lost_database_comes_back_empty() {
    let mut cluster = Cluster::of(3).await;
    for i in 0..60 {
        cluster.propose(&[i]).await;
    }
    let lost = (1..=3).find(|id| *id != 1).unwrap();
    cluster.crash(lost, 3).await;
    // First its vote is taken away and it is removed; only then it may start empty under the same id.
    let rest: Vec<VoterId> = (1..=3).filter(|id| *id != lost).collect();
    cluster.leader_but(&[lost]).await;
    cluster.set_voters(&rest).await;
    cluster.leader().await.remove_nodes(BTreeSet::from([lost]), PATIENCE).await.unwrap();
    cluster.add(lost).await;
    cluster.caught_up(lost).await;
    cluster.set_voters(&[1, 2, 3]).await;
    // It counts again: without another one the two of them are a majority.
    let other = rest.into_iter().find(|id| *id != 1).unwrap();
    cluster.crash(other, 4).await;
    cluster.leader_but(&[other]).await;
    cluster.propose(b"with the new one").await;
    assert_eq!(cluster.leader().await.metrics().voters, [BTreeSet::from([1, 2, 3])]);
}
