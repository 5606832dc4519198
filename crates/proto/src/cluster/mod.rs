//! Protocol between the cluster services of the nodes: what they say to each other, and its wire form.
//!
//! Every type here has a checked way from the wire (`from_wire`) and one to it (`into_wire`). What arrives names the
//! protocol version of its sender; a newer one is accepted (see cluster.proto). Payloads of Raft, proposals, reports
//! and administrator's requests are bytes that are not looked into.

mod join;

#[cfg(test)]
mod tests;

#[allow(
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::wildcard_enum_match_arm,
    clippy::too_many_lines,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
pub mod wire {
    //! Generated types, as they stand in cluster.proto.
    tonic::include_proto!("csv.cluster.v1");
}

pub use join::{
    JoinGrant, JoinRequest, Member, SECRET_BYTES, answer_from_wire as join_answer_from_wire,
    answer_into_wire as join_answer_into_wire,
};

use crate::Malformed;
use bytes::Bytes;
use csv_types::NodeId;

/// Version of the protocol that this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Largest message in either direction, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// Largest message of a caller that has no certificate (a node that joins), in bytes.
pub const JOIN_BYTES_MAX: usize = 64 << 10;

/// A voter of the cluster's Raft group: a node's id, or the number of the witness.
pub type VoterId = u64;

/// What kind of refusal it is; tells the caller what to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// Looked at and refused, or failed; nothing happened.
    Failed,
    /// That voter does not run on the called node.
    NotHere,
    /// Not now: no leader, no quorum, too much under way. Try again, or at another node.
    Busy,
    /// The caller may not.
    NotAllowed,
    /// The called part has stopped for good.
    Stopped,
    /// It may have happened.
    UnknownOutcome,
}

/// A request that was understood and not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// What it means for the caller.
    pub kind: RefusalKind,
    /// For the administrator: why, and what next.
    pub text: String,
}

impl Refusal {
    /// A refusal of that kind.
    pub fn new(kind: RefusalKind, text: impl Into<String>) -> Refusal {
        Refusal { kind, text: text.into() }
    }

    /// From the wire. A kind that this version does not know is [`RefusalKind::Failed`].
    #[must_use]
    pub fn from_wire(refusal: wire::Refusal) -> Refusal {
        use wire::refusal::Kind;
        let kind = match refusal.kind() {
            Kind::Unspecified | Kind::Failed => RefusalKind::Failed,
            Kind::NotHere => RefusalKind::NotHere,
            Kind::Busy => RefusalKind::Busy,
            Kind::NotAllowed => RefusalKind::NotAllowed,
            Kind::Stopped => RefusalKind::Stopped,
            Kind::UnknownOutcome => RefusalKind::UnknownOutcome,
        };
        Refusal { kind, text: refusal.text }
    }

    /// To the wire.
    #[must_use]
    pub fn into_wire(self) -> wire::Refusal {
        use wire::refusal::Kind;
        let kind = match self.kind {
            RefusalKind::Failed => Kind::Failed,
            RefusalKind::NotHere => Kind::NotHere,
            RefusalKind::Busy => Kind::Busy,
            RefusalKind::NotAllowed => Kind::NotAllowed,
            RefusalKind::Stopped => Kind::Stopped,
            RefusalKind::UnknownOutcome => Kind::UnknownOutcome,
        };
        wire::Refusal { kind: kind.into(), text: self.text }
    }
}

/// Which of Raft's calls it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RaftKind {
    /// AppendEntries.
    Append,
    /// RequestVote.
    Vote,
    /// InstallSnapshot.
    Snapshot,
}

/// A call of Raft to a voter of another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftCall {
    /// Voter that calls.
    pub from: VoterId,
    /// Voter that is called.
    pub instance: VoterId,
    /// Which call.
    pub kind: RaftKind,
    /// What Raft says.
    pub payload: Bytes,
}

impl RaftCall {
    /// From the wire.
    ///
    /// # Errors
    /// No version, no caller, no voter, or a kind that this version does not know.
    pub fn from_wire(call: wire::RaftCall) -> Result<RaftCall, Malformed> {
        versioned(call.version)?;
        let kind = match call.kind() {
            wire::raft_call::Kind::Append => RaftKind::Append,
            wire::raft_call::Kind::Vote => RaftKind::Vote,
            wire::raft_call::Kind::Snapshot => RaftKind::Snapshot,
            wire::raft_call::Kind::Unspecified => return Err(Malformed("kind of Raft call")),
        };
        if call.from == 0 || call.instance == 0 {
            return Err(Malformed("voter"));
        }
        Ok(RaftCall { from: call.from, instance: call.instance, kind, payload: call.payload })
    }

    /// To the wire.
    #[must_use]
    pub fn into_wire(self) -> wire::RaftCall {
        let kind = match self.kind {
            RaftKind::Append => wire::raft_call::Kind::Append,
            RaftKind::Vote => wire::raft_call::Kind::Vote,
            RaftKind::Snapshot => wire::raft_call::Kind::Snapshot,
        };
        wire::RaftCall {
            version: PROTOCOL_VERSION,
            from: self.from,
            instance: self.instance,
            kind: kind.into(),
            payload: self.payload,
        }
    }
}

/// A heartbeat of one node to another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Beat {
    /// Grows with each start of the node's csvd.
    pub incarnation: u64,
    /// Grows by one with each beat of this incarnation to this peer; a gap is beats that were dropped or lost.
    pub seq: u64,
    /// The sender's clock when it was made, Unix milliseconds. A peer that was frozen gets old beats in a burst
    /// when it wakes up, and knows them by this.
    pub sent_unix_ms: u64,
    /// Raft's term, as the sender knows it.
    pub term: u64,
    /// Raft's leader, as the sender knows it.
    pub leader: Option<VoterId>,
    /// Index of the last log entry that is in the sender's database.
    pub applied: u64,
    /// A majority answered the leader within its lease. Only the leader says so, and for the witness, when that leads,
    /// the node on which its voter runs.
    pub has_quorum: bool,
    /// The receiver is asked to put its whole report into its next beat.
    pub want_report: bool,
    /// The node's report (json), when it changed or was asked for.
    pub report_json: Option<Bytes>,
}

impl Beat {
    /// From the wire, with the node that it says it is of.
    ///
    /// # Errors
    /// No version, or no node.
    pub fn from_wire(beat: wire::Beat) -> Result<(NodeId, Beat), Malformed> {
        versioned(beat.version)?;
        let node = node_id(beat.node)?;
        let leader = (beat.leader != 0).then_some(beat.leader);
        let beat = Beat {
            incarnation: beat.incarnation,
            seq: beat.seq,
            sent_unix_ms: beat.sent_unix_ms,
            term: beat.term,
            leader,
            applied: beat.applied,
            has_quorum: beat.has_quorum,
            want_report: beat.want_report,
            report_json: beat.report_json,
        };
        Ok((node, beat))
    }

    /// To the wire, as said by `node`.
    #[must_use]
    pub fn into_wire(self, node: NodeId) -> wire::Beat {
        wire::Beat {
            version: PROTOCOL_VERSION,
            node: node.0,
            incarnation: self.incarnation,
            seq: self.seq,
            sent_unix_ms: self.sent_unix_ms,
            term: self.term,
            leader: self.leader.unwrap_or(0),
            applied: self.applied,
            has_quorum: self.has_quorum,
            want_report: self.want_report,
            report_json: self.report_json,
        }
    }
}

/// Why a proposal was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeRefusal {
    /// Another node is the leader; nothing happened.
    #[error("not the leader")]
    NotLeader {
        /// Who is, as far as is known.
        leader: Option<VoterId>,
    },
    /// Anything else.
    #[error("{0}")]
    Refused(Refusal),
}

/// Answer to a proposal.
pub type Proposed = Result<Bytes, ProposeRefusal>;

/// An answer to [`wire::RaftCall`] from the wire.
///
/// # Errors
/// No version, or nothing in it.
pub fn raft_answer_from_wire(answer: wire::RaftAnswer) -> Result<Result<Bytes, Refusal>, Malformed> {
    use wire::raft_answer::Outcome;
    versioned(answer.version)?;
    match answer.outcome {
        Some(Outcome::Payload(payload)) => Ok(Ok(payload)),
        Some(Outcome::Refusal(refusal)) => Ok(Err(Refusal::from_wire(refusal))),
        None => Err(Malformed("answer of Raft")),
    }
}

/// An answer to [`wire::RaftCall`] to the wire.
#[must_use]
pub fn raft_answer_into_wire(answer: Result<Bytes, Refusal>) -> wire::RaftAnswer {
    use wire::raft_answer::Outcome;
    let outcome = match answer {
        Ok(payload) => Outcome::Payload(payload),
        Err(refusal) => Outcome::Refusal(refusal.into_wire()),
    };
    wire::RaftAnswer { version: PROTOCOL_VERSION, outcome: Some(outcome) }
}

/// An answer to [`wire::AdminCall`] from the wire.
///
/// # Errors
/// No version, or nothing in it.
pub fn admin_answer_from_wire(answer: wire::AdminAnswer) -> Result<Result<Bytes, Refusal>, Malformed> {
    use wire::admin_answer::Outcome;
    versioned(answer.version)?;
    match answer.outcome {
        Some(Outcome::AnswerJson(json)) => Ok(Ok(json)),
        Some(Outcome::Refusal(refusal)) => Ok(Err(Refusal::from_wire(refusal))),
        None => Err(Malformed("answer to an administrator's request")),
    }
}

/// An answer to [`wire::AdminCall`] to the wire.
#[must_use]
pub fn admin_answer_into_wire(answer: Result<Bytes, Refusal>) -> wire::AdminAnswer {
    use wire::admin_answer::Outcome;
    let outcome = match answer {
        Ok(json) => Outcome::AnswerJson(json),
        Err(refusal) => Outcome::Refusal(refusal.into_wire()),
    };
    wire::AdminAnswer { version: PROTOCOL_VERSION, outcome: Some(outcome) }
}

/// An answer to [`wire::ProposeCall`] from the wire.
///
/// # Errors
/// No version, or nothing in it.
pub fn propose_answer_from_wire(answer: wire::ProposeAnswer) -> Result<Proposed, Malformed> {
    use wire::propose_answer::Outcome;
    versioned(answer.version)?;
    match answer.outcome {
        Some(Outcome::Answer(bytes)) => Ok(Ok(bytes)),
        Some(Outcome::NotLeader(hint)) => {
            Ok(Err(ProposeRefusal::NotLeader { leader: (hint.leader != 0).then_some(hint.leader) }))
        }
        Some(Outcome::Refusal(refusal)) => Ok(Err(ProposeRefusal::Refused(Refusal::from_wire(refusal)))),
        None => Err(Malformed("answer to a proposal")),
    }
}

/// An answer to [`wire::ProposeCall`] to the wire.
#[must_use]
pub fn propose_answer_into_wire(answer: Proposed) -> wire::ProposeAnswer {
    use wire::propose_answer::Outcome;
    let outcome = match answer {
        Ok(bytes) => Outcome::Answer(bytes),
        Err(ProposeRefusal::NotLeader { leader }) => {
            Outcome::NotLeader(wire::NotLeader { leader: leader.unwrap_or(0) })
        }
        Err(ProposeRefusal::Refused(refusal)) => Outcome::Refusal(refusal.into_wire()),
    };
    wire::ProposeAnswer { version: PROTOCOL_VERSION, outcome: Some(outcome) }
}

/// Checks the version that a message names.
///
/// # Errors
/// [`Malformed`] when it names none.
pub fn versioned(version: u32) -> Result<(), Malformed> {
    if version == 0 { Err(Malformed("protocol version")) } else { Ok(()) }
}

/// A node's id as it came over the wire.
///
/// # Errors
/// [`Malformed`] when it is 0.
pub fn node_id(node: u32) -> Result<NodeId, Malformed> {
    if node == 0 { Err(Malformed("node")) } else { Ok(NodeId(node)) }
}
