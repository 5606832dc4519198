use super::*;
use proptest::prelude::*;

const WERO: ReservationType = ReservationType::WriteExclusiveRegistrantsOnly;

fn nexus(index: u32) -> Nexus {
    Nexus::Loop { index, sequence: 10 + u64::from(index) }
}

/// Nexus n with key n + 1, for each.
fn registered(count: u32) -> Registry {
    let mut registry = Registry::default();
    for index in 0..count {
        registry.register(nexus(index), None, u64::from(index) + 1).unwrap();
    }
    registry
}

#[test]
fn register_wants_the_old_key_unless_told_to_ignore_it() {
    let mut registry = registered(1);
    assert_eq!(registry.register(nexus(0), Some(9), 5), Err(Refusal::Conflict));
    assert_eq!(registry.register(nexus(0), Some(0), 5), Err(Refusal::Conflict));
    registry.register(nexus(0), Some(1), 5).unwrap();
    registry.register(nexus(0), None, 6).unwrap();
    assert_eq!(registry.register(nexus(1), Some(3), 7), Err(Refusal::Conflict));
    registry.register(nexus(1), Some(0), 7).unwrap();
    assert_eq!(registry.keys(), Keys { generation: 4, keys: vec![6, 7] });
    registry.register(nexus(1), Some(7), 0).unwrap();
    registry.register(nexus(1), None, 0).unwrap();
    assert_eq!(registry.keys(), Keys { generation: 5, keys: vec![6] });
}

#[test]
fn who_is_registered_may_write_under_a_registrants_only_reservation() {
    let mut registry = registered(2);
    assert!(registry.may_write(nexus(7)), "no reservation yet");
    assert_eq!(registry.reserve(nexus(7), 0, WERO), Err(Refusal::Conflict));
    assert_eq!(registry.reserve(nexus(0), 2, WERO), Err(Refusal::Conflict));
    registry.reserve(nexus(0), 1, WERO).unwrap();
    registry.reserve(nexus(0), 1, WERO).unwrap();
    assert_eq!(registry.reserve(nexus(1), 2, WERO), Err(Refusal::Conflict));
    assert_eq!([0, 1, 7].map(|index| registry.may_write(nexus(index))), [true, true, false]);
    assert_eq!(registry.holder(), Some(Holder { key: 1, kind: WERO }));
    assert_eq!(registry.release(nexus(0), 1, ReservationType::WriteExclusive), Err(Refusal::WrongType));
    registry.release(nexus(1), 2, WERO).unwrap();
    assert!(registry.holder().is_some(), "only the holder's release counts");
    registry.register(nexus(0), None, 0).unwrap();
    assert_eq!(registry.holder(), None, "the holder went");
}

#[test]
fn exclusive_types_are_for_the_holder() {
    let mut registry = registered(2);
    registry.reserve(nexus(0), 1, ReservationType::WriteExclusive).unwrap();
    assert_eq!([0, 1].map(|index| registry.may_write(nexus(index))), [true, false]);
    let mut registry = registered(2);
    let all = ReservationType::WriteExclusiveAllRegistrants;
    registry.reserve(nexus(0), 1, all).unwrap();
    registry.reserve(nexus(1), 2, all).unwrap();
    registry.register(nexus(0), None, 0).unwrap();
    assert_eq!(registry.holder(), Some(Holder { key: 0, kind: all }));
    registry.register(nexus(1), None, 0).unwrap();
    assert_eq!(registry.holder(), None);
}

#[test]
fn preempt_takes_the_registration_and_the_reservation_of_the_victim() {
    let mut registry = registered(3);
    registry.reserve(nexus(1), 2, WERO).unwrap();
    assert_eq!(registry.preempt(nexus(0), 1, 9, WERO), Err(Refusal::Conflict));
    assert_eq!(registry.preempt(nexus(0), 1, 0, WERO), Err(Refusal::InvalidKey));
    registry.preempt(nexus(0), 1, 3, WERO).unwrap();
    assert_eq!(registry.holder(), Some(Holder { key: 2, kind: WERO }), "the holder was not the victim");
    registry.preempt(nexus(0), 1, 2, WERO).unwrap();
    assert_eq!(registry.holder(), Some(Holder { key: 1, kind: WERO }));
    assert_eq!(registry.keys().keys, [1]);
    assert_eq!(registry.preempt(nexus(1), 2, 1, WERO), Err(Refusal::Conflict), "the loser has no say");
    registry.preempt(nexus(0), 1, 1, WERO).unwrap();
    assert_eq!(registry.holder(), Some(Holder { key: 1, kind: WERO }), "its own reservation, made anew");
    registry.clear(nexus(0), 1).unwrap();
    assert_eq!((registry.keys().keys, registry.holder()), (vec![], None));
}

#[test]
fn a_nexus_that_came_back_takes_its_old_registration_over() {
    let mut registry = registered(2);
    registry.reserve(nexus(0), 1, WERO).unwrap();
    let back = Nexus::Loop { index: 0, sequence: 99 };
    registry.register(back, None, 1).unwrap();
    registry.adopt(back, 1, |one| one == nexus(0));
    assert_eq!(registry.keys().keys, [2, 1]);
    assert_eq!(registry.holder(), Some(Holder { key: 1, kind: WERO }));
    registry.adopt(back, 2, |_| false);
    assert_eq!(registry.keys().keys, [2, 1], "a nexus that exists keeps its registration");
}

#[test]
fn on_a_plain_file_the_key_is_the_nexus() {
    let mut registry = Registry::default();
    let file = |key| Nexus::File { key };
    registry.register(file(1), None, 1).unwrap();
    registry.reserve(file(1), 1, WERO).unwrap();
    registry.register(file(1), Some(1), 2).unwrap();
    assert!(registry.is_registered(file(2), 2) && !registry.may_write(file(1)));
    assert_eq!(registry.holder().unwrap().key, 2);
}

#[derive(Debug, Clone)]
enum Op {
    Register(u32, Option<u64>, u64),
    Reserve(u32, u64, usize),
    Release(u32, u64, usize),
    Preempt(u32, u64, u64, usize),
    Clear(u32, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let (nexus, key, kind) = (0_u32..4, 0_u64..5, 0_usize..6);
    prop_oneof![
        4 => (nexus.clone(), prop::option::of(key.clone()), key.clone()).prop_map(|(n, o, k)| Op::Register(n, o, k)),
        2 => (nexus.clone(), key.clone(), kind.clone()).prop_map(|(n, k, t)| Op::Reserve(n, k, t)),
        1 => (nexus.clone(), key.clone(), kind.clone()).prop_map(|(n, k, t)| Op::Release(n, k, t)),
        2 => (nexus.clone(), key.clone(), key.clone(), kind).prop_map(|(n, k, v, t)| Op::Preempt(n, k, v, t)),
        1 => (nexus, key).prop_map(|(n, k)| Op::Clear(n, k)),
    ]
}

proptest! {
    /// Whatever is asked: the holder is registered, nexuses are single, what is refused changes nothing.
    #[test]
    fn invariants(ops in prop::collection::vec(op(), 0..60)) {
        let kinds = ReservationType::ALL;
        let mut registry = Registry::default();
        for op in ops {
            let before = registry.clone();
            let result = match op {
                Op::Register(n, old, new) => registry.register(nexus(n), old, new),
                Op::Reserve(n, key, kind) => registry.reserve(nexus(n), key, kinds[kind]),
                Op::Release(n, key, kind) => registry.release(nexus(n), key, kinds[kind]),
                Op::Preempt(n, key, victim, kind) => registry.preempt(nexus(n), key, victim, kinds[kind]),
                Op::Clear(n, key) => registry.clear(nexus(n), key),
            };
            if result.is_err() {
                prop_assert_eq!(&registry, &before);
            }
            let mut nexuses: Vec<_> = registry.registrations.iter().map(|one| one.nexus).collect();
            nexuses.sort_unstable();
            nexuses.dedup();
            prop_assert_eq!(nexuses.len(), registry.registrations.len());
            prop_assert!(registry.registrations.iter().all(|one| one.key != 0));
            if let Some((holder, kind)) = registry.reservation {
                prop_assert!(!registry.registrations.is_empty());
                prop_assert!(kind.is_all_registrants() || registry.key_of(holder).is_some());
                prop_assert!(registry.holder().is_some());
            }
        }
    }
}
