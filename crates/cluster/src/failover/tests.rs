//! Small cases: state in, decision out. In all of them plans are idempotent: `Case::plan` applies what it gets and plans again.

mod helpless;

use super::*;
use crate::db::tests::{Bed, MINUTE_MS, n};
use crate::db::{Applied, MemberState};

/// A database and what its nodes report.
pub(super) struct Case {
    pub(super) bed: Bed,
    pub(super) view: View,
}

impl Case {
    /// Nodes that are up and report a good path to each of the volumes.
    fn new(nodes: u32, volumes: &[&str]) -> Self {
        let bed = Bed::nodes(nodes);
        let view = View { now_unix_ms: bed.now, me: n(1), reports: BTreeMap::new() };
        let mut case = Case { bed, view };
        for node in 1..=nodes {
            for volume in volumes {
                case.report(node, volume).path = PathState::Good;
                case.report(node, volume).csvfs = true;
            }
        }
        case
    }

    fn report(&mut self, node: u32, volume: &str) -> &mut VolumeReport {
        let report = self.view.reports.entry(n(node)).or_default();
        report.incarnation = self.bed.db.nodes[&n(node)].incarnation;
        report.volumes.entry(volume.into()).or_default()
    }

    fn volume(&mut self, name: &str, owner: u32) {
        self.bed.volume(name, owner);
        self.report(owner, name).role_epoch = 1;
    }

    fn after(&mut self, ms: u64) -> &mut Self {
        self.bed.now += ms;
        self
    }

    /// Plans, applies, and makes sure that this was all.
    fn plan(&mut self) -> Vec<String> {
        self.view.now_unix_ms = self.bed.now;
        let commands = plan(&self.bed.db, &self.view);
        for command in &commands {
            let applied = self.bed.ok(command.clone());
            assert_ne!(applied, Applied::Unchanged, "{command:?} changed nothing");
        }
        assert_eq!(plan(&self.bed.db, &self.view), [], "not idempotent after {commands:?}");
        commands.iter().map(short).collect()
    }

    fn start_failed(&mut self, name: &str) {
        let volume = &self.bed.db.volumes[name];
        let (epoch, node) = (volume.epoch, volume.owner.unwrap());
        let why = "mount: bad superblock".into();
        self.bed.ok(Command::VolumeStartFailed { name: name.into(), epoch, node, why });
    }
}

#[allow(clippy::wildcard_enum_match_arm, reason = "every other command is wrong")]
fn short(command: &Command) -> String {
    match command {
        Command::VolumeAssign { name, to, .. } => format!("{name} -> {to}"),
        Command::VolumeRelease { name, to: Some(to), .. } => format!("{name} moves to {to}"),
        Command::VolumeRelease { name, to: None, .. } => format!("{name} closes"),
        Command::VolumeUnowned { name, reason, .. } => format!("{name}: {reason}"),
        Command::VolumeFail { name, .. } => format!("{name} fails"),
        Command::VolumeBringOnline { name } => format!("{name} again"),
        Command::NodeDrained { node } => format!("{node} drained"),
        _ => panic!("{command:?} is not the manager's"),
    }
}

#[test]
fn new_volumes_are_spread_evenly() {
    let mut case = Case::new(3, &["A", "B", "C", "D"]);
    for name in ["A", "B", "C", "D"] {
        case.bed.add_volume(name, &[]);
    }
    assert_eq!(case.plan(), ["A -> n1", "B -> n2", "C -> n3", "D -> n1"]);
}

#[test]
fn preferred_owners_come_first_and_load_breaks_ties() {
    let mut case = Case::new(3, &["A", "B", "C"]);
    case.bed.add_volume("A", &[3, 2]);
    case.bed.add_volume("B", &[3, 2]);
    case.bed.add_volume("C", &[]);
    case.view.reports.get_mut(&n(1)).unwrap().load = 50;
    assert_eq!(case.plan(), ["A -> n3", "B -> n3", "C -> n2"]);
}

#[test]
fn who_cannot_own_a_volume() {
    let mut case = Case::new(6, &["A"]);
    case.bed.add_volume("A", &[]);
    case.bed.down(1);
    case.bed.ok(Command::NodePause { node: n(2), drain: false });
    case.report(3, "A").path = PathState::None;
    case.report(4, "A").path = PathState::Failed;
    case.report(5, "A").csvfs = false;
    case.view.reports.get_mut(&n(6)).unwrap().incarnation = 7;
    assert_eq!(case.plan(), [""; 0], "n6 is up and has not reported: wait");
    case.view.reports.get_mut(&n(6)).unwrap().incarnation = 1;
    assert_eq!(case.plan(), ["A -> n6"]);
    case.bed.down(6);
    let why = "A: no node can own it: n1 is not up; n2 is paused or leaving; n3 has no path to the LUN; \
               n4 lost its path to the LUN; n5 does not run csvfs of the volume; n6 is not up";
    assert_eq!(case.plan(), [why]);
    assert_eq!(case.after(MINUTE_MS).plan(), [""; 0], "said once");
    case.report(4, "A").path = PathState::Good;
    assert_eq!(case.plan(), ["A -> n4"]);
}

#[test]
fn a_problem_makes_a_node_the_last_choice() {
    let mut case = Case::new(2, &["A"]);
    case.bed.add_volume("A", &[1]);
    case.report(1, "A").problem = Some("smbd does not start".into());
    assert_eq!(case.plan(), ["A -> n2"]);
}

#[test]
fn the_volumes_of_a_dead_node_go_to_the_others() {
    let mut case = Case::new(3, &["A", "B", "C"]);
    for name in ["A", "B"] {
        case.volume(name, 1);
    }
    case.volume("C", 2);
    case.bed.down(1);
    assert_eq!(case.plan(), ["A -> n3", "B -> n2"]);
}

#[test]
fn an_isolated_owner_keeps_its_volumes() {
    let mut case = Case::new(2, &["A"]);
    case.volume("A", 1);
    case.bed.ok(Command::NodeIsolated { node: n(1), incarnation: 1, reason: "silent".into() });
    assert_eq!(case.after(MINUTE_MS).plan(), [""; 0]);
}

#[test]
fn an_owner_that_started_anew_may_get_it_again() {
    let mut case = Case::new(2, &["A"]);
    case.volume("A", 1);
    case.report(2, "A").path = PathState::None;
    case.bed.up(1);
    assert_eq!(case.plan(), [""; 0], "its new incarnation has not reported");
    case.report(1, "A").role_epoch = 0;
    assert_eq!(case.plan(), ["A -> n1"]);
}

#[test]
fn a_lost_path_moves_the_volume_if_others_have_one() {
    let mut case = Case::new(2, &["A"]);
    case.volume("A", 1);
    case.report(1, "A").path = PathState::Failed;
    case.report(2, "A").path = PathState::Failed;
    assert_eq!(case.plan(), [""; 0], "nobody is better");
    case.report(2, "A").path = PathState::Good;
    assert_eq!(case.plan(), ["A -> n2"]);
    assert_eq!(case.bed.member("A", 1), (1, MemberState::FencePending));
    case.bed.down(2);
    assert_eq!(case.plan().len(), 1, "nobody left");
    case.report(1, "A").path = PathState::Good;
    let still = "A: no node can own it: n1 is still to be fenced; n2 is not up";
    assert_eq!(case.plan(), [still]);
    let withdraw = Command::VolumeWithdraw { name: "A".into(), node: n(1), incarnation: 1, generation: 1 };
    case.bed.ok(withdraw);
    let still = "A: no node can own it: n1 was fenced and has not asked for a new key yet; n2 is not up";
    assert_eq!(case.plan(), [still]);
    case.bed.admit("A", 1);
    assert_eq!(case.plan(), ["A -> n1"]);
}

#[test]
fn a_csvfs_that_ended_or_lost_its_role_is_replaced() {
    let mut case = Case::new(2, &["A"]);
    case.volume("A", 1);
    case.report(1, "A").csvfs = false;
    assert_eq!(case.after(2_999).plan(), [""; 0], "the report may be from before");
    assert_eq!(case.after(1).plan(), ["A -> n2"]);
    let mut case = Case::new(2, &["A"]);
    case.volume("A", 1);
    case.report(1, "A").role_epoch = 0;
    assert_eq!(case.after(2_999).plan(), [""; 0], "the report may be from before");
    assert_eq!(case.after(1).plan(), ["A -> n1"], "it may have it again");
}

#[test]
fn failed_starts_go_round_then_wait_then_fail() {
    let mut case = Case::new(2, &["A"]);
    case.bed.setting("failed_retry_ms", "600000");
    case.bed.add_volume("A", &[2]);
    assert_eq!(case.plan(), ["A -> n2"]);
    case.start_failed("A");
    assert_eq!(case.plan(), ["A -> n1"], "at once, where it did not fail yet");
    case.start_failed("A");
    assert_eq!(case.after(999).plan(), [""; 0]);
    assert_eq!(case.after(1).plan(), ["A -> n2"]);
    case.start_failed("A");
    assert_eq!(case.plan(), [""; 0], "n1 failed a moment ago too");
    assert_eq!(case.after(1_000).plan(), ["A -> n1"]);
    case.start_failed("A");
    assert_eq!(case.after(1_999).plan(), [""; 0], "the wait doubles");
    assert_eq!(case.after(1).plan(), ["A -> n2"]);
    case.start_failed("A");
    assert_eq!(case.after(2_000).plan(), ["A -> n1"]);
    case.start_failed("A");
    assert_eq!(case.plan(), ["A fails"], "three times on each");
    assert_eq!(case.after(599_999).plan(), [""; 0]);
    assert_eq!(case.after(1).plan(), ["A again", "A -> n2"]);
}

#[test]
fn a_wall_clock_set_back_does_not_wait_for_ever() {
    let mut case = Case::new(1, &["A"]);
    case.bed.add_volume("A", &[]);
    case.plan();
    case.start_failed("A");
    assert_eq!(case.plan(), [""; 0]);
    case.bed.now -= 10 * MINUTE_MS;
    assert_eq!(case.plan(), ["A -> n1"]);
}

#[test]
fn a_start_that_hangs_is_given_to_another() {
    let mut case = Case::new(2, &["A"]);
    case.bed.add_volume("A", &[]);
    assert_eq!(case.plan(), ["A -> n1"]);
    assert_eq!(case.after(MINUTE_MS - 1).plan(), [""; 0]);
    assert_eq!(case.after(1).plan(), ["A -> n2"]);
    assert_eq!(case.bed.db.volumes["A"].failures_on(n(1)), 1);
}

#[test]
fn draining_moves_a_few_at_a_time_and_ends_paused() {
    let mut case = Case::new(2, &["A", "B", "C"]);
    case.bed.setting("max_parallel_moves", "2");
    for name in ["A", "B", "C"] {
        case.volume(name, 1);
    }
    case.bed.ok(Command::NodePause { node: n(1), drain: true });
    assert_eq!(case.plan(), ["A moves to n2", "B moves to n2"]);
    for name in ["A", "B"] {
        let epoch = case.bed.db.volumes[name].epoch;
        case.bed.ok(Command::VolumeReleased { name: name.into(), epoch, node: n(1) });
        case.bed.online(name, &[]);
        case.report(2, name).role_epoch = 2;
    }
    assert_eq!(case.plan(), ["C moves to n2"]);
    let epoch = case.bed.db.volumes["C"].epoch;
    case.bed.ok(Command::VolumeReleased { name: "C".into(), epoch, node: n(1) });
    assert_eq!(case.plan(), ["n1 drained"]);
    assert_eq!(case.bed.db.nodes[&n(1)].admin, AdminState::Paused);
}

#[test]
fn a_paused_owner_keeps_and_a_leaving_one_gives_up() {
    let mut case = Case::new(2, &["A"]);
    case.volume("A", 1);
    case.bed.ok(Command::NodePause { node: n(1), drain: false });
    assert_eq!(case.after(MINUTE_MS).plan(), [""; 0]);
    case.bed.ok(Command::NodeLeave { node: n(1), incarnation: 1 });
    assert_eq!(case.plan(), ["A moves to n2"]);
}

#[test]
fn a_drain_without_a_way_out_waits() {
    let mut case = Case::new(2, &["A"]);
    case.volume("A", 1);
    case.report(2, "A").path = PathState::None;
    case.bed.ok(Command::NodePause { node: n(1), drain: true });
    assert_eq!(case.plan(), [""; 0]);
    case.report(2, "A").path = PathState::Good;
    assert_eq!(case.plan(), ["A moves to n2"]);
}

#[test]
fn a_move_is_left_alone_until_it_hangs() {
    let mut case = Case::new(3, &["A"]);
    case.volume("A", 1);
    let to = Some(n(2));
    case.bed.ok(Command::VolumeRelease {
        name: "A".into(),
        epoch: csv_types::Epoch(1),
        to,
        reason: "x".into(),
    });
    case.report(1, "A").role_epoch = 0;
    case.bed.down(2);
    assert_eq!(case.after(MINUTE_MS).plan(), [""; 0], "its owner goes on, whatever became of the target");
    assert_eq!(case.after(MINUTE_MS).plan(), ["A -> n3"]);
    assert_eq!(case.bed.member("A", 1), (1, MemberState::FencePending));
}

#[test]
fn a_node_that_joins_gets_its_share_one_at_a_time() {
    let mut case = Case::new(2, &["A", "B", "C", "D"]);
    case.bed.down(2);
    for name in ["A", "B", "C", "D"] {
        case.volume(name, 1);
    }
    case.after(10 * MINUTE_MS).bed.up(2);
    case.report(2, "A");
    assert_eq!(case.after(29_999).plan(), [""; 0], "not at once");
    assert_eq!(case.after(1).plan(), ["A moves to n2"]);
    let epoch = case.bed.db.volumes["A"].epoch;
    case.bed.ok(Command::VolumeReleased { name: "A".into(), epoch, node: n(1) });
    case.bed.online("A", &[]);
    case.report(2, "A").role_epoch = 2;
    assert_eq!(case.plan(), [""; 0]);
    assert_eq!(case.after(30_000).plan(), ["B moves to n2"]);
}

#[test]
fn rebalancing_respects_preference_the_administrator_and_its_switch() {
    let mut case = Case::new(2, &["A", "B"]);
    case.bed.down(2);
    case.bed.add_volume("A", &[2]);
    case.bed.add_volume("B", &[1]);
    for name in ["A", "B"] {
        case.bed.assign(name, 1);
        case.bed.online(name, &[]);
        case.report(1, name).role_epoch = 1;
    }
    case.after(MINUTE_MS).bed.up(2);
    case.report(2, "A");
    case.bed.setting("rebalance", "off");
    assert_eq!(case.after(MINUTE_MS).plan(), [""; 0]);
    case.bed.setting("rebalance", "on-join");
    assert_eq!(case.plan(), ["A moves to n2"]);
    let epoch = case.bed.db.volumes["A"].epoch;
    case.bed.ok(Command::VolumeReleased { name: "A".into(), epoch, node: n(1) });
    case.bed.online("A", &[]);
    case.report(2, "A").role_epoch = 2;
    // The administrator moves it back, against preference and balance: it stays there.
    let to = Some(n(1));
    case.bed.ok(Command::VolumeRelease {
        name: "A".into(),
        epoch: csv_types::Epoch(2),
        to,
        reason: "x".into(),
    });
    case.bed.ok(Command::VolumeReleased { name: "A".into(), epoch: csv_types::Epoch(2), node: n(2) });
    case.bed.online("A", &[(2, 1)]);
    case.report(1, "A").role_epoch = 3;
    assert_eq!(case.after(60 * MINUTE_MS).plan(), [""; 0]);
}

#[test]
fn what_nobody_wants_online_is_closed() {
    let mut case = Case::new(2, &["A", "B"]);
    case.bed.add_volume("A", &[]);
    case.volume("B", 2);
    assert_eq!(case.plan(), ["A -> n1"]);
    for name in ["A", "B"] {
        case.bed.ok(Command::VolumeOffline { name: name.into(), reason: "maintenance".into() });
    }
    assert_eq!(case.plan(), [""; 0], "a start ends first");
    case.bed.online("A", &[]);
    assert_eq!(case.plan(), ["A closes"]);
    case.bed.down(2);
    assert_eq!(case.plan(), ["B: it was taken offline, and its owner is gone"]);
}
