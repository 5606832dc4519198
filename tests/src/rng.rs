//! Reproducible random numbers (splitmix64): the same seed gives the same run on every machine and release.

/// A generator.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `0..bound`; 0 when the bound is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The bias of the remainder does not matter for choosing test operations.
        self.next_u64().checked_rem(bound).unwrap_or(0)
    }

    /// An index of a slice of `len` elements.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The seed of this run: `CSV_SEED`, else the clock. Printed, so that a failure can be repeated.
#[must_use]
pub fn seed(suite: &str) -> u64 {
    let given = std::env::var("CSV_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(1, |since| u64::from(since.subsec_nanos()) + since.as_secs() * 1_000_003) % 1_000_000_007
    });
    println!("{suite}: seed {seed} (repeat with CSV_SEED={seed})");
    seed
}

/// Bytes that `seed` stands for, so that both ends know the data without sending it.
#[must_use]
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&rng.next_u64().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_numbers() {
        let (mut a, mut b) = (Rng::new(7), Rng::new(7));
        assert!((0..100).all(|_| a.next_u64() == b.next_u64()));
        assert_ne!(Rng::new(8).next_u64(), Rng::new(7).next_u64());
        assert_eq!(a.below(0), 0);
        assert!((0..100).all(|_| a.below(3) < 3));
    }

    #[test]
    fn patterns_differ_by_seed_and_start_alike_by_length() {
        assert_eq!(pattern(1, 13), pattern(1, 100)[..13]);
        assert_ne!(pattern(1, 64), pattern(2, 64));
    }
}
