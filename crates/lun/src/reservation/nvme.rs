//! Reservations by NVMe commands on a namespace's block device. Source: NVM Command Set and NVM Express Base
//! Specification 2.0, 7.5 to 7.8 (Reservation Acquire, Register, Release, Report), 8.19.
//!
//! A registration belongs to the host (its host identifier), not to a path, so native multipath needs nothing special.

pub(crate) mod wire;

use super::Backend;
use super::error::{Errors, PrOp, ReservationError};
use super::types::{
    Capabilities, FullStatus, Holder, Keys, Kind, PreemptOutcome, RegisterOutcome, ReservationType,
};
use crate::sys::raw::{NvmeQueue, nvme_command, nvme_namespace};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use wire::{Acquire, Command, Persist, Report};

const TIMEOUT_MS: u32 = 20_000;
const TRIES_MAX: u32 = 4;
const REPORT_BYTES_FIRST: usize = 4096;
const REPORT_BYTES_MAX: usize = 256 << 10;
const STATUS_INVALID_OPCODE: u16 = 0x01;
const STATUS_INVALID_FIELD: u16 = 0x02;
const STATUS_HOST_ID_FORMAT: u16 = 0x18;
const STATUS_CONFLICT: u16 = 0x83;

/// What a status field means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Good,
    Conflict,
    Unsupported,
    HostIdFormat,
    /// Not done; may be repeated: a path error before the command was sent, or the namespace not ready.
    Again,
    Unknown,
}

fn classify(status: u16) -> Answer {
    match status {
        0 => Answer::Good,
        STATUS_CONFLICT => Answer::Conflict,
        STATUS_INVALID_OPCODE | STATUS_INVALID_FIELD => Answer::Unsupported,
        STATUS_HOST_ID_FORMAT => Answer::HostIdFormat,
        0x82 => Answer::Again,
        _ => Answer::Unknown,
    }
}

/// One namespace.
#[derive(Debug)]
pub(crate) struct Nvme {
    device: OwnedFd,
    nsid: u32,
    errors: Errors,
    no_aptpl: AtomicBool,
}

impl Nvme {
    pub(crate) fn new(device: OwnedFd, errors: Errors) -> Result<Nvme, ReservationError> {
        let nsid = nvme_namespace(device.as_fd())
            .map_err(|error| errors.unsupported(PrOp::Open, format!("it has no NVMe namespace: {error}")))?;
        Ok(Nvme { device, nsid, errors, no_aptpl: AtomicBool::new(false) })
    }

    /// Sends a command; `HostIdFormat` is the only answer besides `Good` that is no error.
    fn send(&self, op: PrOp, command: &Command, data: &mut [u8]) -> Result<Answer, ReservationError> {
        for _ in 0..TRIES_MAX {
            let status = nvme_command(
                self.device.as_fd(),
                NvmeQueue::Io,
                command.opcode,
                self.nsid,
                [command.cdw10, command.cdw11],
                data,
                TIMEOUT_MS,
            );
            let status = status.map_err(|error| match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES | libc::ENOTTY | libc::ENODEV) => {
                    self.errors.rejected(op, format!("{error}; NVMe commands need an NVMe device and root"))
                }
                _ => self.errors.unknown(op, error.to_string()),
            })?;
            match classify(status) {
                answer @ (Answer::Good | Answer::HostIdFormat) => return Ok(answer),
                Answer::Conflict => return Err(self.errors.conflict(op)),
                Answer::Unsupported => {
                    return Err(self.errors.unsupported(op, format!("NVMe status {status:#x}")));
                }
                Answer::Again => {}
                Answer::Unknown => {
                    return Err(self.errors.unknown(op, format!("NVMe status {status:#x}")));
                }
            }
        }
        Err(self.errors.rejected(op, "the namespace is not ready; try again later"))
    }

    fn order(&self, op: PrOp, command: Command) -> Result<(), ReservationError> {
        let mut data = command.data.clone();
        if self.send(op, &command, &mut data)? == Answer::HostIdFormat {
            let why = "the controller has no host identifier; set one for this host (nvme connect --hostid)";
            return Err(self.errors.rejected(op, why));
        }
        Ok(())
    }

    /// A host that is registered must replace its key, one that is not must register: ignoring what is there takes a
    /// try of each, because the controller ignores the key only, not whether there is one.
    fn register_key(
        &self,
        op: PrOp,
        old: u64,
        new: u64,
        ignore: bool,
        persist: Persist,
    ) -> Result<(), ReservationError> {
        match self.order(op, wire::register(old != 0, old, new, ignore, persist)) {
            Err(ReservationError::Conflict { .. }) if ignore => {
                self.order(op, wire::register(old == 0, old, new, ignore, persist))
            }
            other => other,
        }
    }

    fn report(&self, op: PrOp) -> Result<Report, ReservationError> {
        // A host with a 128-bit identifier must ask for the extended format, one with 64 bits must not.
        for extended in [true, false] {
            let mut bytes = REPORT_BYTES_FIRST;
            loop {
                let mut data = vec![0; bytes];
                if self.send(op, &wire::report(bytes, extended), &mut data)? == Answer::HostIdFormat {
                    break;
                }
                let report = wire::parse_report(&data, extended)
                    .map_err(|error| self.errors.rejected(op, error.to_string()))?;
                if report.whole_bytes <= bytes {
                    return Ok(report);
                }
                if bytes >= REPORT_BYTES_MAX {
                    return Err(self.errors.rejected(op, "the report is longer than 256 KiB"));
                }
                bytes = report.whole_bytes.next_multiple_of(4).min(REPORT_BYTES_MAX);
            }
        }
        Err(self.errors.rejected(op, "the controller takes neither format of host identifier"))
    }
}

impl Backend for Nvme {
    fn kind(&self) -> Kind {
        Kind::Nvme
    }

    fn capabilities(&self) -> Result<Capabilities, ReservationError> {
        let op = PrOp::Capabilities;
        let mut data = vec![0; wire::IDENTIFY_BYTES];
        let status = nvme_command(
            self.device.as_fd(),
            NvmeQueue::Admin,
            wire::IDENTIFY_OPCODE,
            self.nsid,
            [0, 0],
            &mut data,
            TIMEOUT_MS,
        );
        match status {
            Ok(0) => {}
            Ok(status) => return Err(self.errors.rejected(op, format!("NVMe status {status:#x}"))),
            Err(error) => return Err(self.errors.rejected(op, error.to_string())),
        }
        let mut found = wire::parse_rescap(data[wire::RESCAP_AT])
            .ok_or_else(|| self.errors.unsupported(op, "the namespace has no reservations"))?;
        found.aptpl_active = Some(self.report(op)?.persist);
        Ok(found)
    }

    fn register(
        &self,
        op: PrOp,
        old: u64,
        new: u64,
        ignore: bool,
    ) -> Result<RegisterOutcome, ReservationError> {
        if new == 0 {
            self.order(op, wire::unregister(old, ignore))?;
            return Ok(RegisterOutcome { aptpl: false });
        }
        if !self.no_aptpl.load(Ordering::Relaxed) {
            match self.register_key(op, old, new, ignore, Persist::Set) {
                Err(ReservationError::Unsupported { why, .. }) => {
                    tracing::info!(why, "the namespace refuses persistence; registering without");
                }
                other => return other.map(|()| RegisterOutcome { aptpl: true }),
            }
        }
        self.register_key(op, old, new, ignore, Persist::Keep)?;
        self.no_aptpl.store(true, Ordering::Relaxed);
        Ok(RegisterOutcome { aptpl: false })
    }

    fn reserve(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError> {
        self.order(PrOp::Reserve, wire::acquire(Acquire::Reserve, key, 0, kind))
    }

    fn release(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError> {
        self.order(PrOp::Release, wire::release(key, kind))
    }

    fn preempt(
        &self,
        own: u64,
        victim: u64,
        kind: ReservationType,
        abort: bool,
    ) -> Result<PreemptOutcome, ReservationError> {
        if abort {
            match self.order(PrOp::PreemptAbort, wire::acquire(Acquire::PreemptAbort, own, victim, kind)) {
                Err(ReservationError::Unsupported { why, .. }) => {
                    tracing::warn!(why, "the namespace has no preempt and abort; using preempt");
                }
                other => return other.map(|()| PreemptOutcome { aborted: true }),
            }
        }
        self.order(PrOp::Preempt, wire::acquire(Acquire::Preempt, own, victim, kind))?;
        Ok(PreemptOutcome { aborted: false })
    }

    fn clear(&self, key: u64) -> Result<(), ReservationError> {
        self.order(PrOp::Clear, wire::clear(key))
    }

    fn read_keys(&self) -> Result<Keys, ReservationError> {
        let report = self.report(PrOp::ReadKeys)?;
        let keys = report.registrations.iter().map(|one| one.key).collect();
        Ok(Keys { generation: report.generation, keys })
    }

    fn read_reservation(&self) -> Result<Option<Holder>, ReservationError> {
        Ok(self.report(PrOp::ReadReservation)?.holder())
    }

    fn read_full_status(&self) -> Result<Vec<FullStatus>, ReservationError> {
        Ok(self.report(PrOp::ReadFullStatus)?.registrations)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        assert_eq!(classify(0), Answer::Good);
        assert_eq!(classify(0x83), Answer::Conflict);
        assert_eq!(classify(2), Answer::Unsupported);
        assert_eq!(classify(0x82), Answer::Again);
        // Host path error, command aborted.
        assert_eq!((classify(0x370), classify(7)), (Answer::Unknown, Answer::Unknown));
    }
}
