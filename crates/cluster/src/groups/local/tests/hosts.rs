//! Hosts that end, and maintenance.

use super::super::Input;
use super::faults::failed;
use super::world::{Alive, World};
use crate::db::{GroupState, ResourceState};

#[test]
fn when_a_host_ends_what_is_still_there_stays_without_a_word() {
    let mut world = World::online(&[("a", ""), ("b", "a"), ("c", "")]);
    let before = world.group.statuses();
    world.host_ends("shared", None, false);
    assert_eq!(world.did(), "adopt a, adopt b, adopt c");
    assert_eq!((world.group.statuses(), world.group.state()), (before.clone(), GroupState::Online));
    world.thing("c").alive = Alive::Partly;
    world.done("b");
    world.done("a");
    assert_eq!((world.did(), world.group.statuses()), (String::new(), before));
    world.done("c");
    assert_eq!(world.did(), "terminate c");
    assert_eq!(world.shown("c").1, "is started again (1 of 1): it is gone");
}

#[test]
fn what_an_earlier_host_found_does_not_count() {
    let mut world = World::online(&[("a", "")]);
    world.host_ends("shared", None, false);
    let (call, _) = world.things["a"].queue[0];
    world.host_ends("shared", None, false);
    world.pass(500);
    world.held.insert("a".into());
    world.pass(500);
    assert_eq!(world.did(), "adopt a, adopt a");
    world.feed(Input::Found { resource: "a".into(), call, online: false, why: String::new() });
    assert_eq!((world.did(), world.shown("a").0), (String::new(), ResourceState::Online));
    world.done("a");
    assert_eq!((world.did(), world.shown("a").0), (String::new(), ResourceState::Online));
}

#[test]
fn a_host_that_ends_while_it_takes_something_offline_has_it_terminated() {
    let mut world = World::online(&[("a", "")]);
    world.release();
    world.host_ends("shared", None, false);
    world.obey();
    assert_eq!(world.did(), "offline a, adopt a, terminate a, close a");
    assert!(world.group.release_done());
}

/// Without a lease no host takes anything over: who waits for that never ends it.
#[test]
fn a_stop_ends_what_a_dead_host_left_without_taking_it_over_first() {
    let mut world = World::online(&[("a", "")]);
    world.feed(Input::Stop("this node is cut off".into()));
    world.host_ends("shared", None, false);
    world.obey();
    assert_eq!(world.did(), "terminate a");
    world.pass(1_000);
    assert_eq!((world.did(), world.group.is_quiet()), ("open a, terminate a, close a".into(), true));

    // Its host had ended before, and the next one refuses.
    let mut world = World::online(&[("a", "")]);
    world.held.insert("a".into());
    world.host_ends("shared", None, false);
    world.feed(Input::Stop("this node is cut off".into()));
    world.fails("a");
    assert_eq!((world.did(), world.group.is_quiet()), ("adopt a".into(), false));
    // Nor does one that cannot open it make it gone.
    world.pass(1_000);
    world.fails("a");
    world.held.clear();
    world.pass(1_000);
    assert_eq!((world.did(), world.group.is_quiet()), ("open a".into(), false));
    world.pass(1_000);
    assert_eq!((world.did(), world.group.is_quiet()), ("open a, terminate a, close a".into(), true));

    // Nobody has told whether it was there.
    let mut world = World::new(&[("a", "")]);
    world.thing("a").alive = Alive::Yes;
    world.held.insert("a".into());
    world.configure();
    world.feed(Input::Stop("this node is cut off".into()));
    world.fails("a");
    assert!(!world.group.is_quiet());
    world.held.clear();
    world.pass(1_000);
    assert_eq!((world.did(), world.group.is_quiet()), ("adopt a, open a, terminate a, close a".into(), true));
}

#[test]
fn who_ended_its_host_has_failed_and_gets_one_of_its_own() {
    let mut world = World::online(&[("a", ""), ("b", "")]);
    world.host_ends("shared", Some("a"), true);
    assert_eq!(world.events[0], "resource a hangs, and its host is ended: the host ended");
    world.pass(1_000);
    assert_eq!(world.did(), "adopt a, adopt b, terminate a, online a");
    assert_eq!((world.things["a"].host.as_str(), world.things["b"].host.as_str()), ("a", "shared"));
    // Again: more than its restarts.
    world.host_ends("a", Some("a"), false);
    world.pass(1_000);
    assert_eq!(world.did(), "adopt a, terminate a");
    assert_eq!(failed(&world), "[a] the host ended");
}

#[test]
fn a_host_that_ends_under_a_start_makes_it_fail_and_under_an_end_is_asked_again_later() {
    let mut world = World::online(&[("a", "")]);
    world.held.insert("a".into());
    world.breaks("a", Alive::Partly);
    world.host_ends("shared", None, false);
    world.pass(999);
    assert_eq!(world.did(), "terminate a");
    world.pass(1);
    assert_eq!(world.did(), "adopt a");
    world.done("a");
    world.done("a");
    assert_eq!(world.did(), "terminate a, online a");
    world.host_ends("shared", None, false);
    assert_eq!(world.did(), "adopt a");
    assert_eq!(world.shown("a"), (ResourceState::Failed, "the host ended".into()));
    // And a host that ends whenever it opens something is not started at every moment.
    for _ in 0..600 {
        world.host_ends("shared", None, false);
        world.pass(1_000);
    }
    let adopts = world.did().matches("adopt a").count();
    assert!((10..20).contains(&adopts), "{adopts}");
    assert!(!world.group.is_quiet());
}

#[test]
fn one_that_cannot_be_opened_fails_but_is_not_taken_for_gone_when_it_was_there() {
    let mut world = World::new(&[("a", "")]);
    world.configure();
    world.execute("a", false, false);
    world.obey();
    assert_eq!(world.did(), "adopt a");
    assert_eq!(failed(&world), "[a] Adopt failed");
    assert!(world.group.is_quiet());
    world.release();
    assert!(world.group.release_done());

    let mut world = World::online(&[("a", "")]);
    world.host_ends("shared", None, false);
    world.held.insert("a".into());
    world.fails("a");
    assert_eq!(world.shown("a"), (ResourceState::Online, String::new()));
    world.pass(1_000);
    world.fails("a");
    world.release();
    assert!(!world.group.is_quiet() && !world.group.release_done());
    let why = "cannot be looked after, which is tried again: Adopt failed";
    assert_eq!(world.shown("a"), (ResourceState::Failed, why.into()));
    world.held.clear();
    world.pass(2_000);
    assert!(world.group.release_done());
}

#[test]
fn in_maintenance_failures_are_noted_and_count_when_it_is_over() {
    let mut world = World::online(&[("a", ""), ("b", "a")]);
    world.config.group.maintenance = true;
    world.configure();
    assert_eq!(world.did(), "polls a off, polls b off");
    world.breaks("a", Alive::Partly);
    world.pass(1_000_000);
    assert_eq!((world.did(), world.events.len()), (String::new(), 0));
    let why = "failed during maintenance and is left alone: it broke";
    assert_eq!(world.shown("a"), (ResourceState::Failed, why.into()));
    assert_eq!(world.shown("b").0, ResourceState::Online);
    assert_eq!(world.group.state(), GroupState::Partial { reason: format!("[a] {why}") });
    // A host that ends is replaced, and left alone as well.
    world.host_ends("shared", Some("b"), false);
    world.obey();
    assert_eq!(world.did(), "adopt b, polls b off");
    assert_eq!(world.shown("b").0, ResourceState::Online);
    world.config.group.maintenance = false;
    world.configure();
    assert_eq!(world.did(), "polls b on, offline b");
    world.pass(1_000);
    assert_eq!(world.did(), "adopt a, terminate a, online a, online b");
    assert_eq!(world.events, ["resource a is started again (1 of 1 within 15 min): it broke"]);
}

#[test]
fn maintenance_does_not_hold_up_a_release_or_an_administrator() {
    let mut world = World::online(&[("a", ""), ("b", "a")]);
    world.config.group.maintenance = true;
    world.configure();
    world.breaks("b", Alive::Partly);
    world.did();
    world.resource("b").want_online = false;
    world.configure();
    world.obey();
    assert_eq!(world.did(), "terminate b");
    assert_eq!(world.shown("b"), (ResourceState::Offline, String::new()));
    world.breaks("a", Alive::Partly);
    world.release();
    world.obey();
    assert!(world.group.release_done());
}
