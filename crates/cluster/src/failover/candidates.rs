//! Who can own a volume, and who best.

use super::{NodeReport, PathState, View};
use crate::db::{ClusterDb, Command, MemberState, Node, Volume, VolumeState};
use csv_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The plan while it is being made.
pub(super) struct Planner<'a> {
    pub(super) db: &'a ClusterDb,
    pub(super) view: &'a View,
    pub(super) commands: Vec<Command>,
    /// Volumes that each node has or is about to get, with what this plan adds and takes away.
    pub(super) owned: BTreeMap<NodeId, usize>,
    /// Volumes that this plan touches.
    pub(super) touched: BTreeSet<String>,
    /// Volumes that this plan takes from their owner at once.
    pub(super) taken: BTreeSet<String>,
}

/// Why there is no candidate.
#[derive(Debug)]
pub(super) enum Blocked {
    /// A node that is up has not reported yet.
    Wait,
    /// What keeps each node from it.
    NoNode(String),
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Blocked::Wait => f.write_str("a node has not reported yet"),
            Blocked::NoNode(why) => write!(f, "no node can own it: {why}"),
        }
    }
}

/// Why a node cannot own a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unfit {
    Fencing,
    Silent,
    Because(&'static str),
}

impl<'a> Planner<'a> {
    pub(super) fn new(db: &'a ClusterDb, view: &'a View) -> Self {
        let mut owned = BTreeMap::new();
        for home in db.volumes.values().filter_map(home) {
            *owned.entry(home).or_insert(0) += 1;
        }
        Planner { db, view, commands: Vec::new(), owned, touched: BTreeSet::new(), taken: BTreeSet::new() }
    }

    /// How long ago that was. A wall clock that was set back by more than that counts as time gone by, so that nothing
    /// waits for ever.
    pub(super) fn age_ms(&self, at_unix_ms: u64) -> u64 {
        self.view.now_unix_ms.abs_diff(at_unix_ms)
    }

    /// The node's report, if it is of the incarnation that the database knows.
    pub(super) fn report(&self, node: NodeId) -> Option<&'a NodeReport> {
        let incarnation = self.db.nodes.get(&node)?.incarnation;
        self.view.reports.get(&node).filter(|report| report.incarnation == incarnation)
    }

    pub(super) fn owned_by(&self, node: NodeId) -> usize {
        self.owned.get(&node).copied().unwrap_or(0)
    }

    fn fit(&self, volume: &Volume, node: &Node) -> Result<(), Unfit> {
        if !node.is_up() {
            return Err(Unfit::Because("is not up"));
        }
        if !node.takes_volumes() {
            return Err(Unfit::Because("is paused or leaving"));
        }
        let Some(report) = self.report(node.id) else { return Err(Unfit::Silent) };
        let Some(report) = report.volumes.get(&volume.name) else {
            return Err(Unfit::Because("has not taken the volume up yet"));
        };
        match report.path {
            PathState::Good => {}
            PathState::None => return Err(Unfit::Because("has no path to the LUN")),
            PathState::Failed => return Err(Unfit::Because("lost its path to the LUN")),
        }
        if !report.csvfs {
            return Err(Unfit::Because("does not run csvfs of the volume"));
        }
        let member = volume.members.get(&node.id).filter(|member| member.incarnation == node.incarnation);
        match member.map(|member| member.state) {
            Some(MemberState::FencePending) => Err(Unfit::Fencing),
            // It asks for a new key as soon as nothing of what it had is left.
            Some(MemberState::Fenced) => {
                Err(Unfit::Because("was fenced and has not asked for a new key yet"))
            }
            Some(MemberState::Admitted) | None => Ok(()),
        }
    }

    /// Place of a node among the preferred owners; all others come behind.
    pub(super) fn rank(volume: &Volume, node: NodeId) -> usize {
        volume.preferred.iter().position(|preferred| *preferred == node).unwrap_or(volume.preferred.len())
    }

    /// Can the node own the volume?
    pub(super) fn can_own(&self, volume: &Volume, node: &Node) -> bool {
        self.fit(volume, node).is_ok()
    }

    /// The best owner, `not` left out.
    pub(super) fn best(&self, volume: &Volume, not: Option<NodeId>) -> Result<NodeId, Blocked> {
        let others = self.db.nodes.values().filter(|node| Some(node.id) != not);
        let candidates = others.filter(|node| self.can_own(volume, node)).map(|node| node.id);
        let best = candidates.min_by_key(|&node| {
            let report = self.report(node);
            let problem = report
                .and_then(|report| report.volumes.get(&volume.name))
                .is_some_and(|report| report.problem.is_some());
            let load = report.map_or(u32::MAX, |report| report.load);
            let others = self.owned_by(node).saturating_sub(usize::from(home(volume) == Some(node)));
            (volume.failures_on(node), problem, Self::rank(volume, node), others, load, node)
        });
        best.ok_or_else(|| self.blocked(volume, not))
    }

    /// Is there a node, `not` left out, that could own the volume if it were not still to be fenced?
    pub(super) fn kept_by_a_fence(&self, volume: &Volume, not: Option<NodeId>) -> bool {
        let mut others = self.db.nodes.values().filter(|node| Some(node.id) != not);
        others.any(|node| self.fit(volume, node) == Err(Unfit::Fencing))
    }

    pub(super) fn blocked(&self, volume: &Volume, not: Option<NodeId>) -> Blocked {
        let others = self.db.nodes.values().filter(|node| Some(node.id) != not);
        let unfit: Vec<(&Node, Unfit)> =
            others.filter_map(|node| self.fit(volume, node).err().map(|unfit| (node, unfit))).collect();
        if unfit.iter().any(|(_, unfit)| *unfit == Unfit::Silent) {
            return Blocked::Wait;
        }
        let because = unfit.iter().map(|(node, unfit)| match unfit {
            Unfit::Fencing => format!("{} is still to be fenced", node.name),
            Unfit::Silent => format!("{} has not reported", node.name),
            Unfit::Because(why) => format!("{} {why}", node.name),
        });
        Blocked::NoNode(because.collect::<Vec<_>>().join("; "))
    }

    pub(super) fn assign(&mut self, volume: &Volume, to: NodeId, reason: String) {
        if let Some(owned) = home(volume).and_then(|home| self.owned.get_mut(&home)) {
            *owned = owned.saturating_sub(1);
        }
        *self.owned.entry(to).or_insert(0) += 1;
        self.touched.insert(volume.name.clone());
        if volume.owner != Some(to) {
            self.taken.insert(volume.name.clone());
        }
        let (name, from_epoch) = (volume.name.clone(), volume.epoch);
        self.commands.push(Command::VolumeAssign { name, from_epoch, to, reason });
    }

    pub(super) fn release(&mut self, volume: &Volume, to: Option<NodeId>, reason: &str) {
        if let Some(owned) = home(volume).and_then(|home| self.owned.get_mut(&home)) {
            *owned = owned.saturating_sub(1);
        }
        if let Some(to) = to {
            *self.owned.entry(to).or_insert(0) += 1;
        }
        self.touched.insert(volume.name.clone());
        let (name, epoch) = (volume.name.clone(), volume.epoch);
        self.commands.push(Command::VolumeRelease { name, epoch, to, reason: reason.into() });
    }

    /// Leaves the volume without an owner, and says so once per reason.
    pub(super) fn unown(&mut self, volume: &Volume, reason: &str) {
        self.touched.insert(volume.name.clone());
        if matches!(&volume.state, VolumeState::Offline { reason: already } if already == reason) {
            return;
        }
        self.taken.insert(volume.name.clone());
        let (name, from_epoch) = (volume.name.clone(), volume.epoch);
        self.commands.push(Command::VolumeUnowned { name, from_epoch, reason: reason.into() });
    }
}

/// The node that has the volume or is about to get it.
fn home(volume: &Volume) -> Option<NodeId> {
    match &volume.state {
        VolumeState::Releasing { to, .. } => *to,
        VolumeState::Starting { .. } | VolumeState::Online => volume.owner,
        VolumeState::Offline { .. } | VolumeState::Failed { .. } => None,
    }
}
