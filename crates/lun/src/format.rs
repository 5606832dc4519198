//! Makes a volume on a LUN: file system first, label last.
//!
//! An interrupted create leaves no valid volume, because the old label is wiped before anything else and the new
//! one is the last write. The file system carries the volume's UUID, so a second create that ran at the same
//! time is noticed before the label is written. Nothing is made inside the file system: that is the
//! coordinator's.

mod mkfs;

pub use mkfs::clear_mmp;

use crate::buf::AlignedBuf;
use crate::device::{Lun, LunOptions};
use crate::error::LunError;
use crate::in_use::is_mounted;
use crate::label::{HEARTBEAT_PERIOD, LabelIoError, label_area_at, read_label, wipe_labels, write_label};
use crate::probe::{Probe, probe, probe_fs};
use csv_ondisk::label::AREA_BYTES;
use csv_ondisk::{FsKind, Label, LabelError, check_volume_name};
use csv_types::{Epoch, LunOffset, NodeId, VolumeId};
use mkfs::Mkfs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Smallest LUN for ext4.
pub const EXT4_LUN_BYTES_MIN: u64 = 64 << 20;
/// Smallest LUN for XFS: mkfs.xfs makes nothing below 300 MiB, and the label needs its MiB.
pub const XFS_LUN_BYTES_MIN: u64 = (300 << 20) + AREA_BYTES;

/// How long the heartbeat of a volume that is marked as in use must stand still before it is overwritten. The
/// unit tests beat by hand.
const HEARTBEAT_WATCH: Duration =
    if cfg!(test) { Duration::from_millis(1) } else { HEARTBEAT_PERIOD.saturating_mul(5) };

/// Bytes zeroed at the head of the LUN and, with the label area, at its end, so that no signature of earlier
/// contents is left. Together they cover every place that [`probe`] looks at.
const WIPE_HEAD_BYTES: u64 = (1 << 20) + (64 << 10);
const WIPE_TAIL_BYTES: u64 = (1 << 20) + (128 << 10);

/// What to make.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// Block device, or a file in the lab.
    pub lun: PathBuf,
    /// Name of the volume.
    pub name: String,
    /// Its file system.
    pub fs: FsKind,
    /// The cluster that it belongs to.
    pub cluster_id: Uuid,
    /// Overwrite what is there. Never overrides that the LUN is in use.
    pub force: bool,
}

/// Why no volume was made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A bad volume name.
    #[error(transparent)]
    Name(LabelError),
    /// The LUN cannot be opened, read or written.
    #[error(transparent)]
    Lun(#[from] LunError),
    /// The label could not be written.
    #[error(transparent)]
    Label(#[from] LabelIoError),
    /// Whether it is in use could not be found out.
    #[error("cannot find out whether {lun} is in use: {error}", lun = lun.display())]
    InUseUnknown {
        /// The LUN.
        lun: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
    /// In use on this node or on another one.
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
    /// Too small for the file system.
    #[error(
        "{lun} has {have_bytes} bytes; an {fs} volume needs at least {need_bytes} bytes ({} MiB)",
        need_bytes >> 20,
        lun = lun.display()
    )]
    TooSmall {
        /// The LUN.
        lun: PathBuf,
        /// Its file system.
        fs: FsKind,
        /// Size of the LUN.
        have_bytes: u64,
        /// Smallest size.
        need_bytes: u64,
    },
    /// The program is not installed.
    #[error("{program} is not installed; install the package {package}")]
    MkfsMissing {
        /// The program.
        program: &'static str,
        /// Where it comes from.
        package: &'static str,
    },
    /// The program failed. The LUN holds no volume now.
    #[error(
        "{program} failed ({why}); the LUN holds no volume now, repeat with --force when the cause is gone"
    )]
    MkfsFailed {
        /// The program.
        program: &'static str,
        /// Exit status and messages.
        why: String,
    },
    /// What mkfs made is not on the LUN.
    #[error(
        "the file system on {lun} is not the one that was just made; is another create running on this LUN?",
        lun = lun.display()
    )]
    NotOurs {
        /// The LUN.
        lun: PathBuf,
    },
}

/// Makes a volume; `progress` is told each step in a few words. Blocks for as long as mkfs takes.
///
/// # Errors
/// Up to `TooSmall` and `MkfsMissing` the LUN is untouched; after any other it holds no volume.
pub fn create_volume(request: &CreateRequest, progress: &mut dyn FnMut(&str)) -> Result<Label, CreateError> {
    check_volume_name(&request.name).map_err(CreateError::Name)?;
    progress("looking at the LUN");
    refuse_in_use(request)?;
    let lun = Lun::open(&request.lun, LunOptions::default())?;
    let fs_end = check_size(request, &lun)?;
    if lun.is_read_only() {
        return Err(LunError::ReadOnly { path: request.lun.clone().into() }.into());
    }
    refuse_occupied(request, &lun, &probe(&lun)?, progress)?;
    let volume_id = VolumeId(Uuid::new_v4());
    let mkfs = Mkfs {
        lun: &request.lun,
        fs: request.fs,
        fs_bytes: fs_end.0,
        logical_block_bytes: lun.logical_block_bytes(),
        uuid: volume_id.0,
    };
    // Before anything is wiped.
    mkfs.program()?;

    progress("wiping earlier contents");
    wipe(&lun)?;
    progress(&format!("making an {} file system", request.fs));
    mkfs.run()?;
    progress("writing the label");
    let made = probe_fs(&lun)?.filter(|fs| fs.uuid == volume_id.0 && fs.fs_bytes <= fs_end.0);
    let Some(made) = made else { return Err(CreateError::NotOurs { lun: request.lun.clone() }) };
    // mkfs has synced what it wrote; the flush makes that durable before a label can say so.
    lun.flush()?;
    let label = Label {
        seq: 0,
        volume_id,
        cluster_id: request.cluster_id,
        name: request.name.clone(),
        fs: request.fs,
        fs_bytes: made.fs_bytes,
        created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        epoch: Epoch(0),
        owner: NodeId(0),
        in_use: false,
        heartbeat: 0,
    };
    Ok(write_label(&lun, &label)?)
}

fn refuse_in_use(request: &CreateRequest) -> Result<(), CreateError> {
    let lun = request.lun.clone();
    match is_mounted(&request.lun) {
        Ok(None) => Ok(()),
        Ok(Some(by)) => Err(CreateError::InUse { lun, by }),
        Err(error) => Err(CreateError::InUseUnknown { lun, error }),
    }
}

/// Where the file system has to end.
fn check_size(request: &CreateRequest, lun: &Lun) -> Result<LunOffset, CreateError> {
    let need_bytes = match request.fs {
        FsKind::Ext4 => EXT4_LUN_BYTES_MIN,
        FsKind::Xfs => XFS_LUN_BYTES_MIN,
    };
    let have_bytes = lun.capacity_bytes();
    let fs_end = label_area_at(have_bytes).filter(|_| have_bytes >= need_bytes);
    fs_end.ok_or_else(|| CreateError::TooSmall {
        lun: request.lun.clone(),
        fs: request.fs,
        have_bytes,
        need_bytes,
    })
}

fn refuse_occupied(
    request: &CreateRequest,
    lun: &Lun,
    found: &Probe,
    progress: &mut dyn FnMut(&str),
) -> Result<(), CreateError> {
    if !request.force && !found.is_blank() {
        return Err(CreateError::Occupied { lun: request.lun.clone(), found: found.describe() });
    }
    let Some(Ok(label)) = &found.label else { return Ok(()) };
    if !label.in_use {
        return Ok(());
    }
    // The mark outlives a crash, so only a heartbeat that moves proves that someone has the volume.
    progress("the volume on it is marked as in use; watching its heartbeat");
    std::thread::sleep(HEARTBEAT_WATCH);
    let now = read_label(lun)?;
    if now.as_ref() == Some(label) {
        return Ok(());
    }
    let owner = now.map_or(label.owner, |label| label.owner);
    let by = format!("node {owner} has the volume \"{}\" mounted right now", label.name);
    Err(CreateError::InUse { lun: request.lun.clone(), by })
}

pub(crate) fn wipe(lun: &Lun) -> Result<(), LunError> {
    // Labels first: from here on the LUN holds no volume.
    wipe_labels(lun)?;
    let zeros = AlignedBuf::new(usize::try_from(WIPE_TAIL_BYTES).unwrap_or(0));
    let tail_at = lun.capacity_bytes().saturating_sub(WIPE_TAIL_BYTES);
    for (at, len) in [(0, WIPE_HEAD_BYTES), (tail_at, WIPE_TAIL_BYTES)] {
        lun.write_at(&zeros, usize::try_from(len).unwrap_or(0), LunOffset(at))?;
    }
    lun.flush()
}

#[cfg(test)]
mod tests;
