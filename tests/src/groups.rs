//! Groups and resources of a lab's cluster: made and ordered about with csvctl, watched in the database.

use crate::lab::Lab;
use crate::{membership, wait};
use anyhow::{Context as _, bail, ensure};
use csv_cluster::db::{
    ClusterDb, Command, FileHead, Group, GroupState, MoveKind, NewResource, Resource, ResourcePolicy,
    ResourceState,
};
use csv_types::NodeId;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// A resource to be made, with what its type and group need; the rest is as it is by default.
#[must_use]
pub fn resource(group: &str, name: &str, kind: &str, properties: &[(&str, &str)]) -> NewResource {
    NewResource {
        name: name.to_owned(),
        kind: kind.to_owned(),
        group: group.to_owned(),
        properties: properties.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        depends: String::new(),
        possible: Vec::new(),
        policy: ResourcePolicy::default(),
        checkpoints: Vec::new(),
        want_online: true,
    }
}

/// Where groups are asked about: csvd of a node.
#[derive(Debug, Clone, Copy)]
pub struct Groups<'a> {
    lab: &'a Lab,
    node: &'a str,
}

impl<'a> Groups<'a> {
    /// By csvd of that node.
    #[must_use]
    pub fn of(lab: &'a Lab, node: &'a str) -> Groups<'a> {
        Groups { lab, node }
    }

    /// Sends csvd a request about the cluster.
    ///
    /// # Errors
    /// It cannot be asked, or refuses.
    pub fn ask(&self, what: &Value) -> anyhow::Result<Value> {
        let request = json!({ "request": "cluster", "what": what });
        let answer = membership::answer(self.lab, self.node, &request)?;
        if answer["answer"] == "error" {
            bail!("{}", answer["message"].as_str().unwrap_or("refused without a word"));
        }
        Ok(answer["data"].clone())
    }

    /// The database as the node has it.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn db(&self) -> anyhow::Result<ClusterDb> {
        Ok(serde_json::from_value(self.ask(&json!({ "cluster": "db" }))?)?)
    }

    /// Sends a command for the database.
    ///
    /// # Errors
    /// It is refused.
    pub fn command(&self, command: &Command) -> anyhow::Result<()> {
        self.ask(&json!({ "cluster": "command", "command": command })).map(drop)
    }

    /// A node's number.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn number(&self, node: &str) -> anyhow::Result<NodeId> {
        self.db()?.node_by_name(node).map(|node| node.id).with_context(|| format!("no node {node}"))
    }

    /// csvctl on the node.
    ///
    /// # Errors
    /// It fails.
    pub fn ctl(&self, args: &[&str]) -> anyhow::Result<String> {
        self.lab.ctl(self.node, args)
    }

    /// Makes a group, with that policy.
    ///
    /// # Errors
    /// Refused.
    pub fn add(&self, name: &str, policy: &[&str]) -> anyhow::Result<()> {
        self.ctl(&[&["group", "add", name], policy].concat()).map(drop)
    }

    /// Makes a resource.
    ///
    /// # Errors
    /// Refused.
    pub fn add_resource(&self, resource: &NewResource) -> anyhow::Result<()> {
        let args = arguments(&self.db()?, resource);
        let mut words = vec!["resource", "add", resource.name.as_str()];
        words.extend(args.iter().map(String::as_str));
        self.ctl(&words).map(drop)
    }

    /// Changes a property, or gives it back its default.
    ///
    /// # Errors
    /// Refused.
    pub fn set(&self, resource: &str, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        let pair = value.map(|value| format!("{key}={value}"));
        let change = pair.as_ref().map_or(["--unset", key], |pair| ["--set", pair]);
        self.ctl(&[&["resource", "set", resource], &change[..]].concat()).map(drop)
    }

    /// Brings a group online. csvctl has waited for it, so nothing else need.
    ///
    /// # Errors
    /// It did not come online.
    pub fn online(&self, group: &str) -> anyhow::Result<()> {
        self.ctl(&["group", "online", group])?;
        self.is_reached(group, |group| group.state == GroupState::Online)
    }

    /// Takes a group offline.
    ///
    /// # Errors
    /// It did not go offline.
    pub fn offline(&self, group: &str) -> anyhow::Result<()> {
        self.ctl(&["group", "offline", group])?;
        self.is_reached(group, |group| matches!(group.state, GroupState::Offline { .. }))
    }

    /// Orders something of the group, and does not wait until it is reached: `online`, `offline`.
    ///
    /// # Errors
    /// Refused.
    pub fn order(&self, verb: &str, group: &str) -> anyhow::Result<()> {
        self.ctl(&["group", verb, group, "--no-wait"]).map(drop)
    }

    /// Has a group moved, and does not wait for it.
    ///
    /// # Errors
    /// Refused.
    pub fn start_move(&self, group: &str, to: &str, how: MoveKind) -> anyhow::Result<()> {
        self.ctl(&["group", "move", group, "--to", to, &format!("--{how}"), "--no-wait"]).map(drop)
    }

    /// Moves a group.
    ///
    /// # Errors
    /// It did not come online there.
    pub fn move_to(&self, group: &str, to: &str, how: MoveKind) -> anyhow::Result<()> {
        self.ctl(&["group", "move", group, "--to", to, &format!("--{how}")])?;
        let number = self.number(to)?;
        self.is_reached(group, |group| group.state == GroupState::Online && group.owner == Some(number))
    }

    /// What csvctl has waited for is so.
    fn is_reached(&self, name: &str, is_so: impl Fn(&Group) -> bool) -> anyhow::Result<()> {
        ensure!(is_so(&self.group(name)?), "csvctl was satisfied with this: {}", self.describe(name));
        Ok(())
    }

    /// The group.
    ///
    /// # Errors
    /// There is none.
    pub fn group(&self, name: &str) -> anyhow::Result<Group> {
        group_of(&self.db()?, name).cloned()
    }

    /// The resource.
    ///
    /// # Errors
    /// There is none.
    pub fn resource(&self, name: &str) -> anyhow::Result<Resource> {
        self.db()?.resources.remove(name).with_context(|| format!("there is no resource {name}"))
    }

    /// Name of the node that has the group.
    ///
    /// # Errors
    /// Nobody has it.
    pub fn owner(&self, group: &str) -> anyhow::Result<String> {
        let db = self.db()?;
        let owner = group_of(&db, group)?.owner.with_context(|| format!("nobody has {group}"))?;
        Ok(db.node_name(owner))
    }

    /// Waits until the group is so.
    ///
    /// # Errors
    /// Not in time, with how it and its resources are then.
    pub fn wait(
        &self,
        group: &str,
        what: &str,
        deadline: Duration,
        is_so: impl Fn(&Group) -> bool,
    ) -> anyhow::Result<Group> {
        let reached = wait::until(&format!("group {group} {what}"), deadline, || {
            Ok(Some(self.group(group)?).filter(&is_so))
        });
        reached.with_context(|| self.describe(group))
    }

    /// Waits until the group is online.
    ///
    /// # Errors
    /// Not in time.
    pub fn wait_online(&self, group: &str, deadline: Duration) -> anyhow::Result<Group> {
        self.wait(group, "to be online", deadline, |group| group.state == GroupState::Online)
    }

    /// Waits until the group is online on that node.
    ///
    /// # Errors
    /// Not in time.
    pub fn wait_online_at(&self, group: &str, node: &str, deadline: Duration) -> anyhow::Result<()> {
        let number = self.number(node)?;
        self.wait(group, &format!("to be online on {node}"), deadline, |group| {
            group.state == GroupState::Online && group.owner == Some(number)
        })
        .map(drop)
    }

    /// Waits until the resource is in that state.
    ///
    /// # Errors
    /// Not in time.
    pub fn wait_resource(
        &self,
        name: &str,
        state: ResourceState,
        deadline: Duration,
    ) -> anyhow::Result<Resource> {
        wait::until(&format!("resource {name} to be {state}"), deadline, || {
            let resource = self.resource(name)?;
            let status = &resource.status;
            ensure!(status.state == state, "it is {} ({})", status.state, status.why);
            Ok(Some(resource))
        })
    }

    /// Waits until the cluster keeps a file of a resource as it is on `node`, by its length and when it was written; or a setting
    /// (`sysctl:NAME`), by its length.
    ///
    /// # Errors
    /// A file that cannot be looked at, or the deadline.
    pub fn wait_kept(&self, node: &str, path: &str, deadline: Duration) -> anyhow::Result<()> {
        wait::until(&format!("{path} to be kept by the cluster"), deadline, || {
            let is = match path.strip_prefix("sysctl:") {
                None => self.lab.sh(node, &format!("stat -c '%s %.9Y' {path}"))?,
                Some(name) => {
                    self.lab.sh(node, &format!("echo $(wc -c < /proc/sys/{}) 0.0", name.replace('.', "/")))?
                }
            };
            let kept = self.db()?.checkpoints.into_values();
            let mut heads = kept.filter_map(|value| FileHead::decode(&value).map(|(head, _)| head));
            let as_it_is = |head: &FileHead| {
                let (seconds, ns) =
                    (head.modified_unix_ns / 1_000_000_000, head.modified_unix_ns % 1_000_000_000);
                let written =
                    if head.modified_unix_ns == 0 { "0.0".into() } else { format!("{seconds}.{ns:09}") };
                head.path == path && format!("{} {written}", head.bytes) == is.trim()
            };
            Ok(heads.any(|head| as_it_is(&head)).then_some(()))
        })
    }

    /// What a resource answers to a verb of its type.
    ///
    /// # Errors
    /// It refuses.
    pub fn control(&self, resource: &str, verb: &str, arguments: &Value) -> anyhow::Result<Value> {
        self.ask(&json!({ "cluster": "control", "resource": resource, "verb": verb, "arguments": arguments }))
    }

    /// Which node could have the group, and which rule stops the others.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn candidates(&self, group: &str) -> anyhow::Result<BTreeMap<String, (bool, String)>> {
        let answer = self.ask(&json!({ "cluster": "candidates", "group": group }))?;
        let rows = answer.as_array().context("no rows")?;
        let row = |row: &Value| {
            let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
            (text("node"), (row["fit"] == true, text("why")))
        };
        Ok(rows.iter().map(row).collect())
    }

    /// How a group and its resources are, for messages.
    #[must_use]
    pub fn describe(&self, group: &str) -> String {
        let Ok(db) = self.db() else { return format!("{} does not answer", self.node) };
        let Ok(of) = group_of(&db, group) else { return format!("there is no group {group}") };
        let owner = of.owner.map_or_else(|| "nobody".to_owned(), |owner| db.node_name(owner));
        let mut text = format!("group {group} at {owner}: {:?}", of.state);
        for resource in db.resources.values().filter(|resource| resource.group == group) {
            let status = &resource.status;
            text.push_str(&format!("\n  {} is {} ({})", resource.name, status.state, status.why));
        }
        text
    }
}

/// As `csvctl resource add` takes them.
fn arguments(db: &ClusterDb, resource: &NewResource) -> Vec<String> {
    let mut args = vec![format!("--group={}", resource.group), format!("--type={}", resource.kind)];
    args.extend(resource.properties.iter().map(|(key, value)| format!("--set={key}={value}")));
    args.extend(resource.checkpoints.iter().map(|path| format!("--checkpoint={path}")));
    if !resource.depends.is_empty() {
        args.push(format!("--depends={}", resource.depends));
    }
    if !resource.possible.is_empty() {
        let names: Vec<String> = resource.possible.iter().map(|node| db.node_name(*node)).collect();
        args.push(format!("--possible={}", names.join(",")));
    }
    let (policy, usual) = (&resource.policy, ResourcePolicy::default());
    if policy.restart_threshold != usual.restart_threshold {
        args.push(format!("--restart-threshold={}", policy.restart_threshold));
    }
    if policy.retry_after_ms == 0 {
        args.push("--retry-after=never".to_owned());
    }
    if policy.separate_monitor {
        args.push("--separate-monitor=on".to_owned());
    }
    let looks = policy.looks_alive_ms.map(|ms| ("looks-alive", ms));
    let is = policy.is_alive_ms.map(|ms| ("is-alive", ms));
    let times = [
        ("restart-delay", policy.restart_delay_ms),
        ("pending-timeout", policy.pending_timeout_ms),
        ("deadlock-timeout", policy.deadlock_timeout_ms),
    ];
    let times = times.into_iter().chain(looks).chain(is);
    args.extend(times.map(|(option, ms)| format!("--{option}={ms}ms")));
    args
}

fn group_of<'a>(db: &'a ClusterDb, name: &str) -> anyhow::Result<&'a Group> {
    match db.groups.get(name) {
        Some(group) => Ok(group),
        None => bail!("there is no group {name}"),
    }
}
