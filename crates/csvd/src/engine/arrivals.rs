//! LUNs that appear after a volume was started without them: a disk that was connected later, a path that was mended.
//!
//! csvfs works with the LUN that it finds at its start, and registers before. So a csvfs that found none is ended in good order
//! and started anew with its agent, like a new volume's; it cannot be the coordinator, and everybody else goes on. Its mount goes
//! away for a moment, so that is done only while nobody uses it (no open file, no working directory).

use super::Engine;
use super::agent::Agent;
use super::volumes::Volumes;
use crate::volume::Order;
use csv_cluster::failover::{PathState, VolumeReport};
use csv_types::VolumeId;
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between looks.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A csvfs that finds no LUN although there is one is not started anew more often than this.
const RESTART_EVERY: Duration = Duration::from_secs(60);

/// What was looked at, and done, when.
#[derive(Debug, Default)]
pub(crate) struct Arrivals(Mutex<Past>);

#[derive(Debug, Default)]
struct Past {
    looked: Option<Instant>,
    restarted: BTreeMap<String, Instant>,
    /// Volumes in use, of which that was told.
    told: BTreeMap<String, PathBuf>,
}

impl Past {
    fn is_due(&mut self, now: Instant) -> bool {
        let due = self.looked.is_none_or(|at| now.duration_since(at) >= LOOK_EVERY);
        if due {
            self.looked = Some(now);
        }
        due
    }

    fn may_restart(&self, name: &str, now: Instant) -> bool {
        self.restarted.get(name).is_none_or(|at| now.duration_since(*at) >= RESTART_EVERY)
    }
}

/// Was csvfs started where its LUN should be, and found none?
fn found_none(report: &VolumeReport) -> bool {
    report.csvfs && report.path == PathState::None
}

impl Volumes {
    /// Looks for what is missing, and ends what has to be started anew for it. Blocks for as long as LUNs and csvfs need.
    pub(crate) fn look_again(&self, engine: &Engine, wanted: &BTreeMap<String, VolumeId>) {
        if engine.is_starting()
            || engine.cut_off().is_some()
            || !self.arrivals.0.lock().is_due(Instant::now())
        {
            return;
        }
        let lacking: Vec<(Arc<Agent>, VolumeId)> = self
            .all()
            .into_iter()
            .filter(|agent| agent.device.is_none() || found_none(&agent.report()))
            .filter_map(|agent| wanted.get(&agent.volume.name).map(|id| (agent.clone(), *id)))
            .collect();
        let unknown: Vec<(String, VolumeId)> = lacking
            .iter()
            .filter(|(agent, _)| agent.device.is_none())
            .map(|(agent, id)| (agent.volume.name.clone(), *id))
            .collect();
        let found = if !unknown.is_empty() && self.looker.is_due(&engine.config) {
            self.looker.find(&engine.config, &unknown)
        } else {
            BTreeMap::new()
        };
        for (agent, id) in lacking {
            let device = match &agent.device {
                Some(device) => Some(device).filter(|device| self.looker.carries(device, id)),
                None => found.get(&agent.volume.name),
            };
            if let Some(device) = device.cloned() {
                self.arrived(engine, &agent, &device);
            }
        }
    }

    fn arrived(&self, engine: &Engine, agent: &Agent, device: &Path) {
        let name = &agent.volume.name;
        if !self.arrivals.0.lock().may_restart(name, Instant::now()) {
            return;
        }
        let mount_point = engine.config.mount_dir.join(name);
        if agent.volume.pid().is_some() && is_used(&mount_point) {
            let told = self.arrivals.0.lock().told.insert(name.clone(), device.to_owned());
            if told.as_deref() != Some(device) {
                let text = format!(
                    "the LUN of {name} is there now ({}); it is used as soon as nobody has files open under {}",
                    device.display(),
                    mount_point.display()
                );
                engine.event(name, "lun-found", text);
            }
            return;
        }
        let text =
            format!("the LUN of {name} is there now ({}); csvfs starts anew with it", device.display());
        engine.event(name, "lun-found", text);
        {
            let mut past = self.arrivals.0.lock();
            past.restarted.insert(name.clone(), Instant::now());
            past.told.remove(name);
        }
        agent.end();
        agent.volume.order(Order::Stop);
        agent.volume.wait_ended();
        self.forget(name);
    }
}

/// Does anybody use that mount? The kernel marks it as expiring, and says so, only when nobody does; every later use takes
/// the mark away.
fn is_used(mount_point: &Path) -> bool {
    match unmount(mount_point, UnmountFlags::EXPIRE) {
        // Marked; it would be unmounted only by a second call. Or it was, or is no mount: nobody uses it.
        Err(Errno::AGAIN | Errno::INVAL | Errno::NOENT) | Ok(()) => false,
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_csvfs_without_a_lun_is_started_anew_and_not_all_the_time() {
        let report = |csvfs, path| VolumeReport { csvfs, path, ..VolumeReport::default() };
        assert!(found_none(&report(true, PathState::None)));
        assert!(!found_none(&report(false, PathState::None)), "it has not looked yet");
        assert!(!found_none(&report(true, PathState::Failed)), "csvfs looks at that one itself");
        assert!(!found_none(&report(true, PathState::Good)));

        let (start, mut past) = (Instant::now(), Past::default());
        assert!(past.is_due(start));
        assert!(!past.is_due(start + LOOK_EVERY / 2));
        assert!(past.is_due(start + LOOK_EVERY));
        past.restarted.insert("Volume1".into(), start);
        assert!(!past.may_restart("Volume1", start + RESTART_EVERY / 2));
        assert!(past.may_restart("Volume1", start + RESTART_EVERY) && past.may_restart("Volume2", start));
    }

    #[test]
    fn what_is_no_mount_is_used_by_nobody_and_one_that_is_used_is_seen() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_used(dir.path()));
        assert!(!is_used(&dir.path().join("nothing")));
        let mounted =
            std::process::Command::new("mount").args(["-t", "tmpfs", "none"]).arg(dir.path()).status();
        if !mounted.is_ok_and(|status| status.success()) {
            return;
        }
        let open = std::fs::File::create(dir.path().join("f")).unwrap();
        assert!(is_used(dir.path()));
        drop(open);
        assert!(!is_used(dir.path()));
        assert!(dir.path().join("f").exists(), "it stays mounted");
        unmount(dir.path(), UnmountFlags::DETACH).unwrap();
    }
}
