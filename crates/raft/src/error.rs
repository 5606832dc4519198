//! What can go wrong for the users of a [`crate::Handle`].

use crate::storage::OpenError;
use crate::types::{Identity, RaftNode, VoterId};

/// Who leads, as far as this voter knows.
pub type Leader = Option<(VoterId, RaftNode)>;

/// An instance that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The timing is not possible.
    #[error("the timing of the consensus is not possible: {0}")]
    Timing(String),
    /// The storage cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The state machine does not take the stored snapshot.
    #[error("{identity}: the stored snapshot cannot be used: {why}")]
    Restore {
        /// Whose snapshot.
        identity: Identity,
        /// The state machine's words.
        why: String,
    },
    /// The storage failed while starting.
    #[error("{0}")]
    Fatal(String),
}

/// A command or a change of the membership that was not confirmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Nothing happened: this voter does not lead.
    #[error("this node does not lead the cluster; {}", leader_text(.leader))]
    NotLeader {
        /// Who does.
        leader: Leader,
    },
    /// It may have happened, now or later. The caller finds out by reading, or makes the command such that
    /// repeating it does no harm.
    #[error("it is not known whether this was carried out: {0}")]
    Unknown(String),
    /// Nothing happened.
    #[error("refused: {0}")]
    Rejected(String),
    /// This instance has stopped for good. Whether it happened is not known.
    #[error("the database of this node has stopped: {0}")]
    Fatal(String),
}

/// A read that is not known to be fresh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// This voter does not lead.
    #[error("this node does not lead the cluster; {}", leader_text(.leader))]
    NotLeader {
        /// Who does.
        leader: Leader,
    },
    /// Not enough voters confirmed in time that this one leads.
    #[error("a majority of the voters does not answer: {0}")]
    NoQuorum(String),
    /// This instance has stopped for good.
    #[error("the database of this node has stopped: {0}")]
    Fatal(String),
}

fn leader_text(leader: &Leader) -> String {
    match leader {
        Some((_, node)) => format!("{} does", node.name),
        None => "it is not known who does".to_owned(),
    }
}

/// No answer may be given to a call of another voter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServeError {
    /// The gate did not let the answer out; this instance stops.
    #[error("this instance may not answer any more")]
    Gated,
    /// This instance has stopped for good.
    #[error("the database of this node has stopped: {0}")]
    Fatal(String),
}

/// Why an instance runs no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// By [`crate::Handle::shutdown`].
    Shutdown,
    /// Its storage failed, its gate closed, or it met an error in itself. It must not be started again before
    /// the cause is gone.
    Fatal(String),
}
