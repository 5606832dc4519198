//! File-system calls on an open file: forced shutdown, page-cache counts, inode generation, zeroed allocation.

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, Setter, Updater, ioctl, opcode};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Freeze, flush everything, then shut down: nothing is lost.
pub const SHUTDOWN_DEFAULT: u32 = 0;
/// Flush the log only.
pub const SHUTDOWN_LOGFLUSH: u32 = 1;
/// Flush nothing: as a power cut.
pub const SHUTDOWN_NOLOGFLUSH: u32 = 2;

/// `EXT4_IOC_SHUTDOWN`, `XFS_IOC_GOINGDOWN` and `FS_IOC_SHUTDOWN`: one number, 0x8004587d on most machines.
const SHUTDOWN_OPCODE: Opcode = opcode::read::<u32>(b'X', 125);
/// `FS_IOC_GETVERSION`: declared with a `long`, but the kernel stores an `int`.
const GETVERSION_OPCODE: Opcode = opcode::read::<libc::c_long>(b'v', 1);
/// `FALLOC_FL_WRITE_ZEROES` (Linux 6.17).
const FALLOC_WRITE_ZEROES: u32 = 0x80;
/// Number of the call on every architecture younger than its table; libc does not name it everywhere.
const SYS_CACHESTAT: libc::c_long = 451;

/// Shuts the file system of `file` down at once; every later operation on it fails with `EIO`. Not undone until
/// it is unmounted.
///
/// # Errors
/// The kernel's errno: `EPERM` without `CAP_SYS_ADMIN`, `EINVAL` for unknown `flags`, `ENOTTY` when the file
/// system cannot do it.
pub fn fs_shutdown(file: impl AsFd, flags: u32) -> io::Result<()> {
    // SAFETY: the number is FS_IOC_SHUTDOWN, which reads one u32 from its argument and writes nothing.
    unsafe { ioctl(file, Setter::<SHUTDOWN_OPCODE, u32>::new(flags)) }.map_err(io::Error::from)
}

/// Pages of a file range in the kernel's page cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStat {
    /// Pages in the cache, dirty ones included.
    pub cached_pages: u64,
    /// Dirty pages.
    pub dirty_pages: u64,
    /// Pages being written back.
    pub writeback_pages: u64,
}

#[repr(C)]
struct CacheStatRange {
    off: u64,
    len: u64,
}

/// `struct cachestat`.
#[repr(C)]
#[derive(Default)]
struct RawCacheStat {
    nr_cache: u64,
    nr_dirty: u64,
    nr_writeback: u64,
    nr_evicted: u64,
    nr_recently_evicted: u64,
}

/// Counts the page-cache pages of `offset..offset + len` (Linux 6.5); `len` 0 means to the end of the file.
///
/// # Errors
/// The kernel's errno: `ENOSYS` before Linux 6.5, `EOPNOTSUPP` on hugetlbfs.
pub fn cachestat(file: impl AsFd, offset: u64, len: u64) -> io::Result<CacheStat> {
    let mut range = CacheStatRange { off: offset, len };
    let mut raw = RawCacheStat::default();
    // SAFETY: both structs have the kernel's layout and outlive the call; the kernel reads the first and fills
    // the second.
    let rc = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_fd().as_raw_fd(), &raw mut range, &raw mut raw, 0_u32)
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(CacheStat { cached_pages: raw.nr_cache, dirty_pages: raw.nr_dirty, writeback_pages: raw.nr_writeback })
}

/// Room for the `long` of the declaration, initialised because the kernel fills only its first four bytes.
#[repr(C, align(8))]
struct VersionArg {
    generation: u32,
    unused: u32,
}

/// The generation of a file's inode, the same number that its file handle carries.
///
/// # Errors
/// The kernel's errno: `ENOTTY` when the file system has none, `EBADF` for an `O_PATH` descriptor.
pub fn inode_generation(file: impl AsFd) -> io::Result<u32> {
    let mut arg = VersionArg { generation: 0, unused: 0 };
    // SAFETY: the number is FS_IOC_GETVERSION, which writes an int, or a long on odd file systems, to its
    // argument; `VersionArg` is initialised, eight bytes long and aligned for both.
    unsafe { ioctl(file, Updater::<GETVERSION_OPCODE, VersionArg>::new(&mut arg)) }?;
    Ok(arg.generation)
}

/// Allocates `offset..offset + len` as *written* zeros (`FALLOC_FL_WRITE_ZEROES`), growing the file if needed.
///
/// # Errors
/// `EOPNOTSUPP` when the kernel, the file system or the device cannot: write zeros instead; else the errno.
pub fn fallocate_write_zeroes(file: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    let mode = FallocateFlags::from_bits_retain(FALLOC_WRITE_ZEROES);
    loop {
        match rustix::fs::fallocate(&file, mode, offset, len) {
            Err(Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

/// `BLKGETSIZE64`: declared with a `size_t`, but the kernel stores 64 bits everywhere.
const BLKGETSIZE64_OPCODE: Opcode = opcode::read::<usize>(0x12, 114);

/// Size of a block device in bytes.
///
/// # Errors
/// The kernel's errno: `ENOTTY` when it is no block device.
pub fn block_device_bytes(device: impl AsFd) -> rustix::io::Result<u64> {
    let mut bytes = 0_u64;
    // SAFETY: the number is BLKGETSIZE64, which writes one u64 to its argument.
    unsafe { ioctl(device, Updater::<BLKGETSIZE64_OPCODE, u64>::new(&mut bytes)) }?;
    Ok(bytes)
}

/// `BLKFLSBUF`.
const BLKFLSBUF_OPCODE: Opcode = opcode::none(0x12, 97);

/// Writes a block device's dirty page cache back and drops what is clean. Needs `CAP_SYS_ADMIN`.
///
/// # Errors
/// The kernel's errno.
pub fn drop_block_device_cache(device: impl AsFd) -> rustix::io::Result<()> {
    // SAFETY: the number is BLKFLSBUF, which takes no argument.
    unsafe { ioctl(device, NoArg::<BLKFLSBUF_OPCODE>::new()) }
}

/// Takes note of errors of earlier write-back from the page cache of this file, so that the next `fsync` of this descriptor
/// tells of none of them (sync_file_range(2), errseq in the kernel's documentation).
///
/// # Errors
/// The error that was noted, `EIO` or `ENOSPC`.
pub fn take_write_back_error(file: impl AsFd) -> std::io::Result<()> {
    // SAFETY: a system call without pointers; the descriptor is borrowed for its time.
    let done =
        unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), 0, 1, libc::SYNC_FILE_RANGE_WAIT_BEFORE) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn opcodes_are_the_kernels() {
        assert_eq!(SHUTDOWN_OPCODE, 0x8004_587d);
        assert_eq!(GETVERSION_OPCODE, 0x8008_7601);
        assert_eq!(BLKGETSIZE64_OPCODE, 0x8008_1272);
        assert_eq!(BLKFLSBUF_OPCODE, 0x1261);
    }

    #[test]
    fn cachestat_sees_a_written_page() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 8192]).unwrap();
        match cachestat(&file, 0, 0) {
            Ok(stat) => assert_eq!(stat.cached_pages, 2),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOSYS)),
        }
    }

    #[test]
    fn generation_is_the_one_in_the_handle() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (Ok(generation), Ok((kind, bytes))) =
            (inode_generation(&file), super::super::name_to_handle(&file, c""))
        else {
            return;
        };
        // FILEID_INO32_GEN: ino, generation (ext4).
        if kind == 1 {
            assert_eq!(bytes[4..8], generation.to_ne_bytes());
        }
    }
}
