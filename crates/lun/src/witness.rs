//! A disk witness on its LUN: making one, reading header and beats, writing beats. The format is that of
//! [`csv_ondisk::witness`]; who may write is decided by the reservation and by `csv_cluster::witness`.
//!
//! The header is the last write of making a witness and the first thing that is wiped, so an interrupted try leaves none.

use crate::buf::{ALIGN_BYTES, AlignedBuf};
use crate::device::{Lun, LunOptions};
use crate::error::LunError;
use crate::format::wipe;
use crate::in_use::is_mounted;
use crate::probe::probe;
use crate::reservation::read_path;
use csv_ondisk::witness::{BEAT_OFFSETS, HEADER_OFFSET, LUN_BYTES_MIN, REGION_OFFSET, SLOT_BYTES};
use csv_ondisk::{Beat, WitnessError, WitnessHeader};
use csv_types::{LunOffset, NodeId};
use std::path::{Path, PathBuf};

const _: () = assert!(SLOT_BYTES.is_multiple_of(ALIGN_BYTES));

/// Why a witness could not be read, made or written.
#[derive(Debug, thiserror::Error)]
pub enum WitnessIoError {
    /// The LUN.
    #[error(transparent)]
    Lun(#[from] LunError),
    /// What is on it.
    #[error(transparent)]
    Record(#[from] WitnessError),
    /// In use on this node.
    #[error("{lun} is in use: {by}; nothing was changed", lun = lun.display())]
    InUse {
        /// The LUN.
        lun: PathBuf,
        /// Who uses it.
        by: String,
    },
    /// There is something on it.
    #[error("{lun} holds {found}; nothing was changed. If that may be destroyed, repeat with --force", lun = lun.display())]
    Occupied {
        /// The LUN.
        lun: PathBuf,
        /// What is there.
        found: String,
    },
    /// Too small.
    #[error("{lun} has {have_bytes} bytes; a disk witness needs at least {LUN_BYTES_MIN} bytes", lun = lun.display())]
    TooSmall {
        /// The LUN.
        lun: PathBuf,
        /// Its size.
        have_bytes: u64,
    },
    /// Blocks that do not fit into a slot.
    #[error("{lun} has blocks of {have_bytes} bytes; a disk witness needs blocks of at most 4096 bytes", lun = lun.display())]
    Blocks {
        /// The LUN.
        lun: PathBuf,
        /// Size of its blocks.
        have_bytes: u32,
    },
}

impl WitnessIoError {
    /// Does it say that another node has the reservation?
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        matches!(self, WitnessIoError::Lun(error) if Lun::is_conflict(error))
    }
}

/// Opens a witness LUN such that it can be read whoever holds it.
///
/// # Errors
/// As [`Lun::open`].
pub fn open_for_reading(device: &Path) -> Result<Lun, LunError> {
    Lun::open(&read_path(device), LunOptions { read_only: true, ..LunOptions::default() })
}

fn read_slot(lun: &Lun, at: u64) -> Result<AlignedBuf, LunError> {
    let mut buf = AlignedBuf::new(SLOT_BYTES);
    lun.read_at(&mut buf, SLOT_BYTES, LunOffset(at))?;
    Ok(buf)
}

fn write_slot(lun: &Lun, slot: &[u8; SLOT_BYTES], at: u64) -> Result<(), LunError> {
    lun.write_at(&AlignedBuf::copy_padded(slot, SLOT_BYTES), SLOT_BYTES, LunOffset(at))?;
    lun.flush()
}

/// Which witness the LUN is.
///
/// # Errors
/// `Record` when it is none, or one that cannot be used.
pub fn read_header(lun: &Lun) -> Result<WitnessHeader, WitnessIoError> {
    Ok(WitnessHeader::decode(&read_slot(lun, HEADER_OFFSET)?)?)
}

/// The newest beat.
///
/// # Errors
/// `Record` when there is none that can be read.
pub fn read_beat(lun: &Lun, header: &WitnessHeader) -> Result<Beat, WitnessIoError> {
    let [even, odd] = BEAT_OFFSETS.map(|at| read_slot(lun, at));
    Ok(Beat::newest([&even?, &odd?], header.witness_id)?)
}

/// Writes a beat; it is durable when this returns.
///
/// # Errors
/// Of the LUN; with a conflict it is not there.
pub fn write_beat(lun: &Lun, beat: &Beat) -> Result<(), WitnessIoError> {
    Ok(write_slot(lun, &beat.encode(), beat.offset())?)
}

/// Takes a LUN for a new witness: refuses one that is in use, and with anything known on it unless `force`; then wipes it.
/// The caller makes the voter's database from [`REGION_OFFSET`] on, and calls [`finish`].
///
/// # Errors
/// Up to `Blocks` the LUN is untouched; after any other it holds no witness.
pub fn prepare(device: &Path, force: bool) -> Result<Lun, WitnessIoError> {
    let path = device.to_owned();
    match is_mounted(device) {
        Ok(None) => {}
        Ok(Some(by)) => return Err(WitnessIoError::InUse { lun: path, by }),
        Err(error) => return Err(WitnessIoError::InUse { lun: path, by: error.to_string() }),
    }
    let lun = Lun::open(device, LunOptions::default())?;
    if lun.is_read_only() {
        return Err(LunError::ReadOnly { path: path.into() }.into());
    }
    if lun.capacity_bytes() < LUN_BYTES_MIN {
        return Err(WitnessIoError::TooSmall { lun: path, have_bytes: lun.capacity_bytes() });
    }
    if usize::try_from(lun.logical_block_bytes()).is_ok_and(|bytes| bytes > SLOT_BYTES) {
        return Err(WitnessIoError::Blocks { lun: path, have_bytes: lun.logical_block_bytes() });
    }
    let found = probe(&lun)?;
    if !found.is_blank() && !force {
        return Err(WitnessIoError::Occupied { lun: path, found: found.describe() });
    }
    wipe(&lun)?;
    Ok(lun)
}

/// The last writes of making a witness: first beat, then the header.
///
/// # Errors
/// The LUN may or may not hold a witness then.
pub fn finish(lun: &Lun, header: &WitnessHeader) -> Result<(), WitnessIoError> {
    let bytes = header.encode()?;
    let beat = Beat { counter: 0, node: NodeId(0), key: 0, witness_id: header.witness_id };
    write_beat(lun, &beat)?;
    write_slot(lun, &bytes, HEADER_OFFSET)?;
    let written = read_header(lun)?;
    if written == *header { Ok(()) } else { Err(WitnessError::Damaged.into()) }
}

/// Bytes for the voter's database, in whole slots.
#[must_use]
pub fn region_bytes(lun: &Lun) -> u64 {
    lun.capacity_bytes().saturating_sub(REGION_OFFSET) / SLOT_BYTES as u64 * SLOT_BYTES as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::lun_file;
    use uuid::Uuid;

    fn header() -> WitnessHeader {
        WitnessHeader {
            witness_id: Uuid::from_u128(1),
            cluster_id: Uuid::from_u128(2),
            name: "witness".into(),
            created_unix_s: 3,
        }
    }

    #[test]
    fn a_witness_is_made_once_and_read() {
        let file = lun_file(LUN_BYTES_MIN);
        let lun = prepare(file.path(), false).unwrap();
        assert!(matches!(read_header(&lun), Err(WitnessIoError::Record(WitnessError::NotAWitness))));
        finish(&lun, &header()).unwrap();
        let reader = open_for_reading(file.path()).unwrap();
        assert_eq!(read_header(&reader).unwrap(), header());
        assert_eq!(read_beat(&reader, &header()).unwrap().counter, 0);
        for counter in 1..4 {
            let beat = Beat { counter, node: NodeId(2), key: 9, witness_id: header().witness_id };
            write_beat(&lun, &beat).unwrap();
            assert_eq!(read_beat(&reader, &header()).unwrap(), beat);
        }
        let again = prepare(file.path(), false).unwrap_err().to_string();
        assert!(again.contains("a disk witness of csvfs") && again.contains("--force"), "{again}");
        assert_eq!(read_beat(&reader, &header()).unwrap().counter, 3, "nothing was changed");
        prepare(file.path(), true).unwrap();
        assert!(read_header(&reader).is_err() && read_beat(&reader, &header()).is_err());
    }

    #[test]
    fn a_small_lun_is_refused() {
        let file = lun_file(LUN_BYTES_MIN - 4096);
        assert!(matches!(prepare(file.path(), true), Err(WitnessIoError::TooSmall { .. })));
    }
}
