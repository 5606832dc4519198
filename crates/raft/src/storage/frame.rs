//! Frames: how one record stands in a file.
//!
//! ```text
//!  0  u32  magic "CSRF"
//!  4  u32  length of the body
//!  8  u64  number of the frame, one more than the frame before it
//! 16  u8   kind; 3 zero bytes
//! 20  u32  CRC-32 of bytes 0..20
//! 24       body
//!  +  u32  CRC-32 of header and body
//!  +  u32  end mark "DONE"
//! ```
//!
//! A frame that cannot be read is **torn** when what is missing reads as zeros or lies behind the end of the file,
//! as a crash in mid append leaves it: the end mark is not there, or a whole disk sector of it is zeros. With all
//! its parts there and a wrong checksum it was written once and damaged since.

use super::FORMAT;
use crate::codec::{Decoder, Encoder, Malformed};
use crate::types::Identity;

const MAGIC: u32 = u32::from_le_bytes(*b"CSRF");
const END: u32 = u32::from_le_bytes(*b"DONE");
const HEADER: usize = 24;
const TRAILER: usize = 8;
/// Smallest piece that a disk writes or does not write.
const SECTOR: usize = 512;
/// Longest body. A snapshot is the longest thing in a frame.
pub(crate) const BODY_MAX: usize = 1 << 30;

/// A frame that was read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) number: u64,
    pub(crate) kind: u8,
    pub(crate) body: &'a [u8],
    /// Bytes that it takes.
    pub(crate) len: usize,
}

/// Why there is no frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// A crash in mid append.
    Torn,
    /// Written whole, and not as it was any more.
    Damaged(&'static str),
}

/// One frame as bytes.
pub(crate) fn encode(number: u64, kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Encoder(Vec::with_capacity(HEADER + body.len() + TRAILER));
    out.u32(MAGIC);
    out.u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
    out.u64(number);
    out.u32(u32::from(kind));
    out.u32(crc32fast::hash(&out.0));
    out.0.extend_from_slice(body);
    out.u32(crc32fast::hash(&out.0));
    out.u32(END);
    out.0
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Length of the whole frame at the beginning of `bytes`, when its header is sound.
fn header_len(bytes: &[u8]) -> Option<usize> {
    if bytes.len() < HEADER || u32_at(bytes, 0) != MAGIC || u32_at(bytes, 20) != crc32fast::hash(&bytes[..20])
    {
        return None;
    }
    let body = usize::try_from(u32_at(bytes, 4)).ok().filter(|len| *len <= BODY_MAX)?;
    Some(HEADER + body + TRAILER)
}

fn decode_whole(bytes: &[u8], len: usize) -> Option<Frame<'_>> {
    let end = len - TRAILER;
    let whole = bytes.get(..len)?;
    if u32_at(whole, end) != crc32fast::hash(&whole[..end]) || u32_at(whole, end + 4) != END {
        return None;
    }
    let number = u64::from(u32_at(whole, 8)) | (u64::from(u32_at(whole, 12)) << 32);
    Some(Frame { number, kind: whole[16], body: &whole[HEADER..end], len })
}

/// Reads the frame at `at` of a file.
pub(crate) fn decode(file: &[u8], at: usize) -> Result<Frame<'_>, Unreadable> {
    let bytes = file.get(at..).unwrap_or_default();
    match header_len(bytes) {
        Some(len) => match decode_whole(bytes, len) {
            Some(frame) => Ok(frame),
            None => Err(body_fault(file, at, len)),
        },
        None => Err(header_fault(file, at)),
    }
}

/// Is a later frame there? Then the one at `at` was acknowledged, whatever it looks like now.
fn any_frame_after(file: &[u8], at: usize) -> bool {
    let magic = MAGIC.to_le_bytes();
    (at + 1..file.len().saturating_sub(HEADER + TRAILER - 1)).any(|i| {
        file[i..].starts_with(&magic)
            && header_len(&file[i..]).is_some_and(|len| decode_whole(&file[i..], len).is_some())
    })
}

/// Is a whole sector of `from..to` zeros (a sector of which a part belongs to the frame counts by that part, when
/// the part is not short)?
fn has_zero_sector(file: &[u8], from: usize, to: usize) -> bool {
    let mut start = from;
    while start < to {
        let end = ((start / SECTOR + 1) * SECTOR).min(to);
        if end - start >= 64 && file[start..end].iter().all(|b| *b == 0) {
            return true;
        }
        start = end;
    }
    false
}

fn body_fault(file: &[u8], at: usize, len: usize) -> Unreadable {
    if file.len() < at + len {
        return Unreadable::Torn;
    }
    let end = at + len;
    if end < file.len() && (any_frame_after(file, end - 1) || file[end..].iter().any(|b| *b != 0)) {
        return Unreadable::Damaged("its checksum is wrong, and other data follows it");
    }
    let end_mark_written = u32_at(file, end - 4) != 0;
    if end_mark_written && !has_zero_sector(file, at, end) {
        return Unreadable::Damaged("its checksum is wrong");
    }
    Unreadable::Torn
}

fn header_fault(file: &[u8], at: usize) -> Unreadable {
    let rest = &file[at..];
    if any_frame_after(file, at) {
        return Unreadable::Damaged("its header is damaged, and other records follow it");
    }
    // Up to the end of the sector in which the header begins, or the header's own end when that is earlier.
    let first_piece = (SECTOR - at % SECTOR).min(HEADER);
    let short = rest.len() < HEADER;
    let last_bytes_missing = rest.len() >= HEADER && rest[HEADER - 4..HEADER].iter().all(|b| *b == 0);
    let first_missing = rest.iter().take(first_piece).all(|b| *b == 0);
    if short || last_bytes_missing || first_missing {
        Unreadable::Torn
    } else {
        Unreadable::Damaged("its header is damaged")
    }
}

/// The beginning of every body that says whose file it is: format, cluster, voter.
pub(crate) fn encode_identity(out: &mut Encoder, identity: Identity) {
    out.u32(FORMAT);
    out.0.extend_from_slice(identity.cluster.as_bytes());
    out.u64(identity.voter);
}

/// Format and owner of a file.
pub(crate) fn decode_identity(input: &mut Decoder<'_>) -> Result<(u32, Identity), Malformed> {
    let format = input.u32()?;
    Ok((format, Identity { cluster: input.uuid()?, voter: input.u64()? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_frames() -> (Vec<u8>, usize) {
        let mut file = encode(7, 3, b"first body");
        let second = file.len();
        file.extend(encode(8, 4, &[9; 1500]));
        (file, second)
    }

    #[test]
    fn frames_come_back() {
        let (file, second) = two_frames();
        let frame = decode(&file, 0).unwrap();
        assert_eq!((frame.number, frame.kind, frame.body, frame.len), (7, 3, &b"first body"[..], second));
        assert_eq!(decode(&file, second).unwrap().body, &[9; 1500]);
    }

    #[test]
    fn every_prefix_of_the_last_frame_is_torn() {
        let (file, second) = two_frames();
        for end in second + 1..file.len() {
            assert_eq!(decode(&file[..end], second), Err(Unreadable::Torn), "cut at {end}");
            let mut zeros = file[..end].to_vec();
            zeros.resize(file.len(), 0);
            if zeros != file {
                assert_eq!(decode(&zeros, second), Err(Unreadable::Torn), "zeros from {end}");
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_damage() {
        let (file, second) = two_frames();
        for at in [0, second] {
            let end = if at == 0 { second } else { file.len() };
            for bit in at * 8..end * 8 {
                let mut bad = file.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(matches!(decode(&bad, at), Err(Unreadable::Damaged(_))), "frame at {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn a_sector_that_was_not_written_is_torn() {
        let (file, second) = two_frames();
        for sector in 0..file.len().div_ceil(SECTOR) {
            let mut bad = file.clone();
            for byte in bad.iter_mut().skip((sector * SECTOR).max(second)).take(SECTOR) {
                *byte = 0;
            }
            let sector_of_first = sector * SECTOR < second;
            // Sector 0 holds the first frame too, so the second one lacks all of it but its beginning there.
            let lost = decode(&bad, second);
            assert_eq!(lost, Err(Unreadable::Torn), "sector {sector}, with first frame: {sector_of_first}");
        }
    }
}
