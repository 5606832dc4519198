//! Reservation keys of disks that are resources. As the keys of volumes (csv-cluster, `db/key.rs`), with another hash, so that
//! neither takes the other's for its own:
//!
//! ```text
//! bit 63                                         32 31        24 23                      0
//! ┌───────────────────────────────────────────────┬────────────┬─────────────────────────┐
//! │ FNV-1a of "PhysicalDisk" and the cluster's id │ node, 1..  │ number of the ownership │
//! └───────────────────────────────────────────────┴────────────┴─────────────────────────┘
//! ```
//!
//! The number is that of the ownership of the resource's group ([`crate::api::Spec::generation`]), so every node that takes a
//! disk has a key that no node had before. Of numbers beyond 2^24 the lower bits count.

use crate::api::NodeInfo;

const GENERATION_MASK: u64 = 0x00ff_ffff;

/// Parts of a key of this cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) node: u64,
    pub(super) generation: u64,
}

fn prefix(cluster_id: &str) -> u64 {
    let hash = "PhysicalDisk"
        .bytes()
        .chain(cluster_id.bytes())
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    u64::from(hash)
}

/// This node's key.
pub(super) fn own(node: &NodeInfo, generation: u64) -> u64 {
    (prefix(&node.cluster_id) << 32) | (u64::from(node.node_id & 0xff) << 24) | (generation & GENERATION_MASK)
}

/// Whose key of this cluster it is; `None` for a foreign one.
pub(super) fn owner(node: &NodeInfo, key: u64) -> Option<Owner> {
    let owner = Owner { node: (key >> 24) & 0xff, generation: key & GENERATION_MASK };
    (key >> 32 == prefix(&node.cluster_id) && owner.node != 0).then_some(owner)
}

/// Is the ownership of a key later than that number? The numbers come round, so half of them are later.
pub(super) fn is_later(owner: Owner, generation: u64) -> bool {
    let ahead = owner.generation.wrapping_sub(generation) & GENERATION_MASK;
    ahead != 0 && ahead <= GENERATION_MASK / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::testbed::Bed;

    #[test]
    fn keys_tell_node_and_ownership_and_are_never_foreign() {
        let bed = Bed::of_node(7);
        let other = Bed::changed(7, |node| node.cluster_id = "other".into());
        let key = own(bed.node(), 42);
        assert_eq!(owner(bed.node(), key), Some(Owner { node: 7, generation: 42 }));
        assert_eq!(owner(other.node(), key), None);
        assert_ne!(key, 0);
    }

    #[test]
    fn later_ownerships_are_told_apart_also_when_numbers_come_round() {
        let owner = |generation| Owner { node: 1, generation };
        assert!(is_later(owner(5), 4) && !is_later(owner(4), 4) && !is_later(owner(3), 4));
        assert!(is_later(owner(1), GENERATION_MASK) && !is_later(owner(GENERATION_MASK), 1));
        assert!(is_later(owner(1), GENERATION_MASK * 8 + 7));
    }
}
