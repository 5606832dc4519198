use super::*;

fn replace(old: u32, number: u32, expect: u32) -> Command {
    let node = NewNode { name: format!("n{number}"), ..new_node(number) };
    Command::NodeReplace { old: n(old), node, token_sha256: token(), expect_id: n(expect) }
}

#[test]
fn a_node_without_its_database_takes_its_own_place_when_it_is_down() {
    let mut bed = Bed::nodes(3);
    bed.volume("V", 1);
    bed.ok(Command::VolumePreferred { name: "V".into(), preferred: vec![n(2), n(3)] });
    bed.ok(Command::VolumeAdmit { name: "V".into(), node: n(3), incarnation: 1, from_generation: 0 });
    bed.refused(replace(3, 3, 4), "n3 is Up");
    bed.down(3);
    bed.refused(replace(3, 2, 4), "cannot take the place");
    bed.refused(replace(3, 3, 9), "try again");
    let Command::NodeReplace { old, node, expect_id, .. } = replace(3, 3, 4) else { unreachable!() };
    let wrong = Command::NodeReplace { old, node, token_sha256: "00".repeat(32), expect_id };
    bed.refused(wrong, "not known");
    assert!(bed.db.nodes.contains_key(&n(3)));
    assert_eq!(bed.ok(replace(3, 3, 4)), Applied::Node(n(4)));
    bed.db.check().unwrap();
    assert!(!bed.db.nodes.contains_key(&n(3)));
    let volume = &bed.db.volumes["V"];
    assert_eq!(volume.preferred, [n(2), n(4)]);
    assert_eq!(volume.members[&n(3)].state, MemberState::FencePending, "its old key must still go");
    bed.ok(Command::NodeUp { node: n(4), incarnation: 1 });
}

#[test]
fn a_restored_cluster_has_one_node_and_goes_on_above_all_numbers_of_the_former() {
    let mut bed = Bed::nodes(3);
    bed.volume("V", 1);
    bed.ok(Command::VolumeAdmit { name: "V".into(), node: n(3), incarnation: 1, from_generation: 0 });
    bed.ok(Command::Setting { key: "heartbeat_ms".into(), value: "500".into() });
    let backup = bed.db.encode_snapshot();
    let before = bed.db.clone();
    // What happens after the backup, and is not in it.
    bed.ok(Command::NodeAdd { node: new_node(4), token_sha256: token(), expect_id: None });
    bed.ok(Command::NodeUp { node: n(4), incarnation: 1 });
    bed.ok(Command::VolumeAdmit { name: "V".into(), node: n(4), incarnation: 1, from_generation: 0 });
    bed.down(1);
    bed.assign("V", 2);
    let mut db = ClusterDb::decode_snapshot(&backup).unwrap();
    let me = NewNode { addr: addr(77), cert_sha256: "ef".repeat(32), ..new_node(2) };
    assert_eq!(db.restore_on(bed.now, &me).unwrap(), n(2));
    db.check().unwrap();
    let restored = ClusterDb::decode_snapshot(&db.encode_snapshot()).unwrap();
    assert_eq!(restored, db);
    assert_eq!(db.nodes.keys().copied().collect::<Vec<_>>(), [n(2)]);
    assert_eq!((db.nodes[&n(2)].addr, db.nodes[&n(2)].state), (addr(77), NodeState::Down));
    assert_eq!((&db.secrets, db.id, db.settings.heartbeat_ms), (&before.secrets, before.id, 500));
    assert!(db.tokens.is_empty());
    assert_eq!(db.events.ring.back().unwrap().id, EventKind::Restored.id());
    let (volume, former) = (&db.volumes["V"], &bed.db.volumes["V"]);
    assert!(volume.epoch > former.epoch && volume.owner.is_none());
    // Every key of the former cluster, also of the node that the backup does not know, is one that must go.
    let keys: Vec<u64> = former
        .members
        .iter()
        .map(|(node, member)| reservation_key(db.id, *node, member.generation))
        .collect();
    assert_eq!(keys.len(), 4);
    assert_eq!(db.stale_keys(volume, &keys), keys);
    assert!(db.next_node_id > bed.db.next_node_id, "numbers of the former cluster are past");
    // And it works.
    let mut bed = Bed { db, now: bed.now };
    bed.ok(Command::NodeUp { node: n(2), incarnation: 2 });
    bed.assign("V", 2);
    let pending = bed.db.volumes["V"].to_fence();
    let pending: Vec<(u32, u32)> = pending.iter().map(|(node, generation)| (node.0, *generation)).collect();
    assert!(pending.iter().any(|(node, _)| *node == 4));
    bed.online("V", &pending);
    assert!(bed.db.key_of(&bed.db.volumes["V"], n(2)).is_some_and(|key| !keys.contains(&key)));
}

#[test]
fn a_forced_start_fences_what_it_has_not_heard_of_and_goes_on_above_it() {
    let mut bed = Bed::nodes(3);
    bed.volume("V", 1);
    for node in [2, 3] {
        bed.ok(Command::VolumeAdmit { name: "V".into(), node: n(node), incarnation: 1, from_generation: 0 });
    }
    bed.ok(Command::VolumePreferred { name: "V".into(), preferred: vec![n(3)] });
    let mut forced = Bed { db: bed.db.clone(), now: bed.now };
    // What the others decide without n3: a new key for each, a fourth node, and an epoch.
    bed.down(1);
    bed.assign("V", 2);
    bed.ok(Command::NodeUp { node: n(1), incarnation: 2 });
    bed.ok(Command::VolumeAdmit { name: "V".into(), node: n(1), incarnation: 2, from_generation: 1 });
    bed.ok(Command::NodeAdd { node: new_node(4), token_sha256: token(), expect_id: None });
    bed.ok(Command::NodeUp { node: n(4), incarnation: 1 });
    bed.ok(Command::VolumeAdmit { name: "V".into(), node: n(4), incarnation: 1, from_generation: 0 });
    let key = |(node, member): (&NodeId, &Member)| reservation_key(bed.db.id, *node, member.generation);
    let keys: Vec<u64> = bed.db.volumes["V"].members.iter().map(key).collect();
    assert!(forced.db.stale_keys(&forced.db.volumes["V"], &keys).is_empty(), "it knows nothing of them");

    forced.ok(Command::ForceStart { node: n(3) });
    forced.db.check().unwrap();
    let volume = &forced.db.volumes["V"];
    assert_eq!(forced.db.stale_keys(volume, &keys), keys);
    assert!(volume.epoch > bed.db.volumes["V"].epoch && volume.owner.is_none());
    assert!(forced.db.next_node_id > bed.db.next_node_id);
    assert_eq!((forced.db.nodes.len(), volume.preferred.clone()), (3, vec![n(3)]));
    assert_eq!(forced.db.events.ring.back().unwrap().id, EventKind::QuorumForced.id());
    // The node's own csvfs of before may have something under way.
    forced.refused(Command::NodeUp { node: n(3), incarnation: 1 }, "incarnation");
    forced.ok(Command::NodeUp { node: n(3), incarnation: 2 });
    forced.assign("V", 3);
    let pending = forced.db.volumes["V"].to_fence();
    let pending: Vec<(u32, u32)> = pending.iter().map(|(node, generation)| (node.0, *generation)).collect();
    assert!([1, 2, 4].iter().all(|node| pending.iter().any(|(pending, _)| pending == node)));
    forced.refused(
        Command::VolumeOnline {
            name: "V".into(),
            epoch: forced.db.volumes["V"].epoch,
            node: n(3),
            fenced: vec![],
        },
        "fence",
    );
    forced.online("V", &pending);
    // Another node comes back with nothing under way.
    forced.ok(Command::NodeUp { node: n(2), incarnation: 2 });
    let floor = forced.db.generation_floor;
    forced.ok(Command::VolumeAdmit { name: "V".into(), node: n(2), incarnation: 2, from_generation: floor });
    // A start that is interrupted is carried out twice.
    let before = forced.db.clone();
    forced.ok(Command::ForceStart { node: n(3) });
    assert!(forced.db.generation_floor > before.generation_floor);
    forced.refused(Command::ForceStart { node: n(9) }, "no node number");
}

#[test]
fn a_restore_is_refused_with_the_reason_and_changes_nothing() {
    let bed = Bed::nodes(2);
    let refused = |db: &ClusterDb, node: &NewNode, words: &str| {
        let mut changed = db.clone();
        let text = changed.restore_on(bed.now, node).unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
        assert_eq!(changed, *db);
    };
    refused(&bed.db, &new_node(7), "its nodes are n1, n2");
    refused(&ClusterDb::default(), &new_node(1), "no cluster");
    let mut newer = bed.db.clone();
    newer.feature_level = FEATURE_LEVEL + 1;
    refused(&newer, &new_node(1), "wrong version");
    let mut worn = bed.db.clone();
    worn.generation_floor = key::GENERATION_MAX - 1;
    refused(&worn, &new_node(1), "restores");
}
