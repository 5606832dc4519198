//! Groups and resources: checks of what an administrator gives, and the ways of a group between owners.

use super::*;

fn release(bed: &Bed, name: &str, to: Option<u32>, cause: MoveCause) -> Command {
    let (generation, how, reason) = (bed.db.groups[name].generation, MoveKind::Live, "test".into());
    Command::GroupRelease { name: name.into(), generation, to: to.map(n), how, reason, cause }
}

fn released(bed: &Bed, name: &str) -> Command {
    let group = &bed.db.groups[name];
    Command::GroupReleased {
        name: name.into(),
        generation: group.generation,
        node: group.owner.unwrap_or(n(1)),
    }
}

fn policy_refused(bed: &mut Bed, change: impl FnOnce(&mut GroupPolicy), word: &str) {
    let mut policy = GroupPolicy::default();
    change(&mut policy);
    bed.refused(Command::GroupPolicy { name: "g".into(), policy }, word);
}

#[test]
fn bad_policies_and_resources_are_refused() {
    let mut bed = Bed::nodes(2);
    bed.group("g", &[("a", ""), ("b", "a")]);
    bed.group("h", &[("c", "")]);
    bed.refused(Command::GroupAdd { name: "g".into(), policy: GroupPolicy::default() }, "exists already");
    bed.refused(Command::GroupAdd { name: "g/h".into(), policy: GroupPolicy::default() }, "cannot be used");
    policy_refused(&mut bed, |policy| policy.preferred = vec![n(9)], "no node number 9");
    policy_refused(&mut bed, |policy| policy.preferred = vec![n(1), n(1)], "stands twice");
    policy_refused(&mut bed, |policy| policy.priority = PRIORITY_MAX + 1, "0 to 10000");
    policy_refused(&mut bed, |policy| policy.failover_period_ms = 5, "1 minute to 30 days");
    policy_refused(&mut bed, |policy| policy.failover_threshold = Some(5000), "0 to 1000");
    let window = Failback::Window { from_minute: 60, to_minute: 60 };
    policy_refused(&mut bed, |policy| policy.failback = window, "window");
    policy_refused(&mut bed, |policy| policy.start_after = vec!["x".into()], "no group x");
    policy_refused(&mut bed, |policy| policy.start_after = vec!["g".into()], "circle: g");
    let policy = GroupPolicy { start_after: vec!["g".into()], ..GroupPolicy::default() };
    bed.ok(Command::GroupPolicy { name: "h".into(), policy });
    policy_refused(&mut bed, |policy| policy.start_after = vec!["h".into()], "circle");
    let add = |name: &str, group: &str, depends: &str| Command::ResourceAdd {
        resource: new_resource(name, group, depends),
    };
    bed.refused(add("a", "h", ""), "exists already");
    bed.refused(add("x", "z", ""), "no group z");
    bed.refused(add("x", "g", "nobody"), "no resource nobody");
    bed.refused(add("x", "g", "c"), "only resources of one group");
    bed.refused(add("x", "g", "x"), "on itself");
    bed.refused(add("x", "g", "a and"), "no dependency expression");
    bed.refused(add("x(1)", "g", ""), "no brackets");
    bed.refused(add("or", "g", ""), "no brackets");
    let set = |change| Command::ResourceSet { name: "a".into(), change };
    let depends = ResourceChange { depends: Some("b".into()), ..ResourceChange::default() };
    bed.refused(set(depends), "in a circle: a depends on b");
    for path in ["/etc/../x", "sysctl:kernel..x"] {
        let path = ResourceChange { checkpoints: Some(vec![path.into()]), ..ResourceChange::default() };
        bed.refused(set(path), "absolute path");
    }
    let policy = ResourcePolicy { pending_timeout_ms: 1, ..ResourcePolicy::default() };
    bed.refused(
        set(ResourceChange { policy: Some(policy), ..ResourceChange::default() }),
        "pending time-out",
    );
    bed.refused(set(ResourceChange { possible: Some(vec![n(7)]), ..ResourceChange::default() }), "number 7");
    bed.refused(
        set(ResourceChange { group: Some("h".into()), ..ResourceChange::default() }),
        "b depends on a",
    );
    bed.refused(Command::ResourceRemove { name: "a".into() }, "b depends on a");
    bed.refused(Command::GroupRemove { name: "g".into() }, "has resource a");
    bed.ok(Command::ResourceRemove { name: "b".into() });
    bed.ok(Command::ResourceRemove { name: "a".into() });
    bed.refused(Command::GroupRemove { name: "g".into() }, "group h starts after it");
}

#[test]
fn a_group_comes_online_moves_and_goes_offline() {
    let mut bed = Bed::nodes(3);
    bed.online_group("g", 1);
    assert!(bed.db.groups["g"].displaced);
    bed.refused(release(&bed, "g", Some(1), MoveCause::Order), "n1 has it already");
    bed.refused(released(&bed, "g"), "was not asked");
    bed.ok(release(&bed, "g", Some(2), MoveCause::Order));
    assert_eq!(bed.ok(release(&bed, "g", Some(2), MoveCause::Order)), Applied::Unchanged);
    bed.refused(release(&bed, "g", Some(3), MoveCause::Order), "wait until it has arrived");
    let late = bed.group_status_command("g", GroupState::Online, ResourceState::Online);
    bed.ok(released(&bed, "g"));
    let group = &bed.db.groups["g"];
    assert_eq!((group.owner, group.generation, group.last_owner), (Some(n(2)), 2, Some(n(1))));
    assert!(!group.displaced && group.state == GroupState::Pending);
    assert_eq!(bed.db.resources["g-r"].status.state, ResourceState::Offline);
    bed.refused(late, "stale");
    bed.ok(bed.group_status_command("g", GroupState::Online, ResourceState::Online));
    bed.ok(Command::GroupOffline { name: "g".into(), reason: "r".into() });
    bed.ok(release(&bed, "g", None, MoveCause::Rule));
    bed.ok(released(&bed, "g"));
    assert_eq!(bed.db.groups["g"].owner, None);
    let assign = Command::GroupAssign { name: "g".into(), from_generation: 2, to: n(1), reason: "r".into() };
    bed.refused(assign, "to stay offline");
    bed.ok(Command::ResourceRemove { name: "g-r".into() });
    bed.ok(Command::GroupRemove { name: "g".into() });
}

#[test]
fn a_group_goes_to_the_next_owner_only_when_the_last_is_gone_or_let_go() {
    let mut bed = Bed::nodes(3);
    bed.online_group("g", 1);
    let assign = |generation| Command::GroupAssign {
        name: "g".into(),
        from_generation: generation,
        to: n(2),
        reason: "r".into(),
    };
    bed.refused(assign(1), "must release it first");
    bed.refused(
        Command::GroupUnplaced { name: "g".into(), from_generation: 1, reason: "r".into() },
        "must release it first",
    );
    bed.down(1);
    bed.refused(bed.group_status_command("g", GroupState::Online, ResourceState::Online), "given up");
    bed.refused(assign(0), "stale");
    bed.ok(assign(1));
    bed.refused(assign(1), "stale");
    // The node that started anew unnoticed has nothing of it any more.
    bed.ok(bed.group_status_command("g", GroupState::Online, ResourceState::Online));
    bed.ok(Command::NodeUp { node: n(2), incarnation: 2 });
    bed.ok(assign(2));
    assert_eq!(bed.db.groups["g"].generation, 3);
}

#[test]
fn a_migrated_group_keeps_its_resources_online() {
    let mut bed = Bed::nodes(3);
    bed.online_group("g", 1);
    let migrated = |bed: &Bed| Command::GroupMigrated {
        name: "g".into(),
        generation: bed.db.groups["g"].generation,
        node: bed.db.groups["g"].owner.unwrap(),
    };
    bed.refused(migrated(&bed), "was not asked");
    bed.ok(release(&bed, "g", Some(2), MoveCause::Drain));
    bed.ok(migrated(&bed));
    assert_eq!(bed.db.resources["g-r"].status.state, ResourceState::Online);
    let group = &bed.db.groups["g"];
    assert!((group.owner, group.displaced) == (Some(n(2)), true));
    bed.ok(bed.group_status_command("g", GroupState::Online, ResourceState::Online));
    // Where nobody is any more it cannot arrive: its owner, which has it still, keeps it.
    bed.ok(release(&bed, "g", Some(3), MoveCause::Order));
    bed.down(3);
    bed.refused(migrated(&bed), "is down");
    assert_eq!(bed.db.groups["g"].owner, Some(n(2)));
    assert_eq!(bed.db.resources["g-r"].status.state, ResourceState::Online);
}

#[test]
fn a_file_that_is_late_does_not_replace_that_of_the_next_owner() {
    let mut bed = Bed::nodes(2);
    bed.online_group("g", 1);
    let put = |bed: &Bed, byte: u8| {
        let group = &bed.db.groups["g"];
        let (generation, node) = (group.generation, group.owner.unwrap());
        let owner = Some(Ownership { group: "g".into(), generation, node });
        Command::CheckpointPut { name: "resource:g-r:0".into(), value: vec![byte], owner }
    };
    let late = put(&bed, 1);
    bed.ok(late.clone());
    bed.ok(release(&bed, "g", Some(2), MoveCause::Order));
    // The last one, when everything is offline.
    bed.ok(put(&bed, 2));
    bed.ok(released(&bed, "g"));
    bed.ok(put(&bed, 3));
    bed.refused(late, "g");
    assert_eq!(bed.db.checkpoints["resource:g-r:0"], [3]);
}

#[test]
fn a_cancelled_move_leaves_the_group_as_it_was() {
    let mut bed = Bed::nodes(2);
    bed.online_group("g", 1);
    bed.ok(release(&bed, "g", Some(2), MoveCause::Order));
    let (generation, node, reason) = (1, n(1), "the network was lost".to_owned());
    bed.ok(Command::GroupReleaseCancelled { name: "g".into(), generation, node, reason });
    assert_eq!(bed.db.groups["g"].state, GroupState::Online);
    // Its target went down in mid-move, and nobody else was named.
    bed.ok(release(&bed, "g", Some(2), MoveCause::Order));
    bed.down(2);
    bed.ok(released(&bed, "g"));
    assert_eq!(bed.db.groups["g"].owner, None);
}

#[test]
fn failures_are_counted_until_it_works_again() {
    let mut bed = Bed::nodes(2);
    bed.online_group("g", 1);
    let failed = |bed: &Bed| {
        let state = GroupState::Failed { reason: "a failed".into() };
        bed.group_status_command("g", state, ResourceState::Failed)
    };
    bed.ok(failed(&bed));
    assert_eq!(bed.ok(failed(&bed)), Applied::Unchanged);
    assert_eq!(bed.db.groups["g"].failures.len(), 1);
    let give_up =
        |generation| Command::GroupGiveUp { name: "g".into(), generation, reason: "too often".into() };
    bed.ok(give_up(1));
    assert_eq!(bed.ok(give_up(1)), Applied::Unchanged);
    bed.ok(Command::GroupOnline { name: "g".into() });
    assert_eq!((bed.db.groups["g"].failures.len(), &bed.db.groups["g"].given_up), (0, &None));
    bed.ok(release(&bed, "g", Some(2), MoveCause::Failure));
    assert_eq!(bed.db.groups["g"].failovers, [bed.now]);
    bed.refused(give_up(1), "has not failed");
}

#[test]
fn nodes_with_groups_are_not_drained_and_those_that_go_are_forgotten() {
    let mut bed = Bed::nodes(3);
    bed.online_group("g", 2);
    let policy = GroupPolicy { preferred: vec![n(2), n(3)], ..GroupPolicy::default() };
    bed.ok(Command::GroupPolicy { name: "g".into(), policy });
    let possible = ResourceChange { possible: Some(vec![n(2)]), ..ResourceChange::default() };
    bed.ok(Command::ResourceSet { name: "g-r".into(), change: possible });
    bed.refused(release(&bed, "g", Some(3), MoveCause::Order), "n3 is no possible owner of resource g-r");
    bed.ok(Command::NodePause { node: n(2), drain: true });
    bed.refused(Command::NodeDrained { node: n(2) }, "has the groups g");
    bed.down(2);
    let evict = Command::NodeEvict { node: n(2) };
    bed.refused(evict.clone(), "n2 is Down: its groups (g) may run there for 9 s more; evict it then");
    let mut other = bed.db.clone();
    bed.now += bed.db.may_run_for_ms(&bed.db.nodes[&n(2)], n(1), bed.now);
    // By another clock it is not over yet.
    let envelope = crate::db::Envelope { at_unix_ms: bed.now, by: n(3), command: evict.clone() };
    assert!(other.apply(&envelope).unwrap_err().to_string().contains("for 60 s more"));
    bed.ok(evict);
    let group = &bed.db.groups["g"];
    assert_eq!((group.owner, group.policy.preferred.as_slice()), (None, [n(3)].as_slice()));
    assert_eq!(bed.db.resources["g-r"].possible, [n(2)], "not every node may have it now");
}

#[test]
fn types_and_wants() {
    let mut bed = Bed::nodes(1);
    bed.online_group("g", 1);
    let put = |name: &str, library: &str| Command::TypePut {
        resource_type: LibraryType { name: name.into(), library: library.into(), ..LibraryType::default() },
    };
    bed.refused(put("ocf:x", "/a"), "no colon");
    bed.refused(put("T", "a.so"), "absolute path");
    bed.ok(put("T", "/a.so"));
    assert_eq!(bed.ok(put("T", "/a.so")), Applied::Unchanged);
    bed.ok(Command::ResourceAdd {
        resource: NewResource { kind: "T".into(), ..new_resource("t", "g", "g-r") },
    });
    bed.refused(Command::TypeRemove { name: "T".into() }, "resource t is of type T");
    bed.refused(Command::ResourceRemove { name: "t".into() }, "take it offline first");
    bed.ok(Command::ResourceOffline { name: "t".into() });
    assert_eq!(bed.ok(Command::ResourceOffline { name: "t".into() }), Applied::Unchanged);
    for name in ["resource:t:0", "resource:t:11", "resource:t:1:0"] {
        bed.ok(Command::CheckpointPut { name: name.into(), value: vec![1], owner: None });
    }
    bed.ok(Command::ResourceRemove { name: "t".into() });
    // The last is one of a resource "t:1".
    assert_eq!(bed.db.checkpoints.keys().collect::<Vec<_>>(), ["resource:t:1:0"]);
    bed.ok(Command::TypeRemove { name: "T".into() });
    bed.ok(Command::GroupMaintenance { name: "g".into(), on: true });
    assert_eq!(bed.ok(Command::GroupMaintenance { name: "g".into(), on: true }), Applied::Unchanged);
}

#[test]
fn groups_need_the_second_feature_level() {
    let mut bed = Bed::nodes(1);
    bed.db.feature_level = 1;
    bed.refused(Command::GroupAdd { name: "g".into(), policy: GroupPolicy::default() }, "feature level 2");
}

#[test]
fn an_order_to_start_holds_until_the_group_has_an_owner() {
    let mut bed = Bed::nodes(3);
    bed.online_group("g", 1);
    let online = || Command::GroupOnline { name: "g".into() };
    let unplaced = |generation: u64| Command::GroupUnplaced {
        name: "g".into(),
        from_generation: generation,
        reason: "x".into(),
    };
    assert_eq!(bed.db.groups["g"].ordered_unix_ms, None, "it has started");
    assert_eq!(bed.ok(online()), Applied::Unchanged, "its owner stands");
    bed.down(1);
    bed.ok(unplaced(1));
    bed.now += 5;
    assert_eq!(bed.ok(online()), Applied::Done);
    assert_eq!(bed.db.groups["g"].ordered_unix_ms, Some(bed.now));
    assert_eq!(bed.ok(online()), Applied::Unchanged, "ordered already");
    bed.ok(Command::GroupOffline { name: "g".into(), reason: "r".into() });
    assert_eq!(bed.db.groups["g"].ordered_unix_ms, None);
    bed.ok(online());
    bed.assign_group("g", 2);
    assert_eq!(bed.db.groups["g"].ordered_unix_ms, None);
    // Released to nobody, as by a node that is about to stop: the order counts for afterwards.
    bed.ok(release(&bed, "g", None, MoveCause::Drain));
    assert_eq!(bed.ok(online()), Applied::Done);
    bed.ok(released(&bed, "g"));
    assert_eq!(bed.db.groups["g"].ordered_unix_ms, Some(bed.now));
    // The target of a move is gone when it is released: it was to go on.
    bed.assign_group("g", 2);
    bed.ok(release(&bed, "g", Some(3), MoveCause::Drain));
    bed.down(3);
    bed.ok(released(&bed, "g"));
    assert_eq!((bed.db.groups["g"].owner, bed.db.groups["g"].ordered_unix_ms), (None, Some(bed.now)));
}

#[test]
fn a_drain_ends_when_no_group_is_left() {
    use crate::failover::{View, plan};
    let mut bed = Bed::nodes(2);
    bed.online_group("g", 1);
    bed.ok(Command::NodePause { node: n(1), drain: true });
    let view = View { now_unix_ms: bed.now, me: n(1), reports: BTreeMap::new() };
    assert_eq!(plan(&bed.db, &view), []);
    bed.ok(release(&bed, "g", Some(2), MoveCause::Drain));
    bed.ok(released(&bed, "g"));
    assert_eq!(plan(&bed.db, &view), [Command::NodeDrained { node: n(1) }]);
}
