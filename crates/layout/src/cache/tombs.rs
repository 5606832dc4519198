//! What was recalled or given up: a grant that was overtaken by its own recall, or is delivered twice, must not
//! come to life again.
//!
//! Bounded: when there are too many, the oldest numbers become a floor for the whole file. A grant below the floor
//! is ignored, which is always safe: the table then believes too much, and the next get brings a newer grant.

use csv_types::ByteRange;

/// Entries kept apart.
const TOMBS_MAX: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Tombs {
    /// In `range`, grants with `seq <= up_to_seq` are dead.
    entries: Vec<(ByteRange, u64)>,
    floor_seq: u64,
}

impl Tombs {
    pub(super) fn bury(&mut self, range: ByteRange, up_to_seq: u64) {
        if up_to_seq <= self.floor_seq || range.is_empty() {
            return;
        }
        if range == ByteRange::ALL {
            self.raise_floor(up_to_seq);
            return;
        }
        if self.entries.iter().any(|(tomb, seq)| tomb.contains(&range) && *seq >= up_to_seq) {
            return;
        }
        self.entries.retain(|(tomb, seq)| !(range.contains(tomb) && *seq <= up_to_seq));
        self.entries.push((range, up_to_seq));
        if self.entries.len() > TOMBS_MAX {
            let oldest = self.entries.iter().map(|&(_, seq)| seq).min();
            self.raise_floor(oldest.unwrap_or(0));
        }
    }

    /// Grants up to and with `seq` are dead everywhere.
    pub(super) fn raise_floor(&mut self, seq: u64) {
        self.floor_seq = seq.max(self.floor_seq);
        let floor_seq = self.floor_seq;
        self.entries.retain(|&(_, seq)| seq > floor_seq);
    }

    /// The parts of `range` where a grant `seq` is alive.
    pub(super) fn alive(&self, range: ByteRange, seq: u64) -> Vec<ByteRange> {
        let mut parts = if seq > self.floor_seq { vec![range] } else { Vec::new() };
        for (tomb, _) in self.entries.iter().filter(|(_, dead)| *dead >= seq) {
            parts = parts.iter().flat_map(|part| part.subtract(tomb)).collect();
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflow_buries_more_but_never_less() {
        let mut tombs = Tombs::default();
        for i in 0..200 {
            tombs.bury(ByteRange::at(i * 10, 5), i + 1);
        }
        assert!(tombs.entries.len() <= TOMBS_MAX);
        for i in 0..200 {
            assert!(tombs.alive(ByteRange::at(i * 10, 5), i + 1).is_empty(), "grant {i} came to life");
        }
        let fresh = ByteRange::new(0, 1000);
        assert_eq!(tombs.alive(fresh, 201), [fresh]);
    }

    #[test]
    fn larger_entries_swallow_smaller_ones() {
        let mut tombs = Tombs::default();
        tombs.bury(ByteRange::new(10, 20), 3);
        tombs.bury(ByteRange::new(0, 30), 4);
        tombs.bury(ByteRange::new(5, 6), 2);
        assert_eq!(tombs.entries, [(ByteRange::new(0, 30), 4)]);
        assert_eq!(tombs.alive(ByteRange::new(20, 40), 4), [ByteRange::new(30, 40)]);
    }
}
