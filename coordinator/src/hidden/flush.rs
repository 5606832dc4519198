//! Making things durable, and proving that the page cache holds nothing of a file.
//!
//! A failure of the LUN at any flush is latched, as EIO: the kernel marks the pages clean after it and would call the next flush a
//! success (safety rule 7). The coordinator then can only hand over.

use super::{HiddenFs, Result, errno, is_device_error};
use csv_lun::sys;
use csv_types::FileId;
use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::Errno;
use std::sync::atomic::Ordering;

/// Somebody (readahead of a read that has just ended, writeback) may hold a page for a moment; this often it is
/// tried to be rid of it.
const DROP_TRIES_MAX: u32 = 10;

impl HiddenFs {
    /// Makes a regular file durable; with `datasync` only what is needed to read it back.
    ///
    /// # Errors
    /// As fsync; EIO for ever after the first.
    pub fn fsync(&self, file: FileId, datasync: bool) -> Result<()> {
        let fd = self.data_fd(file)?;
        self.latch(if datasync { rustix::fs::fdatasync(&fd) } else { rustix::fs::fsync(&fd) })
    }

    /// Makes a directory's names durable.
    ///
    /// # Errors
    /// See `fsync`; ENOTDIR.
    pub fn fsync_dir(&self, dir: FileId) -> Result<()> {
        let path = self.open_path(dir)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&path, c".", flags, Mode::empty())?;
        self.latch(rustix::fs::fsync(&fd))
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// See `fsync`.
    pub fn syncfs(&self) -> Result<()> {
        self.latch(rustix::fs::syncfs(&self.root_dir))
    }

    /// Writes a file's pages back and drops them, with the kernel's word that none is left: from then on what
    /// others write to its blocks cannot be hidden by an old page.
    ///
    /// # Errors
    /// EBUSY when pages stay (somebody reads or maps the file here); else as fsync.
    pub fn drop_cache(&self, file: FileId) -> Result<()> {
        let fd = self.data_fd(file)?;
        for attempt in 0..DROP_TRIES_MAX {
            self.latch(rustix::fs::fdatasync(&fd))?;
            rustix::fs::fadvise(&fd, 0, None, Advice::DontNeed)?;
            let left = sys::cachestat(&fd, 0, 0).map_err(errno)?;
            if left.cached_pages == 0 {
                return Ok(());
            }
            tracing::debug!(%file, attempt, ?left, "pages stay in the cache");
            std::thread::yield_now();
        }
        Err(Errno::BUSY)
    }

    /// As after a flush that failed.
    #[cfg(test)]
    pub(crate) fn fail_flushes(&self) {
        self.flush_failed.store(true, Ordering::SeqCst);
    }

    /// Passes a flush's result on, and keeps a failure for ever.
    pub(super) fn latch(&self, result: Result<()>) -> Result<()> {
        if let Err(error) = result
            && is_device_error(error)
            && !self.flush_failed.swap(true, Ordering::SeqCst)
        {
            tracing::error!(%error, "a flush of the volume's file system failed; every flush fails from now on");
        }
        if self.flush_failed.load(Ordering::SeqCst) { Err(Errno::IO) } else { result }
    }
}
