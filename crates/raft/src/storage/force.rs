//! Making a voter the only one, by force: for a cluster whose other voters are gone for good.
//!
//! A membership with this voter alone is appended to its log, in a term of its own. When the voter starts it elects itself and
//! commits everything in its log, which may include entries that had never been committed. A command of the caller comes behind
//! the membership, so that its state machine takes nothing new before it. Entries that only the others had are lost. A second voter that is treated so makes a second cluster: the caller asks a human first.

use super::{OpenError, OpenStorage, StorageFailure, directory};
use crate::image::Record;
use crate::types::{Command, Entry, Identity, LogId, Membership, RaftNode, Vote};
use openraft::{CommittedLeaderId, EntryPayload};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Makes the voter of this directory the only voter and the only member, and `command` the first that it commits. Its instance
/// must not run.
///
/// # Errors
/// As [`directory::open`], and when it cannot be written; then nothing or only the new term is there.
pub fn sole_voter(path: &Path, me: Identity, node: RaftNode, command: &[u8]) -> Result<(), OpenError> {
    let OpenStorage { mut backend, mut image, .. } = directory::open(path, me)?;
    let last = image.last_log_id();
    let term = image.vote.map_or(0, |vote| vote.leader_id.term).max(last.map_or(0, |id| id.leader_id.term));
    let index = last.map_or(0, |id| id.index + 1);
    let membership = Membership::new(vec![BTreeSet::from([me.voter])], BTreeMap::from([(me.voter, node)]));
    let entry = |index, payload| Entry {
        log_id: LogId::new(CommittedLeaderId::new(term + 1, me.voter), index),
        payload,
    };
    let entries = vec![
        entry(index, EntryPayload::Membership(membership)),
        entry(index + 1, EntryPayload::Normal(Command::new(command))),
    ];
    let records =
        [Record::Vote(Vote::new(term + 1, me.voter)), Record::Append { committed: image.committed, entries }];
    for record in records {
        backend.write(&record, &image)?;
        let applied = image.apply(record);
        applied.map_err(|error| StorageFailure::Io { what: "forced start".to_owned(), error: error.0 })?;
    }
    Ok(())
}
