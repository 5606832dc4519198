//! The pieces of one file that this node holds: rights and place of every byte, in file order.
//!
//! A sorted vector, because the hot path only searches it; changes are rare and rebuild the part that they touch.
//!
//! Invariants: pieces are not empty, sorted, disjoint, and hold some right.

use super::Segment;
use crate::rights::Rights;
use crate::{Access, Extent};
use csv_types::{ByteRange, LunOffset};

/// Where a piece lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// On the LUN, first byte at this offset.
    Lun(LunOffset),
    /// Nowhere: reads as zeros.
    Zeros,
    /// The grant did not say, as behind the allocated end of a file whose end may be moved.
    Unknown,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) range: ByteRange,
    pub(super) rights: Rights,
    pub(super) place: Place,
    /// Grant that told the place; a newer one knows better (a hole may have been filled).
    place_seq: u64,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Map {
    pieces: Vec<Piece>,
}

impl Place {
    fn moved(self, bytes: u64) -> Place {
        match self {
            Place::Lun(at) => Place::Lun(LunOffset(at.0 + bytes)),
            Place::Zeros | Place::Unknown => self,
        }
    }
}

impl Piece {
    /// The part in `range`, which must overlap.
    fn cut(&self, range: ByteRange) -> Piece {
        let range = self.range.intersect(&range);
        Piece { range, place: self.place.moved(range.start - self.range.start), ..*self }
    }

    /// Does `next` go on where this ends, in all respects?
    fn continues(&self, next: &Piece) -> bool {
        self.range.end == next.range.start
            && self.rights == next.rights
            && self.place_seq == next.place_seq
            && self.place.moved(self.range.len()) == next.place
    }
}

impl Map {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Forgets all pieces that do not overlap `keep`.
    pub(super) fn keep_only(&mut self, keep: ByteRange) {
        self.pieces.retain(|piece| piece.range.overlaps(&keep));
    }

    /// Is at least `need` held on all of `range`?
    #[inline]
    pub(super) fn allows(&self, range: ByteRange, need: Access) -> bool {
        let mut at = range.start;
        for piece in &self.pieces[self.first(range.start)..] {
            if at >= range.end || piece.range.start > at || !piece.rights.allows(need) {
                break;
            }
            at = piece.range.end;
        }
        at >= range.end
    }

    /// Appends the segments of `range`; false when `need` is not held on all of it, a place is not known or, for
    /// `on_lun`, is not on the LUN. `out` is then of no use.
    #[inline]
    pub(super) fn segments(
        &self,
        range: ByteRange,
        need: Access,
        on_lun: bool,
        out: &mut Vec<Segment>,
    ) -> bool {
        let mut at = range.start;
        for piece in &self.pieces[self.first(range.start)..] {
            if at >= range.end {
                break;
            }
            if piece.range.start > at || !piece.rights.allows(need) {
                return false;
            }
            let lun_offset = match piece.place {
                Place::Lun(lun) => Some(LunOffset(lun.0 + (at - piece.range.start))),
                Place::Zeros if !on_lun => None,
                Place::Zeros | Place::Unknown => return false,
            };
            let end = piece.range.end.min(range.end);
            push(out, Segment { file_offset: at, len: end - at, lun_offset });
            at = end;
        }
        at >= range.end
    }

    /// Takes up a grant. `extents` may be in any order and need not fill the range.
    pub(super) fn add(&mut self, range: ByteRange, seq: u64, access: Access, extents: &[Extent]) {
        let mut told: Vec<Extent> = extents.iter().filter(|e| e.len != 0).copied().collect();
        told.sort_by_key(|extent| extent.file_offset);
        self.rebuild(range, |before, at, limit| {
            let extent = told.get(told.partition_point(|extent| extent.end() <= at));
            // Extents that overlap one another would break the search; what it misses then is not known.
            let extent = extent.filter(|extent| extent.end() > at);
            let (place, end) = match extent {
                Some(extent) if extent.file_offset <= at => {
                    let place = extent.lun_offset.map_or(Place::Zeros, Place::Lun);
                    (place.moved(at - extent.file_offset), extent.end())
                }
                Some(extent) => (Place::Unknown, extent.file_offset),
                None => (Place::Unknown, limit),
            };
            let range = ByteRange::new(at, end.min(limit));
            let mut piece = Piece { range, rights: Rights::NONE, place, place_seq: seq };
            if let Some(old) = before {
                piece.rights = old.rights;
                if place == Place::Unknown || (old.place_seq > seq && old.place != Place::Unknown) {
                    (piece.place, piece.place_seq) = (old.place, old.place_seq);
                }
            }
            piece.rights.add(access, seq);
            piece
        });
    }

    /// Gives rights up; see [`Rights::take`].
    pub(super) fn take(&mut self, range: ByteRange, up_to_seq: u64, keep_read: bool) {
        self.rebuild(range, |before, at, limit| {
            let range = ByteRange::new(at, limit);
            let nothing = Piece { range, rights: Rights::NONE, place: Place::Unknown, place_seq: 0 };
            let mut piece = before.copied().unwrap_or(nothing);
            piece.rights.take(up_to_seq, keep_read);
            piece
        });
    }

    /// Index of the first piece that ends behind `at`.
    #[inline]
    fn first(&self, at: u64) -> usize {
        self.pieces.partition_point(|piece| piece.range.end <= at)
    }

    /// Replaces what lies in `range`. `make(before, at, limit)` gives the new piece that starts at `at` and ends
    /// at `limit` or earlier; `before` is what lay at `at..limit`, if anything did.
    fn rebuild(&mut self, range: ByteRange, make: impl Fn(Option<&Piece>, u64, u64) -> Piece) {
        if range.is_empty() {
            return;
        }
        let first = self.first(range.start);
        let last = first + self.pieces[first..].partition_point(|piece| piece.range.start < range.end);
        // One piece more on each side, so that pieces which now continue one another are joined.
        let (from, to) = (first.saturating_sub(1), (last + 1).min(self.pieces.len()));
        let mut fresh: Vec<Piece> = Vec::with_capacity(to - from + 3);
        fresh.extend(&self.pieces[from..first]);
        let old = &self.pieces[first..last];
        if let Some(head) = old.first().filter(|piece| piece.range.start < range.start) {
            fresh.push(head.cut(ByteRange::new(0, range.start)));
        }
        let mut at = range.start;
        while at < range.end {
            let next = old.get(old.partition_point(|piece| piece.range.end <= at));
            let here = next.filter(|piece| piece.range.start <= at);
            let limit = match (here, next) {
                (Some(here), _) => here.range.end,
                (None, Some(next)) => next.range.start,
                (None, None) => range.end,
            };
            let limit = limit.min(range.end);
            let before = here.map(|piece| piece.cut(ByteRange::new(at, limit)));
            let piece = make(before.as_ref(), at, limit);
            at = piece.range.end;
            join(&mut fresh, piece);
        }
        if let Some(tail) = old.last().filter(|piece| piece.range.end > range.end) {
            join(&mut fresh, tail.cut(ByteRange::new(range.end, u64::MAX)));
        }
        for piece in &self.pieces[last..to] {
            join(&mut fresh, *piece);
        }
        self.pieces.splice(from..to, fresh);
    }
}

/// Appends a piece that holds something, joined with the last when it continues that.
fn join(pieces: &mut Vec<Piece>, piece: Piece) {
    if piece.rights.is_none() {
        return;
    }
    match pieces.last_mut() {
        Some(last) if last.continues(&piece) => last.range.end = piece.range.end,
        _ => pieces.push(piece),
    }
}

/// Appends a segment, joined with the last when it goes on where that ends on the LUN too.
#[inline]
fn push(out: &mut Vec<Segment>, next: Segment) {
    if let Some(last) = out.last_mut() {
        let joins = match (last.lun_offset, next.lun_offset) {
            (Some(a), Some(b)) => a.0 + last.len == b.0,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if joins {
            last.len += next.len;
            return;
        }
    }
    out.push(next);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end)
    }

    fn extent(file_offset: u64, len: u64, lun: Option<u64>) -> Extent {
        Extent { file_offset, len, lun_offset: lun.map(LunOffset) }
    }

    fn ranges(map: &Map) -> Vec<ByteRange> {
        map.iter().map(|piece| piece.range).collect()
    }

    #[test]
    fn grants_are_cut_and_joined() {
        let mut map = Map::default();
        map.add(r(100, 200), 1, Access::Write, &[extent(0, 1000, Some(5000))]);
        assert_eq!(ranges(&map), [r(100, 200)]);
        map.take(r(140, 160), 1, false);
        assert_eq!(ranges(&map), [r(100, 140), r(160, 200)]);
        map.add(r(140, 160), 1, Access::Write, &[extent(140, 20, Some(5140))]);
        assert_eq!(ranges(&map), [r(100, 200)]);
        let mut out = Vec::new();
        assert!(map.segments(r(150, 200), Access::Write, true, &mut out));
        assert_eq!(out, [Segment { file_offset: 150, len: 50, lun_offset: Some(LunOffset(5150)) }]);
        assert!(!map.segments(r(150, 201), Access::Read, false, &mut Vec::new()));
        assert!(!map.segments(r(150, 160), Access::Exclusive, false, &mut Vec::new()));
    }

    #[test]
    fn newer_place_wins_whatever_the_order() {
        for newest_first in [false, true] {
            let mut map = Map::default();
            let hole = extent(0, 100, None);
            let filled = extent(0, 100, Some(700));
            if newest_first {
                map.add(r(0, 100), 2, Access::Write, &[filled]);
                map.add(r(0, 100), 1, Access::Read, &[hole]);
            } else {
                map.add(r(0, 100), 1, Access::Read, &[hole]);
                map.add(r(0, 100), 2, Access::Write, &[filled]);
            }
            let mut out = Vec::new();
            assert!(map.segments(r(10, 20), Access::Write, true, &mut out));
            assert_eq!(out[0].lun_offset, Some(LunOffset(710)));
        }
    }

    #[test]
    fn unknown_places_are_no_hit_and_zeros_only_for_reads() {
        let mut map = Map::default();
        map.add(r(0, 300), 1, Access::Exclusive, &[extent(100, 100, None), extent(0, 100, Some(0))]);
        let mut out = Vec::new();
        assert!(map.segments(r(50, 200), Access::Read, false, &mut out));
        assert_eq!(out.len(), 2);
        assert!(!map.segments(r(50, 200), Access::Write, true, &mut Vec::new()));
        assert!(!map.segments(r(199, 201), Access::Read, false, &mut Vec::new()));
        assert!(map.allows(r(0, 300), Access::Exclusive));
        map.add(r(200, 300), 2, Access::Exclusive, &[extent(200, 100, Some(900))]);
        assert!(map.segments(r(0, 100), Access::Write, true, &mut Vec::new()));
        assert!(map.segments(r(200, 300), Access::Write, true, &mut Vec::new()));
    }
}
