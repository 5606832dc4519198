//! What an idle cluster costs.

use super::{Cluster, FaultyDisk, Place};
use crate::options::Timing;
use std::time::{Duration, Instant};

fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/schedstat").unwrap();
    // Only this thread; the threads of the runtime are summed up below.
    let mut nanoseconds: u64 = stat.split_whitespace().next().unwrap().parse().unwrap();
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        if task.file_name().to_string_lossy() != std::process::id().to_string() {
            let stat = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            nanoseconds += stat.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Duration::from_nanos(nanoseconds)
}

/// Run by hand, alone: `cargo test --release -p csv-raft idle -- --ignored --nocapture --exact <name>`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn three_idle_voters_cost_little() {
    let mut cluster = Cluster::new();
    cluster.timing = Timing::default();
    for id in 1..=3 {
        cluster.create(id, Place::Memory(FaultyDisk::default()));
        cluster.start(id).await;
    }
    cluster.initialize().await;
    cluster.propose(b"x").await;
    let (cpu, wall) = (cpu_time(), Instant::now());
    let seconds = 20;
    for _ in 0..seconds {
        tokio::time::sleep(Duration::from_secs(1)).await;
        for handle in cluster.handles() {
            assert!(serde_json::to_string(&handle.metrics()).unwrap().len() > 10);
        }
    }
    let percent = (cpu_time() - cpu).as_secs_f64() / wall.elapsed().as_secs_f64() * 100.0;
    println!(
        "3 voters idle, status once a second: {percent:.3} % of a core, {:.3} % per voter",
        percent / 3.0
    );
    assert!(percent / 3.0 < 1.0);
}

/// From the crash of the leader to the first command that the next one confirms. Run by hand like the above.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn time_to_the_next_leader() {
    let mut times_ms = Vec::new();
    for seed in 0..12 {
        let mut cluster = Cluster::new();
        cluster.timing = Timing::default();
        for id in 1..=3 {
            cluster.create(id, Place::Memory(FaultyDisk::default()));
            cluster.start(id).await;
        }
        cluster.initialize().await;
        cluster.propose(b"before").await;
        let leader = cluster.leader().await.identity().voter;
        tokio::time::sleep(Duration::from_millis(1000 + seed * 25)).await;
        let crash = Instant::now();
        cluster.crash(leader, seed).await;
        cluster.propose(b"after").await;
        times_ms.push(crash.elapsed().as_millis());
    }
    times_ms.sort_unstable();
    println!("crash to next confirmed command, default timing, ms: {times_ms:?}");
}
