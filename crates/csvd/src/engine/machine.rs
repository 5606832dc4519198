//! The replicated state machine on this node: the cluster database behind a lock, and word of each change.
//!
//! Raft applies from one thread; everybody else reads. A log entry that cannot be decoded comes from a newer csvd:
//! this one must not go on, since it would differ from the others from then on, so it says so and panics, which
//! stops the instance.

use csv_cluster::db::{ClusterDb, Envelope, encode_answer};
use csv_raft::StateMachine;
use parking_lot::{RwLock, RwLockReadGuard};
use std::sync::Arc;
use tokio::sync::watch;

/// The database as everybody on this node reads it.
#[derive(Debug, Clone)]
pub(crate) struct Db {
    inner: Arc<RwLock<ClusterDb>>,
    version: watch::Sender<u64>,
}

impl Db {
    pub(crate) fn new() -> Db {
        Db { inner: Arc::default(), version: watch::Sender::new(0) }
    }

    /// For reading; hold it briefly, the log waits.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, ClusterDb> {
        self.inner.read()
    }

    /// For waiting until something changes.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }
}

/// What Raft drives.
#[derive(Debug)]
pub(crate) struct Machine(pub(crate) Db);

impl StateMachine for Machine {
    fn apply(&mut self, index: u64, command: &[u8]) -> Vec<u8> {
        let envelope = match Envelope::decode(command) {
            Ok(envelope) => envelope,
            Err(error) => panic!("log entry {index}: {error}"),
        };
        let answer = self.0.inner.write().apply(&envelope);
        self.0.changed();
        encode_answer(&answer)
    }

    fn snapshot(&self) -> Vec<u8> {
        self.0.read().encode_snapshot()
    }

    fn restore(&mut self, snapshot: &[u8]) -> Result<(), String> {
        let db = ClusterDb::decode_snapshot(snapshot).map_err(|error| error.to_string())?;
        *self.0.inner.write() = db;
        self.0.changed();
        Ok(())
    }
}
