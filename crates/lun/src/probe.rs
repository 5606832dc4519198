//! What is on a LUN, found by reading it only.

mod signatures;
mod superblock;

pub use superblock::{FsInfo, parse_superblock};

use crate::buf::{ALIGN_BYTES, AlignedBuf};
use crate::device::Lun;
use crate::error::LunError;
use crate::label::{LabelIoError, read_label};
use csv_ondisk::{Label, LabelError};
use csv_types::LunOffset;

/// What is on a LUN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Our label: a good one, one that cannot be used, or none.
    pub label: Option<Result<Label, LabelError>>,
    /// An ext4 or XFS file system.
    pub fs: Option<FsInfo>,
    /// Every known signature, in words with an article; the file system of `fs` is among them.
    pub signatures: Vec<&'static str>,
}

impl Probe {
    /// Nothing known on it? It may hold data all the same.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        self.label.is_none() && self.signatures.is_empty()
    }

    /// In words, for a message.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut parts = Vec::new();
        match &self.label {
            Some(Ok(label)) => parts.push(format!(
                "the csvfs volume \"{}\" ({}) of cluster {}",
                label.name, label.volume_id, label.cluster_id
            )),
            Some(Err(error)) => parts.push(format!("a csvfs label that cannot be used ({error})")),
            None => {}
        }
        parts.extend(self.signatures.iter().map(|name| (*name).to_string()));
        if parts.is_empty() { "nothing known".into() } else { parts.join(" and ") }
    }
}

/// Looks at the head and the end of a LUN.
///
/// # Errors
/// When it cannot be read.
pub fn probe(lun: &Lun) -> Result<Probe, LunError> {
    let head = read_head(lun, signatures::HEAD_BYTES)?;
    let tail = read_tail(lun, signatures::TAIL_BYTES)?;
    let label = match read_label(lun) {
        Ok(label) => label.map(Ok),
        Err(LabelIoError::Label(error)) => Some(Err(error)),
        Err(LabelIoError::Lun(error)) => return Err(error),
        // These come from writing a label only.
        Err(LabelIoError::NoLabel | LabelIoError::TooSmall | LabelIoError::Stale { .. }) => None,
    };
    Ok(Probe {
        label,
        fs: parse_superblock(&head),
        signatures: signatures::find(&head, &tail, lun.capacity_bytes()),
    })
}

/// The ext4 or XFS file system on a LUN.
///
/// # Errors
/// When it cannot be read.
pub fn probe_fs(lun: &Lun) -> Result<Option<FsInfo>, LunError> {
    Ok(parse_superblock(&read_head(lun, ALIGN_BYTES as u64)?))
}

/// Was the ext4 file system on the LUN left without being unmounted, so that its journal has to be replayed and what
/// was not synced may be missing? `None` where there is no ext4. Source: `EXT4_FEATURE_INCOMPAT_RECOVER` in
/// `s_feature_incompat`, Documentation/filesystems/ext4/super.rst.
///
/// # Errors
/// When it cannot be read.
pub fn ext4_needs_recovery(lun: &Lun) -> Result<Option<bool>, LunError> {
    const SUPERBLOCK: usize = 1024;
    const MAGIC: usize = SUPERBLOCK + 0x38;
    const INCOMPAT: usize = SUPERBLOCK + 0x60;
    const RECOVER: u8 = 4;
    let head = read_head(lun, ALIGN_BYTES as u64)?;
    let is_ext4 = head.get(MAGIC..MAGIC + 2) == Some(&[0x53, 0xef]);
    Ok(is_ext4.then(|| head.get(INCOMPAT).is_some_and(|flags| flags & RECOVER != 0)))
}

fn read_head(lun: &Lun, want_bytes: u64) -> Result<AlignedBuf, LunError> {
    read_range(lun, 0, want_bytes.min(lun.capacity_bytes()))
}

fn read_tail(lun: &Lun, want_bytes: u64) -> Result<AlignedBuf, LunError> {
    let len = want_bytes.min(lun.capacity_bytes());
    read_range(lun, lun.capacity_bytes() - len, len)
}

fn read_range(lun: &Lun, at: u64, len: u64) -> Result<AlignedBuf, LunError> {
    // At most TAIL_BYTES, so it fits any usize.
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let mut buf = AlignedBuf::new(len);
    lun.read_at(&mut buf, len, LunOffset(at))?;
    Ok(buf)
}
