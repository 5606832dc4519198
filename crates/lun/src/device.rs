//! [`Lun`]: one open LUN.
//!
//! Invariants: I/O is whole logical blocks inside the capacity at open time; direct unless the caller says
//! otherwise, because the page cache of one node knows nothing of what the others write. Errors go to the
//! caller as they are; a failed flush means that earlier writes may be lost, and a later flush that succeeds
//! does not bring them back, so the caller latches it (safety rule 7).

use crate::buf::AlignedBuf;
use crate::error::{IoOp, LunError};
use crate::fault::{FaultState, Faulty};
use crate::geometry::{Geometry, GeometryError, read_geometry};
use crate::sys;
use csv_types::LunOffset;
use csv_types::admin::PathFault;
use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How to open a LUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LunOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// `O_DIRECT`. Off only where the file system of a file LUN cannot do it: the page cache is not coherent
    /// between nodes.
    pub direct: bool,
}

impl Default for LunOptions {
    fn default() -> Self {
        LunOptions { read_only: false, direct: true }
    }
}

/// An open LUN; shared between threads by reference.
#[derive(Debug)]
pub struct Lun {
    fd: OwnedFd,
    path: Arc<Path>,
    options: LunOptions,
    geometry: Geometry,
    faults: FaultState,
}

impl Lun {
    /// Opens a block device or a regular file.
    ///
    /// # Errors
    /// `PathFailed` with the errno of the open, `ReadOnly`, or `Unsuitable`.
    pub fn open(path: &Path, options: LunOptions) -> Result<Lun, LunError> {
        let path: Arc<Path> = path.into();
        let mut flags = OFlags::CLOEXEC;
        flags |= if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        if options.direct {
            flags |= OFlags::DIRECT;
        }
        let fd = rustix::fs::open(&*path, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::INVAL if options.direct => LunError::Unsuitable {
                path: Arc::clone(&path),
                why: "its file system cannot do direct I/O; put it on ext4, XFS or a block device",
                errno,
            },
            Errno::ISDIR => LunError::Unsuitable { path: Arc::clone(&path), why: "it is a directory", errno },
            _ => device_error(&path, IoOp::Open, 0, errno),
        })?;
        let geometry = read_geometry(fd.as_fd()).map_err(|error| geometry_error(&path, error))?;
        Ok(Lun { fd, path, options, geometry, faults: FaultState::new() })
    }

    /// Bytes of the smallest I/O.
    #[must_use]
    pub fn logical_block_bytes(&self) -> u32 {
        self.geometry.logical_block_bytes
    }

    /// What the address of a buffer must be a multiple of; never more than an [`AlignedBuf`] offers.
    #[must_use]
    pub fn memory_align(&self) -> u32 {
        self.geometry.memory_align
    }

    /// Size when it was opened, in whole blocks.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.geometry.capacity_bytes
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opened for reading only, or write-protected by the device?
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.options.read_only || self.geometry.write_protected
    }

    /// A block device, as opposed to a file?
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.geometry.is_block_device
    }

    /// Asks the device for its size again: the size now.
    ///
    /// # Errors
    /// `Shrunk` when it is smaller than at open; whoever holds the volume must stop using it.
    pub fn check_capacity(&self) -> Result<u64, LunError> {
        let now = read_geometry(self.fd.as_fd()).map_err(|error| geometry_error(&self.path, error))?;
        if now.capacity_bytes < self.geometry.capacity_bytes {
            return Err(LunError::Shrunk {
                path: Arc::clone(&self.path),
                was_bytes: self.geometry.capacity_bytes,
                now_bytes: now.capacity_bytes,
            });
        }
        Ok(now.capacity_bytes)
    }

    /// May this I/O be sent at all? Every way to the device asks first.
    ///
    /// # Errors
    /// `Misaligned`, `OutOfBounds` or `ReadOnly`.
    pub fn check_range(&self, op: IoOp, len: usize, at: LunOffset) -> Result<(), LunError> {
        let align_bytes = u64::from(self.geometry.logical_block_bytes);
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        for (what, value) in [("offset", at.0), ("length", len)] {
            if !value.is_multiple_of(align_bytes) {
                return Err(LunError::Misaligned { op, what, value, align_bytes });
            }
        }
        let capacity_bytes = self.geometry.capacity_bytes;
        if at.0.checked_add(len).is_none_or(|end| end > capacity_bytes) {
            return Err(LunError::OutOfBounds { op, offset: at.0, len, capacity_bytes });
        }
        if op == IoOp::Write && self.is_read_only() {
            return Err(LunError::ReadOnly { path: Arc::clone(&self.path) });
        }
        Ok(())
    }

    /// Reads `len` bytes at `at` into the front of `buf`.
    ///
    /// # Errors
    /// Any kind; after one the contents of `buf` are unspecified.
    pub fn read_at(&self, buf: &mut AlignedBuf, len: usize, at: LunOffset) -> Result<(), LunError> {
        self.check_range(IoOp::Read, len, at)?;
        self.wait_admitted(IoOp::Read, at)?;
        let have_bytes = buf.len();
        let Some(target) = buf.get_mut(..len) else {
            return Err(LunError::BufferTooSmall { op: IoOp::Read, have_bytes, need_bytes: len });
        };
        self.transfer(IoOp::Read, len, at, |done, offset| {
            rustix::io::pread(&self.fd, &mut target[done..], offset)
        })?;
        self.check_fault_completed(IoOp::Read, at)
    }

    /// Writes the first `len` bytes of `buf` at `at`. Durable after a [`Lun::flush`] that follows.
    ///
    /// # Errors
    /// Any kind; [`LunError`] says which of them leave the blocks undefined.
    pub fn write_at(&self, buf: &AlignedBuf, len: usize, at: LunOffset) -> Result<(), LunError> {
        self.check_range(IoOp::Write, len, at)?;
        self.wait_admitted(IoOp::Write, at)?;
        let Some(source) = buf.get(..len) else {
            return Err(LunError::BufferTooSmall { op: IoOp::Write, have_bytes: buf.len(), need_bytes: len });
        };
        self.transfer(IoOp::Write, len, at, |done, offset| {
            rustix::io::pwrite(&self.fd, &source[done..], offset)
        })?;
        self.check_fault_completed(IoOp::Write, at)
    }

    /// Makes every completed write durable on the device.
    ///
    /// # Errors
    /// `PathFailed` or `Fenced`: earlier writes may be lost. Latch it; do not just try again.
    pub fn flush(&self) -> Result<(), LunError> {
        self.wait_admitted(IoOp::Flush, LunOffset(0))?;
        rustix::io::retry_on_intr(|| rustix::fs::fdatasync(&self.fd))
            .map_err(|errno| self.io_error(IoOp::Flush, LunOffset(0), errno))?;
        self.check_fault_completed(IoOp::Flush, LunOffset(0))
    }

    /// Drops this node's page cache of the LUN, which knows nothing of what other nodes have written since. To
    /// be called before the file system is mounted here: the mount reads through that cache, and it outlives
    /// an earlier mount for as long as anybody has the device open.
    ///
    /// # Errors
    /// `PathFailed`; do not mount then.
    pub fn drop_page_cache(&self) -> Result<(), LunError> {
        let dropped = if self.geometry.is_block_device {
            sys::drop_block_device_cache(&self.fd)
        } else {
            rustix::fs::fadvise(&self.fd, 0, None, Advice::DontNeed)
        };
        dropped.map_err(|errno| self.io_error(IoOp::Flush, LunOffset(0), errno))
    }

    /// Continues short transfers until `len` bytes are done. Each step moves at least one block, so it ends.
    fn transfer(
        &self,
        op: IoOp,
        len: usize,
        at: LunOffset,
        mut step: impl FnMut(usize, u64) -> rustix::io::Result<usize>,
    ) -> Result<(), LunError> {
        let mut done = 0;
        while done < len {
            let offset = at.0 + u64::try_from(done).unwrap_or(u64::MAX);
            match rustix::io::retry_on_intr(|| step(done, offset)) {
                Ok(0) => {
                    self.check_capacity()?;
                    return Err(self.io_error(op, LunOffset(offset), Errno::IO));
                }
                Ok(moved) => done += moved,
                Err(errno) => return Err(self.io_error(op, LunOffset(offset), errno)),
            }
        }
        Ok(())
    }

    /// The error for an errno that the device gave: `EBADE` is a reservation conflict.
    #[must_use]
    pub fn io_error(&self, op: IoOp, at: LunOffset, errno: Errno) -> LunError {
        device_error(&self.path, op, at.0, errno)
    }

    /// Injects a fault into this path, or takes it away.
    pub fn set_fault(&self, fault: PathFault) {
        self.faults.set(fault);
    }

    /// The fault in force; `ErrorAfter` counts down.
    #[must_use]
    pub fn fault(&self) -> PathFault {
        self.faults.get()
    }

    /// Is any fault injected? Cheap enough to ask before each I/O.
    #[must_use]
    pub fn is_faulty(&self) -> bool {
        self.faults.is_active()
    }

    /// Before an I/O that this type does not do itself: may it start? The caller waits for the delay, if any,
    /// and calls [`Lun::check_fault_completed`] afterwards.
    ///
    /// # Errors
    /// `PathFailed` with `EIO` when an injected fault says so.
    pub fn admit_io(&self, op: IoOp, at: LunOffset) -> Result<Option<Duration>, LunError> {
        self.faults.admit().map_err(|Faulty| self.io_error(op, at, Errno::IO))
    }

    /// As [`Lun::admit_io`] for a thread that may block: sleeps through the delay.
    ///
    /// # Errors
    /// As [`Lun::admit_io`].
    pub fn check_fault(&self) -> Result<(), LunError> {
        self.wait_admitted(IoOp::Check, LunOffset(0))
    }

    fn wait_admitted(&self, op: IoOp, at: LunOffset) -> Result<(), LunError> {
        if let Some(delay) = self.admit_io(op, at)? {
            std::thread::sleep(delay);
        }
        Ok(())
    }

    /// After an I/O: fails it when the path was failed while it was in flight. Counts nothing, never waits.
    ///
    /// # Errors
    /// `PathFailed` with `EIO`; a write may have reached the device all the same.
    pub fn check_fault_completed(&self, op: IoOp, at: LunOffset) -> Result<(), LunError> {
        self.faults.check_completed().map_err(|Faulty| self.io_error(op, at, Errno::IO))
    }
}

impl AsFd for Lun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn device_error(path: &Arc<Path>, op: IoOp, offset: u64, errno: Errno) -> LunError {
    let path = Arc::clone(path);
    match errno {
        Errno::BADE => LunError::Fenced { op, path },
        Errno::ROFS => LunError::ReadOnly { path },
        _ => LunError::PathFailed { op, path, offset, errno },
    }
}

fn geometry_error(path: &Arc<Path>, error: GeometryError) -> LunError {
    match error {
        GeometryError::Os(errno) => device_error(path, IoOp::Open, 0, errno),
        GeometryError::Unsuitable(why, errno) => LunError::Unsuitable { path: Arc::clone(path), why, errno },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::{LoopDevice, lun_file};

    fn pattern(len: usize, seed: u8) -> AlignedBuf {
        let mut buf = AlignedBuf::new(len);
        for (block, bytes) in buf.chunks_mut(512).enumerate() {
            bytes.fill(seed.wrapping_add(u8::try_from(block % 251).unwrap()));
        }
        buf
    }

    fn round_trip(lun: &Lun) {
        let data = pattern(16 * 4096, 3);
        lun.write_at(&data, data.len(), LunOffset(8192)).unwrap();
        lun.flush().unwrap();
        let mut back = AlignedBuf::new(data.len());
        lun.read_at(&mut back, data.len(), LunOffset(8192)).unwrap();
        assert!(back[..] == data[..]);
        lun.read_at(&mut back, 4096, LunOffset(4096)).unwrap();
        assert!(back[..4096].iter().all(|b| *b == 0), "the block before must be untouched");
    }

    #[test]
    fn file_lun_keeps_what_was_written() {
        let file = lun_file(1 << 20);
        let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
        assert_eq!(lun.capacity_bytes(), 1 << 20);
        assert!(!lun.is_block_device());
        round_trip(&lun);
    }

    #[test]
    fn block_device_tells_its_geometry() {
        let Some(device) = LoopDevice::new(8 << 20, 4096) else { return };
        let lun = Lun::open(device.path(), LunOptions::default()).unwrap();
        assert!(lun.is_block_device());
        assert_eq!((lun.capacity_bytes(), lun.logical_block_bytes()), (8 << 20, 4096));
        assert!(lun.memory_align().is_power_of_two() && lun.memory_align() <= 4096);
        round_trip(&lun);
        let error = lun.check_range(IoOp::Read, 512, LunOffset(0)).unwrap_err();
        assert!(matches!(error, LunError::Misaligned { what: "length", value: 512, .. }), "{error}");
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        let file = lun_file(1 << 20);
        let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
        let mut buf = AlignedBuf::new(8192);
        let errno = |result: Result<(), LunError>| result.unwrap_err().errno();
        assert_eq!(errno(lun.read_at(&mut buf, 4096, LunOffset(1 << 20))), libc::ENXIO);
        assert_eq!(errno(lun.read_at(&mut buf, 8192, LunOffset((1 << 20) - 4096))), libc::ENXIO);
        assert_eq!(errno(lun.write_at(&buf, 4096, LunOffset(u64::MAX - 4095))), libc::ENXIO);
        assert_eq!(errno(lun.write_at(&buf, 4096, LunOffset(100))), libc::EINVAL);
        assert_eq!(errno(lun.read_at(&mut buf, 12288, LunOffset(0))), libc::EINVAL);
        let options = LunOptions { read_only: true, ..LunOptions::default() };
        let read_only = Lun::open(file.path(), options).unwrap();
        assert_eq!(errno(read_only.write_at(&buf, 4096, LunOffset(0))), libc::EROFS);
        read_only.read_at(&mut buf, 4096, LunOffset(0)).unwrap();
    }

    #[test]
    fn unsuitable_paths_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let read_only = LunOptions { read_only: true, direct: false };
        for (path, errno) in [
            (dir.path(), libc::ENOTBLK),
            (Path::new("/dev/null"), libc::ENOTBLK),
            (&*dir.path().join("missing"), libc::ENOENT),
        ] {
            let error = Lun::open(path, read_only).unwrap_err();
            assert_eq!(error.errno(), errno, "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn a_lun_that_shrank_is_told_apart_from_a_failed_path() {
        let file = lun_file(1 << 20);
        let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
        assert_eq!(lun.check_capacity(), Ok(1 << 20));
        file.as_file().set_len(2 << 20).unwrap();
        assert_eq!(lun.check_capacity(), Ok(2 << 20));
        file.as_file().set_len(1 << 19).unwrap();
        let mut buf = AlignedBuf::new(4096);
        let error = lun.read_at(&mut buf, 4096, LunOffset((1 << 20) - 4096)).unwrap_err();
        assert!(matches!(error, LunError::Shrunk { now_bytes: 524_288, .. }), "{error}");
        assert!(!error.is_path_failure());
    }

    #[test]
    fn faults_hit_every_operation_and_heal() {
        let file = lun_file(1 << 20);
        let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
        let mut buf = AlignedBuf::new(4096);
        lun.set_fault(PathFault::ErrorAfter(1));
        lun.read_at(&mut buf, 4096, LunOffset(0)).unwrap();
        let error = lun.read_at(&mut buf, 4096, LunOffset(4096)).unwrap_err();
        let LunError::PathFailed { op: IoOp::Read, offset: 4096, errno: Errno::IO, .. } = error else {
            panic!("{error}")
        };
        lun.set_fault(PathFault::Fail);
        assert!(lun.write_at(&buf, 4096, LunOffset(0)).unwrap_err().is_path_failure());
        assert!(lun.flush().unwrap_err().is_path_failure());
        assert_eq!(lun.check_fault().unwrap_err().errno(), libc::EIO);
        assert_eq!(lun.fault(), PathFault::Fail);
        lun.set_fault(PathFault::Heal);
        round_trip(&lun);
    }

    #[test]
    fn a_reservation_conflict_is_no_path_failure() {
        let file = lun_file(1 << 20);
        let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
        let error = lun.io_error(IoOp::Write, LunOffset(0), Errno::BADE);
        assert!(error.is_fenced() && !error.is_path_failure());
        assert_eq!(error.errno(), libc::EBADE);
    }
}
