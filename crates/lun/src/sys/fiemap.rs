//! `FS_IOC_FIEMAP`: where the bytes of a file lie on the device of its file system.
//!
//! Asked in batches until the kernel says that the last extent was reached or the range is covered. A list that
//! would grow past [`EXTENTS_MAX`] is an error and never cut short, because a missing extent reads as a hole.

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::io;
use std::os::fd::AsFd;

/// Last extent of the file.
pub const EXTENT_LAST: u32 = 0x0001;
/// Location not known.
pub const EXTENT_UNKNOWN: u32 = 0x0002;
/// Not allocated yet.
pub const EXTENT_DELALLOC: u32 = 0x0004;
/// Compressed or otherwise encoded.
pub const EXTENT_ENCODED: u32 = 0x0008;
/// Encrypted by the file system.
pub const EXTENT_DATA_ENCRYPTED: u32 = 0x0080;
/// Offsets may not be block-aligned.
pub const EXTENT_NOT_ALIGNED: u32 = 0x0100;
/// Data lies inside metadata.
pub const EXTENT_DATA_INLINE: u32 = 0x0200;
/// Several files share a block.
pub const EXTENT_DATA_TAIL: u32 = 0x0400;
/// Allocated, reads as zeros.
pub const EXTENT_UNWRITTEN: u32 = 0x0800;
/// The file system has no extents natively; blocks were merged for this answer.
pub const EXTENT_MERGED: u32 = 0x1000;
/// Space shared with other files.
pub const EXTENT_SHARED: u32 = 0x2000;

/// Most extents that [`fiemap`] returns.
pub const EXTENTS_MAX: usize = 1 << 20;

/// Extents asked for in one call; 56 bytes each.
const BATCH: usize = 256;

const FLAG_SYNC: u32 = 0x0001;

/// An extent as the file system reports it. It may stick out of the range that was asked for on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawExtent {
    /// Byte offset in the file.
    pub file_offset: u64,
    /// Byte offset on the file system's device; meaningless with `UNKNOWN`, `DELALLOC` or `DATA_INLINE`.
    pub lun_offset: u64,
    /// Bytes.
    pub len: u64,
    /// `EXTENT_*` bits.
    pub flags: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` with room for a batch. The kernel's number encodes the size of the header alone.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; BATCH],
}

const HEADER_BYTES: usize = 32;
const FIEMAP_OPCODE: Opcode = opcode::read_write::<[u8; HEADER_BYTES]>(b'f', 11);
const _: () = assert!(std::mem::offset_of!(Fiemap, extents) == HEADER_BYTES);
const _: () = assert!(size_of::<FiemapExtent>() == 56);

/// The extents of `file` that overlap `start..start + len`, in file order; holes are missing. With `sync` the
/// file's dirty pages are written first, so that delayed allocations have a place.
///
/// # Errors
/// The kernel's errno (`EOPNOTSUPP`: the file system has no FIEMAP); `E2BIG` past [`EXTENTS_MAX`] extents: ask
/// for a smaller range; `EIO` when the file system's answer makes no progress.
pub fn fiemap(file: impl AsFd, start: u64, len: u64, sync: bool) -> io::Result<Vec<RawExtent>> {
    let end = start.saturating_add(len);
    let mut found = Vec::new();
    let mut next = start;
    let mut batch = new_batch();
    while next < end {
        batch.start = next;
        batch.length = end - next;
        batch.flags = if sync && found.is_empty() { FLAG_SYNC } else { 0 };
        batch.mapped_extents = 0;
        batch.extent_count = u32::try_from(BATCH).map_err(io::Error::other)?;
        ask(&file, &mut batch)?;
        let mapped = usize::try_from(batch.mapped_extents).map_err(io::Error::other)?;
        let Some(extents) = batch.extents.get(..mapped) else {
            return Err(Errno::IO.into());
        };
        let Some(last) = extents.last() else { break };
        if found.len() + extents.len() > EXTENTS_MAX {
            return Err(Errno::TOOBIG.into());
        }
        found.extend(extents.iter().map(|extent| RawExtent {
            file_offset: extent.logical,
            lun_offset: extent.physical,
            len: extent.length,
            flags: extent.flags,
        }));
        let reached = last.logical.saturating_add(last.length);
        if last.flags & EXTENT_LAST != 0 || reached >= end {
            break;
        }
        if reached <= next {
            return Err(Errno::IO.into());
        }
        next = reached;
    }
    Ok(found)
}

fn new_batch() -> Box<Fiemap> {
    Box::new(Fiemap {
        start: 0,
        length: 0,
        flags: 0,
        mapped_extents: 0,
        extent_count: 0,
        reserved: 0,
        extents: [FiemapExtent::default(); BATCH],
    })
}

fn ask(file: &impl AsFd, batch: &mut Fiemap) -> io::Result<()> {
    loop {
        // SAFETY: the number is FS_IOC_FIEMAP, whose argument is a `struct fiemap` followed by `extent_count`
        // extents; `Fiemap` has that layout (asserted above), room for BATCH of them, and is initialised.
        let result = unsafe { ioctl(file, Updater::<FIEMAP_OPCODE, Fiemap>::new(batch)) };
        match result {
            Err(Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    /// More extents than one batch holds, so that the loop is exercised, with a hole after each.
    #[test]
    fn all_extents_of_a_fragmented_file_in_order() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let count = u64::try_from(BATCH).unwrap() + 44;
        let step = 128 * 1024;
        for i in 0..count {
            file.write_all_at(&[0xab; 4096], i * step).unwrap();
        }
        let extents = match fiemap(&file, 0, u64::MAX, true) {
            Ok(extents) => extents,
            // A file system without FIEMAP (tmpfs, overlay) cannot run this test.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return,
            Err(error) => panic!("fiemap: {error}"),
        };
        let offsets: Vec<u64> = extents.iter().map(|e| e.file_offset).collect();
        let want: Vec<u64> = (0..count).map(|i| i * step).collect();
        assert_eq!(offsets, want);
        assert!(extents.iter().all(|e| e.flags & EXTENT_DELALLOC == 0 && e.lun_offset != 0));
        assert_eq!(extents.last().unwrap().flags & EXTENT_LAST, EXTENT_LAST);

        let some = fiemap(&file, 10 * step, 2 * step, false).unwrap();
        assert_eq!(some.iter().map(|e| e.file_offset).collect::<Vec<_>>(), [10 * step, 11 * step]);
        assert_eq!(fiemap(&file, 10 * step + 65536, 4096, false).unwrap(), []);
    }
}
