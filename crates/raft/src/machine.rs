//! The state machine as openraft sees it: the user's [`StateMachine`] plus the membership and the last applied
//! entry, which go into the snapshot's metadata. Its state is durable by snapshot and log only.

use crate::image::StoredSnapshot;
use crate::store::Store;
use crate::types::{
    Answer, Entry, LogId, Snapshot, SnapshotMeta, StateMachine, StorageError, StoredMembership, TypeConfig,
};
use openraft::storage::RaftStateMachine;
use openraft::{AnyError, EntryPayload, OptionalSend, RaftSnapshotBuilder, StorageIOError};
use parking_lot::Mutex;
use std::sync::Arc;

/// openraft's state machine.
pub(crate) struct Machine {
    store: Arc<Store>,
    /// Never contended: openraft wants `Sync`, but calls by `&mut` only.
    machine: Mutex<Box<dyn StateMachine>>,
    last_applied: Option<LogId>,
    membership: StoredMembership,
}

impl Machine {
    /// Puts the machine into the state of the stored snapshot, if there is one.
    pub(crate) fn new(store: Arc<Store>, mut machine: Box<dyn StateMachine>) -> Result<Self, String> {
        let snapshot = store.with_image(|image| image.snapshot.clone());
        let (mut last_applied, mut membership) = (None, StoredMembership::default());
        if let Some(snapshot) = snapshot {
            machine.restore(&snapshot.data)?;
            last_applied = snapshot.meta.last_log_id;
            membership = snapshot.meta.last_membership;
        }
        Ok(Machine { store, machine: Mutex::new(machine), last_applied, membership })
    }
}

fn to_openraft(snapshot: StoredSnapshot) -> Snapshot {
    Snapshot { meta: snapshot.meta, snapshot: Box::new(snapshot.data) }
}

/// A consistent state on its way to the storage.
#[derive(Debug)]
pub(crate) struct Builder {
    store: Arc<Store>,
    snapshot: StoredSnapshot,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    async fn build_snapshot(&mut self) -> Result<Snapshot, StorageError> {
        let snapshot = self.snapshot.clone();
        let signature = snapshot.meta.signature();
        self.store
            .save_snapshot(snapshot.clone())
            .await
            .map_err(|e| StorageIOError::write_snapshot(Some(signature), e))?;
        Ok(to_openraft(snapshot))
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError> {
        Ok((self.last_applied, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Answer>, StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut answers = Vec::new();
        for entry in entries {
            self.last_applied = Some(entry.log_id);
            answers.push(match entry.payload {
                EntryPayload::Blank => Answer::default(),
                EntryPayload::Normal(command) => {
                    Answer(self.machine.get_mut().apply(entry.log_id.index, command.bytes()))
                }
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Answer::default()
                }
            });
        }
        Ok(answers)
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        let meta = SnapshotMeta {
            last_log_id: self.last_applied,
            last_membership: self.membership.clone(),
            // Never twice the same: a transfer that was begun with other bytes must not be gone on with.
            snapshot_id: uuid::Uuid::new_v4().to_string(),
        };
        let snapshot = StoredSnapshot { meta, data: Arc::new(self.machine.get_mut().snapshot()) };
        Builder { store: self.store.clone(), snapshot }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Arc<Vec<u8>>>, StorageError> {
        // Receiving is done by `crate::transfer`, into memory of its own.
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Box<Arc<Vec<u8>>>,
    ) -> Result<(), StorageError> {
        let stored = StoredSnapshot { meta: meta.clone(), data: *snapshot };
        // First the machine: bytes that it cannot take must not become the snapshot that every start begins with.
        self.machine.get_mut().restore(&stored.data).map_err(|why| {
            let why = format!("the snapshot that the leader sent cannot be used: {why}");
            self.store.fail(&why);
            StorageIOError::read_snapshot(Some(meta.signature()), AnyError::error(why))
        })?;
        self.last_applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.store
            .save_snapshot(stored)
            .await
            .map_err(|e| StorageIOError::write_snapshot(Some(meta.signature()), e).into())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, StorageError> {
        Ok(self.store.with_image(|image| image.snapshot.clone()).map(to_openraft))
    }
}
