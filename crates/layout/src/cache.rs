//! Client side: what this node holds of one file. The owner wraps it in a mutex; `begin_*` and `end` surround
//! every I/O that goes to the LUN by file offset.
//!
//! Invariants
//! * I/O begins only on bytes whose rights are held and not recalled. Rights go away at once when a recall comes;
//!   the recall is answered when the I/O that was begun before it has ended.
//! * A grant that was recalled, given up or revoked never comes to life again, however late or often its message
//!   arrives. A recall is answered as often as it comes.
//! * Ignoring or forgetting a grant is always safe: the table then believes too much until it asks.
//! * Two writes of which one is a read-modify-write never run at once on a common block.
//! * The end-of-file right is given up as a whole, together with every byte from the block of the end on, and only
//!   after every write that could still move the end.
//!
//! What the owner sees to
//! * The lease is alive when an I/O begins, and messages of an earlier session are thrown away.
//! * The I/O that waits for a grant begins under the same lock under which the grant is put in. Otherwise two
//!   nodes that want the same bytes can take them from each other without either getting to its I/O.
//! * A cache that `is_empty` may be dropped only while no get for the file is under way: its memory of what was
//!   recalled goes with it.
//!
//! For the coordinator: a return that goes to `u64::MAX` with `up_to_seq` of the grant of the end-of-file right or
//! more gives that right back. Its `size` counts only while that node has the right, for a doubled return repeats
//! an old size; without one the grant never arrived and the size is as it was. A grant with the right is not sent
//! while a recall of that node's right is unanswered, because its size would be out of date. Sizes need the returns
//! and gets of one node in the order in which they were sent; rights do not. When a coordinator dies, the owner
//! commits a returned size again at the next one, calls `forget_recalls` and reclaims what `held` tells.

mod flight;
mod held;
mod map;
mod tombs;

pub use flight::{IO_MAX, IoToken};
pub use held::HeldGrant;

use crate::mutation::{Mutant, Mutation};
use crate::{Access, Extent};
use csv_types::{ByteRange, FS_BLOCK_BYTES, LunOffset};
use flight::{Flight, IoKind};
use map::Map;
use tombs::Tombs;

/// Recalls that may wait for I/O at once. Further ones take effect but are answered only when sent again.
pub const RECALLS_MAX: usize = 1024;
/// Pieces held apart; beyond that all but the newest grant are forgotten.
pub const PIECES_MAX: usize = 1 << 16;

/// Where a part of an I/O lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Byte offset in the file.
    pub file_offset: u64,
    /// Bytes, never 0.
    pub len: u64,
    /// Exact place on the LUN, not aligned; `None` reads as zeros.
    pub lun_offset: Option<LunOffset>,
}

/// May the I/O go to the LUN?
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Yes; the segments say where.
    Hit(IoToken),
    /// Yes, by reading, changing and writing whole LUN blocks; the segments name the exact bytes.
    HitRmw(IoToken),
    /// Not held: get a layout first.
    Miss,
    /// Held, but another write touches the same blocks, or too much is in flight: try again when some I/O ended.
    Busy,
}

/// The right to move the end of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EofRight {
    /// Logical size of the file, in bytes.
    pub size: u64,
    /// Space up to here is allocated and written, and may be written without asking again.
    pub alloc_end: u64,
    /// `size` grew since it was granted or committed. Not looked at in a grant.
    pub dirty: bool,
}

/// Send this to the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Return {
    /// The recall answered; 0 for none.
    pub recall_id: u64,
    /// Given up. Larger than what was recalled when the end-of-file right goes with it.
    pub range: ByteRange,
    /// Every grant up to and with this is gone in the range (shrunk to read for a `keep_read` recall).
    pub up_to_seq: u64,
    /// Final size, when the end-of-file right goes back.
    pub size: Option<u64>,
    /// The coordinator was not told that size by a commit.
    pub size_dirty: bool,
    /// Data was written since the last `take_wrote` or return: the modification time must go along.
    pub wrote: bool,
}

#[derive(Debug, Clone, Copy)]
struct Eof {
    seq: u64,
    right: EofRight,
}

#[derive(Debug, Clone, Copy)]
struct Recalled {
    recall_id: u64,
    /// What to return; I/O that overlaps must end first.
    range: ByteRange,
    up_to_seq: u64,
    keep_read: bool,
    with_eof: bool,
    /// I/O begun later is under rights that this recall does not touch.
    before_order: u64,
}

/// What this node holds of one file. See the module's text.
#[derive(Debug, Default)]
pub struct LayoutCache {
    map: Map,
    flight: Flight,
    tombs: Tombs,
    eof: Option<Eof>,
    /// Recalled; moved by writes in flight until the recall is answered.
    eof_leaving: Option<Eof>,
    /// Given up, with the `up_to_seq` of the recall that took it; kept to answer that recall again. A later recall
    /// may mean a newer right, of which nothing is known here.
    eof_left: Option<(Eof, u64)>,
    recalls: Vec<Recalled>,
    /// Newest grant seen.
    seq_seen: u64,
    /// Logical size when this node last heard it with a grant. Without the end-of-file right nothing that ends
    /// behind it may begin: a grant of whole blocks reaches past it. `None`: the grants speak for themselves.
    size_limit: Option<u64>,
    wrote: bool,
    pub(crate) mutation: Mutation,
}

/// All that must be given up with the right to move an end of file at `size`: its last block is written as a whole.
fn eof_range(size: u64) -> ByteRange {
    ByteRange::new(size & !(FS_BLOCK_BYTES - 1), u64::MAX)
}

impl LayoutCache {
    /// Nothing held.
    #[must_use]
    pub fn new() -> Self {
        LayoutCache::default()
    }

    /// Begins a read. `out` gets the segments of the part of `range` in front of the end of file, as
    /// `readable_len` tells it.
    #[inline]
    pub fn begin_read(&mut self, range: ByteRange, out: &mut Vec<Segment>) -> Outcome {
        out.clear();
        let range = self.readable(range);
        if self.is_behind_end(range) || !self.map.segments(range, Access::Read, false, out) {
            out.clear();
            return Outcome::Miss;
        }
        self.flight.begin(range, range.end, IoKind::Read).map_or(Outcome::Busy, Outcome::Hit)
    }

    /// Begins a write. `block`, in bytes, a power of two: what is no whole number of these needs the range exclusively.
    #[inline]
    pub fn begin_write(&mut self, range: ByteRange, block: u64, out: &mut Vec<Segment>) -> Outcome {
        out.clear();
        if self.is_behind_end(range) {
            return Outcome::Miss;
        }
        let blocks = if range.is_empty() { range } else { range.align_out(block) };
        let (kind, need) =
            if blocks == range { (IoKind::Write, Access::Write) } else { (IoKind::Rmw, Access::Exclusive) };
        let held = match kind {
            // The blocks around the exact bytes are read and written too, so they must be held and on the LUN.
            IoKind::Rmw => self.map.segments(blocks, need, true, out),
            IoKind::Read | IoKind::Write => true,
        };
        out.clear();
        if !held || !self.map.segments(range, need, true, out) {
            out.clear();
            return Outcome::Miss;
        }
        if self.flight.collides(blocks, kind) {
            out.clear();
            return Outcome::Busy;
        }
        let end = if range.is_empty() { 0 } else { range.end };
        match (self.flight.begin(blocks, end, kind), kind) {
            (Some(token), IoKind::Rmw) => Outcome::HitRmw(token),
            (Some(token), IoKind::Read | IoKind::Write) => Outcome::Hit(token),
            (None, _) => Outcome::Busy,
        }
    }

    /// An I/O is over. `wrote`: it was a write and it succeeded (a failed one does not move the end of file).
    #[inline]
    #[expect(clippy::needless_pass_by_value, reason = "an I/O ends once: its token is used up")]
    pub fn end(&mut self, token: IoToken, wrote: bool, out: &mut Vec<Return>) {
        let Some(io) = self.flight.end(&token) else { return };
        if wrote && io.kind != IoKind::Read {
            self.wrote = true;
            if let Some(eof) = self.eof.as_mut().or(self.eof_leaving.as_mut())
                && io.end > eof.right.size
            {
                eof.right.size = io.end;
                eof.right.dirty = true;
            }
        }
        if !self.recalls.is_empty() {
            self.answer(out);
        }
    }

    /// A grant arrived. With `eof` its range goes to `u64::MAX`. While the right is held already, the size known
    /// here stays: it is newer than the coordinator's.
    pub fn granted(
        &mut self,
        seq: u64,
        range: ByteRange,
        access: Access,
        extents: &[Extent],
        eof: Option<EofRight>,
    ) {
        self.seq_seen = seq.max(self.seq_seen);
        let mut range = range;
        if let Some(right) = eof {
            let all = eof_range(right.size);
            if self.mutation.is(Mutant::CacheIgnoresTombstones) || self.tombs.alive(all, seq) == [all] {
                self.granted_eof(seq, right);
            } else {
                // The right was recalled already; without it nothing behind the end may be held.
                range = ByteRange::new(range.start, range.end.min(all.start));
            }
        }
        if self.map.len() + 2 * extents.len() >= PIECES_MAX {
            let end = self.eof.or(self.eof_leaving).map(|eof| eof_range(eof.right.size));
            let keep = end.map_or(range, |end| ByteRange::new(end.start.min(range.start), u64::MAX));
            self.map.keep_only(keep);
        }
        if self.mutation.is(Mutant::CacheIgnoresTombstones) {
            self.map.add(range, seq, access, extents);
            return;
        }
        for part in self.tombs.alive(range, seq) {
            self.map.add(part, seq, access, extents);
        }
    }

    /// A recall arrived: nothing more begins in the range under grants up to and with `up_to_seq`. It is answered
    /// at once or when what is in flight there has ended.
    pub fn recalled(
        &mut self,
        recall_id: u64,
        range: ByteRange,
        up_to_seq: u64,
        keep_read: bool,
        out: &mut Vec<Return>,
    ) {
        // The sequence number tells apart recalls of two coordinators, which both count from the beginning.
        let doubled = |recall: &Recalled| (recall.recall_id, recall.up_to_seq) == (recall_id, up_to_seq);
        if recall_id != 0 && self.recalls.iter().any(doubled) {
            return;
        }
        let touched = |eof: &Eof| eof.seq <= up_to_seq && eof_range(eof.right.size).overlaps(&range);
        let mut range = range;
        let mut with_eof = self.eof_left.as_ref().is_some_and(|(eof, _)| touched(eof));
        if let Some(eof) = self.eof.or(self.eof_leaving).filter(|eof| touched(eof)) {
            let all = eof_range(eof.right.size);
            if !self.mutation.is(Mutant::CacheLosesSize) {
                range = ByteRange::new(range.start.min(all.start), u64::MAX);
            }
            self.map.take(all, up_to_seq, false);
            self.size_limit = Some(eof.right.size);
            self.eof = None;
            self.eof_leaving = Some(eof);
            with_eof = true;
        }
        self.tombs.bury(range, up_to_seq);
        self.map.take(range, up_to_seq, keep_read);
        if self.recalls.len() < RECALLS_MAX {
            let before_order = self.flight.order();
            self.recalls.push(Recalled { recall_id, range, up_to_seq, keep_read, with_eof, before_order });
        }
        self.answer(out);
    }

    /// Gives a range up without being asked. The return comes as for a recall.
    pub fn give_back(&mut self, range: ByteRange, out: &mut Vec<Return>) {
        self.recalled(0, range, self.seq_seen, false, out);
    }

    /// Everything was revoked: new I/O misses at once; `out` gets a `Return` of everything (now or from `end`)
    /// when nothing is in flight any more. The session is over, so it need not be sent.
    pub fn invalidate_all(&mut self, out: &mut Vec<Return>) {
        self.give_back(ByteRange::ALL, out);
    }

    /// The end-of-file right, if held and not recalled.
    #[must_use]
    pub fn eof(&self) -> Option<EofRight> {
        self.eof.map(|eof| eof.right)
    }

    /// The coordinator made `size` durable.
    pub fn size_committed(&mut self, size: u64) {
        if let Some(eof) = self.eof.as_mut().or(self.eof_leaving.as_mut())
            && eof.right.size == size
        {
            eof.right.dirty = false;
        }
    }

    /// How many bytes of `range` lie in front of the end of file, where this node is the one that knows it;
    /// otherwise all, and the caller cuts by the size in the attributes.
    #[must_use]
    pub fn readable_len(&self, range: ByteRange) -> u64 {
        self.readable(range).len()
    }

    /// Did some write complete since the last time? Then the modification time must be committed.
    pub fn take_wrote(&mut self) -> bool {
        std::mem::take(&mut self.wrote)
    }

    /// Is all of the range held with at least this access?
    #[must_use]
    pub fn covers(&self, range: ByteRange, access: Access) -> bool {
        let mut segments = Vec::new();
        self.map.segments(range, access, false, &mut segments)
    }

    /// I/O begun and not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flight.len()
    }

    /// Nothing held, nothing in flight, no recall unanswered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let eof = self.eof.is_some() || self.eof_leaving.is_some();
        self.map.is_empty() && self.flight.len() == 0 && self.recalls.is_empty() && !eof
    }

    /// The file's size as the newest grant without the end-of-file right told it. It holds until the next one: the
    /// end cannot come nearer without a recall, and behind it nothing is done without asking again.
    pub fn set_size_limit(&mut self, size: u64) {
        self.size_limit = Some(size);
    }

    #[inline]
    fn is_behind_end(&self, range: ByteRange) -> bool {
        self.eof.is_none() && self.size_limit.is_some_and(|size| range.end > size)
    }

    #[inline]
    fn readable(&self, range: ByteRange) -> ByteRange {
        match self.eof.or(self.eof_leaving) {
            Some(eof) => ByteRange::new(range.start, range.end.min(eof.right.size)),
            None => range,
        }
    }

    fn granted_eof(&mut self, seq: u64, right: EofRight) {
        let mut eof = Eof { seq, right: EofRight { dirty: false, ..right } };
        if let Some(mine) = self.eof.or(self.eof_leaving) {
            eof.right.size = mine.right.size;
            eof.right.dirty = mine.right.dirty;
            if mine.seq > seq {
                eof.seq = mine.seq;
                eof.right.alloc_end = mine.right.alloc_end;
            }
        }
        self.eof = Some(eof);
        self.eof_leaving = None;
        self.eof_left = None;
    }

    /// Answers the recalls that nothing in flight holds up any more.
    fn answer(&mut self, out: &mut Vec<Return>) {
        let recalls = std::mem::take(&mut self.recalls);
        for recall in recalls {
            let holds_up = self.flight.iter().any(|io| {
                io.order < recall.before_order
                    && io.range.overlaps(&recall.range)
                    && !(recall.keep_read && io.kind == IoKind::Read)
            });
            if holds_up && !self.mutation.is(Mutant::CacheReturnsEarly) {
                self.recalls.push(recall);
                continue;
            }
            let (mut size, mut size_dirty) = (None, false);
            if recall.with_eof {
                let named = |eof: &Eof| eof.seq <= recall.up_to_seq;
                if let Some(eof) = self.eof_leaving.take_if(|eof| named(eof)) {
                    self.eof_left = Some((eof, recall.up_to_seq));
                }
                let left = self.eof_left.filter(|(eof, by)| named(eof) && recall.up_to_seq <= *by);
                size = left.map(|(eof, _)| eof.right.size);
                size_dirty = left.is_some_and(|(eof, _)| eof.right.dirty);
            }
            let Recalled { recall_id, range, up_to_seq, .. } = recall;
            out.push(Return { recall_id, range, up_to_seq, size, size_dirty, wrote: self.take_wrote() });
        }
    }
}

#[cfg(test)]
impl LayoutCache {
    /// The strongest access under which an I/O on this byte could begin now.
    pub(crate) fn access_at(&self, byte: u64) -> Option<Access> {
        let byte = ByteRange::at(byte, 1);
        [Access::Exclusive, Access::Write, Access::Read]
            .into_iter()
            .find(|&access| self.map.allows(byte, access))
    }
}

#[cfg(test)]
mod tests;
