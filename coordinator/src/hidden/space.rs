//! Where a file's bytes lie on the LUN, and making space there that may be lent for writing.
//!
//! A direct write of another node into unwritten space would read back as zeros here, because only the file system
//! can mark an extent as written. So space is filled with zeros by the file system first, and its allocation is
//! in the journal before it is lent (safety rule 3).

use super::attr::keep_mtime;
use super::data::{DIRECT_ALIGN, read_only_fd};
use super::{HiddenFs, Result, errno};
use csv_layout::Extent;
use csv_lun::AlignedBuf;
use csv_lun::sys::{self, RawExtent};
use csv_types::{ByteRange, FileId, LunOffset};
use rustix::fs::{FallocateFlags, IFlags};
use rustix::io::Errno;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::LazyLock;
use std::sync::atomic::Ordering;

/// Why a range was not mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The file system keeps this file in a way that nobody else may touch; go through the coordinator.
    #[error("the file cannot be lent: {0}")]
    NotLendable(&'static str),
    /// The file system failed.
    #[error("mapping failed: {0}")]
    Errno(#[from] Errno),
}

/// Aligned zeros for O_DIRECT, shared by all: a huge page, which the block layer takes as one piece.
const ZEROS_BYTES: usize = 2 << 20;
static ZEROS: LazyLock<AlignedBuf> = LazyLock::new(|| AlignedBuf::new(ZEROS_BYTES));
const _: () = assert!(ZEROS_BYTES.is_multiple_of(DIRECT_ALIGN));

/// One call writes the zeros this often, so that the device has a queue of requests instead of one.
const ZEROS_PER_CALL: u64 = 16;

/// Inode flags that rustix does not name.
const ENCRYPTED: IFlags = IFlags::from_bits_retain(0x0000_0800);
const VERITY: IFlags = IFlags::from_bits_retain(0x0010_0000);

/// A piece of a range that is not written yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Gap {
    range: ByteRange,
    /// Not even allocated.
    hole: bool,
}

impl HiddenFs {
    /// What I/O here is rounded out to: the page cache works in pages, the file system in blocks.
    #[must_use]
    pub fn align(&self) -> u64 {
        u64::from(self.block_bytes).max(DIRECT_ALIGN as u64)
    }

    /// Where `range` lies, without a gap from its start to its end: holes and unwritten pieces have no place and
    /// read as zeros. Dirty pages are written first.
    ///
    /// # Errors
    /// [`MapError::NotLendable`] with the reason; an errno.
    pub fn map(&self, file: FileId, range: ByteRange) -> std::result::Result<Vec<Extent>, MapError> {
        let fd = self.data_fd(file)?;
        let flags = rustix::fs::ioctl_getflags(&fd)?;
        for (flag, reason) in [
            (IFlags::JOURNALING, "its data is journaled"),
            (IFlags::COMPRESSED, "it is compressed"),
            (ENCRYPTED, "it is encrypted"),
            (VERITY, "it is under fs-verity"),
        ] {
            if flags.contains(flag) {
                return Err(MapError::NotLendable(reason));
            }
        }
        lendable(&extents_of(&fd, range, true)?, range)
    }

    /// Makes every byte of `range` (rounded out to blocks) allocated and written: holes and unwritten pieces become
    /// zeros, what is written is not touched. Then the allocation is made durable. The size on disk grows to
    /// the end of the range (never shrinks); note the logical size before. The modification time stays. Pages of
    /// the old last block may be in the cache afterwards: `drop_cache` before lending.
    ///
    /// # Errors
    /// ENOSPC, EFBIG, EDQUOT: data is intact, what was allocated is given back. EIO: the LUN failed.
    pub fn make_written(&self, file: FileId, range: ByteRange) -> Result<()> {
        let fd = self.data_fd(file)?;
        let range = range.align_out(self.align());
        if range.end > i64::MAX.cast_unsigned() {
            return Err(Errno::FBIG);
        }
        let mut raw = extents_of(&fd, range, true)?;
        if raw.iter().any(|extent| extent.flags & sys::EXTENT_DATA_INLINE != 0) {
            // Data inside the inode moves out when the file gets blocks; only then are there gaps to see.
            self.fallocate(file, FallocateFlags::KEEP_SIZE.bits(), range.start, range.len())?;
            raw = extents_of(&fd, range, true)?;
        }
        let gaps = gaps_of(&raw, range);
        let size = u64::try_from(rustix::fs::fstat(&fd)?.st_size).map_err(|_| Errno::IO)?;
        if !gaps.is_empty() || size < range.end {
            let mtime = keep_mtime(&fd)?;
            // The size moves also where the last block is there already: what a node writes behind a size that
            // stayed would be zeroed by the file system when the size moves later.
            let filled = self.fill(file, &fd, &gaps).and_then(|()| grow(&fd, range.end));
            if let Err(errno) = filled {
                give_back(&fd, &gaps, size);
                // The failure to report is the first one.
                let _mtime_kept = rustix::fs::futimens(&fd, &mtime);
                return Err(errno);
            }
            rustix::fs::futimens(&fd, &mtime)?;
        }
        self.latch(rustix::fs::fsync(&fd))
    }

    fn fill(&self, file: FileId, fd: &OwnedFd, gaps: &[Gap]) -> Result<()> {
        for gap in gaps {
            if !self.no_write_zeroes.load(Ordering::Relaxed) {
                match sys::fallocate_write_zeroes(fd, gap.range.start, gap.range.len()).map_err(errno) {
                    Ok(()) => continue,
                    Err(Errno::OPNOTSUPP) => self.no_write_zeroes.store(true, Ordering::Relaxed),
                    Err(errno) => return Err(read_only_fd(errno)),
                }
            }
            // Allocated as one piece and with the size moved first, so that the writes extend nothing and run in
            // parallel below.
            self.fallocate(file, FallocateFlags::empty().bits(), gap.range.start, gap.range.len())?;
            write_zeros(&*self.direct_fd(file)?, gap.range)?;
        }
        Ok(())
    }
}

fn grow(fd: &OwnedFd, size: u64) -> Result<()> {
    let now = u64::try_from(rustix::fs::fstat(fd)?.st_size).map_err(|_| Errno::IO)?;
    if now < size { rustix::fs::ftruncate(fd, size).map_err(read_only_fd) } else { Ok(()) }
}

fn write_zeros(fd: &OwnedFd, range: ByteRange) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let whole = ZEROS_BYTES as u64;
        let left = (range.end - at).min(whole * ZEROS_PER_CALL);
        let slices: Vec<IoSlice<'_>> = (0..left.div_ceil(whole))
            .map(|i| {
                let len = usize::try_from((left - i * whole).min(whole)).unwrap_or(ZEROS_BYTES);
                IoSlice::new(&ZEROS[..len])
            })
            .collect();
        match rustix::io::pwritev(fd, &slices, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => at += written as u64,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(read_only_fd(errno)),
        }
    }
    Ok(())
}

/// Best effort after a failure: frees what the failed call allocated. The caller reports the failure itself.
fn give_back(fd: &OwnedFd, gaps: &[Gap], size: u64) {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for gap in gaps.iter().filter(|gap| gap.hole) {
        let inside = gap.range.intersect(&ByteRange::new(0, size));
        if !inside.is_empty()
            && let Err(error) = rustix::fs::fallocate(fd, punch, inside.start, inside.len())
        {
            tracing::warn!(%error, range = %inside, "space of a failed allocation stays allocated");
        }
    }
    // Also when the size did not move: this frees what lies behind it.
    if let Err(error) = rustix::fs::ftruncate(fd, size) {
        tracing::warn!(%error, size, "space behind the end of a file stays allocated");
    }
}

fn extents_of(fd: &OwnedFd, range: ByteRange, sync: bool) -> Result<Vec<RawExtent>> {
    if range.is_empty() {
        return Ok(Vec::new());
    }
    sys::fiemap(fd, range.start, range.len(), sync).map_err(errno)
}

fn reason_not_lendable(flags: u32) -> Option<&'static str> {
    let harmless = sys::EXTENT_LAST | sys::EXTENT_MERGED | sys::EXTENT_UNWRITTEN;
    if flags & !harmless == 0 {
        return None;
    }
    Some(match flags {
        flags if flags & sys::EXTENT_DATA_INLINE != 0 => "its data lies inside the inode",
        flags if flags & sys::EXTENT_DATA_ENCRYPTED != 0 => "it is encrypted",
        flags if flags & sys::EXTENT_ENCODED != 0 => "it is compressed",
        flags if flags & sys::EXTENT_SHARED != 0 => "it shares blocks with another file",
        flags if flags & (sys::EXTENT_DELALLOC | sys::EXTENT_UNKNOWN) != 0 => "its place is not known yet",
        _ => "the file system keeps it in a special way",
    })
}

fn lendable(raw: &[RawExtent], range: ByteRange) -> std::result::Result<Vec<Extent>, MapError> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut next = range.start;
    for extent in raw {
        let piece = ByteRange::at(extent.file_offset, extent.len).intersect(&range);
        if piece.is_empty() {
            continue;
        }
        if let Some(reason) = reason_not_lendable(extent.flags) {
            return Err(MapError::NotLendable(reason));
        }
        push(&mut extents, ByteRange::new(next, piece.start), None);
        let written = extent.flags & sys::EXTENT_UNWRITTEN == 0;
        let place = written.then(|| LunOffset(extent.lun_offset + (piece.start - extent.file_offset)));
        push(&mut extents, piece, place);
        next = piece.end;
    }
    push(&mut extents, ByteRange::new(next, range.end), None);
    Ok(extents)
}

/// Joins what continues the last extent, so that neither holes nor extents come in splinters.
fn push(extents: &mut Vec<Extent>, range: ByteRange, place: Option<LunOffset>) {
    if range.is_empty() {
        return;
    }
    if let Some(last) = extents.last_mut() {
        let continues = match (last.lun_offset, place) {
            (None, None) => true,
            (Some(before), Some(now)) => before.0 + last.len == now.0,
            (None, Some(_)) | (Some(_), None) => false,
        };
        if continues && last.end() == range.start {
            last.len += range.len();
            return;
        }
    }
    extents.push(Extent { file_offset: range.start, len: range.len(), lun_offset: place });
}

fn gaps_of(raw: &[RawExtent], range: ByteRange) -> Vec<Gap> {
    let mut gaps = Vec::new();
    let mut next = range.start;
    for extent in raw {
        let piece = ByteRange::at(extent.file_offset, extent.len).intersect(&range);
        if piece.is_empty() {
            continue;
        }
        let before = ByteRange::new(next, piece.start);
        if !before.is_empty() {
            gaps.push(Gap { range: before, hole: true });
        }
        if extent.flags & sys::EXTENT_UNWRITTEN != 0 {
            gaps.push(Gap { range: piece, hole: false });
        }
        next = piece.end;
    }
    let behind = ByteRange::new(next, range.end);
    if !behind.is_empty() {
        gaps.push(Gap { range: behind, hole: true });
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(file_offset: u64, lun_offset: u64, len: u64, flags: u32) -> RawExtent {
        RawExtent { file_offset, lun_offset, len, flags }
    }

    #[test]
    fn the_map_has_no_gap_and_no_splinters() {
        let list = [
            raw(0, 1000, 10, 0),
            raw(10, 1010, 10, sys::EXTENT_MERGED),
            raw(30, 5000, 10, sys::EXTENT_UNWRITTEN),
            raw(50, 7000, 50, sys::EXTENT_LAST),
        ];
        let extents = lendable(&list, ByteRange::new(5, 60)).unwrap();
        let want = [(5, 15, Some(1005)), (20, 30, None), (50, 10, Some(7000))];
        let got: Vec<_> =
            extents.iter().map(|e| (e.file_offset, e.len, e.lun_offset.map(|place| place.0))).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn odd_extents_are_not_lent() {
        for flag in [
            sys::EXTENT_SHARED,
            sys::EXTENT_DATA_INLINE | sys::EXTENT_NOT_ALIGNED,
            sys::EXTENT_DELALLOC | sys::EXTENT_UNKNOWN,
            sys::EXTENT_ENCODED,
            0x8000_0000,
        ] {
            let list = [raw(0, 0, 10, flag)];
            assert!(
                matches!(lendable(&list, ByteRange::new(0, 10)), Err(MapError::NotLendable(_))),
                "{flag:#x}"
            );
            // Outside the range it does not matter.
            assert!(lendable(&list, ByteRange::new(10, 20)).is_ok());
        }
    }

    #[test]
    fn gaps_are_holes_and_unwritten_pieces_inside_the_range() {
        let list = [raw(0, 1000, 10, 0), raw(20, 2000, 20, sys::EXTENT_UNWRITTEN), raw(50, 3000, 10, 0)];
        let gaps = gaps_of(&list, ByteRange::new(4, 80));
        let got: Vec<_> = gaps.iter().map(|gap| (gap.range.start, gap.range.end, gap.hole)).collect();
        assert_eq!(got, [(10, 20, true), (20, 40, false), (40, 50, true), (60, 80, true)]);
        assert_eq!(gaps_of(&list, ByteRange::new(0, 10)), []);
    }
}
