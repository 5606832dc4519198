//! Commands and data of SCSI persistent reservations as bytes. Pure. Source: SPC-4 6.15 (PERSISTENT RESERVE IN), 6.16
//! (PERSISTENT RESERVE OUT), 6.35 (REPORT SUPPORTED OPERATION CODES), 4.5 (sense data), 7.6.4 (TransportID).
//!
//! Parsers take whatever a device sends, cut short or nonsense, and never panic: what does not fit is `Malformed`.

use crate::reservation::types::{Capabilities, FullStatus, Holder, Keys, ReservationType};
use std::fmt::Write;

/// PERSISTENT RESERVE OUT service actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutAction {
    Register = 0,
    Reserve = 1,
    Release = 2,
    Clear = 3,
    Preempt = 4,
    PreemptAbort = 5,
    RegisterIgnore = 6,
}

/// PERSISTENT RESERVE IN service actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InAction {
    ReadKeys = 0,
    ReadReservation = 1,
    ReportCapabilities = 2,
    ReadFullStatus = 3,
}

pub(crate) const OUT_OPCODE: u8 = 0x5f;
const IN_OPCODE: u8 = 0x5e;
/// Bytes of a PERSISTENT RESERVE OUT parameter list.
pub(crate) const PARAMETER_BYTES: usize = 24;
/// Bytes before the list in the data of READ KEYS and READ FULL STATUS.
const HEADER_BYTES: usize = 8;
const STATUS_DESCRIPTOR_BYTES: usize = 24;

/// What a device sent does not make sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the device's answer makes no sense ({0})")]
pub(crate) struct Malformed(pub(crate) &'static str);

/// Parsed data, and how long the device says that all of it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parsed<T> {
    pub(crate) value: T,
    pub(crate) whole_bytes: usize,
}

/// The command; the scope is always the LUN (0).
pub(crate) fn out_cdb(action: OutAction, kind: Option<ReservationType>) -> [u8; 10] {
    let mut cdb = [0; 10];
    cdb[0] = OUT_OPCODE;
    cdb[1] = action as u8;
    cdb[2] = kind.map_or(0, ReservationType::scsi);
    cdb[5..9].copy_from_slice(&24_u32.to_be_bytes());
    cdb
}

/// Its parameter list: own (or old) key, and the new or the victim's.
pub(crate) fn out_parameters(key: u64, action_key: u64, aptpl: bool) -> [u8; PARAMETER_BYTES] {
    let mut list = [0; PARAMETER_BYTES];
    list[..8].copy_from_slice(&key.to_be_bytes());
    list[8..16].copy_from_slice(&action_key.to_be_bytes());
    list[20] = u8::from(aptpl);
    list
}

pub(crate) fn in_cdb(action: InAction, allocation_bytes: u16) -> [u8; 10] {
    let mut cdb = [0; 10];
    cdb[0] = IN_OPCODE;
    cdb[1] = action as u8;
    cdb[7..9].copy_from_slice(&allocation_bytes.to_be_bytes());
    cdb
}

/// REPORT SUPPORTED OPERATION CODES for one service action of PERSISTENT RESERVE OUT.
pub(crate) fn is_supported_cdb(action: OutAction, allocation_bytes: u32) -> [u8; 12] {
    let mut cdb = [0; 12];
    cdb[0] = 0xa3;
    cdb[1] = 0x0c;
    // One command, with a service action.
    cdb[2] = 2;
    cdb[3] = OUT_OPCODE;
    cdb[5] = action as u8;
    cdb[6..10].copy_from_slice(&allocation_bytes.to_be_bytes());
    cdb
}

/// `None`: the device does not say.
pub(crate) fn parse_is_supported(data: &[u8]) -> Option<bool> {
    match data.get(1)? & 7 {
        1 => Some(false),
        3 | 5 => Some(true),
        _ => None,
    }
}

fn array<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn be32(data: &[u8], at: usize) -> Option<u32> {
    array(data, at).map(u32::from_be_bytes)
}

fn be64(data: &[u8], at: usize) -> Option<u64> {
    array(data, at).map(u64::from_be_bytes)
}

/// Generation, and the list cut to what the device says that it holds.
fn list(data: &[u8]) -> Result<(u32, &[u8], usize), Malformed> {
    let (Some(generation), Some(len)) = (be32(data, 0), be32(data, 4)) else {
        return Err(Malformed("shorter than its header"));
    };
    let whole_bytes = usize::try_from(len).unwrap_or(usize::MAX).saturating_add(HEADER_BYTES);
    Ok((generation, &data[HEADER_BYTES..whole_bytes.min(data.len())], whole_bytes))
}

pub(crate) fn parse_keys(data: &[u8]) -> Result<Parsed<Keys>, Malformed> {
    let (generation, list, whole_bytes) = list(data)?;
    if !(whole_bytes - HEADER_BYTES).is_multiple_of(8) && whole_bytes != usize::MAX {
        return Err(Malformed("a list of keys that is no multiple of 8 bytes"));
    }
    let keys = list.chunks_exact(8).filter_map(|key| be64(key, 0)).collect();
    Ok(Parsed { value: Keys { generation, keys }, whole_bytes })
}

fn scope_and_type(byte: u8) -> Result<ReservationType, Malformed> {
    if byte >> 4 != 0 {
        return Err(Malformed("a reservation whose scope is not the whole LUN"));
    }
    ReservationType::from_scsi(byte & 15).ok_or(Malformed("an unknown type of reservation"))
}

pub(crate) fn parse_reservation(data: &[u8]) -> Result<Option<Holder>, Malformed> {
    let (_, list, whole_bytes) = list(data)?;
    if whole_bytes == HEADER_BYTES {
        return Ok(None);
    }
    let (Some(key), Some(scope_type)) = (be64(list, 0), list.get(13)) else {
        return Err(Malformed("a reservation that is cut short"));
    };
    Ok(Some(Holder { key, kind: scope_and_type(*scope_type)? }))
}

pub(crate) fn parse_capabilities(data: &[u8]) -> Result<Capabilities, Malformed> {
    let Some(bytes) = array::<6>(data, 0) else {
        return Err(Malformed("capabilities that are cut short"));
    };
    // TMV: is the mask of types valid?
    let types = (bytes[3] & 0x80 != 0).then(|| {
        let mask = u16::from_be_bytes([bytes[4], bytes[5]]);
        let bit = |kind: &ReservationType| match kind {
            ReservationType::WriteExclusiveAllRegistrants => 0x8000,
            ReservationType::ExclusiveAccessRegistrantsOnly => 0x4000,
            ReservationType::WriteExclusiveRegistrantsOnly => 0x2000,
            ReservationType::ExclusiveAccess => 0x0800,
            ReservationType::WriteExclusive => 0x0200,
            ReservationType::ExclusiveAccessAllRegistrants => 0x0001,
        };
        ReservationType::ALL.into_iter().filter(|kind| mask & bit(kind) != 0).collect()
    });
    Ok(Capabilities {
        aptpl: Some(bytes[2] & 1 != 0),
        aptpl_active: Some(bytes[3] & 1 != 0),
        preempt_and_abort: None,
        read_back: true,
        types,
    })
}

pub(crate) fn parse_full_status(data: &[u8]) -> Result<Parsed<Vec<FullStatus>>, Malformed> {
    let (_, mut rest, whole_bytes) = list(data)?;
    let mut found = Vec::new();
    // Each step takes at least one descriptor, so it ends. A descriptor that is cut off ends the list.
    while let (Some(key), Some(flags), Some(scope_type), Some(extra)) =
        (be64(rest, 0), rest.get(12), rest.get(13), be32(rest, 20))
    {
        let end = STATUS_DESCRIPTOR_BYTES.saturating_add(usize::try_from(extra).unwrap_or(usize::MAX));
        let Some(id) = rest.get(STATUS_DESCRIPTOR_BYTES..end) else { break };
        let holder = flags & 1 != 0;
        let kind = holder.then(|| scope_and_type(*scope_type)).transpose()?;
        found.push(FullStatus { key, holder, kind, initiator: transport_id(id) });
        rest = rest.get(end..).unwrap_or_default();
    }
    if !rest.is_empty() && whole_bytes <= data.len() {
        return Err(Malformed("a full status whose lengths contradict each other"));
    }
    Ok(Parsed { value: found, whole_bytes })
}

/// A TransportID in words.
fn transport_id(id: &[u8]) -> String {
    let hex = |bytes: &[u8]| {
        bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    };
    let Some(first) = id.first() else { return "unknown".into() };
    let part = |range: std::ops::Range<usize>| hex(id.get(range).unwrap_or_default());
    match first & 15 {
        0 => format!("fc:{}", part(8..16)),
        4 => format!("srp:{}", part(8..24)),
        5 => {
            let name = id.get(4..).unwrap_or_default();
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            // An initiator could send anything; only what can stand in a log line is shown.
            let name: String = String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).collect();
            format!("iscsi:{name}")
        }
        6 => format!("sas:{}", part(4..12)),
        protocol => format!("protocol {protocol}: {}", hex(id.get(..24).unwrap_or(id))),
    }
}

/// Sense key and additional sense code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sense {
    pub(crate) key: u8,
    pub(crate) code: u8,
    pub(crate) qualifier: u8,
}

/// From fixed or descriptor format.
pub(crate) fn parse_sense(data: &[u8]) -> Option<Sense> {
    let (key, code) = match data.first()? & 0x7f {
        0x70 | 0x71 => (2, 12),
        0x72 | 0x73 => (1, 2),
        _ => return None,
    };
    let at = |index: usize| data.get(index).copied().unwrap_or(0);
    Some(Sense { key: data.get(key)? & 15, code: at(code), qualifier: at(code + 1) })
}

#[cfg(test)]
mod tests;
