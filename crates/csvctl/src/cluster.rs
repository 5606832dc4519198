//! `csvctl cluster`, `csvctl node`, `csvctl quorum`, `csvctl db`: the cluster as an administrator sees and changes it.

use crate::admin::{self, Target};
use crate::args::{key_value, on_off};
use crate::balance;
use crate::drain;
use crate::names::node_id;
use crate::output::{rfc3339, table, tick};
use crate::witness;
use anyhow::{Context, bail};
use clap::Subcommand;
use csv_cluster::db::{Command, Settings, Witness};
use csv_types::admin::{ClusterRequest, Request};
use csv_types::config::LocalConfig;
use csvd::status::ClusterStatus;
use indicatif::ProgressBar;
use std::path::PathBuf;
use std::time::Duration;

/// A stop in good order.
const STOP_LIMIT: Duration = Duration::from_secs(240);

/// See the module's text.
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Make a cluster with this node as its first.
    Create {
        /// Name, 1 to 15 characters.
        name: String,
        /// Settings that differ from their defaults.
        #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
        settings: Vec<(String, String)>,
        /// Identity of the cluster, for volumes that were made before it.
        #[arg(long, value_name = "UUID", hide = true)]
        id: Option<uuid::Uuid>,
    },
    /// Print a token with which machines join.
    Token {
        /// For how long, in minutes.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=525_600))]
        minutes: u64,
        /// For how many machines.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
        uses: u32,
    },
    /// Make this machine a node of a cluster.
    Join {
        /// From `csvctl cluster token` on a node of the cluster.
        token: String,
    },
    /// Take this node out of its cluster; its volumes move to other nodes first.
    Leave,
    /// Take a node out that is down for good. Its number is never used again.
    Evict {
        /// Name of the node.
        node: String,
    },
    /// Join again after this node's database was lost or damaged; what is there is put aside.
    Rejoin {
        /// From `csvctl cluster token` on another node.
        token: String,
        /// Also when this node's database is in order: after the cluster was restored or forced elsewhere, and this
        /// node goes on by itself
        #[arg(long)]
        discard: bool,
    },
    /// Start a node alone whose cluster has lost quorum for good.
    Start(witness::StartArgs),
    /// End a cluster that has one node left. Volumes keep their data.
    Destroy,
    /// How the cluster is.
    Status,
    /// Settings of the cluster: all, or one that is changed.
    Settings {
        /// Setting.
        key: Option<String>,
        /// Its new value.
        #[arg(requires = "key")]
        value: Option<String>,
    },
    /// Write a copy of the database, secrets included, into a new file.
    Backup {
        /// The file.
        path: PathBuf,
    },
    /// Make a cluster of this node alone from a backup, after all nodes were lost. Volumes, settings and secrets are those of
    /// the backup; the other nodes join anew.
    Restore {
        /// The file.
        path: PathBuf,
        /// Every other node of that cluster is down and stays down: two clusters on the same LUNs destroy the volumes.
        #[arg(long)]
        others_are_down: bool,
    },
    /// Move virtual machines away from nodes that are loaded too much, as the setting balance does from time to time.
    Balance(balance::BalanceArgs),
    /// Check this machine, LUNs, and the cluster if there is one.
    Validate(crate::validate::ValidateArgs),
    /// Let the cluster use what its newest software brings; older software cannot join any more.
    UpdateLevel,
}

/// See the module's text.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// All nodes.
    List,
    /// Give a node no volumes and groups any more; those it has stay.
    Pause {
        /// Name of the node.
        node: String,
    },
    /// Give a node volumes and groups again.
    Resume {
        /// Name of the node.
        node: String,
    },
    /// Move all volumes and groups away from a node, and give it nothing.
    Drain {
        /// Name of the node.
        node: String,
        /// Do not wait until it is done.
        #[arg(long)]
        no_wait: bool,
    },
    /// Stop this node's csvd in good order: its groups and volumes move to other nodes, then its csvfs processes end. The node stays in
    /// the cluster, and is back when csvd is started again.
    Stop,
    /// Let a node in again that failed too often.
    ClearQuarantine {
        /// Name of the node.
        node: String,
    },
}

/// See the module's text.
#[derive(Debug, Subcommand)]
pub(crate) enum QuorumCommand {
    /// Who votes, and how many may fail.
    Show,
    /// Change the witness or the votes.
    Set(QuorumSet),
}

/// Arguments of `csvctl quorum set`.
#[derive(Debug, clap::Args)]
pub(crate) struct QuorumSet {
    /// Make this device, which every node must see, the disk witness. What is on it is lost.
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["no_witness", "witness_node"])]
    disk: Option<PathBuf>,
    /// Make the machine with this address the witness node, and print the token with which it joins.
    #[arg(long = "node", id = "witness_node", value_name = "ADDRESS", conflicts_with = "no_witness")]
    witness_node: Option<std::net::IpAddr>,
    /// Name of the witness: key of its device in a node's configuration, or name of the witness node.
    #[arg(long, default_value = "witness")]
    name: String,
    /// Overwrite what is on the device.
    #[arg(long, requires = "disk")]
    force: bool,
    /// Votes follow the nodes that are up, or not.
    #[arg(long, value_name = "on|off", value_parser = on_off)]
    dynamic: Option<bool>,
    /// Give a node a vote or take it: NODE=on or NODE=off.
    #[arg(long, value_name = "NODE=on|off", value_parser = key_value)]
    vote: Vec<(String, String)>,
    /// No witness.
    #[arg(long)]
    no_witness: bool,
}

/// See the module's text.
#[derive(Debug, Subcommand)]
pub(crate) enum DbCommand {
    /// Print the database, without secrets, as JSON.
    Dump,
}

/// Shows that something takes its time. Without a thread of its own: a process that has entered a lab's node can have none.
pub(crate) fn waiting(text: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    bar.set_message(text);
    tick(&bar);
    bar
}

/// Carries a command about the cluster out.
#[expect(clippy::too_many_lines, reason = "one arm for each command")]
pub(crate) fn run(command: ClusterCommand, target: &Target, json: bool) -> anyhow::Result<()> {
    let config = target.enter()?;
    let ask = |what| admin::ask_cluster(&config, what);
    match command {
        ClusterCommand::Create { name, settings, id } => {
            let bar = waiting("making the cluster");
            let made = ask(ClusterRequest::Create { name: name.clone(), id, settings });
            bar.finish_and_clear();
            made?;
            println!("cluster {name} is there; `csvctl cluster token` makes a token for the next node");
        }
        ClusterCommand::Token { minutes, uses } => {
            let token = ask(ClusterRequest::Token { valid_s: minutes * 60, uses })?;
            println!("{}", token.as_str().context("csvd answered no token")?);
        }
        ClusterCommand::Join { token } => {
            let bar = waiting("joining");
            let joined = ask(ClusterRequest::Join { token });
            bar.finish_and_clear();
            joined?;
            println!("this node is in the cluster");
        }
        ClusterCommand::Leave => {
            let bar = waiting("volumes move away");
            let left = ask(ClusterRequest::Leave);
            bar.finish_and_clear();
            left?;
            println!("this node is in no cluster any more");
        }
        ClusterCommand::Evict { node } => {
            let node = node_id(&admin::database(&config)?, &node)?;
            admin::command(&config, &Command::NodeEvict { node })?;
        }
        ClusterCommand::Rejoin { token, discard } => {
            let bar = waiting("joining again");
            let joined = ask(ClusterRequest::Rejoin { token, discard });
            bar.finish_and_clear();
            joined?;
            println!("this node is in the cluster again");
        }
        ClusterCommand::Restore { path, others_are_down } => {
            let path = std::path::absolute(path)?;
            let bar = waiting("restoring");
            let restored = ask(ClusterRequest::Restore { path, others_are_down });
            bar.finish_and_clear();
            restored?;
            println!(
                "the cluster is there again with this node; let the others join with `csvctl cluster token`"
            );
        }
        ClusterCommand::Balance(args) => balance::run(&config, args, json)?,
        ClusterCommand::Validate(_) => bail!("validation is a command of its own"),
        ClusterCommand::Start(args) => witness::start(&config, &args)?,
        ClusterCommand::Destroy => ask(ClusterRequest::Destroy).map(drop)?,
        ClusterCommand::Status => print_status(&status(&config)?, json)?,
        ClusterCommand::Settings { key: Some(key), value: Some(value) } => {
            admin::command(&config, &Command::Setting { key, value })?;
        }
        ClusterCommand::Settings { key, .. } => {
            print_settings(&admin::database(&config)?.settings, key.as_deref(), json)?;
        }
        ClusterCommand::Backup { path } => {
            // csvd writes it, and has another directory.
            let path = std::path::absolute(path)?;
            ask(ClusterRequest::Backup { path: path.clone() })?;
            println!("{} has the cluster's secrets in it; keep it as such", path.display());
        }
        ClusterCommand::UpdateLevel => {
            let level = admin::database(&config)?.nodes.values().map(|node| node.feature_level).min();
            let level = level.context("the cluster has no node")?;
            admin::command(&config, &Command::RaiseFeatureLevel { level })?;
        }
    }
    Ok(())
}

/// Carries a command about a node out.
pub(crate) fn run_node(command: NodeCommand, target: &Target, json: bool) -> anyhow::Result<()> {
    let config = target.enter()?;
    let find = |name: &str| node_id(&admin::database(&config)?, name);
    match command {
        NodeCommand::List => print_nodes(&status(&config)?, json),
        NodeCommand::Stop => {
            let bar = waiting("moving volumes away");
            let stopped = admin::ask_socket(&config.run_dir.join("csvd.sock"), &Request::Stop, STOP_LIMIT);
            bar.finish_and_clear();
            stopped.map(drop)
        }
        NodeCommand::Pause { node } => {
            admin::command(&config, &Command::NodePause { node: find(&node)?, drain: false })
        }
        NodeCommand::Resume { node } => admin::command(&config, &Command::NodeResume { node: find(&node)? }),
        NodeCommand::ClearQuarantine { node } => {
            admin::command(&config, &Command::NodeClearQuarantine { node: find(&node)? })
        }
        NodeCommand::Drain { node, no_wait } => {
            let id = find(&node)?;
            admin::command(&config, &Command::NodePause { node: id, drain: true })?;
            if no_wait { Ok(()) } else { drain::wait(&config, id, &node) }
        }
    }
}

/// Carries a command about quorum out.
pub(crate) fn run_quorum(command: QuorumCommand, target: &Target, json: bool) -> anyhow::Result<()> {
    let config = target.enter()?;
    match command {
        QuorumCommand::Show => print_quorum(&status(&config)?, json),
        QuorumCommand::Set(set) => {
            let db = admin::database(&config)?;
            for (node, vote) in set.vote {
                let vote = on_off(&vote).map_err(anyhow::Error::msg)?;
                admin::command(&config, &Command::NodeVote { node: node_id(&db, &node)?, vote })?;
            }
            let mut quorum = db.quorum.clone();
            quorum.dynamic = set.dynamic.unwrap_or(quorum.dynamic);
            if set.no_witness {
                quorum.witness = Witness::None;
            }
            if quorum != db.quorum {
                admin::command(&config, &Command::QuorumSet { config: quorum })?;
            }
            if let Some(device) = set.disk {
                witness::set_disk(&config, &device, &set.name, set.force)?;
            }
            if let Some(addr) = set.witness_node {
                witness::set_node(&config, addr, &set.name)?;
            }
            Ok(())
        }
    }
}

/// Carries a command about the database out.
pub(crate) fn run_db(command: &DbCommand, target: &Target) -> anyhow::Result<()> {
    let config = target.enter()?;
    match command {
        DbCommand::Dump => {
            let db = admin::ask_cluster(&config, ClusterRequest::Db)?;
            println!("{}", serde_json::to_string_pretty(&db)?);
            Ok(())
        }
    }
}

fn status(config: &LocalConfig) -> anyhow::Result<ClusterStatus> {
    let data = admin::ask_cluster(config, ClusterRequest::Status)?;
    serde_json::from_value(data)
        .context("csvd's status is not understood; csvctl and csvd must be of one version")
}

fn print_status(status: &ClusterStatus, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(status)?);
        return Ok(());
    }
    println!("cluster {} ({}), as {} sees it", status.name, status.id, status.node);
    if let Some(why) = &status.cut_off {
        println!("{} IS CUT OFF: {why}", status.node);
    }
    let leader = status.leader.as_deref().unwrap_or("none");
    println!("leader {leader}, term {}, database at {}\n", status.term, status.applied);
    print_nodes(status, false)?;
    println!();
    print_quorum(status, false)
}

fn print_nodes(status: &ClusterStatus, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(&status.nodes)?);
        return Ok(());
    }
    let head = ["NODE", "ID", "ADDRESS", "STATE", "SINCE", "VOTES", "VOLUMES", "REASON"];
    let mut cells = vec![head.map(str::to_owned).to_vec()];
    for node in &status.nodes {
        let dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        cells.push(vec![
            node.name.clone(),
            node.id.0.to_string(),
            node.addr.clone(),
            node.state.clone(),
            rfc3339(node.since_unix_ms / 1000 * 1000),
            if node.votes { "yes" } else { "no" }.to_owned(),
            dash(node.volumes.join(",")),
            dash(node.reason.clone()),
        ]);
    }
    print!("{}", table(&cells));
    Ok(())
}

fn print_quorum(status: &ClusterStatus, json: bool) -> anyhow::Result<()> {
    let quorum = &status.quorum;
    if json {
        println!("{}", serde_json::to_string_pretty(quorum)?);
        return Ok(());
    }
    let dynamic = if quorum.dynamic { "on" } else { "off" };
    println!(
        "voters {} (of them there: {}), witness {}, dynamic quorum {dynamic}",
        quorum.voters.join(", "),
        quorum.live.join(", "),
        quorum.witness
    );
    if let Some(node) = &quorum.witness_at {
        println!("the disk witness is held by {node}");
    }
    if let Some(problem) = &quorum.witness_problem {
        println!("the disk witness on {}: {problem}", status.node);
    }
    match quorum.tolerates {
        None => println!("NO QUORUM as {} sees it", status.node),
        Some(0) => println!("the cluster has quorum and can lose no voter at this moment"),
        Some(count) => println!("the cluster has quorum and can lose {count} more at the same time"),
    }
    Ok(())
}

fn print_settings(settings: &Settings, key: Option<&str>, json: bool) -> anyhow::Result<()> {
    let mut entries = settings.entries();
    if let Some(key) = key {
        entries.retain(|entry| entry.key == key);
        if entries.is_empty() {
            bail!("there is no setting \"{key}\"; `csvctl cluster settings` lists them");
        }
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&entries)?);
        return Ok(());
    }
    let mut cells =
        vec![["SETTING", "VALUE", "DEFAULT", "TAKES", "UNIT", "WHAT"].map(str::to_owned).to_vec()];
    for entry in entries {
        cells.push(vec![entry.key, entry.value, entry.default, entry.takes, entry.unit, entry.help]);
    }
    print!("{}", table(&cells));
    Ok(())
}
