//! Raft's way to the other nodes: over their cluster services. The witness's voter runs on one node at a time; whoever
//! calls it asks the node where it was last, then the others.

use super::witness::voter::WitnessVoter;
use bytes::Bytes;
use csv_cluster::quorum::VoterId as Voter;
use csv_net::{CallError as NetError, Peers, RaftCall, RaftKind, RefusalKind};
use csv_raft::{BoxFuture, CallError, Handle, RaftNode, Rpc, Transport, VoterId};
use csv_types::NodeId;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

/// A node's own voter.
pub(crate) type LocalVoter = Arc<Mutex<Option<Handle>>>;
/// The witness's voter, where it runs in this process.
pub(crate) type LocalWitness = Arc<Mutex<Option<WitnessVoter>>>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Net {
    /// The voter that calls.
    pub(crate) me: VoterId,
    /// The node on which it runs.
    pub(crate) node: NodeId,
    pub(crate) peers: Peers,
    pub(crate) witness: LocalWitness,
    /// The node's own voter, for the witness that calls it.
    pub(crate) own: LocalVoter,
    pub(crate) witness_at: Mutex<Option<NodeId>>,
}

fn kind(rpc: Rpc) -> RaftKind {
    match rpc {
        Rpc::Append => RaftKind::Append,
        Rpc::Vote => RaftKind::Vote,
        Rpc::Snapshot => RaftKind::Snapshot,
    }
}

fn failed(error: NetError) -> CallError {
    match error {
        NetError::TimedOut => CallError::TimedOut,
        NetError::Unreachable(why) => CallError::Unreachable(why),
        error @ (NetError::Lost(_)
        | NetError::Refused(_)
        | NetError::NotAllowed(_)
        | NetError::Protocol(_)) => CallError::Remote(error.to_string()),
    }
}

impl Net {
    async fn ask(
        &self,
        node: NodeId,
        target: VoterId,
        rpc: Rpc,
        payload: &Bytes,
        timeout: Duration,
    ) -> Result<Vec<u8>, NetError> {
        let call = RaftCall { from: self.me, instance: target, kind: kind(rpc), payload: payload.clone() };
        self.peers.raft(node, call, timeout).await.map(|answer| answer.to_vec())
    }

    async fn ask_own(&self, rpc: Rpc, payload: &Bytes) -> Result<Vec<u8>, CallError> {
        let handle = self.own.lock().clone();
        match handle {
            Some(handle) => {
                handle.serve(rpc, payload).await.map_err(|error| CallError::Remote(error.to_string()))
            }
            None => Err(CallError::Unreachable("this node's voter does not run".to_owned())),
        }
    }

    async fn ask_witness(&self, rpc: Rpc, payload: Bytes, timeout: Duration) -> Result<Vec<u8>, CallError> {
        let here = self.witness.lock().clone();
        if let Some(voter) = here {
            return voter.serve(rpc, &payload).await.map_err(CallError::Remote);
        }
        let last = *self.witness_at.lock();
        let mut nodes: Vec<NodeId> = self.peers.status().into_keys().collect();
        nodes.sort_by_key(|node| Some(*node) != last);
        let mut outcome = CallError::Unreachable("no node runs the disk witness".to_owned());
        for node in nodes {
            match self.ask(node, Voter::WITNESS.0, rpc, &payload, timeout).await {
                Ok(answer) => {
                    *self.witness_at.lock() = Some(node);
                    return Ok(answer);
                }
                Err(NetError::Refused(refusal)) if refusal.kind == RefusalKind::NotHere => {}
                Err(error @ NetError::Unreachable(_)) => outcome = failed(error),
                Err(error) => return Err(failed(error)),
            }
        }
        Err(outcome)
    }
}

impl Transport for Net {
    fn call<'a>(
        &'a self,
        target: VoterId,
        _node: &'a RaftNode,
        rpc: Rpc,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, CallError>> {
        Box::pin(async move {
            let payload = Bytes::from(payload);
            if target == Voter::WITNESS.0 {
                let limited = tokio::time::timeout(timeout, self.ask_witness(rpc, payload, timeout));
                return limited.await.unwrap_or(Err(CallError::TimedOut));
            }
            let Some(node) = Voter(target).node() else {
                return Err(CallError::Unreachable(format!("voter {target} is no node")));
            };
            if node == self.node {
                // The witness's voter on this node calls the node's own.
                return self.ask_own(rpc, &payload).await;
            }
            self.ask(node, target, rpc, &payload, timeout).await.map_err(failed)
        })
    }
}
