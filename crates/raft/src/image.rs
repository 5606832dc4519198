//! What a voter must remember, and the records by which it changes. A storage writes records; replaying them gives
//! the image back. The live log is bounded by snapshots, so the image holds all of it in memory.

use crate::codec::{Decoder, Encoder, Malformed, encoded_len};
use crate::types::{Entry, LogId, SnapshotMeta, Vote};
use openraft::LogIdOptionExt;
use std::collections::VecDeque;
use std::sync::Arc;

/// A snapshot with its metadata.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StoredSnapshot {
    pub(crate) meta: SnapshotMeta,
    pub(crate) data: Arc<Vec<u8>>,
}

impl StoredSnapshot {
    pub(crate) fn encode(&self, out: &mut Encoder) {
        out.snapshot_meta(&self.meta);
        out.bytes(&self.data);
    }

    pub(crate) fn decode(input: &mut Decoder<'_>) -> Result<Self, Malformed> {
        Ok(StoredSnapshot { meta: input.snapshot_meta()?, data: Arc::new(input.bytes()?.to_vec()) })
    }
}

/// One durable step.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Record {
    /// Where a segment or an area begins: everything that is not entries or snapshot.
    State { vote: Option<Vote>, committed: Option<LogId>, purged: Option<LogId> },
    /// The vote was given.
    Vote(Vote),
    /// Entries follow the last one. The commit index of that moment goes along, because a write of its own for it
    /// would cost an fsync for each commit; losing it costs nothing but a later start of the state machine.
    Append { committed: Option<LogId>, entries: Vec<Entry> },
    /// Entries from this index on are gone.
    Truncate { from: u64 },
    /// Entries up to this one are gone; they are in the snapshot.
    Purge { upto: LogId },
    /// A new snapshot (block region only; a directory has a file for it).
    Snapshot(StoredSnapshot),
}

impl Record {
    /// Kind number on disk, 1 to 6.
    pub(crate) fn kind(&self) -> u8 {
        match self {
            Record::State { .. } => 1,
            Record::Vote(_) => 2,
            Record::Append { .. } => 3,
            Record::Truncate { .. } => 4,
            Record::Purge { .. } => 5,
            Record::Snapshot(_) => 6,
        }
    }

    pub(crate) fn encode(&self, out: &mut Encoder) {
        match self {
            Record::State { vote, committed, purged } => {
                out.option(vote.as_ref(), Encoder::vote);
                out.option(committed.as_ref(), Encoder::log_id);
                out.option(purged.as_ref(), Encoder::log_id);
            }
            Record::Vote(vote) => out.vote(vote),
            Record::Append { committed, entries } => {
                out.option(committed.as_ref(), Encoder::log_id);
                out.entries(entries);
            }
            Record::Truncate { from } => out.u64(*from),
            Record::Purge { upto } => out.log_id(upto),
            Record::Snapshot(snapshot) => snapshot.encode(out),
        }
    }

    pub(crate) fn decode(kind: u8, body: &[u8]) -> Result<Self, Malformed> {
        let mut input = Decoder::new(body);
        let record = match kind {
            1 => Record::State {
                vote: input.option(Decoder::vote)?,
                committed: input.option(Decoder::log_id)?,
                purged: input.option(Decoder::log_id)?,
            },
            2 => Record::Vote(input.vote()?),
            3 => Record::Append { committed: input.option(Decoder::log_id)?, entries: input.entries()? },
            4 => Record::Truncate { from: input.u64()? },
            5 => Record::Purge { upto: input.log_id()? },
            6 => Record::Snapshot(StoredSnapshot::decode(&mut input)?),
            other => {
                return Err(Malformed(format!("record kind {other} is not known; a newer version wrote it")));
            }
        };
        input.finish()?;
        Ok(record)
    }
}

/// What a voter remembers.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Image {
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogId>,
    /// Last entry that is gone because a snapshot holds it.
    pub(crate) purged: Option<LogId>,
    /// Indexes without a gap.
    pub(crate) entries: VecDeque<Entry>,
    /// Bytes of the entries, about.
    pub(crate) log_bytes: usize,
    pub(crate) snapshot: Option<StoredSnapshot>,
}

impl Image {
    pub(crate) fn last_log_id(&self) -> Option<LogId> {
        self.entries.back().map(|e| e.log_id).or(self.purged)
    }

    /// The record with which a new segment or area begins.
    pub(crate) fn state(&self) -> Record {
        Record::State { vote: self.vote, committed: self.committed, purged: self.purged }
    }

    /// Entries with `start <= index < end`; what is not there is left out.
    pub(crate) fn range(&self, start: u64, end: u64) -> impl Iterator<Item = &Entry> {
        let first = self.entries.front().map_or(0, |e| e.log_id.index);
        let position = |index: u64| {
            usize::try_from(index.saturating_sub(first)).unwrap_or(usize::MAX).min(self.entries.len())
        };
        let start = position(start);
        self.entries.range(start..position(end).max(start))
    }

    /// Takes a record that is durable.
    ///
    /// # Errors
    /// When it does not follow from what is there: the log has a gap.
    pub(crate) fn apply(&mut self, record: Record) -> Result<(), Malformed> {
        match record {
            Record::State { vote, committed, purged } => {
                self.vote = vote;
                self.committed = committed;
                self.purged = purged;
            }
            Record::Vote(vote) => self.vote = Some(vote),
            Record::Append { committed, entries } => {
                self.committed = self.committed.max(committed);
                for entry in entries {
                    self.push(entry)?;
                }
            }
            Record::Truncate { from } => {
                while self.entries.back().is_some_and(|e| e.log_id.index >= from) {
                    self.forget(VecDeque::pop_back);
                }
            }
            Record::Purge { upto } => {
                while self.entries.front().is_some_and(|e| e.log_id.index <= upto.index) {
                    self.forget(VecDeque::pop_front);
                }
                self.purged = self.purged.max(Some(upto));
            }
            Record::Snapshot(snapshot) => self.snapshot = Some(snapshot),
        }
        Ok(())
    }

    fn push(&mut self, entry: Entry) -> Result<(), Malformed> {
        if let Some(last) = self.entries.back()
            && entry.log_id.index != last.log_id.index + 1
        {
            return Err(Malformed(format!(
                "entry {} does not follow entry {}: the log has a gap",
                entry.log_id.index, last.log_id.index
            )));
        }
        self.log_bytes += encoded_len(&entry);
        self.entries.push_back(entry);
        Ok(())
    }

    fn forget(&mut self, pop: fn(&mut VecDeque<Entry>) -> Option<Entry>) {
        if let Some(entry) = pop(&mut self.entries) {
            self.log_bytes = self.log_bytes.saturating_sub(encoded_len(&entry));
        }
    }

    /// Called when everything is replayed: is this something that a voter may start with?
    ///
    /// # Errors
    /// What does not fit together.
    pub(crate) fn check(&self) -> Result<(), Malformed> {
        let snapshot_last = self.snapshot.as_ref().and_then(|s| s.meta.last_log_id);
        if self.purged.next_index() > snapshot_last.next_index() {
            return Err(Malformed(format!(
                "entries up to {} were purged, but the snapshot ends at {:?}: the newest snapshot is missing",
                self.purged.next_index() - 1,
                snapshot_last.map(|id| id.index)
            )));
        }
        if let Some(first) = self.entries.front()
            && first.log_id.index != self.purged.next_index()
        {
            return Err(Malformed(format!(
                "the first entry is {}, but {} must follow what was purged: the log has a gap",
                first.log_id.index,
                self.purged.next_index()
            )));
        }
        let last_leader = self.last_log_id().map_or(0, |id| id.leader_id.term);
        if last_leader > 0 && self.vote.is_none_or(|vote| vote.leader_id.term < last_leader) {
            return Err(Malformed(format!(
                "an entry is of term {last_leader}, but no vote of that term is there"
            )));
        }
        if self.committed.next_index() > self.last_log_id().next_index().max(snapshot_last.next_index()) {
            return Err(Malformed("the commit index lies behind the end of the log".to_owned()));
        }
        Ok(())
    }
}
