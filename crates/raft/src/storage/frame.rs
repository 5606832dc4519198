//! Frames: how one record stands in a file.
//!
//! ```text
//!  0  u32  magic "CSRF"
//!  4  u32  length of the body
//!  8  u64  number of the frame, one more than the frame before it
//! 16  u8   kind
//! 17  u24  sectors of the frame that are all zeros as it was written
//! 20  u32  CRC-32 of bytes 0..20
//! 24       body
//!          0xA5 until, with what follows, a multiple of 32 bytes is reached
//!  +  u32  CRC-32 of all before it
//!  +  u32  end mark "DONE"
//! ```
//!
//! A frame begins at a multiple of 32 bytes, so its header lies in one sector, which a disk writes whole or not at
//! all. A frame that cannot be read is **torn** when a piece of it was not written, as a crash in mid append leaves
//! it: it reaches beyond the end of the file, its end mark is not there, or it has more sectors of zeros than it was
//! written with. With all its pieces there and a wrong checksum it was written whole and damaged since.

use super::FORMAT;
use crate::codec::{Decoder, Encoder, Malformed};
use crate::types::Identity;

const MAGIC: u32 = u32::from_le_bytes(*b"CSRF");
const END: u32 = u32::from_le_bytes(*b"DONE");
const HEADER: usize = 24;
const TRAILER: usize = 8;
const ALIGN: usize = 32;
const FILLER: u8 = 0xA5;
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

/// Bytes that a frame with such a body takes.
fn whole_len(body: usize) -> usize {
    (HEADER + body + TRAILER).next_multiple_of(ALIGN)
}

/// One frame as bytes, to be written at offset `at` of a file, which is the sum of the frames before it.
pub(crate) fn encode(at: u64, number: u64, kind: u8, body: &[u8]) -> Vec<u8> {
    let len = whole_len(body.len());
    let mut out = Encoder(Vec::with_capacity(len));
    out.u32(MAGIC);
    out.u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
    out.u64(number);
    out.u32(u32::from(kind));
    out.u32(0);
    out.0.extend_from_slice(body);
    out.0.resize(len - TRAILER, FILLER);
    // Header and trailer are never zeros, so what stands in them does not matter for the count.
    let in_sector = usize::try_from(at % SECTOR as u64).unwrap_or(0);
    let zeros = u32::try_from(zero_sectors(&out.0, in_sector)).unwrap_or(0);
    out.0[17..20].copy_from_slice(&zeros.to_le_bytes()[..3]);
    let crc = crc32fast::hash(&out.0[..20]);
    out.0[20..24].copy_from_slice(&crc.to_le_bytes());
    out.u32(crc32fast::hash(&out.0));
    out.u32(END);
    out.0
}

/// How many sectors, or parts of sectors, of a frame are zeros; it begins `in_sector` bytes behind the beginning of
/// one.
fn zero_sectors(frame: &[u8], in_sector: usize) -> usize {
    let (first, rest) = frame.split_at((SECTOR - in_sector).min(frame.len()));
    let zeros = |piece: &[u8]| piece.iter().all(|b| *b == 0);
    usize::from(!first.is_empty() && zeros(first)) + rest.chunks(SECTOR).filter(|piece| zeros(piece)).count()
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
    Some(whole_len(body))
}

fn decode_whole(bytes: &[u8], len: usize) -> Option<Frame<'_>> {
    let end = len - TRAILER;
    let whole = bytes.get(..len)?;
    if u32_at(whole, end) != crc32fast::hash(&whole[..end]) || u32_at(whole, end + 4) != END {
        return None;
    }
    let number = u64::from(u32_at(whole, 8)) | (u64::from(u32_at(whole, 12)) << 32);
    let body = usize::try_from(u32_at(whole, 4)).ok()?;
    Some(Frame { number, kind: whole[16], body: &whole[HEADER..HEADER + body], len })
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
    (at + ALIGN..file.len()).step_by(ALIGN).any(|i| {
        let bytes = &file[i..];
        header_len(bytes).is_some_and(|len| decode_whole(bytes, len).is_some())
    })
}

fn body_fault(file: &[u8], at: usize, len: usize) -> Unreadable {
    let end = at + len;
    if file.len() < end {
        return Unreadable::Torn;
    }
    if file[end..].iter().any(|b| *b != 0) {
        return Unreadable::Damaged("its checksum is wrong, and other data follows it");
    }
    let zeros_written = usize::try_from(u32_at(file, at + 16) >> 8).unwrap_or(0);
    let end_mark_missing = file[end - 1] == 0;
    if end_mark_missing || zero_sectors(&file[at..end], at % SECTOR) > zeros_written {
        return Unreadable::Torn;
    }
    Unreadable::Damaged("its checksum is wrong")
}

fn header_fault(file: &[u8], at: usize) -> Unreadable {
    let rest = &file[at..];
    if any_frame_after(file, at) {
        return Unreadable::Damaged("its header is damaged, and other records follow it");
    }
    let not_written = rest.len() < HEADER || rest[..HEADER].iter().all(|b| *b == 0);
    // The end of the file can be anywhere, and some file systems fill up with zeros.
    if not_written || rest[HEADER - 1..].iter().all(|b| *b == 0) {
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

    /// The second one has a sector of zeros of its own.
    fn two_frames() -> (Vec<u8>, usize) {
        let mut file = encode(0, 7, 3, b"first body");
        let second = file.len();
        let mut body = [9; 1900];
        body[500..1200].fill(0);
        file.extend(encode(second as u64, 8, 4, &body));
        (file, second)
    }

    #[test]
    fn frames_come_back() {
        let (file, second) = two_frames();
        let frame = decode(&file, 0).unwrap();
        assert_eq!((frame.number, frame.kind, frame.body, frame.len), (7, 3, &b"first body"[..], second));
        let frame = decode(&file, second).unwrap();
        assert_eq!((frame.body.len(), frame.len % ALIGN), (1900, 0));
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
            if bad != file {
                assert_eq!(decode(&bad, second), Err(Unreadable::Torn), "sector {sector}");
            }
        }
    }
}
