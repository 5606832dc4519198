//! From names on the command line to what the database has, with errors that say which names there are.

use anyhow::{Context, bail};
use csv_cluster::db::{ClusterDb, Group, Resource};
use csv_types::NodeId;

/// Type of a virtual machine.
pub(crate) const MACHINE: &str = "VirtualMachine";

/// Names that an error tells at most.
const TOLD_MAX: usize = 20;

pub(crate) fn node_id(db: &ClusterDb, name: &str) -> anyhow::Result<NodeId> {
    db.node_by_name(name).map(|node| node.id).with_context(|| {
        let names = db.nodes.values().map(|node| node.name.as_str());
        format!("there is no node \"{name}\"; nodes: {}", told(names))
    })
}

pub(crate) fn node_ids(db: &ClusterDb, names: &[String]) -> anyhow::Result<Vec<NodeId>> {
    names.iter().map(|name| node_id(db, name)).collect()
}

/// Names of nodes with commas, or `-`.
pub(crate) fn node_names(db: &ClusterDb, nodes: &[NodeId]) -> String {
    let names: Vec<String> = nodes.iter().map(|node| db.node_name(*node)).collect();
    dash(names.join(","))
}

pub(crate) fn group<'a>(db: &'a ClusterDb, name: &str) -> anyhow::Result<&'a Group> {
    let Some(group) = db.groups.get(name) else {
        if let Some(resource) = db.resources.get(name) {
            bail!("there is no group \"{name}\"; resource {name} is in group {}", resource.group);
        }
        if db.groups.is_empty() {
            bail!("there is no group \"{name}\"; the cluster has none, `csvctl group add {name}` makes one");
        }
        bail!("there is no group \"{name}\"; groups: {}", told(db.groups.keys().map(String::as_str)));
    };
    Ok(group)
}

pub(crate) fn resource<'a>(db: &'a ClusterDb, name: &str) -> anyhow::Result<&'a Resource> {
    let Some(resource) = db.resources.get(name) else {
        if db.resources.is_empty() {
            bail!(
                "there is no resource \"{name}\"; the cluster has none, `csvctl resource add` makes one in a group"
            );
        }
        bail!(
            "there is no resource \"{name}\"; resources: {}",
            told(db.resources.keys().map(String::as_str))
        );
    };
    Ok(resource)
}

/// All virtual machines.
pub(crate) fn machines(db: &ClusterDb) -> impl Iterator<Item = &Resource> {
    db.resources.values().filter(|resource| resource.kind == MACHINE)
}

pub(crate) fn machine<'a>(db: &'a ClusterDb, name: &str) -> anyhow::Result<&'a Resource> {
    if let Some(resource) = db.resources.get(name) {
        if resource.kind == MACHINE {
            return Ok(resource);
        }
        bail!(
            "{name} is no virtual machine but a resource of type {}; see `csvctl resource show {name}`",
            resource.kind
        );
    }
    let names = told(machines(db).map(|machine| machine.name.as_str()));
    if names.is_empty() {
        bail!("there is no virtual machine \"{name}\"; the cluster has none, `csvctl vm add` makes one");
    }
    bail!("there is no virtual machine \"{name}\"; virtual machines: {names}")
}

/// Resources of a group, by name.
pub(crate) fn resources_of<'a>(db: &'a ClusterDb, group: &'a str) -> impl Iterator<Item = &'a Resource> {
    db.resources.values().filter(move |resource| resource.group == group)
}

/// What stands in a table for nothing.
pub(crate) fn dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

fn told<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    match names.len().checked_sub(TOLD_MAX) {
        None | Some(0) => names.join(", "),
        Some(more) => format!("{} and {more} more", names[..TOLD_MAX].join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Bed;

    #[test]
    fn errors_tell_what_there_is() {
        let empty = Bed::nodes(1);
        let error = |result: anyhow::Result<()>| result.unwrap_err().to_string();
        assert!(error(group(&empty.db, "g").map(drop)).contains("csvctl group add g"));
        assert!(error(machine(&empty.db, "v").map(drop)).contains("csvctl vm add"));
        let mut bed = Bed::nodes(2);
        bed.group("g", &[("disk", "PhysicalDisk", ""), ("vm", MACHINE, "")]);
        assert!(error(node_id(&bed.db, "n9").map(drop)).contains("n1, n2"));
        assert!(error(group(&bed.db, "disk").map(drop)).contains("is in group g"));
        assert!(error(group(&bed.db, "x").map(drop)).contains("groups: g"));
        assert!(error(resource(&bed.db, "x").map(drop)).contains("disk, vm"));
        assert!(error(machine(&bed.db, "disk").map(drop)).contains("type PhysicalDisk"));
        assert!(error(machine(&bed.db, "x").map(drop)).contains("virtual machines: vm"));
        assert_eq!(machine(&bed.db, "vm").unwrap().group, "g");
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..25).map(|i| format!("g{i}")).collect();
        assert!(told(names.iter().map(String::as_str)).ends_with("g19 and 5 more"));
    }
}
