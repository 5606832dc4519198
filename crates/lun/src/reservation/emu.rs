//! Reservations of a file LUN, for the lab: the rules of SPC-4 on a registry beside the file, carried out by the kernel
//! where the path is a loop device (docs/decisions/008).
//!
//! Stricter than a real LUN in one point: a nexus that may not write cannot read either, because its loop device shows
//! nothing any more. More lenient in one: a loop device that has never registered is not known, and not kept
//! from writing. A plain file has no path to take away; there [`crate::Lun`] looks at the registry before each write,
//! which is for tests only.

pub(crate) mod codec;
pub(crate) mod loopdev;
pub(crate) mod registry;
mod store;
pub(crate) mod view;

pub(crate) use store::Store;

use super::Backend;
use super::error::{Errors, PrOp, ReservationError};
use super::types::{
    Capabilities, FullStatus, Holder, Keys, Kind, PreemptOutcome, RegisterOutcome, ReservationType,
};
use registry::{Nexus, Refusal, Registry};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// A file LUN, by one of its paths.
#[derive(Debug)]
pub(crate) struct Emulated {
    store: Store,
    /// Number of the loop device; `None` for the plain file.
    loop_index: Option<u32>,
    /// On a plain file: the key that was registered by this value last, 0 for none.
    last_key: AtomicU64,
}

impl Emulated {
    pub(crate) fn on_file(path: &Path, errors: Errors) -> Result<Emulated, ReservationError> {
        let backing = path.canonicalize().map_err(|error| errors.rejected(PrOp::Open, error.to_string()))?;
        Ok(Emulated { store: Store::new(backing, errors), loop_index: None, last_key: AtomicU64::new(0) })
    }

    pub(crate) fn on_loop(index: u32, errors: Errors) -> Result<Emulated, ReservationError> {
        let op = PrOp::Open;
        let rejected = |why: String| errors.rejected(op, why);
        let backing = loopdev::backing_file(index).map_err(|error| {
            rejected(format!("no file is attached to loop{index} ({error}); attach it with losetup"))
        })?;
        let device =
            loopdev::open(index).map_err(|error| rejected(format!("cannot open loop{index}: {error}")))?;
        let stat = std::fs::metadata(&backing).map_err(|error| {
            rejected(format!("the file behind loop{index}, {}, cannot be found: {error}", backing.display()))
        })?;
        if (stat.dev(), stat.ino()) != (device.info.device, device.info.inode) {
            return Err(rejected(format!(
                "{} is another file here than the one behind loop{index}; look from the same mount namespace",
                backing.display()
            )));
        }
        if !stat.is_file() {
            return Err(errors.unsupported(
                op,
                format!(
                    "loop{index} stands on {}, which is no file; use that device itself",
                    backing.display()
                ),
            ));
        }
        Ok(Emulated {
            store: Store::new(backing, errors),
            loop_index: Some(index),
            last_key: AtomicU64::new(0),
        })
    }

    fn errors(&self) -> &Errors {
        self.store.errors()
    }

    /// The nexus now: a loop device that was attached anew is another one.
    fn nexus(&self, op: PrOp, key: u64) -> Result<Nexus, ReservationError> {
        let Some(index) = self.loop_index else { return Ok(Nexus::File { key }) };
        let same = loopdev::backing_file(index).is_ok_and(|file| file == self.store.backing());
        if !same {
            return Err(self
                .errors()
                .rejected(op, format!("loop{index} has been detached; open the LUN again")));
        }
        loopdev::nexus(index).map_err(|error| self.errors().rejected(op, error.to_string()))
    }

    fn refused(&self, op: PrOp, refusal: Refusal) -> ReservationError {
        match refusal {
            Refusal::Conflict => self.errors().conflict(op),
            Refusal::WrongType => self.errors().rejected(op, "the reservation has another type"),
            Refusal::InvalidKey => self.errors().rejected(op, "0 is no key"),
            Refusal::Full => self.errors().rejected(op, "there is no room for another registration"),
        }
    }

    fn change(
        &self,
        op: PrOp,
        key: u64,
        change: impl FnOnce(&mut Registry, Nexus) -> Result<(), Refusal>,
    ) -> Result<(), ReservationError> {
        let nexus = self.nexus(op, key)?;
        self.store.change(op, |registry| change(registry, nexus).map_err(|refusal| self.refused(op, refusal)))
    }
}

impl Backend for Emulated {
    fn kind(&self) -> Kind {
        Kind::Emulated
    }

    fn capabilities(&self) -> Result<Capabilities, ReservationError> {
        Ok(Capabilities {
            aptpl: Some(true),
            aptpl_active: Some(true),
            preempt_and_abort: Some(true),
            read_back: true,
            types: Some(ReservationType::ALL.to_vec()),
        })
    }

    fn register(
        &self,
        op: PrOp,
        old: u64,
        new: u64,
        ignore: bool,
    ) -> Result<RegisterOutcome, ReservationError> {
        // On a plain file a registration is found by its key.
        let found_by = if old == 0 || ignore { new } else { old };
        let window = match self.loop_index {
            Some(index) => {
                let device = loopdev::open(index).map_err(|e| self.errors().rejected(op, e.to_string()))?;
                Some(device.window())
            }
            None => None,
        };
        let last_key = self.last_key.load(Ordering::Relaxed);
        self.change(op, found_by, |registry, nexus| {
            let last = Nexus::File { key: last_key };
            let replaces = ignore && self.loop_index.is_none() && registry.is_registered(last, last_key);
            let nexus = if replaces { last } else { nexus };
            registry.register(nexus, (!ignore).then_some(old), new)?;
            if new != 0 {
                registry.adopt(nexus, new, loopdev::is_gone);
                let known = registry.known.iter().any(|known| known.nexus == nexus);
                registry.known.extend(window.filter(|_| !known));
            }
            Ok(())
        })?;
        self.last_key.store(new, Ordering::Relaxed);
        Ok(RegisterOutcome { aptpl: true })
    }

    fn reserve(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError> {
        self.change(PrOp::Reserve, key, |registry, nexus| registry.reserve(nexus, key, kind))
    }

    fn release(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError> {
        self.change(PrOp::Release, key, |registry, nexus| registry.release(nexus, key, kind))
    }

    /// Always with abort: a device whose access is taken away is drained first.
    fn preempt(
        &self,
        own: u64,
        victim: u64,
        kind: ReservationType,
        abort: bool,
    ) -> Result<PreemptOutcome, ReservationError> {
        let op = if abort { PrOp::PreemptAbort } else { PrOp::Preempt };
        self.change(op, own, |registry, nexus| registry.preempt(nexus, own, victim, kind))?;
        Ok(PreemptOutcome { aborted: true })
    }

    fn clear(&self, key: u64) -> Result<(), ReservationError> {
        self.change(PrOp::Clear, key, |registry, nexus| registry.clear(nexus, key))
    }

    fn read_keys(&self) -> Result<Keys, ReservationError> {
        Ok(self.store.read(PrOp::ReadKeys)?.keys())
    }

    fn read_reservation(&self) -> Result<Option<Holder>, ReservationError> {
        Ok(self.store.read(PrOp::ReadReservation)?.holder())
    }

    fn read_full_status(&self) -> Result<Vec<FullStatus>, ReservationError> {
        Ok(self.store.read(PrOp::ReadFullStatus)?.full_status())
    }

    fn is_registered_here(&self, key: u64) -> Result<bool, ReservationError> {
        let op = PrOp::ReadKeys;
        let nexus = self.nexus(op, key)?;
        Ok(self.store.read(op)?.is_registered(nexus, key))
    }

    fn settle(&self) -> Result<(), ReservationError> {
        self.store.settled(PrOp::Fence).map(drop)
    }
}
