//! Reservation keys. A member's key on a LUN is derived, not stored:
//!
//! ```text
//! bit 63                    32 31        24 23                      0
//! ┌──────────────────────────┬────────────┬─────────────────────────┐
//! │ hash of the cluster's id │ node, 1..  │ generation, 1..2^24 - 1 │
//! └──────────────────────────┴────────────┴─────────────────────────┘
//! ```
//!
//! Never 0 (SPC-4 reserves that for "no key"), because node and generation are not. The hash (FNV-1a, 32 bits) tells keys of
//! this cluster from foreign ones, so that `csvctl validate` and the engine leave those alone.

use csv_types::NodeId;
use uuid::Uuid;

/// Highest node number that fits.
pub const NODE_ID_MAX: u32 = 0xff;
/// Highest generation that fits.
pub const GENERATION_MAX: u32 = 0x00ff_ffff;

/// The parts of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyParts {
    /// Hash of the cluster's id.
    pub cluster: u32,
    /// Whose key.
    pub node: NodeId,
    /// Which of its keys.
    pub generation: u32,
}

/// The upper half of all keys of a cluster.
#[must_use]
pub fn cluster_hash(cluster_id: Uuid) -> u32 {
    cluster_id
        .as_bytes()
        .iter()
        .fold(0x811c_9dc5, |hash: u32, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// The key of a node's generation. The database gives out only numbers that fit; bits that do not are cut off.
#[must_use]
pub fn reservation_key(cluster_id: Uuid, node: NodeId, generation: u32) -> u64 {
    let low = ((node.0 & NODE_ID_MAX) << 24) | (generation & GENERATION_MAX);
    (u64::from(cluster_hash(cluster_id)) << 32) | u64::from(low)
}

/// Takes a key apart. `None` for a key that this scheme never makes.
#[must_use]
pub fn parse_key(key: u64) -> Option<KeyParts> {
    let half = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    let (cluster, low) = (half(key >> 32), half(key));
    let (node, generation) = (low >> 24, low & GENERATION_MAX);
    (node != 0 && generation != 0).then_some(KeyParts { cluster, node: NodeId(node), generation })
}

/// Node and generation, if it is a key of this cluster.
#[must_use]
pub fn parse_own_key(cluster_id: Uuid, key: u64) -> Option<(NodeId, u32)> {
    let parts = parse_key(key)?;
    (parts.cluster == cluster_hash(cluster_id)).then_some((parts.node, parts.generation))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_round_trip_and_are_never_zero(id: u128, node in 1..=NODE_ID_MAX, generation in 1..=GENERATION_MAX) {
            let id = Uuid::from_u128(id);
            let key = reservation_key(id, NodeId(node), generation);
            prop_assert_ne!(key, 0);
            prop_assert_eq!(parse_own_key(id, key), Some((NodeId(node), generation)));
            prop_assert_eq!(parse_own_key(Uuid::from_u128(id.as_u128() ^ 1), key), None);
        }
    }

    #[test]
    fn foreign_keys_are_told_apart() {
        assert_eq!(parse_key(0), None);
        assert_eq!(parse_key(0x1234_5678_0000_0001), None, "no node");
        assert_eq!(parse_key(0x1234_5678_0100_0000), None, "no generation");
    }
}
