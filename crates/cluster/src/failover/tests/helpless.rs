//! Owners that can neither serve nor fence.

use super::*;

/// n1 did not start A within its time and woke up again; n2 got it, is to fence n1, and cannot.
fn only_the_fenced_could(state: &str, trouble: fn(&mut VolumeReport)) -> Case {
    let mut case = Case::new(2, &["A"]);
    case.bed.add_volume("A", &[]);
    assert_eq!(case.plan(), ["A -> n1"], "{state}");
    assert_eq!(case.after(MINUTE_MS).plan(), ["A -> n2"], "{state}");
    assert_eq!(case.bed.member("A", 1), (1, MemberState::FencePending));
    assert_eq!(case.plan(), [""; 0], "n2 is about to fence n1");
    if state != "Starting" {
        let owner = case.bed.db.volumes["A"].epoch;
        case.bed.online("A", &[(1, 1)]);
        case.report(2, "A").role_epoch = owner.0;
        case.bed.admit("A", 1);
        let (name, reason) = ("A".into(), "n1 does not answer".into());
        case.bed.ok(Command::VolumeFence { name, epoch: owner, node: n(1), generation: 2, reason });
    }
    if state == "Releasing" {
        case.bed.ok(Command::VolumeOffline { name: "A".into(), reason: "test".into() });
        case.bed.ok(Command::VolumeBringOnline { name: "A".into() });
    }
    assert_eq!(case.bed.db.volumes["A"].state.to_string(), state);
    trouble(case.report(2, "A"));
    case
}

/// n1 withdraws, since nobody owns the volume, and gets it.
fn the_fenced_gets_it(case: &mut Case) {
    let (generation, state) = case.bed.member("A", 1);
    assert_eq!((state, case.bed.db.volumes["A"].owner), (MemberState::FencePending, None));
    assert_eq!(
        case.bed.member("A", 2),
        (1, MemberState::FencePending),
        "n1 has to fence it before it mounts"
    );
    case.bed.ok(Command::VolumeWithdraw { name: "A".into(), node: n(1), incarnation: 1, generation });
    assert_eq!(case.plan().len(), 1, "said why it waits");
    case.bed.admit("A", 1);
    assert_eq!(case.after(1_000).plan(), ["A -> n1"], "at once, or a second after a failed start");
    case.bed.refused(case.bed.online_command("A", &[]), "fence");
    case.bed.online("A", &[(2, 1)]);
}

#[test]
fn a_helpless_owner_lets_go_when_only_the_fenced_could_take_it() {
    for state in ["Starting", "Online", "Releasing"] {
        let mut case = only_the_fenced_could(state, |report| report.path = PathState::Failed);
        let why = "A: no node can own it: n1 is still to be fenced; n2 lost its path to the LUN";
        assert_eq!(case.plan(), [why], "{state}");
        the_fenced_gets_it(&mut case);
    }
    for state in ["Starting", "Online", "Releasing"] {
        let mut case = only_the_fenced_could(state, |report| report.csvfs = false);
        assert_eq!(case.after(2_999).plan(), [""; 0], "{state}: the report may be from before");
        case.after(if state == "Starting" { MINUTE_MS } else { 1 });
        let why = "A: no node can own it: n1 is still to be fenced; n2 does not run csvfs of the volume";
        assert_eq!(case.plan(), [why], "{state}");
        the_fenced_gets_it(&mut case);
    }
}

#[test]
fn an_owner_that_can_still_start_or_alone_could_is_left_alone() {
    let mut case = only_the_fenced_could("Starting", |_| ());
    assert_eq!(case.after(10 * MINUTE_MS).plan(), [""; 0], "a long check of the file system, say");
    let mut case = only_the_fenced_could("Starting", |report| report.path = PathState::Failed);
    case.report(1, "A").path = PathState::Failed;
    assert_eq!(case.after(10 * MINUTE_MS).plan(), [""; 0], "n1 would not get it either");
}

#[test]
fn an_owner_that_cannot_close_it_does_not_keep_it_from_going_offline() {
    let mut case = Case::new(1, &["A"]);
    case.bed.add_volume("A", &[]);
    assert_eq!(case.plan(), ["A -> n1"]);
    case.bed.ok(Command::VolumeOffline { name: "A".into(), reason: "test".into() });
    assert_eq!(case.after(10 * MINUTE_MS).plan(), [""; 0], "it starts, and is closed then");
    case.report(1, "A").path = PathState::Failed;
    assert_eq!(case.plan(), ["A: it was taken offline, and n1 did not get it online within 60 s"]);
    let mut case = Case::new(1, &["A"]);
    case.volume("A", 1);
    case.bed.ok(Command::VolumeOffline { name: "A".into(), reason: "test".into() });
    case.report(1, "A").path = PathState::Failed;
    assert_eq!(case.after(2 * MINUTE_MS - 1).plan(), [""; 0], "the path may come back in time");
    assert_eq!(case.after(1).plan(), ["A: it was taken offline, and n1 did not release it within 120 s"]);
}
