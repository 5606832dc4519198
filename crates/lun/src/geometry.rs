//! Size and alignment of a LUN: `BLKSSZGET`, `BLKGETSIZE64` and `queue/dma_alignment` of a block device, `statx`
//! with `STATX_DIOALIGN` of a file.

use crate::buf::ALIGN_BYTES;
use crate::sys;
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags};
use rustix::io::Errno;
use std::fs;
use std::os::fd::BorrowedFd;

/// Smallest and largest logical block that csvfs works with.
const LOGICAL_BLOCK_BYTES: std::ops::RangeInclusive<u32> = 512..=4096;

/// For a file whose file system does not tell (`STATX_DIOALIGN` needs Linux 6.1).
const FILE_BLOCK_FALLBACK_BYTES: u32 = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Whole logical blocks only.
    pub(crate) capacity_bytes: u64,
    pub(crate) logical_block_bytes: u32,
    pub(crate) memory_align: u32,
    pub(crate) is_block_device: bool,
    /// The device itself takes no writes.
    pub(crate) write_protected: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GeometryError {
    Os(Errno),
    Unsuitable(&'static str, Errno),
}

impl From<Errno> for GeometryError {
    fn from(errno: Errno) -> Self {
        GeometryError::Os(errno)
    }
}

pub(crate) fn read_geometry(fd: BorrowedFd<'_>) -> Result<Geometry, GeometryError> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN;
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, mask)?;
    let kind = FileType::from_raw_mode(stat.stx_mode.into());
    let is_block_device = kind == FileType::BlockDevice;
    if !is_block_device && kind != FileType::RegularFile {
        return Err(GeometryError::Unsuitable("it is neither a block device nor a file", Errno::NOTBLK));
    }
    let dio = dio_align(&stat);
    let (size_bytes, logical_block_bytes) = if is_block_device {
        (sys::block_device_bytes(fd)?, rustix::fs::ioctl_blksszget(fd)?)
    } else {
        (stat.stx_size, dio.map_or(FILE_BLOCK_FALLBACK_BYTES, |(_, offset)| offset).max(512))
    };
    let memory_align = match dio {
        Some((memory, _)) => memory,
        None if is_block_device => dma_alignment(&stat).unwrap_or(logical_block_bytes),
        None => logical_block_bytes,
    };
    if !LOGICAL_BLOCK_BYTES.contains(&logical_block_bytes) || !logical_block_bytes.is_power_of_two() {
        return Err(GeometryError::Unsuitable(
            "its logical blocks are larger than 4096 bytes or not a power of two",
            Errno::OPNOTSUPP,
        ));
    }
    if usize::try_from(memory_align).is_ok_and(|align| align > ALIGN_BYTES) {
        return Err(GeometryError::Unsuitable(
            "direct I/O on it needs memory aligned to more than 4096 bytes",
            Errno::OPNOTSUPP,
        ));
    }
    let block = u64::from(logical_block_bytes);
    Ok(Geometry {
        capacity_bytes: size_bytes / block * block,
        logical_block_bytes,
        memory_align,
        is_block_device,
        write_protected: is_block_device && write_protected(&stat),
    })
}

/// Memory and offset alignment of direct I/O, when the kernel tells and direct I/O is possible.
fn dio_align(stat: &Statx) -> Option<(u32, u32)> {
    let told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    (told && stat.stx_dio_mem_align > 0 && stat.stx_dio_offset_align > 0)
        .then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// From sysfs, which holds a mask; a partition has no queue of its own.
fn dma_alignment(stat: &Statx) -> Option<u32> {
    let device = format!("/sys/dev/block/{}:{}", stat.stx_rdev_major, stat.stx_rdev_minor);
    let text = fs::read_to_string(format!("{device}/queue/dma_alignment"))
        .or_else(|_| fs::read_to_string(format!("{device}/../queue/dma_alignment")))
        .ok()?;
    text.trim().parse::<u32>().ok()?.checked_add(1)
}

/// From sysfs; a kernel that does not tell refuses the write itself.
fn write_protected(stat: &Statx) -> bool {
    let path = format!("/sys/dev/block/{}:{}/ro", stat.stx_rdev_major, stat.stx_rdev_minor);
    fs::read_to_string(path).is_ok_and(|text| text.trim() == "1")
}
