//! `csvctl volume`: state, redirection, maintenance, where a file lies.

use crate::admin::{self, Target};
use crate::lab::Lab;
use crate::output::{rfc3339, table};
use crate::{lab, volume_create};
use anyhow::{Context, bail};
use clap::{Subcommand, ValueEnum};
use csv_types::admin::{Answer, Request, VolumeState};
use csv_types::config::Config;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

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
            if let Some(name) = node.as_ref().filter(|name| config.node(name).is_none()) {
                let names: Vec<&str> = config.nodes.iter().map(|n| n.name.as_str()).collect();
                bail!("there is no node \"{name}\"; nodes: {}", names.join(", "));
            }
            let volume = only_volume(&config, volume)?;
            admin::ask(&config, &Request::Redirect { volume, on: switch == Switch::On, node }).map(drop)
        }
        VolumeCommand::Maintenance { switch, volume } => {
            let config = target.enter()?;
            let volume = only_volume(&config, volume)?;
            admin::ask(&config, &Request::Maintenance { volume, on: switch == Switch::On }).map(drop)
        }
        VolumeCommand::Map { path, volume } => {
            let config = target.enter()?;
            map(&config, &path, volume, json)
        }
    }
}

fn only_volume(config: &Config, name: Option<String>) -> anyhow::Result<String> {
    let names: Vec<&str> = config.volumes.iter().map(|volume| volume.name.as_str()).collect();
    match (name, names.as_slice()) {
        (Some(name), names) if names.contains(&name.as_str()) => Ok(name),
        (Some(name), []) => bail!("there is no volume \"{name}\": csv.toml names none"),
        (Some(name), names) => bail!("there is no volume \"{name}\"; volumes: {}", names.join(", ")),
        (None, [only]) => Ok((*only).to_owned()),
        (None, []) => {
            bail!("csv.toml names no volume; make one with `csvctl volume create` and add it there")
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

fn print_state(config: &Config, volume: Option<String>, json: bool) -> anyhow::Result<()> {
    let volume = volume.map(|name| only_volume(config, Some(name))).transpose()?;
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

fn map(config: &Config, path: &Path, volume: Option<String>, json: bool) -> anyhow::Result<()> {
    let (volume, path) = split_path(config, path, volume)?;
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
fn split_path(config: &Config, path: &Path, volume: Option<String>) -> anyhow::Result<(String, PathBuf)> {
    let whole = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if let Ok(below) = whole.strip_prefix(&config.local.mount_dir) {
        let mut parts = below.components();
        if let Some(first) = parts.next() {
            let name = first.as_os_str().to_string_lossy().into_owned();
            return Ok((only_volume(config, Some(name))?, parts.as_path().to_owned()));
        }
    }
    let below = path.strip_prefix("/").unwrap_or(path);
    Ok((only_volume(config, volume)?, below.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use csv_types::admin::IoCounts;
    use csv_types::{Epoch, Mode, ModeKind, Reason};

    fn config() -> Config {
        Config::parse(
            "[cluster]\nname='c'\nid='6f1d6c38-6f0e-4b8a-9f0e-2f7b3c1d2e3f'\n[local]\nnode='n1'\n\
             [[node]]\nname='n1'\nid=1\naddr='10.0.0.1'\n[[volume]]\nname='Volume1'\ncoordinator='n1'\n",
        )
        .unwrap()
    }

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
            split_path(&config(), Path::new(path), volume.map(str::to_owned))
        };
        let expected = ("Volume1".to_owned(), PathBuf::from("vm/disk.img"));
        assert_eq!(split("/ClusterStorage/Volume1/vm/disk.img", None).unwrap(), expected);
        assert_eq!(split("vm/disk.img", None).unwrap(), expected);
        assert_eq!(split("/vm/disk.img", Some("Volume1")).unwrap(), expected);
        let error = split("/ClusterStorage/Volume9/x", None).unwrap_err().to_string();
        assert!(error.contains("Volume9") && error.contains("Volume1"), "{error}");
    }
}
