//! Bugs put back one at a time: the simulation must find each within so many seeds, and find nothing wrong with the same
//! seeds without it.

use csv_sim::faults::{Fault, Plan};
use csv_sim::rng::Rng;
use csv_sim::{Bugs, Failure, Sim, run};
use csv_types::NodeId;

const SEEDS: u64 = 400;

/// Finds the bug, by a broken invariant with one of these words.
fn finds(bugs: Bugs, words: &[&str]) {
    finds_in(|seed, bugs| run(seed, bugs).map(drop), bugs, words);
}

fn finds_in(run: impl Fn(u64, Bugs) -> Result<(), Box<Failure>>, bugs: Bugs, words: &[&str]) {
    for seed in 0..SEEDS {
        if let Err(failure) = run(seed, bugs) {
            println!("found by seed {seed} at {} ms: {}", failure.at_ms, failure.what);
            assert!(words.iter().any(|word| failure.what.contains(word)), "by something else: {failure}");
            if let Err(failure) = run(seed, Bugs::default()) {
                panic!("seed {seed} fails without the bug too: {failure}");
            }
            return;
        }
    }
    panic!("{bugs:?} was not found within {SEEDS} seeds");
}

const DATA: [&str; 4] = ["freed under a layout", "writes block", "shows", "both have volume"];

#[test]
fn a_grant_during_recall_is_found() {
    finds(Bugs { grant_during_recall: true, ..Bugs::default() }, &DATA);
}

#[test]
fn a_fence_without_abort_is_found() {
    finds(Bugs { fence_without_abort: true, ..Bugs::default() }, &["which was fenced"]);
}

#[test]
fn a_take_over_without_fence_is_found() {
    let words = ["which was fenced", "both have volume", "commits in epoch", "begins epoch"];
    finds(Bugs { take_without_fence: true, ..Bugs::default() }, &[&words[..], &DATA[..]].concat());
}

#[test]
fn an_epoch_not_checked_is_found() {
    finds(Bugs { epoch_not_checked: true, ..Bugs::default() }, &[&DATA[..], &["begins epoch"]].concat());
}

#[test]
fn a_lease_that_stands_for_a_fence_is_found() {
    finds(Bugs { lease_instead_of_fence: true, ..Bugs::default() }, &DATA);
}

/// A cluster with one volume, and these faults.
fn scenario(seed: u64, nodes: u32, faults: Vec<(u64, Fault)>, bugs: Bugs) -> Result<(), Box<Failure>> {
    let plan =
        Plan { nodes, volumes: 1, witness: false, loses_cache: false, aptpl: true, faults, quiet_ms: 40_000 };
    Sim::with_plan(seed, plan, Rng::new(seed), bugs).run().map(drop)
}

/// Writes are late, a node cannot reach the coordinator until its lease is over, and then the volume moves.
fn moved_after_a_lost_lease(seed: u64, bugs: Bugs) -> Result<(), Box<Failure>> {
    let pair = |a, b| Fault::Pair(NodeId(a), NodeId(b), 7_000);
    let faults = vec![
        (6_000, Fault::LateWrites(0, 12_000, 25_000)),
        (8_000, pair(1, 2)),
        (8_000, pair(2, 3)),
        (Rng::new(seed).range(14_200, 15_500), Fault::Move(0, NodeId(3))),
    ];
    scenario(seed, 3, faults, bugs)
}

#[test]
fn a_reclaim_that_is_done_too_early_is_found() {
    let bugs = Bugs { reclaim_done_too_early: true, ..Bugs::default() };
    finds_in(moved_after_a_lost_lease, bugs, &DATA);
}

#[test]
fn a_session_that_is_resumed_without_reclaim_is_found() {
    let words = ["does not come back"];
    finds(Bugs { resumed_too_early: true, ..Bugs::default() }, &[&DATA[..], &words[..]].concat());
}

/// A grant must be late or lost, and others must write before the next one.
fn a_bad_network(seed: u64, bugs: Bugs) -> Result<(), Box<Failure>> {
    let faults = vec![(6_000, Fault::BadNetwork(150, 0, 100, 30_000))];
    scenario(seed, 3, faults, bugs)
}

#[test]
fn a_hole_that_its_getter_keeps_is_found() {
    finds_in(a_bad_network, Bugs { getter_keeps_hole: true, ..Bugs::default() }, &["shows write 0"]);
}

#[test]
fn a_key_that_is_revived_is_found() {
    finds(Bugs { key_revived: true, ..Bugs::default() }, &[&DATA[..], &["which was fenced"]].concat());
}

/// A node boots and is admitted, and then does not hear from the leader what comes next: that it is given up and fenced, while
/// its key is not there yet. What the leader said before arrives late.
fn cut_off_before_it_registers(seed: u64, bugs: Bugs) -> Result<(), Box<Failure>> {
    let mut rng = Rng::new(seed);
    let mut faults = Vec::new();
    for at_ms in [7_000, 18_000, 29_000] {
        let node = NodeId(if rng.below(2) == 0 { 2 } else { 3 });
        let boot_ms = at_ms + 2_500;
        faults.push((at_ms, Fault::Crash(node, boot_ms - at_ms)));
        faults.push((boot_ms + 400, Fault::BadNetwork(0, 0, 500, 400)));
        let cut = Fault::Pair(NodeId(2), NodeId(3), 6_000);
        faults.push((boot_ms + rng.range(500, 800), cut));
    }
    scenario(seed, 3, faults, bugs)
}

/// Nodes lose their paths, and processes, while writes are late: what they give up may take effect much later.
fn paths_lost_with_late_writes(seed: u64, bugs: Bugs) -> Result<(), Box<Failure>> {
    let mut rng = Rng::new(seed);
    let mut faults = vec![(6_000, Fault::LateWrites(0, 12_000, 34_000))];
    for at_ms in [8_000, 16_000, 24_000] {
        for node in 1..=3 {
            let path = Fault::Path(NodeId(node), 0, rng.range(500, 6_000));
            faults.push((at_ms + rng.range(0, 7_000), path));
            faults.push((at_ms + rng.range(0, 7_000), Fault::KillCsvfs(NodeId(node), 0)));
        }
    }
    scenario(seed, 3, faults, bugs)
}

#[test]
fn a_volume_that_is_closed_with_io_unknown_is_found() {
    let bugs = Bugs { closed_with_io_unknown: true, ..Bugs::default() };
    finds_in(paths_lost_with_late_writes, bugs, &[&DATA[..], &["commits in epoch", "begins epoch"]].concat());
}

#[test]
fn a_layout_that_is_given_back_with_io_unknown_is_found() {
    let bugs = Bugs { returned_with_io_unknown: true, ..Bugs::default() };
    finds_in(paths_lost_with_late_writes, bugs, &DATA);
}

/// Each scenario with nothing put back.
#[test]
fn scenarios_are_mastered() {
    for seed in 1_000..1_040 {
        for scenario in [
            moved_after_a_lost_lease,
            a_bad_network,
            cut_off_before_it_registers,
            paths_lost_with_late_writes,
        ] {
            if let Err(failure) = scenario(seed, Bugs::default()) {
                panic!("{failure}");
            }
        }
    }
}
