//! File data through the page cache and around it.

use super::{HiddenFs, Result};
use csv_types::FileId;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// O_DIRECT offsets, lengths and addresses: the largest logical block that Linux disks have.
pub(super) const DIRECT_ALIGN: usize = 4096;
/// A read never makes a larger buffer than this.
const READ_BYTES_MAX: usize = 64 << 20;
/// A copy around the page cache goes in pieces of this size.
const COPY_BYTES: u32 = 4 << 20;

impl HiddenFs {
    /// Reads through the page cache; short only at the end of the file on disk.
    ///
    /// # Errors
    /// As pread; EINVAL for more than 64 MiB.
    pub fn read(&self, file: FileId, offset: u64, len: u32) -> Result<Vec<u8>> {
        let fd = self.data_fd(file)?;
        let mut buf = vec![0_u8; read_len(len)?];
        let read = pread_full(&fd, &mut buf, offset)?;
        buf.truncate(read);
        Ok(buf)
    }

    /// Writes through the page cache, all of it.
    ///
    /// # Errors
    /// As pwrite; a part may have been written (ENOSPC, EIO).
    pub fn write(&self, file: FileId, offset: u64, data: &[u8]) -> Result<()> {
        let fd = self.data_fd(file)?;
        pwrite_full(&fd, data, offset)
    }

    /// Writes at the end of the file, whole against other appends, and tells where. A noted logical size moves along.
    ///
    /// # Errors
    /// As pwrite.
    pub fn append(&self, file: FileId, data: &[u8]) -> Result<u64> {
        let fd = self.data_fd(file)?;
        let slot = usize::try_from(file.ino % self.append_locks.len() as u64).map_err(|_| Errno::INVAL)?;
        let _one_at_a_time = self.append_locks.get(slot).map(|lock| lock.lock());
        let noted = Self::logical_size_of(&fd)?;
        let offset = match noted {
            Some(size) => size,
            None => u64::try_from(rustix::fs::fstat(&fd)?.st_size).map_err(|_| Errno::IO)?,
        };
        pwrite_full(&fd, data, offset)?;
        if noted.is_some() {
            self.set_logical_size(file, offset + data.len() as u64)?;
        }
        Ok(offset)
    }

    /// Reads around the page cache, any offset and length; short only at the end of the file on disk.
    ///
    /// # Errors
    /// As pread; EINVAL for more than 64 MiB.
    pub fn read_direct(&self, file: FileId, offset: u64, len: u32) -> Result<Vec<u8>> {
        let fd = self.direct_fd(file)?;
        let len = read_len(len)?;
        let align = DIRECT_ALIGN as u64;
        let start = offset - offset % align;
        let skip = usize::try_from(offset - start).map_err(|_| Errno::INVAL)?;
        let span = (skip + len).next_multiple_of(DIRECT_ALIGN);
        let mut bounce = vec![0_u8; span + DIRECT_ALIGN];
        let shift = bounce.as_ptr().align_offset(DIRECT_ALIGN);
        let aligned = bounce.get_mut(shift..shift + span).ok_or(Errno::NOMEM)?;
        let read = pread_direct(&fd, aligned, start)?;
        Ok(aligned.get(skip..read.min(skip + len)).map(<[u8]>::to_vec).unwrap_or_default())
    }

    /// All modes that the file system has.
    ///
    /// # Errors
    /// As fallocate.
    pub fn fallocate(&self, file: FileId, mode: u32, offset: u64, len: u64) -> Result<()> {
        let fd = self.data_fd(file)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        loop {
            match rustix::fs::fallocate(&fd, mode, offset, len) {
                Err(Errno::INTR) => {}
                other => return other.map_err(read_only_fd),
            }
        }
    }

    /// Next hole or data at or behind `offset`; `whence` is `SEEK_DATA` (3) or `SEEK_HOLE` (4).
    ///
    /// # Errors
    /// ENXIO behind the end or when no data follows; EINVAL for another `whence`.
    pub fn seek(&self, file: FileId, offset: u64, whence: u32) -> Result<u64> {
        let fd = self.data_fd(file)?;
        // The position that this moves belongs to the cached descriptor and is used by nobody.
        match whence {
            3 => rustix::fs::seek(&fd, SeekFrom::Data(offset)),
            4 => rustix::fs::seek(&fd, SeekFrom::Hole(offset)),
            _ => Err(Errno::INVAL),
        }
    }

    /// Copies inside the file system and tells how much: less than asked only at the end of the source.
    ///
    /// # Errors
    /// As copy_file_range, when nothing was copied.
    pub fn copy_range(
        &self,
        src: FileId,
        src_offset: u64,
        dst: FileId,
        dst_offset: u64,
        len: u64,
    ) -> Result<u64> {
        let (from, to) = (self.data_fd(src)?, self.data_fd(dst)?);
        let (mut at, mut to_at, mut done) = (src_offset, dst_offset, 0);
        while done < len {
            let chunk = usize::try_from(len - done).unwrap_or(usize::MAX);
            match rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut to_at), chunk) {
                Ok(0) => break,
                Ok(copied) => done += copied as u64,
                Err(Errno::INTR) => {}
                Err(errno) if done == 0 => return Err(read_only_fd(errno)),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// As `copy_range`, but reads the source around the page cache. Holes of the source are written as zeros.
    ///
    /// # Errors
    /// As pread and pwrite, when nothing was copied; EINVAL when the ranges overlap.
    pub fn copy_direct(
        &self,
        src: FileId,
        src_offset: u64,
        dst: FileId,
        dst_offset: u64,
        len: u64,
    ) -> Result<u64> {
        if src == dst && src_offset.abs_diff(dst_offset) < len {
            return Err(Errno::INVAL);
        }
        let mut done = 0;
        while done < len {
            let piece = u32::try_from(len - done).map_or(COPY_BYTES, |left| left.min(COPY_BYTES));
            let copied = self
                .read_direct(src, src_offset + done, piece)
                .and_then(|data| self.write(dst, dst_offset + done, &data).map(|()| data.len() as u64));
            match copied {
                Ok(0) => break,
                Ok(copied) => done += copied,
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        Ok(done)
    }
}

fn read_len(len: u32) -> Result<usize> {
    usize::try_from(len).ok().filter(|len| *len <= READ_BYTES_MAX).ok_or(Errno::INVAL)
}

/// A descriptor that could only be opened for reading is so because of the immutable or append-only flag (or a
/// read-only mount); EBADF would tell the caller nothing.
pub(super) fn read_only_fd(errno: Errno) -> Errno {
    match errno {
        Errno::BADF => Errno::PERM,
        other => other,
    }
}

fn pread_full(fd: &OwnedFd, buf: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pread(fd, &mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// Stops at the first odd length: only the end of the file gives one, and going on from there is not aligned.
fn pread_direct(fd: &OwnedFd, buf: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while done < buf.len() && done.is_multiple_of(DIRECT_ALIGN) {
        match rustix::io::pread(fd, &mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

fn pwrite_full(fd: &OwnedFd, data: &[u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < data.len() {
        match rustix::io::pwrite(fd, &data[done..], offset + done as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => done += written,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(read_only_fd(errno)),
        }
    }
    Ok(())
}
