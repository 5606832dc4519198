//! Looking for LUNs by their labels. A disk that does not answer must hold nobody: each is read in a thread of its own, which
//! is waited for only so long, and a disk whose thread still hangs is not asked again.

use super::volumes::NOT_SHARED;
use csv_lun::{Lun, LunOptions};
use csv_types::VolumeId;
use csv_types::config::LocalConfig;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// For all disks together.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// Disks are read again after so long when no disk has come or gone: one that could not be read may be by now.
const AGAIN_EVERY: Duration = Duration::from_secs(30);

/// Answers of disks: whose label they carry, if any. Whoever did not answer is missing.
type Answers = BTreeMap<PathBuf, Option<VolumeId>>;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Looker {
    asked: Arc<Mutex<BTreeSet<PathBuf>>>,
    /// The disks there were at the last look, and when that was.
    last: Mutex<Option<(Vec<PathBuf>, Instant)>>,
}

impl Looker {
    /// Where these volumes' LUNs are, as the administrator says or by their labels. Takes up to [`LOOK_LIMIT`].
    pub(crate) fn find(
        &self,
        local: &LocalConfig,
        wanted: &[(String, VolumeId)],
    ) -> BTreeMap<String, PathBuf> {
        let mut found = BTreeMap::new();
        let mut unknown = Vec::new();
        for (name, id) in wanted {
            match local.luns.get(name) {
                Some(device) => drop(found.insert(name.clone(), device.clone())),
                None => unknown.push((name, *id)),
            }
        }
        if unknown.is_empty() || !local.scan_luns {
            return found;
        }
        let disks = disks();
        let answers = self.ask(&disks, LOOK_LIMIT, label_of);
        *self.last.lock() = Some((disks.clone(), Instant::now()));
        for (name, id) in unknown {
            if let Some(device) = pick(&disks, &answers, id) {
                found.insert(name.clone(), device);
            }
        }
        found
    }

    /// Is it worth the while to look again?
    pub(crate) fn is_due(&self, local: &LocalConfig) -> bool {
        local.scan_luns
            && self
                .last
                .lock()
                .as_ref()
                .is_none_or(|(then, at)| at.elapsed() >= AGAIN_EVERY || *then != disks())
    }

    /// Does this device carry the label of that volume? False also when it does not answer.
    pub(crate) fn carries(&self, device: &Path, id: VolumeId) -> bool {
        let answers = self.ask(&[device.to_owned()], LOOK_LIMIT, label_of);
        answers.get(device).is_some_and(|found| *found == Some(id))
    }

    fn ask<R>(&self, disks: &[PathBuf], limit: Duration, read: R) -> Answers
    where
        R: Fn(&Path) -> Option<VolumeId> + Clone + Send + 'static,
    {
        let deadline = Instant::now() + limit;
        let (tell, answers) = mpsc::channel();
        for disk in disks {
            if !self.asked.lock().insert(disk.clone()) {
                continue;
            }
            let (asked, its_disk) = (self.asked.clone(), disk.clone());
            let (tell, read) = (tell.clone(), read.clone());
            let thread = std::thread::Builder::new().name("look-for-lun".into());
            let started = thread.spawn(move || {
                let found = read(&its_disk);
                asked.lock().remove(&its_disk);
                // Nobody waits any more when it took too long.
                let _told = tell.send((its_disk, found));
            });
            if let Err(error) = started {
                tracing::warn!(disk = %disk.display(), %error, "it cannot be looked at");
                self.asked.lock().remove(disk);
            }
        }
        drop(tell);
        let mut all = Answers::new();
        // Ends when every thread has told.
        while let Ok((disk, found)) = answers.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            all.insert(disk, found);
        }
        all
    }
}

/// Disks that may be LUNs; multipath devices before their paths.
fn disks() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    let mut disks: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|disk| !NOT_SHARED.iter().any(|prefix| disk.starts_with(prefix)))
        .collect();
    disks.sort_by_key(|disk| (!disk.starts_with("dm-"), disk.clone()));
    disks.into_iter().map(|disk| Path::new("/dev").join(disk)).collect()
}

/// The first of these that carries the label. A path is not taken for as long as a multipath device, which it may belong to,
/// has not answered.
fn pick(disks: &[PathBuf], answers: &Answers, id: VolumeId) -> Option<PathBuf> {
    let multipath =
        |disk: &Path| disk.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"dm-"));
    let found = disks.iter().find(|disk| answers.get(*disk) == Some(&Some(id)))?;
    let open = disks.iter().any(|disk| multipath(disk) && !answers.contains_key(disk));
    (multipath(found) || !open).then(|| found.clone())
}

/// Reading alone: a disk that was open for writing is looked at by udev when it is closed.
fn label_of(device: &Path) -> Option<VolumeId> {
    let lun = Lun::open(device, LunOptions { read_only: true, ..LunOptions::default() }).ok()?;
    csv_lun::label::read_label(&lun).ok()?.map(|label| label.volume_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTIPATH: &str = "/dev/dm-0";
    const PATH: &str = "/dev/sda";

    fn id() -> VolumeId {
        VolumeId(uuid::Uuid::from_u128(7))
    }

    #[test]
    fn a_disk_that_hangs_holds_nobody_and_is_asked_once() {
        let looker = Looker::default();
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let (begun, begins) = mpsc::channel();
        let read = move |disk: &Path| {
            begun.send(disk.to_owned()).unwrap();
            if disk == Path::new(MULTIPATH) {
                let _ended = held.lock().recv();
            }
            Some(id())
        };
        let disks = [PathBuf::from(MULTIPATH), PathBuf::from(PATH)];
        for _ in 0..2 {
            // The other one may not be told in so short a time; what counts is that this returns.
            looker.ask(&disks, Duration::from_millis(10), read.clone());
        }
        let asked = || begins.recv_timeout(Duration::from_secs(20)).unwrap();
        let mut first = [asked(), asked()];
        first.sort();
        assert_eq!(first, disks);
        assert!(looker.asked.lock().contains(Path::new(MULTIPATH)));
        drop(release);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !looker.asked.lock().is_empty() {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        let answers = looker.ask(&disks, Duration::from_secs(20), read);
        assert_eq!(answers.len(), 2);
        assert_eq!(pick(&disks, &answers, id()), Some(MULTIPATH.into()));
        assert!(begins.try_iter().filter(|disk| disk == Path::new(MULTIPATH)).count() == 1);
    }

    #[test]
    fn a_path_is_not_taken_before_its_multipath_device_has_answered() {
        let disks = [PathBuf::from(MULTIPATH), PathBuf::from(PATH)];
        let mut answers = Answers::from([(PATH.into(), Some(id()))]);
        assert_eq!(pick(&disks, &answers, id()), None);
        answers.insert(MULTIPATH.into(), None);
        assert_eq!(pick(&disks, &answers, id()), Some(PATH.into()), "that one is something else");
        answers.insert(MULTIPATH.into(), Some(id()));
        assert_eq!(pick(&disks, &answers, id()), Some(MULTIPATH.into()));
        assert_eq!(pick(&disks, &answers, VolumeId(uuid::Uuid::nil())), None);
    }
}
