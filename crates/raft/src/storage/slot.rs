//! Slots: how a record stands on a block region.
//!
//! ```text
//!  0  u32  magic "CSRS"
//!  4  u32  CRC-32 of bytes 40..4096
//!  8  u64  generation of the area
//! 16  u64  number of the slot in its area, from 0
//! 24  u16  bytes used of the payload
//! 26  u8   flags: 1 first slot of a record, 2 last slot of a record, 4 written after the area was taken into use
//! 27  u8   kind of the record
//! 28  u32  sectors of the slot that are all zeros as it was written
//! 32  u32  CRC-32 of bytes 0..32
//! 36       4 bytes 0xA5
//! 40       payload, 4056 bytes; what is not used is filled with 0xA5
//! ```
//!
//! An area is zeroed before it is used. So a slot that cannot be read and has more sectors of zeros than it was
//! written with was half written by a crash; one with all its sectors was damaged later.

/// Bytes of a slot: what every device writes as one piece or as sectors of 512.
pub(crate) const SLOT: usize = 4096;
const HEADER: usize = 40;
const SECTOR: usize = 512;
pub(crate) const PAYLOAD: usize = SLOT - HEADER;
const MAGIC: [u8; 4] = *b"CSRS";
const FILLER: u8 = 0xA5;

pub(crate) const FIRST: u8 = 1;
pub(crate) const LAST: u8 = 2;
pub(crate) const LIVE: u8 = 4;

/// A slot that was read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Slot<'a> {
    pub(crate) generation: u64,
    pub(crate) number: u64,
    pub(crate) flags: u8,
    pub(crate) kind: u8,
    pub(crate) payload: &'a [u8],
}

/// What stands in a slot.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Content<'a> {
    Slot(Slot<'a>),
    /// Zeros: never written.
    Zeros,
    /// Half written.
    Torn,
    /// Written once, and not as it was any more.
    Damaged,
}

/// Slots that a record of `len` bytes takes.
pub(crate) fn slots_for(len: usize) -> u64 {
    len.div_ceil(PAYLOAD).max(1) as u64
}

/// A record as slots, to be written at slot `number` of its area.
pub(crate) fn encode(generation: u64, number: u64, kind: u8, live: bool, body: &[u8]) -> Vec<u8> {
    let count = slots_for(body.len());
    let mut out = Vec::with_capacity(usize::try_from(count).unwrap_or(0) * SLOT);
    for i in 0..count {
        let from = (usize::try_from(i).unwrap_or(usize::MAX)) * PAYLOAD;
        let part = &body[from.min(body.len())..(from + PAYLOAD).min(body.len())];
        let mut flags = if live { LIVE } else { 0 };
        if i == 0 {
            flags |= FIRST;
        }
        if i + 1 == count {
            flags |= LAST;
        }
        let mut slot = Vec::with_capacity(SLOT);
        slot.extend_from_slice(&MAGIC);
        slot.extend_from_slice(&[0; 4]);
        slot.extend_from_slice(&generation.to_le_bytes());
        slot.extend_from_slice(&(number + i).to_le_bytes());
        slot.extend_from_slice(&u16::try_from(part.len()).unwrap_or(u16::MAX).to_le_bytes());
        slot.extend_from_slice(&[flags, kind, 0, 0, 0, 0, 0, 0, 0, 0]);
        slot.resize(HEADER, FILLER);
        slot.extend_from_slice(part);
        slot.resize(SLOT, FILLER);
        let payload_crc = crc32fast::hash(&slot[HEADER..]);
        put_u32(&mut slot, 4, payload_crc);
        let zeros = zero_sectors(&slot);
        put_u32(&mut slot, 28, zeros);
        let header_crc = crc32fast::hash(&slot[..32]);
        put_u32(&mut slot, 32, header_crc);
        out.append(&mut slot);
    }
    out
}

fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn zero_sectors(bytes: &[u8]) -> u32 {
    bytes.chunks(SECTOR).map(|sector| u32::from(sector.iter().all(|b| *b == 0))).sum()
}

/// Reads one slot.
pub(crate) fn decode(bytes: &[u8]) -> Content<'_> {
    if bytes[..SECTOR].iter().all(|b| *b == 0) {
        return if zero_sectors(bytes) as usize == bytes.len() / SECTOR {
            Content::Zeros
        } else {
            Content::Torn
        };
    }
    // The first sector is there, and with it a whole header.
    let used = usize::from(u16::from_le_bytes([bytes[24], bytes[25]]));
    let header = bytes[..4] == MAGIC && u32_at(bytes, 32) == crc32fast::hash(&bytes[..32]) && used <= PAYLOAD;
    if !header || bytes[36..HEADER] != [FILLER; 4] {
        return Content::Damaged;
    }
    if u32_at(bytes, 4) == crc32fast::hash(&bytes[HEADER..]) {
        return Content::Slot(Slot {
            generation: u64_at(bytes, 8),
            number: u64_at(bytes, 16),
            flags: bytes[26],
            kind: bytes[27],
            payload: &bytes[HEADER..HEADER + used],
        });
    }
    if zero_sectors(bytes) > u32_at(bytes, 28) { Content::Torn } else { Content::Damaged }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_record_comes_back_in_pieces() {
        let body: Vec<u8> = (0..10_000u32).map(|i| i.to_le_bytes()[0]).collect();
        let bytes = encode(5, 17, 3, true, &body);
        assert_eq!(bytes.len(), 3 * SLOT);
        let mut back = Vec::new();
        for (i, chunk) in bytes.chunks(SLOT).enumerate() {
            let Content::Slot(slot) = decode(chunk) else { panic!("slot {i} is not readable") };
            assert_eq!((slot.generation, slot.number, slot.kind), (5, 17 + i as u64, 3));
            assert_eq!(slot.flags, LIVE | [FIRST, 0, LAST][i]);
            back.extend_from_slice(slot.payload);
        }
        assert_eq!(back, body);
    }

    #[test]
    fn damage_and_half_writes_are_told_apart() {
        let mut body = [7; 3000];
        body[1000..2500].fill(0);
        let good = encode(1, 0, 2, true, &body);
        assert_eq!(decode(&[0; SLOT]), Content::Zeros);
        for sector in 0..8 {
            let mut torn = good.clone();
            torn[sector * 512..(sector + 1) * 512].fill(0);
            if torn == good {
                continue;
            }
            assert_eq!(decode(&torn), Content::Torn, "sector {sector}");
        }
        for byte in 0..SLOT {
            let mut bad = good.clone();
            bad[byte] ^= 0x10;
            assert_eq!(decode(&bad), Content::Damaged, "byte {byte}");
        }
    }
}
