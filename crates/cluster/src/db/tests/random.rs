//! Random histories: late, doubled and reordered commands of every kind that matters for safety, on a small cluster.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const NAMES: [&str; 2] = ["V", "W"];

/// What a command is made from. Numbers are small, so that stale and fitting ones both come often. `back` and `generation` count
/// down from what the database has: 0 is the present one.
#[derive(Debug, Clone)]
struct Spec {
    kind: u8,
    nodes: (u32, u32),
    back: u64,
    generation: u32,
    volume: usize,
    flag: bool,
}

fn spec() -> impl Strategy<Value = Spec> {
    let parts = (0..23u8, (1..5u32, 1..5u32), 0..3u64, 0..3u32, 0..2usize, any::<bool>());
    parts.prop_map(|(kind, nodes, back, generation, volume, flag)| Spec {
        kind,
        nodes,
        back,
        generation,
        volume,
        flag,
    })
}

fn make(db: &ClusterDb, spec: &Spec) -> Command {
    let Spec { kind, nodes: (a, b), back, generation, volume, flag } = *spec;
    let (a, b, volume) = (n(a), n(b), NAMES[volume]);
    let known = db.volumes.get(volume);
    let epoch = Epoch(known.map_or(0, |volume| volume.epoch.0).saturating_sub(back));
    let current = db.nodes.get(&a).map_or(0, |node| node.incarnation);
    let incarnation = (current + u64::from(flag)).saturating_sub(back / 2);
    let generation = known
        .and_then(|volume| volume.members.get(&a))
        .map_or(0, |member| member.generation)
        .saturating_sub(generation / 2);
    let owner = known.and_then(|volume| volume.owner).filter(|_| back < 2).unwrap_or(a);
    let fenced = known.map(|volume| volume.to_fence()).filter(|_| flag).unwrap_or_default();
    let (name, reason) = (volume.to_owned(), "r".to_owned());
    match kind {
        0 => Command::NodeUp { node: a, incarnation },
        1 => Command::NodeDown { node: a, incarnation, reason, planned: flag },
        2 => Command::NodeIsolated { node: a, incarnation, reason },
        3 => Command::NodePause { node: a, drain: flag },
        4 => Command::NodeResume { node: a },
        5 => Command::NodeEvict { node: a },
        6 => Command::NodeAdd { node: new_node(a.0), token_sha256: token(), expect_id: None },
        7 | 8 => Command::VolumeAssign { name, from_epoch: epoch, to: b, reason },
        9 | 10 => Command::VolumeOnline { name, epoch, node: owner, fenced },
        11 => Command::VolumeFenced { name, epoch, fenced: vec![(a, generation)] },
        12 => Command::VolumeFence { name, epoch, node: a, generation, reason },
        13 => Command::VolumeAdmit { name, node: a, incarnation, from_generation: generation },
        14 => Command::VolumeRelease { name, epoch, to: flag.then_some(b), reason },
        15 => Command::VolumeReleased { name, epoch, node: owner },
        16 => Command::VolumeReleaseCancelled { name, epoch, node: owner, reason },
        17 => Command::VolumeStartFailed { name, epoch, node: owner, why: reason },
        18 if flag => Command::VolumeOffline { name, reason },
        18 => Command::VolumeBringOnline { name },
        19 if flag => Command::VolumeRemove { name },
        19 => Command::VolumeFail { name, from_epoch: epoch, reason },
        20 if flag => Command::VolumeWithdraw { name, node: a, incarnation, generation },
        20 => Command::VolumeUnowned { name, from_epoch: epoch, reason },
        // Seldom: it ends all that was begun.
        21 if flag && back == 0 && volume == "V" => Command::ForceStart { node: a },
        _ => Command::VolumeAdd {
            name,
            id: VolumeId(Uuid::from_u128(volume.len() as u128 + u128::from(volume.as_bytes()[0]))),
            fs: "xfs".into(),
            preferred: Vec::new(),
            label_epoch: Epoch(back),
        },
    }
}

/// What must hold between one state and the next.
fn check_step(before: &ClusterDb, after: &ClusterDb, owners: &mut BTreeMap<(String, u64), NodeId>) {
    assert!(after.next_node_id >= before.next_node_id && after.events.next >= before.events.next);
    for (name, volume) in &after.volumes {
        if let Some(last) = before.volumes.get(name) {
            assert!(volume.epoch >= last.epoch, "epoch of {name} went down");
            check_members(last, volume);
            // An owner that keeps what it was to release had it all the time.
            let started = matches!(last.state, VolumeState::Starting { .. });
            let came_online = volume.state == VolumeState::Online && started;
            assert!(!came_online || volume.to_fence().is_empty(), "{name} online before its fences");
        } else {
            assert!(volume.epoch.0 >= before.epoch_floor);
        }
        if let Some(owner) = volume.owner {
            let first = owners.entry((name.clone(), volume.epoch.0)).or_insert(owner);
            assert_eq!(*first, owner, "two owners of {name} in epoch {}", volume.epoch);
        }
    }
}

/// A member may write again only under a new generation; one that could write is never just forgotten.
fn check_members(last: &Volume, volume: &Volume) {
    for (node, member) in &volume.members {
        let Some(old) = last.members.get(node) else { continue };
        assert!(member.generation >= old.generation, "generation of {node} went down");
        if member.generation == old.generation {
            let rank = |state: MemberState| match state {
                MemberState::Admitted => 0,
                MemberState::FencePending => 1,
                MemberState::Fenced => 2,
            };
            assert!(rank(member.state) >= rank(old.state), "{node} came back under its old key");
        }
    }
    for (node, old) in &last.members {
        let gone = !volume.members.contains_key(node);
        assert!(!gone || old.state != MemberState::Admitted, "{node} could write and was forgotten");
    }
    // Somebody else takes the volume over unreleased: the last owner must be on its way out.
    let took_over = last.owner.is_some() && volume.owner.is_some() && last.owner != volume.owner;
    if took_over && !matches!(last.state, VolumeState::Releasing { .. }) {
        let old = last.owner.and_then(|owner| volume.members.get(&owner));
        assert!(old.is_none_or(|member| member.state != MemberState::Admitted), "not fenced: {volume:?}");
    }
}

/// Is it about an epoch that the volume has not got?
fn stale(db: &ClusterDb, command: &Command) -> bool {
    let json = serde_json::to_value(command).unwrap();
    let fields = json.as_object().unwrap().values().next().unwrap();
    let epoch = fields.get("epoch").or(fields.get("from_epoch")).and_then(|epoch| epoch.as_u64());
    let volume = fields.get("name").and_then(|name| db.volumes.get(name.as_str().unwrap()));
    volume.zip(epoch).is_some_and(|(volume, epoch)| volume.epoch != Epoch(epoch))
}

proptest! {
    #![proptest_config(crate::db::tests::cases(400))]

    #[test]
    fn random_commands_keep_the_invariants(
        commands in prop::collection::vec((spec(), 0..20_000u64, 0..8u8), 1..120),
    ) {
        let mut bed = Bed::nodes(3);
        for name in NAMES {
            bed.volume(name, 1);
        }
        bed.setting("quarantine_failures", "4");
        let mut owners = BTreeMap::new();
        let mut sent: Vec<Command> = Vec::new();
        for (spec, pause_ms, replay) in commands {
            bed.now += pause_ms;
            // Now and then an old command comes again.
            let command = match (replay, sent.len()) {
                (0, count) if count > 0 => sent[count / 2].clone(),
                _ => make(&bed.db, &spec),
            };
            sent.push(command.clone());
            let before = bed.db.clone();
            // `Bed::apply` checks the invariants of the state, and that a refusal changes nothing.
            let stale = stale(&bed.db, &command);
            let answer = bed.apply(command);
            prop_assert!(!stale || answer.is_err(), "stale and taken");
            check_step(&before, &bed.db, &mut owners);
        }
        let bytes = bed.db.encode_snapshot();
        prop_assert_eq!(ClusterDb::decode_snapshot(&bytes).unwrap(), bed.db);
    }
}
