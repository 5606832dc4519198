//! `LayoutGet`: allocating, mapping and granting.
//!
//! What is lent for writing is written space: holes and unwritten pieces are filled with zeros first, under a guard, so
//! that nobody goes on reading zeros from an older map. That goes for the node that asks too: its grant may turn out
//! smaller than what was filled, and then another node may write where its map still says zeros. Before a grant the page
//! cache of the file is proven empty. A file that changes under a get is looked at again, a bounded number of times.

use crate::calls::{Answer, Call, Done, Fail};
use crate::coordinator::Coordinator;
use crate::hidden::MapError;
use crate::layouts::{Exclusive, access_of};
use crate::state::{Eof, Plan};
use csv_layout::{Access, Extent};
use csv_proto::{Attr, LayoutGet, Redirect, reply};
use csv_types::{ByteRange, FileId, NodeId};
use rustix::io::Errno;

/// A get looks at its file again this often when the file changed meanwhile.
const TRIES_MAX: usize = 16;
/// A grant covers no more than this, and no more extents.
const GRANT_BYTES_MAX: u64 = 1 << 30;
const GRANT_EXTENTS_MAX: usize = 2048;
/// Space is allocated in chunks between these, growing with the writer's hint.
const CHUNK_BYTES_MIN: u64 = 1 << 20;
const CHUNK_BYTES_MAX: u64 = 64 << 20;
const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
struct Want {
    file: FileId,
    offset: u64,
    end: u64,
    access: Access,
    extend: bool,
    chunk: u64,
}

/// How a try ended.
enum Tried {
    Granted,
    Again,
    Redirect(&'static str),
    BehindEnd(Attr),
}

/// What mapping came to.
enum Mapped {
    Plan(ByteRange, Plan),
    Again,
    Redirect(&'static str),
}

impl Coordinator {
    pub(crate) async fn layout_get(&self, call: &Call, get: LayoutGet) -> Result<Done, Fail> {
        let file = csv_proto::file_id(get.file)?;
        let access = if get.extend { Access::Exclusive } else { access_of(get.access)? };
        let end = get.offset.checked_add(get.len.clamp(1, GRANT_BYTES_MAX)).ok_or(Errno::FBIG)?;
        if end > i64::MAX.cast_unsigned() {
            return Err(Errno::FBIG.into());
        }
        let chunk = get.want_ahead_bytes.clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX).next_power_of_two();
        let want = Want { file, offset: get.offset, end, access, extend: get.extend, chunk };
        let done = self.get_until_it_stays(call, want).await;
        if want.extend && !matches!(done, Ok(Done::Sent)) {
            self.settle_unlent(file);
        }
        done
    }

    async fn get_until_it_stays(&self, call: &Call, want: Want) -> Result<Done, Fail> {
        for _ in 0..TRIES_MAX {
            let order = self.core.lock().mode_order(call.at.node);
            if order.maintenance {
                self.maintenance_over().await;
            }
            if order.fs_redirected {
                return Ok(redirect("UserRequest", false));
            }
            match self.try_get(call, want).await? {
                Tried::Granted => return Ok(Done::Sent),
                Tried::Again => {}
                Tried::Redirect(reason) => return Ok(redirect(reason, true)),
                Tried::BehindEnd(attr) => {
                    let reason =
                        format!("the range starts at or behind the end of the file ({} bytes)", attr.size);
                    let body = Some(reply::Body::Attr(attr));
                    return Ok(Answer {
                        errno: Errno::NXIO.raw_os_error(),
                        reason,
                        body,
                        ..Answer::default()
                    }
                    .into());
                }
            }
        }
        Err(Fail::new(Errno::AGAIN, "the file kept changing while it was mapped; try again"))
    }

    async fn try_get(&self, call: &Call, want: Want) -> Result<Tried, Fail> {
        let node = call.at.node;
        let (mine, tail) = match self.core.lock().files.get(&want.file).and_then(|state| state.eof) {
            Some(eof) => (eof.node == node, Some(eof)),
            None => (false, None),
        };
        if tail.is_some_and(|eof| !mine && (want.extend || want.end > eof.start)) {
            self.quiet_tail(want.file, node).await?;
        }
        self.flush(want.file).await?;
        let attr = self.fs.attr(want.file)?;
        if attr.mode & S_IFMT != S_IFREG {
            return Err(Fail::new(Errno::INVAL, "only regular files have layouts"));
        }
        let asked = if want.extend {
            ByteRange::new(self.block_floor(want.offset).min(self.block_floor(attr.size)), u64::MAX)
        } else {
            let end = self.end_for(want.file, node, attr.size);
            if want.offset >= end {
                return Ok(Tried::BehindEnd(attr));
            }
            self.rounded(ByteRange::new(want.offset, want.end.min(end)), want.access, end)
        };
        if want.access != Access::Read && !want.extend {
            match self.fill(node, want, asked).await {
                Err(MapError::NotLendable(reason)) => return Ok(Tried::Redirect(reason)),
                other => other?,
            }
        }
        if want.extend {
            self.round_tail(want.file).await?;
        }
        let get = self.get(call.at, want.file, asked, want.access).await?;
        if want.access != Access::Read {
            self.take_attr_leases(want.file, node).await;
        }
        let lock = self.exclusive(want.file).await;
        match self.map_get(&lock, want, asked, get.limit, node)? {
            Mapped::Again => Ok(Tried::Again),
            Mapped::Redirect(reason) => Ok(Tried::Redirect(reason)),
            Mapped::Plan(range, plan) => {
                self.block_idle(want.file, range, node).await;
                Ok(if self.grant(get, range, plan) { Tried::Granted } else { Tried::Again })
            }
        }
    }

    /// Where grants to a node end: the one with the end-of-file right may have written behind the size that is known.
    fn end_for(&self, file: FileId, node: NodeId, size: u64) -> u64 {
        let eof = self.core.lock().files.get(&file).and_then(|state| state.eof);
        eof.filter(|eof| eof.node == node).map_or(size, |eof| eof.alloc_end.max(size))
    }

    /// An exclusive range is made of whole blocks, because it is for writes that are not; others end with the file.
    fn rounded(&self, range: ByteRange, access: Access, size: u64) -> ByteRange {
        let whole = range.align_out(self.align());
        if access == Access::Exclusive { whole } else { ByteRange::new(whole.start, whole.end.min(size)) }
    }

    /// Fills the holes of a range that is to be lent for writing, and some around it.
    async fn fill(&self, node: NodeId, want: Want, asked: ByteRange) -> Result<(), MapError> {
        if self.holes(want.file, asked)?.is_empty() {
            return Ok(());
        }
        let inside = |size| ByteRange::new(0, self.block_ceil(self.end_for(want.file, node, size)));
        let chunk = asked.align_out(want.chunk).intersect(&inside(self.fs.attr(want.file)?.size));
        let _guard = self.guard(want.file, chunk, None, false).await?;
        let lock = self.exclusive(want.file).await;
        self.flush_locked(&lock, want.file)?;
        self.ensure_clean(want.file)?;
        let size_now = self.fs.attr(want.file)?.size;
        let chunk = chunk.intersect(&inside(size_now));
        let asked = asked.intersect(&chunk);
        match self.write_holes(&lock, want.file, chunk, size_now) {
            Err(MapError::Errno(Errno::NOSPC | Errno::DQUOT)) => {
                self.write_holes(&lock, want.file, asked, size_now)
            }
            other => other,
        }
    }

    /// Before the end of a file is lent, the size on disk becomes a whole number of blocks. When it moves from inside a
    /// block, the file system zeroes the rest of that block and writes all of it, through the page cache: nobody may
    /// write there meanwhile, not even the node that asks (a write of one sector of it may be under way), and no page may
    /// be left.
    async fn round_tail(&self, file: FileId) -> Result<(), Errno> {
        if self.fs.size_is_whole(file)? {
            return Ok(());
        }
        let size = self.fs.attr(file)?.size;
        let tail = ByteRange::new(self.block_floor(size), u64::MAX);
        let _guard = self.guard(file, tail, None, false).await?;
        let lock = self.exclusive(file).await;
        self.settle_locked(&lock, file)?;
        let size = self.fs.attr(file)?.size;
        let last = ByteRange::new(self.block_floor(size), self.block_ceil(size));
        // Outside the guard, or whole by now: the get looks again.
        if !tail.contains(&last) || last.is_empty() {
            return Ok(());
        }
        self.core.lock().file(file).cache_clean = false;
        self.fs.set_logical_size(file, size)?;
        self.fs.make_written(file, last)?;
        self.ensure_clean(file)
    }

    /// A get of the end of a file failed: what was made ready for it goes, unless somebody has the right.
    fn settle_unlent(&self, file: FileId) {
        let core = &mut *self.core.lock();
        if core.file(file).eof.is_none() {
            core.file(file).settle = true;
        }
        self.look_after(core, file);
    }

    /// Pieces of a range that are not written, in whole blocks.
    fn holes(&self, file: FileId, range: ByteRange) -> Result<Vec<ByteRange>, MapError> {
        let extents = self.fs.map(file, range.align_out(self.align()))?;
        let holes = extents.iter().filter(|extent| extent.lun_offset.is_none());
        Ok(holes.map(|extent| ByteRange::at(extent.file_offset, extent.len)).collect())
    }

    /// Makes the holes of a range written. A hole that reaches behind the end of the file makes the size on disk run
    /// ahead, so it goes through the journal.
    fn write_holes(
        &self,
        lock: &Exclusive,
        file: FileId,
        range: ByteRange,
        size: u64,
    ) -> Result<(), MapError> {
        for hole in self.holes(file, range)? {
            if hole.end <= size {
                self.fs.make_written(file, hole)?;
                continue;
            }
            let journaled = self.fs.logical_size(file)?.is_some();
            if !journaled {
                self.fs.set_logical_size(file, size)?;
            }
            let written = self.fs.make_written(file, hole);
            self.settle_locked(lock, file)?;
            self.ensure_clean(file)?;
            written?;
        }
        Ok(())
    }

    /// With the file's lock held: no page of the file is in the page cache.
    fn ensure_clean(&self, file: FileId) -> Result<(), Errno> {
        if self.core.lock().file(file).cache_clean {
            return Ok(());
        }
        self.fs.drop_cache(file)?;
        self.core.lock().file(file).cache_clean = true;
        Ok(())
    }

    /// The get has the range; what of it, and around it, is granted.
    fn map_get(
        &self,
        lock: &Exclusive,
        want: Want,
        asked: ByteRange,
        limit: ByteRange,
        node: NodeId,
    ) -> Result<Mapped, Fail> {
        self.flush_locked(lock, want.file)?;
        self.ensure_clean(want.file)?;
        let Attr { size, nlink, .. } = self.fs.attr(want.file)?;
        let orphan = self.core.lock().files.get(&want.file).is_some_and(|state| state.unlinked);
        if nlink == 0 && !orphan {
            return Err(Fail::new(Errno::STALE, "the file was removed meanwhile"));
        }
        let mapped = if want.extend {
            self.map_tail(want, asked, limit, size, node)
        } else {
            self.map_inside(want, asked, limit, size, node)
        };
        match mapped {
            Ok(mapped) => Ok(mapped),
            Err(MapError::NotLendable(reason)) => Ok(Mapped::Redirect(reason)),
            Err(MapError::Errno(errno)) => Err(errno.into()),
        }
    }

    fn map_inside(
        &self,
        want: Want,
        asked: ByteRange,
        limit: ByteRange,
        size: u64,
        node: NodeId,
    ) -> Result<Mapped, MapError> {
        let end = self.end_for(want.file, node, size);
        if want.offset >= end {
            return Ok(Mapped::Again);
        }
        let end = if want.access == Access::Exclusive { self.block_ceil(end) } else { end };
        let inside = ByteRange::new(0, end);
        let asked = asked.intersect(&inside);
        if want.access != Access::Read && !self.holes(want.file, asked)?.is_empty() {
            return Ok(Mapped::Again);
        }
        let window = around(asked, limit.intersect(&inside));
        let extents = match self.fs.map(want.file, window) {
            Err(MapError::NotLendable(_)) if window != asked => self.fs.map(want.file, asked)?,
            other => other?,
        };
        let extents = trim(extents, want.offset);
        let range = hull(&extents);
        Ok(Mapped::Plan(range, Plan { extents, size, eof: None }))
    }

    /// The end-of-file right: the size is journaled, then space behind it is made, then it is granted.
    fn map_tail(
        &self,
        want: Want,
        asked: ByteRange,
        limit: ByteRange,
        size: u64,
        node: NodeId,
    ) -> Result<Mapped, MapError> {
        if asked.start > self.block_floor(size) || !self.fs.size_is_whole(want.file)? {
            return Ok(Mapped::Again);
        }
        if self.fs.logical_size(want.file)?.is_none() {
            self.fs.set_logical_size(want.file, size)?;
        }
        let need = self.block_ceil(want.end.max(size));
        let ahead = self.chunk_that_fits(want.chunk);
        let from = self.block_floor(want.offset);
        let old = self.core.lock().files.get(&want.file).and_then(|state| state.eof);
        let mut alloc_end = chunk_end(need, self.block_ceil(need.saturating_add(ahead)));
        let mut made = self.fs.make_written(want.file, ByteRange::new(from, alloc_end));
        if matches!(made, Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) && alloc_end > need {
            alloc_end = need;
            made = self.fs.make_written(want.file, ByteRange::new(from, alloc_end));
        }
        made?;
        let alloc_end = old.map_or(alloc_end, |old| old.alloc_end.max(alloc_end));
        let window =
            around(ByteRange::new(asked.start, alloc_end), limit.intersect(&ByteRange::new(0, alloc_end)));
        let extents = self.fs.map(want.file, window)?;
        let extents = if extents.len() > GRANT_EXTENTS_MAX {
            // From the request on there is all of it; the rest is asked for when it is needed.
            let near = ByteRange::new(from.max(asked.start), alloc_end);
            self.fs.map(want.file, near)?
        } else {
            extents
        };
        let start = hull(&extents).start.min(asked.start);
        let eof = Eof { node, start: asked.start, alloc_end };
        Ok(Mapped::Plan(ByteRange::new(start, u64::MAX), Plan { extents, size, eof: Some(eof) }))
    }

    /// Less is allocated ahead when the volume is nearly full.
    fn chunk_that_fits(&self, chunk: u64) -> u64 {
        let free = self.fs.statfs().map_or(0, |stat| stat.bavail.saturating_mul(stat.frsize.into()));
        chunk.min(free / 8)
    }
}

/// Where a chunk ends that reaches about to `end`: on a whole MiB, so that the next one continues it on the disk.
fn chunk_end(need: u64, end: u64) -> u64 {
    let whole = end & !(CHUNK_BYTES_MIN - 1);
    if whole > need { whole } else { end }
}

/// `asked` and what lies around it in `limit`: all of that when it is not too much, else a part of it.
fn around(asked: ByteRange, limit: ByteRange) -> ByteRange {
    if limit.len() <= GRANT_BYTES_MAX {
        return ByteRange::new(limit.start.min(asked.start), limit.end.max(asked.end));
    }
    let near = asked.align_out(GRANT_BYTES_MAX).intersect(&limit);
    ByteRange::new(near.start.min(asked.start), near.end.max(asked.end))
}

/// So many extents as a grant may have, the one with `offset` among them.
fn trim(extents: Vec<Extent>, offset: u64) -> Vec<Extent> {
    if extents.len() <= GRANT_EXTENTS_MAX {
        return extents;
    }
    let at = extents.partition_point(|extent| extent.end() <= offset);
    let from = at.saturating_sub(GRANT_EXTENTS_MAX / 4);
    extents.into_iter().skip(from).take(GRANT_EXTENTS_MAX).collect()
}

/// From the first extent's start to the last one's end.
fn hull(extents: &[Extent]) -> ByteRange {
    let start = extents.first().map_or(0, |extent| extent.file_offset);
    ByteRange::new(start, extents.last().map_or(start, Extent::end))
}

fn redirect(reason: &str, permanent: bool) -> Done {
    let body = Some(reply::Body::Redirect(Redirect { reason: reason.to_owned(), permanent }));
    Answer { reason: reason.to_owned(), body, ..Answer::default() }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_of_a_huge_range_stays_near_the_request() {
        let limit = ByteRange::new(0, 10 << 30);
        let got = around(ByteRange::new(5 << 30, (5 << 30) + 4096), limit);
        assert_eq!(got, ByteRange::new(5 << 30, 6 << 30));
        assert_eq!(around(ByteRange::new(0, 1), ByteRange::new(0, 1 << 20)), ByteRange::new(0, 1 << 20));
    }

    #[test]
    fn chunks_end_on_whole_mib() {
        const MIB: u64 = 1 << 20;
        assert_eq!(chunk_end(4096, MIB + 4096), MIB);
        assert_eq!(chunk_end(8 * MIB + 4096, 72 * MIB + 4096), 72 * MIB);
        assert_eq!(chunk_end(4096, 8192), 8192, "a nearly full volume");
    }

    #[test]
    fn trimming_keeps_the_requested_extent() {
        let extents: Vec<Extent> =
            (0..10_000).map(|i| Extent { file_offset: i * 10, len: 10, lun_offset: None }).collect();
        let kept = trim(extents, 55_555);
        assert_eq!(kept.len(), GRANT_EXTENTS_MAX);
        assert!(hull(&kept).contains(&ByteRange::at(55_555, 1)));
    }
}
