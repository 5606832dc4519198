use super::*;

fn add(number: u32) -> Command {
    Command::NodeAdd { node: new_node(number), token_sha256: token(), expect_id: None }
}

fn down(node: u32, incarnation: u64, planned: bool) -> Command {
    Command::NodeDown { node: n(node), incarnation, reason: "no heartbeat".into(), planned }
}

#[test]
fn nothing_goes_before_init_and_init_goes_once() {
    let mut bed = Bed::empty();
    bed.refused(Command::NodeUp { node: n(1), incarnation: 1 }, "csvctl cluster create");
    assert_eq!(bed.ok(init()), Applied::Node(n(1)));
    bed.refused(init(), "belongs to cluster lab");
    assert_eq!(bed.db.nodes[&n(1)].display_state(bed.now), DisplayState::Joining);
    let Command::Init(mut bad) = init() else { unreachable!() };
    bad.name = "a name with blanks".into();
    Bed::empty().refused(Command::Init(bad), "cannot be used");
}

#[test]
fn joining_needs_a_good_token() {
    let mut bed = Bed::nodes(1);
    let other = "cd".repeat(32);
    let with = |token_sha256: &str| Command::NodeAdd {
        node: new_node(2),
        token_sha256: token_sha256.into(),
        expect_id: None,
    };
    bed.refused(with(&other), "not known");
    bed.ok(Command::TokenAdd { sha256: other.clone(), expires_unix_ms: bed.now + 10, uses: 1 });
    bed.now += 10;
    bed.refused(with(&other), "expired");
    bed.ok(Command::TokenAdd { sha256: other.clone(), expires_unix_ms: bed.now + 10, uses: 1 });
    assert_eq!(bed.ok(with(&other)), Applied::Node(n(2)));
    let Command::NodeAdd { node, .. } = add(3) else { unreachable!() };
    bed.refused(Command::NodeAdd { node, token_sha256: other.clone(), expect_id: None }, "used up");
    bed.ok(Command::TokenRevoke { sha256: other.clone() });
    bed.refused(with(&other), "not known");
}

#[test]
fn a_node_that_clashes_is_refused() {
    let mut bed = Bed::nodes(2);
    bed.refused(add(2), "n2 exists already");
    let mut twin = new_node(2);
    twin.name = "twin".into();
    let command = Command::NodeAdd { node: twin, token_sha256: token(), expect_id: None };
    bed.refused(command, "address 10.77.0.2 exists already in the cluster (node n2)");
    let mut named = new_node(3);
    named.name = "../n3".into();
    bed.refused(Command::NodeAdd { node: named, token_sha256: token(), expect_id: None }, "cannot be used");
    let late = Command::NodeAdd { node: new_node(3), token_sha256: token(), expect_id: Some(n(4)) };
    bed.refused(late, "try again");
    let mut old = new_node(3);
    old.feature_level = 0;
    bed.refused(Command::NodeAdd { node: old, token_sha256: token(), expect_id: None }, "wrong version");
    let mut newer = new_node(3);
    newer.feature_level = 9;
    bed.ok(Command::NodeAdd { node: newer, token_sha256: token(), expect_id: None });
    assert_eq!(bed.db.feature_level, FEATURE_LEVEL);
}

#[test]
fn sixty_four_nodes_and_no_more() {
    let mut bed = Bed::nodes(64);
    bed.refused(add(65), "no more than 64 nodes");
    bed.down(64);
    bed.ok(Command::NodeEvict { node: n(64) });
    assert_eq!(bed.ok(add(64)), Applied::Node(n(65)), "numbers are not used again");
}

#[test]
fn the_feature_level_is_what_all_know_and_rises_only_when_told() {
    let mut bed = Bed::nodes(2);
    let version =
        |node, feature_level| Command::NodeVersion { node: n(node), feature_level, version: "2".into() };
    let raise = |level| Command::RaiseFeatureLevel { level };
    bed.ok(version(1, 4));
    bed.refused(raise(3), "n2 knows only level 2");
    bed.ok(version(2, 3));
    bed.refused(raise(4), "n2 knows only level 3");
    bed.ok(raise(3));
    bed.refused(raise(2), "never goes down");
    bed.refused(version(2, 2), "wrong version");
    bed.refused(add(3), "wrong version");
}

#[test]
fn a_node_comes_back_only_in_a_new_incarnation() {
    let mut bed = Bed::nodes(2);
    bed.refused(down(2, 7, false), "stale");
    bed.ok(down(2, 1, false));
    assert_eq!(bed.ok(down(2, 1, false)), Applied::Unchanged);
    bed.refused(Command::NodeUp { node: n(2), incarnation: 1 }, "start anew");
    bed.ok(Command::NodeUp { node: n(2), incarnation: 5 });
    assert_eq!(bed.ok(Command::NodeUp { node: n(2), incarnation: 5 }), Applied::Unchanged);
    bed.refused(down(2, 1, false), "stale");
    assert!(bed.db.nodes[&n(2)].is_up(), "the late verdict on the old incarnation did nothing");
}

#[test]
fn isolation_keeps_volumes_and_ends_either_way() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 2);
    let isolated = Command::NodeIsolated { node: n(2), incarnation: 1, reason: "no heartbeat".into() };
    bed.ok(isolated.clone());
    assert_eq!(bed.ok(isolated), Applied::Unchanged);
    assert_eq!(bed.db.nodes[&n(2)].display_state(bed.now), DisplayState::Isolated);
    assert_eq!(bed.member("V", 2), (1, MemberState::Admitted));
    bed.ok(Command::NodeUp { node: n(2), incarnation: 1 });
    assert_eq!(bed.member("V", 2), (1, MemberState::Admitted), "nothing was lost");
    bed.ok(Command::NodeIsolated { node: n(2), incarnation: 1, reason: "again".into() });
    bed.ok(down(2, 1, false));
    assert_eq!(bed.member("V", 2), (1, MemberState::FencePending));
}

#[test]
fn a_restart_that_nobody_missed_fences_the_old_incarnation() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 2);
    bed.ok(Command::NodeUp { node: n(2), incarnation: 2 });
    assert!(bed.db.nodes[&n(2)].is_up());
    assert_eq!(bed.db.nodes[&n(2)].failures.len(), 1);
    assert_eq!(bed.member("V", 2), (1, MemberState::FencePending));
    assert!(!bed.db.owner_stands(&bed.db.volumes["V"]));
    bed.assign("V", 2);
    assert_eq!(bed.member("V", 2), (2, MemberState::Admitted), "its own old key is no obstacle");
    bed.online("V", &[]);
}

#[test]
fn three_failures_in_an_hour_keep_a_node_out() {
    let mut bed = Bed::nodes(3);
    for round in 0..3 {
        bed.down(2);
        bed.now += 10 * MINUTE_MS;
        if round < 2 {
            bed.up(2);
        }
    }
    let node = &bed.db.nodes[&n(2)];
    assert_eq!(node.display_state(bed.now), DisplayState::Quarantined);
    let up = Command::NodeUp { node: n(2), incarnation: 9 };
    bed.refused(up.clone(), "quarantined for another 6600 s after 3 failures");
    bed.now += 110 * MINUTE_MS;
    bed.ok(up);
    assert_eq!(bed.db.nodes[&n(2)].display_state(bed.now), DisplayState::Up);
}

#[test]
fn quarantine_can_be_cleared_and_planned_stops_do_not_count() {
    let mut bed = Bed::nodes(3);
    for _ in 0..5 {
        let incarnation = bed.db.nodes[&n(2)].incarnation;
        bed.ok(Command::NodeLeave { node: n(2), incarnation });
        assert_eq!(bed.db.nodes[&n(2)].display_state(bed.now), DisplayState::Draining);
        bed.ok(down(2, incarnation, true));
        bed.up(2);
    }
    for _ in 0..2 {
        bed.down(2);
        bed.up(2);
    }
    bed.now += 61 * MINUTE_MS;
    bed.down(2);
    bed.up(2);
    assert_eq!(bed.db.nodes[&n(2)].failures.len(), 1, "the others are too long ago");
    bed.setting("quarantine_failures", "2");
    bed.down(2);
    bed.refused(Command::NodeUp { node: n(2), incarnation: 99 }, "quarantined");
    bed.ok(Command::NodeClearQuarantine { node: n(2) });
    bed.ok(Command::NodeUp { node: n(2), incarnation: 99 });
}

#[test]
fn quarantine_never_takes_the_majority_of_the_nodes() {
    let mut bed = Bed::nodes(4);
    bed.setting("quarantine_failures", "1");
    bed.down(1);
    bed.down(2);
    let shown = |bed: &Bed, node| bed.db.nodes[&n(node)].display_state(bed.now);
    assert_eq!(shown(&bed, 1), DisplayState::Quarantined);
    assert_eq!(shown(&bed, 2), DisplayState::Down, "two of four would be too many");
}

#[test]
fn pause_drain_and_resume() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 2);
    let shown = |bed: &Bed| bed.db.nodes[&n(2)].display_state(bed.now);
    bed.ok(Command::NodePause { node: n(2), drain: false });
    assert_eq!(shown(&bed), DisplayState::Paused);
    bed.ok(Command::NodePause { node: n(2), drain: true });
    assert_eq!(shown(&bed), DisplayState::Draining);
    bed.refused(Command::NodeDrained { node: n(2) }, "owns V");
    bed.ok(Command::NodeResume { node: n(2) });
    assert_eq!(shown(&bed), DisplayState::Up);
    bed.ok(Command::NodePause { node: n(1), drain: true });
    bed.ok(Command::NodeDrained { node: n(1) });
    assert_eq!(bed.db.nodes[&n(1)].admin, AdminState::Paused);
    let again = Command::NodePause { node: n(1), drain: true };
    assert_eq!(bed.ok(again), Applied::Unchanged, "drained already");
}

#[test]
fn eviction_is_refused_where_it_would_hurt() {
    let mut bed = Bed::nodes(3);
    bed.volume("V", 2);
    bed.admit("V", 3);
    let evict = |node| Command::NodeEvict { node: n(node) };
    bed.refused(evict(2), "owns V: move them first with `csvctl node drain n2`");
    bed.refused(evict(3), "csvctl node drain n3");
    bed.ok(Command::NodePause { node: n(3), drain: false });
    bed.ok(evict(3));
    assert_eq!(bed.member("V", 3), (1, MemberState::FencePending), "its key must go");
    let fenced = vec![(n(3), 1)];
    let epoch = bed.db.volumes["V"].epoch;
    bed.ok(Command::VolumeFenced { name: "V".into(), epoch, fenced });
    assert!(!bed.db.volumes["V"].members.contains_key(&n(3)), "then it is forgotten");
    bed.down(2);
    bed.refused(evict(2), "owns V");
    bed.assign("V", 1);
    bed.ok(evict(2));
    bed.refused(evict(1), "last node");
    bed.refused(evict(2), "there is no node number 2");
}

#[test]
fn addresses_and_certificates_change_and_stay_unique() {
    let mut bed = Bed::nodes(2);
    bed.refused(Command::NodeAddr { node: n(2), addr: addr(1) }, "node n1");
    bed.ok(Command::NodeAddr { node: n(2), addr: addr(9) });
    let cert = |cert_sha256: String| Command::NodeCertificate { node: n(2), cert_sha256 };
    bed.refused(cert("AB".repeat(32)), "lower-case");
    bed.ok(cert(token()));
    assert_eq!(bed.ok(cert(token())), Applied::Unchanged);
}

#[test]
fn a_node_that_stopped_in_good_order_says_so_until_it_is_up_again() {
    let mut bed = Bed::nodes(3);
    let down =
        |node, planned| Command::NodeDown { node: n(node), incarnation: 1, reason: "r".into(), planned };
    bed.ok(down(1, true));
    bed.ok(down(2, false));
    assert!(bed.db.nodes[&n(1)].stopped && !bed.db.nodes[&n(2)].stopped);
    bed.up(1);
    assert!(!bed.db.nodes[&n(1)].stopped);
}
