//! Tests of the database. `Bed` is used by the other modules' tests as well.

mod groups;
mod nodes;
mod random;
mod records;
mod restore;
mod volumes;

use super::*;
use csv_types::{Epoch, VolumeId};
use proptest::prelude::ProptestConfig;
use std::net::{IpAddr, Ipv4Addr};

pub(crate) const MINUTE_MS: u64 = 60_000;
pub(crate) const HOUR_MS: u64 = 60 * MINUTE_MS;
pub(crate) const START_MS: u64 = 1_700_000_000_000;

/// As many random cases as `PROPTEST_CASES` says, else that many.
pub(crate) fn cases(count: u32) -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(count),
    }
}

/// A database and the time.
#[derive(Debug, Clone)]
pub(crate) struct Bed {
    pub(crate) db: ClusterDb,
    pub(crate) now: u64,
}

pub(crate) fn new_node(number: u32) -> NewNode {
    NewNode {
        name: format!("n{number}"),
        addr: addr(number),
        feature_level: FEATURE_LEVEL,
        version: "0.1.0".into(),
        cert_sha256: String::new(),
    }
}

pub(crate) fn addr(number: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(0x0a4d_0000 + number))
}

pub(crate) fn token() -> String {
    "ab".repeat(32)
}

pub(crate) fn n(number: u32) -> NodeId {
    NodeId(number)
}

pub(crate) fn new_resource(name: &str, group: &str, depends: &str) -> NewResource {
    NewResource {
        name: name.into(),
        kind: "GenericApplication".into(),
        group: group.into(),
        properties: BTreeMap::new(),
        depends: depends.into(),
        possible: Vec::new(),
        policy: ResourcePolicy::default(),
        checkpoints: Vec::new(),
        want_online: true,
    }
}

pub(crate) fn init() -> Command {
    Command::Init(Box::new(Init {
        name: "lab".into(),
        id: Uuid::from_u128(7),
        node: new_node(1),
        secrets: Secrets::default(),
        settings: Vec::new(),
    }))
}

impl Bed {
    pub(crate) fn empty() -> Self {
        Bed { db: ClusterDb::default(), now: START_MS }
    }

    /// That many nodes, all up in incarnation 1.
    pub(crate) fn nodes(count: u32) -> Self {
        let mut bed = Bed::empty();
        bed.ok(init());
        let token_add = Command::TokenAdd { sha256: token(), expires_unix_ms: START_MS + HOUR_MS, uses: 100 };
        bed.ok(token_add);
        for number in 2..=count {
            let node = new_node(number);
            bed.ok(Command::NodeAdd { node, token_sha256: token(), expect_id: Some(n(number)) });
        }
        for number in 1..=count {
            bed.ok(Command::NodeUp { node: n(number), incarnation: 1 });
        }
        bed
    }

    /// A volume, online on that node.
    pub(crate) fn volume(&mut self, name: &str, owner: u32) {
        self.add_volume(name, &[]);
        self.assign(name, owner);
        self.online(name, &[]);
    }

    pub(crate) fn add_volume(&mut self, name: &str, preferred: &[u32]) {
        let id = VolumeId(Uuid::from_u128(100 + self.db.events.next as u128));
        let preferred = preferred.iter().copied().map(NodeId).collect();
        let (name, fs, label_epoch) = (name.into(), "ext4".into(), Epoch(0));
        self.ok(Command::VolumeAdd { name, id, fs, preferred, label_epoch });
    }

    pub(crate) fn assign_command(&self, name: &str, to: u32) -> Command {
        let from_epoch = self.db.volumes[name].epoch;
        Command::VolumeAssign { name: name.into(), from_epoch, to: n(to), reason: "test".into() }
    }

    pub(crate) fn assign(&mut self, name: &str, to: u32) {
        self.ok(self.assign_command(name, to));
    }

    pub(crate) fn online_command(&self, name: &str, fenced: &[(u32, u32)]) -> Command {
        let volume = &self.db.volumes[name];
        Command::VolumeOnline {
            name: name.into(),
            epoch: volume.epoch,
            node: volume.owner.unwrap(),
            fenced: fenced.iter().map(|(node, generation)| (n(*node), *generation)).collect(),
        }
    }

    pub(crate) fn online(&mut self, name: &str, fenced: &[(u32, u32)]) {
        self.ok(self.online_command(name, fenced));
    }

    pub(crate) fn admit(&mut self, name: &str, node: u32) -> Applied {
        let from_generation =
            self.db.volumes[name].members.get(&n(node)).map_or(0, |member| member.generation);
        let incarnation = self.db.nodes[&n(node)].incarnation;
        self.ok(Command::VolumeAdmit { name: name.into(), node: n(node), incarnation, from_generation })
    }

    /// The others have not heard it for some time.
    pub(crate) fn down(&mut self, node: u32) {
        self.missed(n(node), "test");
    }

    pub(crate) fn missed(&mut self, node: NodeId, reason: &str) {
        let (incarnation, planned) = (self.db.nodes[&node].incarnation, self.db.nodes[&node].leaving);
        let down = Command::NodeDown { node, incarnation, reason: reason.into(), planned };
        self.apply_by(self.leader(Some(node)), down).unwrap();
    }

    /// The first node that is up, `not` left out.
    pub(crate) fn leader(&self, not: Option<NodeId>) -> NodeId {
        let up = self.db.nodes.values().filter(|node| node.is_up() && Some(node.id) != not);
        up.map(|node| node.id).next().unwrap_or(n(64))
    }

    /// It says that it has stopped.
    pub(crate) fn goodbye(&mut self, node: NodeId, reason: &str) {
        let incarnation = self.db.nodes[&node].incarnation;
        let down = Command::NodeDown { node, incarnation, reason: reason.into(), planned: true };
        self.apply_by(node, down).unwrap();
    }

    pub(crate) fn up(&mut self, node: u32) {
        let incarnation = self.db.nodes[&n(node)].incarnation + 1;
        self.ok(Command::NodeUp { node: n(node), incarnation });
    }

    pub(crate) fn setting(&mut self, key: &str, value: &str) {
        self.ok(Command::Setting { key: key.into(), value: value.into() });
    }

    pub(crate) fn apply(&mut self, command: Command) -> Answer {
        self.apply_by(n(1), command)
    }

    pub(crate) fn apply_by(&mut self, by: NodeId, command: Command) -> Answer {
        let before = self.db.clone();
        let envelope = command.by(by, self.now);
        assert_eq!(Envelope::decode(&envelope.encode()).unwrap(), envelope);
        let answer = self.db.apply(&envelope);
        if let Err(broken) = self.db.check() {
            panic!("{envelope:?} broke an invariant: {broken}");
        }
        if matches!(answer, Err(_) | Ok(Applied::Unchanged)) {
            assert_eq!(self.db, before, "{envelope:?} was not taken and changed something");
        }
        assert_eq!(decode_answer(&encode_answer(&answer)).unwrap(), answer);
        answer
    }

    /// Applies a command that must be taken.
    pub(crate) fn ok(&mut self, command: Command) -> Applied {
        let text = format!("{command:?}");
        self.apply(command).unwrap_or_else(|refused| panic!("{text}: {refused}"))
    }

    /// Applies a command that must be refused with that word.
    pub(crate) fn refused(&mut self, command: Command, word: &str) {
        let text = format!("{command:?}");
        match self.apply(command) {
            Ok(applied) => panic!("{text} was taken: {applied:?}"),
            Err(refused) => assert!(refused.to_string().contains(word), "{text}: {refused}"),
        }
    }

    pub(crate) fn member(&self, name: &str, node: u32) -> (u32, MemberState) {
        let member = self.db.volumes[name].members[&n(node)];
        (member.generation, member.state)
    }

    /// A group with resources of that name and dependencies, wanted online and offline yet.
    pub(crate) fn group(&mut self, name: &str, resources: &[(&str, &str)]) {
        self.ok(Command::GroupAdd { name: name.into(), policy: GroupPolicy::default() });
        for (resource, depends) in resources {
            self.ok(Command::ResourceAdd { resource: new_resource(resource, name, depends) });
        }
        self.ok(Command::GroupOnline { name: name.into() });
    }

    pub(crate) fn assign_group(&mut self, name: &str, to: u32) {
        let from_generation = self.db.groups[name].generation;
        let reason = "test".into();
        self.ok(Command::GroupAssign { name: name.into(), from_generation, to: n(to), reason });
    }

    /// The owner says so of the group, and that all its resources are in that state.
    pub(crate) fn group_status_command(
        &self,
        name: &str,
        state: GroupState,
        of_all: ResourceState,
    ) -> Command {
        let group = &self.db.groups[name];
        let status = ResourceStatus { state: of_all, why: String::new(), since_unix_ms: self.now };
        let all = self.db.resources.values().filter(|resource| resource.group == name);
        Command::GroupStatus {
            name: name.into(),
            generation: group.generation,
            node: group.owner.unwrap_or(n(1)),
            state: Some(state),
            resources: all.map(|resource| (resource.name.clone(), status.clone())).collect(),
        }
    }

    /// A group that is online on that node.
    pub(crate) fn online_group(&mut self, name: &str, on: u32) {
        self.group(name, &[(&format!("{name}-r"), "")]);
        self.assign_group(name, on);
        self.ok(self.group_status_command(name, GroupState::Online, ResourceState::Online));
    }

    /// Codes of the events since the number.
    pub(crate) fn events(&self, after: u64) -> Vec<u32> {
        self.db.events.after(after).map(|event| event.id).collect()
    }

    pub(crate) fn last_event(&self) -> u64 {
        self.db.events.next - 1
    }
}
