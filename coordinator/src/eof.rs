//! The end of a file: who may move it, what holders told about size and time, and cutting a file to its logical size
//! when the right comes back.
//!
//! While a node has the right, the size on disk runs ahead and the logical size stands in the journal
//! ([`crate::hidden`], `set_logical_size`). What a holder tells is noted at once, in the order of its messages, and
//! written to the file system under the file's lock before anybody looks. A crash leaves the journal; the next
//! coordinator reports the logical size and settles the file when it is touched and nobody has reclaimed the right.

use crate::coordinator::Coordinator;
use crate::layouts::Exclusive;
use crate::state::{Core, Pending};
use csv_layout::Access;
use csv_proto::{Attr, SetAttr, Time};
use csv_types::{ByteRange, FileId, NodeId};
use rustix::io::Errno;

/// Byte that only the holder of the end-of-file right has.
const LAST_BYTE: ByteRange = ByteRange { start: u64::MAX - 1, end: u64::MAX };

impl Coordinator {
    /// A node told a file's size and time. The size counts only from the holder of the end-of-file right, and it
    /// only grows under one right: a late message cannot take anything away.
    pub(crate) fn note_commit(
        &self,
        core: &mut Core,
        node: NodeId,
        file: FileId,
        size: Option<u64>,
        mtime: Option<Time>,
    ) {
        let Some(state) = core.files.get_mut(&file) else {
            if mtime.is_some() {
                core.file(file).pending.mtime = mtime;
            }
            return;
        };
        if let Some(size) = size
            && state.eof.is_some_and(|eof| eof.node == node && size <= eof.alloc_end)
        {
            state.pending.size = state.pending.size.max(Some(size));
        }
        if let Some(mtime) = mtime {
            let newer = state.pending.mtime.is_none_or(|old| (old.s, old.ns) < (mtime.s, mtime.ns));
            if newer {
                state.pending.mtime = Some(mtime);
            }
        }
    }

    /// After something changed in what a file is needed for: notices that the end-of-file right is gone, settles
    /// the file, deletes it when it is an orphan that nobody needs, forgets it when there is nothing to know.
    pub(crate) fn look_after(&self, core: &mut Core, file: FileId) {
        let Some(state) = core.files.get_mut(&file) else { return };
        if let Some(eof) = state.eof
            && !core.table.holds(eof.node, file, LAST_BYTE, Access::Exclusive)
        {
            state.eof = None;
            state.settle = true;
        }
        let in_grace = core.grace.is_some();
        if state.settle && !in_grace && !core.stopped {
            self.spawn(|co| async move { co.settle(file).await });
        } else if state.unlinked && state.opens == 0 && !state.freeing && !in_grace && !core.stopped {
            state.freeing = true;
            self.spawn(|co| async move { co.free_orphan(file).await });
        } else if !state.pending.is_empty() && !core.stopped {
            self.spawn(|co| async move {
                if let Err(errno) = co.flush(file).await
                    && errno != Errno::STALE
                {
                    co.event("commit", format!("writing the size or time of file {file} failed: {errno}"));
                }
            });
        }
        core.tidy(file);
    }

    /// Cuts a file to its logical size, if nobody holds the end-of-file right.
    pub(crate) async fn settle(&self, file: FileId) {
        if let Err(errno) = self.try_settle(file).await
            && errno != Errno::SHUTDOWN
            && errno != Errno::STALE
        {
            self.event(
                "settle",
                format!("cutting file {file} to its logical size failed: {errno}; space stays allocated"),
            );
        }
        let core = &mut *self.core.lock();
        // Tried once: what is left behind the logical size does no harm, and the next touch tries again.
        core.file(file).settle = false;
        self.look_after(core, file);
    }

    async fn try_settle(&self, file: FileId) -> Result<(), Errno> {
        if !self.core.lock().files.get(&file).is_some_and(|state| state.settle) {
            return Ok(());
        }
        let size = self.fs.attr(file)?.size;
        let _guard = self.guard(file, ByteRange::new(self.block_floor(size), u64::MAX), None, false).await?;
        let lock = self.exclusive(file).await;
        self.settle_locked(&lock, file)
    }

    /// With the tail of the file guarded and its lock held: the size on disk becomes the logical one. Nothing to do
    /// while somebody holds the right, which a guarded tail excludes.
    pub(crate) fn settle_locked(&self, lock: &Exclusive, file: FileId) -> Result<(), Errno> {
        self.flush_locked(lock, file)?;
        if self.core.lock().files.get(&file).is_some_and(|state| state.eof.is_some()) {
            return Ok(());
        }
        if let Some(size) = self.fs.logical_size(file)? {
            self.fs.settle_size(file, size)?;
            self.core.lock().file(file).cache_clean = false;
        }
        self.core.lock().file(file).settle = false;
        Ok(())
    }

    /// Writes what holders told to the file system.
    pub(crate) async fn flush(&self, file: FileId) -> Result<(), Errno> {
        let something = self.core.lock().files.get(&file).is_some_and(|state| !state.pending.is_empty());
        if something {
            let lock = self.exclusive(file).await;
            self.flush_locked(&lock, file)?;
        }
        Ok(())
    }

    /// As `flush`, with the file's lock held. What is written stays noted until it is in the file system, so that
    /// nobody else takes the file for up to date meanwhile; after an error it is there for the next one who looks, who
    /// gets the error too if it stays.
    pub(crate) fn flush_locked(&self, _lock: &Exclusive, file: FileId) -> Result<(), Errno> {
        let Some(pending) = self.core.lock().files.get(&file).map(|state| state.pending) else {
            return Ok(());
        };
        let flushed = self.write_pending(file, pending);
        if flushed.is_ok() || flushed == Err(Errno::STALE) {
            let core = &mut *self.core.lock();
            if let Some(state) = core.files.get_mut(&file) {
                // Newer word may have come.
                state.pending.size = state.pending.size.filter(|_| state.pending.size != pending.size);
                state.pending.mtime = state.pending.mtime.filter(|_| state.pending.mtime != pending.mtime);
            }
        }
        flushed
    }

    fn write_pending(&self, file: FileId, pending: Pending) -> Result<(), Errno> {
        if let Some(size) = pending.size
            && let Some(known) = self.fs.logical_size(file)?
            && known < size
        {
            self.fs.set_logical_size(file, size)?;
        }
        if let Some(mtime) = pending.mtime {
            let now = self.fs.attr(file)?.mtime.unwrap_or_default();
            if (now.s, now.ns) < (mtime.s, mtime.ns) {
                self.fs.setattr(file, &SetAttr { mtime: Some(mtime), ..SetAttr::default() })?;
            }
        }
        Ok(())
    }

    /// Attributes as of now for a node that itself overlays what it has written: everybody else who may have
    /// written is asked first.
    pub(crate) async fn fresh_attr(&self, file: FileId, node: Option<NodeId>) -> Result<Attr, Errno> {
        self.freshen(file, node).await?;
        self.fs.attr(file)
    }

    /// Makes sure that the file system knows what writers other than `except` know.
    pub(crate) async fn freshen(&self, file: FileId, except: Option<NodeId>) -> Result<(), Errno> {
        if !self.core.lock().files.contains_key(&file) {
            return Ok(());
        }
        self.query_writers(file, except).await;
        self.flush(file).await
    }

    /// The logical size, with everything that holders told so far.
    pub(crate) async fn size(&self, file: FileId) -> Result<u64, Errno> {
        self.flush(file).await?;
        Ok(self.fs.attr(file)?.size)
    }

    /// If another node than `node` holds the end-of-file right, takes it back and settles the file.
    pub(crate) async fn quiet_tail(&self, file: FileId, node: NodeId) -> Result<(), Errno> {
        let other =
            self.core.lock().files.get(&file).and_then(|state| state.eof).filter(|eof| eof.node != node);
        if let Some(eof) = other {
            let _guard = self.guard(file, ByteRange::new(eof.start, u64::MAX), None, false).await?;
            let lock = self.exclusive(file).await;
            self.settle_locked(&lock, file)?;
        }
        Ok(())
    }

    /// Takes everything of a file back and settles it.
    pub(crate) async fn reclaim_file(&self, file: FileId) {
        let Ok(_guard) = self.guard(file, ByteRange::ALL, None, false).await else { return };
        let lock = self.exclusive(file).await;
        if let Err(errno) = self.settle_locked(&lock, file)
            && errno != Errno::STALE
        {
            self.event("settle", format!("cutting file {file} to its logical size failed: {errno}"));
        }
    }

    /// The block of the file system (or the page, when that is larger) in which `offset` lies.
    pub(crate) fn block_floor(&self, offset: u64) -> u64 {
        offset & !(self.align() - 1)
    }

    pub(crate) fn block_ceil(&self, offset: u64) -> u64 {
        offset.checked_next_multiple_of(self.align()).unwrap_or(u64::MAX)
    }

    /// What the coordinator's own I/O is rounded out to: its page cache works in pages, the file system in blocks.
    pub(crate) fn align(&self) -> u64 {
        self.fs.align()
    }
}
