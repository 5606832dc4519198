//! The file operations that the directory storage needs, behind a trait so that tests can let them fail.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A flat directory of append-only files.
///
/// Nothing is durable before [`Disk::sync`] (the bytes of a file) or [`Disk::sync_dir`] (creations, renames and
/// removals) returned.
pub trait Disk: Send + 'static {
    /// What to call the place in messages.
    fn place(&self) -> String;
    /// Names of the files.
    ///
    /// # Errors
    /// Of the operating system.
    fn list(&self) -> io::Result<Vec<String>>;
    /// The whole of a file.
    ///
    /// # Errors
    /// Of the operating system; `NotFound`.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Adds bytes at the end of a file, which is created when it is not there.
    ///
    /// # Errors
    /// Of the operating system; some of the bytes may be there.
    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// Makes a file's bytes durable.
    ///
    /// # Errors
    /// Of the operating system; what is durable is not known then.
    fn sync(&mut self, name: &str) -> io::Result<()>;
    /// Cuts a file.
    ///
    /// # Errors
    /// Of the operating system.
    fn truncate(&mut self, name: &str, len: u64) -> io::Result<()>;
    /// Gives a file another name, in place of what had it.
    ///
    /// # Errors
    /// Of the operating system.
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    ///
    /// # Errors
    /// Of the operating system.
    fn remove(&mut self, name: &str) -> io::Result<()>;
    /// Makes creations, renames and removals durable.
    ///
    /// # Errors
    /// Of the operating system.
    fn sync_dir(&mut self) -> io::Result<()>;
}

/// A real directory, locked against a second process for as long as this lives.
#[derive(Debug)]
pub struct LocalDisk {
    path: PathBuf,
    dir: File,
    /// Files being appended to; two at most (log, and a file being written).
    open: Mutex<HashMap<String, File>>,
    _lock: File,
}

/// Name of the lock file; not part of the format.
const LOCK: &str = "LOCK";

impl LocalDisk {
    /// Takes the directory, which is created with mode 0700 when it is not there.
    ///
    /// # Errors
    /// `WouldBlock` when another process has it, else of the operating system.
    pub fn open(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(path.join(LOCK))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        // The directory's own entry must survive a crash too.
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            File::open(parent)?.sync_all()?;
        }
        Ok(LocalDisk { path: path.to_owned(), dir: File::open(path)?, open: Mutex::default(), _lock: lock })
    }

    fn forget(&mut self, name: &str) {
        self.open.get_mut().remove(name);
    }
}

impl Disk for LocalDisk {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != LOCK {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path.join(name))
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let open = self.open.get_mut();
        if !open.contains_key(name) {
            let path = self.path.join(name);
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
            open.insert(name.to_owned(), file);
        }
        match open.get_mut(name) {
            Some(file) => file.write_all(bytes),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        match self.open.get_mut().get(name) {
            Some(file) => file.sync_data(),
            None => OpenOptions::new().append(true).open(self.path.join(name))?.sync_data(),
        }
    }

    fn truncate(&mut self, name: &str, len: u64) -> io::Result<()> {
        self.forget(name);
        OpenOptions::new().write(true).open(self.path.join(name))?.set_len(len)
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        self.forget(from);
        self.forget(to);
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.forget(name);
        fs::remove_file(self.path.join(name))
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        self.dir.sync_all()
    }
}
