//! What can happen to a node: power cut, clean stop, restart, network partition, path to the LUN failing.

use super::node::{self, running};
use super::spec::{Lab, LabNode, WITNESS};
use super::sys::wait_until;
use super::{lun, net, ready};
use crate::admin;
use anyhow::{Context, bail};
use csv_types::admin::{PathFault, Request};
use csvd::client::ClientError;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// Time for csvfs to shut its file system down.
const CRASH_LIMIT: Duration = Duration::from_secs(10);
/// Time for csvd to end every csvfs; csvd itself kills after 20 s.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Power cut: the file system is shut down without flushing its log, then every process dies, then the path to
/// the LUN is taken away, so nothing of the node can reach the LUN later.
pub(super) fn crash(lab: &mut Lab, name: &str) -> anyhow::Result<()> {
    let target = lab.node(name)?.clone();
    let run = node::path_of(lab, &target, "/run/csv")?;
    // Nobody hears of what happens to the node now.
    net::switch_off(lab, &target)?;
    let request = Request::Crash { volume: lab.volume.clone() };
    let mut asked = csvd::client::call(&run.join("csvd.sock"), &request, CRASH_LIMIT);
    if let Err(ClientError::Connect { .. }) = asked {
        // No csvd, but csvfs lives on without it.
        asked = csvd::client::call(&run.join(format!("{}.sock", lab.volume)), &request, CRASH_LIMIT);
    }
    let refused = match asked {
        // Dying is an answer too. With nobody there to ask, no file system is mounted either.
        Ok(_) | Err(ClientError::Unknown { .. } | ClientError::Connect { .. }) => None,
        Err(e @ (ClientError::Refused(_) | ClientError::Protocol { .. })) => Some(e),
    };
    let disks = shut_down_disks(lab, &target);
    node::kill(lab, &target)?;
    take_path(lab, name)?;
    let no_power_cut = || {
        format!(
            "{name} was killed, but its file system was not shut down first, so this was no true power cut"
        )
    };
    refused.map_or(Ok(()), Err).with_context(no_power_cut)?;
    disks.with_context(no_power_cut)
}

/// What the node has mounted of the lab's disks: its memory of them goes without being written.
fn shut_down_disks(lab: &Lab, node: &LabNode) -> anyhow::Result<()> {
    let mut numbers = Vec::new();
    for device in node.disk_luns.values() {
        let rdev = fs::metadata(device).with_context(|| device.display().to_string())?.rdev();
        numbers.push(format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev)));
    }
    if numbers.is_empty() {
        return Ok(());
    }
    let mounts = fs::read_to_string(node::path_of(lab, node, "/proc/1/mountinfo")?)?;
    // proc_pid_mountinfo(5): the device's number is the third field, the mount point the fifth.
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    for fields in fields.filter(|fields| fields.get(2).is_some_and(|n| numbers.iter().any(|of| of == n))) {
        let point = fields.get(4).copied().unwrap_or_default().replace("\\040", " ");
        let root = fs::File::open(node::path_of(lab, node, &point)?).with_context(|| point.clone())?;
        csv_lun::sys::fs_shutdown(&root, csv_lun::sys::SHUTDOWN_NOLOGFLUSH).with_context(|| point.clone())?;
    }
    Ok(())
}

fn take_path(lab: &mut Lab, name: &str) -> anyhow::Result<()> {
    let node = lab.node_mut(name)?;
    node.holder_pid = None;
    let disks = std::mem::take(&mut node.disk_luns).into_values();
    for device in [node.lun.take(), node.witness_lun.take()].into_iter().flatten().chain(disks) {
        lun::detach(&device)?;
    }
    lab.save()
}

/// Clean stop of the whole node.
pub(super) fn stop(lab: &mut Lab, name: &str) -> anyhow::Result<()> {
    let target = lab.node(name)?.clone();
    if running(lab, &target).is_some() {
        let socket = node::path_of(lab, &target, "/run/csv/csvd.sock")?;
        admin::ask_socket(&socket, &Request::Stop, STOP_LIMIT).with_context(|| {
            format!("{name} could not be stopped cleanly; `csvctl lab crash {name}` kills it")
        })?;
        node::kill(lab, &target)?;
    }
    net::switch_off(lab, &target)?;
    take_path(lab, name)
}

/// Clean stop of several nodes, the coordinator last, so that the others can hand back what they hold.
pub(super) fn stop_many(lab: &mut Lab, names: &[String]) -> anyhow::Result<()> {
    let mut names = names.to_vec();
    if names.is_empty() {
        names = lab.nodes.iter().map(|node| node.name.clone()).collect();
    }
    names.sort_by_key(|name| *name == lab.coordinator);
    names.iter().try_for_each(|name| stop(lab, name))
}

/// Starts the node, stopping it cleanly first where it runs.
pub(super) fn restart(lab: &mut Lab, name: &str) -> anyhow::Result<()> {
    lab.node(name)?;
    stop(lab, name)?;
    node::start(lab, name)
}

/// Waits until the node serves the volume or, with `wait_s` 0, until its csvd answers.
pub(super) fn wait_started(lab: &Lab, name: &str, wait_s: u64) -> anyhow::Result<()> {
    if wait_s > 0 {
        return ready::wait(lab, name, Duration::from_secs(wait_s));
    }
    let socket = node::path_of(lab, lab.node(name)?, "/run/csv/csvd.sock")?;
    if !wait_until(CRASH_LIMIT, || socket.exists()) {
        bail!("csvd of {name} did not come up; see {}/log/csvd.log", lab.node_dir(name).display());
    }
    Ok(())
}

/// Cuts the network between a node and another one, or all others.
pub(super) fn partition(lab: &Lab, name: &str, from: Option<&str>) -> anyhow::Result<()> {
    let node = lab.node(name)?;
    let others: Vec<&LabNode> = match from {
        Some(other) if other == name => bail!("{name} cannot be cut off from itself"),
        Some(other) => vec![lab.node(other)?],
        None => lab.nodes.iter().filter(|other| other.name != name).collect(),
    };
    net::partition(lab, node, &others)
}

/// Sets the fault of the node's path to the LUN, or to the witness LUN.
pub(super) fn path_fault(lab: &Lab, name: &str, fault: PathFault, witness: bool) -> anyhow::Result<()> {
    let node = lab.node(name)?;
    if witness && !lab.witness {
        bail!("this lab has no disk witness; `csvctl lab up --witness` makes one");
    }
    if !witness && !node.path {
        bail!("{name} has no path to the LUN in this lab");
    }
    let socket = node::path_of(lab, node, "/run/csv/csvd.sock")?;
    let volume = if witness { WITNESS.to_owned() } else { lab.volume.clone() };
    let request = Request::Fault { volume, fault };
    admin::ask_socket(&socket, &request, CRASH_LIMIT).map(drop)
}
