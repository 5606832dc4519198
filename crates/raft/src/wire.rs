//! Messages between voters.
//!
//! Request: version (1 byte), cluster id (16), sender (u64), receiver (u64), then the message. Answer: version,
//! status (0: the message follows; 1: a text), message. A message for another cluster or another voter is refused:
//! addresses get reused, and a vote that was meant for somebody else must not be counted.

use crate::codec::{Decoder, Encoder, Malformed};
use crate::image::StoredSnapshot;
use crate::transport::Rpc;
use crate::types::{Identity, SnapshotMeta, TypeConfig, Vote, VoterId};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, VoteRequest, VoteResponse};
use std::sync::Arc;

const VERSION: u8 = 1;
/// Longest snapshot that is taken in.
pub(crate) const SNAPSHOT_BYTES_MAX: u64 = 256 << 20;

/// A piece of a snapshot. All pieces carry the metadata, so that any of them can be the first after a restart.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chunk {
    pub(crate) vote: Vote,
    /// Its `snapshot_id` names the transfer.
    pub(crate) meta: SnapshotMeta,
    /// Length and CRC-32 of the whole.
    pub(crate) total: u64,
    pub(crate) crc: u32,
    pub(crate) offset: u64,
    pub(crate) data: Vec<u8>,
}

/// Answer to a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ChunkAnswer {
    /// So many bytes are there; go on from there.
    Have(u64),
    /// Installed, or refused by a higher vote.
    Done(Vote),
}

#[derive(Debug)]
pub(crate) enum Request {
    Append(AppendEntriesRequest<TypeConfig>),
    Vote(VoteRequest<VoterId>),
    Snapshot(Chunk),
}

fn request(me: Identity, to: VoterId) -> Encoder {
    let mut out = Encoder::default();
    out.u8(VERSION);
    out.0.extend_from_slice(me.cluster.as_bytes());
    out.u64(me.voter);
    out.u64(to);
    out
}

pub(crate) fn encode_append(me: Identity, to: VoterId, rpc: &AppendEntriesRequest<TypeConfig>) -> Vec<u8> {
    let mut out = request(me, to);
    out.vote(&rpc.vote);
    out.option(rpc.prev_log_id.as_ref(), Encoder::log_id);
    out.option(rpc.leader_commit.as_ref(), Encoder::log_id);
    out.entries(&rpc.entries);
    out.0
}

pub(crate) fn encode_vote(me: Identity, to: VoterId, rpc: &VoteRequest<VoterId>) -> Vec<u8> {
    let mut out = request(me, to);
    out.vote(&rpc.vote);
    out.option(rpc.last_log_id.as_ref(), Encoder::log_id);
    out.0
}

pub(crate) fn encode_chunk(me: Identity, to: VoterId, chunk: &Chunk) -> Vec<u8> {
    let mut out = request(me, to);
    out.vote(&chunk.vote);
    out.snapshot_meta(&chunk.meta);
    out.u64(chunk.total);
    out.u32(chunk.crc);
    out.u64(chunk.offset);
    out.bytes(&chunk.data);
    out.0
}

/// A request for this voter, and who sent it.
pub(crate) fn decode_request(
    me: Identity,
    rpc: Rpc,
    payload: &[u8],
) -> Result<(VoterId, Request), Malformed> {
    let mut input = Decoder::new(payload);
    let version = input.u8()?;
    if version != VERSION {
        return Err(Malformed(format!(
            "message version {version} is not known here; this node speaks {VERSION}"
        )));
    }
    let (cluster, from, to) = (input.uuid()?, input.u64()?, input.u64()?);
    if cluster != me.cluster {
        return Err(Malformed(format!("this node is of cluster {}, not of {cluster}", me.cluster)));
    }
    if to != me.voter {
        return Err(Malformed(format!("this is voter {}, not {to}", me.voter)));
    }
    let request = match rpc {
        Rpc::Append => Request::Append(AppendEntriesRequest {
            vote: input.vote()?,
            prev_log_id: input.option(Decoder::log_id)?,
            leader_commit: input.option(Decoder::log_id)?,
            entries: input.entries()?,
        }),
        Rpc::Vote => Request::Vote(VoteRequest::new(input.vote()?, input.option(Decoder::log_id)?)),
        Rpc::Snapshot => Request::Snapshot(Chunk {
            vote: input.vote()?,
            meta: input.snapshot_meta()?,
            total: input.u64()?,
            crc: input.u32()?,
            offset: input.u64()?,
            data: input.bytes()?.to_vec(),
        }),
    };
    input.finish()?;
    Ok((from, request))
}

fn answer() -> Encoder {
    Encoder(vec![VERSION, 0])
}

pub(crate) fn encode_refusal(text: &str) -> Vec<u8> {
    let mut out = Encoder(vec![VERSION, 1]);
    out.bytes(text.as_bytes());
    out.0
}

pub(crate) fn encode_append_answer(response: &AppendEntriesResponse<VoterId>) -> Vec<u8> {
    let mut out = answer();
    match response {
        AppendEntriesResponse::Success => out.u8(0),
        AppendEntriesResponse::PartialSuccess(matching) => {
            out.u8(1);
            out.option(matching.as_ref(), Encoder::log_id);
        }
        AppendEntriesResponse::Conflict => out.u8(2),
        AppendEntriesResponse::HigherVote(vote) => {
            out.u8(3);
            out.vote(vote);
        }
    }
    out.0
}

pub(crate) fn encode_vote_answer(response: &VoteResponse<VoterId>) -> Vec<u8> {
    let mut out = answer();
    out.vote(&response.vote);
    out.u8(u8::from(response.vote_granted));
    out.option(response.last_log_id.as_ref(), Encoder::log_id);
    out.0
}

pub(crate) fn encode_chunk_answer(response: &ChunkAnswer) -> Vec<u8> {
    let mut out = answer();
    match response {
        ChunkAnswer::Have(bytes) => {
            out.u8(0);
            out.u64(*bytes);
        }
        ChunkAnswer::Done(vote) => {
            out.u8(1);
            out.vote(vote);
        }
    }
    out.0
}

/// What an answer says: the message, or the other side's words why there is none.
fn open_answer(bytes: &[u8]) -> Result<Decoder<'_>, Malformed> {
    let mut input = Decoder::new(bytes);
    let version = input.u8()?;
    if version != VERSION {
        return Err(Malformed(format!("answer of version {version}; this node speaks {VERSION}")));
    }
    if input.flag()? { Err(Malformed(input.string()?)) } else { Ok(input) }
}

pub(crate) fn decode_append_answer(bytes: &[u8]) -> Result<AppendEntriesResponse<VoterId>, Malformed> {
    let mut input = open_answer(bytes)?;
    let response = match input.u8()? {
        0 => AppendEntriesResponse::Success,
        1 => AppendEntriesResponse::PartialSuccess(input.option(Decoder::log_id)?),
        2 => AppendEntriesResponse::Conflict,
        3 => AppendEntriesResponse::HigherVote(input.vote()?),
        other => return Err(Malformed(format!("answer kind {other} is not known"))),
    };
    input.finish()?;
    Ok(response)
}

pub(crate) fn decode_vote_answer(bytes: &[u8]) -> Result<VoteResponse<VoterId>, Malformed> {
    let mut input = open_answer(bytes)?;
    let (vote, granted) = (input.vote()?, input.flag()?);
    let response = VoteResponse::new(vote, input.option(Decoder::log_id)?, granted);
    input.finish()?;
    Ok(response)
}

pub(crate) fn decode_chunk_answer(bytes: &[u8]) -> Result<ChunkAnswer, Malformed> {
    let mut input = open_answer(bytes)?;
    let response =
        if input.flag()? { ChunkAnswer::Done(input.vote()?) } else { ChunkAnswer::Have(input.u64()?) };
    input.finish()?;
    Ok(response)
}

/// A snapshot that is being received. One at a time: the newest transfer that begins wins.
#[derive(Debug, Default)]
pub(crate) struct Incoming(Option<Partial>);

#[derive(Debug)]
struct Partial {
    meta: SnapshotMeta,
    total: u64,
    crc: u32,
    data: Vec<u8>,
}

/// What a piece did.
#[derive(Debug, PartialEq)]
pub(crate) enum Received {
    Have(u64),
    Whole(StoredSnapshot),
}

impl Incoming {
    /// Takes a piece. Pieces that are late, doubled or of another transfer change nothing.
    pub(crate) fn take(&mut self, chunk: Chunk) -> Result<Received, Malformed> {
        if chunk.total > SNAPSHOT_BYTES_MAX {
            return Err(Malformed(format!("a snapshot of {} bytes is too long", chunk.total)));
        }
        let same = self
            .0
            .as_ref()
            .is_some_and(|p| (&p.meta, p.total, p.crc) == (&chunk.meta, chunk.total, chunk.crc));
        if !same {
            if chunk.offset != 0 {
                return Ok(Received::Have(0));
            }
            self.0 = Some(Partial { meta: chunk.meta, total: chunk.total, crc: chunk.crc, data: Vec::new() });
        }
        let Some(partial) = &mut self.0 else { return Ok(Received::Have(0)) };
        let have = partial.data.len() as u64;
        if chunk.offset != have || have + chunk.data.len() as u64 > partial.total {
            return Ok(Received::Have(have));
        }
        partial.data.extend_from_slice(&chunk.data);
        let have = partial.data.len() as u64;
        if have < partial.total {
            return Ok(Received::Have(have));
        }
        match self.0.take() {
            Some(whole) if crc32fast::hash(&whole.data) == whole.crc => {
                Ok(Received::Whole(StoredSnapshot { meta: whole.meta, data: Arc::new(whole.data) }))
            }
            _ => Err(Malformed("the snapshot arrived with a wrong checksum".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Command, Entry, LogId};
    use openraft::{CommittedLeaderId, EntryPayload};
    use proptest::prelude::*;

    fn me() -> Identity {
        Identity { cluster: uuid::Uuid::from_u128(7), voter: 2 }
    }

    fn chunk(offset: u64, data: &[u8], whole: &[u8]) -> Chunk {
        Chunk {
            vote: Vote::new_committed(3, 1),
            meta: SnapshotMeta { snapshot_id: "x".to_owned(), ..SnapshotMeta::default() },
            total: whole.len() as u64,
            crc: crc32fast::hash(whole),
            offset,
            data: data.to_vec(),
        }
    }

    #[test]
    fn a_message_for_somebody_else_is_refused() {
        let rpc = VoteRequest::new(Vote::new(4, 1), None);
        let from = Identity { voter: 1, ..me() };
        assert!(decode_request(me(), Rpc::Vote, &encode_vote(from, 2, &rpc)).is_ok());
        let other_voter = decode_request(me(), Rpc::Vote, &encode_vote(from, 3, &rpc)).unwrap_err();
        assert!(other_voter.to_string().contains("not 3"), "{other_voter}");
        let foreign = Identity { cluster: uuid::Uuid::from_u128(8), voter: 1 };
        let other_cluster = decode_request(me(), Rpc::Vote, &encode_vote(foreign, 2, &rpc)).unwrap_err();
        assert!(other_cluster.to_string().contains("cluster"), "{other_cluster}");
    }

    #[test]
    fn append_comes_back() {
        let log_id = LogId::new(CommittedLeaderId::new(3, 1), 9);
        let entry = Entry { log_id, payload: EntryPayload::Normal(Command::new(b"do it")) };
        let rpc = AppendEntriesRequest {
            vote: Vote::new_committed(3, 1),
            prev_log_id: None,
            entries: vec![entry.clone()],
            leader_commit: Some(log_id),
        };
        let bytes = encode_append(Identity { voter: 1, ..me() }, 2, &rpc);
        let (from, Request::Append(back)) = decode_request(me(), Rpc::Append, &bytes).unwrap() else {
            panic!()
        };
        assert_eq!((from, back.vote, back.leader_commit), (1, rpc.vote, rpc.leader_commit));
        assert_eq!(back.entries, vec![entry]);
    }

    #[test]
    fn pieces_out_of_order_do_not_make_a_hole() {
        let whole = b"abcdefghi";
        let mut incoming = Incoming::default();
        assert_eq!(incoming.take(chunk(3, b"def", whole)), Ok(Received::Have(0)));
        assert_eq!(incoming.take(chunk(0, b"abc", whole)), Ok(Received::Have(3)));
        assert_eq!(incoming.take(chunk(6, b"ghi", whole)), Ok(Received::Have(3)));
        assert_eq!(incoming.take(chunk(0, b"abc", whole)), Ok(Received::Have(3)));
        assert_eq!(incoming.take(chunk(3, b"def", whole)), Ok(Received::Have(6)));
        let Ok(Received::Whole(snapshot)) = incoming.take(chunk(6, b"ghi", whole)) else { panic!() };
        assert_eq!(*snapshot.data, whole);
        // A doubled last piece after the end begins nothing.
        assert_eq!(incoming.take(chunk(6, b"ghi", whole)), Ok(Received::Have(0)));
    }

    #[test]
    fn an_empty_snapshot_arrives() {
        assert!(matches!(Incoming::default().take(chunk(0, b"", b"")), Ok(Received::Whole(_))));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for rpc in [Rpc::Append, Rpc::Vote, Rpc::Snapshot] {
                let mut with_head = vec![VERSION];
                with_head.extend_from_slice(me().cluster.as_bytes());
                with_head.extend_from_slice(&1u64.to_le_bytes());
                with_head.extend_from_slice(&2u64.to_le_bytes());
                with_head.extend_from_slice(&bytes);
                let _ = decode_request(me(), rpc, &bytes);
                let _ = decode_request(me(), rpc, &with_head);
            }
            let _ = decode_append_answer(&bytes);
            let _ = decode_vote_answer(&bytes);
            let _ = decode_chunk_answer(&bytes);
        }
    }
}
