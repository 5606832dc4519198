//! Names: looking up, creating, linking, renaming, removing.
//!
//! What creates must run inside a [`super::CredScope`], or the file belongs to root. The attributes of a new file
//! are read through its name right afterwards; who lets two threads work on one name at once gets what a local
//! caller would get from stat.

use super::attr::decode_dev;
use super::{HiddenFs, Result, component};
use csv_proto::Attr;
use csv_types::FileId;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A name that appears and vanishes under a create more often than this is somebody's attack.
const CREATE_TRIES_MAX: u32 = 16;

impl HiddenFs {
    /// What `name` in `parent` is. `.` and `..` will do; the root's `..` is the root.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ENAMETOOLONG; ENOENT for the hidden directory.
    pub fn lookup(&self, parent: FileId, name: &[u8]) -> Result<Attr> {
        if self.is_hidden(parent, name) {
            return Err(Errno::NOENT);
        }
        self.internal_lookup(parent, name)
    }

    /// As `lookup`, and sees the hidden directory.
    ///
    /// # Errors
    /// See `lookup`.
    pub fn internal_lookup(&self, parent: FileId, name: &[u8]) -> Result<Attr> {
        let name = match name {
            b"." => c".".to_owned(),
            b".." => c"..".to_owned(),
            name => component(name)?,
        };
        self.lookup_at(&self.open_path(parent)?, &name)
    }

    /// Target of a symbolic link.
    ///
    /// # Errors
    /// EINVAL when it is none.
    pub fn readlink(&self, file: FileId) -> Result<Vec<u8>> {
        let fd = self.open_path(file)?;
        match rustix::fs::readlinkat(&fd, c"", Vec::new()) {
            // What the kernel says of an empty path on something else than a symbolic link.
            Err(Errno::NOENT) => Err(Errno::INVAL),
            other => Ok(other?.into_bytes()),
        }
    }

    /// A node of any type but directory and symbolic link; `rdev` in the kernel's 32-bit form.
    ///
    /// # Errors
    /// As mknod; EPERM for the hidden name.
    pub fn mknod(&self, parent: FileId, name: &[u8], mode: u32, rdev: u32) -> Result<Attr> {
        let (dir, name) = self.place(parent, name)?;
        let kind = FileType::from_raw_mode(mode);
        rustix::fs::mknodat(&dir, &name, kind, Mode::from_raw_mode(mode & 0o7777), decode_dev(rdev))?;
        self.lookup_at(&dir, &name)
    }

    /// A directory.
    ///
    /// # Errors
    /// As mkdir; EPERM for the hidden name.
    pub fn mkdir(&self, parent: FileId, name: &[u8], mode: u32) -> Result<Attr> {
        if self.is_hidden(parent, name) {
            return Err(Errno::PERM);
        }
        self.internal_mkdir(parent, name, mode)
    }

    /// As `mkdir`, and may use the hidden name.
    ///
    /// # Errors
    /// As mkdir.
    pub fn internal_mkdir(&self, parent: FileId, name: &[u8], mode: u32) -> Result<Attr> {
        let (dir, name) = (self.open_path(parent)?, component(name)?);
        rustix::fs::mkdirat(&dir, &name, Mode::from_raw_mode(mode & 0o7777))?;
        self.lookup_at(&dir, &name)
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// As symlink; EPERM for the hidden name.
    pub fn symlink(&self, parent: FileId, name: &[u8], target: &[u8]) -> Result<Attr> {
        let (dir, name) = self.place(parent, name)?;
        let target = CString::new(target).map_err(|_| Errno::INVAL)?;
        rustix::fs::symlinkat(&target, &dir, &name)?;
        self.lookup_at(&dir, &name)
    }

    /// A further name for a file (for a symbolic link itself, too).
    ///
    /// # Errors
    /// As link; ENOENT for an orphan: it has no name any more and gets none.
    pub fn link(&self, file: FileId, new_parent: FileId, new_name: &[u8]) -> Result<Attr> {
        if self.is_orphan(file) {
            return Err(Errno::NOENT);
        }
        let (dir, name) = self.place(new_parent, new_name)?;
        let fd = self.open_path(file)?;
        rustix::fs::linkat(&fd, c"", &dir, &name, AtFlags::EMPTY_PATH)?;
        self.attr_of(&fd, file)
    }

    /// Removes a name that is no directory. Of a file that nobody needs any more, `forget` the descriptors.
    ///
    /// # Errors
    /// As unlink; ENOENT for the hidden name.
    pub fn unlink(&self, parent: FileId, name: &[u8]) -> Result<()> {
        self.remove(parent, name, AtFlags::empty())
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// As rmdir; ENOENT for the hidden name.
    pub fn rmdir(&self, parent: FileId, name: &[u8]) -> Result<()> {
        self.remove(parent, name, AtFlags::REMOVEDIR)
    }

    /// Renames. `flags`: 0, `RENAME_NOREPLACE` or `RENAME_EXCHANGE`.
    ///
    /// # Errors
    /// As renameat2; EINVAL for other flags; ENOENT from, EPERM to the hidden name.
    pub fn rename(
        &self,
        parent: FileId,
        name: &[u8],
        new_parent: FileId,
        new_name: &[u8],
        flags: u32,
    ) -> Result<()> {
        let flags = RenameFlags::from_bits_retain(flags);
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        if self.is_hidden(parent, name) {
            return Err(Errno::NOENT);
        }
        let (to, new_name) = self.place(new_parent, new_name)?;
        let (from, name) = (self.open_path(parent)?, component(name)?);
        rustix::fs::renameat_with(&from, &name, &to, &new_name, flags)
    }

    /// A regular file; tells whether it was there before. Of `flags` only `O_EXCL` matters: truncation is the
    /// caller's (layouts must be recalled first). What was there may be of any type.
    ///
    /// # Errors
    /// As open with `O_CREAT`; EPERM for the hidden name.
    pub fn create(&self, parent: FileId, name: &[u8], mode: u32, flags: u32) -> Result<(Attr, bool)> {
        let (dir, name) = self.place(parent, name)?;
        let exclusive = flags & OFlags::EXCL.bits() != 0;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        // Always exclusive: so it is known whether the file is new, and nothing existing is ever opened.
        let open = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for _ in 0..CREATE_TRIES_MAX {
            match rustix::fs::openat(&dir, &name, open, mode) {
                Ok(fd) => {
                    let file = self.id_of(&fd)?;
                    let attr = self.attr_of(&fd, file)?;
                    let evicted = self.fds.lock().insert(file, false, Arc::new(fd));
                    drop(evicted);
                    return Ok((attr, false));
                }
                Err(Errno::EXIST) if !exclusive => match self.lookup_at(&dir, &name) {
                    // Removed in between: create it after all.
                    Err(Errno::NOENT) => {}
                    other => return Ok((other?, true)),
                },
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::BUSY)
    }

    /// Attributes and id of a directory's entry, without following a symbolic link.
    pub(super) fn lookup_at(&self, dir: &OwnedFd, name: &CStr) -> Result<Attr> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
        let file = self.id_of(&fd)?;
        self.attr_of(&fd, file)
    }

    /// Where something new is to be put.
    fn place(&self, parent: FileId, name: &[u8]) -> Result<(OwnedFd, CString)> {
        if self.is_hidden(parent, name) {
            return Err(Errno::PERM);
        }
        Ok((self.open_path(parent)?, component(name)?))
    }

    fn remove(&self, parent: FileId, name: &[u8], flags: AtFlags) -> Result<()> {
        if self.is_hidden(parent, name) {
            return Err(Errno::NOENT);
        }
        let name = component(name)?;
        rustix::fs::unlinkat(self.open_path(parent)?, &name, flags)
    }
}
