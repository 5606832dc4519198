//! Failover manager: which node owns which volume. A pure function from the database and what the nodes report to
//! commands; csvd of the Raft leader calls it every 200 ms and proposes what it returns.
//!
//! Idempotent: with the same view, planning after its commands were applied gives nothing. Late or doubled proposals
//! are harmless, since each command carries the epoch that it was decided on.
//!
//! Rules, volume by volume
//! * An owner that does not stand any more (down, started anew, being fenced) or whose csvfs ended: another node at once.
//! * An owner that has lost its path while others have one: another node; the owner is fenced.
//! * An owner that can neither serve nor fence (no path, or its csvfs ended), while the others that could take the volume are
//!   themselves still to be fenced: nobody. They withdraw as soon as nobody owns it, and the next plan chooses among them.
//! * A start that takes too long: another node. One that failed: a node where it did not fail yet, at once; when it
//!   failed everywhere, again after a wait that doubles; after `start_failures_max` on each, `Failed`.
//! * An owner that is draining or leaving: planned moves, at most `max_parallel_moves` at a time. A merely paused owner keeps
//!   what it has, as in Windows.
//! * No node can take it: said once per reason, then wait.
//! * After a join: one move at a time of volumes placed before the join, to a node that is preferred more, or, among
//!   equals, when the owner has at least two volumes more. Not within `settle_ms`. A volume that was moved after the join, by
//!   whomever, is left alone, so an administrator's move is not undone.
//! * A volume that is starting or being moved, and makes progress, is never touched. A move whose target died goes on:
//!   `VolumeReleased` then leaves the volume without an owner, and the next plan finds one.
//!
//! Order of candidates: fewest failed starts since last online, no problem reported, preferred, fewest volumes, least load, lowest number.

mod candidates;
mod moves;
#[cfg(test)]
mod simulated;
#[cfg(test)]
mod tests;

use crate::db::{AdminState, ClusterDb, Command, NodeState, Volume, VolumeState};
use candidates::{Blocked, Planner};
use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Longest wait after failed starts, in milliseconds.
pub const BACKOFF_MS_MAX: u64 = 60_000;

/// What the planner sees besides the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Wall clock of the planning node (Unix ms).
    pub now_unix_ms: u64,
    /// The planning node.
    pub me: NodeId,
    /// The newest report of each node that is heard.
    pub reports: BTreeMap<NodeId, NodeReport>,
}

/// What a node says of itself; travels in heartbeats.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeReport {
    /// Its incarnation. A report of another one than the database knows is passed over.
    pub incarnation: u64,
    /// Its volumes by name.
    pub volumes: BTreeMap<String, VolumeReport>,
    /// How busy it is, in per cent of its processors.
    pub load: u32,
    /// Its processors; 0: not known.
    pub cpus: u32,
    /// Memory that virtual machines may have there altogether, in MiB; 0: not known, and no limit.
    pub memory_mib: u64,
    /// Memory in use on the whole machine, in MiB.
    pub memory_used_mib: u64,
    /// How busy its processors are, in thousandths of all of them.
    pub cpu_permille: u32,
}

/// A node's standing on a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeReport {
    /// Its path to the LUN.
    pub path: PathState,
    /// Does its csvfs run?
    pub csvfs: bool,
    /// The epoch under which its csvfs coordinates the volume; 0 when it does not.
    pub role_epoch: u64,
    /// Something that makes it a worse owner, for people.
    pub problem: Option<String>,
}

/// A node's path to a LUN.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathState {
    /// It reads and writes.
    Good,
    /// Never had one.
    #[default]
    None,
    /// Had one.
    Failed,
}

/// What to do now. See the module's text.
#[must_use]
pub fn plan(db: &ClusterDb, view: &View) -> Vec<Command> {
    if !db.initialised() {
        return Vec::new();
    }
    let mut planner = Planner::new(db, view);
    for volume in db.volumes.values() {
        place(&mut planner, volume);
    }
    moves::drain(&mut planner);
    moves::rebalance(&mut planner);
    for node in db.nodes.values() {
        let owned = db.volumes_of(node.id);
        let none_left = owned.iter().all(|volume| planner.taken.contains(*volume));
        // Groups are moved by their own manager.
        if node.admin == AdminState::Draining && none_left && db.groups_of(node.id).is_empty() {
            planner.commands.push(Command::NodeDrained { node: node.id });
        }
    }
    planner.commands
}

/// Gives a volume an owner when it needs one.
fn place(planner: &mut Planner<'_>, volume: &Volume) {
    if !volume.want_online {
        take_offline(planner, volume);
        return;
    }
    match &volume.state {
        VolumeState::Failed { .. } => retry_failed(planner, volume),
        VolumeState::Offline { .. } => place_unowned(planner, volume),
        VolumeState::Starting { .. } | VolumeState::Online | VolumeState::Releasing { .. } => {
            if let Some(trouble) = planner.owner_trouble(volume) {
                replace_owner(planner, volume, &trouble);
            }
        }
    }
}

/// What is wrong with an owner.
pub(crate) struct Trouble {
    reason: String,
    /// May the owner get it again, under a new epoch?
    owner_again: bool,
    /// Is it better to have no owner than this one?
    let_go: bool,
    /// The owner stands, and can neither serve the volume nor fence anybody.
    helpless: bool,
}

fn replace_owner(planner: &mut Planner<'_>, volume: &Volume, trouble: &Trouble) {
    let not = volume.owner.filter(|_| !trouble.owner_again);
    match planner.best(volume, not) {
        Ok(to) => planner.assign(volume, to, trouble.reason.clone()),
        Err(Blocked::Wait) => {}
        Err(Blocked::NoNode(_)) => {
            // Who is to be fenced waits for the owner to do it, and this owner never will.
            if trouble.let_go || (trouble.helpless && planner.kept_by_a_fence(volume, not)) {
                let why = planner.blocked(volume, not.filter(|_| !trouble.helpless));
                planner.unown(volume, &why.to_string());
            }
        }
    }
}

/// The owner of a volume that nobody wants online any more closes it, or is gone, or will never come to closing it.
fn take_offline(planner: &mut Planner<'_>, volume: &Volume) {
    let trouble = planner.owner_trouble(volume);
    let helpless = || trouble.as_ref().filter(|trouble| trouble.helpless);
    let given_up = match &volume.state {
        VolumeState::Offline { .. } | VolumeState::Failed { .. } => return,
        VolumeState::Starting { .. } => helpless(),
        VolumeState::Releasing { .. } => helpless().filter(|_| planner.releases_too_long(volume)),
        VolumeState::Online => None,
    };
    if trouble.as_ref().is_some_and(|trouble| trouble.let_go) {
        planner.unown(volume, "it was taken offline, and its owner is gone");
    } else if let Some(trouble) = given_up {
        planner.unown(volume, &format!("it was taken offline, and {}", trouble.reason));
    } else if volume.state == VolumeState::Online {
        planner.release(volume, None, "it was taken offline");
    }
}

fn retry_failed(planner: &mut Planner<'_>, volume: &Volume) {
    let retry_ms = planner.db.settings.failed_retry_ms;
    if retry_ms > 0 && planner.age_ms(volume.since_unix_ms) >= retry_ms {
        planner.commands.push(Command::VolumeBringOnline { name: volume.name.clone() });
        let state = VolumeState::Offline { reason: "it is tried again".into() };
        place_unowned(planner, &Volume { state, failures: Vec::new(), ..volume.clone() });
    }
}

fn place_unowned(planner: &mut Planner<'_>, volume: &Volume) {
    let to = match planner.best(volume, None) {
        Ok(to) => to,
        Err(Blocked::Wait) => return,
        Err(blocked @ Blocked::NoNode(_)) => {
            planner.unown(volume, &blocked.to_string());
            return;
        }
    };
    let rounds = volume.failures_on(to);
    let settings = &planner.db.settings;
    if rounds >= usize::try_from(settings.start_failures_max).unwrap_or(usize::MAX) {
        let last = volume.failures.last().map_or("", |failure| failure.why.as_str());
        let reason =
            format!("it could not be brought online on any node, {rounds} times on each; last: {last}");
        planner.commands.push(Command::VolumeFail {
            name: volume.name.clone(),
            from_epoch: volume.epoch,
            reason,
        });
        return;
    }
    if rounds > 0 {
        let doubled = u32::try_from(rounds - 1).unwrap_or(u32::MAX).min(16);
        let wait_ms = settings.start_backoff_ms.saturating_mul(1 << doubled).min(BACKOFF_MS_MAX);
        let last = volume.failures.last().map_or(0, |failure| failure.at_unix_ms);
        if planner.age_ms(last) < wait_ms {
            return;
        }
    }
    let VolumeState::Offline { reason } = &volume.state else { return };
    planner.assign(volume, to, format!("it had no owner ({reason})"));
}

impl Planner<'_> {
    /// What is wrong with a volume's owner, if anything is.
    fn owner_trouble(&self, volume: &Volume) -> Option<Trouble> {
        let owner = volume.owner?;
        let name = self.db.node_name(owner);
        let Some(node) = self.db.nodes.get(&owner) else {
            let reason = format!("its owner {name} is gone");
            return Some(Trouble { reason, owner_again: false, let_go: true, helpless: false });
        };
        if !self.db.owner_stands(volume) {
            let reason = match node.state {
                NodeState::Down | NodeState::Joining => format!("{name} is down: {}", node.down_reason),
                NodeState::Up | NodeState::Isolated => format!("{name} lost the volume or started again"),
            };
            return Some(Trouble { reason, owner_again: true, let_go: true, helpless: false });
        }
        if node.state == NodeState::Isolated {
            return None;
        }
        self.reported_trouble(volume, owner, &name)
    }

    fn releases_too_long(&self, volume: &Volume) -> bool {
        self.age_ms(volume.since_unix_ms) >= self.db.settings.release_timeout_ms
    }

    /// What the owner itself, or the clock, tells of a standing owner.
    fn reported_trouble(&self, volume: &Volume, owner: NodeId, name: &str) -> Option<Trouble> {
        let age_ms = self.age_ms(volume.since_unix_ms);
        let settings = &self.db.settings;
        let report = self.report(owner).and_then(|report| report.volumes.get(&volume.name));
        let no_path = report.is_some_and(|report| report.path != PathState::Good);
        let no_csvfs = report.is_some_and(|report| !report.csvfs);
        let lasting =
            |reason, helpless| Some(Trouble { reason, owner_again: false, let_go: false, helpless });
        let (starting, releasing) = match volume.state {
            VolumeState::Starting { .. } => (true, false),
            VolumeState::Releasing { .. } => (false, true),
            VolumeState::Online | VolumeState::Offline { .. } | VolumeState::Failed { .. } => (false, false),
        };
        if starting && age_ms >= settings.start_timeout_ms {
            let reason =
                format!("{name} did not get it online within {} s", settings.start_timeout_ms / 1000);
            return lasting(reason, no_path || no_csvfs);
        }
        if releasing && self.releases_too_long(volume) {
            let reason = format!("{name} did not release it within {} s", settings.release_timeout_ms / 1000);
            return lasting(reason, no_path || no_csvfs);
        }
        if no_path {
            return lasting(format!("{name} lost its path to the LUN"), true);
        }
        // A report from before it came online contradicts it too, so an old state is needed to believe it.
        if starting || age_ms < settings.report_grace_ms {
            return None;
        }
        if no_csvfs {
            return lasting(format!("csvfs of {name} ended"), true);
        }
        // An owner that releases ends its role before the release is known.
        if !releasing && report?.role_epoch < volume.epoch.0 {
            let reason = format!("csvfs of {name} does not coordinate it any more");
            return Some(Trouble { reason, owner_again: true, let_go: false, helpless: false });
        }
        None
    }
}
