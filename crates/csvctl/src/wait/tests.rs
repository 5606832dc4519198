//! Each way that an order can end, over databases that the real commands made.

use super::*;
use crate::names::MACHINE;
use crate::testbed::{Bed, n};
use csv_cluster::db::{Command, MoveCause, MoveKind};

/// A watch, and how far the time is.
struct Watched {
    watch: Watch,
    at: Duration,
}

impl Watched {
    /// The order is given with the database as it is before.
    fn order(bed: &mut Bed, group: &str, goal: Goal, command: Command) -> Watched {
        let before = bed.db.clone();
        let changed = bed.ok(command) != csv_cluster::db::Applied::Unchanged;
        let watch = Watch::new(&before, &before.groups[group], goal, changed);
        Watched { watch, at: Duration::ZERO }
    }

    fn online(bed: &mut Bed, group: &str) -> Watched {
        Watched::order(bed, group, Goal::Online, Command::GroupOnline { name: group.into() })
    }

    fn moved(bed: &mut Bed, group: &str, to: u32) -> Watched {
        let (how, cause, generation) = (MoveKind::Live, MoveCause::Order, bed.db.groups[group].generation);
        let (name, to, reason) = (group.to_owned(), n(to), "test".to_owned());
        let release = Command::GroupRelease { name, generation, to: Some(to), how, reason, cause };
        Watched::order(bed, group, Goal::Moved(to), release)
    }

    fn look_waiting(&mut self, bed: &Bed, after_ms: u64, waits: Option<&str>) -> Verdict {
        self.at += Duration::from_millis(after_ms);
        self.watch.look(Look { db: &bed.db, waits, moving: None, at: self.at })
    }

    fn look(&mut self, bed: &Bed, after_ms: u64) -> Verdict {
        self.look_waiting(bed, after_ms, None)
    }

    fn no(&mut self, bed: &Bed, after_ms: u64) -> String {
        match self.look(bed, after_ms) {
            Verdict::Not(why) => why,
            other @ (Verdict::Wait | Verdict::Reached) => panic!("{other:?}"),
        }
    }
}

fn failed(reason: &str) -> Option<GroupState> {
    Some(GroupState::Failed { reason: reason.into() })
}

fn partial(reason: &str) -> Option<GroupState> {
    Some(GroupState::Partial { reason: reason.into() })
}

#[test]
fn a_group_comes_online() {
    let mut bed = Bed::nodes(2);
    bed.group("g", &[("a", "GenericApplication", "")]);
    let mut watched = Watched::online(&mut bed, "g");
    assert_eq!(watched.look_waiting(&bed, 200, Some("a node has not reported yet")), Verdict::Wait);
    bed.assign("g", 1);
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    bed.tell("g", &[("a", ResourceState::OnlinePending, "starting")], Some(GroupState::Pending));
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    bed.tell_online("g");
    assert_eq!(watched.look(&bed, 200), Verdict::Reached);
    let mut again = Watched::online(&mut bed, "g");
    assert_eq!(again.look(&bed, 0), Verdict::Reached);
    bed.down(1);
    assert_eq!(again.look(&bed, 200), Verdict::Wait, "its owner is gone, so nobody knows");
}

#[test]
fn a_database_that_has_not_heard_of_the_order_says_nothing() {
    let mut bed = Bed::nodes(2);
    bed.machine("vm", 1);
    let old = bed.clone();
    let offline = Command::GroupOffline { name: "vm".into(), reason: "x".into() };
    let mut watched = Watched::order(&mut bed, "vm", Goal::Offline, offline);
    assert_eq!(
        watched.look(&old, 200),
        Verdict::Wait,
        "the order is not there yet, and nobody has undone it"
    );
    bed.ok(Command::GroupOnline { name: "vm".into() });
    assert!(watched.no(&bed, 200).contains("somebody ordered it online"));
    let mut watched = Watched::moved(&mut bed, "vm", 2);
    assert_eq!(watched.look(&old, 200), Verdict::Wait);
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
}

#[test]
fn what_failed_before_the_order_is_not_held_against_it() {
    let mut bed = Bed::nodes(2);
    bed.group("g", &[("a", "GenericApplication", ""), ("b", "GenericApplication", "a")]);
    bed.want("g");
    bed.assign("g", 1);
    let states =
        [("a", ResourceState::Failed, "no such file"), ("b", ResourceState::Offline, "waits for [a]")];
    bed.tell("g", &states, failed("[a] no such file"));
    bed.by_owner("g", |name, generation, _| Command::GroupGiveUp {
        name,
        generation,
        reason: "too often".into(),
    });
    let mut watched = Watched::online(&mut bed, "g");
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    // The manager gives up again before the owner has heard of the order.
    bed.by_owner("g", |name, generation, _| Command::GroupGiveUp {
        name,
        generation,
        reason: "too often".into(),
    });
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    bed.tell("g", &[("a", ResourceState::OnlinePending, "")], None);
    assert_eq!(watched.look(&bed, 200), Verdict::Wait, "its state comes after those of its resources");
    bed.tell("g", &[], Some(GroupState::Pending));
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    bed.tell("g", &[("a", ResourceState::Failed, "still no such file")], failed("[a] still no such file"));
    bed.by_owner("g", |name, generation, _| Command::GroupGiveUp {
        name,
        generation,
        reason: "all tried".into(),
    });
    let why = watched.no(&bed, 200);
    for word in
        ["failed on n1", "still no such file", "waits for [a]", "all tried", "`csvctl group online g`"]
    {
        assert!(why.contains(word), "{word}: {why}");
    }
}

#[test]
fn a_failed_group_that_moves_on_is_followed() {
    let mut bed = Bed::nodes(2);
    bed.group("g", &[("a", "GenericApplication", "")]);
    let mut watched = Watched::online(&mut bed, "g");
    bed.assign("g", 1);
    bed.tell("g", &[("a", ResourceState::Failed, "x")], failed("[a] x"));
    assert_eq!(watched.look(&bed, 200), Verdict::Wait, "the manager has not decided yet");
    bed.ok(Command::GroupRelease {
        name: "g".into(),
        generation: 1,
        to: Some(n(2)),
        how: MoveKind::Shutdown,
        reason: "it failed".into(),
        cause: MoveCause::Failure,
    });
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    bed.by_owner("g", |name, generation, node| Command::GroupReleased { name, generation, node });
    bed.tell_online("g");
    assert_eq!(watched.look(&bed, 200), Verdict::Reached);
    let (mut stays, mut waits) = (bed.clone(), watched.watch.clone());
    stays.tell("g", &[("a", ResourceState::Failed, "x")], failed("[a] x"));
    stays.ok(Command::GroupMaintenance { name: "g".into(), on: true });
    let look = Look { db: &stays.db, waits: None, moving: None, at: Duration::from_secs(2) };
    let Verdict::Not(why) = waits.look(look) else { panic!("nobody moves it in maintenance") };
    assert!(why.contains("maintenance g off"), "{why}");
}

#[test]
fn a_partial_group_is_an_error_that_names_what_failed() {
    let mut bed = Bed::nodes(2);
    bed.group("g", &[("a", "GenericApplication", ""), ("b", "GenericApplication", "")]);
    let mut watched = Watched::online(&mut bed, "g");
    bed.assign("g", 2);
    let states = [("a", ResourceState::Online, ""), ("b", ResourceState::Failed, "no config")];
    bed.tell("g", &states, partial("[b] no config"));
    let why = watched.no(&bed, 200);
    assert!(why.contains("partially online on n2") && why.contains("`csvctl resource online b`"), "{why}");
    assert!(!why.lines().any(|line| line.trim_start().starts_with("a ")), "a is online: {why}");
    // As it was before the order: the owner is given time to do something about it.
    let mut again = Watched::online(&mut bed, "g");
    assert_eq!(again.look(&bed, 200), Verdict::Wait);
    assert!(again.no(&bed, 5_000).contains("no config"));
}

#[test]
fn a_group_that_no_node_can_have_is_told_after_a_while() {
    let mut bed = Bed::nodes(1);
    bed.group("g", &[("a", "GenericApplication", "")]);
    let mut watched = Watched::online(&mut bed, "g");
    let reason = "no node can take it: n1 is paused".to_owned();
    bed.ok(Command::GroupUnplaced { name: "g".into(), from_generation: 0, reason });
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    assert_eq!(watched.look_waiting(&bed, 10_000, Some("group db starts first")), Verdict::Wait);
    let why = watched.no(&bed, 200);
    assert!(why.contains("n1 is paused") && why.contains("`csvctl group candidates g`"), "{why}");
}

#[test]
fn a_wait_ends_when_nothing_changes_and_not_before_the_slowest_may_take() {
    let mut bed = Bed::nodes(1);
    bed.group("g", &[("a", "GenericApplication", "")]);
    let policy = csv_cluster::db::ResourcePolicy { pending_timeout_ms: 600_000, ..Default::default() };
    let change = csv_cluster::db::ResourceChange { policy: Some(policy), ..Default::default() };
    bed.ok(Command::ResourceSet { name: "a".into(), change });
    let mut watched = Watched::online(&mut bed, "g");
    bed.assign("g", 1);
    bed.tell("g", &[("a", ResourceState::OnlinePending, "10 %")], Some(GroupState::Pending));
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    assert_eq!(watched.look(&bed, 600_000), Verdict::Wait);
    bed.tell("g", &[("a", ResourceState::OnlinePending, "20 %")], None);
    assert_eq!(watched.look(&bed, 50_000), Verdict::Wait, "it gets on");
    assert_eq!(watched.look(&bed, 650_000), Verdict::Wait);
    let why = watched.no(&bed, 20_000);
    assert!(
        why.contains("pending on n1") && why.contains("20 %") && why.contains("goes on without csvctl"),
        "{why}"
    );
    for i in 0..40 {
        bed.tell("g", &[("a", ResourceState::OnlinePending, &format!("step {i}"))], None);
        let verdict = watched.look(&bed, 600_000);
        if verdict != Verdict::Wait {
            assert!(watched.at >= WAIT_MAX, "{:?}", watched.at);
            return;
        }
    }
    panic!("it waits for ever");
}

#[test]
fn a_move_is_done_when_the_group_is_online_there() {
    let mut bed = Bed::nodes(3);
    bed.machine("vm", 1);
    let mut watched = Watched::moved(&mut bed, "vm", 2);
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    bed.by_owner("vm", |name, generation, node| Command::GroupMigrated { name, generation, node });
    assert_eq!(watched.look(&bed, 200), Verdict::Wait, "it is there, and not looked after yet");
    bed.tell_online("vm");
    assert_eq!(watched.look(&bed, 200), Verdict::Reached);
}

#[test]
fn a_move_that_is_given_up_says_why() {
    let mut bed = Bed::nodes(3);
    bed.machine("vm", 1);
    let mut watched = Watched::moved(&mut bed, "vm", 2);
    let reason = "n2 cannot take it: no bridge br0".to_owned();
    bed.by_owner("vm", |name, generation, node| Command::GroupReleaseCancelled {
        name,
        generation,
        node,
        reason,
    });
    let why = watched.no(&bed, 200);
    assert!(why.contains("no bridge br0") && why.contains("--quick") && why.contains("stays on n1"), "{why}");
}

#[test]
fn a_move_that_ends_elsewhere_says_where_and_what_happened() {
    let mut bed = Bed::nodes(3);
    bed.machine("vm", 1);
    let mut watched = Watched::moved(&mut bed, "vm", 2);
    bed.by_owner("vm", |name, generation, node| Command::GroupReleased { name, generation, node });
    bed.tell("vm", &[("vm", ResourceState::Failed, "no KVM here")], failed("[vm] no KVM here"));
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    let generation = bed.db.groups["vm"].generation;
    bed.ok(Command::GroupRelease {
        name: "vm".into(),
        generation,
        to: Some(n(3)),
        how: MoveKind::Shutdown,
        reason: "it failed on n2".into(),
        cause: MoveCause::Failure,
    });
    bed.by_owner("vm", |name, generation, node| Command::GroupReleased { name, generation, node });
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    bed.tell_online("vm");
    let why = watched.no(&bed, 200);
    assert!(why.contains("online on n3, not on n2") && why.contains("no KVM here"), "{why}");
}

#[test]
fn what_was_partial_before_a_move_may_be_so_after_it() {
    let mut bed = Bed::nodes(2);
    bed.group("g", &[("a", "GenericApplication", ""), ("b", "GenericApplication", "")]);
    bed.want("g");
    bed.assign("g", 1);
    let states = [("a", ResourceState::Online, ""), ("b", ResourceState::Failed, "no config")];
    bed.tell("g", &states, partial("[b] no config"));
    let mut watched = Watched::moved(&mut bed, "g", 2);
    bed.by_owner("g", |name, generation, node| Command::GroupReleased { name, generation, node });
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    bed.tell("g", &states, partial("[b] no config"));
    assert_eq!(watched.look(&bed, 200), Verdict::Reached);
}

#[test]
fn a_resource_is_watched_in_its_group() {
    let mut bed = Bed::nodes(2);
    bed.group("g", &[("a", "GenericApplication", ""), ("b", "GenericApplication", "")]);
    bed.want("g");
    bed.assign("g", 1);
    bed.tell_online("g");
    let goal = || Goal::ResourceOffline("b".into());
    let mut watched = Watched::order(&mut bed, "g", goal(), Command::ResourceOffline { name: "b".into() });
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    bed.tell("g", &[("b", ResourceState::OfflinePending, "")], None);
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    bed.tell("g", &[("b", ResourceState::Offline, "")], None);
    assert_eq!(watched.look(&bed, 200), Verdict::Reached);
    let goal = || Goal::ResourceOnline("b".into());
    let mut watched = Watched::order(&mut bed, "g", goal(), Command::ResourceOnline { name: "b".into() });
    assert_eq!(watched.look(&bed, 200), Verdict::Wait, "the group is online from before");
    bed.tell("g", &[("b", ResourceState::OnlinePending, "")], Some(GroupState::Pending));
    assert_eq!(watched.look(&bed, 200), Verdict::Wait);
    let (mut bad, mut bad_watched) = (bed.clone(), Watched { watch: watched.watch.clone(), at: watched.at });
    bed.tell_online("g");
    assert_eq!(watched.look(&bed, 200), Verdict::Reached);
    bad.tell("g", &[("b", ResourceState::Failed, "no config")], partial("[b] no config"));
    assert!(bad_watched.no(&bad, 200).contains("no config"));
    bed.ok(Command::ResourceOffline { name: "b".into() });
    bed.tell("g", &[("b", ResourceState::Offline, "")], None);
    assert!(watched.no(&bed, 200).contains("somebody ordered it offline"));
}

#[test]
fn progress_tells_how_far_it_is() {
    let mut bed = Bed::nodes(2);
    bed.group("g", &[("a", "GenericApplication", ""), ("b", "GenericApplication", "a")]);
    bed.want("g");
    let text = |bed: &Bed, waits, moving: Option<&MoveProgress>, name: &str| {
        progress::text(Look { db: &bed.db, waits, moving, at: Duration::ZERO }, &bed.db.groups[name])
    };
    let waits = text(&bed, Some("group db starts first"), None, "g");
    assert_eq!(waits, ("g waits: group db starts first".to_owned(), None));
    bed.assign("g", 1);
    let states = [("a", ResourceState::Online, ""), ("b", ResourceState::OnlinePending, "reads its log")];
    bed.tell("g", &states, Some(GroupState::Pending));
    let (coming, _) = text(&bed, None, None, "g");
    assert_eq!(coming, "g is pending on n1, 1 of 2 online; b: reads its log");
    bed.machine("vm", 1);
    bed.release("vm", 2);
    let (leaving, _) = text(&bed, None, None, "vm");
    assert_eq!(leaving, "vm leaves n1 for n2");
    let moving =
        MoveProgress { resource: "vm".into(), text: "sends the guest: 40 %".into(), percent: Some(40) };
    assert_eq!(
        text(&bed, None, Some(&moving), "vm"),
        ("vm goes to n2: sends the guest: 40 %".to_owned(), Some(40))
    );
    assert_eq!(bed.db.resources["vm"].kind, MACHINE);
}
