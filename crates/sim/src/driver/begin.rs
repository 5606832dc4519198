//! The beginning: a cluster that was made before.

use super::{Event, Mend, Sim};
use crate::bugs::Bugs;
use crate::csvd::volume_name;
use crate::faults::Plan;
use crate::invariants::Oracle;
use crate::node::Node;
use crate::raft_model::{Disk, Entry, Payload, Voter};
use crate::rng::Rng;
use crate::world::clock::{Clock, START_UNIX_MS};
use crate::world::lun::Lun;
use crate::world::network::Network;
use crate::world::witness_lun::WitnessLun;
use csv_cluster::db::{Command, Init, NewNode, QuorumConfig, Secrets, Witness};
use csv_cluster::quorum::VoterId;
use csv_types::{Epoch, NodeId, VolumeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use uuid::Uuid;

fn new_node(number: u32) -> NewNode {
    NewNode {
        name: format!("n{number}"),
        addr: std::net::Ipv4Addr::from(0x0a00_0000 + number).into(),
        feature_level: 1,
        version: "1".into(),
        cert_sha256: String::new(),
    }
}

/// The log of a cluster that was just made.
fn log(plan: &Plan) -> Vec<Rc<Entry>> {
    let settings = crate::SETTINGS.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    let token = "ab".repeat(32);
    let mut commands = vec![
        Command::Init(Box::new(Init {
            name: "sim".into(),
            id: Uuid::from_u128(7),
            node: new_node(1),
            secrets: Secrets::default(),
            settings,
        })),
        Command::TokenAdd { sha256: token.clone(), expires_unix_ms: u64::MAX, uses: 64 },
    ];
    for number in 2..=plan.nodes {
        let (node, token_sha256) = (new_node(number), token.clone());
        commands.push(Command::NodeAdd { node, token_sha256, expect_id: None });
    }
    if plan.witness {
        let witness =
            Witness::Disk { name: "witness".into(), lun_id: Uuid::from_u128(8), device: "/dev/w".into() };
        commands.push(Command::QuorumSet { config: QuorumConfig { witness, dynamic: true } });
    }
    for volume in 0..plan.volumes {
        commands.push(Command::VolumeAdd {
            name: volume_name(volume),
            id: VolumeId(Uuid::from_u128(100 + volume as u128)),
            fs: "ext4".into(),
            preferred: Vec::new(),
            label_epoch: Epoch(0),
        });
    }
    let voters: BTreeSet<Voter> = (1..=plan.nodes).map(Voter::from).collect();
    let first = Payload::Voters(voters);
    let commands = commands
        .into_iter()
        .map(|command| Payload::Command(Rc::new(command.by(NodeId(1), START_UNIX_MS)), None));
    std::iter::once(first).chain(commands).map(|payload| Rc::new(Entry { term: 0, payload })).collect()
}

impl Sim {
    /// The world of a seed.
    #[must_use]
    pub fn new(seed: u64, bugs: Bugs) -> Sim {
        let mut rng = Rng::new(seed);
        let plan = Plan::new(&mut rng);
        Sim::with_plan(seed, plan, rng, bugs)
    }

    /// A world with faults of one's choice.
    #[must_use]
    pub fn with_plan(seed: u64, plan: Plan, mut rng: Rng, bugs: Bugs) -> Sim {
        let log = log(&plan);
        let mut nodes = BTreeMap::new();
        for number in 1..=plan.nodes {
            let drift_ppm = i64::try_from(rng.range(0, 400)).unwrap_or(0) - 200;
            let clock = Clock { drift_ppm, wall_offset_ms: i64::try_from(rng.range(0, 2_000)).unwrap_or(0) };
            let id = NodeId(number);
            nodes.insert(id, Node::new(id, clock, Disk::begin(log.clone()), plan.volumes, plan.aptpl));
        }
        let lun = |_| Lun::new(crate::LUN_BLOCKS, crate::FILES, crate::FBLOCKS, plan.loses_cache, plan.aptpl);
        let mut members: BTreeSet<Voter> = (1..=plan.nodes).map(Voter::from).collect();
        if plan.witness {
            members.insert(VoterId::WITNESS.0);
        }
        let mut sim = Sim {
            seed,
            now_ms: 0,
            rng,
            bugs,
            next: 0,
            queue: BTreeMap::new(),
            network: Network::good(),
            nodes,
            members,
            luns: (0..plan.volumes).map(lun).collect(),
            late_ms: vec![0; plan.volumes],
            witness: WitnessLun { disk: Disk::begin(log), ..WitnessLun::default() },
            ios: BTreeMap::new(),
            oracle: Oracle::new(&vec![plan.loses_cache; plan.volumes]),
            broken: None,
            notes: VecDeque::new(),
            print: false,
            hash: 0xcbf2_9ce4_8422_2325,
            events: 0,
            quiet: None,
            converged: false,
            plan,
        };
        for node in sim.nodes.keys().copied().collect::<Vec<_>>() {
            let in_ms = sim.rng.range(0, 300);
            sim.schedule(in_ms, Event::Mend(Mend::Boot(node)));
        }
        for (at_ms, fault) in sim.plan.faults.clone() {
            sim.schedule(at_ms, Event::Fault(fault));
        }
        let quiet_ms = sim.plan.quiet_ms;
        sim.schedule(quiet_ms, Event::Quiet);
        sim
    }
}
