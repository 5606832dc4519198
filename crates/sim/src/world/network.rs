//! The network: datagrams that are delayed, lost, doubled and overtaken. Streams of the real programs are weaker adversaries
//! than this: what they lose, they lose with the connection.

use crate::rng::Rng;
use csv_types::NodeId;
use std::collections::BTreeSet;

/// See the module.
#[derive(Debug)]
pub struct Network {
    /// Nothing gets from the first to the second.
    pub cut: BTreeSet<(NodeId, NodeId)>,
    /// Messages of a thousand that are lost.
    pub loss_per_mille: u32,
    /// Messages of a thousand that arrive twice.
    pub double_per_mille: u32,
    /// Messages of a thousand that take up to [`LATE_MS_MAX`].
    pub late_per_mille: u32,
}

/// What late messages take at most.
pub const LATE_MS_MAX: u64 = 8_000;
const DELAY_MS_MAX: u64 = 4;

impl Network {
    /// A good network.
    #[must_use]
    pub fn good() -> Network {
        Network { cut: BTreeSet::new(), loss_per_mille: 0, double_per_mille: 0, late_per_mille: 0 }
    }

    /// When copies of a message arrive, in milliseconds from now.
    pub fn route(&self, rng: &mut Rng, from: NodeId, to: NodeId) -> Vec<u64> {
        if from == to {
            return vec![0];
        }
        if self.cut.contains(&(from, to)) || rng.chance(self.loss_per_mille) {
            return Vec::new();
        }
        let copies = 1 + usize::from(rng.chance(self.double_per_mille));
        let delay = |rng: &mut Rng| {
            let most = if rng.chance(self.late_per_mille) { LATE_MS_MAX } else { DELAY_MS_MAX };
            rng.range(1, most)
        };
        (0..copies).map(|_| delay(rng)).collect()
    }
}
