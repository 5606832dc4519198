use super::model::{DELAY_MS_MAX, Fault, Lun, Model, TIMING, op_of};
use super::*;
use proptest::prelude::*;

const ME: u64 = 1;
const OTHER: u64 = 2;

/// One arbiter whose operations go through at once, unless they are `held`.
struct Bed {
    witness: Witness,
    lun: Lun,
    now_ms: u64,
}

impl Bed {
    fn new(holder: Option<u64>) -> Self {
        let lun = Lun { holder, counter: 40, broken: false };
        Bed { witness: Witness::new(ME, TIMING), lun, now_ms: 10_000 }
    }

    fn feed(&mut self, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.witness.step(self.now_ms, input, &mut effects);
        effects
    }

    /// Carries operations out until none is left; gives all effects.
    fn go(&mut self, input: Input) -> Vec<Effect> {
        let mut all = self.feed(input);
        let mut next = 0;
        while let Some(effect) = all.get(next).cloned() {
            next += 1;
            if let Some(op) = op_of(&effect) {
                let outcome = self.lun.act(ME, &effect);
                all.extend(self.feed(Input::Done { op, outcome }));
            }
        }
        all
    }

    fn after(&mut self, ms: u64) -> Vec<Effect> {
        self.now_ms += ms;
        self.go(Input::Tick)
    }

    /// A defender whose voter runs.
    fn defender() -> Self {
        let mut bed = Bed::new(Some(OTHER));
        bed.go(Input::Challenge);
        bed.after(6_000);
        assert!(bed.witness.serving());
        bed
    }
}

fn lost(effects: &[Effect], word: &str) -> bool {
    matches!(effects.last(), Some(Effect::Lost { reason }) if reason.contains(word))
}

fn stopped(effects: &[Effect], word: &str) -> bool {
    matches!(effects.first(), Some(Effect::StopVoter { reason }) if reason.contains(word))
}

#[test]
fn the_challenger_waits_preempts_reads_back_and_rereads_before_it_starts() {
    let mut bed = Bed::new(Some(OTHER));
    assert_eq!(bed.go(Input::Challenge), [Effect::ReadSlot { op: 1 }]);
    assert_eq!(bed.after(5_999), []);
    assert_eq!(
        bed.after(1),
        [
            Effect::ReadSlot { op: 2 },
            Effect::TakeOver { op: 3, victim: Some(OTHER) },
            Effect::ReadKeys { op: 4 },
            Effect::Renew { op: 5, counter: 41 },
            Effect::ReadState { op: 6 },
            Effect::StartVoter,
        ]
    );
    assert_eq!(bed.lun.holder, Some(ME));
}

#[test]
fn a_free_lun_is_challenged_like_any_other() {
    let mut bed = Bed::new(None);
    bed.go(Input::Challenge);
    assert_eq!(bed.after(5_999), []);
    assert!(bed.after(1).contains(&Effect::TakeOver { op: 3, victim: None }));
    assert!(bed.witness.serving());
}

#[test]
fn a_holder_that_moves_keeps_it() {
    let mut bed = Bed::new(Some(OTHER));
    bed.go(Input::Challenge);
    bed.lun.counter += 1;
    assert!(lost(&bed.after(6_000), "alive"));
    assert_eq!(bed.lun.holder, Some(OTHER));
    bed.go(Input::Challenge);
    bed.lun.holder = Some(3);
    assert!(lost(&bed.after(6_000), "alive"), "another holder with the same counter is a move as well");
}

#[test]
fn the_second_challenger_loses() {
    let mut bed = Bed::new(Some(OTHER));
    bed.go(Input::Challenge);
    bed.now_ms += 6_000;
    assert_eq!(bed.feed(Input::Tick), [Effect::ReadSlot { op: 2 }]);
    let seen = Outcome::Slot(Slot { counter: 40, holder: Some(OTHER) });
    let effects = bed.feed(Input::Done { op: 2, outcome: seen });
    assert_eq!(effects, [Effect::TakeOver { op: 3, victim: Some(OTHER) }]);
    bed.lun.holder = Some(3);
    let outcome = bed.lun.act(ME, &effects[0]);
    assert!(lost(&bed.feed(Input::Done { op: 3, outcome }), "faster"));
}

#[test]
fn what_is_read_back_decides() {
    let mut bed = Bed::new(Some(OTHER));
    bed.go(Input::Challenge);
    bed.now_ms += 6_000;
    bed.feed(Input::Tick);
    let slot = |holder| Outcome::Slot(Slot { counter: 40, holder });
    bed.feed(Input::Done { op: 2, outcome: slot(Some(OTHER)) });
    assert_eq!(bed.feed(Input::Done { op: 3, outcome: Outcome::Ok }), [Effect::ReadKeys { op: 4 }]);
    assert!(lost(&bed.feed(Input::Done { op: 4, outcome: slot(Some(3)) }), "after all"));
}

#[test]
fn a_challenger_that_slept_does_not_act_on_what_it_saw_before() {
    let mut bed = Bed::new(Some(OTHER));
    bed.go(Input::Challenge);
    bed.now_ms += 6_000;
    bed.feed(Input::Tick);
    bed.now_ms += 1_501;
    let seen = Outcome::Slot(Slot { counter: 40, holder: Some(OTHER) });
    assert!(lost(&bed.feed(Input::Done { op: 2, outcome: seen }), "too long ago"));
}

#[test]
fn a_lun_that_fails_or_hangs_ends_the_challenge() {
    let mut bed = Bed::new(Some(OTHER));
    bed.lun.broken = true;
    assert!(lost(&bed.go(Input::Challenge), "cannot be reached"));
    assert_eq!(bed.feed(Input::Challenge), [Effect::ReadSlot { op: 2 }]);
    assert_eq!(bed.feed(Input::Challenge), [], "one at a time");
    bed.now_ms += 6_000;
    assert!(lost(&bed.feed(Input::Tick), "does not answer"));
    let late = Outcome::Slot(Slot { counter: 40, holder: None });
    assert_eq!(bed.feed(Input::Done { op: 2, outcome: late }), [], "nobody waits for it");
}

#[test]
fn the_defender_renews_and_moves_the_counter() {
    let mut bed = Bed::defender();
    let counter = bed.lun.counter;
    assert_eq!(bed.after(2_999), []);
    assert_eq!(bed.after(1), [Effect::Renew { op: 7, counter: counter + 1 }]);
    for _ in 0..10 {
        bed.after(3_000);
    }
    assert_eq!(bed.lun.counter, counter + 11);
}

#[test]
fn a_late_renewal_stops_the_voter_before_anything_else() {
    let mut bed = Bed::defender();
    bed.now_ms += 3_000;
    assert_eq!(bed.feed(Input::Tick), [Effect::Renew { op: 7, counter: 42 }]);
    assert_eq!(bed.feed(Input::Request { id: 5 }), [Effect::Verify { op: 8 }]);
    bed.now_ms += 1_499;
    assert_eq!(bed.feed(Input::Tick), []);
    bed.now_ms += 1;
    let effects = bed.feed(Input::Done { op: 8, outcome: Outcome::Ok });
    assert!(stopped(&effects, "in time"));
    assert_eq!(effects[1..], [Effect::Deny { id: 5 }], "the verify came back too late to be worth anything");
    assert_eq!(bed.feed(Input::Done { op: 7, outcome: Outcome::Ok }), []);
}

#[test]
fn a_failed_renewal_or_verify_stops_the_voter_at_once() {
    let mut bed = Bed::defender();
    bed.lun.holder = Some(OTHER);
    let effects = bed.after(3_000);
    assert!(stopped(&effects[1..], "another node has taken the reservation"), "{effects:?}");
    let mut bed = Bed::defender();
    bed.lun.broken = true;
    let effects = bed.go(Input::Request { id: 1 });
    assert!(stopped(&effects[1..], "cannot be reached"), "{effects:?}");
    assert_eq!(effects[2..], [Effect::Deny { id: 1 }]);
}

#[test]
fn a_request_is_answered_only_by_a_verify_begun_after_it_came() {
    let mut bed = Bed::defender();
    assert_eq!(bed.feed(Input::Request { id: 1 }), [Effect::Verify { op: 7 }]);
    assert_eq!(bed.feed(Input::Request { id: 2 }), []);
    assert_eq!(bed.feed(Input::Request { id: 3 }), []);
    let effects = bed.feed(Input::Done { op: 7, outcome: Outcome::Ok });
    assert_eq!(effects, [Effect::Answer { id: 1 }, Effect::Verify { op: 8 }]);
    let effects = bed.feed(Input::Done { op: 8, outcome: Outcome::Ok });
    assert_eq!(effects, [Effect::Answer { id: 2 }, Effect::Answer { id: 3 }]);
}

#[test]
fn a_frozen_holder_that_wakes_up_answers_nothing() {
    let mut bed = Bed::defender();
    bed.feed(Input::Request { id: 1 });
    bed.lun.holder = Some(OTHER);
    bed.now_ms += 60_000;
    let effects = bed.feed(Input::Request { id: 2 });
    assert!(stopped(&effects, "in time"));
    assert_eq!(effects[1..], [Effect::Deny { id: 1 }, Effect::Deny { id: 2 }]);
}

#[test]
fn requests_are_denied_by_who_is_not_serving_and_bounded() {
    let mut bed = Bed::new(Some(OTHER));
    assert_eq!(bed.feed(Input::Request { id: 1 }), [Effect::Deny { id: 1 }]);
    bed.go(Input::Challenge);
    assert_eq!(bed.feed(Input::Request { id: 2 }), [Effect::Deny { id: 2 }]);
    let mut bed = Bed::defender();
    bed.feed(Input::Request { id: 0 });
    for id in 1..=REQUESTS_MAX as u64 {
        assert_eq!(bed.feed(Input::Request { id }), []);
    }
    assert_eq!(bed.feed(Input::Request { id: 9_999 }), [Effect::Deny { id: 9_999 }]);
}

#[test]
fn yielding_stops_denies_and_releases() {
    let mut bed = Bed::defender();
    bed.feed(Input::Request { id: 1 });
    let effects = bed.feed(Input::Yield);
    assert!(stopped(&effects, "good order"));
    assert_eq!(effects[1..], [Effect::Deny { id: 1 }, Effect::Release]);
    assert_eq!(bed.feed(Input::Yield), []);
}

#[test]
fn a_slow_read_of_the_state_is_covered_by_renewals() {
    let mut bed = Bed::new(None);
    bed.go(Input::Challenge);
    bed.now_ms += 6_000;
    let mut effects = bed.feed(Input::Tick);
    while !matches!(effects[..], [Effect::ReadState { .. }]) {
        let op = op_of(&effects[0]).unwrap();
        let outcome = bed.lun.act(ME, &effects[0]);
        effects = bed.feed(Input::Done { op, outcome });
    }
    for _ in 0..3 {
        let renewal = bed.after(3_000);
        assert!(matches!(renewal[..], [Effect::Renew { .. }]), "{renewal:?}");
    }
    assert_eq!(
        bed.feed(Input::Done { op: op_of(&effects[0]).unwrap(), outcome: Outcome::Ok }),
        [Effect::StartVoter]
    );
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        4 => (0..2usize, 100..20_000u64).prop_map(|(node, ms)| Fault::Freeze { node, ms }),
        1 => (100..5_000u64).prop_map(|ms| Fault::Break { ms }),
        1 => Just(Fault::ForgetReservation),
        1 => (0..2usize).prop_map(|node| Fault::Yield { node }),
    ]
}

proptest! {
    #![proptest_config(crate::db::tests::cases(150))]

    /// The model asserts at each answer that its verify was started after the request came, found the reservation, and is not
    /// long ago; and at each step that a voter without the reservation is about to stop.
    #[test]
    fn never_two_that_answer(
        faults in prop::collection::vec((1..300u64, fault()), 0..12),
        delays in prop::collection::vec((0..=DELAY_MS_MAX, 0..=DELAY_MS_MAX), 1..50),
    ) {
        let mut model = Model::new(2);
        let mut turn = 0;
        let mut delay = || {
            turn += 1;
            delays[turn % delays.len()]
        };
        for (pause, fault) in faults {
            (0..pause).for_each(|_| model.step(&mut delay));
            model.fault(&fault);
        }
        // Once it is quiet, one of them serves.
        (0..1_200).for_each(|_| model.step(&mut delay));
        let answers = model.answers;
        (0..40).for_each(|_| model.step(&mut delay));
        prop_assert!(model.answers > answers, "nobody serves: {:#?}", model);
        prop_assert!(model.takeovers > 0);
    }
}
