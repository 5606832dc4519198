//! The log as openraft sees it ([`LogStore`]), and what log and state machine share ([`Store`]): the storage, the
//! image in memory, and the latch.
//!
//! Reading goes to the image and never waits for the disk. Writing takes the storage, on a thread that may block,
//! and changes the image when the record is durable. The first failure is latched: every later call fails with
//! the same words, the owner hears of it by [`Store::failed`], and openraft stops by itself.

use crate::codec::encoded_len;
use crate::image::{Image, Record, StoredSnapshot};
use crate::storage::{Backend, OpenStorage};
use crate::types::{Entry, LogId, StorageError, TypeConfig, Vote};
use openraft::storage::{LogFlushed, LogState, RaftLogStorage};
use openraft::{
    AnyError, EntryPayload, ErrorSubject, ErrorVerb, OptionalSend, RaftLogReader, StorageIOError,
};
use parking_lot::{Mutex, RwLock};
use std::cmp::Ordering;
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use tokio::sync::{Notify, watch};

/// Bytes of entries that go into one message, about; a single longer entry goes alone.
const MESSAGE_BYTES: usize = 1 << 20;

/// Storage, image and latch.
pub(crate) struct Store {
    /// `None` when closed.
    backend: Mutex<Option<Box<dyn Backend>>>,
    image: RwLock<Image>,
    /// Apart from the image, which is held while a record is written.
    committed: Mutex<Option<LogId>>,
    failed: watch::Sender<Option<String>>,
    /// A snapshot would be good.
    pub(crate) pressed: Notify,
}

impl Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("failed", &*self.failed.borrow()).finish_non_exhaustive()
    }
}

impl Store {
    pub(crate) fn new(storage: OpenStorage) -> Arc<Self> {
        Arc::new(Store {
            committed: Mutex::new(storage.image.committed),
            backend: Mutex::new(Some(storage.backend)),
            image: RwLock::new(storage.image),
            failed: watch::Sender::new(None),
            pressed: Notify::new(),
        })
    }

    /// The latch.
    pub(crate) fn failed(&self) -> watch::Receiver<Option<String>> {
        self.failed.subscribe()
    }

    /// Latches a failure; the first one stays.
    pub(crate) fn fail(&self, why: &str) {
        self.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            if first {
                tracing::error!("the database of this voter stops for good: {why}");
                *failed = Some(why.to_owned());
            }
            first
        });
    }

    pub(crate) fn with_image<R>(&self, look: impl FnOnce(&Image) -> R) -> R {
        look(&self.image.read())
    }

    /// The first of these entries that differs from one that is known here to be committed.
    ///
    /// Consensus never sends such a one. After a forced start on another node it is sent, and openraft does not look: it takes
    /// for granted that what is committed is the same everywhere.
    pub(crate) fn contradiction(&self, mut ids: impl Iterator<Item = LogId>) -> Option<LogId> {
        let committed = (*self.committed.lock())?;
        self.with_image(|image| {
            ids.find(|id| match id.index.cmp(&committed.index) {
                Ordering::Greater => false,
                Ordering::Equal => *id != committed,
                Ordering::Less => {
                    image.range(id.index, id.index + 1).next().is_some_and(|known| known.log_id != *id)
                }
            })
        })
    }

    /// What was applied here was given up: this instance must not go on.
    pub(crate) fn fail_given_up(&self, from: u64) -> String {
        self.latch(format!(
            "the leader has other entries than this node from entry {from} on, which this node knew to be committed: after a \
             forced start of the cluster run `csvctl cluster rejoin` on this node"
        ))
    }

    fn check(&self) -> Result<(), String> {
        self.failed.borrow().as_ref().map_or(Ok(()), |why| Err(why.clone()))
    }

    /// Makes a record durable, then visible. Blocks.
    fn write_blocking(&self, record: Record) -> Result<(), String> {
        let mut backend = self.backend.lock();
        self.check()?;
        let backend = backend.as_mut().ok_or("the database is closed")?;
        let pressed = {
            let image = self.image.read();
            if is_older(&record, &image) {
                return Ok(());
            }
            let written = backend.write(&record, &image);
            written.map(|()| backend.pressed(&image)).map_err(|e| self.latch(e.to_string()))?
        };
        if pressed {
            self.pressed.notify_one();
        }
        self.image.write().apply(record).map_err(|e| self.latch(e.to_string()))
    }

    /// Gives the storage back, after a record that is being written.
    pub(crate) async fn close(self: &Arc<Self>) {
        let store = self.clone();
        // It fails only when the runtime ends, and everything with it.
        let _ = tokio::task::spawn_blocking(move || drop(store.backend.lock().take())).await;
    }

    fn latch(&self, why: String) -> String {
        self.fail(&why);
        why
    }

    async fn write(self: &Arc<Self>, record: Record) -> Result<(), AnyError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || store.write_blocking(record))
            .await
            .map_err(|e| AnyError::error(self.latch(format!("the writer of the database ended: {e}"))))?
            .map_err(AnyError::error)
    }

    pub(crate) async fn save_snapshot(self: &Arc<Self>, snapshot: StoredSnapshot) -> Result<(), AnyError> {
        self.write(Record::Snapshot(snapshot)).await
    }
}

/// A snapshot that was being built while a newer one came from the leader must not replace it: what that one
/// covers may be purged already.
fn is_older(record: &Record, image: &Image) -> bool {
    match (record, &image.snapshot) {
        (Record::Snapshot(new), Some(old)) => new.meta.last_log_id < old.meta.last_log_id,
        _ => false,
    }
}

/// openraft's log store and log reader.
#[derive(Debug, Clone)]
pub(crate) struct LogStore(pub(crate) Arc<Store>);

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        Ok(self.0.with_image(|image| image.range(start, end).cloned().collect()))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, StorageError> {
        let mut bytes = 0;
        Ok(self.0.with_image(|image| {
            image
                .range(start, end)
                .take_while(|entry| {
                    let first = bytes == 0;
                    bytes += encoded_len(entry);
                    first || bytes <= MESSAGE_BYTES
                })
                .cloned()
                .collect()
        }))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        Ok(self.0.with_image(|image| LogState {
            last_purged_log_id: image.purged,
            last_log_id: image.last_log_id(),
        }))
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        self.0.write(Record::Vote(*vote)).await.map_err(|e| StorageIOError::write_vote(e).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        Ok(self.0.with_image(|image| image.vote))
    }

    /// Kept in memory; it becomes durable with the next entries (see [`Record::Append`]).
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        self.0.check().map_err(|e| StorageIOError::write(AnyError::error(e)))?;
        *self.0.committed.lock() = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        Ok(*self.0.committed.lock())
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        for entry in &entries {
            if let EntryPayload::Normal(command) = &entry.payload {
                // Before it can be on disk: from here on nobody may say that it will not happen.
                command.mark_appended();
            }
        }
        let committed = *self.0.committed.lock();
        match self.0.write(Record::Append { committed, entries }).await {
            Ok(()) => {
                callback.log_io_completed(Ok(()));
                Ok(())
            }
            Err(e) => {
                callback.log_io_completed(Err(std::io::Error::other(e.to_string())));
                Err(StorageIOError::write_logs(e).into())
            }
        }
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        if self.0.with_image(|image| image.committed >= Some(log_id)) {
            // See `contradiction`.
            let failed = AnyError::error(self.0.fail_given_up(log_id.index));
            return Err(StorageIOError::new(ErrorSubject::Log(log_id), ErrorVerb::Delete, failed).into());
        }
        let written = self.0.write(Record::Truncate { from: log_id.index }).await;
        written.map_err(|e| StorageIOError::new(ErrorSubject::Log(log_id), ErrorVerb::Delete, e).into())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let written = self.0.write(Record::Purge { upto: log_id }).await;
        written.map_err(|e| StorageIOError::new(ErrorSubject::Log(log_id), ErrorVerb::Delete, e).into())
    }
}
