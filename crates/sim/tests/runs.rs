//! Whole clusters under fixed and fresh seeds.
//!
//! `CSV_SIM_SEEDS=N`: so many fresh seeds (default below). `CSV_SIM_FROM=S`: they begin there, instead of with the clock.
//! `CSV_SIM_SEED=S`: that seed alone, in the test `one_seed`; `CSV_SIM_PRINT=1` shows it as it goes.

use csv_sim::{Bugs, Failure, Sim, run};
use std::time::{SystemTime, UNIX_EPOCH};

/// Seeds that found something once.
const FIXED: [u64; 20] = [
    0, 6, 20, 40, 203, 623, 715, 997, 1667, 1817, 2263, 2415, 2453, 2600, 200_651, 203_943, 2534, 3634,
    10_031_383, 10_051_143,
];
const FRESH: u64 = 60;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} must be a number")))
}

fn all_well(seeds: impl Iterator<Item = u64>) {
    let failures: Vec<Box<Failure>> = seeds.filter_map(|seed| run(seed, Bugs::default()).err()).collect();
    if let Some(first) = failures.first() {
        let seeds: Vec<u64> = failures.iter().map(|failure| failure.seed).collect();
        panic!("{first}\nseeds that fail: {seeds:?}");
    }
}

#[test]
fn fixed_seeds() {
    all_well(FIXED.into_iter());
}

#[test]
#[expect(clippy::disallowed_methods, reason = "fresh seeds come from the clock; they are printed")]
fn fresh_seeds() {
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs() << 20);
    let from = number("CSV_SIM_FROM").unwrap_or_else(clock);
    let count = number("CSV_SIM_SEEDS").unwrap_or(FRESH);
    println!("seeds {from} to {}", from + count);
    all_well(from..from + count);
}

#[test]
fn one_seed() {
    let Some(seed) = number("CSV_SIM_SEED") else { return };
    let sim = Sim::new(seed, Bugs::default());
    let sim = if number("CSV_SIM_PRINT").is_some() { sim.printing() } else { sim };
    match sim.run() {
        Ok(outcome) => println!("{outcome:?}"),
        Err(failure) => panic!("{failure}"),
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..3 {
        let (first, again) = (run(seed, Bugs::default()).unwrap(), run(seed, Bugs::default()).unwrap());
        assert_eq!(first, again);
        assert_ne!(first.hash, run(seed + 1000, Bugs::default()).unwrap().hash);
    }
}

#[test]
fn runs_do_something() {
    let runs: Vec<_> = (0..30).map(|seed| run(seed, Bugs::default()).unwrap()).collect();
    let sum = |what: fn(&csv_sim::Outcome) -> u64| runs.iter().map(what).sum::<u64>();
    assert!(sum(|run| run.progress) > 10_000, "clients get things done: {runs:#?}");
    assert!(sum(|run| run.takeovers) > 40, "volumes move: {runs:#?}");
}
