//! What goes wrong in a run, from its seed.

use crate::rng::Rng;
use csv_types::NodeId;
use std::collections::BTreeSet;

/// A fault; each that lasts says for how long (ms).
#[derive(Debug, Clone)]
pub enum Fault {
    /// These and the others do not hear each other.
    Partition(BTreeSet<NodeId>, u64),
    /// Nothing gets from the first to the second.
    OneWay(NodeId, NodeId, u64),
    /// The two do not hear each other; everybody else does.
    Pair(NodeId, NodeId, u64),
    /// Power cut; it boots after that time.
    Crash(NodeId, u64),
    /// It does nothing for that time; its I/O goes on.
    Freeze(NodeId, u64),
    /// csvd dies; it starts again after that time.
    KillCsvd(NodeId, u64),
    /// csvfs of a volume dies.
    KillCsvfs(NodeId, usize),
    /// It cannot reach the LUN.
    Path(NodeId, usize, u64),
    /// The storage of a volume restarts.
    Storage(usize),
    /// Writes take up to that long inside the storage.
    LateWrites(usize, u64, u64),
    /// Messages are lost, doubled, late: per mille each.
    BadNetwork(u32, u32, u32, u64),
    /// The wall clock of a node is set forward or back.
    ClockJump(NodeId, i64),
    /// The administrator moves a volume.
    Move(usize, NodeId),
    /// The administrator drains a node and lets it take volumes again later.
    Drain(NodeId, u64),
    /// Nobody reaches the witness LUN.
    Witness(u64),
}

/// A cluster and its faults.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Nodes.
    pub nodes: u32,
    /// Volumes.
    pub volumes: usize,
    /// A disk witness.
    pub witness: bool,
    /// Storage that forgets what was not flushed when it restarts.
    pub loses_cache: bool,
    /// Storage that keeps registrations.
    pub aptpl: bool,
    /// When what happens (ms).
    pub faults: Vec<(u64, Fault)>,
    /// From then on nothing happens any more, and everything is mended.
    pub quiet_ms: u64,
}

const BEGIN_MS: u64 = 6_000;

impl Plan {
    /// From the seed's numbers.
    #[must_use]
    pub fn new(rng: &mut Rng) -> Plan {
        let witness = rng.chance(300);
        let nodes = if witness { 2 } else { *rng.pick(&[3, 3, 3, 4, 5]).unwrap_or(&3) };
        let volumes = 1 + usize::from(rng.chance(300));
        let quiet_ms = BEGIN_MS + rng.range(12_000, 40_000);
        let count = rng.range(3, 12);
        let mut plan = Plan {
            nodes,
            volumes,
            witness,
            loses_cache: rng.chance(400),
            aptpl: rng.chance(800),
            faults: Vec::new(),
            quiet_ms,
        };
        for _ in 0..count {
            let at_ms = rng.range(BEGIN_MS, quiet_ms);
            plan.faults.push((at_ms, plan.fault(rng)));
        }
        plan.faults.sort_by_key(|(at_ms, _)| *at_ms);
        plan
    }

    fn node(&self, rng: &mut Rng) -> NodeId {
        NodeId(u32::try_from(rng.range(1, u64::from(self.nodes))).unwrap_or(1))
    }

    fn two(&self, rng: &mut Rng) -> (NodeId, NodeId) {
        let (a, b) = (self.node(rng), self.node(rng));
        if a == b { (a, NodeId(a.0 % self.nodes + 1)) } else { (a, b) }
    }

    fn fault(&self, rng: &mut Rng) -> Fault {
        let node = self.node(rng);
        let volume = rng.below(self.volumes);
        let (a, b) = self.two(rng);
        let long = rng.range(500, 15_000);
        match rng.below(20) {
            0 | 1 => {
                let side = (1..=self.nodes).map(NodeId).filter(|_| rng.chance(500)).collect();
                Fault::Partition(side, long)
            }
            2 => Fault::OneWay(a, b, long),
            3 | 4 => Fault::Pair(a, b, long),
            5..=7 => Fault::Crash(node, rng.range(1_500, 10_000)),
            8..=10 => Fault::Freeze(node, rng.range(100, 12_000)),
            11 => Fault::KillCsvd(node, rng.range(100, 3_000)),
            12 => Fault::KillCsvfs(node, volume),
            13 => Fault::Path(node, volume, long),
            14 => Fault::Storage(volume),
            15 => {
                // What was written to a LUN that has forgotten everybody cannot be aborted, only waited for.
                let most = if self.aptpl { 12_000 } else { 4_000 };
                Fault::LateWrites(volume, rng.range(500, most), long)
            }
            16 => {
                let rate = |rng: &mut Rng| u32::try_from(rng.range(0, 150)).unwrap_or(0);
                Fault::BadNetwork(rate(rng), rate(rng), rate(rng), long)
            }
            17 => {
                let jump = i64::try_from(rng.range(0, 7_200_000)).unwrap_or(0);
                Fault::ClockJump(node, if rng.chance(500) { jump } else { -jump })
            }
            18 if self.witness && rng.chance(500) => Fault::Witness(long),
            18 => Fault::Drain(node, long),
            _ => Fault::Move(volume, node),
        }
    }
}
