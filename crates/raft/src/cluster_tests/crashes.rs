//! Crashes and a bad network from a seed, while commands are proposed: nothing that was confirmed is ever lost, and
//! nothing that was refused ever happens.

use super::net::Faults;
use super::{ATTEMPT, Cluster, PATIENCE};
use crate::error::ProposeError;
use crate::metrics::Role;
use crate::types::VoterId;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[derive(Default)]
struct Outcomes {
    confirmed: BTreeSet<u64>,
    refused: BTreeSet<u64>,
}

/// Proposes numbers, each once, wherever there is a leader.
async fn client(
    net: Arc<super::Net>,
    first: u64,
    step: u64,
    outcomes: Arc<Mutex<Outcomes>>,
    stop: Arc<AtomicBool>,
) {
    let mut number = first;
    while !stop.load(Ordering::Relaxed) {
        let handles: Vec<_> = net.running.lock().values().cloned().collect();
        // Now and then one that does not lead, to be refused.
        let anybody = number.is_multiple_of(7);
        let Some(leader) = handles.into_iter().find(|h| (h.metrics().role == Role::Leader) != anybody) else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        match leader.propose(&number.to_le_bytes(), Duration::from_millis(800)).await {
            Ok(_) => drop(outcomes.lock().confirmed.insert(number)),
            Err(ProposeError::NotLeader { .. } | ProposeError::Rejected(_)) => {
                outcomes.lock().refused.insert(number);
            }
            Err(ProposeError::Unknown(_) | ProposeError::Fatal(_)) => {}
        }
        number += step;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn numbers(list: &[Vec<u8>]) -> Vec<u64> {
    list.iter().map(|c| u64::from_le_bytes(c.as_slice().try_into().unwrap())).collect()
}

async fn torment(count: u64, rounds: u32, seed: u64) {
    println!("seed {seed} with {count} voters");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::of(count).await;
    cluster.leader().await;
    let outcomes = Arc::new(Mutex::new(Outcomes::default()));
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..3)
        .map(|i| tokio::spawn(client(cluster.net.clone(), i, 3, outcomes.clone(), stop.clone())))
        .collect();
    for _ in 0..rounds {
        let faults = Faults {
            lost: rng.random_range(0.0..0.1),
            doubled: rng.random_range(0.0..0.1),
            delay_ms_max: rng.random_range(0..20),
            ..Faults::default()
        };
        *cluster.net.faults.lock() = faults;
        if rng.random_bool(0.4) {
            let (from, to) = (rng.random_range(1..=count), rng.random_range(1..=count));
            cluster.net.faults.lock().cut.insert((from, to));
        }
        // Up to all of them at once: what is durable is what counts.
        let victims: BTreeSet<VoterId> =
            (0..rng.random_range(1..=count)).map(|_| rng.random_range(1..=count)).collect();
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..600))).await;
        for id in &victims {
            cluster.crash(*id, rng.random()).await;
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..600))).await;
        for id in victims {
            cluster.start(id).await;
        }
    }
    cluster.net.heal();
    cluster.leader().await;
    let before = outcomes.lock().confirmed.len();
    let progress = async {
        while outcomes.lock().confirmed.len() < before + 5 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, progress).await.expect("it goes on after everything is healed");
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let applied = cluster.leader().await.linearizable_read(ATTEMPT * 5).await.unwrap();
    for id in 1..=count {
        cluster.handle(id).wait_for(PATIENCE, |m| m.applied >= applied).await.unwrap();
    }
    check(&cluster, count, seed, &outcomes.lock());
}

fn check(cluster: &Cluster, count: u64, seed: u64, outcomes: &Outcomes) {
    let first = numbers(&cluster.machines[&1].list());
    for id in 2..=count {
        let other = numbers(&cluster.machines[&id].list());
        let common = first.len().min(other.len());
        assert_eq!(first[..common], other[..common], "seed {seed}: voters 1 and {id} differ");
    }
    let there: BTreeSet<u64> = first.iter().copied().collect();
    assert_eq!(there.len(), first.len(), "seed {seed}: a command was carried out twice");
    let lost: Vec<_> = outcomes.confirmed.difference(&there).collect();
    assert!(lost.is_empty(), "seed {seed}: confirmed and lost: {lost:?}");
    let undead: Vec<_> = outcomes.refused.intersection(&there).collect();
    assert!(undead.is_empty(), "seed {seed}: refused and carried out: {undead:?}");
    assert!(!outcomes.confirmed.is_empty(), "seed {seed}: nothing was confirmed");
    println!(
        "{} confirmed, {} refused, {} carried out",
        outcomes.confirmed.len(),
        outcomes.refused.len(),
        first.len()
    );
}

/// CSV_TEST_SEED repeats a run; CSV_TEST_FULL=1 makes it long.
fn seed() -> u64 {
    std::env::var("CSV_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random)
}

fn rounds(short: u32) -> u32 {
    if std::env::var_os("CSV_TEST_FULL").is_some() { short * 10 } else { short }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_voters_lose_nothing_fixed_seed() {
    torment(3, rounds(8), 20_261_126).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_voters_lose_nothing_fresh_seed() {
    torment(3, rounds(8), seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_voters_lose_nothing_fresh_seed() {
    torment(5, rounds(5), seed()).await;
}
