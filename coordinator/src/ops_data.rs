//! Data that goes through the coordinator, and what frees, moves or allocates blocks.
//!
//! Whatever changes a range first makes it its own with a guard, in whole blocks; whatever can move the end of the file
//! takes everything from the block of the end on. After buffered I/O the page cache of the file counts as dirty until a
//! grant proves it empty. While anything of a file is lent it is read around the page cache.

use crate::calls::{Answer, Call, Done, Fail};
use crate::coordinator::Coordinator;
use crate::dispatch::count;
use crate::layouts::{Exclusive, Guard, Shared};
use crate::leases::{Change, Subject};
use csv_proto::{CopyRange, Data, Fallocate, Fsync, Read, Seek, SetAttr, Write, file_id, reply};
use csv_types::{ByteRange, FileId};
use rustix::io::Errno;

/// An operation looks at the size again this often when it changed before the guard was held.
const TRIES_MAX: usize = 16;
/// One call copies no more than this; the caller goes on from there.
const COPY_BYTES_MAX: u64 = 64 << 20;
/// Clocks of two nodes may differ by this much.
const CLOCKS_DIFFER_MS: u64 = 2000;

/// Which bytes an operation changes, given the size.
#[derive(Debug, Clone, Copy)]
enum Span {
    /// These; behind the end of the file it moves the end.
    Bytes(ByteRange),
    /// What follows the end.
    Append,
    /// Everything from an offset on: the end moves there, or what is there moves.
    From(u64),
}

/// A span that is the coordinator's own, with the file's lock.
struct Own {
    size: u64,
    // Fields are dropped in this order: first the locks, then the guards.
    _locks: (Option<Shared>, Exclusive, Option<Shared>),
    _guards: (Option<Guard>, Guard, Option<Guard>),
}

/// Bytes of another file that are read meanwhile.
type Source = (FileId, ByteRange);

impl Coordinator {
    fn range_of(&self, span: Span, size: u64) -> ByteRange {
        match span {
            Span::Bytes(range) if range.end <= size => range.align_out(self.align()),
            Span::Bytes(ByteRange { start, .. }) | Span::From(start) => {
                ByteRange::new(self.block_floor(start.min(size)), u64::MAX)
            }
            Span::Append => ByteRange::new(self.block_floor(size), u64::MAX),
        }
    }

    /// Makes a span the coordinator's own, and tells the size that then stands.
    async fn own(&self, file: FileId, span: Span) -> Result<Own, Fail> {
        self.own_with(file, span, None).await
    }

    /// As `own`, and nobody else writes the source. Guards and then locks, both in the order of the files, so that two
    /// copies cannot wait for each other.
    async fn own_with(&self, file: FileId, span: Span, source: Option<Source>) -> Result<Own, Fail> {
        let before = source.filter(|(other, _)| *other < file);
        let behind = source.filter(|(other, _)| *other > file);
        for _ in 0..TRIES_MAX {
            let range = self.range_of(span, self.size(file).await?);
            let guard_before = self.source_guard(before).await?;
            let guard = self.guard(file, range, None, false).await?;
            let guards = (guard_before, guard, self.source_guard(behind).await?);
            let lock_before = self.source_lock(before).await;
            let lock = self.exclusive(file).await;
            let lock_behind = self.source_lock(behind).await;
            if range.end == u64::MAX {
                self.settle_locked(&lock, file)?;
            } else {
                self.flush_locked(&lock, file)?;
            }
            let size = self.fs.attr(file)?.size;
            // Whoever held the end may have moved it while it was recalled.
            if range.contains(&self.range_of(span, size)) {
                self.core.lock().file(file).cache_clean = false;
                return Ok(Own { size, _locks: (lock_before, lock, lock_behind), _guards: guards });
            }
        }
        Err(Fail::new(Errno::AGAIN, "the size of the file kept changing; try again"))
    }

    async fn source_guard(&self, source: Option<Source>) -> Result<Option<Guard>, Errno> {
        let Some((file, range)) = source else { return Ok(None) };
        self.guard(file, range.align_out(self.align()), None, true).await.map(Some)
    }

    async fn source_lock(&self, source: Option<Source>) -> Option<Shared> {
        match source {
            Some((file, _)) => Some(self.shared(file).await),
            None => None,
        }
    }

    /// Cuts or extends a file. The caller tells those who may cache its attributes.
    pub(crate) async fn truncate(&self, file: FileId, size: u64) -> Result<(), Fail> {
        let _own = self.own(file, Span::From(size)).await?;
        Ok(self.fs.truncate(file, size)?)
    }

    pub(crate) async fn read(&self, read: Read) -> Result<Done, Fail> {
        let file = file_id(read.file)?;
        let moved = self.core.lock().files.get(&file).is_some_and(|state| state.eof.is_some());
        if moved {
            self.query_writers(file, None).await;
        }
        let size = self.size(file).await?;
        // The size on disk may run ahead.
        let left = u32::try_from(size.saturating_sub(read.offset)).unwrap_or(u32::MAX);
        let len =
            read.len.min(left).min(u32::try_from(csv_proto::MESSAGE_BYTES_MAX - (64 << 10)).unwrap_or(0));
        let data = if len == 0 { Vec::new() } else { self.read_some(file, read.offset, len).await? };
        Ok(reply::Body::Data(Data { data: data.into() }).into())
    }

    async fn read_some(&self, file: FileId, offset: u64, len: u32) -> Result<Vec<u8>, Errno> {
        let _lock = self.shared(file).await;
        if self.cacheable(file) {
            self.fs.read(file, offset, len)
        } else {
            self.fs.read_direct(file, offset, len)
        }
    }

    /// With the file's lock held: may it be read through the page cache? Readahead takes more than what is asked for, so
    /// not while anything of it is lent.
    fn cacheable(&self, file: FileId) -> bool {
        let core = &mut *self.core.lock();
        let lent = core.table.has_grants(file) || core.file(file).mapping > 0;
        if !lent {
            core.file(file).cache_clean = false;
        }
        !lent
    }

    pub(crate) async fn write(&self, call: &Call, write: Write) -> Result<Done, Fail> {
        let file = file_id(write.file)?;
        if write.append && call.resent {
            self.refuse_second_append(call, file).await?;
        }
        let len = write.data.len() as u64;
        let end = write.offset.checked_add(len).ok_or(Errno::FBIG)?;
        let span = if write.append { Span::Append } else { Span::Bytes(ByteRange::new(write.offset, end)) };
        {
            let own = self.own(file, span).await?;
            let offset = if write.append { own.size } else { write.offset };
            self.fs.write(file, offset, &write.data)?;
            if write.kill_suidgid {
                self.fs.setattr(file, &SetAttr { kill_suidgid: true, ..SetAttr::default() })?;
            }
            if write.sync {
                self.fs.fsync(file, true)?;
            }
        }
        self.changed(call.at.node, &[Change::attr(file)]).await;
        self.counted(call, file, len).await
    }

    /// An append that was sent before may have been done. If the file was not written since, it was not; else nobody
    /// can tell, and doing it twice would be worse than an error.
    async fn refuse_second_append(&self, call: &Call, file: FileId) -> Result<(), Fail> {
        self.freshen(file, None).await?;
        let mtime = self.fs.attr(file)?.mtime.unwrap_or_default();
        let mtime_ms = u64::try_from(mtime.s).unwrap_or(0) * 1000 + u64::from(mtime.ns) / 1_000_000;
        if mtime_ms + CLOCKS_DIFFER_MS < call.first_sent_ms {
            return Ok(());
        }
        Err(Fail::new(
            Errno::IO,
            "the coordinator changed during an append; whether it was done is not known",
        ))
    }

    /// A count, with the file's attributes as they are now.
    async fn counted(&self, call: &Call, file: FileId, value: u64) -> Result<Done, Fail> {
        let note = self.lease(call.at.node, file, Subject::Attr);
        let attr = self.fresh_attr(file, Some(call.at.node)).await?;
        let leases = note.into_iter().collect();
        Ok(Answer { body: Some(count(value, Some(attr))), leases, ..Answer::default() }.into())
    }

    pub(crate) async fn fallocate(&self, call: &Call, op: Fallocate) -> Result<Done, Fail> {
        let file = file_id(op.file)?;
        let end = op.offset.checked_add(op.len).ok_or(Errno::FBIG)?;
        let has = |flag: libc::c_int| op.mode & flag.cast_unsigned() != 0;
        let moves = has(libc::FALLOC_FL_COLLAPSE_RANGE) || has(libc::FALLOC_FL_INSERT_RANGE);
        let span = if moves { Span::From(op.offset) } else { Span::Bytes(ByteRange::new(op.offset, end)) };
        {
            let _own = self.own(file, span).await?;
            self.fs.fallocate(file, op.mode, op.offset, op.len)?;
        }
        self.changed(call.at.node, &[Change::attr(file)]).await;
        Ok(self.attr_answer(call.at.node, file, Vec::new()).await?.into())
    }

    pub(crate) async fn seek(&self, op: Seek) -> Result<Done, Fail> {
        let file = file_id(op.file)?;
        self.freshen(file, None).await?;
        let size = self.size(file).await?;
        if op.offset >= size {
            return Err(Errno::NXIO.into());
        }
        let found = {
            let _lock = self.shared(file).await;
            self.fs.seek(file, op.offset, op.whence)?
        };
        // Space behind the logical size is nobody's business.
        if found < size {
            return Ok(count(found, None).into());
        }
        if op.whence == libc::SEEK_HOLE.cast_unsigned() {
            Ok(count(size, None).into())
        } else {
            Err(Errno::NXIO.into())
        }
    }

    pub(crate) async fn copy_range(&self, call: &Call, op: CopyRange) -> Result<Done, Fail> {
        let (src, dst) = (file_id(op.src)?, file_id(op.dst)?);
        self.freshen(src, None).await?;
        let len = op.len.min(COPY_BYTES_MAX).min(self.size(src).await?.saturating_sub(op.src_offset));
        if len == 0 {
            return Ok(count(0, None).into());
        }
        let from = ByteRange::at(op.src_offset, len);
        let to = ByteRange::at(op.dst_offset, len);
        let copied = {
            let _own = if src == dst {
                let hull = ByteRange::new(from.start.min(to.start), from.end.max(to.end));
                self.own(dst, Span::Bytes(hull)).await?
            } else {
                self.own_with(dst, Span::Bytes(to), Some((src, from))).await?
            };
            // It may have been cut meanwhile, and the size on disk may run ahead.
            let len = len.min(self.fs.attr(src)?.size.saturating_sub(from.start));
            if self.cacheable(src) {
                self.fs.copy_range(src, from.start, dst, to.start, len)?
            } else {
                self.fs.copy_direct(src, from.start, dst, to.start, len)?
            }
        };
        self.changed(call.at.node, &[Change::attr(dst)]).await;
        self.counted(call, dst, copied).await
    }

    pub(crate) async fn fsync(&self, call: &Call, op: Fsync) -> Result<Done, Fail> {
        let file = file_id(op.file)?;
        if op.dir {
            self.fs.fsync_dir(file)?;
        } else {
            // What other nodes write through this one, its own csvfs writes, and knows the time.
            let own = self.options.own_node;
            if call.at.node != own && !op.datasync {
                self.query_writers_that(file, |node| node == own).await;
            }
            self.flush(file).await?;
            self.fs.fsync(file, op.datasync)?;
        }
        Ok(Done::nothing())
    }
}
