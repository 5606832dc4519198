//! `csvctl resource`: what can be online or offline, and is where its group is.

pub(crate) mod change;
pub(crate) mod policy;
pub(crate) mod show;
mod state;
pub(crate) mod types;

use crate::admin::{self, Target};
use clap::Subcommand;
use csv_cluster::db::Command;
use csv_types::admin::ClusterRequest;
use csv_types::config::LocalConfig;
use serde_json::Value;

pub(crate) use state::{offline, online};

/// See the module's text.
#[derive(Debug, Subcommand)]
pub(crate) enum ResourceCommand {
    /// Resources: state, node, and why.
    List {
        /// Only those of this group.
        #[arg(long, value_name = "GROUP")]
        group: Option<String>,
    },
    /// Everything about a resource, its properties with their defaults.
    Show {
        /// Name of the resource.
        #[arg(value_name = "RESOURCE")]
        name: String,
    },
    /// Make a resource in a group. It goes online with its group.
    Add(change::AddArgs),
    /// Change a resource; what is not named stays.
    Set(change::SetArgs),
    /// Remove a resource that is offline and that no other depends on.
    Remove {
        /// Name of the resource.
        #[arg(value_name = "RESOURCE")]
        name: String,
    },
    /// Bring a resource online in its group, and forget its failures.
    Online {
        /// Name of the resource.
        #[arg(value_name = "RESOURCE")]
        name: String,
        /// Do not wait until it is online.
        #[arg(long)]
        no_wait: bool,
    },
    /// Take a resource offline, with all that depends on it, and keep it so.
    Offline {
        /// Name of the resource.
        #[arg(value_name = "RESOURCE")]
        name: String,
        /// Do not wait until it is offline.
        #[arg(long)]
        no_wait: bool,
    },
    /// Have a resource do something; `csvctl resource types TYPE` lists what.
    Control {
        /// Name of the resource.
        #[arg(value_name = "RESOURCE")]
        name: String,
        #[command(flatten)]
        verb: VerbArgs,
    },
    /// Types of resources, or properties and verbs of one.
    Types {
        /// Name of the type.
        #[arg(value_name = "TYPE")]
        kind: Option<String>,
    },
    /// Make a type known that is in a shared library, or change it.
    TypeAdd(types::TypeAdd),
    /// Forget a type from a shared library that no resource has.
    TypeRemove {
        /// Name of the type.
        #[arg(value_name = "NAME")]
        name: String,
    },
}

/// What `control` is to do.
#[derive(Debug, clap::Args)]
pub(crate) struct VerbArgs {
    /// What to do.
    #[arg(value_name = "VERB")]
    verb: String,
    /// With what: a JSON object such as '{"path": "/tmp/screen.ppm"}'.
    #[arg(value_name = "JSON", value_parser = object, default_value = "{}")]
    arguments: Value,
}

fn object(text: &str) -> Result<Value, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| format!("it is no JSON: {error}"))?;
    if value.is_object() {
        Ok(value)
    } else {
        Err("it must be a JSON object, such as {\"key\": \"value\"}".to_owned())
    }
}

/// Carries the command out.
pub(crate) fn run(command: ResourceCommand, target: &Target, json: bool) -> anyhow::Result<()> {
    let config = target.enter()?;
    match command {
        ResourceCommand::List { group } => show::list(&config, group.as_deref(), json),
        ResourceCommand::Show { name } => show::show(&config, &name, json),
        ResourceCommand::Add(args) => change::add(&config, args),
        ResourceCommand::Set(args) => change::set(&config, args),
        ResourceCommand::Remove { name } => admin::command(&config, &Command::ResourceRemove { name }),
        ResourceCommand::Online { name, no_wait } => online(&config, &name, no_wait, json),
        ResourceCommand::Offline { name, no_wait } => offline(&config, &name, no_wait, json),
        ResourceCommand::Control { name, verb } => control(&config, &name, verb),
        ResourceCommand::Types { kind } => types::print(&config, kind.as_deref(), json),
        ResourceCommand::TypeAdd(args) => types::add(&config, args),
        ResourceCommand::TypeRemove { name } => admin::command(&config, &Command::TypeRemove { name }),
    }
}

/// Has a resource do something and prints its answer.
pub(crate) fn control(config: &LocalConfig, name: &str, verb: VerbArgs) -> anyhow::Result<()> {
    let bar = crate::cluster::waiting("asking the resource");
    let answer = ask(config, name, &verb.verb, verb.arguments);
    bar.finish_and_clear();
    println!("{}", serde_json::to_string_pretty(&answer?)?);
    Ok(())
}

/// Has a resource do something.
pub(crate) fn ask(config: &LocalConfig, name: &str, verb: &str, arguments: Value) -> anyhow::Result<Value> {
    let (resource, verb) = (name.to_owned(), verb.to_owned());
    admin::ask_cluster(config, ClusterRequest::Control { resource, verb, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_take_objects() {
        assert!(object("{}").unwrap().is_object());
        assert!(object("[1]").unwrap_err().contains("object"));
        assert!(object("{").unwrap_err().contains("no JSON"));
    }
}
