//! Does operations in a directory with real system calls; the body of `csv-test-agent`. Errors are answers, so
//! that the driver can compare them with the model; nothing is retried.

use crate::ops::{Allocate, How, LockKind, LockMode, Op, Reply};
use crate::rng::pattern;
use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use rustix::fs::FlockOperation;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use vm_memory::{Bytes as _, FileOffset, MmapRegion, VolatileMemory as _, VolatileSlice};

/// Alignment of addresses for O_DIRECT, and the page size for mappings.
const PAGE_BYTES: usize = 4096;

/// One directory and the files that are open in it.
#[derive(Debug)]
pub struct Agent {
    root: PathBuf,
    slots: BTreeMap<u32, File>,
}

impl Agent {
    /// Works below `root`.
    #[must_use]
    pub fn new(root: PathBuf) -> Agent {
        Agent { root, slots: BTreeMap::new() }
    }

    /// Does one operation.
    pub fn run(&mut self, op: &Op) -> Reply {
        self.try_run(op)
            .unwrap_or_else(|error| Reply::Failed { errno: error.raw_os_error().unwrap_or(libc::EIO) })
    }

    fn try_run(&mut self, op: &Op) -> io::Result<Reply> {
        let done = |()| Reply::Done;
        match op {
            Op::Open { slot, name, how } => self.open(*slot, name, *how),
            Op::Close { slot } => {
                self.slots.remove(slot).ok_or_else(bad_slot)?;
                Ok(Reply::Done)
            }
            Op::Read { slot, offset, len } => read(self.file(*slot)?, *offset, size(*len)?),
            Op::MapRead { slot, offset, len } => map_read(self.file(*slot)?, *offset, size(*len)?),
            Op::Write { slot, offset, len, seed } => write(self.file(*slot)?, *offset, size(*len)?, *seed),
            Op::SetLen { slot, size } => self.file(*slot)?.set_len(*size).map(done),
            Op::Truncate { name, size } => truncate(&self.root.join(name), *size),
            Op::Allocate { slot, kind, offset, len } => allocate(self.file(*slot)?, *kind, *offset, *len),
            Op::Sync { slot } => self.file(*slot)?.sync_all().map(done),
            Op::Rename { from, to } => std::fs::rename(self.root.join(from), self.root.join(to)).map(done),
            Op::Link { from, to } => std::fs::hard_link(self.root.join(from), self.root.join(to)).map(done),
            Op::Unlink { name } => std::fs::remove_file(self.root.join(name)).map(done),
            Op::Stat { name } => {
                std::fs::symlink_metadata(self.root.join(name)).map(|stat| attributes(&stat))
            }
            Op::StatSlot { slot } => self.file(*slot)?.metadata().map(|stat| attributes(&stat)),
            Op::List => self.list(),
            Op::SyncDir => self.sync_dir(),
            Op::Lock { slot, kind, mode, start, len, wait } => {
                lock(self.file(*slot)?, *kind, *mode, *start, *len, *wait)
            }
        }
    }

    fn file(&self, slot: u32) -> io::Result<&File> {
        self.slots.get(&slot).ok_or_else(bad_slot)
    }

    fn open(&mut self, slot: u32, name: &str, how: How) -> io::Result<Reply> {
        let mut flags = 0;
        let mut flag = |on: bool, bit| flags |= if on { bit } else { 0 };
        flag(how.create, libc::O_CREAT);
        flag(how.exclusive, libc::O_EXCL);
        flag(how.truncate, libc::O_TRUNC);
        flag(how.append, libc::O_APPEND);
        flag(how.direct, libc::O_DIRECT);
        let path = self.root.join(name);
        let file = OpenOptions::new().read(true).write(true).mode(0o644).custom_flags(flags).open(path)?;
        self.slots.insert(slot, file);
        Ok(Reply::Done)
    }

    fn sync_dir(&self) -> io::Result<Reply> {
        for entry in std::fs::read_dir(&self.root)? {
            File::open(entry?.path())?.sync_all()?;
        }
        File::open(&self.root)?.sync_all()?;
        Ok(Reply::Done)
    }

    fn list(&self) -> io::Result<Reply> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.root)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(Reply::Names { names })
    }
}

fn bad_slot() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

fn size(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn attributes(stat: &std::fs::Metadata) -> Reply {
    let mtime_ns = stat.mtime() * 1_000_000_000 + stat.mtime_nsec();
    Reply::Stat { size: stat.size(), nlink: stat.nlink(), ino: stat.ino(), mtime_ns }
}

/// A buffer with a page-aligned part of `len` bytes; O_DIRECT wants that of addresses.
fn aligned(len: usize) -> (Vec<u8>, usize) {
    let buffer = vec![0u8; len + PAGE_BYTES];
    let start = buffer.as_ptr().align_offset(PAGE_BYTES);
    (buffer, start)
}

fn read(file: &File, offset: u64, len: usize) -> io::Result<Reply> {
    let (mut buffer, start) = aligned(len);
    let mut got = 0;
    while got < len {
        match file.read_at(&mut buffer[start + got..start + len], offset + got as u64)? {
            0 => break,
            more => got += more,
        }
        // What is left after an odd count is the end of file; O_DIRECT would refuse to go on there.
        if got % 512 != 0 {
            break;
        }
    }
    Ok(Reply::data(&buffer[start..start + got]))
}

fn map_read(file: &File, offset: u64, len: usize) -> io::Result<Reply> {
    // As every program that maps a file does. It matters: the kernel takes the size for page faults from the last
    // attributes it saw, and another node may have moved the end since.
    let _size = file.metadata()?.size();
    let skip = offset % PAGE_BYTES as u64;
    let skip_len = size(skip)?;
    let from = FileOffset::new(file.try_clone()?, offset - skip);
    let region = MmapRegion::<()>::build(
        Some(from),
        skip_len + len,
        libc::PROT_READ,
        libc::MAP_SHARED | libc::MAP_NORESERVE,
    )
    .map_err(|error| io::Error::other(error.to_string()))?;
    let mut bytes = vec![0; len];
    let slice: VolatileSlice<'_> = region.as_volatile_slice();
    slice.read_slice(&mut bytes, skip_len).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(Reply::data(&bytes))
}

fn write(mut file: &File, offset: u64, len: usize, seed: u64) -> io::Result<Reply> {
    let (mut buffer, start) = aligned(len);
    let data = &mut buffer[start..start + len];
    data.copy_from_slice(&pattern(seed, len));
    let flags = rustix::fs::fcntl_getfl(file)?;
    let count = if flags.contains(rustix::fs::OFlags::APPEND) {
        file.write(data)?
    } else {
        let mut put = 0;
        while put < len {
            put += file.write_at(&data[put..], offset + put as u64)?;
        }
        put
    };
    Ok(Reply::Count { count: count as u64 })
}

fn truncate(path: &std::path::Path, size: u64) -> io::Result<Reply> {
    let size = i64::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    nix::unistd::truncate(path, size)?;
    Ok(Reply::Done)
}

fn allocate(file: &File, kind: Allocate, offset: u64, len: u64) -> io::Result<Reply> {
    let flags = match kind {
        Allocate::Extend => FallocateFlags::empty(),
        Allocate::KeepSize => FallocateFlags::FALLOC_FL_KEEP_SIZE,
        Allocate::Punch => FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
        Allocate::Zero => FallocateFlags::FALLOC_FL_ZERO_RANGE,
    };
    let signed = |n: u64| i64::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    fallocate(file, flags, signed(offset)?, signed(len)?)?;
    Ok(Reply::Done)
}

fn lock(file: &File, kind: LockKind, mode: LockMode, start: u64, len: u64, wait: bool) -> io::Result<Reply> {
    if kind == LockKind::Flock {
        let operation = match (mode, wait) {
            (LockMode::Shared, true) => FlockOperation::LockShared,
            (LockMode::Shared, false) => FlockOperation::NonBlockingLockShared,
            (LockMode::Exclusive, true) => FlockOperation::LockExclusive,
            (LockMode::Exclusive, false) => FlockOperation::NonBlockingLockExclusive,
            (LockMode::Unlock, _) => FlockOperation::Unlock,
        };
        rustix::fs::flock(file, operation)?;
        return Ok(Reply::Done);
    }
    let signed = |n: u64| i64::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let l_type = match mode {
        LockMode::Shared => libc::F_RDLCK,
        LockMode::Exclusive => libc::F_WRLCK,
        LockMode::Unlock => libc::F_UNLCK,
    };
    let flock = libc::flock {
        l_type: i16::try_from(l_type).unwrap_or(i16::MAX),
        l_whence: 0,
        l_start: signed(start)?,
        l_len: signed(len)?,
        l_pid: 0,
    };
    let argument = match (kind == LockKind::Ofd, wait) {
        (false, false) => FcntlArg::F_SETLK(&flock),
        (false, true) => FcntlArg::F_SETLKW(&flock),
        (true, false) => FcntlArg::F_OFD_SETLK(&flock),
        (true, true) => FcntlArg::F_OFD_SETLKW(&flock),
    };
    fcntl(file, argument)?;
    Ok(Reply::Done)
}
