//! Mounting the volume's file system detached, and shutting it down.
//!
//! The superblock must be ours alone: `FSCONFIG_CMD_CREATE_EXCL` refuses one that another mount of this node uses,
//! ext4's mmp one that another node uses (the mount waits 11 s and more after an unclean end). The mount is never
//! attached, so nothing else can reach it; it ends with the last descriptor, hence with the process.

use super::{APPEND_LOCKS, FD_CACHE_MAX, FdCache, HiddenFs, INTERNAL_NAME, OrphanSet, decode_handle, errno};
use csv_lun::sys;
use csv_types::{FS_BLOCK_BYTES, FileId};
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create_exclusive, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};

pub use crate::FsKind;

impl FsKind {
    /// Name as the kernel knows it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            FsKind::Ext4 => "ext4",
            FsKind::Xfs => "xfs",
        }
    }
}

impl fmt::Display for FsKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why the file system could not be mounted. `log` holds what the kernel said, in its words; it may be empty.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel lacks the file system.
    #[error("the kernel does not know {kind}: load or build its module")]
    NoSuchFs {
        /// What was asked for.
        kind: FsKind,
    },
    /// Not a block device.
    #[error("{device} is not a block device: give the LUN's device node, or a loop device for a file")]
    NotBlockDevice {
        /// The path.
        device: PathBuf,
    },
    /// No access to the device at all.
    #[error("cannot open {device}: {errno}")]
    Device {
        /// The path.
        device: PathBuf,
        /// Of the open.
        errno: Errno,
    },
    /// Mounted or claimed on this node.
    #[error(
        "{device} is in use on this node: unmount it, or stop what holds it (a file system, multipath or LVM) {log}"
    )]
    InUseHere {
        /// The path.
        device: PathBuf,
        /// Kernel's words.
        log: String,
    },
    /// Multiple-mount protection saw another node.
    #[error(
        "{device} is mounted on another node (ext4 mmp): make sure that the former coordinator is down or fenced, then try again {log}"
    )]
    InUseElsewhere {
        /// The path.
        device: PathBuf,
        /// Kernel's words.
        log: String,
    },
    /// The journal holds changes and the mount may not write.
    #[error(
        "{device}: the journal needs recovery, which a read-only mount may not do: mount it read-write once {log}"
    )]
    NeedsRecovery {
        /// The path.
        device: PathBuf,
        /// Kernel's words.
        log: String,
    },
    /// No such file system there, or one with options that this cannot serve.
    #[error(
        "{device} holds no {kind} file system that this kernel can mount: read the kernel log, check the LUN, or format it {log}"
    )]
    NotFormatted {
        /// The path.
        device: PathBuf,
        /// What was asked for.
        kind: FsKind,
        /// Kernel's words.
        log: String,
    },
    /// The file system is damaged.
    #[error(
        "{device}: the {kind} file system is damaged: run fsck or xfs_repair while no node has it mounted {log}"
    )]
    Damaged {
        /// The path.
        device: PathBuf,
        /// What was asked for.
        kind: FsKind,
        /// Kernel's words.
        log: String,
    },
    /// Made by other means than `csvctl volume create`.
    #[error(
        "{device} has a file system with blocks of {block_bytes} bytes, and a volume has {FS_BLOCK_BYTES}: make it with csvctl volume create"
    )]
    BlockSize {
        /// The path.
        device: PathBuf,
        /// What it has.
        block_bytes: u64,
    },
    /// Mounted, but not usable for us.
    #[error("{device}: {step} failed with {errno}")]
    Setup {
        /// The path.
        device: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Of that step.
        errno: Errno,
    },
    /// Anything else.
    #[error("cannot mount {device} as {kind}: {errno} {log}")]
    Other {
        /// The path.
        device: PathBuf,
        /// What was asked for.
        kind: FsKind,
        /// Of the mount.
        errno: Errno,
        /// Kernel's words.
        log: String,
    },
}

impl HiddenFs {
    /// Mounts the file system of `device`. With `read_only` ext4 writes nothing to the LUN; XFS recovers a
    /// dirty log and stamps its superblock all the same, unless the device itself cannot be written.
    ///
    /// # Errors
    /// See [`MountError`]. Nothing stays mounted.
    pub fn mount(device: &Path, kind: FsKind, read_only: bool) -> std::result::Result<HiddenFs, MountError> {
        check_device(device, kind, read_only)?;
        let mount = create_mount(device, kind, read_only)?;
        let setup = |step: &'static str| {
            let device = device.to_owned();
            move |errno| MountError::Setup { device, step, errno }
        };
        // fsmount gives an O_PATH descriptor, which open_by_handle_at does not take.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root_dir =
            rustix::fs::openat(&mount, c".", flags, Mode::empty()).map_err(setup("opening the root"))?;
        let (handle_type, bytes) =
            sys::name_to_handle(&root_dir, c"").map_err(errno).map_err(setup("reading the root's handle"))?;
        let root = decode_handle(handle_type, &bytes).map_err(setup("understanding the root's handle"))?;
        let statvfs = rustix::fs::fstatvfs(&root_dir).map_err(setup("statfs"))?;
        if statvfs.f_bsize != FS_BLOCK_BYTES {
            return Err(MountError::BlockSize { device: device.to_owned(), block_bytes: statvfs.f_bsize });
        }
        let block_bytes =
            u32::try_from(statvfs.f_bsize).map_err(|_| Errno::INVAL).map_err(setup("statfs"))?;
        let mut fs = HiddenFs {
            root_dir,
            kind,
            handle_type,
            root,
            csvfs_dir: FileId::default(),
            orphans_dir: FileId::default(),
            block_bytes,
            read_only,
            fds: Mutex::new(FdCache::new(fd_cache_max())),
            orphans: Mutex::new(OrphanSet::default()),
            append_locks: (0..APPEND_LOCKS).map(|_| Mutex::new(())).collect(),
            no_write_zeroes: AtomicBool::new(false),
            settled: AtomicU64::new(0),
            flush_failed: AtomicBool::new(false),
        };
        match fs.internal_subdir(root, INTERNAL_NAME) {
            Ok(dir) => fs.csvfs_dir = dir,
            Err(Errno::ROFS | Errno::NOENT) if read_only => return Ok(fs),
            Err(errno) => return Err(setup("creating /.csvfs")(errno)),
        }
        match fs.internal_subdir(fs.csvfs_dir, b"orphans") {
            Ok(dir) => fs.orphans_dir = dir,
            Err(Errno::ROFS | Errno::NOENT) if read_only => return Ok(fs),
            Err(errno) => return Err(setup("creating /.csvfs/orphans")(errno)),
        }
        fs.load_orphans().map_err(setup("reading /.csvfs/orphans"))?;
        Ok(fs)
    }

    /// As a power cut: nothing that is dirty reaches the LUN any more, every later operation fails with EIO.
    ///
    /// # Errors
    /// The errno of the shutdown call.
    pub fn crash(&self) -> super::Result<()> {
        sys::fs_shutdown(&self.root_dir, sys::SHUTDOWN_NOLOGFLUSH).map_err(errno)?;
        self.fds.lock().clear();
        Ok(())
    }

    /// A directory of ours, made with mode 0700 when it is not there.
    fn internal_subdir(&self, parent: FileId, name: &[u8]) -> super::Result<FileId> {
        match self.internal_mkdir(parent, name, 0o700) {
            Ok(attr) => attr.file.map(csv_file_id).ok_or(Errno::IO),
            Err(Errno::EXIST | Errno::ROFS) => {
                self.internal_lookup(parent, name)?.file.map(csv_file_id).ok_or(Errno::IO)
            }
            Err(errno) => Err(errno),
        }
    }
}

fn csv_file_id(file: csv_proto::FileId) -> FileId {
    FileId { ino: file.ino, generation: file.generation }
}

/// The sessions, the LUN and the requests in flight need descriptors as well.
fn fd_cache_max() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let half = limit.map_or(usize::MAX, |limit| usize::try_from(limit / 2).unwrap_or(usize::MAX));
    half.min(FD_CACHE_MAX)
}

/// What can be told before the kernel is asked, which would only say EBUSY or EINVAL.
fn check_device(device: &Path, kind: FsKind, read_only: bool) -> std::result::Result<(), MountError> {
    let failed = |errno| MountError::Device { device: device.to_owned(), errno };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(device, flags, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::BlockDevice {
        return Err(MountError::NotBlockDevice { device: device.to_owned() });
    }
    // On a block device O_EXCL without O_CREAT claims it, and fails if a mount of this node has claimed it.
    match rustix::fs::open(device, flags | OFlags::EXCL, Mode::empty()) {
        Ok(_claimed) => {}
        Err(Errno::BUSY) => {
            return Err(MountError::InUseHere { device: device.to_owned(), log: String::new() });
        }
        Err(errno) => return Err(failed(errno)),
    }
    if read_only && kind == FsKind::Ext4 && ext4_needs_recovery(&fd).map_err(failed)? {
        return Err(MountError::NeedsRecovery { device: device.to_owned(), log: String::new() });
    }
    Ok(())
}

/// A read-only ext4 mount would replay the journal all the same, and so write to the LUN.
fn ext4_needs_recovery(device: &OwnedFd) -> super::Result<bool> {
    const SUPERBLOCK_OFFSET: u64 = 1024;
    const MAGIC: [u8; 2] = [0x53, 0xef];
    const INCOMPAT_RECOVER: u8 = 0x04;
    let mut superblock = [0_u8; 1024];
    let read = rustix::io::pread(device, &mut superblock[..], SUPERBLOCK_OFFSET)?;
    Ok(read == superblock.len()
        && superblock[0x38..0x3a] == MAGIC
        && superblock[0x60] & INCOMPAT_RECOVER != 0)
}

fn create_mount(device: &Path, kind: FsKind, read_only: bool) -> std::result::Result<OwnedFd, MountError> {
    let context = fsopen(kind.name(), FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| match errno {
        Errno::NODEV => MountError::NoSuchFs { kind },
        errno => MountError::Other { device: device.to_owned(), kind, errno, log: String::new() },
    })?;
    let configure = || {
        fsconfig_set_string(&context, c"source", device)?;
        if kind == FsKind::Ext4 {
            // Journaled data never has a place that could be lent.
            fsconfig_set_string(&context, c"data", c"ordered")?;
        }
        if read_only {
            fsconfig_set_flag(&context, c"ro")?;
        }
        fsconfig_create_exclusive(&context)
    };
    configure().map_err(|errno| explain(errno, device, kind, read_only, kernel_log(&context)))?;
    let mut attrs = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOATIME
        | MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW;
    if read_only {
        attrs |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attrs)
        .map_err(|errno| explain(errno, device, kind, read_only, kernel_log(&context)))
}

fn explain(errno: Errno, device: &Path, kind: FsKind, read_only: bool, log: String) -> MountError {
    let device = device.to_owned();
    match errno {
        Errno::NOTBLK => MountError::NotBlockDevice { device },
        // The claim of the device succeeded a moment ago, so it is another node that has it.
        Errno::BUSY if kind == FsKind::Ext4 => MountError::InUseElsewhere { device, log },
        Errno::BUSY => MountError::InUseHere { device, log },
        Errno::ROFS if read_only => MountError::NeedsRecovery { device, log },
        Errno::INVAL => MountError::NotFormatted { device, kind, log },
        // EUCLEAN and EBADMSG are what both file systems call corruption and bad checksums.
        Errno::UCLEAN | Errno::BADMSG => MountError::Damaged { device, kind, log },
        errno => MountError::Other { device, kind, errno, log },
    }
}

/// What the kernel has written into the context: one message per read, each with a letter for its level in front.
fn kernel_log(context: impl AsFd) -> String {
    const MESSAGES_MAX: usize = 32;
    let mut lines = Vec::new();
    let mut buf = [0_u8; 1024];
    while lines.len() < MESSAGES_MAX {
        match rustix::io::read(&context, &mut buf[..]) {
            Ok(read) if read > 0 => lines.push(String::from_utf8_lossy(&buf[..read]).trim_end().to_owned()),
            Ok(_) | Err(_) => break,
        }
    }
    if lines.is_empty() { String::new() } else { format!("(kernel: {})", lines.join("; ")) }
}
