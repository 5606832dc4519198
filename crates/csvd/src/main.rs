//! Node daemon: the cluster service. Runs the cluster engine, supervises one csvfs per volume, keeps the node's event log,
//! serves csvctl.
//!
//! csvd holds no data and no right to any: it may die and be started again at any time. So no signal is
//! caught: SIGTERM ends csvd alone and leaves every csvfs running for the next csvd, which replaces the stale socket. When
//! csvd stays away, the others give this node up. `csvctl node stop` moves the volumes away and ends the csvfs processes too.

mod daemon;
mod engine;
mod events;
mod process;
mod requests;
mod server;
mod silence;
mod volume;
mod watchdog;

use anyhow::Context;
use clap::Parser;
use csv_types::NodeId;
use csv_types::config::{LocalConfig, NodeFile};
use daemon::Daemon;
use events::EventLog;
use nix::sys::signal::SigSet;
use rustix::fs::{FlockOperation, flock};
use server::Server;
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;
use watchdog::Watchdog;

/// How often csvfs's events are fetched when nobody asks.
const COLLECT_EVERY: Duration = Duration::from_millis(500);

/// Node daemon of csvfs: the cluster service of this node.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Configuration file of the node.
    #[arg(long, default_value = "/etc/csv/csv.toml")]
    config: PathBuf,
    /// Be the witness node of a cluster: a voter on a third machine that is no node.
    #[arg(long)]
    witness: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("CSV_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,openraft=off,h2=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    run(&args)
}

fn run(args: &Args) -> anyhow::Result<()> {
    let text = fs::read_to_string(&args.config).with_context(|| {
        format!("cannot read {}; give the right file with --config", args.config.display())
    })?;
    let config = NodeFile::parse(&text).with_context(|| format!("in {}", args.config.display()))?.local;
    make_dirs(&config)?;
    let _lock = lock_run_dir(&config.run_dir)?;

    // Children inherit the mask, and csvfs must get its SIGTERM however csvd itself was started.
    SigSet::empty().thread_set_mask().context("cannot unblock signals")?;

    let mut events = EventLog::open(&config.state_dir, NodeId(0));
    events.add("", "csvd-started", format!("csvd started on {}", config.node));
    let listener = server::listen(&config.run_dir.join("csvd.sock"))?;
    let daemon = Daemon::start(config, events, args.witness)?;
    let watchdog = Watchdog::start(&daemon)?;
    let collector = Arc::clone(&daemon);
    std::thread::spawn(move || collect(&collector));
    let (stopped, stop) = sync_channel(1);
    let server = Arc::new(Server::new(Arc::clone(&daemon)));
    std::thread::spawn(move || server.serve(&listener, &stopped));
    stop.recv().context("the admin server ended")?;
    watchdog.put_out();
    let _ = fs::remove_file(daemon.config.run_dir.join("csvd.sock"));
    daemon.event("csvd-ended", "csvd ended".into());
    Ok(())
}

/// Fetches csvfs's events, and gives those of common interest to the cluster.
fn collect(daemon: &Daemon) {
    loop {
        std::thread::sleep(COLLECT_EVERY);
        let Ok(engine) = daemon.engine() else { continue };
        for agent in engine.volumes.all() {
            agent.volume.collect_events(&daemon.events);
        }
        daemon.block_on(engine.forward_events());
    }
}

fn make_dirs(config: &LocalConfig) -> anyhow::Result<()> {
    let make = |path: &Path, mode: u32| {
        DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
            .with_context(|| format!("cannot create {}; run csvd as root", path.display()))
    };
    make(&config.run_dir, 0o755)?;
    make(&config.state_dir, 0o700)?;
    make(&config.mount_dir, 0o755)
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
