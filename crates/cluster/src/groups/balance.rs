//! Balance of virtual machines: away from nodes that are loaded more than the level, to nodes that are then loaded no more than
//! those. A node's load is the greater of two shares: memory promised to virtual machines of what they may have there, and how
//! busy its processors are. A virtual machine is expected to take its part of that with it, by its number of processors.
//!
//! Only groups of virtual machines are moved, live, and only by the rules of [`super::candidates`]; never one in maintenance, one
//! that had to leave its place (failback sees to it), nor away from a preferred owner to one that is preferred less.
//!
//! When: on a join (a node that is up for `settle_ms`, once), and every `balance_period_ms`; only while no group starts or
//! moves. The time of the last look is the property [`LAST`], written before the moves, so that a look is never made twice.

use super::candidates::{Planner, permille};
use super::manager::GroupView;
use crate::db::{BalanceMode, ClusterDb, Command, Failback, Group, GroupState, MoveCause, MoveKind, Node};
use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Property of the cluster: when it was looked last (Unix ms).
pub const LAST: &str = "balance.last";

/// Why it is looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// That node joined: moves go only there.
    Join(NodeId),
    /// From time to time.
    Timer,
    /// An administrator asks.
    DryRun,
}

/// A move that is due.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// The group.
    pub group: String,
    /// Its owner.
    pub from: NodeId,
    /// Its next owner.
    pub to: NodeId,
    /// Why, in words with numbers.
    pub why: String,
}

/// What is not moved although its node is loaded too much, or why there is nothing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// A group or a node.
    pub what: String,
    /// Why, in words.
    pub why: String,
}

/// What a look finds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balance {
    /// At most `max_parallel_moves`, in order.
    pub moves: Vec<Move>,
    /// The rest.
    pub kept: Vec<Kept>,
}

/// What balancing would do now, whatever the setting `balance` says.
#[must_use]
pub fn balance(db: &ClusterDb, view: &GroupView, trigger: Trigger) -> Balance {
    let mut planner = Planner::new(db, view);
    Look::new(&planner).run(&mut planner, trigger)
}

/// Rule 7 of the manager.
pub(super) fn when_due(planner: &mut Planner<'_>) {
    let db = planner.db;
    let moves =
        |command: &Command| matches!(command, Command::GroupAssign { .. } | Command::GroupRelease { .. });
    if planner.commands.iter().any(moves) || db.settings.balance == BalanceMode::Off {
        return;
    }
    let last = db.properties.get(LAST).and_then(|text| text.parse().ok()).unwrap_or(0_u64);
    let due = due(planner, last);
    if due.is_empty() || !quiet(planner) {
        return;
    }
    let value = Some(planner.view.now_unix_ms.to_string());
    planner.commands.push(Command::Property { key: LAST.into(), value });
    for trigger in due {
        let look = Look::new(planner);
        look.run(planner, trigger);
    }
}

fn due(planner: &Planner<'_>, last: u64) -> Vec<Trigger> {
    let db = planner.db;
    let now = planner.view.now_unix_ms;
    // A clock that was set back must not stop it for ever.
    let last = if last > now.saturating_add(db.settings.balance_period_ms) { 0 } else { last };
    let settled = |node: &&Node| node.since_unix_ms.saturating_add(db.settings.settle_ms);
    let joined = db.nodes.values().filter(|node| node.takes_volumes());
    let joined = joined.filter(|node| settled(node) <= now && last < settled(node));
    let mut due: Vec<Trigger> = joined.map(|node| Trigger::Join(node.id)).collect();
    let period_over = now.saturating_sub(last) >= db.settings.balance_period_ms;
    if db.settings.balance == BalanceMode::Always && period_over {
        due = vec![Trigger::Timer];
    }
    due
}

/// Nothing starts or moves, and there is something to balance.
fn quiet(planner: &Planner<'_>) -> bool {
    let db = planner.db;
    let busy = |group: &&Group| {
        matches!(group.state, GroupState::Pending | GroupState::Releasing { .. })
            && db.group_owner_stands(group)
    };
    !db.groups.values().any(|group| busy(&group))
        && db.resources.values().any(|resource| resource.kind == "VirtualMachine")
}

/// A node's load, and what it is made of.
#[derive(Debug, Clone, Copy)]
struct Load {
    memory_mib: u64,
    has_memory_mib: u64,
    /// Thousandths of one processor that are busy.
    busy: u64,
    has_cpus: u64,
    /// Processors promised to virtual machines.
    promised_cpus: u64,
}

impl Load {
    fn memory_permille(&self) -> u64 {
        permille(self.memory_mib, self.has_memory_mib)
    }

    fn cpu_permille(&self) -> u64 {
        self.busy.checked_div(self.has_cpus).unwrap_or(0)
    }

    fn permille(&self) -> u64 {
        self.memory_permille().max(self.cpu_permille())
    }

    fn add(mut self, part: Part) -> Load {
        self.memory_mib = self.memory_mib.saturating_add(part.memory_mib);
        self.busy = self.busy.saturating_add(part.busy);
        self.promised_cpus = self.promised_cpus.saturating_add(part.cpus);
        self
    }

    fn less(mut self, part: Part) -> Load {
        self.memory_mib = self.memory_mib.saturating_sub(part.memory_mib);
        self.busy = self.busy.saturating_sub(part.busy);
        self.promised_cpus = self.promised_cpus.saturating_sub(part.cpus);
        self
    }

    /// What a group of that size has part of.
    fn part(&self, (memory_mib, cpus): (u64, u64)) -> Part {
        let busy = self.busy.saturating_mul(cpus).checked_div(self.promised_cpus.max(cpus)).unwrap_or(0);
        Part { memory_mib, busy, cpus }
    }
}

/// A group's part of a load.
#[derive(Debug, Clone, Copy)]
struct Part {
    memory_mib: u64,
    busy: u64,
    cpus: u64,
}

/// A move that would help; the least is the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Choice<'a> {
    worst_permille: u64,
    memory_mib: u64,
    group: &'a str,
    to: NodeId,
}

struct Look {
    loads: BTreeMap<NodeId, Load>,
    level: u64,
}

impl Look {
    fn new(planner: &Planner<'_>) -> Look {
        let mut loads = BTreeMap::new();
        for node in planner.db.nodes.values().filter(|node| node.takes_volumes()) {
            let Some(report) = planner.report(node.id) else { continue };
            let promised = planner.promised(node.id);
            let load = Load {
                memory_mib: promised.memory_mib,
                has_memory_mib: report.memory_mib,
                busy: u64::from(report.cpu_permille) * u64::from(report.cpus),
                has_cpus: u64::from(report.cpus),
                promised_cpus: promised.cpus,
            };
            loads.insert(node.id, load);
        }
        Look { loads, level: planner.db.settings.balance_level.permille() }
    }

    fn run(mut self, planner: &mut Planner<'_>, trigger: Trigger) -> Balance {
        let db = planner.db;
        let mut balance = Balance::default();
        let mut sources: Vec<NodeId> = self.loads.keys().copied().collect();
        sources.sort_by_key(|node| (Reverse(self.loads[node].permille()), *node));
        for from in sources {
            while self.loads[&from].permille() > self.level {
                if !planner.room_to_move() {
                    let what = db.node_name(from);
                    let why = format!("{}; as many moves as allowed are under way", self.shown(from));
                    balance.kept.push(Kept { what, why });
                    break;
                }
                let mut kept = Vec::new();
                let Some(best) = self.best_move(planner, from, trigger, &mut kept) else {
                    let why = format!("{}; no move makes it better", self.shown(from));
                    balance.kept.push(Kept { what: db.node_name(from), why });
                    balance.kept.append(&mut kept);
                    break;
                };
                balance.moves.extend(self.go(planner, from, best));
            }
        }
        if balance.moves.is_empty() && balance.kept.is_empty() {
            for node in self.loads.keys() {
                balance.kept.push(Kept { what: db.node_name(*node), why: self.shown(*node) });
            }
        }
        balance
    }

    /// The node's load in words.
    fn shown(&self, node: NodeId) -> String {
        let load = &self.loads[&node];
        let (percent, level) = (load.permille() / 10, self.level / 10);
        let than = if load.permille() > self.level { "more" } else { "no more" };
        format!(
            "{percent} % loaded (memory {} %, processors {} %), {than} than {level} %",
            load.memory_permille() / 10,
            load.cpu_permille() / 10
        )
    }

    fn best_move<'a>(
        &self,
        planner: &Planner<'a>,
        from: NodeId,
        trigger: Trigger,
        kept: &mut Vec<Kept>,
    ) -> Option<Choice<'a>> {
        let db = planner.db;
        let mut best: Option<Choice<'a>> = None;
        for group in db.groups.values().filter(|group| group.owner == Some(from)) {
            if planner.touched.contains(group.name.as_str()) {
                continue;
            }
            if let Err(why) = may_move(planner, group) {
                kept.push(Kept { what: group.name.clone(), why: why.into() });
                continue;
            }
            let mut why = Vec::new();
            for (&to, load) in self.loads.iter().filter(|(to, _)| **to != from) {
                if matches!(trigger, Trigger::Join(joined) if joined != to) {
                    continue;
                }
                match self.would_be(planner, group, (from, to, load)) {
                    Ok(option) => best = Some(best.map_or(option, |best| best.min(option))),
                    Err(no) => why.push(no),
                }
            }
            if !why.is_empty() {
                kept.push(Kept { what: group.name.clone(), why: why.join("; ") });
            }
        }
        best
    }

    fn would_be<'a>(
        &self,
        planner: &Planner<'a>,
        group: &'a Group,
        (from, to, load): (NodeId, NodeId, &Load),
    ) -> Result<Choice<'a>, String> {
        let db = planner.db;
        let Some(node) = db.nodes.get(&to) else { return Err(String::new()) };
        planner.fit(group, node).map_err(|unfit| unfit.about(node))?;
        if group.rank(to) > group.rank(from) {
            return Err(format!("{} is preferred less than its owner", node.name));
        }
        let company = |node| planner.company(group, node, false).count();
        if company(to) > company(from) {
            return Err(format!("{} has more groups of its classes than its owner", node.name));
        }
        let part = self.loads[&from].part(planner.needs(group));
        let (source, target) = (self.loads[&from].less(part).permille(), load.add(part).permille());
        if target > source {
            return Err(format!(
                "{} would be loaded {} %, its owner {} %",
                node.name,
                target / 10,
                source / 10
            ));
        }
        let worst_permille = source.max(target);
        Ok(Choice { worst_permille, memory_mib: part.memory_mib, group: &group.name, to })
    }

    fn go<'a>(&mut self, planner: &mut Planner<'a>, from: NodeId, option: Choice<'a>) -> Option<Move> {
        let db = planner.db;
        let group = db.groups.get(option.group)?;
        let to = option.to;
        let part = self.loads[&from].part(planner.needs(group));
        let (source, target) = (self.loads[&from], self.loads[&to]);
        let (after, then) = (source.less(part), target.add(part));
        let (from_name, to_name) = (db.node_name(from), db.node_name(to));
        let why = format!(
            "{from_name} is {}; without these {} MiB it is {} %, and {to_name} goes from {} % to {} %",
            self.shown(from),
            part.memory_mib,
            after.permille() / 10,
            target.permille() / 10,
            then.permille() / 10
        );
        self.loads.insert(from, after);
        self.loads.insert(to, then);
        planner.release(group, Some(to), (MoveKind::Live, MoveCause::Balance), why.clone());
        Some(Move { group: group.name.clone(), from, to, why })
    }
}

/// May the group be moved at all?
fn may_move(planner: &Planner<'_>, group: &Group) -> Result<(), &'static str> {
    let kinds = || planner.resources(&group.name).iter().map(|resource| resource.kind.as_str());
    if !kinds().any(|kind| kind == "VirtualMachine") {
        return Err("it is no virtual machine");
    }
    if !kinds().all(|kind| matches!(kind, "VirtualMachine" | "ClusterSharedVolume")) {
        return Err("it has resources that do not move while they run");
    }
    if group.maintenance {
        return Err("it is in maintenance");
    }
    let preferred_less = group.owner.is_some_and(|owner| group.rank(owner) > 0);
    if group.displaced && group.policy.failback != Failback::Never && preferred_less {
        return Err("it waits to go back to its own place");
    }
    if group.policy.move_kind != MoveKind::Live {
        return Err("its policy does not move it while it runs");
    }
    if group.state != GroupState::Online {
        return Err("it is not online");
    }
    if planner.movable(group).is_none() {
        return Err("it is being moved or stopped");
    }
    Ok(())
}
