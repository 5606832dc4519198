use super::*;
use crate::db::tests::{Bed, MINUTE_MS};
use proptest::prelude::*;

const A: NodeId = NodeId(2);
const B: NodeId = NodeId(3);

struct Clock {
    beats: Heartbeats,
    out: Vec<Output>,
}

impl Clock {
    fn new() -> Self {
        let mut beats = Heartbeats::new(&Settings::default(), 1_000);
        beats.set_peers(&[A, B].into());
        Clock { beats, out: Vec::new() }
    }

    fn step(&mut self, input: Input) -> Vec<Output> {
        self.beats.step(&input, &mut self.out);
        std::mem::take(&mut self.out)
    }

    fn beat(&mut self, from: NodeId, incarnation: u64, at_ms: u64) -> Vec<Output> {
        self.step(Input::Beat { from, incarnation, at_ms })
    }

    /// Ticks every 100 ms up to then.
    fn run(&mut self, until_ms: u64) -> Vec<Output> {
        let mut out = Vec::new();
        while self.beats.now_ms < until_ms {
            let at_ms = (self.beats.now_ms + 100).min(until_ms);
            out.extend(self.step(Input::Tick { at_ms }));
        }
        out
    }
}

#[test]
fn a_silent_node_is_missed_once_and_heard_again() {
    let mut clock = Clock::new();
    assert_eq!(clock.beat(A, 7, 1_000), [Output::Heard { node: A, incarnation: 7 }]);
    assert_eq!(clock.beat(A, 7, 1_100), []);
    assert_eq!(clock.run(2_599), []);
    assert_eq!(clock.run(2_600), [Output::Missed { node: A, silent_ms: 1_500 }]);
    assert_eq!(clock.run(9_000), [], "said once");
    assert_eq!(clock.beat(A, 7, 9_000), [Output::Heard { node: A, incarnation: 7 }]);
    assert_eq!(clock.beats.heard(), [A].into(), "B was never heard");
}

#[test]
fn incarnations_only_go_up() {
    let mut clock = Clock::new();
    clock.beat(A, 7, 1_000);
    assert_eq!(clock.beat(A, 8, 1_100), [Output::Heard { node: A, incarnation: 8 }]);
    clock.run(2_500);
    assert_eq!(clock.beat(A, 7, 2_500), [], "a late one of the old incarnation");
    assert_eq!(clock.run(2_600).len(), 1, "does not keep the new one alive");
    assert_eq!(clock.beat(NodeId(9), 1, 2_600), [], "nobody's beat");
}

#[test]
fn a_freeze_is_not_held_against_the_others() {
    let mut clock = Clock::new();
    clock.beat(A, 1, 1_000);
    clock.run(2_000);
    assert_eq!(clock.step(Input::Tick { at_ms: 12_000 }), [Output::Slept { ms: 10_000 }]);
    assert_eq!(clock.run(13_499), [], "its clock starts anew");
    assert_eq!(clock.run(13_500), [Output::Missed { node: A, silent_ms: 1_500 }]);
}

#[test]
fn a_short_freeze_moves_the_deadline_and_is_not_reported() {
    let mut clock = Clock::new();
    clock.beat(A, 1, 1_000);
    clock.run(1_500);
    assert_eq!(clock.step(Input::Tick { at_ms: 2_700 }), [], "1700 ms silent, 900 of them asleep");
    assert_eq!(clock.run(3_399), []);
    assert_eq!(clock.run(3_400).len(), 1);
}

#[test]
fn waking_up_by_a_beat_is_noticed_as_well() {
    let mut clock = Clock::new();
    clock.beat(A, 1, 1_000);
    let out = clock.beat(B, 1, 5_000);
    assert_eq!(out, [Output::Slept { ms: 4_000 }, Output::Heard { node: B, incarnation: 1 }]);
}

#[test]
fn a_clock_that_goes_back_stands_still() {
    let mut clock = Clock::new();
    clock.beat(A, 1, 1_000);
    clock.run(2_000);
    assert_eq!(clock.step(Input::Tick { at_ms: 10 }), []);
    assert_eq!(clock.beats.silent_ms(A), Some(1_000));
}

fn observer(now_unix_ms: u64) -> Observer {
    Observer { me: NodeId(1), incarnation: 1, now_unix_ms }
}

#[test]
fn verdicts_follow_what_is_heard() {
    let mut bed = Bed::nodes(3);
    let mut clock = Clock::new();
    clock.beat(A, 1, 1_000);
    assert_eq!(verdicts(&bed.db, &clock.beats, observer(bed.now)), [], "B has its time");
    clock.run(2_500);
    clock.beat(A, 1, 2_500);
    let down = |node| Command::NodeDown {
        node,
        incarnation: 1,
        reason: "no heartbeat for 1500 ms".into(),
        planned: false,
    };
    assert_eq!(verdicts(&bed.db, &clock.beats, observer(bed.now)), [down(B)]);
    bed.ok(down(B));
    assert_eq!(verdicts(&bed.db, &clock.beats, observer(bed.now)), []);
    clock.beat(B, 1, 2_500);
    assert_eq!(verdicts(&bed.db, &clock.beats, observer(bed.now)), [], "must start anew first");
    clock.beat(B, 2, 2_500);
    let up = Command::NodeUp { node: B, incarnation: 2 };
    assert_eq!(verdicts(&bed.db, &clock.beats, observer(bed.now)), std::slice::from_ref(&up));
    bed.ok(up);
    assert_eq!(verdicts(&bed.db, &clock.beats, observer(bed.now)), []);
}

#[test]
fn isolation_comes_before_down_when_it_is_set() {
    let mut bed = Bed::nodes(3);
    bed.ok(Command::Setting { key: "isolation_ms".into(), value: "60000".into() });
    let mut clock = Clock::new();
    clock.run(2_500);
    clock.beat(A, 1, 2_500);
    let commands = verdicts(&bed.db, &clock.beats, observer(bed.now));
    assert!(matches!(commands[..], [Command::NodeIsolated { node: B, .. }]), "{commands:?}");
    bed.ok(commands[0].clone());
    assert_eq!(verdicts(&bed.db, &clock.beats, observer(bed.now + MINUTE_MS - 1)), []);
    let commands = verdicts(&bed.db, &clock.beats, observer(bed.now + MINUTE_MS));
    assert!(matches!(commands[..], [Command::NodeDown { node: B, planned: false, .. }]), "{commands:?}");
    clock.beat(B, 1, 2_600);
    let commands = verdicts(&bed.db, &clock.beats, observer(bed.now));
    assert!(matches!(commands[..], [Command::NodeUp { node: B, incarnation: 1 }]), "back in time");
}

proptest! {
    /// A peer that beats at least every heartbeat is never missed, whatever this node's own sleep; a dead one is missed
    /// within the threshold of waking time.
    #[test]
    fn only_the_dead_are_missed(gaps in prop::collection::vec(prop_oneof![8 => 1..=300u64, 1 => 301..=5_000u64], 1..200)) {
        let mut clock = Clock::new();
        clock.beat(A, 1, 1_000);
        clock.beat(B, 1, 1_000);
        let (mut now, mut awake_ms, mut missed) = (1_000, 0, false);
        for gap in gaps {
            now += gap;
            let out = clock.step(Input::Tick { at_ms: now });
            prop_assert_eq!(out.contains(&Output::Slept { ms: gap }), gap >= 1_500);
            for output in out {
                if let Output::Missed { node, silent_ms } = output {
                    prop_assert_eq!(node, B, "A is alive");
                    prop_assert!(silent_ms >= 1_500 && !missed);
                    missed = true;
                }
            }
            // The dead one's clock: sleep counts for nothing, or for one heartbeat.
            awake_ms = if gap >= 1_500 { 0 } else if gap > 600 { awake_ms + 300 } else { awake_ms + gap };
            prop_assert_eq!(missed, missed || awake_ms >= 1_500);
            clock.beat(A, 1, now);
        }
    }
}
