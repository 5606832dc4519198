//! Order, wishes, release and stop.

use super::super::Input;
use super::world::{Alive, World, resource};
use crate::db::{GroupState, ResourceState};

fn partial(world: &World) -> String {
    let GroupState::Partial { reason } = world.group.state() else { panic!("{:?}", world.group.state()) };
    reason
}

#[test]
fn resources_start_in_the_order_of_their_dependencies_and_independent_ones_at_once() {
    let mut world = World::new(&[("disk", ""), ("addr", ""), ("share", "disk and addr")]);
    assert!(!world.group.is_quiet());
    world.configure();
    assert_eq!(world.did(), "adopt addr, adopt disk, adopt share");
    assert!(!world.group.is_quiet());
    // Found not online; a new owner makes sure that nothing is left, backwards.
    ["addr", "disk", "share"].into_iter().for_each(|name| world.done(name));
    assert_eq!(world.did(), "terminate share");
    ["share", "addr", "disk"].into_iter().for_each(|name| world.done(name));
    assert_eq!(world.did(), "terminate addr, terminate disk, online addr, online disk");
    assert_eq!(world.shown("share"), (ResourceState::OnlinePending, "waits for [addr]; [disk]".into()));
    world.done("addr");
    assert_eq!(world.did(), "");
    assert_eq!(world.shown("share").1, "waits for [disk]");
    assert_eq!(world.group.state(), GroupState::Pending);
    world.done("disk");
    assert_eq!(world.did(), "online share");
    world.done("share");
    assert_eq!(world.group.state(), GroupState::Online);
    assert_eq!(world.group.next_deadline(), None);
    world.feed(Input::Tick);
    assert_eq!(world.did(), "");
}

#[test]
fn what_waits_for_a_resource_that_is_to_stay_offline_says_so() {
    let mut world = World::new(&[("a", ""), ("b", "a"), ("c", "b or d"), ("d", "")]);
    world.resource("a").want_online = false;
    world.configure();
    world.obey();
    assert_eq!(world.shown("a"), (ResourceState::Offline, String::new()));
    assert_eq!(world.shown("b"), (ResourceState::Offline, "waits for [a], which is to stay offline".into()));
    assert_eq!(world.shown("c").0, ResourceState::Online);
    assert_eq!(partial(&world), "[b] waits for [a], which is to stay offline");
    world.did();
    world.resource("a").want_online = true;
    world.configure();
    world.obey();
    assert_eq!(world.did(), "online a, online b");
    assert_eq!(world.group.state(), GroupState::Online);
}

#[test]
fn taking_one_offline_takes_its_dependents_first_but_not_those_with_another_way() {
    let mut world = World::online(&[("a", ""), ("a2", ""), ("b", "a"), ("c", "b"), ("d", "a or a2")]);
    world.resource("a").want_online = false;
    world.configure();
    assert_eq!(world.did(), "offline c");
    assert_eq!(world.shown("c"), (ResourceState::OfflinePending, "waits for [b], which waits itself".into()));
    world.obey();
    assert_eq!(world.did(), "offline b, offline a");
    assert_eq!(world.shown("d").0, ResourceState::Online);
}

#[test]
fn what_a_start_stands_on_stays_until_it_is_known_whether_its_alternative_is_there() {
    let mut world = World::new(&[("b", ""), ("c", ""), ("d", "b or c")]);
    for name in ["b", "c"] {
        world.resource(name).status.state = ResourceState::Online;
        world.thing(name).alive = Alive::Yes;
    }
    world.held.insert("c".into());
    world.held.insert("d".into());
    world.configure();
    world.obey();
    world.done("d");
    world.done("d");
    assert_eq!(world.did(), "adopt b, adopt c, adopt d, terminate d, online d");
    // Its host has brought d online, and nobody has heard of it yet.
    world.execute("d", true, true);
    world.resource("b").want_online = false;
    world.configure();
    assert_eq!(world.did(), "");
    // c was not there after all: d goes before b does.
    world.thing("c").alive = Alive::No;
    world.held.clear();
    world.obey();
    let did = world.did();
    let at = |word: &str| did.find(word).unwrap_or_else(|| panic!("{word} is not in {did}"));
    assert!(at("offline d") < at("offline b"), "{did}");
    world.pass(1_000);
    assert_eq!(world.shown("d").0, ResourceState::Online);
}

#[test]
fn release_goes_backwards_and_closes_everything() {
    let mut world = World::online(&[("a", ""), ("b", "a"), ("c", "a")]);
    world.release();
    assert_eq!(world.did(), "offline b, offline c");
    assert_eq!(world.shown("b"), (ResourceState::OfflinePending, "the group leaves this node".into()));
    world.done("b");
    assert_eq!(world.did(), "close b");
    assert!(!world.group.release_done());
    world.obey();
    assert_eq!(world.did(), "offline a, close c, close a");
    assert!(world.group.release_done() && world.group.is_quiet());
    assert_eq!(world.shown("a"), (ResourceState::Offline, String::new()));
}

#[test]
fn a_release_that_takes_too_long_terminates() {
    let mut world = World::online(&[("a", ""), ("b", "a")]);
    world.held.insert("b".into());
    world.release();
    world.pass(9_999);
    assert_eq!(world.did(), "offline b");
    world.pass(1);
    assert_eq!(world.did(), "cancel b, terminate b");
    // The late answer of the cancelled call counts for nothing.
    world.done("b");
    assert_eq!(world.did(), "");
    world.held.clear();
    world.obey();
    assert!(world.group.release_done());
}

#[test]
fn a_cancelled_release_brings_everything_back() {
    let mut world = World::online(&[("a", ""), ("b", "a")]);
    world.release();
    world.done("b");
    world.config.group.state = GroupState::Pending;
    world.configure();
    assert!(!world.group.release_done());
    world.obey();
    assert_eq!(world.did(), "offline b, offline a, close b, online a, open b, online b");
    assert_eq!(world.group.state(), GroupState::Online);
}

#[test]
fn stop_ends_everything_at_once_and_for_good() {
    let mut world = World::online(&[("a", ""), ("b", "a"), ("c", "")]);
    world.resource("c").want_online = false;
    world.configure();
    world.did();
    world.feed(Input::Stop("this node is cut off".into()));
    assert_eq!(world.did(), "terminate a, terminate b, cancel c, terminate c");
    assert!(!world.group.is_quiet());
    world.obey();
    assert!(world.group.is_quiet() && !world.group.release_done());
    assert_eq!(world.shown("a"), (ResourceState::Offline, "this node is cut off".into()));
    world.did();
    world.resource("c").want_online = true;
    world.forgive();
    world.pass(10_000_000);
    assert_eq!(world.did(), "");
}

#[test]
fn a_group_that_is_not_wanted_starts_nothing_more() {
    let mut world = World::new(&[("a", ""), ("b", "a")]);
    world.configure();
    ["a", "b", "b", "a"].into_iter().for_each(|name| world.done(name));
    assert!(world.did().ends_with("online a"));
    world.config.group.want_online = false;
    world.configure();
    world.obey();
    assert_eq!(world.did(), "");
    assert_eq!(world.shown("a").0, ResourceState::Online);
    assert_eq!(world.shown("b").0, ResourceState::Offline);
}

#[test]
fn resources_come_and_go_at_run_time() {
    let mut world = World::online(&[("a", "")]);
    world.config.resources.insert("b".into(), resource("b", "a"));
    world.configure();
    world.obey();
    assert_eq!(world.did(), "adopt b, terminate b, online b");
    world.config.resources.remove("b");
    world.configure();
    assert!(!world.group.statuses().contains_key("b"));
    world.obey();
    assert_eq!(world.did(), "offline b, close b");
    assert_eq!(world.group.state(), GroupState::Online);
    world.feed(Input::Failed { resource: "b".into(), why: String::new() });
    assert_eq!(world.did(), "");
}

#[test]
fn another_resource_of_the_same_name_is_opened_anew() {
    let mut world = World::online(&[("a", "")]);
    world.resource("a").kind = "Other".into();
    world.configure();
    world.obey();
    assert_eq!(world.did(), "offline a, close a, open a, online a");
}

#[test]
fn changed_properties_go_to_the_host_and_to_those_of_dependents_without_a_restart() {
    let mut world = World::online(&[("a", ""), ("b", "a"), ("c", "b"), ("x", "")]);
    let since = world.group.statuses();
    world.resource("a").properties.insert("k".into(), "v".into());
    world.configure();
    assert_eq!(world.did(), "open a, open b, open c");
    world.fails("a");
    world.obey();
    assert_eq!(world.did(), "");
    assert_eq!(world.events, ["resource a goes on with its former settings: Open failed"]);
    assert_eq!(world.group.statuses(), since);
    // Of what the host need not know it hears nothing.
    world.resource("a").checkpoints.push("/etc/x".into());
    world.configure();
    assert_eq!(world.did(), "");
}

#[test]
fn a_host_of_its_own_is_given_at_the_next_start() {
    let mut world = World::online(&[("a", "")]);
    world.resource("a").policy.separate_monitor = true;
    world.configure();
    world.obey();
    assert_eq!((world.did().as_str(), world.things["a"].host.as_str()), ("open a", "shared"));
    world.breaks("a", Alive::Partly);
    world.pass(1_000);
    assert_eq!(world.did(), "terminate a, close a, open a, online a");
    assert_eq!(world.things["a"].host, "a");
}

#[test]
fn a_new_csvd_finds_what_is_there_and_shows_no_change() {
    let mut world = World::new(&[("a", ""), ("b", "a")]);
    world.config.group.state = GroupState::Online;
    for name in ["a", "b"] {
        world.resource(name).status.state = ResourceState::Online;
        world.resource(name).status.since_unix_ms = 5;
        world.thing(name).alive = Alive::Yes;
        world.thing(name).open = true;
    }
    world.configure();
    let before = world.group.statuses();
    assert_eq!(world.did(), "adopt a, adopt b");
    // The dependent answers first, and must not go for want of the other.
    for name in ["b", "a"] {
        assert_eq!(world.group.state(), GroupState::Online);
        world.done(name);
        assert_eq!((world.did(), world.group.statuses()), (String::new(), before.clone()));
    }
    assert_eq!((before["a"].state, before["a"].since_unix_ms), (ResourceState::Online, 5));
}

#[test]
fn what_a_new_csvd_does_not_find_has_failed() {
    let mut world = World::new(&[("a", ""), ("b", "a")]);
    for name in ["a", "b"] {
        world.resource(name).status.state = ResourceState::Online;
    }
    world.thing("b").alive = Alive::Yes;
    world.configure();
    world.obey();
    assert_eq!(world.did(), "adopt a, adopt b, offline b, terminate a");
    assert_eq!(
        world.shown("a"),
        (ResourceState::OnlinePending, "is started again (1 of 1): it is gone".into())
    );
    world.pass(500);
    assert_eq!(world.did(), "online a, online b");
}

#[test]
fn words_from_another_time_count_for_nothing() {
    let mut world = World::online(&[("a", "")]);
    let before = (world.group.statuses(), world.group.state());
    let mut other = world.config.clone();
    other.group.generation += 1;
    other.resources.clear();
    world.feed(Input::Config(Box::new(other)));
    for call in 0..4 {
        let (resource, why) = ("a".to_owned(), String::new());
        world.feed(Input::Found { resource: resource.clone(), call, online: false, why: why.clone() });
        let outcome = super::super::Outcome::Failed { why, retry: true, elsewhere: true };
        world.feed(Input::Answer { resource: resource.clone(), call, outcome });
        world.feed(Input::Progress { resource, call, text: "x".into() });
    }
    assert_eq!((world.did(), (world.group.statuses(), world.group.state())), (String::new(), before));
}
