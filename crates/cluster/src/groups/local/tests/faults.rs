//! Failures, and what cannot be ended.

use super::super::{Input, Outcome};
use super::world::{Alive, World};
use crate::db::{GroupState, ResourceState};

pub(super) fn failed(world: &World) -> String {
    let GroupState::Failed { reason } = world.group.state() else { panic!("{:?}", world.group.state()) };
    reason
}

#[test]
fn what_fails_is_terminated_and_started_again_after_its_dependents_are_down() {
    let mut world = World::online(&[("a", ""), ("b", "a"), ("c", "b"), ("x", "")]);
    world.breaks("a", Alive::Partly);
    assert_eq!(world.did(), "offline c");
    assert_eq!(world.events, ["resource a is started again (1 of 1 within 15 min): it broke"]);
    assert_eq!(
        world.shown("a"),
        (ResourceState::OnlinePending, "is started again (1 of 1): it broke".into())
    );
    assert_eq!(world.group.state(), GroupState::Pending);
    world.obey();
    assert_eq!(world.did(), "offline b, terminate a");
    world.pass(499);
    assert_eq!(world.did(), "");
    world.now_ms += 1;
    world.feed(Input::Tick);
    assert_eq!(world.did(), "online a");
    assert_eq!(world.shown("a"), (ResourceState::OnlinePending, "started again after: it broke".into()));
    world.obey();
    assert_eq!(world.did(), "online b, online c");
    assert_eq!(world.group.state(), GroupState::Online);
}

#[test]
fn with_another_alternative_a_dependent_stays() {
    let mut world = World::online(&[("a1", ""), ("a2", ""), ("b", "a1 or a2")]);
    world.breaks("a1", Alive::No);
    world.pass(1_000);
    assert_eq!(world.did(), "terminate a1, online a1");
    world.breaks("a2", Alive::No);
    world.breaks("a1", Alive::No);
    assert_eq!(world.did(), "terminate a2, offline b");
}

#[test]
fn beyond_its_restarts_it_fails_and_the_group_with_it() {
    let mut world = World::online(&[("a", ""), ("b", "a"), ("x", "")]);
    world.breaks("a", Alive::Partly);
    world.pass(1_000);
    world.did();
    world.breaks("a", Alive::Partly);
    world.obey();
    assert_eq!(world.did(), "offline b, terminate a");
    assert_eq!(world.shown("a"), (ResourceState::Failed, "it broke".into()));
    assert_eq!(world.shown("b"), (ResourceState::Offline, "waits for [a], which has failed".into()));
    assert_eq!(world.shown("x").0, ResourceState::Online);
    assert_eq!(failed(&world), "[a] it broke");
    // Tried again after an hour, and with fresh counts.
    world.pass(3_599_999);
    assert_eq!(world.did(), "");
    world.pass(1);
    assert_eq!(world.did(), "online a, online b");
    assert_eq!(world.group.state(), GroupState::Online);
    world.thing("a");
    world.breaks("a", Alive::No);
    world.pass(1_000);
    assert_eq!(world.group.state(), GroupState::Online);
}

#[test]
fn restarts_count_within_their_period_only() {
    let mut world = World::online(&[("a", "")]);
    for _ in 0..3 {
        world.breaks("a", Alive::No);
        world.pass(1_000);
        assert_eq!(world.group.state(), GroupState::Online);
        world.pass(900_000);
    }
}

#[test]
fn one_that_does_not_affect_the_group_leaves_it_partially_online_and_zero_is_never() {
    let mut world = World::online(&[("a", ""), ("b", "a")]);
    let policy = &mut world.resource("b").policy;
    (policy.affects_group, policy.retry_after_ms, policy.restart_threshold) = (false, 0, 0);
    world.configure();
    world.obey();
    world.did();
    world.breaks("b", Alive::No);
    world.pass(1_000_000_000);
    assert_eq!(world.did(), "terminate b");
    assert_eq!(world.group.state(), GroupState::Partial { reason: "[b] it broke".into() });
    assert_eq!(world.group.next_deadline(), None);
}

#[test]
fn failures_that_are_forgotten_because_it_came_online_forgive_no_restart() {
    let mut world = World::new(&[("a", "")]);
    let (node, why) = (csv_types::NodeId(1), "it broke there".into());
    world.config.group.failures = vec![crate::db::GroupFailure { node, at_unix_ms: 0, why }];
    world.configure();
    world.obey();
    world.breaks("a", Alive::No);
    world.pass(1_000);
    // The database forgets them when it hears of this; the owner may be past it when it sees that.
    assert_eq!(world.group.state(), GroupState::Online);
    world.breaks("a", Alive::No);
    world.obey();
    world.config.group.failures.clear();
    world.configure();
    assert_eq!(failed(&world), "[a] it broke", "it may be started again once within its period");
    // An administrator's word counts all the same.
    let (node, why) = (csv_types::NodeId(2), "it broke".into());
    world.config.group.failures = vec![crate::db::GroupFailure { node, at_unix_ms: 0, why }];
    world.configure();
    world.config.group.failures.clear();
    world.configure();
    world.obey();
    assert_eq!(world.group.state(), GroupState::Online);
}

#[test]
fn an_administrator_is_obeyed_at_once_and_with_fresh_counts() {
    type Order = fn(&mut World);
    let orders: [(&str, Order); 4] = [
        ("online a", |world| world.forgive()),
        ("open a, online a", |world| {
            world.resource("a").properties.insert("k".into(), "v".into());
            world.configure();
        }),
        ("online a", |world| {
            world.resource("a").want_online = false;
            world.configure();
            assert_eq!(world.shown("a").0, ResourceState::Offline);
            world.resource("a").want_online = true;
            world.configure();
        }),
        ("online a", |world| {
            let (node, why) = (csv_types::NodeId(1), "it broke".into());
            world.config.group.failures = vec![crate::db::GroupFailure { node, at_unix_ms: 0, why }];
            world.configure();
            world.config.group.failures.clear();
            world.configure();
        }),
    ];
    for (does, order) in orders {
        let mut world = World::online(&[("a", "")]);
        world.resource("a").policy.restart_threshold = 0;
        world.configure();
        world.obey();
        world.breaks("a", Alive::No);
        world.obey();
        assert_eq!(failed(&world), "[a] it broke");
        world.did();
        order(&mut world);
        world.obey();
        assert_eq!(world.did(), does);
        assert_eq!(world.group.state(), GroupState::Online);
    }
}

#[test]
fn some_failures_are_not_tried_again_here_and_some_not_elsewhere() {
    for (elsewhere, end) in [(true, ""), (false, " (on another node it would be the same)")] {
        let mut world = World::online(&[("a", "")]);
        world.breaks("a", Alive::No);
        world.pass(499);
        world.now_ms += 1;
        world.feed(Input::Tick);
        world.did();
        world.resource("a").policy.restart_threshold = 9;
        world.configure();
        let (call, _) = world.thing("a").queue.pop_front().unwrap();
        world.thing("a").alive = Alive::Partly;
        let outcome = Outcome::Failed { why: "no image".into(), retry: false, elsewhere };
        world.feed(Input::Answer { resource: "a".into(), call, outcome });
        world.pass(10_000);
        assert_eq!(world.did(), "terminate a");
        let reason = format!("[a] no image{end}");
        let state = if elsewhere { GroupState::Failed { reason } } else { GroupState::Partial { reason } };
        assert_eq!(world.group.state(), state);
    }
}

#[test]
fn going_online_has_its_time_which_progress_extends() {
    let mut world = World::online(&[("a", ""), ("b", "a")]);
    world.held.insert("a".into());
    world.breaks("a", Alive::No);
    for name in ["b", "a"] {
        world.done(name);
    }
    world.pass(500);
    assert_eq!(world.did(), "offline b, terminate a, online a");
    let (call, _) = world.things["a"].queue[0];
    for n in 0..6 {
        world.pass(9_000);
        world.feed(Input::Progress { resource: "a".into(), call, text: format!("step {n}") });
        // Not more often than every so often.
        world.feed(Input::Progress { resource: "a".into(), call, text: "more".into() });
        assert_eq!(world.shown("a"), (ResourceState::OnlinePending, format!("step {n}")));
    }
    world.pass(9_999);
    assert_eq!(world.did(), "");
    world.pass(1);
    assert_eq!(world.did(), "cancel a, terminate a");
    let why = "it did not go online, nor get on, within 10 s (last heard of it: step 5)";
    assert_eq!(world.shown("a"), (ResourceState::Failed, why.into()));
    world.held.clear();
    world.obey();
    assert_eq!(failed(&world), format!("[a] {why}"));
}

#[test]
fn a_start_is_given_up_when_what_it_needs_goes() {
    let mut world = World::online(&[("a", ""), ("b", "a")]);
    world.held.insert("b".into());
    world.breaks("b", Alive::No);
    world.done("b");
    world.pass(500);
    assert_eq!(world.did(), "terminate b, online b");
    world.breaks("a", Alive::No);
    assert_eq!(world.did(), "cancel b, terminate b");
    world.held.clear();
    world.obey();
    world.pass(500);
    assert_eq!(world.did(), "terminate a, online a, online b");
    // Which was no failure of its own.
    assert_eq!(world.events.len(), 2);
}

#[test]
fn what_cannot_be_ended_stays_and_is_tried_again_ever_less_often() {
    let mut world = World::online(&[("a", ""), ("b", "a")]);
    world.held.insert("b".into());
    world.release();
    world.fails("b");
    let mut tries = 0;
    for _ in 0..600 {
        world.fails("b");
        tries += world.did().matches("terminate b").count();
        world.pass(1_000);
        assert!(!world.group.is_quiet() && !world.group.release_done());
    }
    assert!((10..20).contains(&tries), "{tries}");
    let why = "could not be ended, which is tried again: Terminate failed";
    assert_eq!(world.shown("b"), (ResourceState::Failed, why.into()));
    // What it stands on is left to it.
    assert_eq!(world.shown("a").0, ResourceState::OfflinePending);
    world.held.clear();
    world.pass(60_000);
    assert!(world.group.release_done());
}

#[test]
fn what_cannot_be_ended_does_not_make_the_group_move() {
    let mut world = World::online(&[("a", ""), ("b", "a")]);
    world.resource("b").policy.restart_threshold = 0;
    world.configure();
    world.obey();
    world.held.insert("b".into());
    world.breaks("b", Alive::Partly);
    world.fails("b");
    let reason = "[b] could not be ended, which is tried again: Terminate failed".into();
    assert_eq!(world.group.state(), GroupState::Partial { reason });
    // A failed resource underneath is ended all the same, but not started.
    world.did();
    world.breaks("a", Alive::Partly);
    world.pass(900);
    assert_eq!(world.did(), "terminate a");
    world.held.clear();
    world.pass(1_000);
    assert_eq!(world.did(), "terminate b, online a");
    assert_eq!(failed(&world), "[b] it broke");
}
