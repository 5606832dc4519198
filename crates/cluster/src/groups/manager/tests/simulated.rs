//! The manager against obedient owners: random clusters and faults, then quiet. Nothing that is unguarded ever runs twice, no
//! assignment breaks a hard rule, everything that can be online gets there, and then nothing moves any more.

use super::super::{GroupView, plan};
use crate::db::tests::{Bed, n, new_resource};
use crate::db::{
    AntiAffinity, Applied, Command, Failback, Group, GroupPolicy, GroupState, MoveCause, MoveKind,
    ResourceState, STOP_MS,
};
use crate::failover::{self, NodeReport, View};
use crate::groups::balance;
use crate::groups::candidates::verdicts;
use csv_types::NodeId;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const NODES: u32 = 4;
const GROUPS: usize = 6;
const NODE_MIB: u64 = 4096;

/// What a group is like.
#[derive(Debug, Clone)]
struct Kind {
    kind: &'static str,
    memory_mib: u64,
    possible: Vec<u32>,
    preferred: Vec<u32>,
    priority: u32,
    persistent: bool,
    failback: bool,
    class: Option<bool>,
    after: bool,
}

/// What happens to the cluster.
#[derive(Debug, Clone)]
enum Fault {
    /// Not heard any more; it goes on for as long as a node that is cut off may.
    Cut(u32),
    Boot(u32),
    Pause(u32, bool),
    Resume(u32),
    Leave(u32),
    Silent(u32, bool),
    /// The group fails on that node from now on, or works again.
    Bad(usize, u32, bool),
    Want(usize, bool),
    Move(usize, u32, MoveKind),
    Maintenance(usize, bool),
    Possible(usize, Vec<u32>),
}

fn name(group: usize) -> String {
    format!("g{group}")
}

/// How far the clocks of the nodes are ahead, in seconds: together as far as they may.
const AHEAD_S: [i64; NODES as usize] = [0, 25, -35, 0];

struct World {
    bed: Bed,
    /// The time, by no node's clock.
    now: u64,
    /// When each node that is not heard was heard last.
    cut: BTreeMap<NodeId, u64>,
    silent: BTreeSet<NodeId>,
    bad: BTreeSet<(String, NodeId)>,
    /// Who runs what, whatever the database says.
    running: BTreeSet<(String, NodeId)>,
}

impl World {
    fn new(kinds: &[Kind]) -> Self {
        let mut bed = Bed::nodes(NODES);
        bed.setting("quarantine_failures", "0");
        bed.setting("balance_period_ms", "60000");
        bed.setting("max_parallel_starts", "2");
        bed.now += 3_600_000;
        for (number, kind) in kinds.iter().enumerate() {
            let policy = GroupPolicy {
                preferred: kind.preferred.iter().copied().map(NodeId).collect(),
                priority: kind.priority,
                persistent: kind.persistent,
                failback: if kind.failback { Failback::AtOnce } else { Failback::Never },
                anti_affinity: kind
                    .class
                    .map(|hard| AntiAffinity { class: "c".into(), hard })
                    .into_iter()
                    .collect(),
                start_after: if kind.after && number > 0 { vec![name(number - 1)] } else { Vec::new() },
                ..GroupPolicy::default()
            };
            bed.ok(Command::GroupAdd { name: name(number), policy });
            let mut resource = new_resource(&name(number), &name(number), "");
            resource.kind = kind.kind.into();
            resource.properties.insert("memory_mib".into(), kind.memory_mib.to_string());
            resource.possible = kind.possible.iter().copied().map(NodeId).collect();
            bed.ok(Command::ResourceAdd { resource });
            bed.ok(Command::GroupOnline { name: name(number) });
        }
        let (cut, silent, bad, running) = Default::default();
        let now = bed.now;
        World { bed, now, cut, silent, bad, running }
    }

    fn fault(&mut self, fault: &Fault) {
        match fault.clone() {
            Fault::Cut(node) => {
                self.cut.entry(n(node)).or_insert(self.now);
            }
            Fault::Boot(node) => {
                self.cut.remove(&n(node));
                self.running.retain(|(_, on)| *on != n(node));
                self.bed.up(node);
            }
            Fault::Pause(node, drain) => drop(self.bed.apply(Command::NodePause { node: n(node), drain })),
            Fault::Resume(node) => drop(self.bed.apply(Command::NodeResume { node: n(node) })),
            Fault::Leave(node) => {
                let incarnation = self.bed.db.nodes[&n(node)].incarnation;
                drop(self.bed.apply(Command::NodeLeave { node: n(node), incarnation }));
            }
            Fault::Silent(node, yes) => {
                self.silent.remove(&n(node));
                self.silent.extend(yes.then_some(n(node)));
            }
            Fault::Bad(group, node, yes) => {
                self.bad.remove(&(name(group), n(node)));
                self.bad.extend(yes.then_some((name(group), n(node))));
            }
            Fault::Want(group, true) => drop(self.bed.apply(Command::GroupOnline { name: name(group) })),
            Fault::Want(group, false) => {
                drop(self.bed.apply(Command::GroupOffline { name: name(group), reason: "order".into() }));
            }
            Fault::Maintenance(group, on) => {
                drop(self.bed.apply(Command::GroupMaintenance { name: name(group), on }));
            }
            Fault::Move(group, to, how) => {
                let verdicts = verdicts(&self.bed.db, &self.view(), &name(group));
                if verdicts.iter().any(|(node, verdict)| *node == n(to) && verdict.is_ok()) {
                    let generation = self.bed.db.groups[&name(group)].generation;
                    let (cause, reason) = (MoveCause::Order, "order".into());
                    let (name, to) = (name(group), Some(n(to)));
                    drop(self.bed.apply(Command::GroupRelease { name, generation, to, how, reason, cause }));
                }
            }
            Fault::Possible(group, nodes) => {
                let possible = Some(nodes.into_iter().map(NodeId).collect());
                let change = crate::db::ResourceChange { possible, ..Default::default() };
                drop(self.bed.apply(Command::ResourceSet { name: name(group), change }));
            }
        }
    }

    fn view(&self) -> GroupView {
        let heard = |node: &&NodeId| !self.cut.contains_key(*node) && !self.silent.contains(*node);
        let report = |node: &NodeId| {
            let incarnation = self.bed.db.nodes[node].incarnation;
            let report = NodeReport { incarnation, memory_mib: NODE_MIB, cpus: 4, ..NodeReport::default() };
            (*node, report)
        };
        let reports = self.bed.db.nodes.keys().filter(heard).map(report).collect();
        GroupView { now_unix_ms: self.bed.now, utc_offset_min: 0, me: self.leader(), reports }
    }

    /// The leader: the first node that is up and not cut off.
    fn leader(&self) -> NodeId {
        let nodes = self.bed.db.nodes.values();
        let up = nodes.filter(|node| node.is_up() && !self.cut.contains_key(&node.id));
        up.map(|node| node.id).next().unwrap_or(n(1))
    }

    /// One second: the leader's verdicts, its plans, then each owner does what the database says.
    fn round(&mut self) -> usize {
        self.now += 1_000;
        let leader = self.leader();
        self.bed.now = self.now.checked_add_signed(AHEAD_S[leader.0 as usize - 1] * 1_000).unwrap();
        let settings = self.bed.db.settings.clone();
        for (node, heard) in self.cut.clone() {
            let silent_ms = self.now - heard;
            let state = &self.bed.db.nodes[&node];
            if state.is_up() && silent_ms >= settings.silence_ms() {
                let (incarnation, planned) = (state.incarnation, state.leaving);
                let down = Command::NodeDown { node, incarnation, reason: "cut".into(), planned };
                self.bed.apply_by(leader, down).unwrap();
            }
            if silent_ms >= settings.contact_limit_ms() + STOP_MS {
                self.running.retain(|(_, on)| *on != node);
            }
        }
        let view = self.view();
        let volumes = View { now_unix_ms: view.now_unix_ms, me: view.me, reports: view.reports.clone() };
        for command in failover::plan(&self.bed.db, &volumes) {
            self.bed.ok(command);
        }
        let mut commands = self.plan_and_apply(&view);
        // What starts keeps lower ones waiting, and does not any more when it is moved: one plan more may follow.
        let more = self.plan_and_apply(&view);
        assert_eq!(plan(&self.bed.db, &view), [], "not idempotent after {commands:?} and {more:?}");
        commands.extend(more);
        for group in 0..GROUPS {
            self.obey(&name(group));
        }
        for node in self.bed.db.nodes.values().map(|node| node.id).collect::<Vec<_>>() {
            let leaves = self.bed.db.nodes[&node].leaving && self.bed.db.groups_of(node).is_empty();
            if leaves && !self.cut.contains_key(&node) {
                self.bed.goodbye(node, "bye");
                self.cut.insert(node, 0);
            }
        }
        let looks =
            |command: &&Command| !matches!(command, Command::Property { key, .. } if key == balance::LAST);
        commands.iter().filter(looks).count()
    }

    fn plan_and_apply(&mut self, view: &GroupView) -> Vec<Command> {
        let commands = plan(&self.bed.db, view);
        for command in &commands {
            self.check_target(command);
            let applied = self.bed.ok(command.clone());
            assert_ne!(applied, Applied::Unchanged, "{command:?} changed nothing");
        }
        commands
    }

    /// Does the plan break a hard rule?
    #[allow(clippy::wildcard_enum_match_arm, reason = "all others give nobody anything")]
    fn check_target(&self, command: &Command) {
        let db = &self.bed.db;
        let (name, to) = match command {
            Command::GroupAssign { name, to, .. } | Command::GroupRelease { name, to: Some(to), .. } => {
                (name, *to)
            }
            _ => return,
        };
        let group = &db.groups[name];
        let resource = &db.resources[name];
        assert!(resource.possible.is_empty() || resource.possible.contains(&to), "{command:?}");
        assert!(db.nodes[&to].takes_volumes(), "{command:?}");
        let there: Vec<&Group> = db
            .groups
            .values()
            .filter(|other| other.name != *name && db.group_owner_stands(other))
            .filter(|other| other.owner == Some(to) || other.home() == Some(to))
            .collect();
        let hard = |group: &Group| group.policy.anti_affinity.iter().any(|class| class.hard);
        for other in &there {
            let both = !group.policy.anti_affinity.is_empty() && !other.policy.anti_affinity.is_empty();
            assert!(!both || !(hard(group) || hard(other)), "{command:?} joins {}", other.name);
        }
        let taken: u64 = there.iter().map(|other| db.resources[&other.name].memory_mib()).sum();
        assert!(resource.memory_mib() == 0 || taken + resource.memory_mib() <= NODE_MIB, "{command:?}");
    }

    /// What the owner does about a group.
    fn obey(&mut self, name: &str) {
        let group = self.bed.db.groups[name].clone();
        let Some(owner) = group.owner.filter(|owner| !self.cut.contains_key(owner)) else { return };
        if !self.bed.db.group_owner_stands(&group) {
            return;
        }
        let (generation, here) = (group.generation, (name.to_owned(), owner));
        let (named, node) = (name.to_owned(), owner);
        match &group.state {
            GroupState::Pending => {
                let guarded = self.bed.db.resources[name].kind == "VirtualMachine";
                let twice = self.running.iter().any(|(other, on)| other == name && *on != owner);
                assert!(guarded || !twice, "{name} runs twice: {:?}", self.running);
                let bad = self.bad.contains(&here);
                let (state, of_all) = if bad {
                    (GroupState::Failed { reason: "bad".into() }, ResourceState::Failed)
                } else {
                    self.running.insert(here);
                    (GroupState::Online, ResourceState::Online)
                };
                let status = self.bed.group_status_command(name, state, of_all);
                self.bed.ok(status);
            }
            GroupState::Releasing { to, how, .. } => {
                self.running.remove(&here);
                let live = *how == MoveKind::Live && to.is_some_and(|to| self.bed.db.nodes[&to].is_up());
                self.bed.ok(if live && self.bed.db.resources[name].kind == "VirtualMachine" {
                    Command::GroupMigrated { name: named, generation, node }
                } else {
                    Command::GroupReleased { name: named, generation, node }
                });
            }
            GroupState::Online if self.bad.contains(&here) && !group.maintenance => {
                self.running.remove(&here);
                let failed = GroupState::Failed { reason: "bad".into() };
                let status = self.bed.group_status_command(name, failed, ResourceState::Failed);
                self.bed.ok(status);
            }
            GroupState::Online
            | GroupState::Partial { .. }
            | GroupState::Failed { .. }
            | GroupState::Offline { .. } => {}
        }
    }

    /// Is there a reason for the group to have no owner?
    fn may_be_without(&self, group: &Group) -> bool {
        let db = &self.bed.db;
        let after = group.policy.start_after.iter().map(|before| &db.groups[before]);
        let online = |before: &Group| before.state == GroupState::Online && db.group_owner_stands(before);
        let mut unmet = after.filter(|before| before.want_online && !online(before));
        let nobody = verdicts(db, &self.view(), &group.name).iter().all(|(_, verdict)| verdict.is_err());
        !group.want_online || group.policy.priority == 0 || nobody || unmet.next().is_some()
    }
}

fn kind() -> impl Strategy<Value = Kind> {
    let some_nodes = || prop::collection::btree_set(1..=NODES, 0..3usize);
    let kinds = prop_oneof![Just("VirtualMachine"), Just("VirtualMachine"), Just("GenericApplication")];
    let priority = prop_oneof![Just(0_u32), Just(1000), Just(2000), Just(2000), Just(3000)];
    let class = prop_oneof![3 => Just(None), 2 => Just(Some(true)), 1 => Just(Some(false))];
    (
        (kinds, 0..3u64, some_nodes(), some_nodes()),
        (priority, any::<bool>(), any::<bool>(), class, prop::bool::weighted(0.2)),
    )
        .prop_map(
            |((kind, gib, possible, preferred), (priority, persistent, failback, class, after))| Kind {
                kind,
                memory_mib: 512 + gib * 1024,
                possible: possible.into_iter().collect(),
                preferred: preferred.into_iter().collect(),
                priority,
                persistent,
                failback,
                class,
                after,
            },
        )
}

fn fault() -> impl Strategy<Value = Fault> {
    let (node, group) = (1..=NODES, 0..GROUPS);
    let how = prop_oneof![Just(MoveKind::Live), Just(MoveKind::Shutdown)];
    let nodes = prop::collection::btree_set(1..=NODES, 0..3usize);
    prop_oneof![
        4 => node.clone().prop_map(Fault::Cut),
        5 => node.clone().prop_map(Fault::Boot),
        2 => (node.clone(), any::<bool>()).prop_map(|(node, drain)| Fault::Pause(node, drain)),
        3 => node.clone().prop_map(Fault::Resume),
        1 => node.clone().prop_map(Fault::Leave),
        1 => (node.clone(), any::<bool>()).prop_map(|(node, yes)| Fault::Silent(node, yes)),
        3 => (group.clone(), node.clone(), any::<bool>()).prop_map(|(group, node, yes)| Fault::Bad(group, node, yes)),
        3 => (group.clone(), any::<bool>()).prop_map(|(group, on)| Fault::Want(group, on)),
        2 => (group.clone(), node, how).prop_map(|(group, node, how)| Fault::Move(group, node, how)),
        1 => (group.clone(), any::<bool>()).prop_map(|(group, on)| Fault::Maintenance(group, on)),
        1 => (group, nodes).prop_map(|(group, nodes)| Fault::Possible(group, nodes.into_iter().collect())),
    ]
}

proptest! {
    #![proptest_config(crate::db::tests::cases(200))]

    #[test]
    fn what_can_be_online_gets_an_owner_and_stays(
        kinds in prop::collection::vec(kind(), GROUPS),
        faults in prop::collection::vec((0..20usize, fault()), 0..30),
    ) {
        let mut world = World::new(&kinds);
        for (rounds, fault) in faults {
            for _ in 0..rounds {
                world.round();
            }
            world.fault(&fault);
        }
        world.bad.clear();
        world.silent.clear();
        for _ in 0..600 {
            world.round();
        }
        for group in world.bed.db.groups.values() {
            let stands = world.bed.db.group_owner_stands(group);
            prop_assert!(stands || world.may_be_without(group), "{group:?}");
            prop_assert!(group.want_online || group.owner.is_none(), "{group:?}");
        }
        let more: usize = (0..300).map(|_| world.round()).sum();
        prop_assert_eq!(more, 0, "it does not come to rest");
    }
}

/// `cargo test --release -p csv-cluster -- --ignored --nocapture cost_of_a_plan`
#[test]
#[ignore = "a measurement, not a check"]
#[allow(clippy::disallowed_methods, reason = "it measures time")]
fn cost_of_a_plan_with_nothing_to_do() {
    let mut bed = Bed::nodes(16);
    bed.setting("max_parallel_starts", "256");
    for number in 0..1000_u32 {
        let name = format!("vm{number}");
        bed.ok(Command::GroupAdd { name: name.clone(), policy: GroupPolicy::default() });
        for suffix in ["", "-net"] {
            let mut resource = new_resource(&format!("{name}{suffix}"), &name, "");
            resource.kind = if suffix.is_empty() { "VirtualMachine" } else { "IPAddress" }.into();
            bed.ok(Command::ResourceAdd { resource });
        }
        bed.ok(Command::GroupOnline { name: name.clone() });
        bed.assign_group(&name, number % 16 + 1);
        bed.ok(bed.group_status_command(&name, GroupState::Online, ResourceState::Online));
    }
    bed.now += 60_000;
    bed.db.properties.insert(balance::LAST.into(), bed.now.to_string());
    let report = |node: &crate::db::Node| {
        let report = NodeReport { incarnation: 1, memory_mib: 1 << 20, cpus: 64, ..NodeReport::default() };
        (node.id, report)
    };
    let reports = bed.db.nodes.values().map(report).collect();
    let view = GroupView { now_unix_ms: bed.now, utc_offset_min: 0, me: n(1), reports };
    let began = std::time::Instant::now();
    let rounds = 200;
    for _ in 0..rounds {
        assert_eq!(plan(&bed.db, &view), []);
    }
    let each = began.elapsed() / rounds;
    println!("1000 groups, 2000 resources, 16 nodes, nothing to do: {each:?} a plan");
    bed.down(1);
    let began = std::time::Instant::now();
    let commands = plan(&bed.db, &view).len();
    println!("a node with 63 groups is lost: {commands} commands in {:?}", began.elapsed());
    for number in 2..=16 {
        bed.down(number);
    }
    for command in plan(&bed.db, &view) {
        bed.ok(command);
    }
    let began = std::time::Instant::now();
    assert_eq!(plan(&bed.db, &view), []);
    println!("1000 groups that no node can take, said already: {:?} a plan", began.elapsed());
}
