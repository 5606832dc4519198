//! Checks what an administrator says of a resource, before the cluster hears it: the database knows no types.
//!
//! Types of csvfs, systemd units and OCF agents are asked here; what this node does not have, another one may. A type from a
//! shared library is checked by what the database says of it: a library is loaded into resource hosts only.

use super::migrate::GroupRequest;
use crate::engine::Engine;
use anyhow::{Context, Result, bail};
use csv_cluster::db::{ClusterDb, Command, LibraryType};
use csv_resource::api::{Form, Property, TypeInfo, check_properties};
use csv_resource::types;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// For another node to check.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// Intervals of a library's type, where the resource does not say; see `include/csv_resource.h`.
const LIBRARY_LOOKS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// How a check went.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) enum Checked {
    Good,
    /// Everything that is wrong.
    Wrong(Vec<String>),
    /// This node does not have the type.
    NotHere(String),
}

/// Checks properties against a type of this node.
pub(super) fn check_here(kind: &str, properties: &BTreeMap<String, String>) -> Checked {
    let found = match types::find(kind, None) {
        Ok(found) => found,
        Err(why) => return Checked::NotHere(why),
    };
    if let Err(wrong) = check_properties(&found.info(), properties) {
        return Checked::Wrong(wrong);
    }
    match found.check(properties) {
        Ok(()) => Checked::Good,
        Err(wrong) => Checked::Wrong(vec![wrong]),
    }
}

/// What the database knows of a library's type.
fn of_library(library: &LibraryType) -> TypeInfo {
    let property = |(name, required): (&String, &bool)| Property {
        name: name.clone(),
        numbered: false,
        required: *required,
        default: None,
        form: Form::Text,
        help: "see the library's own documentation".into(),
        live: false,
    };
    TypeInfo {
        name: library.name.clone(),
        help: format!("from the shared library {}", library.library),
        properties: library.properties.iter().map(property).collect(),
        verbs: Vec::new(),
        looks_alive: LIBRARY_LOOKS.0,
        is_alive: LIBRARY_LOOKS.1,
        shared: false,
    }
}

/// All types, or one.
pub(crate) fn describe(db: &ClusterDb, kind: Option<&str>) -> Result<Vec<TypeInfo>> {
    let Some(kind) = kind else {
        let builtin = types::builtin().into_iter().map(|known| known.info());
        return Ok(builtin.chain(db.types.values().map(of_library)).collect());
    };
    match db.types.get(kind) {
        Some(library) => Ok(vec![of_library(library)]),
        None => match types::find(kind, None) {
            Ok(found) => Ok(vec![found.info()]),
            Err(why) => bail!("{why}"),
        },
    }
}

/// The type and all properties of the resource as a command would have it, if it says something of them.
fn to_check(db: &ClusterDb, command: &Command) -> Option<(String, BTreeMap<String, String>)> {
    if let Command::ResourceAdd { resource } = command {
        return Some((resource.kind.clone(), resource.properties.clone()));
    }
    let Command::ResourceSet { name, change } = command else { return None };
    if change.properties.is_empty() {
        return None;
    }
    let resource = db.resources.get(name)?;
    let mut properties = resource.properties.clone();
    for (name, value) in &change.properties {
        match value {
            Some(value) => properties.insert(name.clone(), value.clone()),
            None => properties.remove(name),
        };
    }
    Some((resource.kind.clone(), properties))
}

impl Engine {
    /// Refuses what a resource's type does not take.
    pub(crate) async fn check_resource(self: &Arc<Self>, command: &Command) -> Result<()> {
        let (kind, properties, library) = {
            let db = self.db.read();
            let Some((kind, properties)) = to_check(&db, command) else { return Ok(()) };
            let library = db.types.get(&kind).map(of_library);
            (kind, properties, library)
        };
        if let Some(info) = library {
            return told(
                check_properties(&info, &properties).map_or_else(Checked::Wrong, |()| Checked::Good),
            );
        }
        let (kind_here, here) = (kind.clone(), properties.clone());
        let checked = tokio::task::spawn_blocking(move || check_here(&kind_here, &here)).await;
        let Checked::NotHere(why) = checked.context("a fault in csvd while the properties were checked")?
        else {
            return told(check_here(&kind, &properties));
        };
        let others: Vec<_> = {
            let db = self.db.read();
            db.nodes
                .values()
                .filter(|node| node.is_up() && node.id != self.me())
                .map(|node| node.id)
                .collect()
        };
        for node in others {
            let request =
                GroupRequest::CheckProperties { kind: kind.clone(), properties: properties.clone() };
            let answer = self.ask_about_groups(node, request, ASK_LIMIT).await;
            match answer.ok().and_then(|answer| serde_json::from_value(answer).ok()) {
                None | Some(Checked::NotHere(_)) => {}
                Some(checked) => return told(checked),
            }
        }
        bail!("{why}")
    }
}

fn told(checked: Checked) -> Result<()> {
    match checked {
        Checked::Good => Ok(()),
        Checked::Wrong(wrong) => bail!("{}", wrong.join("; ")),
        Checked::NotHere(why) => bail!("{why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn unknown_types_and_properties_and_values_out_of_range_are_named() {
        let wrong = |kind: &str, pairs: &[(&str, &str)]| match check_here(kind, &properties(pairs)) {
            Checked::Good => panic!("{kind} {pairs:?} is good"),
            Checked::Wrong(wrong) => wrong.join("; "),
            Checked::NotHere(why) => why,
        };
        assert!(wrong("Nonsense", &[]).contains("no resource type \"Nonsense\""));
        assert!(wrong("IPAddress", &[("adress", "10.0.0.1/8")]).contains("adress"));
        assert!(wrong("IPAddress", &[("address", "10.0.0.300/8")]).contains("10.0.0.300/8"));
        assert!(wrong("VirtualMachine", &[("disk", "/x"), ("memory_mib", "0")]).contains("memory_mib"));
        assert_eq!(check_here("IPAddress", &properties(&[("address", "10.0.0.3/8")])), Checked::Good);
    }

    #[test]
    fn a_change_is_checked_with_what_stays() {
        let resource = csv_cluster::db::Resource {
            name: "ip".into(),
            kind: "IPAddress".into(),
            properties: properties(&[("address", "10.0.0.3/8"), ("interface", "eth0")]),
            ..Default::default()
        };
        let mut db = ClusterDb::default();
        db.resources.insert("ip".into(), resource);
        let mut change = csv_cluster::db::ResourceChange::default();
        let set = |change: &csv_cluster::db::ResourceChange| Command::ResourceSet {
            name: "ip".into(),
            change: change.clone(),
        };
        assert_eq!(to_check(&db, &set(&change)), None);
        change.properties.insert("interface".into(), None);
        let expected = ("IPAddress".to_owned(), properties(&[("address", "10.0.0.3/8")]));
        assert_eq!(to_check(&db, &set(&change)), Some(expected));
    }
}
