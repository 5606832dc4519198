//! I/O that was begun and has not ended: a slab, so that begin and end neither allocate nor search.

use csv_types::ByteRange;

/// I/O of one file in flight at once; more is `Outcome::Busy`.
pub const IO_MAX: usize = 4096;

/// One I/O in flight. Give it to [`super::LayoutCache::end`] of the same cache, whatever became of the I/O;
/// one that is dropped instead blocks recalls until the node is fenced.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "an I/O that is never ended blocks recalls"]
pub struct IoToken {
    slot: usize,
}

/// What is known of an I/O in flight.
#[derive(Debug, Clone, Copy)]
pub(super) struct Io {
    /// Bytes that it touches on the LUN: for writes grown to whole blocks.
    pub(super) range: ByteRange,
    /// End of the bytes asked for.
    pub(super) end: u64,
    pub(super) kind: IoKind,
    /// Grows with every begin.
    pub(super) order: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IoKind {
    Read,
    Write,
    /// Read, modify, write of whole blocks.
    Rmw,
}

#[derive(Debug, Default)]
pub(super) struct Flight {
    slots: Vec<Option<Io>>,
    free: Vec<usize>,
    rmws: usize,
    order: u64,
}

impl Flight {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Io> {
        self.slots.iter().flatten()
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Number that all I/O begun so far stays below.
    pub(super) fn order(&self) -> u64 {
        self.order
    }

    /// Must this write wait for another, lest a read-modify-write put old bytes back?
    #[inline]
    pub(super) fn collides(&self, range: ByteRange, kind: IoKind) -> bool {
        match kind {
            IoKind::Read => false,
            IoKind::Write => {
                self.rmws != 0 && self.iter().any(|io| io.kind == IoKind::Rmw && io.range.overlaps(&range))
            }
            IoKind::Rmw => self.iter().any(|io| io.kind != IoKind::Read && io.range.overlaps(&range)),
        }
    }

    /// `None` when too much is in flight.
    #[inline]
    pub(super) fn begin(&mut self, range: ByteRange, end: u64, kind: IoKind) -> Option<IoToken> {
        let io = Some(Io { range, end, kind, order: self.order });
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = io;
                slot
            }
            None if self.slots.len() < IO_MAX => {
                self.slots.push(io);
                self.slots.len() - 1
            }
            None => return None,
        };
        self.order += 1;
        self.rmws += usize::from(kind == IoKind::Rmw);
        Some(IoToken { slot })
    }

    /// `None` for a token of another cache.
    #[inline]
    pub(super) fn end(&mut self, token: &IoToken) -> Option<Io> {
        let io = self.slots.get_mut(token.slot)?.take()?;
        self.free.push(token.slot);
        self.rmws -= usize::from(io.kind == IoKind::Rmw);
        Some(io)
    }
}
