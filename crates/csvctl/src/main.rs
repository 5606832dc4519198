//! The administrator's command: volumes, groups, virtual machines, the cluster, events, the lab, benchmarks.
//!
//! It holds no state. Everything it does to a running volume goes through csvd's admin socket on the node where
//! it runs, or, with `--lab`, on a node of a lab.

mod admin;
mod args;
mod balance;
mod bench;
mod cluster;
mod drain;
mod events;
mod group;
mod lab;
mod man;
mod names;
mod output;
mod resource;
#[cfg(test)]
mod testbed;
mod validate;
mod vm;
mod volume;
mod volume_create;
mod wait;
mod witness;

use admin::Target;
use clap::{CommandFactory, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Administrator's command of csvfs.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    /// Configuration file of the node.
    #[arg(long, global = true, default_value = "/etc/csv/csv.toml", value_name = "FILE")]
    config: PathBuf,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Act in this lab instead of on this host. Where this host is no cluster node, the only lab is meant.
    #[arg(long, global = true, value_name = "NAME")]
    lab: Option<String>,
    /// Act on this node of the lab.
    #[arg(long, global = true, value_name = "NODE", default_value = "n1")]
    on: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Volumes: create, state, redirection, maintenance.
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Clusters: create, join, leave, status, settings.
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Nodes: list, pause, drain, resume.
    #[command(subcommand)]
    Node(cluster::NodeCommand),
    /// Who votes, and the witness.
    #[command(subcommand)]
    Quorum(cluster::QuorumCommand),
    /// The replicated database.
    #[command(subcommand)]
    Db(cluster::DbCommand),
    /// Groups: resources that are on one node together and move together.
    #[command(subcommand)]
    Group(group::GroupCommand),
    /// Resources of groups, and their types.
    #[command(subcommand)]
    Resource(resource::ResourceCommand),
    /// Virtual machines.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// What the cluster decided and its nodes saw.
    Events(events::EventsArgs),
    /// A cluster on this one machine, for trying out and testing.
    #[command(subcommand)]
    Lab(lab::LabCommand),
    /// Measure the ways to the data against the raw LUN.
    Bench(bench::Args),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write manual pages of csvctl and all its commands.
    Man {
        /// Directory; is made if need be.
        dir: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("csvctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let target = Target { config: cli.config, lab: cli.lab, on: cli.on };
    match cli.command {
        Command::Volume(command) => volume::run(command, &target, cli.json)?,
        Command::Cluster(cluster::ClusterCommand::Validate(args)) => {
            return validate::run(&args, &target, cli.json);
        }
        Command::Cluster(command) => cluster::run(command, &target, cli.json)?,
        Command::Node(command) => cluster::run_node(command, &target, cli.json)?,
        Command::Quorum(command) => cluster::run_quorum(command, &target, cli.json)?,
        Command::Db(command) => cluster::run_db(&command, &target)?,
        Command::Group(command) => group::run(command, &target, cli.json)?,
        Command::Resource(command) => resource::run(command, &target, cli.json)?,
        Command::Vm(command) => vm::run(command, &target, cli.json)?,
        Command::Events(args) => events::run(&args, &target, cli.json)?,
        Command::Lab(command) => return lab::run(command, target.lab.as_deref(), cli.json),
        Command::Bench(args) => bench::run(args, cli.json)?,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "csvctl", &mut std::io::stdout());
        }
        Command::Man { dir } => {
            let count = man::write(Cli::command(), &dir)?;
            println!("{count} manual pages are in {0}; `man -l {0}/csvctl.1` reads the first", dir.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.command)
    }

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["csvctl", "lab", "exec", "n1", "--", "ls", "-l"]).unwrap();
        assert!(matches!(cli.command, Command::Lab(lab::LabCommand::Exec(_))));
        let cli = Cli::try_parse_from(["csvctl", "--lab", "x", "volume", "state", "--json"]).unwrap();
        assert!(cli.json && cli.lab.as_deref() == Some("x"));
    }

    #[test]
    fn groups_resources_and_machines_are_commands() {
        for line in [
            "csvctl group list --json",
            "csvctl group show g",
            "csvctl group add g --preferred n1,n2 --persistent on --priority high --start-after a,b",
            "csvctl group set g --failover-threshold default --failover-period 6h --failback 22:00-04:00",
            "csvctl group set g --anti-affinity dc:hard,web --move-kind quick",
            "csvctl group remove g",
            "csvctl group online g --no-wait",
            "csvctl group offline g --no-wait",
            "csvctl group move g --to n2 --quick --no-wait",
            "csvctl group maintenance g on",
            "csvctl group candidates g",
            "csvctl resource list --group g",
            "csvctl resource show r",
            "csvctl resource add r --group g --type IPAddress --set address=10.0.0.5/24 --offline --possible n1,n2",
            "csvctl resource set r --unset label --depends [a] --checkpoint /etc/x --group h --retry-after never",
            "csvctl resource remove r",
            "csvctl resource online r --no-wait",
            "csvctl resource offline r --no-wait",
            "csvctl resource control r holders {}",
            "csvctl resource types VirtualMachine",
            "csvctl resource type-add T --library /usr/lib/t.so --property a --required b",
            "csvctl resource type-remove T",
            "csvctl vm list",
            "csvctl vm show v",
            "csvctl vm add v --disk /a --disk /b --memory 2048 --cpus 2 --set nic=user --node n1 --start",
            "csvctl vm remove v",
            "csvctl vm start v",
            "csvctl vm stop v --save",
            "csvctl vm move v --live",
            "csvctl vm control v pause",
            "csvctl cluster balance --dry-run",
            "csvctl man /tmp/man",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
        }
        for line in [
            "csvctl group move g --live --quick",
            "csvctl vm stop v --save --kill",
            "csvctl group maintenance g maybe",
            "csvctl resource add r --type IPAddress",
            "csvctl cluster balance --dry-run --no-wait",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn every_command_has_its_manual_page_and_its_completion() {
        let dir = tempfile::tempdir().unwrap();
        let count = man::write(Cli::command(), &dir.path().join("man")).unwrap();
        let pages = std::fs::read_dir(dir.path().join("man")).unwrap().count();
        assert_eq!(count, pages, "each page is a file of its own");
        let read = |page: &str| std::fs::read_to_string(dir.path().join("man").join(page)).unwrap();
        assert!(read("csvctl-vm-add.1").contains("OPTION"), "{}", read("csvctl-vm-add.1"));
        assert!(read("csvctl-group-set.1").contains("anti\\-affinity"));
        assert!(read("csvctl.1").contains("csvctl\\-group(1)"));
        let mut script = Vec::new();
        clap_complete::generate(clap_complete::Shell::Bash, &mut Cli::command(), "csvctl", &mut script);
        let script = String::from_utf8(script).unwrap();
        for word in
            ["--anti-affinity", "maintenance", "type-add", "--separate-monitor", "live quick shutdown"]
        {
            assert!(script.contains(word), "{word}");
        }
    }
}
