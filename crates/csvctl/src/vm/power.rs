//! `csvctl vm start`, `stop` and `remove`.

use crate::admin;
use crate::group::{self, Told};
use crate::names::{self, MACHINE, resources_of};
use crate::resource;
use anyhow::{Context, bail};
use csv_cluster::db::{ClusterDb, Command, Resource, ResourceState};
use csv_types::config::LocalConfig;
use serde_json::json;

/// How the guest ends.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
#[group(multiple = false)]
pub(crate) struct StopHow {
    /// Save the guest to a file beside its first disk; the next start goes on from there.
    #[arg(long)]
    save: bool,
    /// End the guest at once, as a power cut.
    #[arg(long)]
    kill: bool,
}

impl StopHow {
    /// Verb of the machine that has its next offline end the guest so.
    fn verb(self) -> Option<&'static str> {
        match self {
            StopHow { save: true, .. } => Some("save"),
            StopHow { kill: true, .. } => Some("kill"),
            StopHow { .. } => None,
        }
    }
}

/// Another virtual machine of its group: then one is started and stopped without the other.
fn neighbour<'a>(db: &'a ClusterDb, machine: &'a Resource) -> Option<&'a Resource> {
    resources_of(db, &machine.group).find(|other| other.kind == MACHINE && other.name != machine.name)
}

/// Starts it, its group with it.
pub(super) fn start(config: &LocalConfig, name: &str, no_wait: bool, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let machine = names::machine(&db, name)?;
    let of = names::group(&db, &machine.group)?;
    let afresh = machine.status.state == ResourceState::Failed && of.owner.is_some();
    if of.want_online && (afresh || !machine.want_online || neighbour(&db, machine).is_some()) {
        return resource::online(config, name, no_wait, json);
    }
    if !machine.want_online {
        admin::command(config, &Command::ResourceOnline { name: name.to_owned() })?;
    }
    group::online(config, &machine.group, no_wait, Told { json, machine: Some(name) })
}

/// Stops it, its group with it unless another machine is in it.
pub(super) fn stop(
    config: &LocalConfig,
    name: &str,
    how: StopHow,
    no_wait: bool,
    json: bool,
) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let machine = names::machine(&db, name)?;
    if let Some(verb) = how.verb() {
        if !runs(&db, machine) {
            bail!(
                "{name} does not run ({}), so there is nothing to {verb}; `csvctl vm stop {name}` keeps it stopped",
                machine.status.state
            );
        }
        resource::ask(config, name, verb, json!({}))
            .with_context(|| format!("{name} cannot be stopped by --{verb}, and goes on"))?;
    }
    if neighbour(&db, machine).is_some() {
        return resource::offline(config, name, no_wait, json);
    }
    group::offline(config, &machine.group, no_wait, Told { json, machine: Some(name) })
}

/// Is there a guest, or something of it?
fn runs(db: &ClusterDb, machine: &Resource) -> bool {
    let owned = db.groups.get(&machine.group).is_some_and(|group| group.owner.is_some());
    match machine.status.state {
        ResourceState::Online | ResourceState::OnlinePending | ResourceState::OfflinePending => owned,
        ResourceState::Offline | ResourceState::Failed | ResourceState::Unknown => false,
    }
}

/// Why it cannot be removed, or whether its group goes with it.
fn removable(db: &ClusterDb, machine: &Resource) -> anyhow::Result<bool> {
    let name = &machine.name;
    let group = names::group(db, &machine.group)?;
    let alone = resources_of(db, &group.name).count() == 1;
    if group.owner.is_some() && (alone || runs(db, machine)) {
        bail!(
            "{name} is {} on {}: stop it first with `csvctl vm stop {name}`",
            machine.status.state,
            group.owner.map_or_else(String::new, |owner| db.node_name(owner))
        );
    }
    Ok(alone)
}

/// Removes it, and its group if there is nothing else in it.
pub(super) fn remove(config: &LocalConfig, name: &str) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let machine = names::machine(&db, name)?;
    let group = machine.group.clone();
    let alone = removable(&db, machine)?;
    admin::command(config, &Command::ResourceRemove { name: name.to_owned() })?;
    if alone {
        admin::command(config, &Command::GroupRemove { name: group.clone() }).with_context(|| {
            format!(
                "{name} was removed, but its group {group} is left; `csvctl group remove {group}` removes it"
            )
        })?;
    }
    let disks: Vec<&str> = machine
        .properties
        .iter()
        .filter(|(key, _)| key.starts_with("disk"))
        .map(|(_, value)| value.as_str())
        .collect();
    if disks.is_empty() {
        println!("virtual machine {name} was removed");
    } else {
        println!("virtual machine {name} was removed; its disks are left: {}", disks.join("; "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Bed;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        how: StopHow,
    }

    #[test]
    fn verbs_choose_how_the_next_offline_ends_it() {
        let verb = |words: &[&str]| Cli::try_parse_from([&["x"], words].concat()).map(|cli| cli.how.verb());
        assert_eq!(verb(&[]).unwrap(), None);
        assert_eq!(verb(&["--save"]).unwrap(), Some("save"));
        assert_eq!(verb(&["--kill"]).unwrap(), Some("kill"));
        assert!(verb(&["--save", "--kill"]).is_err());
        let machine = csv_resource::types::find(MACHINE, None).unwrap().info();
        for verb in ["save", "kill"] {
            assert!(machine.verbs.iter().any(|(known, _)| known == verb), "{verb}");
        }
    }

    #[test]
    fn only_a_stopped_one_is_removed_and_its_group_only_when_it_was_alone() {
        let mut bed = Bed::nodes(2);
        bed.machine("vm", 1);
        let error = removable(&bed.db, &bed.db.resources["vm"]).unwrap_err().to_string();
        assert!(error.contains("online on n1") && error.contains("csvctl vm stop vm"), "{error}");
        bed.group("two", &[("a", MACHINE, ""), ("b", MACHINE, ""), ("ip", "IPAddress", "")]);
        assert!(!removable(&bed.db, &bed.db.resources["a"]).unwrap());
        assert_eq!(neighbour(&bed.db, &bed.db.resources["a"]).unwrap().name, "b");
        assert!(neighbour(&bed.db, &bed.db.resources["vm"]).is_none());
        bed.group("one", &[("c", MACHINE, "")]);
        assert!(removable(&bed.db, &bed.db.resources["c"]).unwrap());
        assert!(runs(&bed.db, &bed.db.resources["vm"]) && !runs(&bed.db, &bed.db.resources["c"]));
    }
}
