//! Half-open byte ranges of a file.

use serde::{Deserialize, Serialize};
use std::fmt;

/// `start..end` in bytes; `end` is exclusive, `u64::MAX` means "to whatever the end of the file becomes".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl ByteRange {
    /// Every byte that a file has or can get.
    pub const ALL: ByteRange = ByteRange { start: 0, end: u64::MAX };

    /// `start..end`; an inverted pair gives an empty range at `start`.
    #[must_use]
    pub fn new(start: u64, end: u64) -> Self {
        ByteRange { start, end: end.max(start) }
    }

    /// `offset..offset + len`, saturating at `u64::MAX`.
    #[must_use]
    pub fn at(offset: u64, len: u64) -> Self {
        ByteRange { start: offset, end: offset.saturating_add(len) }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// No byte in it?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// Do both hold at least one common byte?
    #[must_use]
    pub fn overlaps(&self, other: &ByteRange) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// Does `self` hold every byte of `other`?
    #[must_use]
    pub fn contains(&self, other: &ByteRange) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// The common part; empty when there is none.
    #[must_use]
    pub fn intersect(&self, other: &ByteRange) -> ByteRange {
        ByteRange::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Are both ends multiples of `align`, a power of two?
    #[must_use]
    pub fn is_aligned(&self, align: u64) -> bool {
        self.align_out(align) == *self
    }

    /// Grown outward to multiples of `align`, a power of two.
    #[must_use]
    pub fn align_out(&self, align: u64) -> ByteRange {
        debug_assert!(align.is_power_of_two());
        let start = self.start & !(align - 1);
        let end = match self.end.checked_add(align - 1) {
            Some(end) => end & !(align - 1),
            None => u64::MAX,
        };
        ByteRange::new(start, end)
    }

    /// What is left of `self` when `cut` is taken out: up to two pieces.
    pub fn subtract(&self, cut: &ByteRange) -> impl Iterator<Item = ByteRange> {
        let pieces = if self.overlaps(cut) {
            [ByteRange::new(self.start, cut.start), ByteRange::new(cut.end, self.end)]
        } else {
            [*self, ByteRange::new(self.end, self.end)]
        };
        pieces.into_iter().filter(|piece| !piece.is_empty())
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.end == u64::MAX {
            write!(f, "{}..", self.start)
        } else {
            write!(f, "{}..{}", self.start, self.end)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subtract_leaves_both_sides() {
        let left: Vec<_> = ByteRange::new(0, 10).subtract(&ByteRange::new(3, 5)).collect();
        assert_eq!(left, [ByteRange::new(0, 3), ByteRange::new(5, 10)]);
        let same: Vec<_> = ByteRange::new(0, 10).subtract(&ByteRange::new(10, 12)).collect();
        assert_eq!(same, [ByteRange::new(0, 10)]);
        assert_eq!(ByteRange::new(3, 5).subtract(&ByteRange::ALL).count(), 0);
    }

    #[test]
    fn align_out_saturates() {
        assert_eq!(ByteRange::new(1, 4097).align_out(4096), ByteRange::new(0, 8192));
        assert!(ByteRange::new(4096, 8192).is_aligned(4096));
        assert!(!ByteRange::new(4096, 8191).is_aligned(4096) && !ByteRange::new(1, 4096).is_aligned(4096));
        assert_eq!(ByteRange::new(1, u64::MAX).align_out(4096).end, u64::MAX);
    }

    #[test]
    fn empty_ranges_overlap_nothing() {
        assert!(!ByteRange::new(5, 5).overlaps(&ByteRange::ALL));
        assert!(ByteRange::ALL.contains(&ByteRange::new(5, 5)));
    }
}
