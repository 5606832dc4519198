//! The bytes of log ids, votes, entries and memberships: the same on disk and on the wire.
//!
//! All numbers are little-endian. docs/raft-storage.md lists each form. Decoding never panics, never allocates
//! more than the input is long, and refuses left-over bytes where it is told to finish.

use crate::types::{
    Command, Entry, LogId, Membership, RaftNode, SnapshotMeta, StoredMembership, Vote, VoterId,
};
use openraft::{CommittedLeaderId, EntryPayload};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes that are not of the documented form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Malformed(pub(crate) String);

type Result<T> = std::result::Result<T, Malformed>;

/// Builds a message.
#[derive(Debug, Default)]
pub(crate) struct Encoder(pub(crate) Vec<u8>);

impl Encoder {
    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Length as u32, then the bytes. What is longer than u32 can say is refused long before.
    pub(crate) fn bytes(&mut self, value: &[u8]) {
        self.u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(value);
    }

    pub(crate) fn log_id(&mut self, id: &LogId) {
        self.u64(id.leader_id.term);
        self.u64(id.leader_id.node_id);
        self.u64(id.index);
    }

    pub(crate) fn option<T>(&mut self, value: Option<&T>, encode: impl FnOnce(&mut Self, &T)) {
        match value {
            None => self.u8(0),
            Some(value) => {
                self.u8(1);
                encode(self, value);
            }
        }
    }

    pub(crate) fn vote(&mut self, vote: &Vote) {
        self.u64(vote.leader_id.term);
        self.u64(vote.leader_id.node_id);
        self.u8(u8::from(vote.committed));
    }

    pub(crate) fn membership(&mut self, membership: &Membership) {
        let record = MembershipRecord {
            configs: membership.get_joint_config().clone(),
            nodes: membership.nodes().map(|(id, node)| (*id, node.clone())).collect(),
        };
        // Maps with integer keys and strings always encode.
        self.bytes(&serde_json::to_vec(&record).unwrap_or_default());
    }

    pub(crate) fn stored_membership(&mut self, stored: &StoredMembership) {
        self.option(stored.log_id().as_ref(), Encoder::log_id);
        self.membership(stored.membership());
    }

    pub(crate) fn entry(&mut self, entry: &Entry) {
        self.log_id(&entry.log_id);
        match &entry.payload {
            EntryPayload::Blank => self.u8(0),
            EntryPayload::Normal(command) => {
                self.u8(1);
                self.bytes(command.bytes());
            }
            EntryPayload::Membership(membership) => {
                self.u8(2);
                self.membership(membership);
            }
        }
    }

    pub(crate) fn entries(&mut self, entries: &[Entry]) {
        self.u32(u32::try_from(entries.len()).unwrap_or(u32::MAX));
        for entry in entries {
            self.entry(entry);
        }
    }

    pub(crate) fn snapshot_meta(&mut self, meta: &SnapshotMeta) {
        self.option(meta.last_log_id.as_ref(), Encoder::log_id);
        self.stored_membership(&meta.last_membership);
        self.bytes(meta.snapshot_id.as_bytes());
    }
}

/// A membership as it is written: JSON, so that later versions can add members to it.
#[derive(Serialize, Deserialize)]
struct MembershipRecord {
    configs: Vec<BTreeSet<VoterId>>,
    nodes: BTreeMap<VoterId, RaftNode>,
}

/// Takes a message apart.
#[derive(Debug)]
pub(crate) struct Decoder<'a>(&'a [u8]);

impl<'a> Decoder<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Decoder(bytes)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let Some((head, rest)) = self.0.split_at_checked(len) else {
            return Err(Malformed(format!("{len} bytes wanted, {} left", self.0.len())));
        };
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn uuid(&mut self) -> Result<uuid::Uuid> {
        Ok(uuid::Uuid::from_bytes(self.array()?))
    }

    pub(crate) fn flag(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Malformed(format!("{other} where 0 or 1 must stand"))),
        }
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8]> {
        let len = self.u32()?;
        self.take(usize::try_from(len).unwrap_or(usize::MAX))
    }

    pub(crate) fn string(&mut self) -> Result<String> {
        String::from_utf8(self.bytes()?.to_vec()).map_err(|e| Malformed(e.to_string()))
    }

    pub(crate) fn log_id(&mut self) -> Result<LogId> {
        let (term, node, index) = (self.u64()?, self.u64()?, self.u64()?);
        Ok(LogId::new(CommittedLeaderId::new(term, node), index))
    }

    pub(crate) fn option<T>(&mut self, decode: impl FnOnce(&mut Self) -> Result<T>) -> Result<Option<T>> {
        if self.flag()? { decode(self).map(Some) } else { Ok(None) }
    }

    pub(crate) fn vote(&mut self) -> Result<Vote> {
        let mut vote = Vote::new(self.u64()?, self.u64()?);
        vote.committed = self.flag()?;
        Ok(vote)
    }

    pub(crate) fn membership(&mut self) -> Result<Membership> {
        let record: MembershipRecord =
            serde_json::from_slice(self.bytes()?).map_err(|e| Malformed(format!("membership: {e}")))?;
        Ok(Membership::new(record.configs, record.nodes))
    }

    pub(crate) fn stored_membership(&mut self) -> Result<StoredMembership> {
        Ok(StoredMembership::new(self.option(Decoder::log_id)?, self.membership()?))
    }

    pub(crate) fn entry(&mut self) -> Result<Entry> {
        let log_id = self.log_id()?;
        let payload = match self.u8()? {
            0 => EntryPayload::Blank,
            1 => EntryPayload::Normal(Command::new(self.bytes()?)),
            2 => EntryPayload::Membership(self.membership()?),
            other => return Err(Malformed(format!("entry kind {other} is not known"))),
        };
        Ok(Entry { log_id, payload })
    }

    pub(crate) fn entries(&mut self) -> Result<Vec<Entry>> {
        // No reservation by the count: it may lie, and every entry takes at least 25 bytes of the input.
        (0..self.u32()?).map(|_| self.entry()).collect()
    }

    pub(crate) fn snapshot_meta(&mut self) -> Result<SnapshotMeta> {
        Ok(SnapshotMeta {
            last_log_id: self.option(Decoder::log_id)?,
            last_membership: self.stored_membership()?,
            snapshot_id: self.string()?,
        })
    }

    /// Nothing may be left.
    pub(crate) fn finish(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed(format!("{} bytes too many", self.0.len()))) }
    }
}

/// Bytes that the entry takes when encoded, near enough for bounding messages.
pub(crate) fn encoded_len(entry: &Entry) -> usize {
    25 + match &entry.payload {
        EntryPayload::Blank => 0,
        EntryPayload::Normal(command) => 4 + command.bytes().len(),
        EntryPayload::Membership(membership) => 4 + 80 * membership.nodes().count(),
    }
}
