//! A case as a file: what it may contain (see `cases/README.md`), and the database and the view that it stands for.

use crate::db::tests::{Bed, START_MS, n, new_resource};
use crate::db::{
    AdminState, AntiAffinity, Command, Failback, Group, GroupFailure, GroupPolicy, GroupState, MoveCause,
    MoveKind, NewResource, NodeState, ResourceState,
};
use crate::failover::NodeReport;
use crate::groups::{balance, manager::GroupView};
use csv_types::NodeId;
use serde::Deserialize;
use std::collections::BTreeMap;

const DAY_MS: u64 = 86_400_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CaseFile {
    pub(super) about: String,
    #[serde(default = "noon")]
    clock: String,
    #[serde(default)]
    utc_offset_min: i32,
    #[serde(default)]
    balanced: Option<String>,
    #[serde(default)]
    settings: BTreeMap<String, toml::Value>,
    nodes: BTreeMap<String, NodeSpec>,
    groups: BTreeMap<String, GroupSpec>,
    pub(super) plan: Vec<String>,
    #[serde(default)]
    pub(super) steps: Vec<Step>,
    #[serde(default)]
    pub(super) verdicts: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    pub(super) explain: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    pub(super) waiting: BTreeMap<String, String>,
    pub(super) balance: Option<Vec<String>>,
    pub(super) kept: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Step {
    #[serde(default)]
    pub(super) after: Option<String>,
    #[serde(default)]
    pub(super) happens: Vec<String>,
    pub(super) plan: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct NodeSpec {
    state: String,
    #[serde(rename = "for")]
    age: String,
    why: String,
    admin: String,
    leaving: bool,
    stopped: bool,
    given_up_by: Option<String>,
    anew: bool,
    memory: u64,
    used: u64,
    cpus: u32,
    cpu: u32,
    pub(super) silent: bool,
}

impl Default for NodeSpec {
    fn default() -> Self {
        NodeSpec {
            state: "up".into(),
            age: "1 h".into(),
            why: "not heard".into(),
            admin: "active".into(),
            leaving: false,
            stopped: false,
            given_up_by: None,
            anew: false,
            memory: 0,
            used: 0,
            cpus: 0,
            cpu: 0,
            silent: false,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct GroupSpec {
    owner: Option<String>,
    state: Option<String>,
    why: String,
    how: String,
    cause: String,
    #[serde(rename = "for")]
    age: String,
    want: String,
    maintenance: bool,
    displaced: bool,
    ordered: Option<String>,
    last_owner: Option<String>,
    failovers: Vec<String>,
    failures: BTreeMap<String, String>,
    given_up: Option<String>,
    priority: u32,
    persistent: bool,
    preferred: Vec<String>,
    start_after: Vec<String>,
    threshold: Option<u32>,
    period: String,
    failback: String,
    apart: Vec<String>,
    rather_apart: Vec<String>,
    #[serde(rename = "move")]
    move_kind: String,
    vm: Option<u64>,
    cpus: u32,
    #[serde(rename = "type")]
    kind: String,
    possible: Vec<String>,
    resources: Option<Vec<ResourceSpec>>,
}

impl Default for GroupSpec {
    fn default() -> Self {
        GroupSpec {
            owner: None,
            state: None,
            why: "it does not work".into(),
            how: "live".into(),
            cause: "order".into(),
            age: "1 h".into(),
            want: "online".into(),
            maintenance: false,
            displaced: false,
            ordered: None,
            last_owner: None,
            failovers: Vec::new(),
            failures: BTreeMap::new(),
            given_up: None,
            priority: 2000,
            persistent: true,
            preferred: Vec::new(),
            start_after: Vec::new(),
            threshold: None,
            period: "6 h".into(),
            failback: "never".into(),
            apart: Vec::new(),
            rather_apart: Vec::new(),
            move_kind: "live".into(),
            vm: None,
            cpus: 1,
            kind: "IPAddress".into(),
            possible: Vec::new(),
            resources: None,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResourceSpec {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    depends: String,
    #[serde(default)]
    possible: Vec<String>,
    #[serde(default)]
    memory: Option<u64>,
    #[serde(default)]
    offline: bool,
}

fn noon() -> String {
    "12:00".into()
}

pub(super) fn duration_ms(text: &str) -> u64 {
    let (number, unit) = text.split_once(' ').unwrap_or_else(|| panic!("\"{text}\" is no duration"));
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => DAY_MS,
        _ => panic!("\"{text}\": the units are ms, s, min, h, d"),
    };
    number.parse::<u64>().unwrap_or_else(|_| panic!("\"{text}\" is no duration")) * unit_ms
}

fn minute(text: &str) -> u16 {
    let (hours, minutes) = text.split_once(':').unwrap_or_else(|| panic!("\"{text}\" is no time of day"));
    hours.parse::<u16>().unwrap() * 60 + minutes.parse::<u16>().unwrap()
}

pub(super) fn node_id(name: &str) -> NodeId {
    let number = name.strip_prefix('n').and_then(|number| number.parse().ok());
    n(number.unwrap_or_else(|| panic!("\"{name}\" is no node; they are n1, n2, ...")))
}

fn ids(names: &[String]) -> Vec<NodeId> {
    names.iter().map(|name| node_id(name)).collect()
}

pub(super) fn word<T: serde::de::DeserializeOwned>(text: &str) -> T {
    serde_json::from_value(text.into()).unwrap_or_else(|_| panic!("\"{text}\" is not known there"))
}

impl CaseFile {
    /// The database that the file tells of, and its nodes' reports.
    pub(super) fn bed(&self) -> Bed {
        let mut bed = Bed::nodes(u32::try_from(self.nodes.len()).unwrap());
        let midnight = (START_MS / DAY_MS + 1) * DAY_MS;
        let offset_ms = i64::from(self.utc_offset_min) * 60_000;
        bed.now =
            (midnight + u64::from(minute(&self.clock)) * 60_000).checked_add_signed(-offset_ms).unwrap();
        for (key, value) in &self.settings {
            bed.setting(key, value.as_str().map_or_else(|| value.to_string(), Into::into).as_str());
        }
        for (name, node) in &self.nodes {
            node.put(&mut bed, name);
        }
        let down: Vec<NodeId> =
            bed.db.nodes.values().filter(|node| !node.is_up()).map(|node| node.id).collect();
        for node in down {
            let leader = bed.leader(None);
            bed.db.down_by.entry(node).or_insert(leader);
        }
        for (name, group) in &self.groups {
            group.create(&mut bed, name);
        }
        for (name, group) in &self.groups {
            group.put(&mut bed, name);
        }
        let looked = bed.now - self.balanced.as_deref().map_or(0, duration_ms);
        bed.db.properties.insert(balance::LAST.into(), looked.to_string());
        bed.db.check().unwrap_or_else(|broken| panic!("the case is not possible: {broken}"));
        bed
    }

    /// What the nodes report now.
    pub(super) fn view(&self, bed: &Bed, silent: &BTreeMap<NodeId, bool>) -> GroupView {
        let mut view = GroupView {
            now_unix_ms: bed.now,
            utc_offset_min: self.utc_offset_min,
            me: bed.leader(None),
            reports: BTreeMap::new(),
        };
        for (name, spec) in &self.nodes {
            let node = &bed.db.nodes[&node_id(name)];
            if node.is_up() && !silent.get(&node.id).copied().unwrap_or(spec.silent) {
                let report = NodeReport {
                    incarnation: node.incarnation,
                    cpus: spec.cpus,
                    memory_mib: spec.memory,
                    memory_used_mib: spec.used,
                    cpu_permille: spec.cpu * 10,
                    ..NodeReport::default()
                };
                view.reports.insert(node.id, report);
            }
        }
        view
    }
}

impl NodeSpec {
    fn put(&self, bed: &mut Bed, name: &str) {
        let now = bed.now;
        let node = bed.db.nodes.get_mut(&node_id(name)).unwrap_or_else(|| panic!("nodes are n1, n2, ..."));
        node.state = word::<NodeState>(&self.state);
        node.admin = word::<AdminState>(&self.admin);
        node.leaving = self.leaving;
        node.stopped = self.stopped;
        node.since_unix_ms = now - duration_ms(&self.age);
        if self.anew {
            node.incarnation = 2;
        }
        if !node.is_up() {
            node.down_reason.clone_from(&self.why);
        }
        bed.db.down_by.extend(self.given_up_by.as_deref().map(|by| (node_id(name), node_id(by))));
    }
}

impl GroupSpec {
    fn policy(&self) -> GroupPolicy {
        let class = |hard: bool| move |class: &String| AntiAffinity { class: class.clone(), hard };
        GroupPolicy {
            preferred: ids(&self.preferred),
            persistent: self.persistent,
            priority: self.priority,
            start_after: Vec::new(),
            failover_threshold: self.threshold,
            failover_period_ms: duration_ms(&self.period),
            failback: match self.failback.as_str() {
                "never" => Failback::Never,
                "at once" => Failback::AtOnce,
                window => {
                    let (from, to) = window.split_once('-').unwrap();
                    Failback::Window { from_minute: minute(from), to_minute: minute(to) }
                }
            },
            anti_affinity: self
                .apart
                .iter()
                .map(class(true))
                .chain(self.rather_apart.iter().map(class(false)))
                .collect(),
            move_kind: word::<MoveKind>(&self.move_kind),
        }
    }

    fn resources(&self, group: &str) -> Vec<NewResource> {
        let one = ResourceSpec {
            name: group.into(),
            kind: if self.vm.is_some() { "VirtualMachine".into() } else { self.kind.clone() },
            depends: String::new(),
            possible: self.possible.clone(),
            memory: self.vm,
            offline: false,
        };
        let specs = self.resources.clone().unwrap_or(vec![one]);
        let new = |spec: ResourceSpec| {
            let mut new = new_resource(&spec.name, group, &spec.depends);
            new.kind = spec.kind;
            new.possible = ids(&spec.possible);
            new.want_online = !spec.offline;
            if let Some(memory_mib) = spec.memory {
                new.properties.insert("memory_mib".into(), memory_mib.to_string());
                new.properties.insert("cpus".into(), self.cpus.to_string());
            }
            new
        };
        specs.into_iter().map(new).collect()
    }

    fn create(&self, bed: &mut Bed, name: &str) {
        bed.ok(Command::GroupAdd { name: name.into(), policy: self.policy() });
        for resource in self.resources(name) {
            bed.ok(Command::ResourceAdd { resource });
        }
    }

    fn put(&self, bed: &mut Bed, name: &str) {
        if !self.start_after.is_empty() {
            let policy = GroupPolicy { start_after: self.start_after.clone(), ..self.policy() };
            bed.ok(Command::GroupPolicy { name: name.into(), policy });
        }
        let ago = |text: &String| bed.now - duration_ms(text);
        let policy = bed.db.groups[name].policy.clone();
        let group = Group {
            want_online: self.want == "online",
            maintenance: self.maintenance,
            owner: self.owner.as_deref().map(node_id),
            incarnation: u64::from(self.owner.is_some()),
            generation: 1,
            state: self.state(),
            displaced: self.displaced,
            ordered_unix_ms: self.ordered.as_ref().map(ago),
            last_owner: self.last_owner.as_deref().map(node_id),
            failovers: self.failovers.iter().map(ago).collect(),
            failures: self
                .failures
                .iter()
                .map(|(node, at)| GroupFailure {
                    node: node_id(node),
                    at_unix_ms: ago(at),
                    why: self.why.clone(),
                })
                .collect(),
            given_up: self.given_up.clone(),
            ..Group::new(name, policy, ago(&self.age))
        };
        let of_all = match group.state {
            GroupState::Offline { .. } => ResourceState::Offline,
            GroupState::Pending => ResourceState::OnlinePending,
            GroupState::Failed { .. } => ResourceState::Failed,
            GroupState::Online | GroupState::Partial { .. } | GroupState::Releasing { .. } => {
                ResourceState::Online
            }
        };
        bed.db.groups.insert(name.into(), group);
        for resource in bed.db.resources.values_mut().filter(|resource| resource.group == name) {
            resource.status.state = of_all;
        }
    }

    fn state(&self) -> GroupState {
        let reason = self.why.clone();
        let state = self.state.as_deref();
        match state.unwrap_or(if self.owner.is_some() { "online" } else { "offline" }) {
            "offline" => GroupState::Offline { reason },
            "pending" => GroupState::Pending,
            "online" => GroupState::Online,
            "partial" => GroupState::Partial { reason },
            "failed" => GroupState::Failed { reason },
            moving => {
                let to = moving.strip_prefix("to ").unwrap_or_else(|| panic!("no state \"{moving}\""));
                let to = (to != "nobody").then(|| node_id(to));
                let (how, cause) = (word::<MoveKind>(&self.how), word::<MoveCause>(&self.cause));
                GroupState::Releasing { to, how, reason, cause }
            }
        }
    }
}
