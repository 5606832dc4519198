//! Waiting until a node serves its volume.

use super::node::{self, tail};
use super::spec::{Lab, LabNode};
use super::sys::wait_until;
use crate::admin;
use anyhow::{anyhow, bail};
use csv_types::ModeKind;
use csv_types::admin::{Answer, Request, VolumeState};
use std::fs;
use std::time::Duration;

/// Time for one question to a node that may be starting.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// Lines of the log shown when a node fails.
const LOG_LINES: usize = 15;

/// Waits until the node has the volume mounted and can do I/O on it in some mode.
pub(super) fn wait(lab: &Lab, name: &str, limit: Duration) -> anyhow::Result<()> {
    let node = lab.node(name)?;
    wait_for(lab, node, limit, || check(lab, node))
}

/// Waits until the coordinator, too, knows that every node serves the volume.
pub(super) fn wait_all(lab: &Lab, limit: Duration) -> anyhow::Result<()> {
    let coordinator = lab.node(&lab.coordinator)?;
    wait_for(lab, coordinator, limit, || {
        let rows = state(lab, coordinator)?;
        lab.nodes.iter().try_for_each(|node| serves(&rows, node))
    })
}

fn wait_for(
    lab: &Lab,
    node: &LabNode,
    limit: Duration,
    mut check: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut last = anyhow!("nothing was tried");
    let ready = wait_until(limit, || match check() {
        Ok(()) => true,
        Err(e) => {
            last = e;
            false
        }
    });
    if ready {
        return Ok(());
    }
    let log = lab.node_dir(&node.name).join("log/csvd.log");
    bail!(
        "node {0} of lab {1} does not serve {2} after {3} s: {last:#}\n  csvd.log of {0}:\n{4}",
        node.name,
        lab.name,
        lab.volume,
        limit.as_secs(),
        tail(&log, LOG_LINES),
    )
}

fn check(lab: &Lab, node: &LabNode) -> anyhow::Result<()> {
    let mount_point = format!("/ClusterStorage/{}", lab.volume);
    let mounts = fs::read_to_string(node::path_of(lab, node, "/proc/1/mountinfo")?)?;
    if !mounts.lines().any(|line| line.split(' ').nth(4) == Some(&mount_point)) {
        bail!("{mount_point} is not mounted");
    }
    serves(&state(lab, node)?, node)
}

fn state(lab: &Lab, node: &LabNode) -> anyhow::Result<Vec<VolumeState>> {
    let socket = node::path_of(lab, node, "/run/csv/csvd.sock")?;
    let request = Request::State { volume: Some(lab.volume.clone()) };
    let Answer::State { rows } = admin::ask_socket(&socket, &request, ASK_LIMIT)? else {
        bail!("csvd did not answer with a state");
    };
    Ok(rows)
}

fn serves(rows: &[VolumeState], node: &LabNode) -> anyhow::Result<()> {
    let Some(row) = rows.iter().find(|row| row.node == node.name) else {
        bail!("the state has no row for {}", node.name);
    };
    match row.mode.kind {
        ModeKind::Direct | ModeKind::BlockRedirected | ModeKind::FsRedirected => Ok(()),
        ModeKind::Paused | ModeKind::Unavailable => {
            bail!("{} is {} ({})", node.name, row.mode.kind, row.mode.reason)
        }
    }
}
