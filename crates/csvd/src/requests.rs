//! Requests of `csvctl cluster`, `node`, `quorum` and the like.

use crate::daemon::Daemon;
use crate::engine::volumes::{NOT_SHARED, find_lun};
use crate::engine::{Engine, backup};
use anyhow::{Context, Result, bail};
use csv_cluster::db::{ClusterDb, Command, Witness};
use csv_cluster::quorum::{VoterId as Voter, tolerates};
use csv_lun::{Lun, LunOptions};
use csv_raft::{Metrics, Role};
use csv_types::VolumeId;
use csv_types::admin::ClusterRequest;
use csvd::status::{ClusterStatus, NodeStatus, QuorumStatus};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);
/// A voter that answered the leader within this time is there.
const ACK_AGE_MS_MAX: u64 = 2_000;

/// Answers a request about the cluster.
pub(crate) fn answer(daemon: &Daemon, request: ClusterRequest) -> Result<Value> {
    match request {
        ClusterRequest::Create { name, id, settings } => {
            daemon.create(&name, id, settings)?;
            Ok(Value::Null)
        }
        ClusterRequest::Join { token } => daemon.join(&token).map(|()| Value::Null),
        ClusterRequest::Leave => daemon.leave().map(|()| Value::Null),
        ClusterRequest::Destroy => daemon.destroy().map(|()| Value::Null),
        ClusterRequest::Rejoin { token, discard } => daemon.rejoin(&token, discard).map(|()| Value::Null),
        ClusterRequest::Token { valid_s, uses } => {
            let engine = daemon.engine()?;
            let token = daemon.block_on(engine.make_token(Duration::from_secs(valid_s), uses))?;
            Ok(Value::String(token))
        }
        ClusterRequest::Status => Ok(serde_json::to_value(status(&*daemon.engine()?))?),
        ClusterRequest::Db => {
            let mut db = daemon.engine()?.db.read().clone();
            db.secrets = Default::default();
            db.tokens.clear();
            // Files of resources may be secrets too, and are long.
            db.checkpoints.values_mut().for_each(csv_cluster::db::FileHead::alone);
            Ok(serde_json::to_value(&db)?)
        }
        ClusterRequest::Command { command } => {
            let engine = daemon.engine()?;
            let command: Command = serde_json::from_value(command).context("not a command")?;
            if !is_for_administrators(&command, &engine.db.read()) {
                bail!("this command is the engine's own");
            }
            daemon.block_on(engine.check_resource(&command))?;
            let applied = daemon.block_on(engine.propose(command, LIMIT))?;
            Ok(serde_json::to_value(applied)?)
        }
        ClusterRequest::ResourceTypes { kind } => {
            Ok(serde_json::to_value(daemon.engine()?.resource_types(kind.as_deref())?)?)
        }
        ClusterRequest::GroupsWaiting => Ok(serde_json::to_value(daemon.engine()?.groups_waiting())?),
        ClusterRequest::Candidates { group } => {
            Ok(serde_json::to_value(daemon.engine()?.candidates(&group)?)?)
        }
        ClusterRequest::BalanceDryRun => Ok(serde_json::to_value(daemon.engine()?.balance_dry_run())?),
        ClusterRequest::Control { resource, verb, arguments } => {
            let engine = daemon.engine()?;
            daemon.block_on(engine.control_resource(&resource, verb, arguments))
        }
        ClusterRequest::MoveProgress { group } => {
            let engine = daemon.engine()?;
            Ok(serde_json::to_value(daemon.block_on(engine.move_progress(&group))?)?)
        }
        ClusterRequest::MakeDiskWitness { device, name, force } => {
            let engine = daemon.engine()?;
            let warnings = daemon.block_on(engine.make_disk_witness(device, name, force))?;
            Ok(serde_json::to_value(warnings)?)
        }
        ClusterRequest::SetWitnessNode { name, addr, valid_s } => {
            let engine = daemon.engine()?;
            csv_net::pki::check_node_name(&name)?;
            let token = engine.name_witness_node(name, addr, Duration::from_secs(valid_s));
            Ok(Value::String(daemon.block_on(token)?))
        }
        ClusterRequest::ForceStart { name } => daemon.force_start(&name).map(|()| Value::Null),
        ClusterRequest::AddVolume { name, preferred } => add_volume(daemon, &name, &preferred),
        ClusterRequest::Backup { path } => backup::write(&*daemon.engine()?, &path).map(|()| Value::Null),
        ClusterRequest::Restore { path, others_are_down } => {
            daemon.restore(&path, others_are_down).map(|()| Value::Null)
        }
        ClusterRequest::Check => {
            let engine = daemon.engine()?;
            Ok(serde_json::to_value(daemon.block_on(engine.check_cluster()))?)
        }
    }
}

/// What nodes decide among themselves cannot be given from outside: no command line forces two owners.
fn is_for_administrators(command: &Command, db: &ClusterDb) -> bool {
    if let Command::QuorumSet { config } = command {
        // A witness comes in by the commands that make it.
        return config.witness == Witness::None || config.witness == db.quorum.witness;
    }
    if let Command::Property { key, .. } = command {
        return !key.starts_with("witness.");
    }
    matches!(
        command,
        Command::NodePause { .. }
            | Command::NodeResume { .. }
            | Command::NodeEvict { .. }
            | Command::NodeClearQuarantine { .. }
            | Command::NodeVote { .. }
            | Command::NodeAddr { .. }
            | Command::VolumeRemove { .. }
            | Command::VolumeRelease { .. }
            | Command::VolumeOffline { .. }
            | Command::VolumeBringOnline { .. }
            | Command::VolumePreferred { .. }
            | Command::Setting { .. }
            | Command::TokenRevoke { .. }
            | Command::RaiseFeatureLevel { .. }
            | Command::GroupAdd { .. }
            | Command::GroupPolicy { .. }
            | Command::GroupRemove { .. }
            | Command::GroupOnline { .. }
            | Command::GroupOffline { .. }
            | Command::GroupMaintenance { .. }
            | Command::GroupRelease { to: Some(_), .. }
            | Command::ResourceAdd { .. }
            | Command::ResourceSet { .. }
            | Command::ResourceRemove { .. }
            | Command::ResourceOnline { .. }
            | Command::ResourceOffline { .. }
            | Command::TypePut { .. }
            | Command::TypeRemove { .. }
    )
}

fn add_volume(daemon: &Daemon, name: &str, preferred: &[String]) -> Result<Value> {
    let engine = daemon.engine()?;
    let cluster = engine.identity.cluster_id;
    let preferred = {
        let db = engine.db.read();
        let find = |name: &String| {
            let node = db.node_by_name(name).map(|node| node.id);
            node.with_context(|| format!("there is no node \"{name}\""))
        };
        preferred.iter().map(find).collect::<Result<Vec<_>>>()?
    };
    let device = daemon.config.luns.get(name).cloned();
    let device = match device {
        Some(device) => device,
        None if !daemon.config.scan_luns => bail!(
            "this node does not look at its disks (scan_luns = false): say where {name} is in [local.luns] of \
             /etc/csv/csv.toml and start csvd again"
        ),
        None => labelled(&daemon.config, name, cluster).with_context(|| {
            format!("no disk of this node carries a label of volume {name} of this cluster; `csvctl volume create` makes one")
        })?,
    };
    let lun = Lun::open(&device, LunOptions::default())?;
    let label = csv_lun::label::read_label(&lun)?
        .with_context(|| format!("{} carries no csvfs volume", device.display()))?;
    if label.cluster_id != cluster {
        bail!("{} belongs to another cluster (id {})", device.display(), label.cluster_id);
    }
    if label.name != name {
        bail!("{} is volume {}, not {name}", device.display(), label.name);
    }
    let fs = match label.fs {
        csv_ondisk::FsKind::Ext4 => "ext4",
        csv_ondisk::FsKind::Xfs => "xfs",
    };
    let command = Command::VolumeAdd {
        name: name.to_owned(),
        id: label.volume_id,
        fs: fs.to_owned(),
        preferred,
        label_epoch: label.epoch,
    };
    let applied = daemon.block_on(engine.propose(command, LIMIT))?;
    Ok(serde_json::to_value(applied)?)
}

/// A disk whose label has that name, of this cluster.
fn labelled(
    config: &csv_types::config::LocalConfig,
    name: &str,
    cluster: uuid::Uuid,
) -> Option<std::path::PathBuf> {
    let disks = std::fs::read_dir("/sys/block").ok()?;
    let names = disks.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()));
    let id = to_look_at(config.scan_luns, names).into_iter().find_map(|disk| {
        let lun = Lun::open(&Path::new("/dev").join(disk), LunOptions::default()).ok()?;
        let label = csv_lun::label::read_label(&lun).ok()??;
        (label.name == name && label.cluster_id == cluster).then_some(label.volume_id)
    });
    find_lun(config, name, id.unwrap_or(VolumeId(uuid::Uuid::nil())))
}

/// The disks that may be LUNs, if any are to be looked at.
fn to_look_at(scan_luns: bool, disks: impl Iterator<Item = String>) -> Vec<String> {
    let shared = |disk: &String| scan_luns && !NOT_SHARED.iter().any(|prefix| disk.starts_with(prefix));
    disks.filter(shared).collect()
}

fn status(engine: &Engine) -> ClusterStatus {
    let metrics = engine.raft().metrics();
    // Before the database is held: the LUN may take its time.
    let witness_at = witness_at(engine);
    let db = engine.db.read();
    let voters = metrics.voter_ids();
    let now = crate::engine::unix_ms();
    let nodes = db
        .nodes
        .values()
        .map(|node| NodeStatus {
            id: node.id,
            name: node.name.clone(),
            addr: node.addr.to_string(),
            state: node.display_state(now).to_string(),
            reason: node.down_reason.clone(),
            since_unix_ms: node.since_unix_ms,
            votes: voters.contains(&u64::from(node.id.0)),
            volumes: db.volumes_of(node.id).into_iter().map(str::to_owned).collect(),
            version: node.version.clone(),
        })
        .collect();
    ClusterStatus {
        name: db.name.clone(),
        id: db.id,
        node: engine.identity.name.clone(),
        cut_off: engine.cut_off(),
        feature_level: db.feature_level,
        leader: metrics.leader.map(|leader| voter_name(&db, Voter(leader))),
        term: metrics.term,
        applied: metrics.applied.unwrap_or(0),
        nodes,
        quorum: QuorumStatus { witness_at, ..quorum(engine, &db, &metrics) },
    }
}

/// Who holds the disk witness, in words.
fn witness_at(engine: &Engine) -> Option<String> {
    let holder = engine.disk_witness.holder()?;
    Some(match holder {
        Ok(Some(node)) => engine.db.read().node_name(node),
        Ok(None) => "nobody".to_owned(),
        Err(error) => format!("not known here: {error:#}"),
    })
}

fn voter_name(db: &ClusterDb, voter: Voter) -> String {
    voter.node().map_or_else(|| "witness".to_owned(), |node| db.node_name(node))
}

fn quorum(engine: &Engine, db: &ClusterDb, metrics: &Metrics) -> QuorumStatus {
    let voters: BTreeSet<Voter> = metrics.voter_ids().into_iter().map(Voter).collect();
    let cut_off = engine.cut_off();
    let answers = |voter: &&Voter| {
        if voter.0 == metrics.id {
            return true;
        }
        let acked = metrics.followers.get(&voter.0).and_then(|follower| follower.ack_age_ms);
        match metrics.role {
            Role::Leader => acked.is_some_and(|age| age <= ACK_AGE_MS_MAX),
            // What the others answer only the leader knows; heartbeats tell of nodes.
            Role::Learner | Role::Follower | Role::Candidate | Role::Stopped => {
                voter.node().map_or(cut_off.is_none(), |node| engine.hears(node))
            }
        }
    };
    let live: BTreeSet<Voter> = voters.iter().filter(answers).copied().collect();
    let names = |set: &BTreeSet<Voter>| set.iter().map(|voter| voter_name(db, *voter)).collect();
    QuorumStatus {
        witness: db.quorum.witness.to_string(),
        witness_at: None,
        witness_problem: engine.disk_witness.problem(),
        dynamic: db.quorum.dynamic,
        voters: names(&voters),
        live: names(&live),
        // Whoever reaches no majority cannot know better, whatever it last heard of the others.
        tolerates: if cut_off.is_some() { None } else { tolerates(&voters, &live) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_looked_at_only_where_that_is_wanted_and_they_can_be_shared() {
        let disks = || ["loop0", "sda", "dm-0", "zram0", "nvme0n1"].map(str::to_owned).into_iter();
        assert_eq!(to_look_at(true, disks()), ["sda", "dm-0", "nvme0n1"]);
        assert!(to_look_at(false, disks()).is_empty());
    }
}
