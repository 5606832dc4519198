//! Every FUSE operation but those that the pump takes itself ([`super::meta`], reads, writes, locks): each is a call to
//! the coordinator.
//!
//! Kernel caching is off: attributes and names have time-out zero and files are opened for direct I/O, so what a
//! call returned on one node, any other node sees. Handlers run in fuser's threads and may block; their number
//! bounds how many metadata operations wait at once, and none of them is needed for direct I/O.

use super::hidden::{Hidden, HiddenAttr};
use crate::client::VolumeClient;
use crate::client::attrs::attr_of;
use crate::client::channel::{Caller, check};
use crate::client::inode::Inode;
use csv_proto as proto;
use csv_types::FileId;
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno as FuseErrno, FileAttr, FileHandle, FileType,
    Filesystem, Generation, INodeNo, InitFlags, KernelConfig, RenameFlags, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow,
};
use proto::call::Op;
use proto::reply::Body;
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// No caching in the kernel.
const TTL: Duration = Duration::ZERO;
/// Background requests in flight that the kernel allows.
const BACKGROUND_MAX: u16 = 256;
/// Bytes of directory entries asked for at once.
const READDIR_BYTES: u32 = 64 << 10;

/// The file system as fuser sees it.
#[derive(Debug)]
pub(crate) struct CsvFs {
    client: Arc<VolumeClient>,
    hidden: Arc<Hidden>,
}

type Res<T> = Result<T, Errno>;

fn fuse_errno(errno: Errno) -> FuseErrno {
    FuseErrno::from_i32(errno.raw_os_error())
}

fn caller(request: &Request, umask: u32) -> Caller {
    Caller {
        request: request.unique().0,
        uid: request.uid(),
        gid: request.gid(),
        pid: request.pid(),
        umask,
        bound: false,
    }
}

/// Answers with `reply.$good(...)` or `reply.error`.
macro_rules! answer {
    ($reply:expr, $outcome:expr, $value:pat => $good:expr) => {
        match $outcome {
            Ok($value) => $good,
            Err(errno) => $reply.error(fuse_errno(errno)),
        }
    };
}

impl CsvFs {
    pub(crate) fn new(client: Arc<VolumeClient>, hidden: Arc<Hidden>) -> CsvFs {
        CsvFs { client, hidden }
    }

    fn inode(&self, ino: INodeNo) -> Res<Arc<Inode>> {
        if Hidden::owns(ino.0) {
            return Err(Errno::PERM);
        }
        self.client.inodes.get(ino.0).ok_or(Errno::STALE)
    }

    fn file(&self, ino: INodeNo) -> Res<FileId> {
        self.inode(ino).map(|inode| inode.file)
    }

    fn call(&self, request: &Request, op: Op) -> Res<Option<Body>> {
        self.client.chan.call(caller(request, 0), op).map(|reply| reply.body)
    }

    fn call_attr(&self, who: Caller, op: Op) -> Res<proto::Attr> {
        match self.client.chan.call(who, op)?.body {
            Some(Body::Attr(attr)) => Ok(attr),
            Some(_) | None => Err(Errno::PROTO),
        }
    }

    fn make(&self, request: &Request, umask: u32, op: Op, at: InDir<'_>) -> Res<FileAttr> {
        let asked = self.client.meta.ask();
        let outcome = self.client.chan.ask(caller(request, umask), op);
        let found = outcome.as_ref().ok().and_then(|reply| attr_of(reply).ok());
        let file = found.as_ref().and_then(|attr| Some((proto::file_id(attr.file).ok()?, attr)));
        self.client.meta.named(asked, at.dir, at.name, outcome.as_ref().ok(), file);
        self.client.enter(&attr_of(&outcome?)?).map(|(_, attr)| file_attr(&attr))
    }

    fn list(
        &self,
        request: &Request,
        ino: INodeNo,
        offset: u64,
        mut add: impl FnMut(&proto::DirEntry) -> bool,
    ) -> Res<()> {
        let dir = Some(self.file(ino)?.into());
        let op = proto::ReadDir { dir, cookie: offset, max_bytes: READDIR_BYTES, plus: false };
        let op = Op::Readdir(op);
        let Some(Body::Dir(page)) = self.call(request, op)? else { return Err(Errno::PROTO) };
        for entry in &page.entries {
            if add(entry) {
                break;
            }
        }
        Ok(())
    }

    fn xattr_reply(reply: ReplyXattr, size: u32, value: &[u8]) {
        let len = u32::try_from(value.len()).unwrap_or(u32::MAX);
        if size == 0 {
            reply.size(len);
        } else if size < len {
            reply.error(FuseErrno::ERANGE);
        } else {
            reply.data(value);
        }
    }
}

const S_IFMT: u32 = 0o170_000;

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
struct InDir<'a> {
    dir: FileId,
    name: &'a [u8],
}

impl InDir<'_> {
    fn wire(&self) -> (Option<proto::FileId>, bytes::Bytes) {
        (Some(self.dir.into()), bytes::Bytes::copy_from_slice(self.name))
    }
}

fn name_bytes(name: &OsStr) -> Res<bytes::Bytes> {
    if name.len() > proto::NAME_BYTES_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    Ok(bytes::Bytes::copy_from_slice(name.as_bytes()))
}

fn system_time(time: Option<proto::Time>) -> SystemTime {
    let Some(time) = time else { return UNIX_EPOCH };
    let nanos = Duration::from_nanos(u64::from(time.ns));
    if time.s >= 0 {
        UNIX_EPOCH + Duration::from_secs(time.s.unsigned_abs()) + nanos
    } else {
        UNIX_EPOCH - Duration::from_secs(time.s.unsigned_abs()) + nanos
    }
}

fn proto_time(time: SystemTime) -> proto::Time {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => proto::Time { s: after.as_secs().cast_signed(), ns: after.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            let up = u64::from(before.subsec_nanos() > 0);
            let ns = if up == 1 { 1_000_000_000 - before.subsec_nanos() } else { 0 };
            proto::Time { s: -(before.as_secs() + up).cast_signed(), ns }
        }
    }
}

fn kind_of(mode: u32) -> FileType {
    match mode & S_IFMT {
        0o040_000 => FileType::Directory,
        0o120_000 => FileType::Symlink,
        0o010_000 => FileType::NamedPipe,
        0o140_000 => FileType::Socket,
        0o020_000 => FileType::CharDevice,
        0o060_000 => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

/// Directory entry types (`DT_*`) are the file type bits shifted down.
fn kind_of_dirent(kind: u32) -> FileType {
    kind_of(kind << 12)
}

fn file_attr(attr: &proto::Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.file.map_or(0, |file| file.ino)),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.btime),
        kind: kind_of(attr.mode),
        perm: u16::try_from(attr.mode & 0o7777).unwrap_or(0),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: attr.blksize,
        flags: 0,
    }
}

fn hidden_attr(hidden: HiddenAttr) -> FileAttr {
    FileAttr {
        ino: INodeNo(hidden.nodeid),
        size: hidden.size,
        blocks: hidden.size / 512,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if hidden.directory { FileType::Directory } else { FileType::RegularFile },
        perm: if hidden.directory { 0o700 } else { 0o600 },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for CsvFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = InitFlags::FUSE_POSIX_LOCKS
            | InitFlags::FUSE_FLOCK_LOCKS
            | InitFlags::FUSE_ATOMIC_O_TRUNC
            | InitFlags::FUSE_DONT_MASK
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_POSIX_ACL
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT
            | InitFlags::FUSE_SETXATTR_EXT;
        if let Err(missing) = config.add_capabilities(wanted & config.capabilities()) {
            tracing::warn!(?missing, "the kernel's FUSE lacks capabilities");
        }
        let bytes = u32::try_from(super::device::IO_BYTES_MAX).unwrap_or(1 << 20);
        let _ = config.set_max_write(bytes);
        let _ = config.set_max_readahead(bytes);
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_MAX);
        Ok(())
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if Hidden::owns(ino.0) {
            // smbd sets times and sizes as it pleases; a hidden file has neither.
            answer!(reply, self.hidden.attr(ino.0).map(hidden_attr), attr => reply.attr(&TTL, &attr));
            return;
        }
        let fixed = |time: Option<TimeOrNow>| match time {
            Some(TimeOrNow::SpecificTime(time)) => Some(proto_time(time)),
            Some(TimeOrNow::Now) | None => None,
        };
        let change = proto::SetAttr {
            file: None,
            mode,
            uid,
            gid,
            size,
            atime: fixed(atime),
            atime_now: matches!(atime, Some(TimeOrNow::Now)),
            mtime: fixed(mtime),
            mtime_now: matches!(mtime, Some(TimeOrNow::Now)),
            // With HANDLE_KILLPRIV_V2 clearing them is ours: a truncation or chown by anyone but root.
            kill_suidgid: (size.is_some() || uid.is_some() || gid.is_some()) && request.uid() != 0,
        };
        answer!(reply, self.change_attr(request, ino, change), attr => reply.attr(&TTL, &attr));
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let outcome = self.file(ino).and_then(|file| {
            match self.call(request, Op::Readlink(proto::ReadLink { file: Some(file.into()) }))? {
                Some(Body::Data(data)) => Ok(data.data),
                Some(_) | None => Err(Errno::PROTO),
            }
        });
        answer!(reply, outcome, target => reply.data(&target));
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let outcome = self.in_dir(parent, name).and_then(|at| {
            let (parent, name) = at.wire();
            self.make(request, umask, Op::Mknod(proto::MkNod { parent, name, mode, rdev }), at)
        });
        answer!(reply, outcome, attr => reply.entry(&TTL, &attr, self.generation(&attr)));
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let outcome = self.in_dir(parent, name).and_then(|at| {
            let (parent, name) = at.wire();
            self.make(request, umask, Op::Mkdir(proto::MkDir { parent, name, mode }), at)
        });
        answer!(reply, outcome, attr => reply.entry(&TTL, &attr, self.generation(&attr)));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let outcome =
            self.remove(request, parent, name, |parent, name| Op::Rmdir(proto::RmDir { parent, name }));
        answer!(reply, outcome, _ => reply.ok());
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = bytes::Bytes::copy_from_slice(target.as_os_str().as_bytes());
        let outcome = self.in_dir(parent, name).and_then(|at| {
            let (parent, name) = at.wire();
            self.make(request, 0, Op::Symlink(proto::Symlink { parent, name, target }), at)
        });
        answer!(reply, outcome, attr => reply.entry(&TTL, &attr, self.generation(&attr)));
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let outcome = self.in_dir(parent, name).and_then(|from| {
            let to = self.in_dir(newparent, newname)?;
            let ((parent, name), (new_parent, new_name)) = (from.wire(), to.wire());
            let flags = flags.bits();
            // A rename whose reply is lost with its coordinator is recognised by the file that it moved.
            let expect = self.named(request, from)?;
            let op = proto::Rename { parent, name, new_parent, new_name, flags, expect };
            let outcome = self.call(request, Op::Rename(op));
            self.client.meta.removed(from.dir, from.name);
            self.client.meta.removed(to.dir, to.name);
            outcome
        });
        answer!(reply, outcome, _ => reply.ok());
    }

    fn link(&self, request: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let outcome = self.file(ino).and_then(|file| {
            let at = self.in_dir(newparent, newname)?;
            let (new_parent, new_name) = at.wire();
            let op = proto::Link { file: Some(file.into()), new_parent, new_name };
            let made = self.make(request, 0, Op::Link(op), at);
            self.client.meta.changed(&[file], &[]);
            made
        });
        answer!(reply, outcome, attr => reply.entry(&TTL, &attr, self.generation(&attr)));
    }

    fn fsync(&self, request: &Request, ino: INodeNo, _fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        let outcome = match Hidden::owns(ino.0) {
            true => self.hidden.fsync(ino.0),
            false => {
                self.inode(ino).and_then(|inode| self.client.fsync(caller(request, 0), &inode, datasync))
            }
        };
        answer!(reply, outcome, () => reply.ok());
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if Hidden::owns(ino.0) {
            return reply.ok();
        }
        let outcome = self.list(request, ino, offset, |entry| {
            let name = OsStr::from_bytes(&entry.name);
            reply.add(INodeNo(entry.ino), entry.cookie, kind_of_dirent(entry.kind), name)
        });
        answer!(reply, outcome, () => reply.ok());
    }

    fn fsyncdir(&self, request: &Request, ino: INodeNo, _fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        let outcome = self.file(ino).and_then(|file| {
            self.call(request, Op::Fsync(proto::Fsync { file: Some(file.into()), datasync, dir: true }))
        });
        answer!(reply, outcome, _ => reply.ok());
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let outcome = match self.call(request, Op::Statfs(proto::StatFs {})) {
            Ok(Some(Body::Statfs(stat))) => Ok(stat),
            Ok(_) => Err(Errno::PROTO),
            Err(error) => Err(error),
        };
        answer!(reply, outcome, s => reply.statfs(
            s.blocks, s.bfree, s.bavail, s.files, s.ffree, s.bsize, s.namelen, s.frsize,
        ));
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let outcome = self.file(ino).and_then(|file| {
            let op = proto::SetXattr {
                file: Some(file.into()),
                name: name_bytes(name)?,
                value: bytes::Bytes::copy_from_slice(value),
                flags: flags.cast_unsigned(),
                acl_kill_sgid: false,
            };
            self.change(request, file, Op::Setxattr(op))
        });
        answer!(reply, outcome, _ => reply.ok());
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if Hidden::owns(ino.0) {
            return reply.error(FuseErrno::from_i32(Errno::NODATA.raw_os_error()));
        }
        let outcome = self.file(ino).and_then(|file| {
            let op = proto::GetXattr { file: Some(file.into()), name: name_bytes(name)? };
            match self.call(request, Op::Getxattr(op))? {
                Some(Body::Data(data)) => Ok(data.data),
                Some(_) | None => Err(Errno::PROTO),
            }
        });
        answer!(reply, outcome, value => CsvFs::xattr_reply(reply, size, &value));
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        if Hidden::owns(ino.0) {
            return CsvFs::xattr_reply(reply, size, &[]);
        }
        let outcome = self.file(ino).and_then(|file| {
            match self.call(request, Op::Listxattr(proto::ListXattr { file: Some(file.into()) }))? {
                Some(Body::Data(data)) => Ok(data.data),
                Some(_) | None => Err(Errno::PROTO),
            }
        });
        answer!(reply, outcome, names => CsvFs::xattr_reply(reply, size, &names));
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let outcome = self.file(ino).and_then(|file| {
            let op = proto::RemoveXattr { file: Some(file.into()), name: name_bytes(name)? };
            self.change(request, file, Op::Removexattr(op))
        });
        answer!(reply, outcome, _ => reply.ok());
    }

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // default_permissions: the kernel has checked.
        reply.ok();
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let outcome = self.inode(ino).and_then(|inode| {
            self.client.commit(caller(request, 0), &inode)?;
            let change = self.client.change_begins(&mut inode.io.lock());
            let mode = mode.cast_unsigned();
            let op = proto::Fallocate { file: Some(inode.file.into()), offset, len: length, mode };
            let done = self.change(request, inode.file, Op::Fallocate(op))?;
            self.client.change_answered(&mut inode.io.lock(), &change);
            Ok(done)
        });
        answer!(reply, outcome, _ => reply.ok());
    }

    fn lseek(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let outcome = self.file(ino).and_then(|file| {
            let offset = u64::try_from(offset).map_err(|_| Errno::NXIO)?;
            let op = proto::Seek { file: Some(file.into()), offset, whence: whence.cast_unsigned() };
            match self.call(request, Op::Seek(op))? {
                Some(Body::Count(found)) => Ok(found.value.cast_signed()),
                Some(_) | None => Err(Errno::PROTO),
            }
        });
        answer!(reply, outcome, offset => reply.offset(offset));
    }

    fn copy_file_range(
        &self,
        request: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let outcome = self.inode(ino_in).and_then(|from| {
            let to = self.inode(ino_out)?;
            self.client.commit(caller(request, 0), &from)?;
            let change = self.client.change_begins(&mut to.io.lock());
            let op = proto::CopyRange {
                src: Some(from.file.into()),
                src_offset: offset_in,
                dst: Some(to.file.into()),
                dst_offset: offset_out,
                // The reply has 32 bits; the caller repeats for the rest.
                len: len.min(COPY_BYTES_MAX),
            };
            let done = self.change(request, to.file, Op::CopyRange(op))?;
            self.client.change_answered(&mut to.io.lock(), &change);
            match done {
                Some(Body::Count(copied)) => Ok(u32::try_from(copied.value).unwrap_or(u32::MAX)),
                Some(_) | None => Err(Errno::PROTO),
            }
        });
        answer!(reply, outcome, copied => reply.written(copied));
    }
}

/// Bytes that one copy_file_range call moves at most, so that it stays interruptible.
const COPY_BYTES_MAX: u64 = 64 << 20;

impl CsvFs {
    fn in_dir<'a>(&self, parent: INodeNo, name: &'a OsStr) -> Res<InDir<'a>> {
        if name.len() > proto::NAME_BYTES_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        Ok(InDir { dir: self.file(parent)?, name: name.as_bytes() })
    }

    /// The file behind a name that the kernel has looked up a moment ago.
    fn named(&self, request: &Request, at: InDir<'_>) -> Res<Option<proto::FileId>> {
        if let Some(file) = self.client.meta.file(at.dir, at.name) {
            return Ok(Some(file.into()));
        }
        let (parent, name) = at.wire();
        let attr = self.call_attr(caller(request, 0), Op::Lookup(proto::Lookup { parent, name }))?;
        Ok(attr.file)
    }

    /// A call that takes a name away.
    fn remove(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        op: impl FnOnce(Option<proto::FileId>, bytes::Bytes) -> Op,
    ) -> Res<()> {
        let at = self.in_dir(parent, name)?;
        let (parent, name) = at.wire();
        let asked = self.client.meta.ask();
        let outcome = self.client.chan.ask(caller(request, 0), op(parent, name));
        self.client.meta.named(asked, at.dir, at.name, outcome.as_ref().ok(), None);
        check(outcome?).map(|_| ())
    }

    /// A call that changes a file's attributes.
    fn change(&self, request: &Request, file: FileId, op: Op) -> Res<Option<Body>> {
        let outcome = self.call(request, op);
        self.client.meta.changed(&[file], &[]);
        outcome
    }

    fn change_attr(&self, request: &Request, ino: INodeNo, change: proto::SetAttr) -> Res<FileAttr> {
        let inode = self.inode(ino)?;
        let who = caller(request, 0);
        // Times set now must not be overtaken by the time of an earlier write.
        self.client.commit(who, &inode)?;
        let op = Op::Setattr(proto::SetAttr { file: Some(inode.file.into()), ..change });
        let attr = self.call_attr(who, op);
        self.client.meta.changed(&[inode.file], &[]);
        Ok(file_attr(&self.client.note(&inode, &attr?)))
    }

    fn generation(&self, attr: &FileAttr) -> Generation {
        let inode = self.client.inodes.get(attr.ino.0);
        Generation(inode.map_or(0, |inode| u64::from(inode.file.generation)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_survive() {
        for time in [
            UNIX_EPOCH,
            UNIX_EPOCH + Duration::new(5, 7),
            UNIX_EPOCH - Duration::new(5, 7),
            UNIX_EPOCH - Duration::new(5, 0),
        ] {
            assert_eq!(system_time(Some(proto_time(time))), time);
        }
    }

    #[test]
    fn dirent_kinds() {
        assert_eq!(kind_of_dirent(4), FileType::Directory);
        assert_eq!(kind_of_dirent(8), FileType::RegularFile);
        assert_eq!(kind_of_dirent(10), FileType::Symlink);
    }
}
