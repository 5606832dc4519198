//! Reading directories. Stateless: a cookie is the file system's own position (`d_off`), which stays good while
//! entries come and go and over remounts, so every page opens the directory anew and seeks.

use super::{HiddenFs, INTERNAL_NAME, Result};
use csv_proto::{DirEntry, DirPage};
use csv_types::FileId;
use rustix::fs::{Mode, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// Bytes of a page beyond which nobody gets: a message has room for this.
const PAGE_BYTES_MAX: u32 = 1 << 20;
/// What an entry costs besides its name, encoded, and with attributes.
const ENTRY_BYTES: usize = 32;
const ATTR_BYTES: usize = 128;
/// The kernel copies this many bytes of entries at once; far more than one longest name.
const GETDENTS_BYTES: usize = 32 << 10;

impl HiddenFs {
    /// Entries of a directory behind `cookie` (0: from the start), `.` and `..` among them, up to about `max_bytes`
    /// of the encoded page but at least one. With `plus` each has its attributes, `.` and `..` excepted; an entry
    /// that vanishes meanwhile is left out. The hidden directory is left out.
    ///
    /// # Errors
    /// ENOTDIR, ESTALE, EINVAL for a cookie that no page gave.
    pub fn readdir(&self, dir: FileId, cookie: u64, max_bytes: u32, plus: bool) -> Result<DirPage> {
        self.read_page(dir, cookie, max_bytes, plus, dir == self.root)
    }

    /// As `readdir`, and shows the hidden directory.
    ///
    /// # Errors
    /// See `readdir`.
    pub fn internal_readdir(&self, dir: FileId, cookie: u64, max_bytes: u32, plus: bool) -> Result<DirPage> {
        self.read_page(dir, cookie, max_bytes, plus, false)
    }

    fn read_page(&self, dir: FileId, cookie: u64, max_bytes: u32, plus: bool, hide: bool) -> Result<DirPage> {
        // By path first: opening a FIFO or a device by its id would have effects.
        let path = self.open_path(dir)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&path, c".", flags, Mode::empty())?;
        if cookie != 0 {
            rustix::fs::seek(&fd, SeekFrom::Start(cookie))?;
        }
        let mut room = usize::try_from(max_bytes.min(PAGE_BYTES_MAX)).map_err(|_| Errno::INVAL)?;
        let mut page = DirPage { entries: Vec::new(), end: false };
        let mut buf = Vec::with_capacity(GETDENTS_BYTES);
        let mut raw = RawDir::new(&fd, buf.spare_capacity_mut());
        loop {
            let Some(entry) = raw.next() else {
                page.end = true;
                return Ok(page);
            };
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if hide && name == INTERNAL_NAME {
                continue;
            }
            let cost = name.len() + ENTRY_BYTES + if plus { ATTR_BYTES } else { 0 };
            if cost > room && !page.entries.is_empty() {
                return Ok(page);
            }
            let mut found = DirEntry {
                name: name.to_vec().into(),
                ino: entry.ino(),
                kind: entry.file_type().as_raw_mode() >> 12,
                cookie: entry.next_entry_cookie(),
                attr: None,
            };
            if self.complete(&fd, &mut found, plus)? {
                room = room.saturating_sub(cost);
                page.entries.push(found);
            }
        }
    }

    /// Adds attributes, and the type where the directory does not have it. False when the entry is gone.
    fn complete(&self, dir: &OwnedFd, entry: &mut DirEntry, plus: bool) -> Result<bool> {
        let dots = matches!(entry.name.as_ref(), b"." | b"..");
        if dots || (!plus && entry.kind != 0) {
            return Ok(true);
        }
        let name = super::component(&entry.name)?;
        match self.lookup_at(dir, &name) {
            Ok(attr) => {
                entry.kind = attr.mode >> 12;
                entry.attr = plus.then_some(attr);
                Ok(true)
            }
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno),
        }
    }
}
