//! What a disk witness has on its LUN: whose it is, and the counter that its holder moves.
//!
//! # Place
//!
//! | offset | bytes | what |
//! | ---: | ---: | --- |
//! | 0 | 4096 | header, written once, as the last write of making the witness |
//! | 8192, 12288 | 4096 each | beat slots: a beat goes to the slot of its counter's parity, so that a torn write leaves the one before |
//! | 1 MiB | to the end | region of the voter's database (docs/raft-storage.md) |
//!
//! # Header, version 1; integers are little-endian
//!
//! | offset | bytes | field |
//! | ---: | ---: | --- |
//! | 0 | 8 | magic `CSVWITNS` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | zeros |
//! | 16 | 16 | witness UUID, in the order of its text |
//! | 32 | 16 | cluster UUID, in the order of its text |
//! | 48 | 8 | creation, seconds since the Unix epoch |
//! | 56 | 4 | length of the name, 1 to 64 |
//! | 60 | 64 | name, UTF-8, padded with zeros |
//! | 124 | 3968 | reserved, zeros |
//! | 4092 | 4 | CRC-32 (IEEE) of bytes 0 to 4091 |
//!
//! # Beat, version 1
//!
//! | offset | bytes | field |
//! | ---: | ---: | --- |
//! | 0 | 8 | magic `CSVWBEAT` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | number of the node that wrote it, 0 when the witness was made |
//! | 16 | 8 | counter |
//! | 24 | 8 | reservation key of the node that wrote it |
//! | 32 | 16 | witness UUID |
//! | 48 | 4044 | reserved, zeros |
//! | 4092 | 4 | CRC-32 (IEEE) of bytes 0 to 4091 |

use crate::label::NAME_BYTES_MAX;
use crate::{LabelError, check_volume_name};
use csv_types::NodeId;
use uuid::Uuid;

/// Bytes of the header and of a beat slot.
pub const SLOT_BYTES: usize = 4096;
/// Where the header lies.
pub const HEADER_OFFSET: u64 = 0;
/// Where the beat slots lie: of even counters, of odd counters.
pub const BEAT_OFFSETS: [u64; 2] = [8192, 12288];
/// Where the voter's database begins.
pub const REGION_OFFSET: u64 = 1 << 20;
/// Smallest LUN: the database needs two areas of 2 MiB.
pub const LUN_BYTES_MIN: u64 = REGION_OFFSET + (8 << 20);
/// First bytes of the header.
pub const MAGIC: [u8; 8] = *b"CSVWITNS";
const BEAT_MAGIC: [u8; 8] = *b"CSVWBEAT";
/// The version that this program writes.
pub const VERSION: u32 = 1;

const CRC_AT: usize = SLOT_BYTES - 4;
const HEADER_RESERVED_AT: usize = 124;
const BEAT_RESERVED_AT: usize = 48;

/// Which witness of which cluster a LUN is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WitnessHeader {
    /// Identity of the witness; a new one each time that one is made.
    pub witness_id: Uuid,
    /// The cluster that it belongs to.
    pub cluster_id: Uuid,
    /// Name for people, and key of its device in a node's configuration.
    pub name: String,
    /// When it was made, seconds since the Unix epoch.
    pub created_unix_s: u64,
}

/// A sign of life of the holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Moved by one with each beat.
    pub counter: u64,
    /// Who wrote it; 0 when the witness was made.
    pub node: NodeId,
    /// Its reservation key; 0 when the witness was made.
    pub key: u64,
    /// The witness that it is of: beats of an earlier one on the same LUN do not count.
    pub witness_id: Uuid,
}

/// Why bytes are no header or no beat.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WitnessError {
    /// The magic is not there: something else, or nothing.
    #[error("no disk witness of csvfs")]
    NotAWitness,
    /// The magic is there, but the checksum does not fit.
    #[error("a record of the disk witness is damaged: its checksum does not fit its contents")]
    Damaged,
    /// Written by a newer csvfs.
    #[error("the disk witness has version {0}, this program knows version 1; use the csvfs that wrote it")]
    UnknownVersion(u32),
    /// The checksum fits, but a field makes no sense.
    #[error("the disk witness has an impossible {0}; use the csvfs that wrote it")]
    BadField(&'static str),
    /// A name that cannot be stored.
    #[error("\"{0}\" cannot be the name of a disk witness: 1 to 64 bytes, without / and control characters")]
    BadName(String),
}

fn array_at<const N: usize>(slot: &[u8; SLOT_BYTES], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&slot[at..at + N]);
    out
}

fn seal(slot: &mut [u8; SLOT_BYTES]) {
    let crc = crc32fast::hash(&slot[..CRC_AT]);
    slot[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
}

/// The slot, if magic, checksum, version and reserved bytes are as they must be.
fn unseal<'a>(
    bytes: &'a [u8],
    magic: &[u8; 8],
    reserved_at: usize,
) -> Result<&'a [u8; SLOT_BYTES], WitnessError> {
    let slot: &[u8; SLOT_BYTES] = bytes.try_into().map_err(|_| WitnessError::BadField("length"))?;
    if slot[..8] != *magic {
        return Err(WitnessError::NotAWitness);
    }
    if crc32fast::hash(&slot[..CRC_AT]) != u32::from_le_bytes(array_at(slot, CRC_AT)) {
        return Err(WitnessError::Damaged);
    }
    let version = u32::from_le_bytes(array_at(slot, 8));
    if version != VERSION {
        return Err(WitnessError::UnknownVersion(version));
    }
    if slot[reserved_at..CRC_AT].iter().any(|byte| *byte != 0) {
        return Err(WitnessError::BadField("reserved byte"));
    }
    Ok(slot)
}

impl WitnessHeader {
    /// The bytes of the header.
    ///
    /// # Errors
    /// [`WitnessError::BadName`].
    pub fn encode(&self) -> Result<[u8; SLOT_BYTES], WitnessError> {
        check_volume_name(&self.name).map_err(|_: LabelError| WitnessError::BadName(self.name.clone()))?;
        let len = u32::try_from(self.name.len()).map_err(|_| WitnessError::BadName(self.name.clone()))?;
        let mut slot = [0; SLOT_BYTES];
        let mut put = |at: usize, bytes: &[u8]| slot[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, self.witness_id.as_bytes());
        put(32, self.cluster_id.as_bytes());
        put(48, &self.created_unix_s.to_le_bytes());
        put(56, &len.to_le_bytes());
        put(60, self.name.as_bytes());
        seal(&mut slot);
        Ok(slot)
    }

    /// Reads a header.
    ///
    /// # Errors
    /// Says whether there is none, a damaged one, or one of another version.
    pub fn decode(bytes: &[u8]) -> Result<WitnessHeader, WitnessError> {
        let slot = unseal(bytes, &MAGIC, HEADER_RESERVED_AT)?;
        let len = usize::try_from(u32::from_le_bytes(array_at(slot, 56))).unwrap_or(usize::MAX);
        if !(1..=NAME_BYTES_MAX).contains(&len) {
            return Err(WitnessError::BadField("name length"));
        }
        let name = std::str::from_utf8(&slot[60..60 + len]).map_err(|_| WitnessError::BadField("name"))?;
        check_volume_name(name).map_err(|_| WitnessError::BadField("name"))?;
        Ok(WitnessHeader {
            witness_id: Uuid::from_bytes(array_at(slot, 16)),
            cluster_id: Uuid::from_bytes(array_at(slot, 32)),
            name: name.to_owned(),
            created_unix_s: u64::from_le_bytes(array_at(slot, 48)),
        })
    }
}

impl Beat {
    /// Where this beat is written.
    #[must_use]
    pub fn offset(&self) -> u64 {
        BEAT_OFFSETS[usize::from(self.counter % 2 == 1)]
    }

    /// The bytes of its slot.
    #[must_use]
    pub fn encode(&self) -> [u8; SLOT_BYTES] {
        let mut slot = [0; SLOT_BYTES];
        let mut put = |at: usize, bytes: &[u8]| slot[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &BEAT_MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &self.node.0.to_le_bytes());
        put(16, &self.counter.to_le_bytes());
        put(24, &self.key.to_le_bytes());
        put(32, self.witness_id.as_bytes());
        seal(&mut slot);
        slot
    }

    /// Reads a slot.
    ///
    /// # Errors
    /// As [`WitnessHeader::decode`].
    pub fn decode(bytes: &[u8]) -> Result<Beat, WitnessError> {
        let slot = unseal(bytes, &BEAT_MAGIC, BEAT_RESERVED_AT)?;
        Ok(Beat {
            counter: u64::from_le_bytes(array_at(slot, 16)),
            node: NodeId(u32::from_le_bytes(array_at(slot, 12))),
            key: u64::from_le_bytes(array_at(slot, 24)),
            witness_id: Uuid::from_bytes(array_at(slot, 32)),
        })
    }

    /// The newest beat of this witness in the two slots. A counter that wrapped round is newer than the last one before.
    ///
    /// # Errors
    /// That of the first slot, when neither holds one.
    pub fn newest(slots: [&[u8]; 2], witness_id: Uuid) -> Result<Beat, WitnessError> {
        let [first, second] = slots.map(|slot| {
            let beat = Beat::decode(slot)?;
            if beat.witness_id == witness_id { Ok(beat) } else { Err(WitnessError::NotAWitness) }
        });
        match (first, second) {
            (Ok(a), Ok(b)) => Ok(if a.counter.wrapping_sub(b.counter) < 1 << 63 { a } else { b }),
            (Ok(beat), Err(_)) | (Err(_), Ok(beat)) => Ok(beat),
            (Err(error), Err(_)) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> WitnessHeader {
        WitnessHeader {
            witness_id: Uuid::from_u128(7),
            cluster_id: Uuid::from_u128(8),
            name: "witness".into(),
            created_unix_s: 9,
        }
    }

    fn beat(counter: u64) -> Beat {
        Beat { counter, node: NodeId(3), key: 0x1234, witness_id: Uuid::from_u128(7) }
    }

    #[test]
    fn header_and_beat_come_back() {
        assert_eq!(WitnessHeader::decode(&header().encode().unwrap()), Ok(header()));
        assert_eq!(Beat::decode(&beat(5).encode()), Ok(beat(5)));
        assert_eq!((beat(4).offset(), beat(5).offset()), (8192, 12288));
        assert_eq!(WitnessHeader::decode(&[0; SLOT_BYTES]), Err(WitnessError::NotAWitness));
        assert_eq!(WitnessHeader::decode(&beat(1).encode()), Err(WitnessError::NotAWitness));
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        let (header, beat) = (header().encode().unwrap(), beat(5).encode());
        for at in 0..SLOT_BYTES {
            let flip = |slot: &[u8; SLOT_BYTES]| {
                let mut bad = *slot;
                bad[at] ^= 0x20;
                bad
            };
            assert!(WitnessHeader::decode(&flip(&header)).is_err(), "byte {at}");
            assert!(Beat::decode(&flip(&beat)).is_err(), "byte {at}");
        }
    }

    #[test]
    fn names_that_cannot_be_stored_are_refused() {
        for name in ["", "a/b", &"x".repeat(65)] {
            let header = WitnessHeader { name: name.into(), ..header() };
            assert_eq!(header.encode(), Err(WitnessError::BadName(name.into())));
        }
    }

    #[test]
    fn the_newest_beat_counts_and_a_torn_one_leaves_the_one_before() {
        let (id, old, new) = (Uuid::from_u128(7), beat(6), beat(7));
        let mut torn = new.encode();
        torn[512..].fill(0);
        assert_eq!(Beat::newest([&old.encode(), &new.encode()], id), Ok(new));
        assert_eq!(Beat::newest([&old.encode(), &torn], id), Ok(old));
        assert_eq!(Beat::newest([&torn, &torn], id), Err(WitnessError::Damaged));
        let (last, first) = (beat(u64::MAX), beat(0));
        assert_eq!(Beat::newest([&first.encode(), &last.encode()], id), Ok(first));
        let of_another = Beat { witness_id: Uuid::from_u128(1), ..beat(8) };
        assert_eq!(Beat::newest([&of_another.encode(), &new.encode()], id), Ok(new));
    }
}
