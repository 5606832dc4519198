//! Node daemon: starts and supervises one csvfs per volume, keeps the node's event log, serves csvctl.
//!
//! csvd holds no data and no right to any: it may die and be started again at any time. So no signal is
//! caught: SIGTERM ends csvd alone and leaves every csvfs running for the next csvd, which replaces the stale socket.
//! The admin request `Stop` ends the csvfs processes too.

mod events;
mod process;
mod server;
mod volume;

use anyhow::{Context, bail};
use clap::Parser;
use csv_types::config::Config;
use events::EventLog;
use nix::sys::signal::SigSet;
use rustix::fs::{FlockOperation, flock};
use server::Node;
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use volume::{Volume, VolumePaths};

/// How often csvfs's events are fetched when nobody asks.
const COLLECT_EVERY: Duration = Duration::from_millis(500);

/// Node daemon of csvfs: supervises the volumes of this node.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Configuration file of the node.
    #[arg(long, default_value = "/etc/csv/csv.toml")]
    config: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("CSV_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    run(&args)
}

fn run(args: &Args) -> anyhow::Result<()> {
    let text = fs::read_to_string(&args.config).with_context(|| {
        format!("cannot read {}; give the right file with --config", args.config.display())
    })?;
    let config = Config::parse(&text).with_context(|| format!("in {}", args.config.display()))?;
    if config.volume("csvd").is_some() {
        bail!("a volume cannot be called csvd, its socket would be csvd's own; rename it");
    }
    make_dirs(&config)?;
    let _lock = lock_run_dir(&config.local.run_dir)?;

    // Children inherit the mask, and csvfs must get its SIGTERM however csvd itself was started.
    SigSet::empty().thread_set_mask().context("cannot unblock signals")?;

    let node = start(args, config)?;
    let listener = server::listen(&node.config.local.run_dir.join("csvd.sock"))?;
    let (stopped, stop) = sync_channel(1);
    let server = Arc::clone(&node);
    std::thread::spawn(move || server.serve(&listener, &stopped));
    stop.recv().context("the admin server ended")?;
    let _ = fs::remove_file(node.config.local.run_dir.join("csvd.sock"));
    node.events.lock().unwrap_or_else(PoisonError::into_inner).add("", "csvd-ended", "csvd ended".into());
    Ok(())
}

/// Starts a supervisor and an event collector per volume.
fn start(args: &Args, config: Config) -> anyhow::Result<Arc<Node>> {
    let program = std::env::current_exe().context("cannot find csvd's own path")?.with_file_name("csvfs");
    let config_path = fs::canonicalize(&args.config)?;
    let volumes = config
        .volumes
        .iter()
        .map(|volume| {
            let paths = VolumePaths {
                program: program.clone(),
                config: config_path.clone(),
                run_dir: config.local.run_dir.clone(),
                mount_point: config.local.mount_dir.join(&volume.name),
            };
            Ok(Arc::new(Volume::new(volume.name.clone(), paths)?))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut events = EventLog::open(&config.local.state_dir, config.me().id);
    events.add("", "csvd-started", format!("csvd started on {}", config.local.node));
    let node = Arc::new(Node::new(config, volumes, events));
    for volume in &node.volumes {
        let (supervisor, owner) = (Arc::clone(volume), Arc::clone(&node));
        std::thread::spawn(move || supervisor.supervise(&owner.events));
        let (collector, owner) = (Arc::clone(volume), Arc::clone(&node));
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(COLLECT_EVERY);
                collector.collect_events(&owner.events);
            }
        });
    }
    Ok(node)
}

fn make_dirs(config: &Config) -> anyhow::Result<()> {
    let make = |path: &Path, mode: u32| {
        DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
            .with_context(|| format!("cannot create {}; run csvd as root", path.display()))
    };
    make(&config.local.run_dir, 0o755)?;
    make(&config.local.state_dir, 0o700)?;
    make(&config.local.mount_dir, 0o755)
}

/// One csvd per run directory.
fn lock_run_dir(run_dir: &Path) -> anyhow::Result<File> {
    let path = run_dir.join("csvd.lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).with_context(|| {
        format!("csvd runs already in {}; stop it first, or use another run_dir", run_dir.display())
    })?;
    Ok(file)
}
