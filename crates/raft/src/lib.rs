//! Consensus of the cluster's database: openraft, its durable storage, and the [`Handle`] that csvd uses.
//!
//! This crate knows nothing of what is in the database: commands and answers are bytes. Where records lie is one of
//! two storages, [`storage::directory`] for nodes and [`storage::blocks`] for the disk witness; both formats stand
//! in docs/raft-storage.md.
//!
//! Invariants
//! * What was acknowledged (a vote, an entry, a snapshot) is durable before anybody hears of it.
//! * An instance with a storage that failed once says nothing more; one with a damaged storage does not start.
//! * A command whose outcome is not known is never reported as refused.

mod codec;
mod error;
mod handle;
mod image;
mod machine;
mod metrics;
mod network;
mod options;
mod serve;
pub mod storage;
mod store;
mod transport;
mod types;
mod wire;

#[cfg(test)]
mod cluster_tests;

pub use error::{Leader, ProposeError, ReadError, ServeError, StartError, Stop};
pub use handle::{COMMAND_BYTES_MAX, Changes, Handle, PROPOSALS_MAX};
pub use metrics::{Follower, Metrics, Role};
pub use options::{Options, SnapshotRule, Timing};
pub use storage::{OpenError, OpenStorage, StorageFailure};
pub use transport::{BoxFuture, CallError, Gate, Rpc, Transport};
pub use types::{Identity, RaftNode, StateMachine, VoterId};
