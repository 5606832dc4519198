//! Waiting until a node serves its volume.

use super::node::{self, tail};
use super::spec::{Lab, LabNode};
use super::sys::wait_until;
use crate::admin;
use anyhow::{anyhow, bail};
use csv_types::ModeKind;
use csv_types::admin::{Answer, Request};
use std::fs;
use std::time::Duration;

/// Time for one question to a node that may be starting.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// Lines of each log shown when a node fails.
const LOG_LINES: usize = 15;

/// Waits until the node has the volume mounted and can do I/O on it in some mode.
pub(super) fn wait(lab: &Lab, name: &str, limit: Duration) -> anyhow::Result<()> {
    let node = lab.node(name)?;
    let mut last = anyhow!("nothing was tried");
    let ready = wait_until(limit, || match check(lab, node) {
        Ok(()) => true,
        Err(e) => {
            last = e;
            false
        }
    });
    if ready {
        return Ok(());
    }
    let log = |file: &str| tail(&lab.node_dir(name).join("log").join(file), LOG_LINES);
    bail!(
        "node {name} of lab {} does not serve {} after {} s: {last:#}\n  csvd.log of {name}:\n{}",
        lab.name,
        lab.volume,
        limit.as_secs(),
        log("csvd.log"),
    )
}

fn check(lab: &Lab, node: &LabNode) -> anyhow::Result<()> {
    let socket = node::path_of(lab, node, "/run/csv/csvd.sock")?;
    let mount_point = format!("/ClusterStorage/{}", lab.volume);
    let mounts = fs::read_to_string(node::path_of(lab, node, "/proc/1/mountinfo")?)?;
    if !mounts.lines().any(|line| line.split(' ').nth(4) == Some(&mount_point)) {
        bail!("{mount_point} is not mounted");
    }
    let request = Request::State { volume: Some(lab.volume.clone()) };
    let Answer::State { rows } = admin::ask_socket(&socket, &request, ASK_LIMIT)? else {
        bail!("csvd did not answer with a state");
    };
    let Some(row) = rows.iter().find(|row| row.node == node.name) else {
        bail!("the state has no row for {}", node.name);
    };
    match row.mode.kind {
        ModeKind::Direct | ModeKind::BlockRedirected | ModeKind::FsRedirected => Ok(()),
        ModeKind::Paused | ModeKind::Unavailable => bail!("{} {}", row.mode.kind, row.mode.reason),
    }
}
