//! The forced start: a node whose cluster has lost quorum for good goes on alone.
//!
//! The order is noted in a file; csvd starts anew, rewrites the membership in this node's database to itself, and takes the note
//! away. A crash in between repeats it. The first command after that membership, written together with it, takes every volume
//! from its owner, orders every key of the others to be fenced, also those that this node has not heard of, and has
//! epochs and generations go on far above what it knows (`csv_cluster`, `apply/restore.rs`). So on each LUN one side wins even if the
//! others were not gone after all. What they have decided and this node has not heard is lost.

use super::identity::{self, Identity};
use anyhow::{Context, Result};
use csv_cluster::db::Command;
use csv_raft::RaftNode;
use csv_types::config::LocalConfig;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// For csvctl to get its answer.
const ANSWER_TIME: Duration = Duration::from_millis(300);

fn path(state_dir: &Path) -> PathBuf {
    identity::dir(state_dir).join("force-start")
}

/// Notes the order, durably.
pub(crate) fn note(state_dir: &Path) -> Result<()> {
    let path = path(state_dir);
    let write = || -> std::io::Result<()> {
        File::create(&path)?.sync_all()?;
        File::open(identity::dir(state_dir))?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Puts a new csvd in the place of this one, in a moment. csvfs processes go on.
pub(crate) fn start_anew() {
    std::thread::spawn(|| {
        std::thread::sleep(ANSWER_TIME);
        let args = std::env::args_os().skip(1);
        let error = match std::env::current_exe() {
            Ok(program) => std::process::Command::new(program).args(args).exec(),
            Err(error) => error,
        };
        tracing::error!(%error, "csvd cannot start anew; start it by hand");
        std::process::exit(1);
    });
}

/// Carries a noted order out; before the database is opened.
pub(super) fn carry_out(config: &LocalConfig, identity: &Identity, me: csv_raft::Identity) -> Result<()> {
    let path = path(&config.state_dir);
    if !path.exists() {
        return Ok(());
    }
    let addr = config.addr.map(|addr| std::net::SocketAddr::new(addr, config.cluster_port).to_string());
    let node = RaftNode { name: identity.name.clone(), addr: addr.unwrap_or_default() };
    let command = Command::ForceStart { node: identity.node }.by(identity.node, super::unix_ms()).encode();
    csv_raft::storage::force::sole_voter(&identity::raft_dir(&config.state_dir), me, node, &command)?;
    tracing::warn!("cluster {} was started by force on this node alone", identity.cluster_name);
    fs::remove_file(&path)
        .and_then(|()| File::open(identity::dir(&config.state_dir))?.sync_all())
        .with_context(|| format!("cannot remove {}", path.display()))
}
