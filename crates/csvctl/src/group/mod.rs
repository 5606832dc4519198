//! `csvctl group`: resources that are on one node together and move together.

pub(crate) mod moves;
pub(crate) mod policy;
pub(crate) mod show;
mod tree;

use crate::admin::{self, Target};
use crate::args::Switch;
use crate::names;
use crate::wait::{self, Goal, Watch};
use anyhow::bail;
use clap::Subcommand;
use csv_cluster::db::{Applied, Command, GroupPolicy};
use csv_types::config::LocalConfig;
use moves::MoveOptions;
use policy::PolicyArgs;

/// How the end of an order is told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Told<'a> {
    pub(crate) json: bool,
    /// The virtual machine that was meant, if not the group.
    pub(crate) machine: Option<&'a str>,
}

/// Reason of what an administrator orders.
pub(crate) const ORDERED: &str = "an administrator ordered it";

/// See the module's text.
#[derive(Debug, Subcommand)]
pub(crate) enum GroupCommand {
    /// All groups: state, owner, and why.
    List,
    /// Everything about a group: resources, what depends on what, failures, policy, where it could go.
    Show {
        /// Name of the group.
        #[arg(value_name = "GROUP")]
        name: String,
    },
    /// Make a group. It has no resources yet, and is offline.
    Add {
        /// Name of the group.
        #[arg(value_name = "GROUP")]
        name: String,
        #[command(flatten)]
        policy: PolicyArgs,
    },
    /// Change the policy of a group; what is not named stays.
    Set {
        /// Name of the group.
        #[arg(value_name = "GROUP")]
        name: String,
        #[command(flatten)]
        policy: PolicyArgs,
    },
    /// Remove a group that is offline and has no resources.
    Remove {
        /// Name of the group.
        #[arg(value_name = "GROUP")]
        name: String,
    },
    /// Bring a group online, and forget its failures.
    Online {
        /// Name of the group.
        #[arg(value_name = "GROUP")]
        name: String,
        /// Do not wait until it is online.
        #[arg(long)]
        no_wait: bool,
    },
    /// Take a group offline, and keep it so.
    Offline {
        /// Name of the group.
        #[arg(value_name = "GROUP")]
        name: String,
        /// Do not wait until it is offline.
        #[arg(long)]
        no_wait: bool,
    },
    /// Move a group to another node, by default while its virtual machines run.
    Move {
        /// Name of the group.
        #[arg(value_name = "GROUP")]
        name: String,
        #[command(flatten)]
        options: MoveOptions,
    },
    /// Leave a group alone, whatever happens to it: nothing is watched, restarted, or moved for failure.
    Maintenance {
        /// Name of the group.
        #[arg(value_name = "GROUP")]
        name: String,
        /// On or off.
        switch: Switch,
    },
    /// Which nodes could have a group, best first, and which rule stops the others.
    Candidates {
        /// Name of the group.
        #[arg(value_name = "GROUP")]
        name: String,
    },
}

/// Carries the command out.
pub(crate) fn run(command: GroupCommand, target: &Target, json: bool) -> anyhow::Result<()> {
    let config = target.enter()?;
    let told = Told { json, machine: None };
    match command {
        GroupCommand::List => show::list(&config, json),
        GroupCommand::Show { name } => show::show(&config, &name, json),
        GroupCommand::Add { name, policy } => {
            let policy = policy.applied(&admin::database(&config)?, GroupPolicy::default())?;
            admin::command(&config, &Command::GroupAdd { name: name.clone(), policy })?;
            println!(
                "group {name} is there; `csvctl resource add R --group {name} --type T` gives it a resource"
            );
            Ok(())
        }
        GroupCommand::Set { name, policy } => set(&config, &name, policy),
        GroupCommand::Remove { name } => admin::command(&config, &Command::GroupRemove { name }),
        GroupCommand::Online { name, no_wait } => online(&config, &name, no_wait, told),
        GroupCommand::Offline { name, no_wait } => offline(&config, &name, no_wait, told),
        GroupCommand::Move { name, options } => moves::run(&config, &name, &options, told),
        GroupCommand::Maintenance { name, switch } => {
            admin::command(&config, &Command::GroupMaintenance { name, on: switch.is_on() })
        }
        GroupCommand::Candidates { name } => show::candidates(&config, &name, json),
    }
}

fn set(config: &LocalConfig, name: &str, policy: PolicyArgs) -> anyhow::Result<()> {
    if policy.is_empty() {
        bail!("nothing is to be changed: give at least one option, `csvctl group set --help` lists them");
    }
    let db = admin::database(config)?;
    let before = names::group(&db, name)?.policy.clone();
    let policy = policy.applied(&db, before)?;
    admin::command(config, &Command::GroupPolicy { name: name.to_owned(), policy })
}

/// Orders a group online and waits for it.
pub(crate) fn online(config: &LocalConfig, name: &str, no_wait: bool, told: Told<'_>) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let group = names::group(&db, name)?;
    if !names::resources_of(&db, name).any(|resource| resource.want_online) {
        eprintln!(
            "note: group {name} has no resource that is to be online; see `csvctl resource add` and `csvctl resource online`"
        );
    }
    let applied = admin::give(config, &Command::GroupOnline { name: name.to_owned() })?;
    if no_wait {
        return Ok(());
    }
    finish(config, Watch::new(&db, group, Goal::Online, applied != Applied::Unchanged), told)
}

/// Orders a group offline and waits for it.
pub(crate) fn offline(config: &LocalConfig, name: &str, no_wait: bool, told: Told<'_>) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let group = names::group(&db, name)?;
    let reason = ORDERED.to_owned();
    let applied = admin::give(config, &Command::GroupOffline { name: name.to_owned(), reason })?;
    if no_wait {
        return Ok(());
    }
    finish(config, Watch::new(&db, group, Goal::Offline, applied != Applied::Unchanged), told)
}

/// Waits, then says how the group, or the machine that was meant, is.
pub(crate) fn finish(config: &LocalConfig, watch: Watch, told: Told<'_>) -> anyhow::Result<()> {
    let db = wait::until(config, watch.clone())?;
    wait::notes(&db, &watch);
    let nothing = csvd::groups::Waiting::new();
    let group = names::group(&db, &watch.group)?;
    match (told.machine, told.json) {
        (Some(name), _) => crate::vm::tell(&db, name, told.json),
        (None, true) => {
            println!("{}", serde_json::to_string_pretty(&show::row(&db, group, &nothing))?);
            Ok(())
        }
        (None, false) => {
            println!("group {} is {}", group.name, wait::place(&db, group));
            Ok(())
        }
    }
}
