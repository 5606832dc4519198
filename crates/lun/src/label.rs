//! The label on a LUN: where it lies, read, replace.
//!
//! The area is the last MiB of the LUN. When a LUN has grown, the label is found behind the file system, and
//! stays there. A write replaces the older of the two slots, is flushed and read back, so a crash at any moment
//! leaves the old label or the new one.
//!
//! Reading, changing and writing is not one step: only the node that the cluster has made coordinator may write
//! the label. Writes that name an epoch are refused once the label carries another.

use crate::buf::{ALIGN_BYTES, AlignedBuf};
use crate::device::Lun;
use crate::error::LunError;
use crate::probe::probe_fs;
use csv_ondisk::label::{AREA_BYTES, MAGIC, SLOT_BYTES, SLOT_OFFSETS, Selected, select};
use csv_ondisk::{Label, LabelError};
use csv_types::{Epoch, LunOffset, NodeId};
use std::time::Duration;

/// How often the coordinator counts the heartbeat up while it has the volume.
pub const HEARTBEAT_PERIOD: Duration = Duration::from_secs(1);

/// How far behind the end of the file system the label is looked for on a LUN that has grown: mkfs.xfs leaves a
/// last allocation group unused that is smaller than 16 MiB.
const SEARCH_BYTES: u64 = 32 << 20;
const SEARCH_STEP_BYTES: u64 = 1 << 20;

/// Why a label could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelIoError {
    /// The LUN.
    #[error(transparent)]
    Lun(#[from] LunError),
    /// The label's contents.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// There is none to change.
    #[error("the LUN has no csvfs label; make a volume on it with csvctl volume create")]
    NoLabel,
    /// No room for a label area.
    #[error("the LUN is too small for a csvfs label")]
    TooSmall,
    /// Another node has taken the volume.
    #[error(
        "the label carries epoch {found}, owned by node {owner}, not epoch {expected}; this node has lost the volume"
    )]
    Stale {
        /// Epoch that the caller believes in.
        expected: Epoch,
        /// Epoch on the LUN.
        found: Epoch,
        /// Its owner.
        owner: NodeId,
    },
}

/// Where the label area of a LUN of this size begins, which is where its file system has to end; `None` when
/// the LUN is too small to have one.
#[must_use]
pub fn label_area_at(capacity_bytes: u64) -> Option<LunOffset> {
    let at = capacity_bytes.checked_sub(AREA_BYTES)? / SLOT_BYTES as u64 * SLOT_BYTES as u64;
    (at > 0).then_some(LunOffset(at))
}

/// The label of a LUN; `None` when it has none.
///
/// # Errors
/// `Lun` when it cannot be read, `Label` when there is one that cannot be used.
pub fn read_label(lun: &Lun) -> Result<Option<Label>, LabelIoError> {
    Ok(find(lun)?.map(|(_, selected)| selected.label))
}

/// Writes `label` with the sequence number after the newest on the LUN, and returns it as written.
///
/// # Errors
/// After `Lun` from the device the LUN has the old label or the new one.
pub fn write_label(lun: &Lun, label: &Label) -> Result<Label, LabelIoError> {
    let found = find(lun)?;
    let (area, slot, seq) = match found {
        Some((area, selected)) => (area, selected.next_slot, selected.label.seq.saturating_add(1)),
        None => (label_area_at(lun.capacity_bytes()).ok_or(LabelIoError::TooSmall)?, 0, 1),
    };
    let label = Label { seq, ..label.clone() };
    let at = LunOffset(area.0 + SLOT_OFFSETS[slot]);
    let mut buf = AlignedBuf::copy_padded(&label.encode()?, SLOT_BYTES);
    lun.write_at(&buf, SLOT_BYTES, at)?;
    lun.flush()?;
    buf.fill(0);
    lun.read_at(&mut buf, SLOT_BYTES, at)?;
    if Label::decode(&buf)? != label {
        return Err(LabelError::Damaged.into());
    }
    Ok(label)
}

/// Makes `owner` the coordinator in a new epoch and marks the volume as in use. To be called before the file
/// system is mounted, by the node that the cluster has chosen.
///
/// # Errors
/// As [`write_label`]; the epoch may have been used up all the same.
pub fn bump_epoch(lun: &Lun, owner: NodeId) -> Result<Epoch, LabelIoError> {
    let mut label = read_label(lun)?.ok_or(LabelIoError::NoLabel)?;
    // An epoch that counts one up each failover does not reach 2^64.
    label.epoch = Epoch(label.epoch.0.saturating_add(1));
    label.owner = owner;
    label.in_use = true;
    label.heartbeat = label.heartbeat.wrapping_add(1);
    Ok(write_label(lun, &label)?.epoch)
}

/// As [`bump_epoch`], with the number that the cluster has given out.
///
/// # Errors
/// `Stale` when the label is in this epoch or a later one: the order is out of date, or the cluster's database is.
pub fn begin_epoch(lun: &Lun, owner: NodeId, epoch: Epoch) -> Result<(), LabelIoError> {
    let mut label = read_label(lun)?.ok_or(LabelIoError::NoLabel)?;
    if label.epoch >= epoch {
        return Err(LabelIoError::Stale { expected: epoch, found: label.epoch, owner: label.owner });
    }
    label.epoch = epoch;
    label.owner = owner;
    label.in_use = true;
    label.heartbeat = label.heartbeat.wrapping_add(1);
    write_label(lun, &label).map(drop)
}

/// Counts the heartbeat up, every [`HEARTBEAT_PERIOD`] by the owner of `epoch`.
///
/// # Errors
/// `Stale` when another epoch has begun: stop the volume.
pub fn beat(lun: &Lun, epoch: Epoch) -> Result<u64, LabelIoError> {
    let mut label = read_own_label(lun, epoch)?;
    label.heartbeat = label.heartbeat.wrapping_add(1);
    Ok(write_label(lun, &label)?.heartbeat)
}

/// Marks the volume as no longer in use, after a clean unmount by the owner of `epoch`.
///
/// # Errors
/// `Stale` when another epoch has begun.
pub fn mark_unused(lun: &Lun, epoch: Epoch) -> Result<(), LabelIoError> {
    let mut label = read_own_label(lun, epoch)?;
    label.in_use = false;
    write_label(lun, &label)?;
    Ok(())
}

fn read_own_label(lun: &Lun, expected: Epoch) -> Result<Label, LabelIoError> {
    let label = read_label(lun)?.ok_or(LabelIoError::NoLabel)?;
    if label.epoch != expected {
        return Err(LabelIoError::Stale { expected, found: label.epoch, owner: label.owner });
    }
    Ok(label)
}

/// The area in use and what it holds.
fn find(lun: &Lun) -> Result<Option<(LunOffset, Selected)>, LabelIoError> {
    let Some(at_end) = label_area_at(lun.capacity_bytes()) else { return Ok(None) };
    if let Some(selected) = read_area(lun, at_end)? {
        return Ok(Some((at_end, selected)));
    }
    let Some(fs) = probe_fs(lun)? else { return Ok(None) };
    match search_behind(lun, fs.fs_bytes)? {
        Some(area) => Ok(read_area(lun, area)?.map(|selected| (area, selected))),
        None => Ok(None),
    }
}

fn read_area(lun: &Lun, area: LunOffset) -> Result<Option<Selected>, LabelIoError> {
    let mut slots = [AlignedBuf::new(SLOT_BYTES), AlignedBuf::new(SLOT_BYTES)];
    for (slot, offset) in slots.iter_mut().zip(SLOT_OFFSETS) {
        lun.read_at(slot, SLOT_BYTES, LunOffset(area.0 + offset))?;
    }
    Ok(select([&slots[0], &slots[1]])?)
}

/// The first place behind the file system where a label area begins. Slot 0 is written first and never wiped
/// but with the whole label, so its magic marks the area even when its contents are torn.
fn search_behind(lun: &Lun, fs_end: u64) -> Result<Option<LunOffset>, LunError> {
    let Some(last) = label_area_at(lun.capacity_bytes()) else { return Ok(None) };
    // Overflows only with a damaged superblock.
    let Some(mut at) = fs_end.checked_next_multiple_of(ALIGN_BYTES as u64) else { return Ok(None) };
    let stop = at.saturating_add(SEARCH_BYTES).min(last.0);
    let mut buf = AlignedBuf::new(usize::try_from(SEARCH_STEP_BYTES).unwrap_or(0));
    while at < stop {
        let step = SEARCH_STEP_BYTES.min(stop - at);
        let len = usize::try_from(step).unwrap_or(0);
        lun.read_at(&mut buf, len, LunOffset(at))?;
        for (index, place) in buf[..len].chunks(SLOT_BYTES).enumerate() {
            if place.starts_with(&MAGIC) {
                return Ok(Some(LunOffset(at + (index * SLOT_BYTES) as u64)));
            }
        }
        at += step;
    }
    Ok(None)
}

/// Zeroes both slots of the label that the LUN has, wherever it lies, and of the area at its end.
///
/// # Errors
/// When the LUN cannot be read or written.
pub(crate) fn wipe_labels(lun: &Lun) -> Result<(), LunError> {
    let at_end = label_area_at(lun.capacity_bytes());
    let behind = match probe_fs(lun)? {
        Some(fs) => search_behind(lun, fs.fs_bytes)?,
        None => None,
    };
    let zeros = AlignedBuf::new(SLOT_BYTES);
    for area in at_end.into_iter().chain(behind) {
        for offset in SLOT_OFFSETS {
            lun.write_at(&zeros, SLOT_BYTES, LunOffset(area.0 + offset))?;
        }
    }
    lun.flush()
}

#[cfg(test)]
mod tests;
