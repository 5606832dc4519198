//! The lab's cluster: made by the first node, joined by the others, as an administrator would, over their csvds.

use super::node;
use super::spec::{Lab, LabNode, WITNESS};
use super::sys::wait_until;
use crate::admin;
use anyhow::{Context, bail};
use csv_cluster::db::{ClusterDb, Command, NodeState, VolumeState};
use csv_types::admin::{Answer, ClusterRequest, Request};
use csvd::status::ClusterStatus;
use serde_json::Value;
use std::time::Duration;

const SOCKET_LIMIT: Duration = Duration::from_secs(20);
const ASK_LIMIT: Duration = Duration::from_secs(60);
/// A token for all nodes of the lab.
const TOKEN_VALID_S: u64 = 600;

/// Asks a node's csvd about the cluster.
pub(super) fn ask(lab: &Lab, name: &str, what: ClusterRequest) -> anyhow::Result<Value> {
    let socket = node::path_of(lab, lab.node(name)?, "/run/csv/csvd.sock")?;
    let answer = admin::ask_socket(&socket, &Request::Cluster { what }, ASK_LIMIT)?;
    let Answer::Cluster { data } = answer else { bail!("csvd of {name} answered {answer:?}") };
    Ok(data)
}

/// The database as a node has it.
pub(super) fn database(lab: &Lab, name: &str) -> anyhow::Result<ClusterDb> {
    Ok(serde_json::from_value(ask(lab, name, ClusterRequest::Db)?)?)
}

fn command(lab: &Lab, name: &str, command: &Command) -> anyhow::Result<()> {
    let command = serde_json::to_value(command)?;
    ask(lab, name, ClusterRequest::Command { command }).map(drop)
}

fn wait_socket(lab: &Lab, member: &LabNode) -> anyhow::Result<()> {
    let socket = node::path_of(lab, member, "/run/csv/csvd.sock")?;
    if !wait_until(SOCKET_LIMIT, || std::os::unix::net::UnixStream::connect(&socket).is_ok()) {
        bail!(
            "csvd of {} did not come up; see {}/log/csvd.log",
            member.name,
            lab.node_dir(&member.name).display()
        );
    }
    Ok(())
}

/// The lab's settings, where they differ from the product's own.
fn settings(lab: &Lab) -> Vec<(String, String)> {
    // Nodes of a lab are made to fail, and are wanted back.
    let mut settings = vec![("quarantine_failures".to_owned(), "0".to_owned())];
    if let Some(lease_ms) = lab.lease_ms {
        settings.push(("recall_ms".to_owned(), (lease_ms / 2).to_string()));
        settings.push(("lease_ms".to_owned(), lease_ms.to_string()));
    }
    if let Some(ms) = lab.op_timeout_ms {
        settings.push(("op_timeout_ms".to_owned(), ms.to_string()));
    }
    if lab.smb_encrypt {
        settings.push(("smb_encrypt".to_owned(), "true".to_owned()));
    }
    settings.extend(lab.settings.iter().cloned());
    settings
}

/// Makes the cluster of nodes that run.
pub(super) fn create(lab: &Lab, tell: &dyn Fn(String)) -> anyhow::Result<()> {
    let [first, others @ ..] = lab.nodes.as_slice() else { bail!("a lab has at least one node") };
    wait_socket(lab, first)?;
    tell(format!("cluster on {}", first.name));
    let (name, id) = (lab.name.clone(), Some(lab.cluster_id));
    ask(lab, &first.name, ClusterRequest::Create { name, id, settings: settings(lab) })
        .context("the cluster cannot be made")?;
    if others.is_empty() {
        return Ok(());
    }
    let uses = u32::try_from(others.len()).unwrap_or(u32::MAX);
    let token = ask(lab, &first.name, ClusterRequest::Token { valid_s: TOKEN_VALID_S, uses })?;
    let token = token.as_str().context("no token")?.to_owned();
    for other in others {
        wait_socket(lab, other)?;
        tell(format!("{} joins", other.name));
        ask(lab, &other.name, ClusterRequest::Join { token: token.clone() })
            .with_context(|| format!("{} cannot join", other.name))?;
    }
    tell("waiting for the nodes to be up".to_owned());
    // By the account of each: whoever is asked next has to know the others.
    let knows_all = |member: &LabNode| {
        database(lab, &member.name).is_ok_and(|db| {
            db.nodes.len() == lab.nodes.len() && db.nodes.values().all(|n| n.state == NodeState::Up)
        })
    };
    let all_up = || lab.nodes.iter().all(knows_all);
    if !wait_until(SOCKET_LIMIT, all_up) {
        bail!("not every node came up; see the csvd.log of each in {}", lab.dir.display());
    }
    Ok(())
}

/// Makes the lab's disk witness and waits until a node runs it and, where it is of use, it votes.
pub(super) fn add_witness(lab: &Lab, limit: Duration) -> anyhow::Result<()> {
    let [first, ..] = lab.nodes.as_slice() else { bail!("a lab has at least one node") };
    let device = first.witness_lun.clone().context("the first node has no path to the witness LUN")?;
    let request = ClusterRequest::MakeDiskWitness { device, name: WITNESS.to_owned(), force: false };
    let warnings = ask(lab, &first.name, request).context("the disk witness cannot be made")?;
    if warnings.as_array().is_none_or(|list| !list.is_empty()) {
        bail!("not every node sees the disk witness: {warnings}");
    }
    let runs = || {
        let Ok(answer) = ask(lab, &first.name, ClusterRequest::Status) else { return false };
        let Ok(status) = serde_json::from_value::<ClusterStatus>(answer) else { return false };
        let held = status.quorum.witness_at.is_some_and(|node| lab.nodes.iter().any(|n| n.name == node));
        held && (!lab.nodes.len().is_multiple_of(2) || status.quorum.voters.len() == lab.nodes.len() + 1)
    };
    if !wait_until(limit, runs) {
        bail!("no node runs the disk witness; see the csvd.log of each in {}", lab.dir.display());
    }
    Ok(())
}

/// Adds the lab's volume and waits until its coordinator has it.
pub(super) fn add_volume(lab: &Lab, limit: Duration) -> anyhow::Result<()> {
    let (name, owner) = (lab.volume.clone(), lab.coordinator.clone());
    ask(lab, &owner, ClusterRequest::AddVolume { name: name.clone(), preferred: vec![owner.clone()] })?;
    let mut moved = false;
    let online = || {
        let Ok(db) = database(lab, &owner) else { return false };
        let Some(volume) = db.volumes.get(&name).filter(|volume| volume.state == VolumeState::Online) else {
            return false;
        };
        let Some(wanted) = db.node_by_name(&owner).map(|node| node.id) else { return false };
        if volume.owner == Some(wanted) {
            return true;
        }
        // Whoever was ready first has it.
        if !moved {
            let (reason, epoch) = ("the lab wants it there".to_owned(), volume.epoch);
            let release = Command::VolumeRelease { name: name.clone(), epoch, to: Some(wanted), reason };
            moved = command(lab, &owner, &release).is_ok();
        }
        false
    };
    if wait_until(limit, online) {
        return Ok(());
    }
    let state =
        database(lab, &owner).ok().and_then(|db| db.volumes.get(&name).map(|v| format!("{:?}", v.state)));
    bail!("volume {name} is not online on {owner}: {}", state.unwrap_or_default())
}
