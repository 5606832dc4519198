//! How a voter reaches the others. csvd implements it over its gRPC channel, tests in memory.

use crate::types::{RaftNode, VoterId};
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

/// A future behind a pointer, so that the traits of this crate can be used as `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What is called. The payload says the rest; it is at most 3 MiB long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rpc {
    /// Entries, or a heartbeat.
    Append,
    /// A candidate asks for a vote.
    Vote,
    /// A piece of a snapshot.
    Snapshot,
}

/// Why a call brought no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The call did not get there.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// No answer in time; it may have got there.
    #[error("timed out")]
    TimedOut,
    /// The other side refused, in its words.
    #[error("{0}")]
    Remote(String),
}

/// Carries calls to other voters.
pub trait Transport: Send + Sync + 'static {
    /// Gives `payload` to [`crate::Handle::serve`] of `target` and brings the answer. A call may be lost, late or
    /// doubled. When the future is dropped the call is of no interest any more.
    ///
    /// # Errors
    /// See [`CallError`]. After `timeout` it must end with [`CallError::TimedOut`].
    fn call<'a>(
        &'a self,
        target: VoterId,
        node: &'a RaftNode,
        rpc: Rpc,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, CallError>>;
}

/// Is asked before each answer to another voter is given out.
///
/// The disk witness verifies the reservation of its LUN here: what it says counts only while nobody else can be the
/// witness. The check begins after the request was processed, so after it arrived.
pub trait Gate: Send + Sync + 'static {
    /// May the answer be given? `false` stops this instance for good.
    fn verify(&self) -> BoxFuture<'_, bool>;
}
