//! `csvctl volume`: state, redirection, maintenance, where a file lies.

use crate::admin::{self, Target};
use crate::args::Switch;
use crate::lab::Lab;
use crate::names::{node_id, node_ids};
use crate::output::{rfc3339, table};
use crate::{lab, volume_create};
use anyhow::{Context, bail};
use clap::Subcommand;
use csv_cluster::db::{ClusterDb, Command, VolumeState as DbState};
use csv_types::admin::ClusterRequest;
use csv_types::admin::{Answer, Request, VolumeState};
use csv_types::config::LocalConfig;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A planned move takes no longer than draining and a start.
const MOVE_LIMIT: Duration = Duration::from_secs(150);
const MOVE_LOOK: Duration = Duration::from_millis(50);

/// See the module's text.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make a volume on a LUN.
    Create(volume_create::Args),
    /// How every node reaches the volume's data, and why.
    State {
        /// Only this volume.
        volume: Option<String>,
    },
    /// Send all file data through the coordinator's file system.
    Redirect {
        /// On or off.
        switch: Switch,
        /// Only this node; all nodes when absent.
        #[arg(long)]
        node: Option<String>,
        /// Volume; may be left out when there is only one.
        #[arg(long)]
        volume: Option<String>,
    },
    /// Let data operations wait; metadata stays readable.
    Maintenance {
        /// On or off.
        switch: Switch,
        /// Volume; may be left out when there is only one.
        #[arg(long)]
        volume: Option<String>,
    },
    /// All volumes of the cluster: owner, state, reservations.
    List,
    /// Add a volume that was made with `create` to the cluster; every node then serves it.
    Add {
        /// Its name.
        name: String,
        /// Nodes that should own it, best first.
        #[arg(long, value_delimiter = ',')]
        preferred: Vec<String>,
    },
    /// Take a volume that is offline out of the cluster; its data stays on the LUN.
    Remove {
        /// Its name.
        name: String,
    },
    /// Let another node coordinate a volume, without an error to anybody.
    Move {
        /// Name of the volume.
        name: String,
        /// Name of the node.
        node: String,
        /// Do not wait until it is done.
        #[arg(long)]
        no_wait: bool,
    },
    /// Bring a volume online.
    Online {
        /// Its name.
        name: String,
    },
    /// Take a volume offline on all nodes.
    Offline {
        /// Its name.
        name: String,
    },
    /// Say which nodes should own a volume, best first; none: any node.
    Preferred {
        /// Name of the volume.
        name: String,
        /// Names of nodes.
        nodes: Vec<String>,
    },
    /// Where a file's data lies on the LUN.
    Map {
        /// The file, by its path under /ClusterStorage or below the volume.
        path: PathBuf,
        /// Volume; found by the path, or may be left out when there is only one.
        #[arg(long)]
        volume: Option<String>,
    },
}

/// Carries the command out.
pub(crate) fn run(command: VolumeCommand, target: &Target, json: bool) -> anyhow::Result<()> {
    match command {
        VolumeCommand::Create(args) => {
            if let Some(name) = &target.lab {
                lab::enter(&Lab::load(name)?, &target.on)?;
            }
            volume_create::run(args)
        }
        VolumeCommand::State { volume } => {
            let config = target.enter()?;
            print_state(&config, volume, json)
        }
        VolumeCommand::Redirect { switch, node, volume } => {
            let config = target.enter()?;
            let db = admin::database(&config)?;
            if let Some(name) = &node {
                node_id(&db, name)?;
            }
            let volume = only_volume(&db, volume)?;
            admin::ask(&config, &Request::Redirect { volume, on: switch.is_on(), node }).map(drop)
        }
        VolumeCommand::Maintenance { switch, volume } => {
            let config = target.enter()?;
            let volume = only_volume(&admin::database(&config)?, volume)?;
            admin::ask(&config, &Request::Maintenance { volume, on: switch.is_on() }).map(drop)
        }
        VolumeCommand::Map { path, volume } => {
            let config = target.enter()?;
            map(&config, &path, volume, json)
        }
        VolumeCommand::List => print_list(&admin::database(&target.enter()?)?, json),
        VolumeCommand::Add { name, preferred } => {
            let config = target.enter()?;
            admin::ask_cluster(&config, ClusterRequest::AddVolume { name, preferred }).map(drop)
        }
        VolumeCommand::Remove { name } => admin::command(&target.enter()?, &Command::VolumeRemove { name }),
        VolumeCommand::Move { name, node, no_wait } => move_to(&target.enter()?, &name, &node, no_wait),
        VolumeCommand::Online { name } => {
            admin::command(&target.enter()?, &Command::VolumeBringOnline { name })
        }
        VolumeCommand::Offline { name } => {
            let reason = "on request".to_owned();
            admin::command(&target.enter()?, &Command::VolumeOffline { name, reason })
        }
        VolumeCommand::Preferred { name, nodes } => {
            let config = target.enter()?;
            let preferred = node_ids(&admin::database(&config)?, &nodes)?;
            admin::command(&config, &Command::VolumePreferred { name, preferred })
        }
    }
}

/// Orders the move and waits until the volume is online there, or elsewhere.
fn move_to(config: &LocalConfig, name: &str, node: &str, no_wait: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let to = node_id(&db, node)?;
    let epoch = db.volumes.get(name).with_context(|| format!("there is no volume \"{name}\""))?.epoch;
    let reason = "on request".to_owned();
    admin::command(config, &Command::VolumeRelease { name: name.to_owned(), epoch, to: Some(to), reason })?;
    if no_wait {
        return Ok(());
    }
    let deadline = Instant::now() + MOVE_LIMIT;
    loop {
        let db = admin::database(config)?;
        let volume = db.volumes.get(name).with_context(|| format!("volume {name} is gone"))?;
        if volume.state == DbState::Online {
            if volume.owner == Some(to) {
                return Ok(());
            }
            let owner = volume.owner.map_or_else(|| "nobody".to_owned(), |owner| db.node_name(owner));
            bail!("{name} is on {owner}: the move was given up, `csvctl events` says why");
        }
        if Instant::now() >= deadline {
            bail!("{name} is {} for {} s; `csvctl events` says why", volume.state, MOVE_LIMIT.as_secs());
        }
        std::thread::sleep(MOVE_LOOK);
    }
}

fn print_list(db: &ClusterDb, json: bool) -> anyhow::Result<()> {
    if json {
        let rows: Vec<Value> = db
            .volumes
            .values()
            .map(|volume| {
                json!({
                    "name": volume.name,
                    "id": volume.id,
                    "fs": volume.fs,
                    "state": volume.state.to_string(),
                    "reason": volume.state.reason(),
                    "owner": volume.owner.map(|owner| db.node_name(owner)),
                    "epoch": volume.epoch,
                    "preferred": volume.preferred.iter().map(|node| db.node_name(*node)).collect::<Vec<_>>(),
                    "members": volume.members,
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let head = ["VOLUME", "FS", "STATE", "OWNER", "EPOCH", "SINCE", "MAY WRITE", "REASON"];
    let mut cells = vec![head.map(str::to_owned).to_vec()];
    for volume in db.volumes.values() {
        let members = volume.members.iter().map(|(node, member)| match member.state {
            csv_cluster::db::MemberState::Admitted => db.node_name(*node),
            other @ (csv_cluster::db::MemberState::FencePending | csv_cluster::db::MemberState::Fenced) => {
                format!("{} ({other:?})", db.node_name(*node))
            }
        });
        cells.push(vec![
            volume.name.clone(),
            volume.fs.clone(),
            volume.state.to_string(),
            volume.owner.map_or_else(|| "-".to_owned(), |owner| db.node_name(owner)),
            volume.epoch.to_string(),
            rfc3339(volume.since_unix_ms / 1000 * 1000),
            members.collect::<Vec<_>>().join(", "),
            volume.state.reason().to_owned(),
        ]);
    }
    print!("{}", table(&cells));
    Ok(())
}

fn only_volume(db: &ClusterDb, name: Option<String>) -> anyhow::Result<String> {
    let names: Vec<&str> = db.volumes.keys().map(String::as_str).collect();
    choose(&names, name)
}

fn choose(names: &[&str], name: Option<String>) -> anyhow::Result<String> {
    match (name, names) {
        (Some(name), names) if names.contains(&name.as_str()) => Ok(name),
        (Some(name), []) => bail!("there is no volume \"{name}\": the cluster has none"),
        (Some(name), names) => bail!("there is no volume \"{name}\"; volumes: {}", names.join(", ")),
        (None, [only]) => Ok((*only).to_owned()),
        (None, []) => {
            bail!(
                "the cluster has no volume; make one with `csvctl volume create` and add it with `csvctl volume add`"
            )
        }
        (None, names) => bail!("there are several volumes ({}); say which with --volume", names.join(", ")),
    }
}

/// State as told by a node of a lab. Moves this process into the node, so it is the last thing to do.
pub(crate) fn print_state_of(lab: &Lab, node: &str, json: bool) -> anyhow::Result<()> {
    let target =
        Target { config: "/etc/csv/csv.toml".into(), lab: Some(lab.name.clone()), on: node.to_owned() };
    print_state(&target.enter()?, None, json)
}

fn print_state(config: &LocalConfig, volume: Option<String>, json: bool) -> anyhow::Result<()> {
    let volume = volume.map(|name| only_volume(&admin::database(config)?, Some(name))).transpose()?;
    let Answer::State { mut rows } = admin::ask(config, &Request::State { volume })? else {
        bail!("csvd answered something else than a state; csvctl and csvd must be of one version");
    };
    rows.sort_by(|a, b| (&a.volume, &a.node).cmp(&(&b.volume, &b.node)));
    if json {
        let rows: Vec<Value> = rows.iter().map(state_object).collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", state_table(&rows));
    }
    Ok(())
}

fn state_object(row: &VolumeState) -> Value {
    json!({
        "node": row.node,
        "volume": row.volume,
        "role": row.role,
        "mode": row.mode.kind.to_string(),
        "reason": row.mode.reason.to_string(),
        "since": rfc3339(row.since_unix_s.saturating_mul(1000)),
        "epoch": row.epoch,
        "io": row.io,
    })
}

fn state_table(rows: &[VolumeState]) -> String {
    let head =
        ["NODE", "VOLUME", "ROLE", "MODE", "REASON", "SINCE", "DIRECT R/W", "BLOCK R/W", "FS R/W", "OPEN"];
    let mut cells = vec![head.map(str::to_owned).to_vec()];
    for row in rows {
        let reason = row.mode.reason.to_string();
        cells.push(vec![
            row.node.clone(),
            row.volume.clone(),
            row.role.clone(),
            row.mode.kind.to_string(),
            if reason.is_empty() { "-".to_owned() } else { reason },
            rfc3339(row.since_unix_s.saturating_mul(1000)),
            format!("{}/{}", row.io.direct_reads, row.io.direct_writes),
            format!("{}/{}", row.io.block_reads, row.io.block_writes),
            format!("{}/{}", row.io.fs_reads, row.io.fs_writes),
            row.io.open_files.to_string(),
        ]);
    }
    table(&cells)
}

fn map(config: &LocalConfig, path: &Path, volume: Option<String>, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let names: Vec<&str> = db.volumes.keys().map(String::as_str).collect();
    let (volume, path) = split_path(&config.mount_dir, &names, path, volume)?;
    let path = path.to_str().context("the protocol takes only paths in UTF-8")?.to_owned();
    let Answer::Map { extents } = admin::ask(config, &Request::Map { volume, path })? else {
        bail!("csvd answered something else than a map; csvctl and csvd must be of one version");
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&extents)?);
        return Ok(());
    }
    let mut cells = vec![["FILE OFFSET", "LUN OFFSET", "LENGTH"].map(str::to_owned).to_vec()];
    for extent in extents {
        cells.push(vec![
            extent.file_offset.to_string(),
            extent.lun_offset.to_string(),
            extent.len.to_string(),
        ]);
    }
    print!("{}", table(&cells));
    Ok(())
}

/// Volume and path below it. A path under the mount directory tells the volume; symbolic links are followed, as
/// programs would.
fn split_path(
    mount_dir: &Path,
    names: &[&str],
    path: &Path,
    volume: Option<String>,
) -> anyhow::Result<(String, PathBuf)> {
    let whole = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if let Ok(below) = whole.strip_prefix(mount_dir) {
        let mut parts = below.components();
        if let Some(first) = parts.next() {
            let name = first.as_os_str().to_string_lossy().into_owned();
            return Ok((choose(names, Some(name))?, parts.as_path().to_owned()));
        }
    }
    let below = path.strip_prefix("/").unwrap_or(path);
    Ok((choose(names, volume)?, below.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use csv_types::admin::IoCounts;
    use csv_types::{Epoch, Mode, ModeKind, Reason};

    #[test]
    fn state_in_json_has_the_promised_fields() {
        let row = VolumeState {
            node: "n3".into(),
            volume: "Volume1".into(),
            role: "data-server".into(),
            mode: Mode { kind: ModeKind::BlockRedirected, reason: Reason::NoDiskConnectivity },
            since_unix_s: 951_782_400,
            epoch: Epoch(7),
            io: IoCounts { block_reads: 3, ..IoCounts::default() },
        };
        let object = state_object(&row);
        assert_eq!(object["mode"], "block-redirected");
        assert_eq!(object["reason"], "NoDiskConnectivity");
        assert_eq!(object["since"], "2000-02-29T00:00:00Z");
        assert_eq!(object["epoch"], 7);
        assert_eq!(object["io"]["block_reads"], 3);
        let direct = VolumeState { mode: Mode::DIRECT, ..row };
        assert_eq!(state_object(&direct)["reason"], "");
        assert!(state_table(&[direct]).lines().nth(1).unwrap().contains("direct  -"));
    }

    #[test]
    fn paths_and_names_lead_to_the_volume() {
        let split = |path: &str, volume: Option<&str>| {
            let mount_dir = Path::new("/ClusterStorage");
            split_path(mount_dir, &["Volume1"], Path::new(path), volume.map(str::to_owned))
        };
        let expected = ("Volume1".to_owned(), PathBuf::from("vm/disk.img"));
        assert_eq!(split("/ClusterStorage/Volume1/vm/disk.img", None).unwrap(), expected);
        assert_eq!(split("vm/disk.img", None).unwrap(), expected);
        assert_eq!(split("/vm/disk.img", Some("Volume1")).unwrap(), expected);
        let error = split("/ClusterStorage/Volume9/x", None).unwrap_err().to_string();
        assert!(error.contains("Volume9") && error.contains("Volume1"), "{error}");
    }
}
