//! The end-of-file journal. While space behind the end of a file is lent, the size on disk runs ahead; the size that
//! counts is kept in the attribute `trusted.csv.size` (8 bytes, little endian) of the file itself.
//!
//! Order on disk: the file systems commit metadata changes in the order in which they were made, so the attribute
//! reaches the disk no later than the size that runs ahead, and at settling the cut no later than the removal. A crash
//! in between leaves the attribute, and the next coordinator settles again: cutting twice to one size is
//! harmless.

use super::attr::keep_mtime;
use super::{HiddenFs, Result, errno, proc_path};
use csv_lun::sys;
use csv_types::FileId;
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

const NAME: &str = "trusted.csv.size";

impl HiddenFs {
    /// Notes the size that counts, before the size on disk runs ahead of it. Not durable by itself: what makes
    /// the larger size durable ([`HiddenFs::make_written`], [`HiddenFs::fsync`]) makes this durable too.
    ///
    /// # Errors
    /// ENOSPC and whatever setxattr says.
    pub fn set_logical_size(&self, file: FileId, size: u64) -> Result<()> {
        let fd = self.data_fd(file)?;
        rustix::fs::fsetxattr(&fd, NAME, &size.to_le_bytes(), XattrFlags::empty())
    }

    /// The noted size, if the size on disk may run ahead.
    ///
    /// # Errors
    /// ESTALE; EIO when the attribute has a wrong length.
    pub fn logical_size(&self, file: FileId) -> Result<Option<u64>> {
        Self::logical_size_of(&self.open_path(file)?)
    }

    /// Is the size on disk a whole number of blocks? A noted size does not count here.
    ///
    /// # Errors
    /// ESTALE.
    pub fn size_is_whole(&self, file: FileId) -> Result<bool> {
        let size = rustix::fs::fstat(self.data_fd(file)?)?.st_size;
        Ok(size.cast_unsigned().is_multiple_of(self.align()))
    }

    /// Forgets the noted size: the size on disk counts again.
    ///
    /// # Errors
    /// As removexattr; none when nothing was noted.
    pub fn clear_logical_size(&self, file: FileId) -> Result<()> {
        let fd = self.data_fd(file)?;
        self.forget_noted(&fd)
    }

    /// Cuts the file to `size` and forgets the noted size. The modification time stays: the data was written when
    /// its writer says, not now.
    ///
    /// # Errors
    /// As ftruncate and setxattr; the noted size is kept then.
    pub fn settle_size(&self, file: FileId, size: u64) -> Result<()> {
        let fd = self.data_fd(file)?;
        self.no_stale_tail(file, &fd, size)?;
        let mtime = keep_mtime(&fd)?;
        // A crash between cut and removal must settle at the new size, not at an older one.
        if Self::logical_size_of(&fd)?.is_some_and(|noted| noted != size) {
            rustix::fs::fsetxattr(&fd, NAME, &size.to_le_bytes(), XattrFlags::empty())?;
        }
        rustix::fs::ftruncate(&fd, size)?;
        rustix::fs::futimens(&fd, &mtime)?;
        self.forget_noted(&fd)
    }

    /// Cuts or extends a file, as ftruncate. A noted size ends with it.
    ///
    /// # Errors
    /// As ftruncate: EISDIR, EINVAL, EFBIG, EPERM.
    pub fn truncate(&self, file: FileId, size: u64) -> Result<()> {
        let fd = self.data_fd(file)?;
        let noted = Self::logical_size_of(&fd)?.is_some();
        if noted {
            self.no_stale_tail(file, &fd, size)?;
            rustix::fs::fsetxattr(&fd, NAME, &size.to_le_bytes(), XattrFlags::empty())?;
        }
        rustix::fs::ftruncate(&fd, size).map_err(super::data::read_only_fd)?;
        if noted { self.forget_noted(&fd) } else { Ok(()) }
    }

    /// Removes the noted size; the size on disk is right by now. Counted first, for [`HiddenFs::attr_of`]: who saw a
    /// size that ran ahead and then finds nothing noted sees that the count has moved.
    fn forget_noted(&self, fd: &OwnedFd) -> Result<()> {
        self.settled.fetch_add(1, Ordering::SeqCst);
        match rustix::fs::fremovexattr(fd, NAME) {
            Err(Errno::NODATA) => Ok(()),
            other => other,
        }
    }

    /// A cut inside a block zeroes the rest of it through the page cache. A page from before the space was lent would
    /// put old data back there, so none may be left.
    fn no_stale_tail(&self, file: FileId, fd: &OwnedFd, size: u64) -> Result<()> {
        let block = u64::from(self.block_bytes);
        if size.is_multiple_of(block) {
            return Ok(());
        }
        let tail = sys::cachestat(fd, size - size % block, block).map_err(errno)?;
        if tail.cached_pages == 0 { Ok(()) } else { self.drop_cache(file) }
    }

    /// As `logical_size`, of an open file (`O_PATH` too).
    pub(super) fn logical_size_of(fd: &OwnedFd) -> Result<Option<u64>> {
        let mut value = [0_u8; 8];
        match rustix::fs::getxattr(proc_path(fd), NAME, &mut value[..]) {
            Ok(8) => Ok(Some(u64::from_le_bytes(value))),
            // A value of another length is no size of ours; guessing would cut somebody's data.
            Ok(_) | Err(Errno::RANGE) => Err(Errno::IO),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}
