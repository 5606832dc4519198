//! Reservations by SCSI commands (SG_IO).
//!
//! A multipath device has one I_T nexus per path, and each must be registered, or writes by the others would meet a
//! conflict: registering goes to every path, everything else to the first path that answers. A path that is down
//! while its node registers stays unregistered; register again when it is back.
//!
//! A unit attention means that the command was not done, and is the device's way of telling what happened before:
//! the command is repeated, at most [`TRIES_MAX`] times in all. A command that timed out or whose path broke may have
//! been done: `Unknown`.

pub(crate) mod wire;

use super::Backend;
use super::error::{Errors, PrOp, ReservationError};
use super::types::{
    Capabilities, FullStatus, Holder, Keys, Kind, PreemptOutcome, RegisterOutcome, ReservationType,
};
use crate::sys::raw::{SgData, SgReply, scsi_command};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use wire::{InAction, Malformed, OutAction, Parsed, Sense, parse_sense};

/// Longest time for one command. An abort waits for the victim's commands in the device.
const TIMEOUT_MS: u32 = 20_000;
/// First try and three repetitions.
const TRIES_MAX: u32 = 4;
const BUSY_PAUSE: Duration = Duration::from_millis(100);
/// Largest answer, the allocation length being 16 bits: 8190 keys.
const DATA_BYTES_MAX: u16 = 0xfff8;
const DATA_BYTES_FIRST: u16 = 8192;

/// What one answer means.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Good,
    Conflict,
    /// Not done; try again.
    Again(Sense),
    /// Not done; try again after a pause.
    Busy,
    /// The device does not know the command or a field of it.
    Unsupported(Sense),
    /// Not done. Linux's own target answers so to RESERVE, RELEASE and CLEAR of an initiator that is not registered,
    /// where SPC-4 wants a conflict.
    NoCommunication(String),
    /// Not done.
    Refused(String),
    /// May have been done.
    Unknown(String),
}

fn classify(reply: &SgReply) -> Answer {
    const DID_NO_CONNECT: u16 = 1;
    // Set for a reservation conflict by kernels before 5.19.
    const DID_NEXUS_FAILURE: u16 = 0x11;
    match reply.host_status {
        0 => {}
        DID_NEXUS_FAILURE if reply.status & 0x3e == 0x18 => {}
        DID_NO_CONNECT => return Answer::Refused("the path is down; check cables and sessions".into()),
        host => {
            return Answer::Unknown(format!("the path failed or the command timed out (host status {host})"));
        }
    }
    match reply.status & 0x3e {
        0 => Answer::Good,
        0x18 => Answer::Conflict,
        0x08 | 0x28 => Answer::Busy,
        0x02 => parse_sense(&reply.sense)
            .map_or_else(|| Answer::Unknown("an error without sense data".into()), classify_sense),
        status => Answer::Unknown(format!("SCSI status {status:#04x}")),
    }
}

fn classify_sense(sense: Sense) -> Answer {
    let text = || {
        let Sense { key, code, qualifier } = sense;
        format!("sense {key:x}/{code:02x}/{qualifier:02x}")
    };
    match (sense.key, sense.code, sense.qualifier) {
        (1, _, _) => Answer::Good,
        (6, _, _) => Answer::Again(sense),
        (5, 0x20 | 0x24 | 0x26, 0) => Answer::Unsupported(sense),
        (5, 0x26, 4) => Answer::Refused("the reservation has another type".into()),
        (5, 0x55, 4) => Answer::Refused("the storage has no room for another registration".into()),
        (2, 0x08, 0) => Answer::NoCommunication(format!("the LUN is not ready ({})", text())),
        (2, _, _) => Answer::Refused(format!("the LUN is not ready ({})", text())),
        (5, _, _) => Answer::Refused(text()),
        _ => Answer::Unknown(text()),
    }
}

/// What takes a command to the device.
pub(crate) trait Transport: fmt::Debug + Send + Sync {
    fn send(&self, cdb: &[u8], data: SgData<'_>) -> io::Result<SgReply>;
}

impl Transport for OwnedFd {
    fn send(&self, cdb: &[u8], data: SgData<'_>) -> io::Result<SgReply> {
        scsi_command(self.as_fd(), cdb, data, TIMEOUT_MS)
    }
}

/// One LUN by all of its paths.
#[derive(Debug)]
pub(crate) struct Scsi<P: Transport = OwnedFd> {
    paths: Vec<P>,
    errors: Errors,
    /// The device has refused APTPL before.
    no_aptpl: AtomicBool,
}

impl<P: Transport> Scsi<P> {
    /// `paths` is not empty.
    pub(crate) fn new(paths: Vec<P>, errors: Errors) -> Self {
        Scsi { paths, errors, no_aptpl: AtomicBool::new(false) }
    }

    /// One command on one path, with its repetitions. The bytes that came.
    fn command(
        &self,
        op: PrOp,
        path: &P,
        cdb: &[u8],
        mut data: SgData<'_>,
    ) -> Result<usize, ReservationError> {
        let mut last = String::new();
        for _ in 0..TRIES_MAX {
            let again = match &mut data {
                SgData::ToDevice(bytes) => SgData::ToDevice(bytes),
                SgData::FromDevice(bytes) => SgData::FromDevice(bytes),
            };
            let reply = path.send(cdb, again).map_err(|error| {
                let why = format!("{error}; SCSI commands need a SCSI device and root");
                self.errors.rejected(op, why)
            })?;
            match classify(&reply) {
                Answer::Good => return Ok(reply.transferred),
                Answer::Conflict => return Err(self.errors.conflict(op)),
                Answer::Again(sense) => {
                    last = format!("unit attention {:02x}/{:02x}", sense.code, sense.qualifier);
                    tracing::debug!(%op, last, "the device reports an earlier event; repeating the command");
                }
                Answer::Busy => {
                    last = "the device is busy".into();
                    std::thread::sleep(BUSY_PAUSE);
                }
                Answer::Unsupported(sense) => {
                    let why = format!("sense 5/{:02x}/{:02x}", sense.code, sense.qualifier);
                    return Err(self.errors.unsupported(op, why));
                }
                // Whoever gets a conflict looks whether its key is there, so a true failure is not taken for a fence.
                Answer::NoCommunication(_) if matches!(op, PrOp::Reserve | PrOp::Release | PrOp::Clear) => {
                    return Err(self.errors.conflict(op));
                }
                Answer::NoCommunication(why) | Answer::Refused(why) => {
                    return Err(self.errors.rejected(op, why));
                }
                Answer::Unknown(why) => return Err(self.errors.unknown(op, why)),
            }
        }
        Err(self.errors.rejected(op, format!("{last}, {TRIES_MAX} times in a row; try again later")))
    }

    /// On the first path that is not down.
    fn first_path<T>(
        &self,
        mut run: impl FnMut(&P) -> Result<T, ReservationError>,
    ) -> Result<T, ReservationError> {
        let mut last = None;
        for path in &self.paths {
            match run(path) {
                // Nothing happened on this path, so another may be tried.
                Err(error @ ReservationError::Rejected { .. }) => last = Some(error),
                other => return other,
            }
        }
        Err(last.unwrap_or_else(|| self.errors.rejected(PrOp::Open, "it has no path")))
    }

    fn out(
        &self,
        op: PrOp,
        action: OutAction,
        kind: Option<ReservationType>,
        keys: (u64, u64),
    ) -> Result<(), ReservationError> {
        let list = wire::out_parameters(keys.0, keys.1, false);
        let cdb = wire::out_cdb(action, kind);
        self.first_path(|path| self.command(op, path, &cdb, SgData::ToDevice(&list)).map(drop))
    }

    fn read<T>(
        &self,
        op: PrOp,
        action: InAction,
        parse: impl Fn(&[u8]) -> Result<Parsed<T>, Malformed>,
    ) -> Result<T, ReservationError> {
        self.first_path(|path| {
            let mut bytes = DATA_BYTES_FIRST;
            loop {
                let mut data = vec![0; usize::from(bytes)];
                let cdb = wire::in_cdb(action, bytes);
                let came = self.command(op, path, &cdb, SgData::FromDevice(&mut data))?;
                let parsed = data.get(..came).ok_or(Malformed("more than asked for")).and_then(&parse);
                let parsed = parsed.map_err(|error| self.errors.rejected(op, error.to_string()))?;
                if parsed.whole_bytes <= usize::from(bytes) {
                    return Ok(parsed.value);
                }
                if bytes == DATA_BYTES_MAX {
                    return Err(self.errors.rejected(op, "the device's answer is longer than 64 KiB"));
                }
                bytes = DATA_BYTES_MAX;
            }
        })
    }

    fn register_path(
        &self,
        op: PrOp,
        path: &P,
        action: OutAction,
        old: u64,
        new: u64,
    ) -> Result<(), ReservationError> {
        let cdb = wire::out_cdb(action, None);
        // Unregistering has nothing to keep.
        if new != 0 && !self.no_aptpl.load(Ordering::Relaxed) {
            let list = wire::out_parameters(old, new, true);
            match self.command(op, path, &cdb, SgData::ToDevice(&list)) {
                Err(ReservationError::Unsupported { why, .. }) => {
                    tracing::info!(why, "the storage refuses APTPL; registering without");
                }
                other => return other.map(drop),
            }
        }
        let list = wire::out_parameters(old, new, false);
        self.command(op, path, &cdb, SgData::ToDevice(&list))?;
        if new != 0 {
            self.no_aptpl.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl<P: Transport> Backend for Scsi<P> {
    fn paths(&self) -> usize {
        self.paths.len()
    }

    fn kind(&self) -> Kind {
        Kind::Scsi
    }

    fn capabilities(&self) -> Result<Capabilities, ReservationError> {
        let op = PrOp::Capabilities;
        let mut found = self.first_path(|path| {
            let mut data = [0; 8];
            let cdb = wire::in_cdb(InAction::ReportCapabilities, 8);
            match self.command(op, path, &cdb, SgData::FromDevice(&mut data)) {
                Ok(came) => wire::parse_capabilities(&data[..came.min(8)])
                    .map_err(|error| self.errors.rejected(op, error.to_string())),
                // SPC-2 has no such service action, though it has reservations.
                Err(error) if error.is_unsupported() => {
                    Ok(Capabilities { read_back: true, ..Capabilities::default() })
                }
                Err(error) => Err(error),
            }
        })?;
        let mut data = [0; 64];
        let cdb = wire::is_supported_cdb(OutAction::PreemptAbort, 64);
        let asked = self.first_path(|path| self.command(op, path, &cdb, SgData::FromDevice(&mut data)));
        found.preempt_and_abort = match asked {
            Ok(came) => data.get(..came).and_then(wire::parse_is_supported),
            Err(_) => None,
        };
        Ok(found)
    }

    fn register(
        &self,
        op: PrOp,
        old: u64,
        new: u64,
        ignore: bool,
    ) -> Result<RegisterOutcome, ReservationError> {
        let action = if ignore { OutAction::RegisterIgnore } else { OutAction::Register };
        let mut registered = 0;
        let mut first_error = None;
        for path in &self.paths {
            match self.register_path(op, path, action, old, new) {
                Ok(()) => registered += 1,
                // A conflict or an outcome that is not known goes before a path that is down.
                Err(error) => {
                    let down = |error: &ReservationError| matches!(error, ReservationError::Rejected { .. });
                    if first_error.as_ref().is_none_or(|known| down(known) && !down(&error)) {
                        first_error = Some(error);
                    }
                }
            }
        }
        match first_error {
            Some(error @ ReservationError::Rejected { .. }) if registered > 0 => {
                tracing::warn!(%error, registered, "a path was not registered");
            }
            // A path that was down while its node registered has nothing to take back.
            Some(ReservationError::Conflict { .. }) if registered > 0 && new == 0 => {}
            Some(ReservationError::Conflict { .. }) if registered > 0 => {
                return Err(self.errors.unknown(op, "some paths have another key than others"));
            }
            Some(error) => return Err(error),
            None => {}
        }
        Ok(RegisterOutcome { aptpl: new != 0 && !self.no_aptpl.load(Ordering::Relaxed) })
    }

    fn reserve(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError> {
        self.out(PrOp::Reserve, OutAction::Reserve, Some(kind), (key, 0))
    }

    fn release(&self, key: u64, kind: ReservationType) -> Result<(), ReservationError> {
        self.out(PrOp::Release, OutAction::Release, Some(kind), (key, 0))
    }

    fn preempt(
        &self,
        own: u64,
        victim: u64,
        kind: ReservationType,
        abort: bool,
    ) -> Result<PreemptOutcome, ReservationError> {
        if abort {
            match self.out(PrOp::PreemptAbort, OutAction::PreemptAbort, Some(kind), (own, victim)) {
                Err(ReservationError::Unsupported { why, .. }) => {
                    tracing::warn!(why, "the storage has no PREEMPT AND ABORT; using PREEMPT");
                }
                other => return other.map(|()| PreemptOutcome { aborted: true }),
            }
        }
        self.out(PrOp::Preempt, OutAction::Preempt, Some(kind), (own, victim))?;
        Ok(PreemptOutcome { aborted: false })
    }

    fn clear(&self, key: u64) -> Result<(), ReservationError> {
        self.out(PrOp::Clear, OutAction::Clear, None, (key, 0))
    }

    fn read_keys(&self) -> Result<Keys, ReservationError> {
        self.read(PrOp::ReadKeys, InAction::ReadKeys, wire::parse_keys)
    }

    fn read_reservation(&self) -> Result<Option<Holder>, ReservationError> {
        self.read(PrOp::ReadReservation, InAction::ReadReservation, |data| {
            Ok(Parsed { value: wire::parse_reservation(data)?, whole_bytes: 0 })
        })
    }

    fn read_full_status(&self) -> Result<Vec<FullStatus>, ReservationError> {
        self.read(PrOp::ReadFullStatus, InAction::ReadFullStatus, wire::parse_full_status)
    }
}

#[cfg(test)]
mod tests;
