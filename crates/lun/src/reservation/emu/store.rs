//! The registry of a file LUN on disk: `<backing file>.pr`, read without a lock, replaced as a whole under flock(2) on
//! the backing file.
//!
//! A change is written with `settled` false, then carried out on the loop devices, then written with `settled` true.
//! Whoever dies in between leaves a change that the next one under the lock carries out first. A reader sees a
//! change from the moment it is written; only who has had the lock knows that it is carried out.
//!
//! The lock is waited for [`LOCK_PATIENCE`]. A process that was stopped (SIGSTOP) while it had the lock keeps it; it is
//! named in the error. Taking the lock from it is not safe: it could give a device its access back when it wakes up.

use super::registry::{Nexus, Registry};
use super::{codec, loopdev};
use crate::reservation::error::{Errors, PrOp, ReservationError};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the lock is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(2);

/// The registry of one file LUN.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    backing: PathBuf,
    registry: PathBuf,
    errors: Errors,
    patience: Duration,
}

impl Store {
    /// `backing` is an absolute path.
    pub(crate) fn new(backing: PathBuf, errors: Errors) -> Store {
        let mut name = backing.file_name().unwrap_or_default().to_owned();
        name.push(".pr");
        let registry = backing.with_file_name(name);
        Store { backing, registry, errors, patience: LOCK_PATIENCE }
    }

    pub(crate) fn backing(&self) -> &Path {
        &self.backing
    }

    pub(crate) fn errors(&self) -> &Errors {
        &self.errors
    }

    /// The registry as it is now.
    pub(crate) fn read(&self, op: PrOp) -> Result<Registry, ReservationError> {
        let file = match fs::File::open(&self.registry) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Registry { settled: true, ..Registry::default() });
            }
            Err(error) => return Err(self.rejected(op, "read", &error)),
        };
        let mut text = String::new();
        let read = file.take(codec::BYTES_MAX).read_to_string(&mut text);
        read.ok().and_then(|_| codec::decode(&text)).ok_or_else(|| {
            let why = format!(
                "the reservation registry {} is damaged; stop every node that uses this LUN, then delete it",
                self.registry.display()
            );
            self.errors.fatal(op, why)
        })
    }

    fn rejected(&self, op: PrOp, what: &str, error: &io::Error) -> ReservationError {
        self.errors.rejected(op, format!("cannot {what} {}: {error}", self.registry.display()))
    }

    fn write(&self, registry: &Registry) -> io::Result<()> {
        let dir = self.registry.parent().unwrap_or(Path::new("/"));
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(codec::encode(registry).as_bytes())?;
        file.persist(&self.registry)?;
        Ok(())
    }

    /// Waits for the lock; it goes with the returned descriptor.
    fn lock(&self, op: PrOp) -> Result<OwnedFd, ReservationError> {
        let refused = |errno: Errno| {
            self.errors.rejected(op, format!("cannot lock {}: {errno}", self.backing.display()))
        };
        // A descriptor of its own for each lock: flock does not tell threads that share one apart.
        let file = rustix::fs::open(&self.backing, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(refused)?;
        let started = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(Errno::AGAIN | Errno::INTR) if started.elapsed() < self.patience => {
                    std::thread::sleep(LOCK_POLL);
                }
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(errno) => return Err(refused(errno)),
            }
        }
        let by = self.lock_owner().map_or_else(|| "another process".into(), |pid| format!("process {pid}"));
        let why = format!(
            "{} has been locked for {} s by {by}; if that is stopped, continue or kill it",
            self.backing.display(),
            self.patience.as_secs()
        );
        Err(self.errors.rejected(op, why))
    }

    /// From /proc/locks, by inode only: the device numbers there are not those of stat(2) on every file system.
    fn lock_owner(&self) -> Option<u32> {
        let inode = fs::metadata(&self.backing).ok()?.ino().to_string();
        let locks = fs::read_to_string("/proc/locks").ok()?;
        locks.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let ours = words.get(1) == Some(&"FLOCK") && words.get(5)?.rsplit(':').next() == Some(&*inode);
            ours.then(|| words.get(4)?.parse().ok())?
        })
    }

    /// Mends the file if need be, and notes its size for the next time.
    fn note_size(&self, registry: &mut Registry) -> io::Result<()> {
        loopdev::mend(&self.backing, registry.bytes)?;
        let bytes = fs::metadata(&self.backing)?.len();
        if bytes < loopdev::NOWHERE {
            registry.bytes = bytes;
        }
        Ok(())
    }

    /// Carries out under the lock what an earlier change may have left undone, and reads the registry.
    pub(crate) fn settled(&self, op: PrOp) -> Result<Registry, ReservationError> {
        self.change(op, |registry| Ok(registry.clone()))
    }

    /// Changes the registry, and carries the change out on the loop devices before it returns.
    ///
    /// # Errors
    /// What `change` returns: nothing was changed. `Unknown`: the change is written but may not be in force yet.
    pub(crate) fn change<T>(
        &self,
        op: PrOp,
        change: impl FnOnce(&mut Registry) -> Result<T, ReservationError>,
    ) -> Result<T, ReservationError> {
        let _lock = self.lock(op)?;
        let mut registry = self.read(op)?;
        let unknown = |why| self.errors.unknown(op, why);
        let was_settled = registry.settled;
        if !was_settled {
            settle(&mut registry).map_err(unknown)?;
        }
        self.note_size(&mut registry).map_err(|error| self.rejected(op, "mend", &error))?;
        let before = registry.clone();
        let value = change(&mut registry)?;
        if registry == before {
            if !was_settled {
                self.write(&registry).map_err(|error| self.rejected(op, "write", &error))?;
            }
            return Ok(value);
        }
        registry.settled = false;
        self.write(&registry).map_err(|error| self.rejected(op, "write", &error))?;
        settle(&mut registry).map_err(unknown)?;
        loopdev::mend(&self.backing, registry.bytes).map_err(|error| unknown(error.to_string()))?;
        self.write(&registry).map_err(|error| unknown(error.to_string()))?;
        Ok(value)
    }
}

/// Makes the loop devices obey the registry: takes access away first, then gives it back.
fn settle(registry: &mut Registry) -> Result<(), String> {
    let text = |nexus: Nexus, error: io::Error| format!("cannot change the access of {nexus}: {error}");
    registry.known.retain(|window| !loopdev::is_gone(window.nexus));
    for write in [false, true] {
        for window in registry.known.clone() {
            let Nexus::Loop { index, .. } = window.nexus else { continue };
            if registry.may_write(window.nexus) != write {
                continue;
            }
            let mut device = match loopdev::open(index) {
                Ok(device) => device,
                Err(_) if loopdev::is_gone(window.nexus) => continue,
                Err(error) => return Err(text(window.nexus, error)),
            };
            if device.nexus != window.nexus {
                continue;
            }
            let done = if write { device.restore(window) } else { device.cut_off() };
            done.map_err(|error| text(window.nexus, error))?;
        }
    }
    registry.settled = true;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reservation::ReservationType;
    use crate::reservation::emu::registry::Registration;
    use crate::testutil::{LoopDevice, RegistryFile, lun_file};
    use std::sync::Arc;

    fn store(backing: &Path) -> Store {
        let backing = backing.canonicalize().unwrap();
        Store::new(backing.clone(), Errors(Arc::from(backing)))
    }

    #[test]
    fn a_registry_that_is_damaged_is_fatal_and_names_the_file() {
        let file = lun_file(1 << 20);
        let registry = RegistryFile::of(file.path());
        let store = store(file.path());
        assert!(store.read(PrOp::ReadKeys).unwrap().keys().keys.is_empty());
        fs::write(registry.path(), "csvfs-reservations 1\ngeneration 5\n").unwrap();
        let error = store.settled(PrOp::ReadKeys).unwrap_err();
        assert!(matches!(error, ReservationError::Fatal { .. }), "{error}");
        assert!(error.to_string().contains(registry.path().to_str().unwrap()), "{error}");
    }

    /// As after a request that came to a device without access on a file system that takes any offset.
    #[test]
    fn a_file_that_a_stray_request_made_huge_is_cut_back() {
        let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else { return };
        let _registry = RegistryFile::of(file.path());
        file.as_file().set_len(1 << 20).unwrap();
        let store = store(file.path());
        let count_up = |registry: &mut Registry| {
            registry.generation += 1;
            Ok(())
        };
        store.change(PrOp::Clear, count_up).unwrap();
        if file.as_file().set_len(loopdev::NOWHERE + 4096).is_err() {
            return;
        }
        store.settled(PrOp::Fence).unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
        file.as_file().set_len(2 << 20).unwrap();
        store.change(PrOp::Clear, count_up).unwrap();
        assert_eq!(store.read(PrOp::ReadKeys).unwrap().bytes, 2 << 20);
    }

    #[test]
    fn a_lock_that_another_has_is_given_up_with_its_pid() {
        let file = lun_file(1 << 20);
        let store = Store { patience: Duration::from_millis(20), ..store(file.path()) };
        let held = store.lock(PrOp::Reserve).unwrap();
        let error = store.settled(PrOp::Reserve).unwrap_err();
        assert!(matches!(error, ReservationError::Rejected { .. }), "{error}");
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(held);
        store.settled(PrOp::Reserve).unwrap();
        drop(RegistryFile::of(file.path()));
    }

    /// Whoever preempted died after the change was written and before it was carried out.
    #[test]
    fn a_change_left_undone_is_carried_out_by_the_next() {
        let Some(device) = LoopDevice::new(1 << 20, 512) else { return };
        let _registry = RegistryFile::of(device.backing());
        let store = store(device.backing());
        let index = device.path().to_str().unwrap().trim_start_matches("/dev/loop").parse().unwrap();
        let window = loopdev::open(index).unwrap().window();
        let ours = Nexus::File { key: 1 };
        let left = Registry {
            generation: 3,
            registrations: vec![Registration { nexus: ours, key: 1 }],
            reservation: Some((ours, ReservationType::default())),
            known: vec![window],
            bytes: 0,
            settled: false,
        };
        store.write(&left).unwrap();
        assert!(!loopdev::open(index).unwrap().is_cut_off());
        let settled = store.settled(PrOp::Fence).unwrap();
        assert!(settled.settled && loopdev::open(index).unwrap().is_cut_off());
        store
            .change(PrOp::Clear, |registry| {
                registry.reservation = None;
                Ok(())
            })
            .unwrap();
        let device_now = loopdev::open(index).unwrap();
        assert_eq!(device_now.window(), window, "access is back");
        // A nexus that is gone is forgotten.
        drop(device_now);
        let again = device.reattach();
        store
            .change(PrOp::Clear, |registry| {
                registry.generation += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(store.read(PrOp::ReadKeys).unwrap().known, []);
        drop(again);
    }
}
