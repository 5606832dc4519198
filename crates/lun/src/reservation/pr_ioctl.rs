//! Reservations by the kernel's `IOC_PR_*` calls, for block devices that are neither SCSI nor NVMe themselves (device
//! mapper, virtio-blk). Source: Documentation/block/pr.rst, linux/pr.h.
//!
//! The kernel always asks a SCSI device for APTPL, so registering fails where the storage refuses that. Reading keys
//! needs Linux 6.19; without it `Unsupported`, and a fence cannot be read back.

use super::Backend;
use super::error::{Errors, PrOp, ReservationError};
use super::types::{
    Capabilities, FullStatus, Holder, Keys, Kind, PreemptOutcome, RegisterOutcome, ReservationType,
};
use crate::sys::raw::{PrRequest, pr_read_keys, pr_read_reservation, pr_request};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// First try and three repetitions, for unit attentions.
const TRIES_MAX: u32 = 4;
const KEYS_MAX: u32 = 8192;

/// What a positive return value means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Good,
    Conflict,
    /// A check condition: a unit attention most often, but nobody can tell.
    Again,
    Unknown,
}

fn classify(status: i32) -> Answer {
    // Older kernels return SCSI's host and driver bytes above the status.
    match (status, status & 0xff) {
        (0, _) => Answer::Good,
        (0x1_0000.., _) => Answer::Unknown,
        (_, 0x18) => Answer::Conflict,
        (_, 2) => Answer::Again,
        _ => Answer::Unknown,
    }
}

/// One block device.
#[derive(Debug)]
pub(crate) struct PrIoctl {
    device: OwnedFd,
    errors: Errors,
}

impl PrIoctl {
    pub(crate) fn new(device: OwnedFd, errors: Errors) -> PrIoctl {
        PrIoctl { device, errors }
    }

    fn os_error(&self, op: PrOp, error: &io::Error) -> ReservationError {
        match error.raw_os_error() {
            Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL) => {
                self.errors.unsupported(op, error.to_string())
            }
            Some(libc::EPERM | libc::EACCES) => {
                self.errors.rejected(op, format!("{error}; it needs root, and the whole device"))
            }
            _ => self.errors.unknown(op, error.to_string()),
        }
    }

    fn answer<T>(
        &self,
        op: PrOp,
        mut ask: impl FnMut() -> io::Result<(i32, T)>,
    ) -> Result<T, ReservationError> {
        for _ in 0..TRIES_MAX {
            let (status, value) = ask().map_err(|error| self.os_error(op, &error))?;
            match classify(status) {
                Answer::Good => return Ok(value),
                Answer::Conflict => return Err(self.errors.conflict(op)),
                Answer::Again => {}
                Answer::Unknown => {
                    return Err(self.errors.unknown(op, format!("the device answered {status:#x}")));
                }
            }
        }
        Err(self.errors.rejected(
            op,
            "the device answered CHECK CONDITION each time; it may refuse APTPL, which the kernel always asks for",
        ))
    }

    fn request(&self, op: PrOp, request: PrRequest) -> Result<(), ReservationError> {
        self.answer(op, || Ok((pr_request(self.device.as_fd(), request)?, ())))
    }
}

impl Backend for PrIoctl {
    fn kind(&self) -> Kind {
        Kind::Ioctl
    }

    /// The kernel does not tell; whether keys can be read is tried.
    fn capabilities(&self) -> Result<Capabilities, ReservationError> {
        let read_back = match self.read_keys() {
            Ok(_) => true,
            Err(error) if error.is_unsupported() => false,
            Err(error) => return Err(error),
        };
        Ok(Capabilities { read_back, ..Capabilities::default() })
    }

    fn register(
        &self,
        op: PrOp,
        old: u64,
        new: u64,
        ignore: bool,
    ) -> Result<RegisterOutcome, ReservationError> {
        self.request(op, PrRequest::Register { old, new, ignore })?;
        Ok(RegisterOutcome { aptpl: new != 0 })
    }

    fn reserve(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError> {
        self.request(PrOp::Reserve, PrRequest::Reserve { key, kind: kind.nvme().into() })
    }

    fn release(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError> {
        self.request(PrOp::Release, PrRequest::Release { key, kind: kind.nvme().into() })
    }

    fn preempt(
        &self,
        own: u64,
        victim: u64,
        kind: ReservationType,
        abort: bool,
    ) -> Result<PreemptOutcome, ReservationError> {
        let request = |abort| PrRequest::Preempt { own, victim, kind: kind.nvme().into(), abort };
        if abort {
            match self.request(PrOp::PreemptAbort, request(true)) {
                // Refused or unknown to the device or the kernel: nothing was done.
                Err(ReservationError::Unsupported { why, .. } | ReservationError::Rejected { why, .. }) => {
                    tracing::warn!(why, "no preempt and abort; using preempt");
                }
                other => return other.map(|()| PreemptOutcome { aborted: true }),
            }
        }
        self.request(PrOp::Preempt, request(false))?;
        Ok(PreemptOutcome { aborted: false })
    }

    fn clear(&self, key: u64) -> Result<(), ReservationError> {
        self.request(PrOp::Clear, PrRequest::Clear { key })
    }

    fn read_keys(&self) -> Result<Keys, ReservationError> {
        let op = PrOp::ReadKeys;
        let (generation, keys) = self.answer(op, || {
            let (status, generation, keys) = pr_read_keys(self.device.as_fd(), KEYS_MAX)?;
            Ok((status, (generation, keys)))
        })?;
        let keys = keys.ok_or_else(|| self.errors.rejected(op, format!("more than {KEYS_MAX} keys")))?;
        Ok(Keys { generation, keys })
    }

    fn read_reservation(&self) -> Result<Option<Holder>, ReservationError> {
        let op = PrOp::ReadReservation;
        let (key, kind) = self.answer(op, || {
            let (status, key, kind) = pr_read_reservation(self.device.as_fd())?;
            Ok((status, (key, kind)))
        })?;
        if kind == 0 {
            return Ok(None);
        }
        let kind = u8::try_from(kind).ok().and_then(ReservationType::from_nvme);
        let kind = kind.ok_or_else(|| self.errors.rejected(op, "an unknown type of reservation"))?;
        Ok(Some(Holder { key, kind }))
    }

    fn read_full_status(&self) -> Result<Vec<FullStatus>, ReservationError> {
        Err(self.errors.unsupported(PrOp::ReadFullStatus, "the kernel has no call for it"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_of_old_and_new_kernels() {
        assert_eq!(classify(0), Answer::Good);
        assert_eq!((classify(0x18), classify(280)), (Answer::Conflict, Answer::Conflict));
        assert_eq!(classify(2), Answer::Again);
        assert_eq!((classify(0xe_0000), classify(0x1_0000)), (Answer::Unknown, Answer::Unknown));
    }
}
