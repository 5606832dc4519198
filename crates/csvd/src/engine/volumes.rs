//! The volumes of the database on this node: for each a supervisor of its csvfs, a collector of its events, and an agent.
//! Also csvfs's configuration file, which is written from the database, and where a volume's LUN is.
//!
//! The list of what runs is asked from everywhere, also from network threads: its lock is never held over I/O, nor while an
//! agent is waited for. [`Volumes::reconcile`], which does both, runs in one thread at a time.

use super::Engine;
use super::agent::Agent;
use super::arrivals::Arrivals;
use super::luns::Looker;
use crate::silence::MustStop;
use crate::volume::{Order, Volume, VolumePaths};
use anyhow::{Context, Result};
use csv_cluster::db::{ClusterDb, MemberState, NodeState};
use csv_lun::{Lun, LunOptions};
use csv_types::config::{ClusterConfig, Config, LocalConfig, NodeConfig, VolumeConfig};
use csv_types::{NodeId, VolumeId};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Devices that cannot be a LUN of a cluster.
pub(crate) const NOT_SHARED: [&str; 5] = ["loop", "ram", "sr", "zram", "fd"];

/// See the module.
#[derive(Debug)]
pub(crate) struct Volumes {
    config_path: PathBuf,
    running: Mutex<BTreeMap<String, Arc<Agent>>>,
    /// Everything was stopped: nothing is started any more. Changed with the lock of `running` held.
    closed: AtomicBool,
    pub(super) looker: Looker,
    pub(super) arrivals: Arrivals,
}

impl Volumes {
    pub(crate) fn new(config: &LocalConfig) -> Volumes {
        Volumes {
            config_path: config.run_dir.join("csv.toml"),
            running: Mutex::default(),
            closed: AtomicBool::new(false),
            looker: Looker::default(),
            arrivals: Arrivals::default(),
        }
    }

    /// All agents.
    pub(crate) fn all(&self) -> Vec<Arc<Agent>> {
        self.running.lock().values().cloned().collect()
    }

    /// The agent of a volume.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Agent>> {
        self.running.lock().get(name).cloned()
    }

    /// Something has changed that agents look at.
    pub(crate) fn wake_all(&self) {
        for agent in self.all() {
            agent.wake();
        }
    }

    /// Starts what is new in the database and ends what is gone. Blocks for as long as LUNs and agents need.
    pub(crate) fn reconcile(&self, engine: &Arc<Engine>) {
        let (wanted, config) = {
            let db = engine.db.read();
            if !db.initialised() || !db.nodes.contains_key(&engine.me()) {
                (BTreeMap::new(), None)
            } else {
                let wanted: BTreeMap<String, VolumeId> =
                    db.volumes.values().map(|volume| (volume.name.clone(), volume.id)).collect();
                (wanted, Some(render(&db, &engine.config)))
            }
        };
        let gone: Vec<Arc<Agent>> = {
            let mut running = self.running.lock();
            let names: Vec<String> =
                running.keys().filter(|name| !wanted.contains_key(*name)).cloned().collect();
            names.iter().filter_map(|name| running.remove(name)).collect()
        };
        for agent in gone {
            agent.end();
            agent.volume.order(Order::Stop);
        }
        if let Some(mut config) = config {
            self.look_again(engine, &wanted);
            self.start_new(engine, &wanted, &mut config);
        }
        self.wake_all();
    }

    fn start_new(&self, engine: &Arc<Engine>, wanted: &BTreeMap<String, VolumeId>, config: &mut Config) {
        let running = self.running.lock().clone();
        let news: Vec<(String, VolumeId)> = wanted
            .iter()
            .filter(|(name, _)| !running.contains_key(*name))
            .map(|(name, id)| (name.clone(), *id))
            .collect();
        let mut devices = self.looker.find(&engine.config, &news);
        for agent in running.values() {
            if let Some(device) = &agent.device {
                devices.insert(agent.volume.name.clone(), device.clone());
            }
        }
        for volume in &mut config.volumes {
            volume.lun = devices.get(&volume.name).cloned();
        }
        if let Err(error) = write_config(&self.config_path, config) {
            engine.event("", "config-failed", format!("{error:#}; no volume is started"));
            return;
        }
        for (name, _) in &news {
            // Under the lock that `stop_all` takes first: what is started later would find the csvfs of a next engine, and
            // stop that.
            let mut running = self.running.lock();
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            match self.start(engine, name, devices.get(name).cloned()) {
                Ok(agent) => {
                    running.insert(name.clone(), agent);
                }
                Err(error) => {
                    drop(running);
                    engine.event(name, "start-failed", format!("{name} cannot be started: {error:#}"));
                }
            }
        }
    }

    /// It has ended; it is started anew as a new one is.
    pub(super) fn forget(&self, name: &str) {
        self.running.lock().remove(name);
    }

    fn start(&self, engine: &Arc<Engine>, name: &str, device: Option<PathBuf>) -> Result<Arc<Agent>> {
        let program = std::env::current_exe().context("cannot find csvd's own path")?.with_file_name("csvfs");
        let paths = VolumePaths {
            program,
            config: self.config_path.clone(),
            run_dir: engine.config.run_dir.clone(),
            mount_point: engine.config.mount_dir.join(name),
        };
        let must_stop = must_stop(engine, name, device.is_some());
        let volume = Arc::new(Volume::new(name.to_owned(), paths, must_stop)?);
        let agent = Arc::new(Agent::new(volume.clone(), device));
        let events = engine.events.clone();
        std::thread::Builder::new()
            .name(format!("csvfs-{name}"))
            .spawn(move || volume.supervise(&events))
            .context("cannot start a thread")?;
        agent.start(engine)?;
        Ok(agent)
    }

    /// Ends every csvfs, all at the same time, for good.
    pub(crate) fn stop_all(&self) {
        let agents: Vec<Arc<Agent>> = {
            let running = self.running.lock();
            self.closed.store(true, Ordering::Release);
            running.values().cloned().collect()
        };
        // Nobody is to begin anything anew.
        for agent in &agents {
            agent.end();
        }
        for agent in &agents {
            agent.volume.order(Order::Stop);
        }
        for agent in &agents {
            agent.volume.wait_ended();
        }
        self.running.lock().clear();
    }
}

/// Why this node must do no I/O on a volume, if so: it may be presumed dead, or was fenced.
fn must_stop(engine: &Arc<Engine>, name: &str, path: bool) -> MustStop {
    let (engine, name) = (Arc::downgrade(engine), name.to_owned());
    MustStop::new(move || {
        let engine = engine.upgrade()?;
        if engine.is_starting() || engine.is_stopping() {
            return None;
        }
        if let Some(why) = engine.cut_off() {
            return Some(why);
        }
        dispossessed(&engine.db.read(), engine.me(), engine.incarnation.get(), &name, path)
    })
}

fn dispossessed(db: &ClusterDb, me: NodeId, incarnation: u64, name: &str, path: bool) -> Option<String> {
    let Some(node) = db.nodes.get(&me) else {
        return Some("this node is not in the cluster any more".to_owned());
    };
    if !matches!(node.state, NodeState::Up | NodeState::Isolated) || node.incarnation != incarnation {
        return Some("the cluster has given this node up".to_owned());
    }
    let member = db.volumes.get(name).filter(|_| path)?.members.get(&me)?;
    let fenced = member.state != MemberState::Admitted || member.incarnation != incarnation;
    fenced.then(|| format!("the cluster has this node fenced (generation {})", member.generation))
}

/// csvfs's configuration as the database has it.
fn render(db: &ClusterDb, local: &LocalConfig) -> Config {
    let settings = &db.settings;
    Config {
        cluster: ClusterConfig {
            name: db.name.clone(),
            id: db.id,
            control_port: settings.control_port,
            smb_port: settings.smb_port,
            lease_ms: settings.lease_ms,
            recall_ms: settings.recall_ms,
            op_timeout_ms: settings.op_timeout_ms,
            smb_encrypt: settings.smb_encrypt,
            smb_workers: usize::try_from(settings.smb_workers).unwrap_or(8),
        },
        local: local.clone(),
        nodes: node_configs(db),
        volumes: db
            .volumes
            .values()
            .map(|volume| VolumeConfig { name: volume.name.clone(), index: volume.index, lun: None })
            .collect(),
    }
}

/// All nodes, for csvfs.
pub(crate) fn node_configs(db: &ClusterDb) -> Vec<NodeConfig> {
    let nodes = db.nodes.values();
    nodes.map(|node| NodeConfig { name: node.name.clone(), id: node.id, addr: node.addr }).collect()
}

fn write_config(path: &Path, config: &Config) -> Result<()> {
    let text = format!("# Written by csvd; changes are lost.\n{}", toml::to_string(config)?);
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let new = path.with_extension("toml.new");
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The device of a volume's LUN on this node: as the administrator says, else by its label. Multipath devices go before
/// their paths.
pub(crate) fn find_lun(local: &LocalConfig, name: &str, id: VolumeId) -> Option<PathBuf> {
    if let Some(device) = local.luns.get(name) {
        return Some(device.clone());
    }
    if !local.scan_luns {
        return None;
    }
    let mut disks: Vec<String> = fs::read_dir("/sys/block")
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|disk| !NOT_SHARED.iter().any(|prefix| disk.starts_with(prefix)))
        .collect();
    disks.sort_by_key(|disk| !disk.starts_with("dm-"));
    disks.into_iter().map(|disk| Path::new("/dev").join(disk)).find(|device| carries(device, id))
}

fn carries(device: &Path, id: VolumeId) -> bool {
    let Ok(lun) = Lun::open(device, LunOptions::default()) else { return false };
    matches!(csv_lun::label::read_label(&lun), Ok(Some(label)) if label.volume_id == id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_unknown_must_do_no_io() {
        let why = dispossessed(&ClusterDb::default(), NodeId(1), 1, "Volume1", true);
        assert!(why.unwrap().contains("not in the cluster"));
    }
}
