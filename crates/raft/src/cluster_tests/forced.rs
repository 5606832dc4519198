//! A voter that was made the only one by force, and one of before that had decided something alone.

use super::{ATTEMPT, Cluster, PATIENCE, Place, node};
use crate::error::Stop;
use crate::metrics::Role;
use crate::storage::force::sole_voter;
use crate::types::{Identity, VoterId};
use std::collections::BTreeSet;
use std::path::Path;

async fn stop(cluster: &Cluster, id: VoterId) {
    let handle = cluster.net.running.lock().remove(&id).unwrap();
    handle.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_voter_leads_alone_and_what_was_given_up_is_noticed() {
    let dirs = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new();
    let path = |id: VoterId| dirs.path().join(id.to_string());
    cluster.create(1, Place::Directory(path(1)));
    cluster.start(1).await;
    cluster.initialize().await;
    cluster.create(2, Place::Directory(path(2)));
    cluster.start(2).await;
    cluster.leader().await.add_learner(2, node(2), PATIENCE).await.unwrap();
    cluster.propose(b"both know this").await;
    cluster.caught_up(2).await;
    stop(&cluster, 2).await;
    cluster.propose(b"only one knows this").await;
    stop(&cluster, 1).await;

    force(&cluster, &path(2), 2);
    cluster.start(2).await;
    let forced = cluster.leader().await;
    assert_eq!(forced.metrics().voters, [BTreeSet::from([2])]);
    cluster.propose(b"the forced one knows this").await;
    let known: [&[u8]; 3] = [b"both know this", b"forced", b"the forced one knows this"];
    assert_eq!(cluster.machines[&2].list(), known);

    // The one of before is a majority of its own membership; when the two meet, it stops.
    cluster.start(1).await;
    let former = cluster.handle(1);
    let fatal = async {
        loop {
            let forced = cluster.handle(2);
            if forced.metrics().role == Role::Leader && !forced.metrics().nodes.contains_key(&1) {
                // Refused while it is elected anew, because of the other one's term.
                let _again = forced.add_learner(1, node(1), ATTEMPT).await;
            }
            if let Ok(stop) = tokio::time::timeout(ATTEMPT, former.fatal()).await {
                return stop;
            }
        }
    };
    let stop = tokio::time::timeout(PATIENCE, fatal).await.expect("it notices");
    assert!(matches!(&stop, Stop::Fatal(why) if why.contains("cluster rejoin")), "{stop:?}");
}

fn force(cluster: &Cluster, path: &Path, id: VoterId) {
    let me = Identity { cluster: cluster.id, voter: id };
    let foreign = Identity { voter: id + 1, ..me };
    assert!(sole_voter(path, foreign, node(id), b"forced").is_err(), "not another's");
    sole_voter(path, me, node(id), b"forced").unwrap();
}
