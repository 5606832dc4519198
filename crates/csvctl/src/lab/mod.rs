//! `csvctl lab`: a whole cluster on one machine, of real parts.
//!
//! Every node is a network, mount, PID, IPC and host-name namespace with its own csvd, csvfs and smbd; the LUN is one
//! file with a loop device per node. The commands here only choose; the work is done by the modules.

mod cluster;
mod down;
mod enter;
mod faults;
mod lun;
mod net;
mod node;
mod ready;
mod spec;
mod sys;
mod up;

pub(crate) use enter::enter;
pub(crate) use spec::{Lab, choose, names};

use crate::output;
use anyhow::bail;
use clap::Subcommand;
use csv_types::admin::PathFault;
use std::process::ExitCode;

/// See the module's text.
#[derive(Debug, Subcommand)]
pub(crate) enum LabCommand {
    /// Make a lab and wait until every node serves the volume.
    Up(up::UpArgs),
    /// Remove a lab and everything it made.
    Down {
        /// Lab; may be left out when only one runs.
        #[arg(long)]
        name: Option<String>,
        /// Remove every lab of this machine.
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// List the labs of this machine.
    List,
    /// Run a command as on a node.
    Exec(enter::ExecArgs),
    /// Power cut: nothing of the node's unwritten data reaches the LUN.
    Crash(NodeArg),
    /// Stop nodes cleanly (all of them when none is named); their LUN and state stay.
    Stop {
        /// Lab; may be left out when only one runs.
        #[arg(long)]
        name: Option<String>,
        /// Nodes.
        nodes: Vec<String>,
    },
    /// Start a node again after a crash or a stop; one that runs is stopped cleanly first.
    Restart {
        #[command(flatten)]
        node: NodeArg,
        /// Wait this many seconds for the node to serve the volume; 0 waits for its csvd only.
        #[arg(long, default_value_t = 60)]
        wait_s: u64,
    },
    /// Cut a node's network, silently, from all others or from one.
    Partition {
        #[command(flatten)]
        node: NodeArg,
        /// The other node; all when absent.
        #[arg(long)]
        from: Option<String>,
    },
    /// Undo every partition of the lab.
    Heal {
        /// Lab; may be left out when only one runs.
        #[arg(long)]
        name: Option<String>,
    },
    /// Make every I/O of a node to the LUN fail.
    FailPath {
        #[command(flatten)]
        node: NodeArg,
        /// To the witness LUN.
        #[arg(long)]
        witness: bool,
    },
    /// Undo fail-path and delay-path.
    HealPath {
        #[command(flatten)]
        node: NodeArg,
        /// To the witness LUN.
        #[arg(long)]
        witness: bool,
    },
    /// Make every I/O of a node to the LUN slower.
    DelayPath {
        #[command(flatten)]
        node: NodeArg,
        /// Milliseconds for each I/O.
        ms: u64,
    },
    /// First process of a node; started by `lab up`.
    #[command(hide = true)]
    NodeInit(node::InitArgs),
}

/// A node of a lab.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeArg {
    /// Lab; may be left out when only one runs.
    #[arg(long)]
    name: Option<String>,
    /// Node, for example n1.
    node: String,
}

impl NodeArg {
    fn load(&self) -> anyhow::Result<Lab> {
        load(self.name.as_deref())
    }

    fn load_to_change(&self) -> anyhow::Result<(Lab, spec::LabLock)> {
        Lab::load_to_change(&choose(self.name.as_deref())?)
    }
}

fn load(name: Option<&str>) -> anyhow::Result<Lab> {
    Lab::load(&choose(name)?)
}

impl LabCommand {
    /// Without a `--name` it is about that lab.
    fn mean(&mut self, lab: Option<&str>) {
        if let (Some(name @ None), Some(lab)) = (self.name_mut(), lab) {
            *name = Some(lab.to_owned());
        }
    }

    /// Where its `--name` stands; not of those that name a new lab, or none.
    fn name_mut(&mut self) -> Option<&mut Option<String>> {
        match self {
            LabCommand::Down { name, .. } | LabCommand::Stop { name, .. } | LabCommand::Heal { name } => {
                Some(name)
            }
            LabCommand::Crash(node)
            | LabCommand::Restart { node, .. }
            | LabCommand::Partition { node, .. }
            | LabCommand::FailPath { node, .. }
            | LabCommand::HealPath { node, .. }
            | LabCommand::DelayPath { node, .. } => Some(&mut node.name),
            LabCommand::Exec(args) => Some(&mut args.name),
            LabCommand::Up(_) | LabCommand::List | LabCommand::NodeInit(_) => None,
        }
    }
}

/// Carries the command out; `lab` is the lab of other commands, which counts where no `--name` is given. Labs nest in nobody:
/// inside a node there are none.
pub(crate) fn run(mut command: LabCommand, lab: Option<&str>, json: bool) -> anyhow::Result<ExitCode> {
    command.mean(lab);
    if !rustix::process::geteuid().is_root() {
        bail!("labs are made of namespaces, mounts and loop devices; run this as root (sudo csvctl lab ...)");
    }
    match command {
        LabCommand::Up(args) => {
            let lab = up::run(&args)?;
            crate::volume::print_state_of(&lab, &lab.coordinator, json)?;
            if !json {
                print_hints(&lab);
            }
        }
        LabCommand::Down { all: true, .. } => down::run_all()?,
        LabCommand::Down { name, .. } => down::run(&choose(name.as_deref())?)?,
        LabCommand::List => list(json)?,
        LabCommand::Exec(args) => {
            let lab = load(args.name.as_deref())?;
            return enter::exec(&lab, &args.node, &args.command).map(ExitCode::from);
        }
        LabCommand::Crash(arg) => {
            let (mut lab, _lock) = arg.load_to_change()?;
            faults::crash(&mut lab, &arg.node)?;
        }
        LabCommand::Stop { name, nodes } => {
            let (mut lab, _lock) = Lab::load_to_change(&choose(name.as_deref())?)?;
            faults::stop_many(&mut lab, &nodes)?;
        }
        LabCommand::Restart { node, wait_s } => {
            let (mut lab, lock) = node.load_to_change()?;
            faults::restart(&mut lab, &node.node)?;
            drop(lock);
            faults::wait_started(&lab, &node.node, wait_s)?;
        }
        LabCommand::Partition { node, from } => {
            faults::partition(&node.load()?, &node.node, from.as_deref())?;
        }
        LabCommand::Heal { name } => net::heal(&load(name.as_deref())?)?,
        LabCommand::FailPath { node, witness } => {
            faults::path_fault(&node.load()?, &node.node, PathFault::Fail, witness)?;
        }
        LabCommand::HealPath { node, witness } => {
            faults::path_fault(&node.load()?, &node.node, PathFault::Heal, witness)?;
        }
        LabCommand::DelayPath { node, ms } => {
            faults::path_fault(&node.load()?, &node.node, PathFault::DelayMs(ms), false)?;
        }
        LabCommand::NodeInit(args) => node::init(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn print_hints(lab: &Lab) {
    let name = if lab.name == "lab" { String::new() } else { format!(" --name {}", lab.name) };
    println!("\nlab {} is up in {}", lab.name, lab.dir.display());
    println!("  csvctl lab exec{name} n1 -- COMMAND   runs a command as on n1");
    println!("  csvctl lab down{name}                 removes the lab");
}

fn list(json: bool) -> anyhow::Result<()> {
    let mut table = vec![["LAB", "NODES", "RUNNING", "COORDINATOR", "DIRECTORY"].map(str::to_owned).to_vec()];
    let mut objects = Vec::new();
    for name in names()? {
        let Ok(lab) = Lab::load(&name) else {
            table.push(vec![name, "?".into(), "?".into(), "?".into(), "not finished; remove it".into()]);
            continue;
        };
        let running = down::running_nodes(&lab);
        table.push(vec![
            lab.name.clone(),
            lab.nodes.len().to_string(),
            running.to_string(),
            lab.coordinator.clone(),
            lab.dir.display().to_string(),
        ]);
        let mut object = serde_json::to_value(&lab)?;
        object["running"] = running.into();
        object["image"] = lab.lun_image().display().to_string().into();
        objects.push(object);
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&objects)?);
    } else if table.len() == 1 {
        println!("no labs; `csvctl lab up` makes one");
    } else {
        print!("{}", output::table(&table));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        command: LabCommand,
    }

    #[test]
    fn the_lab_of_other_commands_counts_where_none_is_named() {
        let lines = [
            "down",
            "stop n1",
            "heal",
            "crash n1",
            "restart n1",
            "partition n1",
            "fail-path n1",
            "exec n1 -- ls",
        ];
        for line in lines {
            let parse = |line: &str| Cli::try_parse_from(["x"].into_iter().chain(line.split(' '))).unwrap();
            let mut command = parse(line).command;
            command.mean(None);
            assert_eq!(command.name_mut(), Some(&mut None), "{line}");
            command.mean(Some("a"));
            assert_eq!(command.name_mut(), Some(&mut Some("a".into())), "{line}");
            let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
            let mut command = parse(format!("{verb} --name b {rest}").trim()).command;
            command.mean(Some("a"));
            assert_eq!(command.name_mut(), Some(&mut Some("b".into())), "{line}");
        }
        assert_eq!(Cli::try_parse_from(["x", "list"]).unwrap().command.name_mut(), None);
    }
}
