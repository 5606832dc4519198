//! State in, step out.

use super::*;
use crate::db::{Command, Init, NewNode, Secrets};
use csv_types::VolumeId;
use uuid::Uuid;

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const V: &str = "Volume1";

fn new_node(number: u8) -> NewNode {
    NewNode {
        name: format!("n{number}"),
        addr: [10, 0, 0, number].into(),
        feature_level: 1,
        version: "1".into(),
        cert_sha256: String::new(),
    }
}

struct Bed {
    db: ClusterDb,
    at: u64,
}

impl Bed {
    /// Two nodes that are up in incarnation 7, and a volume.
    fn new() -> Bed {
        let mut bed = Bed { db: ClusterDb::default(), at: 0 };
        let token = "ab".repeat(32);
        bed.run(Command::Init(Box::new(Init {
            name: "c".into(),
            id: Uuid::from_u128(9),
            node: new_node(1),
            secrets: Secrets::default(),
            settings: Vec::new(),
        })));
        bed.run(Command::TokenAdd { sha256: token.clone(), expires_unix_ms: 1 << 40, uses: 1 });
        bed.run(Command::NodeAdd { node: new_node(2), token_sha256: token, expect_id: None });
        for node in [N1, N2] {
            bed.run(Command::NodeUp { node, incarnation: 7 });
        }
        bed.run(Command::VolumeAdd {
            name: V.into(),
            id: VolumeId(Uuid::from_u128(5)),
            fs: "ext4".into(),
            preferred: Vec::new(),
            label_epoch: Epoch(0),
        });
        bed
    }

    fn run(&mut self, command: Command) {
        self.at += 1;
        self.db.apply(&command.by(N1, self.at)).unwrap();
    }

    /// Both nodes may write, and the first one owns the volume.
    fn online_on_first() -> Bed {
        let mut bed = Bed::new();
        bed.admit(N1);
        bed.admit(N2);
        bed.assign(N1);
        bed.online(N1);
        bed
    }

    fn admit(&mut self, node: NodeId) {
        let from_generation = self.volume().members.get(&node).map_or(0, |member| member.generation);
        self.run(Command::VolumeAdmit { name: V.into(), node, incarnation: 7, from_generation });
    }

    fn assign(&mut self, to: NodeId) {
        let from_epoch = self.volume().epoch;
        self.run(Command::VolumeAssign { name: V.into(), from_epoch, to, reason: "test".into() });
    }

    fn online(&mut self, node: NodeId) {
        let (epoch, fenced) = (self.volume().epoch, self.volume().to_fence());
        self.run(Command::VolumeOnline { name: V.into(), epoch, node, fenced });
    }

    fn volume(&self) -> &Volume {
        &self.db.volumes[V]
    }

    fn generation(&self, node: NodeId) -> u32 {
        self.volume().members[&node].generation
    }

    fn step(&self, local: &Local) -> Step {
        next_step(&self.db, self.volume(), local)
    }
}

fn local(me: NodeId) -> Local {
    Local {
        me,
        incarnation: 7,
        cut_off: None,
        path: true,
        role: Role::Nobody,
        suspended: false,
        fenced: false,
        registered: None,
        fenced_others: Vec::new(),
    }
}

#[test]
fn a_node_is_admitted_registers_and_only_then_takes_or_follows() {
    let mut bed = Bed::new();
    let (mut one, mut two) = (local(N1), local(N2));
    assert_eq!(bed.step(&one), Step::Admit { from_generation: 0 });
    bed.admit(N1);
    bed.admit(N2);
    assert_eq!(bed.step(&one), Step::Register { generation: bed.generation(N1) });
    one.registered = Some(bed.generation(N1));
    assert_eq!(bed.step(&one), Step::Wait, "nobody owns the volume yet");
    bed.assign(N1);
    let epoch = bed.volume().epoch;
    one.registered = Some(bed.generation(N1));
    assert_eq!(bed.step(&one), Step::Take { epoch, fence: vec![] });
    assert!(matches!(bed.step(&two), Step::Register { .. }));
    two.registered = Some(bed.generation(N2));
    assert_eq!(bed.step(&two), Step::Wait, "not before it is online");
    one.role = Role::Owner(epoch);
    assert_eq!(bed.step(&one), Step::TellOnline { epoch });
    bed.online(N1);
    assert_eq!(bed.step(&one), Step::Wait);
    assert_eq!(bed.step(&two), Step::Follow { epoch, owner: N1 });
    two.role = Role::Follower(epoch, N1);
    assert_eq!(bed.step(&two), Step::Wait);
    two.role = Role::Gone;
    assert_eq!(bed.step(&two), Step::Wait);
    let may = |local: &Local| may_start(&bed.db, bed.volume(), local);
    assert!(may(&two));
    two.registered = None;
    assert!(!may(&two));
    assert!(
        matches!(bed.step(&two), Step::Register { .. }),
        "nothing runs that could use an old registration"
    );
    two.role = Role::Silent;
    assert_eq!(bed.step(&two), Step::Wait);
    assert!(!may(&Local { cut_off: Some("no quorum".into()), registered: Some(1), ..two }));
}

#[test]
fn without_a_path_a_node_follows_unregistered() {
    let mut bed = Bed::new();
    bed.admit(N1);
    bed.assign(N1);
    bed.online(N1);
    let two = Local { path: false, ..local(N2) };
    assert_eq!(bed.step(&two), Step::Follow { epoch: bed.volume().epoch, owner: N1 });
}

#[test]
fn the_next_owner_fences_before_it_takes_and_the_last_stops_before_it_comes_back() {
    let mut bed = Bed::online_on_first();
    let old = bed.volume().epoch;
    let mut one = Local { role: Role::Owner(old), registered: Some(bed.generation(N1)), ..local(N1) };
    assert_eq!(bed.step(&one), Step::Wait);
    bed.run(Command::NodeDown { node: N1, incarnation: 7, reason: "silent".into(), planned: false });
    bed.assign(N2);
    let epoch = bed.volume().epoch;
    let fence = bed.volume().to_fence();
    assert_eq!(fence, [(N1, bed.generation(N1))]);
    let mut two = Local { registered: Some(bed.generation(N2)), ..local(N2) };
    assert_eq!(bed.step(&two), Step::Take { epoch, fence: fence.clone() });
    two.role = Role::Owner(epoch);
    assert_eq!(bed.step(&two), Step::Take { epoch, fence: fence.clone() }, "not before the fence");
    two.fenced_others = fence;
    assert_eq!(bed.step(&two), Step::TellOnline { epoch });

    assert!(matches!(bed.step(&one), Step::Suspend { .. }), "it is down in its incarnation");
    (one.suspended, one.role, one.registered) = (true, Role::Nobody, None);
    assert_eq!(bed.step(&one), Step::Wait);
    bed.online(N2);
    bed.run(Command::NodeUp { node: N1, incarnation: 8 });
    assert_eq!(bed.step(&one), Step::Wait, "an old incarnation does not come back");
    one.incarnation = 8;
    assert_eq!(bed.step(&one), Step::Admit { from_generation: bed.generation(N1) });
    let from_generation = bed.generation(N1);
    bed.run(Command::VolumeAdmit { name: V.into(), node: N1, incarnation: 8, from_generation });
    assert_eq!(bed.step(&one), Step::Register { generation: from_generation + 1 });
    one.registered = Some(from_generation + 1);
    assert_eq!(bed.step(&one), Step::Follow { epoch, owner: N2 });
}

#[test]
fn a_member_that_is_to_be_fenced_stops_and_waits() {
    let mut bed = Bed::online_on_first();
    let (epoch, generation) = (bed.volume().epoch, bed.generation(N2));
    bed.run(Command::VolumeFence { name: V.into(), epoch, node: N2, generation, reason: "x".into() });
    let one = Local { role: Role::Owner(epoch), registered: Some(bed.generation(N1)), ..local(N1) };
    assert_eq!(bed.step(&one), Step::Fence { epoch, fence: vec![(N2, generation)] });
    let mut two = Local { role: Role::Follower(epoch, N1), registered: Some(generation), ..local(N2) };
    assert!(matches!(bed.step(&two), Step::Suspend { .. }));
    (two.suspended, two.role, two.registered) = (true, Role::Nobody, None);
    assert_eq!(bed.step(&two), Step::Wait, "its key is still there");
    // The owner dies before it has fenced it, and nobody else is left.
    let mut last = bed.volume().clone();
    last.owner = None;
    assert_eq!(next_step(&bed.db, &last, &two), Step::Withdraw { generation });
    let unsure = Local { role: Role::Silent, ..two.clone() };
    assert_eq!(next_step(&bed.db, &last, &unsure), Step::Wait);
    let busy = Local { suspended: false, role: Role::Follower(epoch, N1), ..two.clone() };
    assert!(matches!(next_step(&bed.db, &last, &busy), Step::Suspend { .. }));
    bed.run(Command::VolumeFenced { name: V.into(), epoch, fenced: vec![(N2, generation)] });
    assert_eq!(bed.step(&two), Step::Admit { from_generation: generation });
}

#[test]
fn no_quorum_and_a_conflict_stop_csvfs() {
    let mut bed = Bed::new();
    bed.admit(N1);
    bed.assign(N1);
    bed.online(N1);
    let epoch = bed.volume().epoch;
    let good = Local { role: Role::Owner(epoch), registered: Some(bed.generation(N1)), ..local(N1) };
    let cut = Local { cut_off: Some("no quorum".into()), ..good.clone() };
    assert_eq!(bed.step(&cut), Step::Suspend { reason: "no quorum".into() });
    assert_eq!(bed.step(&Local { suspended: true, role: Role::Nobody, ..cut }), Step::Wait);
    assert!(matches!(bed.step(&Local { fenced: true, ..good.clone() }), Step::Suspend { .. }));
    // Back with quorum, nothing has changed: the key is registered again, and the manager gives a new epoch.
    let back = Local { suspended: true, role: Role::Nobody, registered: None, ..good };
    assert_eq!(bed.step(&back), Step::Register { generation: bed.generation(N1) });
    let back = Local { registered: Some(bed.generation(N1)), ..back };
    assert_eq!(bed.step(&back), Step::Close { epoch });
    bed.run(Command::VolumeClosed { name: V.into(), epoch, node: N1, why: "it stopped".into() });
    assert_eq!(bed.step(&back), Step::Wait);
    bed.assign(N1);
    let epoch = bed.volume().epoch;
    let back = Local { registered: Some(bed.generation(N1)), ..back };
    assert_eq!(bed.step(&back), Step::Take { epoch, fence: vec![] });
}

#[test]
fn a_planned_move_hands_over_and_is_told_again() {
    let mut bed = Bed::online_on_first();
    let epoch = bed.volume().epoch;
    bed.run(Command::VolumeRelease { name: V.into(), epoch, to: Some(N2), reason: "move".into() });
    let mut one = Local { role: Role::Owner(epoch), registered: Some(bed.generation(N1)), ..local(N1) };
    assert_eq!(bed.step(&one), Step::HandOver { epoch });
    one.role = Role::Nobody;
    assert_eq!(bed.step(&one), Step::HandOver { epoch }, "the proposal was lost");
    bed.run(Command::VolumeReleased { name: V.into(), epoch, node: N1 });
    assert_eq!(bed.step(&one), Step::Wait);
    let two = Local { registered: Some(bed.generation(N2)), ..local(N2) };
    assert_eq!(bed.step(&two), Step::Take { epoch: Epoch(epoch.0 + 1), fence: vec![] });
}

#[test]
fn a_csvfs_that_ended_is_told_before_it_is_started_again() {
    let mut bed = Bed::online_on_first();
    let epoch = bed.volume().epoch;
    let gone = Local { role: Role::Gone, registered: Some(bed.generation(N1)), ..local(N1) };
    assert_eq!(bed.step(&gone), Step::Close { epoch });
    assert!(!may_start(&bed.db, bed.volume(), &gone));
    bed.run(Command::VolumeClosed { name: V.into(), epoch, node: N1, why: "csvfs ended".into() });
    assert!(bed.volume().to_fence().is_empty(), "nothing is left that could write");
    assert!(may_start(&bed.db, bed.volume(), &gone));
    bed.assign(N2);
    assert_eq!(bed.step(&gone), Step::Wait);
    let two = Local { registered: Some(bed.generation(N2)), ..local(N2) };
    assert_eq!(bed.step(&two), Step::Take { epoch: Epoch(epoch.0 + 1), fence: vec![] });
}

/// Found by the simulation: nothing of the volume runs anywhere, and each node waits for another one to fence it.
#[test]
fn after_a_power_cut_of_every_node_each_comes_back_by_itself() {
    let mut bed = Bed::online_on_first();
    for node in [N1, N2] {
        bed.run(Command::NodeDown { node, incarnation: 7, reason: "power".into(), planned: false });
    }
    let from_epoch = bed.volume().epoch;
    bed.run(Command::VolumeUnowned { name: V.into(), from_epoch, reason: "nobody is there".into() });
    for node in [N1, N2] {
        bed.run(Command::NodeUp { node, incarnation: 8 });
        let mut back = Local { incarnation: 8, role: Role::Gone, ..local(node) };
        let from_generation = bed.generation(node);
        assert_eq!(bed.step(&back), Step::Admit { from_generation });
        bed.run(Command::VolumeAdmit { name: V.into(), node, incarnation: 8, from_generation });
        back.registered = Some(from_generation + 1);
        assert_eq!(bed.step(&back), Step::Wait);
        assert!(may_start(&bed.db, bed.volume(), &back));
    }
    assert!(bed.volume().to_fence().is_empty());
}

#[test]
fn a_node_that_owns_the_volume_by_a_former_life_must_lose_it_before_it_is_admitted() {
    let mut bed = Bed::new();
    bed.admit(N1);
    bed.assign(N1);
    bed.online(N1);
    bed.run(Command::NodeDown { node: N1, incarnation: 7, reason: "power".into(), planned: false });
    bed.run(Command::NodeUp { node: N1, incarnation: 8 });
    let from_generation = bed.generation(N1);
    let admit = Command::VolumeAdmit { name: V.into(), node: N1, incarnation: 8, from_generation };
    assert!(bed.db.apply(&admit.by(N1, bed.at)).is_err());
    assert!(!bed.db.owner_stands(bed.volume()), "the manager gives it a new epoch");
}

/// Found by the simulation: a coordinator that broke has no role and holds layouts still.
#[test]
fn a_csvfs_without_a_role_stops_before_it_is_admitted_again() {
    let mut bed = Bed::online_on_first();
    bed.assign(N2);
    let mut one = Local { registered: Some(bed.generation(N1)), ..local(N1) };
    assert!(matches!(bed.step(&one), Step::Suspend { .. }), "its key is to be fenced");
    bed.online(N2);
    assert!(matches!(bed.step(&one), Step::Suspend { .. }), "its key is gone, its layouts are not");
    one.suspended = true;
    assert_eq!(bed.step(&one), Step::Admit { from_generation: bed.generation(N1) });
}
