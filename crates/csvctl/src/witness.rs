//! `csvctl quorum set --disk` and `--node`, `csvctl cluster start --force`: the witness, and the way out when quorum is lost for good.

use crate::admin;
use anyhow::{Context, bail};
use csv_types::admin::ClusterRequest;
use csv_types::config::LocalConfig;
use std::io::{BufRead, IsTerminal, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// How long the token of a witness node is good.
const TOKEN_VALID_S: u64 = 3600;

/// Arguments of `csvctl cluster start`.
#[derive(Debug, clap::Args)]
pub(crate) struct StartArgs {
    /// Start this node alone although there is no quorum.
    #[arg(long, required = true)]
    force: bool,
    /// The cluster's name, instead of being asked for it.
    #[arg(long, value_name = "CLUSTER")]
    yes_i_know: Option<String>,
}

/// Makes a disk witness.
pub(crate) fn set_disk(config: &LocalConfig, device: &Path, name: &str, force: bool) -> anyhow::Result<()> {
    // csvd opens it, and has another directory.
    let device: PathBuf = std::path::absolute(device)?;
    let bar = crate::cluster::waiting("making the disk witness");
    let request = ClusterRequest::MakeDiskWitness { device: device.clone(), name: name.to_owned(), force };
    let made = admin::ask_cluster(config, request);
    bar.finish_and_clear();
    let warnings: Vec<String> = serde_json::from_value(made?).context("csvd's answer is not understood")?;
    println!("{} is the disk witness {name} now", device.display());
    for warning in &warnings {
        eprintln!("WARNING: {warning}");
    }
    if !warnings.is_empty() {
        eprintln!(
            "a node that cannot see the witness LUN cannot go on with it alone: give the node a path to the LUN, or name its \
             device as \"{name}\" in [local.luns] of its /etc/csv/csv.toml and start its csvd again"
        );
    }
    Ok(())
}

/// Names a witness node and prints its token.
pub(crate) fn set_node(config: &LocalConfig, addr: IpAddr, name: &str) -> anyhow::Result<()> {
    let request = ClusterRequest::SetWitnessNode { name: name.to_owned(), addr, valid_s: TOKEN_VALID_S };
    let token = admin::ask_cluster(config, request)?;
    let token = token.as_str().context("csvd answered no token")?;
    println!(
        "the witness node is {name} ({addr}). There, with node = \"{name}\" and addr = \"{addr}\" in /etc/csv/csv.toml:"
    );
    println!("  csvd --witness");
    println!("  csvctl cluster join {token}");
    Ok(())
}

const WARNING: &str = "\
FORCED START. This node becomes the cluster all by itself.

  * What the other nodes have decided and this node has not heard is LOST.
  * If any other node of the cluster runs, or will be started before this one can reach it, there are TWO clusters that
    fight for the same LUNs. Make sure that every other node is switched off, or is cut off from the storage.
  * Afterwards the others come back by themselves when they are started and reach this node. One that has decided
    anything meanwhile stops instead, and comes in again with `csvctl cluster rejoin`.
";

/// Starts this node without quorum, after a warning.
pub(crate) fn start(config: &LocalConfig, args: &StartArgs) -> anyhow::Result<()> {
    debug_assert!(args.force);
    eprintln!("{WARNING}");
    let name = match &args.yes_i_know {
        Some(name) => name.clone(),
        None => ask_name()?,
    };
    admin::ask_cluster(config, ClusterRequest::ForceStart { name: name.clone() })?;
    println!("{name} is being started on this node alone; see `csvctl cluster status`");
    Ok(())
}

fn ask_name() -> anyhow::Result<String> {
    if !std::io::stdin().is_terminal() {
        bail!("nobody can be asked: repeat with --yes-i-know CLUSTER if it is meant");
    }
    eprint!("Type the name of the cluster to go on: ");
    std::io::stderr().flush()?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim().to_owned())
}
