//! Why a reservation operation did not succeed, in the three kinds between which a caller has to choose.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PrOp {
    /// Opening the device.
    Open,
    /// Asking what it can do.
    Capabilities,
    /// Register, with the old key.
    Register,
    /// Register, whatever the old key is.
    RegisterIgnore,
    /// Unregister.
    Unregister,
    /// Reserve.
    Reserve,
    /// Release.
    Release,
    /// Preempt.
    Preempt,
    /// Preempt and abort.
    PreemptAbort,
    /// Clear.
    Clear,
    /// Read keys.
    ReadKeys,
    /// Read reservation.
    ReadReservation,
    /// Read full status.
    ReadFullStatus,
    /// Fencing as a whole.
    Fence,
}

impl fmt::Display for PrOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PrOp::Open => "open",
            PrOp::Capabilities => "report capabilities",
            PrOp::Register => "register",
            PrOp::RegisterIgnore => "register and ignore existing key",
            PrOp::Unregister => "unregister",
            PrOp::Reserve => "reserve",
            PrOp::Release => "release",
            PrOp::Preempt => "preempt",
            PrOp::PreemptAbort => "preempt and abort",
            PrOp::Clear => "clear",
            PrOp::ReadKeys => "read keys",
            PrOp::ReadReservation => "read reservation",
            PrOp::ReadFullStatus => "read full status",
            PrOp::Fence => "fence",
        })
    }
}

/// What a caller has to do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Nothing happened; another way or another time may do.
    Rejected,
    /// It may have happened: read the keys before going on.
    Unknown,
    /// Stop all I/O on the LUN.
    Fatal,
}

/// An operation that did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReservationError {
    /// RESERVATION CONFLICT (status 0x18). `Rejected`.
    #[error(
        "{op} on {path}: reservation conflict; read the keys to see whether this node's is still registered",
        path = path.display()
    )]
    Conflict {
        /// What was asked for.
        op: PrOp,
        /// The LUN.
        path: Arc<Path>,
    },
    /// The device cannot do it. `Rejected`.
    #[error("{op} is not supported on {path} ({why}); use storage with persistent reservations", path = path.display())]
    Unsupported {
        /// What was asked for.
        op: PrOp,
        /// The LUN.
        path: Arc<Path>,
        /// The device's answer.
        why: String,
    },
    /// Nothing happened.
    #[error("{op} on {path} was refused, nothing was changed: {why}", path = path.display())]
    Rejected {
        /// What was asked for.
        op: PrOp,
        /// The LUN.
        path: Arc<Path>,
        /// Why, and what to do.
        why: String,
    },
    /// It may have happened.
    #[error("{op} on {path} may or may not have been done: {why}; read the keys before going on", path = path.display())]
    Unknown {
        /// What was asked for.
        op: PrOp,
        /// The LUN.
        path: Arc<Path>,
        /// What is known.
        why: String,
    },
    /// This node must not use the LUN.
    #[error("{op} on {path}: {why}; this node must stop all I/O on the LUN", path = path.display())]
    Fatal {
        /// What was asked for.
        op: PrOp,
        /// The LUN.
        path: Arc<Path>,
        /// Why.
        why: String,
    },
}

impl ReservationError {
    /// What to do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            ReservationError::Conflict { .. }
            | ReservationError::Unsupported { .. }
            | ReservationError::Rejected { .. } => ErrorKind::Rejected,
            ReservationError::Unknown { .. } => ErrorKind::Unknown,
            ReservationError::Fatal { .. } => ErrorKind::Fatal,
        }
    }

    /// A reservation conflict?
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        matches!(self, ReservationError::Conflict { .. })
    }

    /// Something that the device cannot do at all?
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        matches!(self, ReservationError::Unsupported { .. })
    }
}

/// Makes errors about one device.
#[derive(Debug, Clone)]
pub(crate) struct Errors(pub(crate) Arc<Path>);

impl Errors {
    pub(crate) fn conflict(&self, op: PrOp) -> ReservationError {
        ReservationError::Conflict { op, path: Arc::clone(&self.0) }
    }

    pub(crate) fn unsupported(&self, op: PrOp, why: impl Into<String>) -> ReservationError {
        ReservationError::Unsupported { op, path: Arc::clone(&self.0), why: why.into() }
    }

    pub(crate) fn rejected(&self, op: PrOp, why: impl Into<String>) -> ReservationError {
        ReservationError::Rejected { op, path: Arc::clone(&self.0), why: why.into() }
    }

    pub(crate) fn unknown(&self, op: PrOp, why: impl Into<String>) -> ReservationError {
        ReservationError::Unknown { op, path: Arc::clone(&self.0), why: why.into() }
    }

    pub(crate) fn fatal(&self, op: PrOp, why: impl Into<String>) -> ReservationError {
        ReservationError::Fatal { op, path: Arc::clone(&self.0), why: why.into() }
    }
}
