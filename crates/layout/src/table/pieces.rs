//! What one node holds of one file, as disjoint pieces in file order.
//!
//! Invariants: pieces are not empty, do not overlap, hold some right, and two that touch differ in their rights.

use crate::Access;
use crate::rights::Rights;
use csv_types::ByteRange;
use std::collections::BTreeMap;

/// Pieces by start; the value is the end and the rights.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    map: BTreeMap<u64, (u64, Rights)>,
}

impl Pieces {
    pub(super) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (ByteRange, Rights)> {
        self.map.iter().map(|(&start, &(end, rights))| (ByteRange::new(start, end), rights))
    }

    /// Pieces that have a byte in `range`, whole.
    pub(super) fn overlapping(&self, range: ByteRange) -> impl Iterator<Item = (ByteRange, Rights)> {
        let before = self.map.range(..range.start).next_back();
        before
            .into_iter()
            .chain(self.map.range(range.start..range.end.max(range.start)))
            .map(|(&start, &(end, rights))| (ByteRange::new(start, end), rights))
            .filter(move |(piece, _)| piece.overlaps(&range))
    }

    /// Is at least `access` held on every byte of `range`?
    pub(super) fn covers(&self, range: ByteRange, access: Access) -> bool {
        let mut at = range.start;
        for (piece, rights) in self.overlapping(range) {
            if piece.start > at || !rights.allows(access) {
                return false;
            }
            at = piece.end;
        }
        at >= range.end
    }

    /// The nearest bytes before and after `range` that are held with `floor` or more: end of the one, start of
    /// the other.
    pub(super) fn neighbours(&self, range: ByteRange, floor: Access) -> (u64, u64) {
        let strong = |rights: &Rights| rights.allows(floor);
        let before = self.map.range(..range.start).rev().find(|(_, (_, rights))| strong(rights));
        let after = self.map.range(range.end..).find(|(_, (_, rights))| strong(rights));
        (before.map_or(0, |(_, &(end, _))| end), after.map_or(u64::MAX, |(&start, _)| start))
    }

    /// Changes the rights of every byte of `range`, those not held included.
    pub(super) fn update(&mut self, range: ByteRange, change: impl Fn(&mut Rights)) {
        if range.is_empty() {
            return;
        }
        let old: Vec<_> = self.overlapping(range).collect();
        let mut fresh = Vec::with_capacity(2 * old.len() + 1);
        let mut at = range.start;
        for (piece, rights) in old {
            self.map.remove(&piece.start);
            for outside in piece.subtract(&range) {
                self.map.insert(outside.start, (outside.end, rights));
            }
            let inside = piece.intersect(&range);
            fresh.push((ByteRange::new(at, inside.start), Rights::NONE));
            fresh.push((inside, rights));
            at = inside.end;
        }
        fresh.push((ByteRange::new(at, range.end), Rights::NONE));
        for (piece, mut rights) in fresh {
            change(&mut rights);
            if !piece.is_empty() && !rights.is_none() {
                self.insert(piece, rights);
            }
        }
    }

    /// Fewer pieces at the price of newer sequence numbers than were granted: touching pieces of the same access
    /// become one. Such a piece outlives a return that names only the older grant, which errs on the safe side.
    pub(super) fn coarsen(&mut self) {
        let old = std::mem::take(&mut self.map);
        let mut last: Option<(ByteRange, Rights)> = None;
        for (start, (end, rights)) in old {
            match &mut last {
                Some((piece, held)) if piece.end == start && held.access() == rights.access() => {
                    piece.end = end;
                    held.merge(rights);
                }
                _ => {
                    if let Some((piece, held)) = last.replace((ByteRange::new(start, end), rights)) {
                        self.map.insert(piece.start, (piece.end, held));
                    }
                }
            }
        }
        if let Some((piece, held)) = last {
            self.map.insert(piece.start, (piece.end, held));
        }
    }

    /// Puts a piece where nothing is, joined with equal neighbours.
    fn insert(&mut self, mut piece: ByteRange, rights: Rights) {
        if let Some((&start, &(end, before))) = self.map.range(..piece.start).next_back()
            && end == piece.start
            && before == rights
        {
            piece.start = start;
        }
        if let Some(&(end, after)) = self.map.get(&piece.end)
            && after == rights
        {
            self.map.remove(&piece.end);
            piece.end = end;
        }
        self.map.insert(piece.start, (piece.end, rights));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end)
    }

    #[test]
    fn update_splits_and_joins() {
        let mut pieces = Pieces::default();
        pieces.update(r(0, 100), |held| held.add(Access::Write, 1));
        pieces.update(r(20, 40), |held| held.add(Access::Exclusive, 2));
        assert_eq!(pieces.len(), 3);
        assert!(pieces.covers(r(0, 100), Access::Write));
        assert!(pieces.covers(r(20, 40), Access::Exclusive));
        assert!(!pieces.covers(r(19, 40), Access::Exclusive));
        assert!(!pieces.covers(r(90, 101), Access::Read));
        pieces.update(r(0, 100), |held| held.take(2, true));
        assert_eq!(
            pieces.iter().map(|(range, _)| range).collect::<Vec<_>>(),
            [r(0, 20), r(20, 40), r(40, 100)]
        );
        pieces.update(r(10, 100), |held| held.take(2, false));
        assert_eq!(pieces.iter().map(|(range, _)| range).collect::<Vec<_>>(), [r(0, 10)]);
    }

    #[test]
    fn update_fills_gaps_and_joins_equal_neighbours() {
        let mut pieces = Pieces::default();
        pieces.update(r(10, 20), |held| held.add(Access::Read, 1));
        pieces.update(r(30, 40), |held| held.add(Access::Read, 1));
        pieces.update(r(0, 50), |held| held.add(Access::Read, 2));
        assert_eq!(pieces.iter().map(|(range, _)| range).collect::<Vec<_>>(), [r(0, 50)]);
    }

    #[test]
    fn neighbours_see_only_what_is_strong_enough() {
        let mut pieces = Pieces::default();
        pieces.update(r(0, 10), |held| held.add(Access::Exclusive, 1));
        pieces.update(r(10, 20), |held| held.add(Access::Read, 2));
        pieces.update(r(50, 60), |held| held.add(Access::Read, 3));
        assert_eq!(pieces.neighbours(r(30, 40), Access::Exclusive), (10, u64::MAX));
        assert_eq!(pieces.neighbours(r(30, 40), Access::Read), (20, 50));
    }

    #[test]
    fn coarsen_joins_touching_pieces() {
        let mut pieces = Pieces::default();
        for i in 0..10 {
            pieces.update(r(i * 10, i * 10 + 10), |held| held.add(Access::Write, i + 1));
        }
        pieces.update(r(200, 210), |held| held.add(Access::Read, 11));
        assert_eq!(pieces.len(), 11);
        pieces.coarsen();
        assert_eq!(pieces.len(), 2);
        assert!(pieces.covers(r(0, 100), Access::Write));
        pieces.update(r(0, 100), |held| held.take(9, false));
        assert!(pieces.covers(r(0, 100), Access::Write), "kept: counts as granted by the newest");
    }
}
