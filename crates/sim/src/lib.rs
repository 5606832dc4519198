//! Simulation of whole clusters under one seed.
//!
//! The real state machines of csv-cluster (database, membership, quorum, failover manager, agent, witness) and csv-layout
//! (table, cache) run on simulated nodes, networks, clocks and LUNs. What csvd and csvfs do around them is written anew
//! here, as close to them as can be ([`csvd`], [`csvfs`]); consensus is a model ([`raft_model`]). Everything that happens
//! is an event in one queue; after each the [`invariants`] are checked. The first part of a run has [`faults`]; then everything
//! is mended, and the cluster must come to where it should be.
//!
//! A run is told by its seed alone: the same seed makes the same events, and the same hash of its trace.
//!
//! Assumptions about the world, which the real parts have to keep:
//! * a csvfs that was killed is gone only when its block I/O has ended (the kernel waits for it), what was answered with an
//!   error because the path is gone included;
//! * a machine that boots, and one whose path comes back, logs in to the storage anew, which aborts what it had left there;
//! * storage that forgets registrations does so while no node is frozen, being fenced, or fenced and not stopped yet:
//!   nothing protects a LUN without reservations from a node that wakes up.

pub mod bugs;
pub mod csvd;
pub mod csvfs;
pub mod driver;
pub mod event;
pub mod faults;
pub mod invariants;
pub mod node;
pub mod raft_model;
pub mod rng;
pub mod world;

pub use bugs::Bugs;
pub use driver::{Failure, Outcome, Sim, run};

/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 4096;
/// Files of a volume.
pub const FILES: usize = 3;
/// Blocks of a file.
pub const FBLOCKS: usize = 8;
/// Blocks of a LUN: a few more than all files need, so that freed ones are used again soon.
pub const LUN_BLOCKS: usize = FILES * FBLOCKS + 4;
/// Lease of a node at a coordinator.
pub const LEASE_MS: u64 = 6_000;
/// What is added to it before it counts as over.
pub const LEASE_MARGIN_MS: u64 = 2_000;
/// Time for the answer to a recall.
pub const RECALL_MS: u64 = 2_000;

/// Settings of the simulated clusters: faster than the defaults, and nothing that waits for an administrator.
pub const SETTINGS: [(&str, &str); 9] = [
    ("quarantine_failures", "0"),
    ("recall_ms", "2000"),
    ("lease_ms", "6000"),
    ("start_timeout_ms", "15000"),
    ("release_timeout_ms", "10000"),
    ("failed_retry_ms", "10000"),
    ("settle_ms", "5000"),
    ("witness_renew_ms", "1000"),
    ("witness_challenge_ms", "2500"),
];
