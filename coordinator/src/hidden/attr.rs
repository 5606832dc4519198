//! Attributes: reading them (with the logical size and the link count of orphans), and changing everything but the
//! size.

use super::{HiddenFs, Result, proc_path};
use csv_proto::{Attr, SetAttr, StatFsReply, Time};
use csv_types::FileId;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, Statx, StatxFlags, StatxTimestamp, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid,
};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

/// Looks at a size that is being settled again and again.
const LOOKS_MAX: u32 = 1000;

impl HiddenFs {
    /// Attributes of a file of any type.
    ///
    /// # Errors
    /// ESTALE when the file is gone.
    pub fn attr(&self, file: FileId) -> Result<Attr> {
        self.attr_of(&self.open_path(file)?, file)
    }

    /// Changes mode, owner and times, not the size. Owner first, so that a mode in the same request wins over
    /// the set-id bits that a change of owner clears. `kill_suidgid` clears what a write by an ordinary user
    /// would.
    ///
    /// # Errors
    /// EOPNOTSUPP for the mode of a symbolic link; else as chown, chmod and utimensat.
    pub fn setattr(&self, file: FileId, set: &SetAttr) -> Result<Attr> {
        let fd = self.open_path(file)?;
        let owner = set.uid.filter(|uid| *uid != u32::MAX).map(Uid::from_raw);
        let group = set.gid.filter(|gid| *gid != u32::MAX).map(Gid::from_raw);
        if set.uid.is_some() || set.gid.is_some() || set.kill_suidgid {
            // Even with neither id given the kernel clears set-id bits and security.capability here.
            rustix::fs::chownat(&fd, c"", owner, group, AtFlags::EMPTY_PATH)?;
        }
        if let Some(mode) = set.mode {
            if file_type(&fd)? == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            let mode = Mode::from_raw_mode(mode & 0o7777);
            rustix::fs::chmodat(rustix::fs::CWD, proc_path(&fd), mode, AtFlags::empty())?;
        }
        let times = Timestamps {
            last_access: timespec(set.atime.as_ref(), set.atime_now)?,
            last_modification: timespec(set.mtime.as_ref(), set.mtime_now)?,
        };
        if times.last_access.tv_nsec != UTIME_OMIT || times.last_modification.tv_nsec != UTIME_OMIT {
            rustix::fs::utimensat(&fd, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        self.attr_of(&fd, file)
    }

    /// Space and inodes of the volume.
    ///
    /// # Errors
    /// As statfs.
    pub fn statfs(&self) -> Result<StatFsReply> {
        let stat = rustix::fs::fstatvfs(&self.root_dir)?;
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Ok(StatFsReply {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: narrow(stat.f_bsize),
            namelen: narrow(stat.f_namemax),
            frsize: narrow(stat.f_frsize),
        })
    }

    /// Attributes through a descriptor that is known to be on `file`.
    pub(super) fn attr_of(&self, fd: &OwnedFd, file: FileId) -> Result<Attr> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let mut looks = 0;
        // Nobody's lock is held here. A size that ran ahead has its logical size noted; nothing noted and a count
        // that stands still since before the look mean that the size seen is the one that counts.
        let mut attr = loop {
            let settled = self.settled.load(Ordering::SeqCst);
            let mut attr = attr_from(&rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, wanted)?, file)?;
            looks += 1;
            if FileType::from_raw_mode(attr.mode) == FileType::RegularFile
                && let Some(size) = Self::logical_size_of(fd)?
            {
                attr.size = size;
                break attr;
            }
            // The bound is for a machine that settles other files without a pause.
            if self.settled.load(Ordering::SeqCst) == settled || looks == LOOKS_MAX {
                break attr;
            }
        };
        if self.is_orphan(file) || (file == self.root && attr.nlink > 2) {
            // The name in our own directory, and our own directory in the root, are nobody else's business.
            attr.nlink = attr.nlink.saturating_sub(1);
        }
        Ok(attr)
    }
}

/// Times of a descriptor's file as they are, for putting the modification time back afterwards.
pub(super) fn keep_mtime(fd: &OwnedFd) -> Result<Timestamps> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MTIME)?;
    Ok(Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: stat.stx_mtime.tv_sec, tv_nsec: stat.stx_mtime.tv_nsec.into() },
    })
}

fn file_type(fd: &OwnedFd) -> Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode))
}

fn timespec(time: Option<&Time>, now: bool) -> Result<Timespec> {
    match time {
        _ if now => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }),
        Some(time) if time.ns >= 1_000_000_000 => Err(Errno::INVAL),
        Some(time) => Ok(Timespec { tv_sec: time.s, tv_nsec: time.ns.into() }),
        None => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }),
    }
}

fn attr_from(stat: &Statx, file: FileId) -> Result<Attr> {
    let time = |time: &StatxTimestamp| Some(Time { s: time.tv_sec, ns: time.tv_nsec });
    if stat.stx_ino != file.ino {
        return Err(Errno::STALE);
    }
    Ok(Attr {
        file: Some(file.into()),
        mode: stat.stx_mode.into(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encode_dev(stat.stx_rdev_major, stat.stx_rdev_minor),
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: time(&stat.stx_atime),
        mtime: time(&stat.stx_mtime),
        ctime: time(&stat.stx_ctime),
        btime: time(&stat.stx_btime),
        blksize: stat.stx_blksize,
    })
}

/// The kernel's 32-bit form of a device number, which FUSE uses too.
fn encode_dev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

/// Back from the 32-bit form.
pub(super) fn decode_dev(dev: u32) -> u64 {
    rustix::fs::makedev((dev >> 8) & 0xfff, (dev & 0xff) | ((dev >> 12) & 0xf_ff00))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (1, 3), (259, 70_000), (4095, 0xf_ffff)] {
            assert_eq!(decode_dev(encode_dev(major, minor)), rustix::fs::makedev(major, minor));
        }
    }
}
