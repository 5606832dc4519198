//! What other nodes ask of this one, and the beats that it sends.

use super::contact::vouches;
use super::witness::node::{WITNESS_NODE, is_witness_node};
use super::{Engine, unix_ms};
use bytes::Bytes;
use csv_cluster::db::Envelope;
use csv_cluster::failover::NodeReport;
use csv_cluster::membership::Input;
use csv_cluster::quorum::VoterId as Voter;
use csv_net::{
    Beat, BeatSource, CallError, Handler, JoinGrant, Joining, Peer, ProposeRefusal, Proposed, RaftCall,
    RaftKind, Refusal, RefusalKind, VoterId, async_trait,
};
use csv_raft::{ProposeError, Rpc, ServeError};
use csv_types::NodeId;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A proposal of another node.
const PROPOSE_LIMIT: Duration = Duration::from_secs(5);

/// Serves the cluster protocol.
pub(crate) struct NodeHandler(pub(crate) Arc<Engine>);

/// Makes this node's beats.
pub(crate) struct Beats(pub(crate) Arc<Engine>);

#[async_trait]
impl Handler for NodeHandler {
    fn allowed(&self, peer: &Peer) -> bool {
        let db = self.0.db.read();
        if peer.node_id == WITNESS_NODE {
            return is_witness_node(&db, peer);
        }
        match db.nodes.get(&peer.node_id) {
            Some(node) => node.cert_sha256.is_empty() || node.cert_sha256 == peer.cert_sha256,
            // It may have been added and this node has not heard of that yet. Numbers of evicted nodes are past.
            None => peer.node_id.0 >= db.next_node_id,
        }
    }

    fn speaks_for(&self, peer: &Peer, voter: VoterId) -> bool {
        voter == VoterId::from(peer.node_id.0) || voter == Voter::WITNESS.0
    }

    async fn raft(&self, _peer: Peer, call: RaftCall) -> Result<Bytes, Refusal> {
        let not_here =
            || Refusal::new(RefusalKind::NotHere, format!("voter {} does not run here", call.instance));
        let rpc = match call.kind {
            RaftKind::Append => Rpc::Append,
            RaftKind::Vote => Rpc::Vote,
            RaftKind::Snapshot => Rpc::Snapshot,
        };
        let handle = if call.instance == Voter::WITNESS.0 {
            let voter = self.0.witness.lock().clone().ok_or_else(not_here)?;
            let answer = voter.serve(rpc, &call.payload).await;
            return answer.map(Bytes::from).map_err(|why| Refusal::new(RefusalKind::Stopped, why));
        } else if call.instance == u64::from(self.0.me().0) {
            self.0.raft.clone()
        } else {
            return Err(not_here());
        };
        match handle.serve(rpc, &call.payload).await {
            Ok(answer) => Ok(answer.into()),
            Err(error @ (ServeError::Gated | ServeError::Fatal(_))) => {
                Err(Refusal::new(RefusalKind::Stopped, error.to_string()))
            }
        }
    }

    fn beat(&self, peer: &Peer, beat: Beat) {
        let engine = &self.0;
        let mut out = Vec::new();
        let at_ms = engine.now_ms();
        let input = Input::Beat { from: peer.node_id, incarnation: beat.incarnation, at_ms };
        engine.heartbeats.lock().step(&input, &mut out);
        engine.membership_news(&out);
        engine.confirmed.lock().hear(peer.node_id, &beat, at_ms);
        if let Some(json) = &beat.report_json {
            match serde_json::from_slice::<NodeReport>(json) {
                Ok(report) => {
                    engine.reports.lock().insert(peer.node_id, report);
                }
                Err(error) => tracing::warn!(node = %peer.node_id, %error, "a report cannot be read"),
            }
        }
    }

    async fn propose(&self, peer: Peer, envelope: Bytes) -> Proposed {
        let refuse = |text: String| ProposeRefusal::Refused(Refusal::new(RefusalKind::Failed, text));
        let decoded = Envelope::decode(&envelope).map_err(|error| refuse(error.to_string()))?;
        if decoded.by != peer.node_id {
            return Err(refuse(format!("{peer} cannot give commands of {}", decoded.by)));
        }
        match self.0.give(&decoded.command, &envelope, PROPOSE_LIMIT).await {
            Ok(answer) => Ok(answer.into()),
            Err(ProposeError::NotLeader { leader }) => {
                Err(ProposeRefusal::NotLeader { leader: leader.map(|(id, _)| id) })
            }
            Err(ProposeError::Rejected(why)) => {
                Err(ProposeRefusal::Refused(Refusal::new(RefusalKind::Busy, why)))
            }
            Err(ProposeError::Unknown(why) | ProposeError::Fatal(why)) => {
                Err(ProposeRefusal::Refused(Refusal::new(RefusalKind::UnknownOutcome, why)))
            }
        }
    }

    async fn admin(&self, _peer: Peer, request_json: Bytes) -> Result<Bytes, Refusal> {
        self.0.answer_node(&request_json).await
    }

    async fn join(&self, joining: Joining) -> Result<JoinGrant, Refusal> {
        self.0.admit_node(joining).await
    }

    fn refused(&self, from: std::net::SocketAddr, why: &str) {
        tracing::warn!(%from, why, "a caller was refused");
    }
}

impl BeatSource for Beats {
    fn next(&self, _peer: NodeId, _first: bool) -> Option<Beat> {
        let engine = &self.0;
        if engine.is_stopping() {
            return None;
        }
        let metrics = engine.raft.metrics();
        // Without its database it takes part in nothing: the others have to give it up.
        if metrics.role == csv_raft::Role::Stopped {
            return None;
        }
        let witness = engine.witness.lock().as_ref().map(|voter| voter.handle().metrics());
        let report = engine.own_report.lock().clone();
        Some(Beat {
            incarnation: engine.incarnation.get(),
            seq: engine.beats_sent.fetch_add(1, Ordering::Relaxed),
            sent_unix_ms: unix_ms(),
            term: metrics.term,
            leader: metrics.leader,
            applied: metrics.applied.unwrap_or(0),
            has_quorum: vouches(&metrics, witness.as_ref()),
            want_report: false,
            report_json: serde_json::to_vec(&report).ok().map(Bytes::from),
        })
    }

    fn refused(&self, peer: NodeId, error: &CallError) {
        tracing::warn!(%peer, %error, "the beats of this node are refused");
    }
}
