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
use crate::reservation::emu::view::View;
use crate::sys;
use csv_types::LunOffset;
use csv_types::admin::PathFault;
use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
    /// The reservation emulation, where the LUN has one.
    emulation: Option<View>,
    /// This node's reservation key; 0 for none.
    reservation_key: AtomicU64,
}

impl Lun {
    /// Opens a block device or a regular file.
    ///
    /// # Errors
    /// `PathFailed` with the errno of the open, `ReadOnly`, `Unsuitable`, or `Fenced` when this is the lab's file LUN and
    /// the node has to register first.
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
        let emulation = View::of(&path);
        if geometry.capacity_bytes == 0 && emulation.as_ref().is_some_and(|view| view.is_fenced(None)) {
            return Err(LunError::Fenced { op: IoOp::Open, path });
        }
        let faults = FaultState::new();
        let reservation_key = AtomicU64::new(0);
        Ok(Lun { fd, path, options, geometry, faults, emulation, reservation_key })
    }

    /// Tells the LUN which reservation key this node has registered, `None` (or 0) when none. Only the lab's file LUN
    /// needs it, to tell a conflict from a failed path; real storage says so itself.
    pub fn set_reservation_key(&self, key: Option<u64>) {
        self.reservation_key.store(key.unwrap_or(0), Ordering::Relaxed);
    }

    fn reservation_key(&self) -> Option<u64> {
        Some(self.reservation_key.load(Ordering::Relaxed)).filter(|key| *key != 0)
    }

    /// Does this error say that a reservation of others keeps this node out, as opposed to a failed path? Then all I/O has to
    /// stop; no other path may be tried.
    #[must_use]
    pub fn is_conflict(error: &LunError) -> bool {
        error.is_fenced()
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
    /// `Shrunk` when it is smaller than at open, whoever holds the volume must stop using it; `Fenced`.
    pub fn check_capacity(&self) -> Result<u64, LunError> {
        let now = read_geometry(self.fd.as_fd()).map_err(|error| geometry_error(&self.path, error))?;
        if now.capacity_bytes < self.geometry.capacity_bytes {
            if self.is_fenced_by_emulation() {
                return Err(LunError::Fenced { op: IoOp::Check, path: Arc::clone(&self.path) });
            }
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
    /// `Misaligned`, `OutOfBounds` or `ReadOnly`; `Fenced` for a write to a plain file (block devices see to that
    /// themselves).
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
        if op == IoOp::Write
            && self.emulation.as_ref().is_some_and(|view| !view.may_write(self.reservation_key()))
        {
            return Err(LunError::Fenced { op, path: Arc::clone(&self.path) });
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
        if self.geometry.is_block_device {
            // What a file system on this device could not write, because the node was fenced, is no failure of ours: our writes do
            // not go through the page cache, and the file system knows. It would hide whether the flush itself succeeded.
            let _not_ours = sys::take_write_back_error(&self.fd);
        }
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

    fn is_fenced_by_emulation(&self) -> bool {
        self.emulation.as_ref().is_some_and(|view| view.is_fenced(self.reservation_key()))
    }

    /// The error for an errno that the device gave: `EBADE` is a reservation conflict. The lab's file LUN can only fail
    /// an I/O as a broken path would; there the registry tells which of both it was.
    #[must_use]
    pub fn io_error(&self, op: IoOp, at: LunOffset, errno: Errno) -> LunError {
        if matches!(errno, Errno::IO | Errno::PERM | Errno::NOSPC | Errno::FBIG)
            && self.is_fenced_by_emulation()
        {
            return LunError::Fenced { op, path: Arc::clone(&self.path) };
        }
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
mod tests;
