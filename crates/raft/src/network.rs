//! openraft's network over a [`Transport`]; remembers when each voter last answered.

use crate::codec::Malformed;
use crate::transport::{CallError, Rpc, Transport};
use crate::types::{Identity, RaftNode, Snapshot, TypeConfig, Vote, VoterId};
use crate::wire::{self, Chunk, ChunkAnswer};
use openraft::error::{
    NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError, Timeout, Unreachable,
};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RPCTypes, RaftNetwork, RaftNetworkFactory};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of a snapshot in one message.
const CHUNK_BYTES: usize = 1 << 20;
/// Attempts at one piece of a snapshot before the transfer is given up; the replication begins it again.
const CHUNK_ATTEMPTS: u32 = 5;
/// Pause before a voter that cannot be reached is tried again.
const BACKOFF: Duration = Duration::from_millis(250);

/// When each voter last acknowledged this one as the leader: the time at which the message was **sent**, so that
/// the lease that follows from it is never too long.
#[derive(Debug, Default)]
pub(crate) struct Acks(Mutex<BTreeMap<VoterId, Instant>>);

impl Acks {
    fn acknowledged(&self, voter: VoterId, sent: Instant) {
        let mut acks = self.0.lock();
        let newest = acks.entry(voter).or_insert(sent);
        *newest = (*newest).max(sent);
    }

    /// Milliseconds since the voter last acknowledged.
    pub(crate) fn age_ms(&self, voter: VoterId) -> Option<u64> {
        let sent = *self.0.lock().get(&voter)?;
        Some(u64::try_from(sent.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}

/// Makes [`Peer`]s.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) me: Identity,
    pub(crate) acks: Arc<Acks>,
}

/// One other voter or learner.
pub(crate) struct Peer {
    network: Network,
    target: VoterId,
    node: RaftNode,
}

type RpcError = RPCError<VoterId, RaftNode, RaftError<VoterId>>;

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: VoterId, node: &RaftNode) -> Peer {
        Peer { network: self.clone(), target, node: node.clone() }
    }
}

impl Peer {
    async fn call(&self, rpc: Rpc, payload: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, CallError> {
        self.network.transport.call(self.target, &self.node, rpc, payload, timeout).await
    }

    /// A refusal counts as unreachable, so that openraft waits before it tries again.
    fn error(&self, error: &CallError, action: RPCTypes, timeout: Duration) -> RpcError {
        match error {
            CallError::TimedOut => {
                RPCError::Timeout(Timeout { action, id: self.network.me.voter, target: self.target, timeout })
            }
            CallError::Unreachable(_) | CallError::Remote(_) => {
                RPCError::Unreachable(Unreachable::new(error))
            }
        }
    }

    async fn send_chunk(&self, chunk: &Chunk, timeout: Duration) -> Result<ChunkAnswer, CallError> {
        let payload = wire::encode_chunk(self.network.me, self.target, chunk);
        let answer = self.call(Rpc::Snapshot, payload, timeout).await?;
        wire::decode_chunk_answer(&answer).map_err(refused)
    }

    /// Sends piece after piece until the other side says that it is done.
    async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: &Snapshot,
        timeout: Duration,
    ) -> Result<Vote, CallError> {
        let data = &**snapshot.snapshot;
        let crc = crc32fast::hash(data);
        let (mut offset, mut failures) = (0, 0);
        loop {
            let piece = &data[offset..(offset + CHUNK_BYTES).min(data.len())];
            let chunk = Chunk {
                vote,
                meta: snapshot.meta.clone(),
                total: data.len() as u64,
                crc,
                offset: offset as u64,
                data: piece.to_vec(),
            };
            let error = match self.send_chunk(&chunk, timeout).await {
                Ok(ChunkAnswer::Done(vote)) => return Ok(vote),
                Ok(ChunkAnswer::Have(have)) => {
                    let have = usize::try_from(have).unwrap_or(0).min(data.len());
                    let forward = have > offset;
                    offset = have;
                    if forward {
                        failures = 0;
                        continue;
                    }
                    CallError::Remote(format!("the transfer was thrown back to byte {have}"))
                }
                Err(error) => error,
            };
            failures += 1;
            if failures >= CHUNK_ATTEMPTS {
                return Err(error);
            }
            tokio::time::sleep(BACKOFF).await;
        }
    }
}

fn refused(malformed: Malformed) -> CallError {
    CallError::Remote(malformed.0)
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<VoterId>, RpcError> {
        let sent = Instant::now();
        let payload = wire::encode_append(self.network.me, self.target, &rpc);
        let answer = self.call(Rpc::Append, payload, option.hard_ttl()).await;
        let response = answer.and_then(|answer| wire::decode_append_answer(&answer).map_err(refused));
        match response {
            Ok(response) => {
                if !matches!(response, AppendEntriesResponse::HigherVote(_)) {
                    self.network.acks.acknowledged(self.target, sent);
                }
                Ok(response)
            }
            Err(e) => Err(self.error(&e, RPCTypes::AppendEntries, option.hard_ttl())),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<VoterId>,
        option: RPCOption,
    ) -> Result<VoteResponse<VoterId>, RpcError> {
        let payload = wire::encode_vote(self.network.me, self.target, &rpc);
        let answer = self.call(Rpc::Vote, payload, option.hard_ttl()).await;
        answer
            .and_then(|answer| wire::decode_vote_answer(&answer).map_err(refused))
            .map_err(|e| self.error(&e, RPCTypes::Vote, option.hard_ttl()))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<VoterId>, StreamingError<TypeConfig, openraft::error::Fatal<VoterId>>> {
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = self.send_snapshot(vote, &snapshot, option.hard_ttl()) => match sent {
                Ok(vote) => Ok(SnapshotResponse::new(vote)),
                Err(e @ CallError::TimedOut) => Err(StreamingError::Network(NetworkError::new(&e))),
                Err(e) => Err(StreamingError::Unreachable(Unreachable::new(&e))),
            },
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(BACKOFF))
    }
}
