//! csvfs: the FUSE layer of Cluster Shared Volumes, one process per volume and node.
//!
//! Serves `/ClusterStorage/<volume>` and, on the coordinator, everything that the other nodes need: the hidden
//! mount of the file system, the control service, the SMB export. See docs/architecture.md.

mod admin;
mod app;
mod client;
mod events;
mod export;
mod fuse;
mod gate;
mod heartbeat;
mod link;
mod pool;
mod role;
mod takeover;

use anyhow::{Context, Result};
use clap::Parser;
use csv_types::config::Config;
use std::path::PathBuf;

/// Serves one cluster shared volume on this node. Started by csvd.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The node's configuration file.
    #[arg(long, default_value = "/etc/csv/csv.toml")]
    config: PathBuf,
    /// Name of the volume.
    #[arg(long)]
    volume: String,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,fuser=off,h2=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read {}", args.config.display()))?;
    let config = Config::parse(&text).with_context(|| format!("{} is not usable", args.config.display()))?;
    app::run(config, &args.volume)
}
