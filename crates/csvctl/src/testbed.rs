//! A database for tests, made by the commands that make a real one.

use csv_cluster::db::{
    Applied, ClusterDb, Command, FEATURE_LEVEL, GroupPolicy, GroupState, Init, MoveCause, MoveKind, NewNode,
    NewResource, ResourcePolicy, ResourceState, ResourceStatus, Secrets,
};
use csv_types::NodeId;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

const START_MS: u64 = 1_700_000_000_000;

/// A database and its time.
#[derive(Debug, Clone)]
pub(crate) struct Bed {
    pub(crate) db: ClusterDb,
    pub(crate) now: u64,
}

pub(crate) fn n(number: u32) -> NodeId {
    NodeId(number)
}

fn new_node(number: u32) -> NewNode {
    NewNode {
        name: format!("n{number}"),
        addr: IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + number)),
        feature_level: FEATURE_LEVEL,
        version: "0.1.0".into(),
        cert_sha256: String::new(),
    }
}

impl Bed {
    /// That many nodes, all up.
    pub(crate) fn nodes(count: u32) -> Bed {
        let mut bed = Bed { db: ClusterDb::default(), now: START_MS };
        bed.ok(Command::Init(Box::new(Init {
            name: "lab".into(),
            id: uuid::Uuid::from_u128(7),
            node: new_node(1),
            secrets: Secrets::default(),
            settings: Vec::new(),
        })));
        let token = "ab".repeat(32);
        bed.ok(Command::TokenAdd { sha256: token.clone(), expires_unix_ms: START_MS + 3_600_000, uses: 64 });
        for number in 2..=count {
            let node = new_node(number);
            bed.ok(Command::NodeAdd { node, token_sha256: token.clone(), expect_id: None });
        }
        for number in 1..=count {
            bed.ok(Command::NodeUp { node: n(number), incarnation: 1 });
        }
        bed
    }

    /// Applies a command that must be taken.
    pub(crate) fn ok(&mut self, command: Command) -> Applied {
        let text = format!("{command:?}");
        self.now += 1;
        self.db.apply(&command.by(n(1), self.now)).unwrap_or_else(|refused| panic!("{text}: {refused}"))
    }

    /// A group that is not wanted online, with resources: name, type, dependencies.
    pub(crate) fn group(&mut self, name: &str, resources: &[(&str, &str, &str)]) {
        self.ok(Command::GroupAdd { name: name.into(), policy: GroupPolicy::default() });
        for (resource, kind, depends) in resources {
            self.ok(Command::ResourceAdd {
                resource: NewResource {
                    name: (*resource).into(),
                    kind: (*kind).into(),
                    group: name.into(),
                    properties: BTreeMap::new(),
                    depends: (*depends).into(),
                    possible: Vec::new(),
                    policy: ResourcePolicy::default(),
                    checkpoints: Vec::new(),
                    want_online: true,
                },
            });
        }
    }

    pub(crate) fn want(&mut self, name: &str) {
        self.ok(Command::GroupOnline { name: name.into() });
    }

    pub(crate) fn assign(&mut self, name: &str, to: u32) {
        let from_generation = self.db.groups[name].generation;
        let reason = "test".into();
        self.ok(Command::GroupAssign { name: name.into(), from_generation, to: n(to), reason });
    }

    /// The owner's word on some resources, and then on the group.
    pub(crate) fn tell(
        &mut self,
        name: &str,
        resources: &[(&str, ResourceState, &str)],
        state: Option<GroupState>,
    ) {
        let group = &self.db.groups[name];
        let (generation, node) = (group.generation, group.owner.unwrap());
        let status = |state, why: &str| ResourceStatus { state, why: why.into(), since_unix_ms: self.now };
        let resources =
            resources.iter().map(|(name, state, why)| ((*name).to_owned(), status(*state, why))).collect();
        self.ok(Command::GroupStatus { name: name.into(), generation, node, state, resources });
    }

    /// All of its resources are online, and so is it.
    pub(crate) fn tell_online(&mut self, name: &str) {
        let names: Vec<String> =
            self.db.resources.values().filter(|of| of.group == name).map(|of| of.name.clone()).collect();
        let all: Vec<_> = names.iter().map(|name| (name.as_str(), ResourceState::Online, "")).collect();
        self.tell(name, &all, Some(GroupState::Online));
    }

    /// A group with one virtual machine of its name, online on that node.
    pub(crate) fn machine(&mut self, name: &str, on: u32) {
        self.group(name, &[(name, crate::names::MACHINE, "")]);
        self.want(name);
        self.assign(name, on);
        self.tell_online(name);
    }

    pub(crate) fn release(&mut self, name: &str, to: u32) {
        self.ok(Command::GroupRelease {
            name: name.into(),
            generation: self.db.groups[name].generation,
            to: Some(n(to)),
            how: MoveKind::Live,
            reason: "on request".into(),
            cause: MoveCause::Order,
        });
    }

    /// A command of the owner about the present generation.
    pub(crate) fn by_owner(&mut self, name: &str, make: impl FnOnce(String, u64, NodeId) -> Command) {
        let group = &self.db.groups[name];
        let command = make(name.into(), group.generation, group.owner.unwrap());
        self.ok(command);
    }

    pub(crate) fn down(&mut self, node: u32) {
        let incarnation = self.db.nodes[&n(node)].incarnation;
        let reason = "no heartbeat".into();
        self.ok(Command::NodeDown { node: n(node), incarnation, reason, planned: false });
    }
}
