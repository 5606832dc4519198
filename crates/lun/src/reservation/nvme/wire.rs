//! NVMe reservation commands and reports as bytes. Pure; everything is little-endian. Parsers never panic.

use crate::reservation::scsi::wire::Malformed;
use crate::reservation::types::{Capabilities, FullStatus, Holder, ReservationType};
use std::fmt::Write;

pub(crate) const IDENTIFY_OPCODE: u8 = 0x06;
pub(crate) const IDENTIFY_BYTES: usize = 4096;
/// Where the reservation capabilities stand in the Identify Namespace data.
pub(crate) const RESCAP_AT: usize = 31;

const REGISTER_OPCODE: u8 = 0x0d;
const REPORT_OPCODE: u8 = 0x0e;
const ACQUIRE_OPCODE: u8 = 0x11;
const RELEASE_OPCODE: u8 = 0x15;
const IGNORE_KEY: u32 = 1 << 3;
const HEADER_BYTES: usize = 24;
const EXTENDED_HEADER_BYTES: usize = 64;
const ENTRY_BYTES: usize = 24;
const EXTENDED_ENTRY_BYTES: usize = 64;

/// A command as it goes to the device, with the data to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) opcode: u8,
    pub(crate) cdw10: u32,
    pub(crate) cdw11: u32,
    pub(crate) data: Vec<u8>,
}

/// Change Persist Through Power Loss State.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Persist {
    Keep = 0,
    Set = 3,
}

/// Reservation Acquire Action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Acquire {
    Reserve = 0,
    Preempt = 1,
    PreemptAbort = 2,
}

fn keys(first: u64, second: u64) -> Vec<u8> {
    [first.to_le_bytes(), second.to_le_bytes()].concat()
}

/// Registers `new`, or replaces `old` by it; with `ignore` whatever is registered.
pub(crate) fn register(replace: bool, old: u64, new: u64, ignore: bool, persist: Persist) -> Command {
    let action = if replace { 2 } else { 0 };
    let ignore = if ignore { IGNORE_KEY } else { 0 };
    let cdw10 = action | ignore | ((persist as u32) << 30);
    Command { opcode: REGISTER_OPCODE, cdw10, cdw11: 0, data: keys(old, new) }
}

pub(crate) fn unregister(key: u64, ignore: bool) -> Command {
    let ignore = if ignore { IGNORE_KEY } else { 0 };
    Command { opcode: REGISTER_OPCODE, cdw10: 1 | ignore, cdw11: 0, data: keys(key, 0) }
}

pub(crate) fn acquire(action: Acquire, own: u64, victim: u64, kind: ReservationType) -> Command {
    let cdw10 = action as u32 | (u32::from(kind.nvme()) << 8);
    Command { opcode: ACQUIRE_OPCODE, cdw10, cdw11: 0, data: keys(own, victim) }
}

pub(crate) fn release(key: u64, kind: ReservationType) -> Command {
    let cdw10 = u32::from(kind.nvme()) << 8;
    Command { opcode: RELEASE_OPCODE, cdw10, cdw11: 0, data: key.to_le_bytes().to_vec() }
}

pub(crate) fn clear(key: u64) -> Command {
    Command { opcode: RELEASE_OPCODE, cdw10: 1, cdw11: 0, data: key.to_le_bytes().to_vec() }
}

/// Asks for a report of `bytes` (a multiple of 4).
pub(crate) fn report(bytes: usize, extended: bool) -> Command {
    let dwords = u32::try_from(bytes / 4).unwrap_or(u32::MAX).saturating_sub(1);
    Command { opcode: REPORT_OPCODE, cdw10: dwords, cdw11: u32::from(extended), data: Vec::new() }
}

/// `None` when the namespace has no reservations at all.
pub(crate) fn parse_rescap(byte: u8) -> Option<Capabilities> {
    let types: Vec<_> =
        ReservationType::ALL.into_iter().filter(|kind| byte & (1 << kind.nvme()) != 0).collect();
    (!types.is_empty()).then_some(Capabilities {
        aptpl: Some(byte & 1 != 0),
        aptpl_active: None,
        // Mandatory with reservations.
        preempt_and_abort: Some(true),
        read_back: true,
        types: Some(types),
    })
}

/// A reservation report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) generation: u32,
    pub(crate) kind: Option<ReservationType>,
    /// Do registrations survive a power loss?
    pub(crate) persist: bool,
    pub(crate) registrations: Vec<FullStatus>,
    /// How long all of it is.
    pub(crate) whole_bytes: usize,
}

impl Report {
    /// The reservation; key 0 when everyone holds it.
    pub(crate) fn holder(&self) -> Option<Holder> {
        let kind = self.kind?;
        let holder = self.registrations.iter().find(|one| one.holder);
        let key = if kind.is_all_registrants() { 0 } else { holder.map_or(0, |one| one.key) };
        Some(Holder { key, kind })
    }
}

pub(crate) fn parse_report(data: &[u8], extended: bool) -> Result<Report, Malformed> {
    let (header_bytes, entry_bytes) =
        if extended { (EXTENDED_HEADER_BYTES, EXTENDED_ENTRY_BYTES) } else { (HEADER_BYTES, ENTRY_BYTES) };
    let (Some(header), Some(entries)) = (data.get(..header_bytes), data.get(header_bytes..)) else {
        return Err(Malformed("shorter than its header"));
    };
    let kind = match header[4] {
        0 => None,
        number => {
            Some(ReservationType::from_nvme(number).ok_or(Malformed("an unknown type of reservation"))?)
        }
    };
    let count = usize::from(u16::from_le_bytes([header[5], header[6]]));
    let registrations = entries
        .chunks_exact(entry_bytes)
        .take(count)
        .map(|entry| {
            let number =
                |at: usize| entry.iter().skip(at).take(8).rev().fold(0, |all, b| all << 8 | u64::from(*b));
            let holder = entry[2] & 1 != 0;
            let (key, host) =
                if extended { (number(8), &entry[16..32]) } else { (number(16), &entry[8..16]) };
            let mut initiator = String::from("nvme host ");
            for byte in host.iter().rev() {
                let _ = write!(initiator, "{byte:02x}");
            }
            FullStatus { key, holder, kind: kind.filter(|_| holder), initiator }
        })
        .collect();
    Ok(Report {
        generation: u32::from_le_bytes([header[0], header[1], header[2], header[3]]),
        kind,
        persist: header[9] & 1 != 0,
        registrations,
        whole_bytes: header_bytes + count * entry_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WERO: ReservationType = ReservationType::WriteExclusiveRegistrantsOnly;

    #[test]
    fn commands() {
        let first = register(false, 0, 2, false, Persist::Set);
        assert_eq!((first.opcode, first.cdw10), (0x0d, 0xc000_0000));
        assert_eq!(first.data, [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(register(true, 1, 2, false, Persist::Keep).cdw10, 2);
        assert_eq!(register(true, 0, 2, true, Persist::Keep).cdw10, 0xa);
        assert_eq!(unregister(1, false).cdw10, 1);
        assert_eq!(acquire(Acquire::PreemptAbort, 1, 2, WERO).cdw10, 0x302);
        assert_eq!(acquire(Acquire::Reserve, 1, 0, WERO).opcode, 0x11);
        assert_eq!((release(1, WERO).cdw10, release(1, WERO).data.len()), (0x300, 8));
        assert_eq!(clear(1).cdw10, 1);
        assert_eq!((report(4096, true).cdw10, report(4096, true).cdw11), (1023, 1));
    }

    #[test]
    fn capabilities() {
        assert_eq!(parse_rescap(0), None);
        assert_eq!(parse_rescap(1), None);
        let all = parse_rescap(0xff).unwrap();
        assert_eq!((all.aptpl, all.types.unwrap().len()), (Some(true), 6));
        assert_eq!(parse_rescap(0b1000).unwrap().types.unwrap(), [WERO]);
    }

    #[test]
    fn reports_in_both_formats() {
        let mut data = vec![7, 0, 0, 0, 3, 2, 0, 0, 0, 1];
        data.resize(24, 0);
        for (holder, key) in [(1, 0xaa), (0, 0xbb)] {
            data.extend([1, 0, holder, 0, 0, 0, 0, 0]);
            data.extend([5, 0, 0, 0, 0, 0, 0, 0]);
            data.extend(u64::to_le_bytes(key));
        }
        let report = parse_report(&data, false).unwrap();
        assert_eq!((report.generation, report.persist, report.whole_bytes), (7, true, 72));
        assert_eq!(report.holder(), Some(Holder { key: 0xaa, kind: WERO }));
        assert_eq!(report.registrations[1].key, 0xbb);
        assert_eq!(report.registrations[0].initiator, "nvme host 0000000000000005");
        assert_eq!(parse_report(&data[..60], false).unwrap().registrations.len(), 1);

        let mut data = vec![7, 0, 0, 0, 5, 1, 0];
        data.resize(64, 0);
        data.extend([1, 0, 1, 0, 0, 0, 0, 0]);
        data.extend(0xcc_u64.to_le_bytes());
        data.resize(128, 0x11);
        let report = parse_report(&data, true).unwrap();
        assert_eq!(report.registrations[0].key, 0xcc);
        assert_eq!(report.holder().unwrap().key, 0, "everyone holds it");
        assert!(parse_report(&data[..63], true).is_err());
    }

    proptest! {
        #[test]
        fn parsers_take_anything(data in prop::collection::vec(any::<u8>(), 0..400), extended: bool) {
            if let Ok(report) = parse_report(&data, extended) {
                prop_assert!(report.registrations.len() <= data.len() / ENTRY_BYTES);
                let _ = report.holder();
            }
        }
    }
}
