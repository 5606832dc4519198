//! The label: which volume of which cluster a LUN holds, and who owns it in which epoch.
//!
//! # Place
//!
//! The label area is the last MiB of the LUN, behind the file system. It holds two slots, at its start
//! ([`SLOT_OFFSETS`]); the rest is reserved. A write goes to the slot that does *not* hold the newest label, so a
//! torn write leaves the one before it. The valid slot with the highest sequence number is the label.
//!
//! # Layout of a slot, version 1; integers are little-endian
//!
//! | offset | bytes | field |
//! | ---: | ---: | --- |
//! | 0 | 8 | magic `CSVLABEL` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | flags: bit 0 = in use (mounted by `owner`); the others 0 |
//! | 16 | 8 | sequence number, grows by one with each write, from 1 |
//! | 24 | 16 | volume UUID, in the order of its text |
//! | 40 | 16 | cluster UUID, in the order of its text |
//! | 56 | 4 | file system: 1 = ext4, 2 = XFS |
//! | 60 | 4 | owner: node id of the coordinator, 0 = none yet |
//! | 64 | 8 | epoch of the ownership, 0 = none yet |
//! | 72 | 8 | size of the file system when it was made, in bytes |
//! | 80 | 8 | creation, seconds since the Unix epoch |
//! | 88 | 8 | heartbeat counter of the owner |
//! | 96 | 4 | length of the volume name, 1 to 64 |
//! | 100 | 64 | volume name, UTF-8, padded with zeros |
//! | 164 | 3928 | reserved, zeros |
//! | 4092 | 4 | CRC-32 (IEEE) of bytes 0 to 4091 |
//!
//! Magic, version and CRC keep their places in every version, so that an older program can tell a newer label
//! from a damaged one. A change of the meaning of anything else, the reserved bytes included, is a new version.

use csv_types::{Epoch, NodeId, VolumeId};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// Size of the label area at the end of the LUN.
pub const AREA_BYTES: u64 = 1 << 20;
/// Size of one slot.
pub const SLOT_BYTES: usize = 4096;
/// Where the slots lie, counted from the start of the label area.
pub const SLOT_OFFSETS: [u64; 2] = [0, 64 << 10];
/// First bytes of a slot.
pub const MAGIC: [u8; 8] = *b"CSVLABEL";
/// The version that this program writes.
pub const VERSION: u32 = 1;
/// Longest volume name in bytes.
pub const NAME_BYTES_MAX: usize = 64;

const FLAG_IN_USE: u32 = 1;
const RESERVED_AT: usize = 164;
const CRC_AT: usize = SLOT_BYTES - 4;

/// The file system of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FsKind {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl FsKind {
    /// As `mount -t` knows it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            FsKind::Ext4 => "ext4",
            FsKind::Xfs => "xfs",
        }
    }

    fn code(self) -> u32 {
        match self {
            FsKind::Ext4 => 1,
            FsKind::Xfs => 2,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        [FsKind::Ext4, FsKind::Xfs].into_iter().find(|kind| kind.code() == code)
    }
}

impl fmt::Display for FsKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for FsKind {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        [FsKind::Ext4, FsKind::Xfs]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| LabelError::UnknownFs(text.into()))
    }
}

/// What the label says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// Grows by one with each write.
    pub seq: u64,
    /// Identity of the volume.
    pub volume_id: VolumeId,
    /// Identity of the cluster that the volume belongs to.
    pub cluster_id: Uuid,
    /// Name of its directory under `/ClusterStorage`.
    pub name: String,
    /// Its file system.
    pub fs: FsKind,
    /// Size of the file system when it was made.
    pub fs_bytes: u64,
    /// When it was made, seconds since the Unix epoch.
    pub created_unix_s: u64,
    /// Epoch of the ownership; 0 before the first one.
    pub epoch: Epoch,
    /// Coordinator of that epoch; 0 before the first one.
    pub owner: NodeId,
    /// Has the owner the file system mounted? Stays set after a crash.
    pub in_use: bool,
    /// Counted up by the owner while it has the volume, so that others can tell alive from crashed.
    pub heartbeat: u64,
}

/// Why bytes are no usable label, or a label cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// The magic is not there: something else, or nothing.
    #[error("no csvfs label")]
    NotALabel,
    /// The magic is there, but the checksum does not fit.
    #[error("a csvfs label is damaged: its checksum does not fit its contents")]
    Damaged,
    /// Written by a newer csvfs.
    #[error("the csvfs label has version {0}, this program knows version 1; use the csvfs that wrote it")]
    UnknownVersion(u32),
    /// The checksum fits, but a field makes no sense.
    #[error("the csvfs label has an impossible {0}; use the csvfs that wrote it")]
    BadField(&'static str),
    /// A volume name that cannot be one.
    #[error(
        "\"{0}\" cannot be a volume name: it has to be 1 to 64 bytes, not . or .., without / and control characters"
    )]
    BadName(String),
    /// A file system that csvfs does not know.
    #[error("\"{0}\" is no file system for a volume; choose ext4 or xfs")]
    UnknownFs(String),
    /// A slot is exactly [`SLOT_BYTES`] long.
    #[error("a csvfs label slot has 4096 bytes, not {0}")]
    WrongLength(usize),
}

/// Can this be a volume's name, that is, the name of a directory?
///
/// # Errors
/// [`LabelError::BadName`].
pub fn check_volume_name(name: &str) -> Result<(), LabelError> {
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len());
    if !fits || name == "." || name == ".." || name.contains(|c: char| c == '/' || c.is_control()) {
        return Err(LabelError::BadName(name.into()));
    }
    Ok(())
}

impl Label {
    /// The bytes of a slot.
    ///
    /// # Errors
    /// [`LabelError::BadName`] when the name cannot be stored.
    pub fn encode(&self) -> Result<[u8; SLOT_BYTES], LabelError> {
        check_volume_name(&self.name)?;
        let name_len = u32::try_from(self.name.len()).map_err(|_| LabelError::BadName(self.name.clone()))?;
        let flags = if self.in_use { FLAG_IN_USE } else { 0 };
        let mut slot = [0; SLOT_BYTES];
        let mut put = |at: usize, bytes: &[u8]| slot[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &flags.to_le_bytes());
        put(16, &self.seq.to_le_bytes());
        put(24, self.volume_id.0.as_bytes());
        put(40, self.cluster_id.as_bytes());
        put(56, &self.fs.code().to_le_bytes());
        put(60, &self.owner.0.to_le_bytes());
        put(64, &self.epoch.0.to_le_bytes());
        put(72, &self.fs_bytes.to_le_bytes());
        put(80, &self.created_unix_s.to_le_bytes());
        put(88, &self.heartbeat.to_le_bytes());
        put(96, &name_len.to_le_bytes());
        put(100, self.name.as_bytes());
        let crc = crc32fast::hash(&slot[..CRC_AT]);
        slot[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        Ok(slot)
    }

    /// Reads a slot.
    ///
    /// # Errors
    /// Says whether there is no label, a damaged one, or one of another version.
    pub fn decode(slot: &[u8]) -> Result<Label, LabelError> {
        let slot: &[u8; SLOT_BYTES] = slot.try_into().map_err(|_| LabelError::WrongLength(slot.len()))?;
        if slot[..8] != MAGIC {
            return Err(LabelError::NotALabel);
        }
        if crc32fast::hash(&slot[..CRC_AT]) != u32_at(slot, CRC_AT) {
            return Err(LabelError::Damaged);
        }
        let version = u32_at(slot, 8);
        if version != VERSION {
            return Err(LabelError::UnknownVersion(version));
        }
        let flags = u32_at(slot, 12);
        if flags & !FLAG_IN_USE != 0 {
            return Err(LabelError::BadField("flag"));
        }
        if slot[RESERVED_AT..CRC_AT].iter().any(|byte| *byte != 0) {
            return Err(LabelError::BadField("reserved byte"));
        }
        Ok(Label {
            seq: u64_at(slot, 16),
            volume_id: VolumeId(Uuid::from_bytes(array_at(slot, 24))),
            cluster_id: Uuid::from_bytes(array_at(slot, 40)),
            name: decode_name(slot)?,
            fs: FsKind::from_code(u32_at(slot, 56)).ok_or(LabelError::BadField("file system"))?,
            fs_bytes: u64_at(slot, 72),
            created_unix_s: u64_at(slot, 80),
            epoch: Epoch(u64_at(slot, 64)),
            owner: NodeId(u32_at(slot, 60)),
            in_use: flags & FLAG_IN_USE != 0,
            heartbeat: u64_at(slot, 88),
        })
    }
}

fn decode_name(slot: &[u8; SLOT_BYTES]) -> Result<String, LabelError> {
    let bad = LabelError::BadField("volume name");
    let field = &slot[100..RESERVED_AT];
    let len = usize::try_from(u32_at(slot, 96)).map_err(|_| bad.clone())?;
    let (Some(bytes), Some(padding)) = (field.get(..len), field.get(len..)) else { return Err(bad) };
    let name = std::str::from_utf8(bytes).map_err(|_| bad.clone())?;
    if check_volume_name(name).is_err() || padding.iter().any(|byte| *byte != 0) {
        return Err(bad);
    }
    Ok(name.into())
}

fn array_at<const N: usize>(slot: &[u8; SLOT_BYTES], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&slot[at..at + N]);
    bytes
}

fn u32_at(slot: &[u8; SLOT_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(array_at(slot, at))
}

fn u64_at(slot: &[u8; SLOT_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(array_at(slot, at))
}

/// The label of an area, and where the next one goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selected {
    /// The newest valid label.
    pub label: Label,
    /// Index into [`SLOT_OFFSETS`] of the slot that the next write replaces.
    pub next_slot: usize,
}

/// Chooses between the two slots of an area; `None` when neither was ever a label.
///
/// # Errors
/// When a slot holds a label of another version (whatever the other slot says: a newer program works on this
/// LUN), or no slot is valid and at least one is damaged.
pub fn select(slots: [&[u8]; 2]) -> Result<Option<Selected>, LabelError> {
    let mut best: Option<Selected> = None;
    let mut damage = None;
    for (index, slot) in slots.into_iter().enumerate() {
        match Label::decode(slot) {
            Ok(label) => {
                if best.as_ref().is_none_or(|best| label.seq > best.label.seq) {
                    best = Some(Selected { label, next_slot: 1 - index });
                }
            }
            Err(LabelError::NotALabel) => {}
            Err(LabelError::Damaged) => damage = Some(LabelError::Damaged),
            Err(error) => return Err(error),
        }
    }
    match (best, damage) {
        (None, Some(damage)) => Err(damage),
        (best, _) => Ok(best),
    }
}

#[cfg(test)]
mod tests;
