//! Blocks that are freed under a layout must never be written through it any more.
//!
//! n1 writes one file in a loop, directly. n2 truncates, punches, unlinks and replaces that file. Everything else on
//! the volume is full of pattern files, made anew after every round from the space that was freed, so a write that
//! comes too late lands in one of them. Every byte of them is checked.

use anyhow::{Context as _, ensure};
use csv_tests::driver::Node as _;
use csv_tests::lab::{Lab, MOUNT};
use csv_tests::node_agent::NodeAgent;
use csv_tests::ops::{Allocate, How, Op, Reply};
use csv_tests::rng::{self, Rng};
use csv_tests::tools;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// The file that is fought over.
const VICTIM_BYTES: u64 = 64 << 20;
const WRITE_BYTES: u64 = 64 << 10;
/// MiB per pattern file: small, so that freed space is taken at once.
const PATTERN_MIB: &str = "4";
/// Fewer in a round say too little.
const PATTERN_FILES_MIN: u64 = 16;
const DEADLINE: Duration = Duration::from_secs(600);

const CREATE: How = How { create: true, exclusive: false, truncate: false, append: false, direct: false };

fn rounds() -> u64 {
    if csv_tests::full() { 60 } else { 12 }
}

/// Writes until told to stop; opens the name anew now and then, because n2 replaces it.
fn writer(mut agent: NodeAgent, seed: u64, stop: &AtomicBool, writes: &AtomicU64) -> anyhow::Result<()> {
    let mut rng = Rng::new(seed);
    let direct = How { direct: true, ..CREATE };
    while !stop.load(Ordering::Relaxed) {
        agent.call(&Op::Open { slot: 0, name: "victim".into(), how: direct })?;
        for _ in 0..64 {
            let offset = rng.below(VICTIM_BYTES / WRITE_BYTES) * WRITE_BYTES;
            let op = Op::Write { slot: 0, offset, len: WRITE_BYTES, seed: rng.next_u64() };
            let reply = agent.call(&op)?;
            if matches!(reply, Reply::Count { .. }) {
                writes.fetch_add(1, Ordering::Relaxed);
            } else {
                // The volume is full on purpose.
                ensure!(reply == Reply::Failed { errno: 28 }, "write on n1: {}", reply.brief());
            }
        }
    }
    agent.stop()
}

/// One way to free the victim's blocks.
fn free(agent: &mut NodeAgent, rng: &mut Rng) -> anyhow::Result<&'static str> {
    let name = || "victim".to_owned();
    let (what, ops) = match rng.below(4) {
        0 => ("truncate", vec![Op::Truncate { name: name(), size: rng.below(VICTIM_BYTES) }]),
        1 => {
            let punch = Op::Allocate { slot: 1, kind: Allocate::Punch, offset: 4096, len: VICTIM_BYTES / 2 };
            ("punch", vec![Op::Open { slot: 1, name: name(), how: CREATE }, punch, Op::Close { slot: 1 }])
        }
        2 => ("unlink", vec![Op::Unlink { name: name() }]),
        _ => {
            let create = Op::Open { slot: 2, name: "new".into(), how: CREATE };
            let rename = Op::Rename { from: "new".into(), to: name() };
            ("rename over it", vec![create, Op::Close { slot: 2 }, rename])
        }
    };
    for op in ops {
        let reply = agent.call(&op)?;
        // A name that is not there yet, or no space for a new one, is no fault of this test.
        let fine = matches!(reply, Reply::Done | Reply::Failed { errno: 2 | 28 });
        ensure!(fine, "n2 {op:?}: {}", reply.brief());
    }
    Ok(what)
}

#[test]
fn late_writes_never_hit_other_files() -> anyhow::Result<()> {
    let seed = rng::seed("freed_blocks");
    let fs = std::env::var("CSV_TEST_FS").unwrap_or_else(|_| "ext4".into());
    let lab = Lab::up_with("freed", &fs, &["--size", "512M"])?;
    let dir = format!("{MOUNT}/freed");
    lab.sh("n2", &format!("mkdir {dir}"))?;
    let agent_program = tools::agent()?.to_string_lossy().into_owned();
    let mut rng = Rng::new(seed);
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let writer_agent = NodeAgent::start(&lab, "n1", &dir)?;
    let mut freer = NodeAgent::start(&lab, "n2", &dir)?;
    let result = std::thread::scope(|scope| {
        let writing = scope.spawn(|| writer(writer_agent, seed, &stop, &writes));
        let mut round_trip = |round: u64| -> anyhow::Result<()> {
            let what = free(&mut freer, &mut rng)?;
            let patterns = format!("{MOUNT}/patterns{round}");
            let fill = [agent_program.as_str(), "fill", &patterns, PATTERN_MIB];
            let files = lab.exec("n2", &fill, DEADLINE)?.ok("filling the volume")?;
            let files = files.trim().to_owned();
            let verify = [agent_program.as_str(), "verify", &patterns, PATTERN_MIB, &files];
            // From n1, which reads the LUN itself: n2 might still have in memory what it wrote.
            lab.exec("n1", &verify, DEADLINE)?.ok(&format!("after {what}, seed {seed}, round {round}"))?;
            println!("round {round}: {what}, {files} pattern files intact, {writes:?} writes so far");
            // Some rounds keep their files, so that the free space is always small.
            // When they are nearly everything, all go: a round without pattern files would find nothing.
            if rng.one_in(2) || files.parse::<u64>()? < PATTERN_FILES_MIN {
                lab.sh("n2", &format!("rm -rf {MOUNT}/patterns*"))?;
            }
            Ok(())
        };
        let result = (0..rounds()).try_for_each(&mut round_trip);
        stop.store(true, Ordering::Relaxed);
        let wrote = writing.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?;
        result.and(wrote.context("the writer on n1"))
    });
    result?;
    freer.stop()?;
    let counts = lab.state("n1")?.io;
    println!("freed_blocks: {writes:?} writes, n1 {counts:?}, seed {seed}");
    ensure!(counts.direct_writes > 100, "n1 wrote directly only {} times", counts.direct_writes);
    ensure!(counts.layouts_recalled > 0, "no layout was recalled");
    lab.finish()
}
