//! The coordinator's own file system: ext4 or XFS on the LUN, mounted **detached** (the mount is in no namespace
//! and the kernel drops it when the last descriptor on it is closed), every file reached by its [`FileId`].
//!
//! Everything here blocks and is thread-safe. It has root's power over the files: permission checks were made by
//! the kernel in front of the FUSE session. Ownership of what is created is the caller's, atomically, through
//! [`CredScope`].
//!
//! Invariants:
//! * No symbolic link is ever followed, no FIFO or device ever opened except with `O_PATH`.
//! * `/.csvfs` is invisible to the ordinary operations: lookup and removal say ENOENT, creation says EPERM,
//!   readdir skips it. Only the `internal_*` variants see it.
//! * Extended attributes `trusted.csv.*` are ours: hidden, and refused with EPERM.
//! * After the first EIO of a flush every later flush says EIO ([`HiddenFs::fsync`]): the kernel reports a lost
//!   page once and then forgets it.
//!
//! Failure: every function returns the errno that the same operation would give locally. A file that is gone gives
//! ESTALE. What must exclude each other (truncate against layouts, two renames of one name) is the caller's
//! business; one call here is as atomic as the system call below it.

mod attr;
mod cred;
mod data;
mod dir;
mod fdcache;
mod flush;
mod mount;
mod names;
mod orphans;
mod size;
mod space;
#[cfg(test)]
mod tests;
mod xattr;

pub use cred::{CredScope, prepare_thread};
pub use mount::{FsKind, MountError};
pub use space::MapError;

use csv_lun::sys;
use csv_types::FileId;
use fdcache::FdCache;
use orphans::OrphanSet;
use parking_lot::Mutex;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Result of every operation on the hidden file system.
pub type Result<T> = std::result::Result<T, Errno>;

/// Name of the directory in the root that only csvfs sees.
pub const INTERNAL_NAME: &[u8] = b".csvfs";

/// Open descriptors kept for data operations; never more than half of what the process may have.
const FD_CACHE_MAX: usize = 1024;
/// Appends to one file exclude each other; files share this many locks.
const APPEND_LOCKS: usize = 64;

/// A mounted file system. Dropping it unmounts once no other thread is inside an operation.
#[derive(Debug)]
pub struct HiddenFs {
    /// The root directory, opened for reading: the anchor of `open_by_handle_at` and of syncfs, statfs, shutdown.
    root_dir: OwnedFd,
    kind: FsKind,
    handle_type: i32,
    root: FileId,
    csvfs_dir: FileId,
    orphans_dir: FileId,
    block_bytes: u32,
    read_only: bool,
    fds: Mutex<FdCache>,
    orphans: Mutex<OrphanSet>,
    append_locks: Vec<Mutex<()>>,
    /// FALLOC_FL_WRITE_ZEROES was refused once: this kernel, file system or device cannot.
    no_write_zeroes: AtomicBool,
    /// Noted sizes removed so far, see `size.rs`.
    settled: AtomicU64,
    /// A flush failed with EIO.
    flush_failed: AtomicBool,
}

impl HiddenFs {
    /// Id of the root directory.
    #[must_use]
    pub fn root(&self) -> FileId {
        self.root
    }

    /// Block size of the file system, in bytes.
    #[must_use]
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// Which file system it is.
    #[must_use]
    pub fn kind(&self) -> FsKind {
        self.kind
    }

    /// `/.csvfs`. On a read-only mount that lacks it: an id that is always stale.
    #[must_use]
    pub fn csvfs_dir(&self) -> FileId {
        self.csvfs_dir
    }

    /// `/.csvfs/orphans`; see [`HiddenFs::csvfs_dir`].
    #[must_use]
    pub fn orphans_dir(&self) -> FileId {
        self.orphans_dir
    }

    /// Drops the cached descriptors of a file. To be called when its last name is gone and nobody has it open:
    /// until then the kernel keeps the blocks.
    pub fn forget(&self, file: FileId) {
        self.fds.lock().remove(file);
    }

    /// Anything, as a path: no permission needed, no side effect, symbolic links themselves.
    /// Path of the mount's root for a program that acts on the whole file system.
    #[cfg(test)]
    pub(crate) fn root_path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&self.root_dir))
    }

    fn open_path(&self, file: FileId) -> Result<OwnedFd> {
        self.open_handle(file, OFlags::PATH | OFlags::NOFOLLOW)
    }

    fn open_handle(&self, file: FileId, flags: OFlags) -> Result<OwnedFd> {
        let (bytes, len) = encode_handle(self.handle_type, file)?;
        let bytes = bytes.get(..len).ok_or(Errno::STALE)?;
        match sys::open_by_handle(&self.root_dir, self.handle_type, bytes, flags).map_err(errno) {
            // An inode number outside the file system; no other argument of ours can be invalid.
            Err(Errno::INVAL) => Err(Errno::STALE),
            other => other,
        }
    }

    /// A regular file's descriptor from the cache, read-write (read-only on read-only mounts and for files with
    /// the immutable or append-only flag). EISDIR for directories, EINVAL for whatever else is not regular.
    fn data_fd(&self, file: FileId) -> Result<Arc<OwnedFd>> {
        self.cached_fd(file, false)
    }

    /// As `data_fd`, with `O_DIRECT`.
    fn direct_fd(&self, file: FileId) -> Result<Arc<OwnedFd>> {
        self.cached_fd(file, true)
    }

    fn cached_fd(&self, file: FileId, direct: bool) -> Result<Arc<OwnedFd>> {
        if let Some(fd) = self.fds.lock().get(file, direct) {
            return Ok(fd);
        }
        // Look before opening: opening a FIFO or a device has effects.
        require_regular(&self.open_path(file)?)?;
        let base = if direct { OFlags::DIRECT } else { OFlags::empty() };
        let fd = if self.read_only {
            self.open_handle(file, base | OFlags::RDONLY)?
        } else {
            match self.open_handle(file, base | OFlags::RDWR) {
                Err(Errno::PERM | Errno::ROFS | Errno::TXTBSY) => {
                    self.open_handle(file, base | OFlags::RDONLY)?
                }
                other => other?,
            }
        };
        let fd = Arc::new(fd);
        // The evicted descriptor is closed after the lock is free: a last close can take long.
        let evicted = self.fds.lock().insert(file, direct, Arc::clone(&fd));
        drop(evicted);
        Ok(fd)
    }

    /// The id of what a descriptor (`O_PATH` too) is open on.
    fn id_of(&self, fd: impl AsFd) -> Result<FileId> {
        let (kind, bytes) = sys::name_to_handle(fd, c"").map_err(errno)?;
        decode_handle(kind, &bytes)
    }

    fn is_hidden(&self, parent: FileId, name: &[u8]) -> bool {
        parent == self.root && name == INTERNAL_NAME
    }
}

/// EISDIR for directories, EINVAL for everything else that is not a regular file: as read, write and
/// ftruncate say.
fn require_regular(fd: impl AsFd) -> Result<()> {
    let stat = rustix::fs::fstat(fd)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Errno::ISDIR),
        FileType::Symlink
        | FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => Err(Errno::INVAL),
    }
}

/// The path through which calls that take no `O_PATH` descriptor reach its file, symbolic links included: the jump
/// of a magic link ends there and follows nothing further.
fn proc_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// A single path component for a system call.
fn component(name: &[u8]) -> Result<CString> {
    match csv_proto::component(name) {
        Ok(name) => CString::new(name).map_err(|_| Errno::INVAL),
        Err(_) => Err(Errno::INVAL),
    }
}

// By value so that it fits `map_err`.
#[expect(clippy::needless_pass_by_value, reason = "used as map_err(errno)")]
fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// Does this say that the LUN failed, or refused this node (EBADE, a reservation conflict)? Most of it reaches callers as EIO; a
/// flush passes on what the device said.
pub(crate) fn is_device_error(errno: Errno) -> bool {
    matches!(errno, Errno::IO | Errno::BADE | Errno::NOLINK | Errno::REMOTEIO | Errno::TIMEDOUT)
}

/// `FILEID_INO32_GEN`: ext4, and XFS mounted with small inode numbers.
const HANDLE_INO32: i32 = 0x01;
/// `FILEID_INO32_GEN | XFS_FILEID_TYPE_64FLAG`.
const HANDLE_XFS_INO64: i32 = 0x81;

fn encode_handle(kind: i32, file: FileId) -> Result<([u8; 12], usize)> {
    let mut bytes = [0_u8; 12];
    if kind == HANDLE_INO32 {
        let ino = u32::try_from(file.ino).map_err(|_| Errno::STALE)?;
        bytes[..4].copy_from_slice(&ino.to_ne_bytes());
        bytes[4..8].copy_from_slice(&file.generation.to_ne_bytes());
        Ok((bytes, 8))
    } else {
        bytes[..8].copy_from_slice(&file.ino.to_ne_bytes());
        bytes[8..].copy_from_slice(&file.generation.to_ne_bytes());
        Ok((bytes, 12))
    }
}

fn decode_handle(kind: i32, bytes: &[u8]) -> Result<FileId> {
    let word = |at: usize| -> Result<u32> {
        let bytes = bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).ok_or(Errno::OPNOTSUPP)?;
        Ok(u32::from_ne_bytes(bytes))
    };
    match kind {
        HANDLE_INO32 => Ok(FileId { ino: word(0)?.into(), generation: word(4)? }),
        HANDLE_XFS_INO64 => {
            let ino = bytes.get(..8).and_then(|b| b.try_into().ok()).ok_or(Errno::OPNOTSUPP)?;
            Ok(FileId { ino: u64::from_ne_bytes(ino), generation: word(8)? })
        }
        _ => Err(Errno::OPNOTSUPP),
    }
}
