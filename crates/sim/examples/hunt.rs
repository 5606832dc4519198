//! Runs seed after seed, and says which fail: `hunt FROM COUNT SECONDS [BUG ...]`, with the names of [`Bugs`]' fields.
//! A single seed is shown as it goes.

use csv_sim::{Bugs, Sim};
use std::time::{Duration, Instant};

type Flag = fn(&mut Bugs) -> &mut bool;

const BUGS: [(&str, Flag); 12] = [
    ("grant_during_recall", |bugs| &mut bugs.grant_during_recall),
    ("fence_without_abort", |bugs| &mut bugs.fence_without_abort),
    ("take_without_fence", |bugs| &mut bugs.take_without_fence),
    ("epoch_not_checked", |bugs| &mut bugs.epoch_not_checked),
    ("lease_instead_of_fence", |bugs| &mut bugs.lease_instead_of_fence),
    ("reclaim_done_too_early", |bugs| &mut bugs.reclaim_done_too_early),
    ("resumed_too_early", |bugs| &mut bugs.resumed_too_early),
    ("getter_keeps_hole", |bugs| &mut bugs.getter_keeps_hole),
    ("key_revived", |bugs| &mut bugs.key_revived),
    ("registration_not_confirmed", |bugs| &mut bugs.registration_not_confirmed),
    ("closed_with_io_unknown", |bugs| &mut bugs.closed_with_io_unknown),
    ("returned_with_io_unknown", |bugs| &mut bugs.returned_with_io_unknown),
];

#[expect(clippy::disallowed_methods, reason = "how long it runs, not what it does")]
fn now() -> Instant {
    Instant::now()
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, or: u64| args.get(at).and_then(|text| text.parse().ok()).unwrap_or(or);
    let (from, count, seconds) = (number(0, 0), number(1, 1_000), number(2, 60));
    let mut bugs = Bugs::default();
    for name in args.iter().skip(3) {
        let (_, flag) = BUGS.iter().find(|(known, _)| known == name).expect("a field of Bugs");
        *flag(&mut bugs) = true;
    }
    let begin = now();
    let (mut runs, mut events, mut failed) = (0_u64, 0_u64, 0_u64);
    for seed in from..from.saturating_add(count) {
        if begin.elapsed() > Duration::from_secs(seconds) {
            break;
        }
        runs += 1;
        let sim = Sim::new(seed, bugs);
        let sim = if count == 1 { sim.printing() } else { sim };
        match sim.run() {
            Ok(outcome) => events += outcome.events,
            Err(failure) => {
                failed += 1;
                println!("seed {seed} fails at {} ms: {}", failure.at_ms, failure.what);
            }
        }
    }
    let took_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
    println!(
        "{runs} seeds from {from}, {failed} failed, {events} events in {took_ms} ms: {} a second",
        events * 1000 / took_ms
    );
}
