//! Persistent reservations: who may write the LUN, enforced by the storage.
//!
//! Every node registers a key of its own; one of them holds a reservation of the type Write Exclusive - Registrants
//! Only, under which exactly the registered nodes can write. A node is fenced by taking its registration away
//! (PREEMPT AND ABORT): its writes under way are aborted, later ones meet a conflict.
//!
//! [`Reservations`] offers the operations of SPC-4 alike for SCSI, NVMe, other block devices and the lab's file LUN, and
//! on top of them what the cluster engine needs: [`Reservations::ensure_registered`], [`Reservations::ensure_reserved`],
//! [`Reservations::fence`], [`Reservations::verify`].
//!
//! Invariants:
//! * An operation that returned `Ok` is in force. After `Unknown` the keys must be read.
//! * No operation registers a key that it was not told to. A node that lost its registration gets it back only by
//!   registering, which it may do only once nothing of its earlier life can write any more: mounts, processes and
//!   queued I/O from before the fence would have their access back as well.
//! * Calls block: a SCSI or NVMe command for up to 20 s per try, the emulation for as long as the victim's I/O takes.

pub mod check;
mod cluster;
pub(crate) mod emu;
mod error;
mod nvme;
mod open;
mod pr_ioctl;
mod scsi;
mod types;

pub use cluster::{FenceReport, FencedState, VictimOutcome, VictimReport};
pub use error::{ErrorKind, PrOp, ReservationError};
pub(crate) use open::loop_index;
pub use open::read_path;
pub use types::{
    Capabilities, FullStatus, Holder, Keys, Kind, PreemptOutcome, RegisterOutcome, ReservationType,
};

use error::Errors;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// The operations as one kind of device does them. Keys are never 0, except where 0 means "none".
trait Backend: fmt::Debug + Send + Sync {
    fn kind(&self) -> Kind;
    fn capabilities(&self) -> Result<Capabilities, ReservationError>;
    /// `new` 0 unregisters; `ignore`: whatever the old key is.
    fn register(
        &self,
        op: PrOp,
        old: u64,
        new: u64,
        ignore: bool,
    ) -> Result<RegisterOutcome, ReservationError>;
    fn reserve(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError>;
    fn release(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError>;
    fn preempt(
        &self,
        own: u64,
        victim: u64,
        kind: ReservationType,
        abort: bool,
    ) -> Result<PreemptOutcome, ReservationError>;
    fn clear(&self, key: u64) -> Result<(), ReservationError>;
    fn read_keys(&self) -> Result<Keys, ReservationError>;
    fn read_reservation(&self) -> Result<Option<Holder>, ReservationError>;
    fn read_full_status(&self) -> Result<Vec<FullStatus>, ReservationError>;

    /// Is the key registered, by this very path where the device can tell?
    fn is_registered_here(&self, key: u64) -> Result<bool, ReservationError> {
        Ok(self.read_keys()?.keys.contains(&key))
    }

    /// Ways to the device, each of which is registered by itself.
    fn paths(&self) -> usize {
        1
    }

    /// Waits until every change that can be read is in force.
    fn settle(&self) -> Result<(), ReservationError> {
        Ok(())
    }
}

/// Reservations of one LUN as this node makes them.
#[derive(Debug)]
pub struct Reservations {
    backend: Box<dyn Backend>,
    errors: Errors,
}

impl Reservations {
    /// Opens a device and finds out how reservations are made on it. Needs root.
    ///
    /// # Errors
    /// `Rejected` when it cannot be opened, `Unsupported` when it is no block device and no file.
    pub fn open(path: &Path) -> Result<Reservations, ReservationError> {
        let errors = Errors(Arc::from(path));
        Ok(Reservations { backend: open::backend(path, &errors)?, errors })
    }

    /// How reservations are made on this device.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.backend.kind()
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.errors.0
    }

    /// The type by which one node has the LUN for itself. With several paths a holder by the type Write Exclusive could write
    /// by one of them only; there it is the one registrant of the type for registrants.
    #[must_use]
    pub fn exclusive_type(&self) -> ReservationType {
        if self.backend.paths() > 1 {
            ReservationType::WriteExclusiveRegistrantsOnly
        } else {
            ReservationType::WriteExclusive
        }
    }

    /// What the device says that it can do.
    ///
    /// # Errors
    /// `Unsupported` when it has no reservations at all.
    pub fn capabilities(&self) -> Result<Capabilities, ReservationError> {
        self.backend.capabilities()
    }

    /// REGISTER: `new` in place of `old`, which is `None` when this node is not registered.
    ///
    /// # Errors
    /// `Conflict` when `old` is not what is registered.
    pub fn register(&self, old: Option<u64>, new: u64) -> Result<RegisterOutcome, ReservationError> {
        self.backend.register(PrOp::Register, old.unwrap_or(0), self.key(PrOp::Register, new)?, false)
    }

    /// REGISTER AND IGNORE EXISTING KEY. On the emulation it also gives a fenced loop device its access back.
    ///
    /// # Errors
    /// Any kind but `Conflict` and `Fatal`.
    pub fn register_ignore(&self, new: u64) -> Result<RegisterOutcome, ReservationError> {
        let op = PrOp::RegisterIgnore;
        self.backend.register(op, 0, self.key(op, new)?, true)
    }

    /// Takes back this node's own registration. A reservation that it holds ends with it.
    ///
    /// # Errors
    /// `Conflict` when `key` is not what this node has registered.
    pub fn unregister(&self, key: u64) -> Result<(), ReservationError> {
        let op = PrOp::Unregister;
        self.backend.register(op, self.key(op, key)?, 0, false).map(drop)
    }

    /// RESERVE.
    ///
    /// # Errors
    /// `Conflict` when this node is not registered with `key`, or another one holds a reservation.
    pub fn reserve(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError> {
        self.backend.reserve(self.key(PrOp::Reserve, key)?, kind)
    }

    /// RELEASE. Without a reservation of one's own it does nothing.
    ///
    /// # Errors
    /// `Conflict` when this node is not registered with `key`, `Rejected` when the type is another.
    pub fn release(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError> {
        self.backend.release(self.key(PrOp::Release, key)?, kind)
    }

    /// PREEMPT, or with `abort` PREEMPT AND ABORT: removes every registration with the victim's key, and takes its
    /// reservation over as one of type `kind`. Where the device cannot abort it preempts only, and says so.
    ///
    /// # Errors
    /// `Conflict` when this node is not registered with `own_key`, or nobody with the victim's.
    pub fn preempt(
        &self,
        own_key: u64,
        victim_key: u64,
        kind: ReservationType,
        abort: bool,
    ) -> Result<PreemptOutcome, ReservationError> {
        let op = if abort { PrOp::PreemptAbort } else { PrOp::Preempt };
        self.backend.preempt(self.key(op, own_key)?, self.key(op, victim_key)?, kind, abort)
    }

    /// CLEAR: removes the reservation and every registration.
    ///
    /// # Errors
    /// `Conflict` when this node is not registered with `key`.
    pub fn clear(&self, key: u64) -> Result<(), ReservationError> {
        self.backend.clear(self.key(PrOp::Clear, key)?)
    }

    /// READ KEYS.
    ///
    /// # Errors
    /// `Unsupported` for other block devices before Linux 6.19.
    pub fn read_keys(&self) -> Result<Keys, ReservationError> {
        self.backend.read_keys()
    }

    /// READ RESERVATION.
    ///
    /// # Errors
    /// As [`Reservations::read_keys`].
    pub fn read_reservation(&self) -> Result<Option<Holder>, ReservationError> {
        self.backend.read_reservation()
    }

    /// READ FULL STATUS: who has registered what.
    ///
    /// # Errors
    /// `Unsupported` on storage without it, and for other block devices.
    pub fn read_full_status(&self) -> Result<Vec<FullStatus>, ReservationError> {
        self.backend.read_full_status()
    }

    fn key(&self, op: PrOp, key: u64) -> Result<u64, ReservationError> {
        if key == 0 {
            return Err(self.errors.rejected(op, "0 is no key"));
        }
        Ok(key)
    }
}

#[cfg(test)]
mod tests;
