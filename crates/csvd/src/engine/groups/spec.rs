//! What a resource host must know of a resource and of this node, from the database and the node's file.

use crate::engine::Engine;
use csv_cluster::db::{ClusterDb, Group, LibraryType, Resource};
use csv_cluster::groups::expr::Expr;
use csv_resource::api::{Dependency, NodeInfo, Spec};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Resources of a group, by name.
pub(super) fn resources_of(db: &ClusterDb, group: &str) -> BTreeMap<String, Resource> {
    let own = db.resources.iter().filter(|(_, resource)| resource.group == group);
    own.map(|(name, resource)| (name.clone(), resource.clone())).collect()
}

/// A resource as its host needs it.
pub(super) fn spec_of(
    group: &Group,
    generation: u64,
    resources: &BTreeMap<String, Resource>,
    libraries: &BTreeMap<String, LibraryType>,
    resource: &Resource,
) -> Spec {
    let policy = &resource.policy;
    Spec {
        name: resource.name.clone(),
        kind: resource.kind.clone(),
        group: group.name.clone(),
        properties: resource.properties.clone(),
        depends_on: needs(resources, resource),
        looks_alive_ms: policy.looks_alive_ms,
        is_alive_ms: policy.is_alive_ms,
        deadlock_timeout_ms: policy.deadlock_timeout_ms,
        pending_timeout_ms: policy.pending_timeout_ms,
        generation,
        library: libraries.get(&resource.kind).map(|library| PathBuf::from(&library.library)),
    }
}

/// Everything that a resource depends on, directly or not.
fn needs(resources: &BTreeMap<String, Resource>, resource: &Resource) -> Vec<Dependency> {
    let names = |resource: &Resource| -> Vec<String> {
        let parsed = Expr::parse(&resource.depends).unwrap_or(Expr::Nothing);
        parsed.names().into_iter().map(str::to_owned).collect()
    };
    let mut seen = BTreeSet::new();
    let mut to_look_at = names(resource);
    while let Some(name) = to_look_at.pop() {
        if let Some(needed) = resources.get(&name)
            && seen.insert(name)
        {
            to_look_at.extend(names(needed));
        }
    }
    let needed = seen.iter().filter_map(|name| resources.get(name));
    needed
        .map(|needed| Dependency {
            name: needed.name.clone(),
            kind: needed.kind.clone(),
            properties: needed.properties.clone(),
        })
        .collect()
}

/// This node, as resources know it.
pub(super) fn node_info(engine: &Engine) -> NodeInfo {
    let own = engine.db.read().nodes.get(&engine.me()).map(|node| node.addr);
    let addr = own.or(engine.config.addr).map(|addr| addr.to_string()).unwrap_or_default();
    NodeInfo {
        cluster: engine.identity.cluster_name.clone(),
        cluster_id: engine.identity.cluster_id.to_string(),
        node: engine.identity.name.clone(),
        node_id: engine.me().0,
        addr,
        run_dir: engine.config.run_dir.clone(),
        state_dir: engine.config.state_dir.clone(),
        mount_dir: engine.config.mount_dir.clone(),
        secrets_dir: engine.config.secrets_dir.clone(),
        luns: engine.config.luns.clone(),
    }
}

/// May several nodes have resources of that type online at once?
pub(super) fn is_shared(kind: &str) -> bool {
    csv_resource::types::builtin()
        .iter()
        .map(|known| known.info())
        .any(|info| info.name == kind && info.shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_knows_what_its_name_stands_on() {
        let resource = |name: &str, depends: &str| {
            let resource = Resource { name: name.into(), depends: depends.into(), ..Resource::default() };
            (name.to_owned(), resource)
        };
        let resources = BTreeMap::from([
            resource("disk", ""),
            resource("a1", ""),
            resource("a2", ""),
            resource("name", "a1 or a2"),
            resource("share", "name and disk"),
            resource("other", ""),
        ]);
        let names: Vec<String> =
            needs(&resources, &resources["share"]).into_iter().map(|needed| needed.name).collect();
        assert_eq!(names, ["a1", "a2", "disk", "name"]);
        assert!(needs(&resources, &resources["disk"]).is_empty());
    }

    #[test]
    fn volumes_are_shared_and_disks_are_not() {
        assert!(is_shared("ClusterSharedVolume"));
        assert!(!is_shared("PhysicalDisk") && !is_shared("VirtualMachine"));
    }
}
