//! Answering the calls of other voters.
//!
//! Order: a call is processed, which makes durable what it promises; then the gate is asked; then the latch is looked
//! at; only then the answer goes out. A call that cannot be understood is refused in words and changes nothing.

use crate::error::ServeError;
use crate::handle::Handle;
use crate::transport::Rpc;
use crate::types::{Snapshot, VoterId};
use crate::wire::{self, ChunkAnswer, Received, Request};
use openraft::error::{Fatal, RaftError};
use openraft::raft::AppendEntriesResponse;
use std::time::Instant;

impl Handle {
    /// Processes a call of another voter; the bytes are the answer to it.
    ///
    /// # Errors
    /// When no answer may be given: let the call of the other side fail.
    pub async fn serve(&self, rpc: Rpc, payload: &[u8]) -> Result<Vec<u8>, ServeError> {
        let answer = match wire::decode_request(self.inner.me, rpc, payload) {
            Ok((_, request)) => self.process(request).await?,
            Err(malformed) => wire::encode_refusal(&malformed.0),
        };
        if let Some(gate) = &self.inner.gate
            && !gate.verify().await
        {
            self.inner.store.fail("the gate is closed: this instance may not answer any more");
            return Err(ServeError::Gated);
        }
        match &*self.inner.store.failed().borrow() {
            Some(why) => Err(ServeError::Fatal(why.clone())),
            None => Ok(answer),
        }
    }

    async fn process(&self, request: Request) -> Result<Vec<u8>, ServeError> {
        let raft = &self.inner.raft;
        let fatal_state = |e: Fatal<VoterId>| ServeError::Fatal(self.fatal_text(&e));
        let fatal = |e: RaftError<VoterId>| match e {
            RaftError::Fatal(e) => ServeError::Fatal(self.fatal_text(&e)),
            RaftError::APIError(e) => match e {},
        };
        match request {
            Request::Append(append) => {
                let arrived = Instant::now();
                let ids =
                    append.prev_log_id.into_iter().chain(append.entries.iter().map(|entry| entry.log_id));
                if let Some(other) = self.inner.store.contradiction(ids) {
                    // A leader of before does not know yet what became of its entries.
                    let mine = raft.with_raft_state(|state| *state.vote_ref()).await.map_err(fatal_state)?;
                    let outdated = mine > append.vote;
                    if !outdated {
                        return Err(ServeError::Fatal(self.inner.store.fail_given_up(other.index)));
                    }
                }
                let response = raft.append_entries(append).await.map_err(fatal)?;
                if !matches!(response, AppendEntriesResponse::HigherVote(_)) {
                    *self.inner.heard.lock() = Some(arrived);
                }
                Ok(wire::encode_append_answer(&response))
            }
            Request::Vote(vote) => Ok(wire::encode_vote_answer(&raft.vote(vote).await.map_err(fatal)?)),
            Request::Snapshot(chunk) => self.receive(chunk).await,
        }
    }

    async fn receive(&self, chunk: wire::Chunk) -> Result<Vec<u8>, ServeError> {
        let fatal = |e: Fatal<VoterId>| ServeError::Fatal(self.fatal_text(&e));
        let sender = chunk.vote;
        let mine = self.inner.raft.with_raft_state(|state| *state.vote_ref()).await.map_err(fatal)?;
        if mine > sender {
            return Ok(wire::encode_chunk_answer(&ChunkAnswer::Done(mine)));
        }
        let received = self.inner.incoming.lock().take(chunk);
        let answer = match received {
            Err(malformed) => return Ok(wire::encode_refusal(&malformed.0)),
            Ok(Received::Have(bytes)) => ChunkAnswer::Have(bytes),
            Ok(Received::Whole(stored)) => {
                let snapshot = Snapshot { meta: stored.meta, snapshot: Box::new(stored.data) };
                let installed = self.inner.raft.install_full_snapshot(sender, snapshot).await;
                ChunkAnswer::Done(installed.map_err(fatal)?.vote)
            }
        };
        Ok(wire::encode_chunk_answer(&answer))
    }
}
