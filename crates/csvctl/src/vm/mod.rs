//! `csvctl vm`: virtual machines. Each is a resource of type `VirtualMachine`, by default in a group of its name; what is not
//! here is done with `csvctl group` and `csvctl resource`.

mod add;
mod power;
mod show;

use crate::admin::{self, Target};
use crate::group::Told;
use crate::group::moves::{self, MoveOptions};
use crate::names;
use crate::resource::{self, VerbArgs};
use clap::Subcommand;
use csv_types::config::LocalConfig;

pub(crate) use show::tell;

/// See the module's text.
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// All virtual machines: node, state, size, what they do.
    List,
    /// Everything about a virtual machine: guest, hardware, properties, where it could go.
    Show {
        /// Name of the virtual machine.
        #[arg(value_name = "VM")]
        name: String,
    },
    /// Make a virtual machine of a disk image on a volume, in a group of its name.
    Add(add::AddArgs),
    /// Remove a virtual machine that is stopped. Its disks stay.
    Remove {
        /// Name of the virtual machine.
        #[arg(value_name = "VM")]
        name: String,
    },
    /// Start a virtual machine, from its saved state if it has one.
    Start {
        /// Name of the virtual machine.
        #[arg(value_name = "VM")]
        name: String,
        /// Do not wait until it runs.
        #[arg(long)]
        no_wait: bool,
    },
    /// Stop a virtual machine, by default as its property offline_action says (its power button), and keep it so.
    Stop {
        /// Name of the virtual machine.
        #[arg(value_name = "VM")]
        name: String,
        #[command(flatten)]
        how: power::StopHow,
        /// Do not wait until it is stopped.
        #[arg(long)]
        no_wait: bool,
    },
    /// Move a virtual machine to another node, by default while it runs; its whole group goes along.
    Move {
        /// Name of the virtual machine.
        #[arg(value_name = "VM")]
        name: String,
        #[command(flatten)]
        options: MoveOptions,
    },
    /// Have a virtual machine do something, such as pause, resume, reset, powerdown or screendump; `csvctl resource types
    /// VirtualMachine` lists all.
    Control {
        /// Name of the virtual machine.
        #[arg(value_name = "VM")]
        name: String,
        #[command(flatten)]
        verb: VerbArgs,
    },
}

/// Carries the command out.
pub(crate) fn run(command: VmCommand, target: &Target, json: bool) -> anyhow::Result<()> {
    let config = target.enter()?;
    match command {
        VmCommand::List => show::list(&config, json),
        VmCommand::Show { name } => show::show(&config, &name, json),
        VmCommand::Add(args) => add::run(&config, args, json),
        VmCommand::Remove { name } => power::remove(&config, &name),
        VmCommand::Start { name, no_wait } => power::start(&config, &name, no_wait, json),
        VmCommand::Stop { name, how, no_wait } => power::stop(&config, &name, how, no_wait, json),
        VmCommand::Move { name, options } => {
            let group = group_of(&config, &name)?;
            moves::run(&config, &group, &options, Told { json, machine: Some(&name) })
        }
        VmCommand::Control { name, verb } => {
            group_of(&config, &name)?;
            resource::control(&config, &name, verb)
        }
    }
}

fn group_of(config: &LocalConfig, name: &str) -> anyhow::Result<String> {
    Ok(names::machine(&admin::database(config)?, name)?.group.clone())
}
