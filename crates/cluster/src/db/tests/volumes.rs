use super::*;

fn released(bed: &Bed, node: u32) -> Command {
    Command::VolumeReleased { name: "V".into(), epoch: bed.db.volumes["V"].epoch, node: n(node) }
}

fn release(bed: &Bed, to: u32) -> Command {
    let epoch = bed.db.volumes["V"].epoch;
    Command::VolumeRelease { name: "V".into(), epoch, to: Some(n(to)), reason: "moved".into() }
}

#[test]
fn a_volume_comes_online_and_its_owner_has_a_key() {
    let mut bed = Bed::nodes(2);
    bed.add_volume("V", &[2]);
    assert_eq!(bed.ok(bed.assign_command("V", 2)), Applied::Epoch(Epoch(1)));
    let volume = &bed.db.volumes["V"];
    assert_eq!((volume.owner, volume.state.to_string().as_str()), (Some(n(2)), "Starting"));
    assert_eq!(bed.db.key_of(volume, n(2)), Some(reservation_key(bed.db.id, n(2), 1)));
    assert_eq!(bed.db.key_of(volume, n(1)), None);
    bed.online("V", &[]);
    assert_eq!(bed.ok(bed.online_command("V", &[])), Applied::Unchanged);
    let codes = bed.events(bed.last_event() - 2);
    assert_eq!(codes, [EventKind::VolumeAssigned.id(), EventKind::VolumeOnline.id()]);
}

#[test]
fn fail_over_waits_for_the_fence() {
    let mut bed = Bed::nodes(3);
    bed.volume("V", 1);
    bed.admit("V", 3);
    bed.down(1);
    bed.assign("V", 2);
    assert_eq!(bed.member("V", 3), (1, MemberState::Admitted), "direct I/O of the others goes on");
    bed.refused(bed.online_command("V", &[]), "n1 (generation 1) is still to be fenced");
    bed.refused(bed.online_command("V", &[(1, 2)]), "generation 1");
    bed.online("V", &[(1, 1)]);
    assert_eq!(bed.member("V", 1), (1, MemberState::Fenced));
    assert_eq!(bed.db.volumes["V"].epoch, Epoch(2));
}

#[test]
fn commands_of_an_old_epoch_are_refused() {
    let mut bed = Bed::nodes(3);
    bed.volume("V", 1);
    let (late_assign, late_release) = (bed.assign_command("V", 3), release(&bed, 2));
    let mut late_online = bed.online_command("V", &[]);
    bed.ok(late_release.clone());
    assert_eq!(bed.ok(late_release.clone()), Applied::Unchanged);
    bed.ok(released(&bed, 1));
    for late in [late_assign, late_release, late_online.clone()] {
        bed.refused(late, "stale: this is about epoch 1 of volume V, which is at 2");
    }
    if let Command::VolumeOnline { epoch, .. } = &mut late_online {
        *epoch = Epoch(2);
    }
    bed.refused(late_online, "n1 does not own volume V: n2 does");
}

#[test]
fn a_planned_move_fences_nobody() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 1);
    bed.ok(release(&bed, 2));
    bed.refused(released(&bed, 2), "n2 does not own");
    let doubled = released(&bed, 1);
    assert_eq!(bed.ok(doubled.clone()), Applied::Epoch(Epoch(2)));
    bed.refused(doubled, "stale");
    assert_eq!(bed.member("V", 1), (1, MemberState::Admitted));
    bed.online("V", &[]);
}

#[test]
fn a_move_whose_target_is_gone_leaves_the_volume_to_the_manager() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 1);
    bed.ok(release(&bed, 2));
    bed.down(2);
    bed.ok(released(&bed, 1));
    let volume = &bed.db.volumes["V"];
    assert_eq!(volume.owner, None);
    assert!(volume.state.reason().contains("n2 is Down"), "{}", volume.state.reason());
    bed.assign("V", 1);
    assert_eq!(bed.db.volumes["V"].epoch, Epoch(2));
}

#[test]
fn an_owner_can_keep_what_it_was_to_release() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 1);
    let epoch = Epoch(1);
    let cancel = |node| Command::VolumeReleaseCancelled {
        name: "V".into(),
        epoch,
        node: n(node),
        reason: "the drain took too long".into(),
    };
    assert_eq!(bed.ok(cancel(1)), Applied::Unchanged);
    bed.ok(release(&bed, 2));
    bed.refused(cancel(2), "does not own");
    bed.ok(cancel(1));
    assert_eq!(bed.db.volumes["V"].state, VolumeState::Online);
    bed.ok(release(&bed, 2));
    bed.down(1);
    bed.refused(cancel(1), "given up");
}

#[test]
fn volumes_go_only_to_nodes_that_take_them() {
    let mut bed = Bed::nodes(4);
    bed.volume("V", 1);
    bed.ok(Command::NodePause { node: n(2), drain: false });
    bed.down(3);
    bed.ok(Command::NodeLeave { node: n(4), incarnation: 1 });
    for (to, word) in [(2, "Paused"), (3, "Down"), (4, "Draining"), (9, "no node number 9")] {
        bed.refused(bed.assign_command("V", to), word);
        bed.refused(release(&bed, to), word);
    }
    bed.refused(release(&bed, 1), "n1 owns it already");
}

#[test]
fn a_node_that_is_to_be_fenced_gets_nothing_before() {
    let mut bed = Bed::nodes(3);
    bed.volume("V", 1);
    bed.assign("V", 2);
    assert_eq!(bed.member("V", 1), (1, MemberState::FencePending), "it was not released");
    let admit = |generation| Command::VolumeAdmit {
        name: "V".into(),
        node: n(1),
        incarnation: 1,
        from_generation: generation,
    };
    bed.refused(admit(1), "is still to be fenced");
    bed.refused(bed.assign_command("V", 1), "is still to be fenced");
    bed.online("V", &[(1, 1)]);
    bed.refused(admit(0), "stale");
    let key = reservation_key(bed.db.id, n(1), 2);
    assert_eq!(bed.ok(admit(1)), Applied::Member { generation: 2, key });
    bed.refused(admit(1), "generation 1 of n1 on volume V, which is at 2");
}

#[test]
fn the_owner_has_a_node_fenced_that_does_not_return_layouts() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 1);
    bed.admit("V", 2);
    let epoch = Epoch(1);
    let fence = |node, generation, epoch| Command::VolumeFence {
        name: "V".into(),
        epoch,
        node: n(node),
        generation,
        reason: "a layout was not returned".into(),
    };
    bed.refused(fence(2, 1, Epoch(0)), "stale");
    bed.refused(fence(2, 3, epoch), "generation 3");
    bed.refused(fence(1, 1, epoch), "other nodes");
    bed.ok(fence(2, 1, epoch));
    assert_eq!(bed.ok(fence(2, 1, epoch)), Applied::Unchanged);
    let keys =
        [(1, 1), (2, 1), (2, 2)].map(|(node, generation)| reservation_key(bed.db.id, n(node), generation));
    let foreign = reservation_key(Uuid::from_u128(8), n(2), 1);
    let stale = bed.db.stale_keys(&bed.db.volumes["V"], &[keys[0], keys[1], keys[2], foreign]);
    assert_eq!(stale, [keys[1]], "not ours, not newer than what is known");
    let fenced = Command::VolumeFenced { name: "V".into(), epoch, fenced: vec![(n(2), 1), (n(1), 1)] };
    bed.ok(fenced.clone());
    assert_eq!(bed.ok(fenced), Applied::Unchanged);
    assert_eq!(bed.member("V", 1), (1, MemberState::Admitted), "nobody decided that");
    assert_eq!(bed.member("V", 2), (1, MemberState::Fenced));
}

#[test]
fn a_node_down_is_fenced_from_every_volume() {
    let mut bed = Bed::nodes(3);
    bed.volume("V", 1);
    bed.volume("W", 2);
    bed.admit("V", 2);
    let admit_of_the_dead =
        Command::VolumeAdmit { name: "V".into(), node: n(3), incarnation: 1, from_generation: 0 };
    bed.down(3);
    bed.refused(admit_of_the_dead, "Down");
    bed.down(2);
    for name in ["V", "W"] {
        assert_eq!(bed.member(name, 2), (1, MemberState::FencePending));
    }
    bed.up(2);
    let late = Command::VolumeAdmit { name: "V".into(), node: n(2), incarnation: 1, from_generation: 1 };
    bed.refused(late, "stale");
    assert_eq!(bed.member("V", 2), (1, MemberState::FencePending), "its owner fences it all the same");
}

#[test]
fn a_node_withdraws_by_itself_when_its_io_is_over() {
    let mut bed = Bed::nodes(3);
    bed.volume("V", 1);
    bed.admit("V", 2);
    let withdraw = |node, incarnation, generation| Command::VolumeWithdraw {
        name: "V".into(),
        node: n(node),
        incarnation,
        generation,
    };
    bed.refused(withdraw(1, 1, 1), "release it first");
    bed.refused(withdraw(2, 1, 2), "generation 2");
    bed.refused(withdraw(2, 2, 1), "incarnation 2");
    bed.ok(withdraw(2, 1, 1));
    assert_eq!(bed.ok(withdraw(2, 1, 1)), Applied::Unchanged);
    bed.admit("V", 2);
    bed.assign("V", 2);
    assert_eq!(bed.member("V", 2), (2, MemberState::Admitted));
    bed.refused(withdraw(2, 1, 1), "generation 1");
    bed.ok(withdraw(1, 1, 1));
    bed.online("V", &[]);
}

/// n1 lost the volume and was fenced before it knew; what its csvfs has under way must not get a new key.
#[test]
fn who_was_fenced_gets_no_volume_before_it_has_asked_for_a_new_key() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 1);
    bed.admit("V", 2);
    bed.assign("V", 2);
    bed.online("V", &[(1, 1)]);
    let why = "n1 is Up: it was fenced from volume V and has not asked to be admitted again";
    bed.refused(bed.assign_command("V", 1), why);
    bed.refused(release(&bed, 1), why);
    assert_eq!(bed.member("V", 1), (1, MemberState::Fenced));
    bed.admit("V", 1);
    bed.ok(release(&bed, 1));
    bed.ok(released(&bed, 2));
    assert_eq!(bed.member("V", 1), (2, MemberState::Admitted), "it keeps what it asked for");
}

#[test]
fn all_nodes_can_come_back_after_a_power_cut() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 1);
    bed.admit("V", 2);
    for node in [1, 2] {
        bed.down(node);
    }
    for node in [1, 2] {
        bed.up(node);
    }
    bed.assign("V", 2);
    assert_eq!(bed.member("V", 2), (2, MemberState::Admitted));
    bed.refused(bed.online_command("V", &[]), "n1");
    bed.online("V", &[(1, 1)]);
}

#[test]
fn failed_starts_are_counted_until_it_is_online() {
    let mut bed = Bed::nodes(2);
    bed.add_volume("V", &[]);
    bed.assign("V", 1);
    let failed = |epoch| Command::VolumeStartFailed {
        name: "V".into(),
        epoch: Epoch(epoch),
        node: n(1),
        why: "mount: bad superblock".into(),
    };
    bed.ok(failed(1));
    bed.refused(failed(1), "nobody does");
    assert_eq!(bed.db.volumes["V"].failures_on(n(1)), 1);
    bed.assign("V", 1);
    bed.assign("V", 2);
    let volume = &bed.db.volumes["V"];
    assert_eq!((volume.failures_on(n(1)), volume.epoch), (2, Epoch(3)), "taken away while it started");
    bed.online("V", &[(1, 1)]);
    assert!(bed.db.volumes["V"].failures.is_empty());
    bed.refused(failed(3), "n1 does not own volume V: n2 does");
}

#[test]
fn failed_waits_for_the_administrator() {
    let mut bed = Bed::nodes(1);
    bed.add_volume("V", &[]);
    let fail = Command::VolumeFail { name: "V".into(), from_epoch: Epoch(0), reason: "no luck".into() };
    bed.ok(fail.clone());
    assert_eq!(bed.ok(fail.clone()), Applied::Unchanged);
    bed.refused(bed.assign_command("V", 1), "csvctl volume online V");
    bed.ok(Command::VolumeBringOnline { name: "V".into() });
    bed.assign("V", 1);
    bed.refused(fail, "stale");
}

#[test]
fn offline_is_a_release_to_nobody_and_stays() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 1);
    let to_nobody =
        Command::VolumeRelease { name: "V".into(), epoch: Epoch(1), to: None, reason: "x".into() };
    bed.refused(to_nobody, "wanted online");
    bed.refused(Command::VolumeRemove { name: "V".into() }, "csvctl volume offline V");
    bed.ok(Command::VolumeOffline { name: "V".into(), reason: "maintenance".into() });
    bed.ok(released(&bed, 1));
    assert_eq!(bed.db.volumes["V"].state, VolumeState::Offline { reason: "maintenance".into() });
    bed.refused(bed.assign_command("V", 1), "stay offline");
    bed.ok(Command::VolumeBringOnline { name: "V".into() });
    bed.assign("V", 2);
    bed.ok(Command::VolumeOffline { name: "V".into(), reason: "again".into() });
    assert_eq!(bed.db.volumes["V"].state.to_string(), "Starting", "a start ends first");
    bed.online("V", &[]);
    let epoch = bed.db.volumes["V"].epoch;
    bed.ok(Command::VolumeRelease { name: "V".into(), epoch, to: None, reason: "again".into() });
    bed.ok(released(&bed, 2));
    assert!(!bed.db.volumes["V"].state.owned());
}

#[test]
fn epochs_and_keys_outlive_a_volume() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 1);
    bed.admit("V", 2);
    bed.ok(Command::VolumeOffline { name: "V".into(), reason: "gone".into() });
    bed.ok(released(&bed, 1));
    bed.down(2);
    bed.refused(Command::VolumeRemove { name: "V".into() }, "n2 (generation 1) is still to be fenced");
    let fenced = Command::VolumeFenced { name: "V".into(), epoch: Epoch(1), fenced: vec![(n(2), 1)] };
    bed.refused(fenced, "only an owner fences");
    bed.ok(Command::VolumeBringOnline { name: "V".into() });
    bed.assign("V", 1);
    bed.online("V", &[(2, 1)]);
    bed.ok(Command::VolumeOffline { name: "V".into(), reason: "gone".into() });
    bed.ok(released(&bed, 1));
    bed.ok(Command::VolumeRemove { name: "V".into() });
    bed.volume("V", 1);
    assert_eq!(bed.db.volumes["V"].epoch, Epoch(3));
    assert_eq!(bed.member("V", 1), (2, MemberState::Admitted));
}

#[test]
fn a_volume_without_candidates_loses_its_owner_once() {
    let mut bed = Bed::nodes(1);
    bed.volume("V", 1);
    bed.down(1);
    let unowned = |reason: &str| Command::VolumeUnowned {
        name: "V".into(),
        from_epoch: Epoch(1),
        reason: reason.into(),
    };
    bed.ok(unowned("n1 is down"));
    assert_eq!(bed.ok(unowned("n1 is down")), Applied::Unchanged);
    bed.ok(unowned("n1 has no path"));
    bed.up(1);
    bed.assign("V", 1);
    bed.refused(unowned("n1 is down"), "stale");
}

#[test]
fn bad_volumes_are_refused() {
    let mut bed = Bed::nodes(1);
    bed.volume("V", 1);
    let add = |name: &str, id: u128, fs: &str, preferred: &[u32]| Command::VolumeAdd {
        name: name.into(),
        id: VolumeId(Uuid::from_u128(id)),
        fs: fs.into(),
        preferred: preferred.iter().copied().map(NodeId).collect(),
        label_epoch: Epoch(7),
    };
    bed.refused(add("V", 1, "ext4", &[]), "choose another name");
    bed.refused(add("a/b", 1, "ext4", &[]), "cannot be used");
    bed.refused(add("W", 1, "btrfs", &[]), "ext4, xfs");
    bed.refused(add("W", 1, "xfs", &[5]), "no node number 5");
    bed.refused(add("W", 1, "xfs", &[1, 1]), "stands twice");
    let same = bed.db.volumes["V"].id.0.as_u128();
    bed.refused(add("W", same, "xfs", &[]), "as V: a LUN can be one volume only");
    bed.ok(add("W", 1, "xfs", &[1]));
    bed.assign("W", 1);
    assert_eq!(bed.db.volumes["W"].epoch, Epoch(8), "above what its label says");
    bed.refused(Command::VolumePreferred { name: "W".into(), preferred: vec![n(3)] }, "no node number 3");
}
