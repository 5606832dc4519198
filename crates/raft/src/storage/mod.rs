//! Durable storage of one voter: log, vote and snapshot, on a directory ([`directory`]) or on a raw block region
//! without a file system ([`blocks`]). docs/raft-storage.md has both formats byte by byte.
//!
//! Rules of both
//! * A call returns when its record is durable, and one record at a time is on its way. So whatever a crash leaves
//!   half written is the last record, and nobody was told that it is there.
//! * That torn last record is cut with a warning. Anything else that is not as it was written is refused at open:
//!   a voter that forgot a vote or an entry could help to elect a leader that lacks a committed entry.
//! * A storage never starts empty by itself: it is created for one voter of one cluster, and opened by that.
//! * After a failed write or sync nothing is written any more (a latch sees to it): what the kernel kept
//!   of the failed write is not known.

pub mod blocks;
pub mod directory;
pub mod disk;
pub mod force;
pub(crate) mod frame;
pub(crate) mod slot;

#[cfg(test)]
pub(crate) mod faulty;
#[cfg(test)]
mod tests;

use crate::image::{Image, Record};
use crate::types::Identity;
use std::io;

/// Version of both formats.
pub(crate) const FORMAT: u32 = 1;

/// A write or sync failed; the storage must not be used any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StorageFailure {
    /// No room.
    #[error("{what}: no space left: free space there, then restart csvd; what was acknowledged is safe")]
    Full {
        /// What was done to which file.
        what: String,
    },
    /// The device reported an error.
    #[error(
        "{what}: {error}: check the device, then restart csvd, or replace it and run `csvctl cluster rejoin`"
    )]
    Io {
        /// What was done to which file.
        what: String,
        /// What the system said.
        error: String,
    },
}

impl StorageFailure {
    pub(crate) fn new(what: impl Into<String>, error: &io::Error) -> Self {
        let what = what.into();
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::FileTooLarge];
        if full.contains(&error.kind()) {
            StorageFailure::Full { what }
        } else {
            StorageFailure::Io { what, error: error.to_string() }
        }
    }
}

/// A storage that cannot be opened or created.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Nothing was created there yet.
    #[error("{place} holds no database of this node: join the cluster first, or run `csvctl cluster rejoin`")]
    NotFormatted {
        /// Directory or region.
        place: String,
    },
    /// Something is there already.
    #[error("{place} is not empty: a database is never written over; remove it by hand if it is not needed")]
    NotEmpty {
        /// Directory or region.
        place: String,
    },
    /// It belongs to somebody else.
    #[error("{place} belongs to {found}, not to {wanted}: it is left alone")]
    Foreign {
        /// File or region.
        place: String,
        /// Whose it is.
        found: Identity,
        /// Who wanted it.
        wanted: Identity,
    },
    /// A newer csvfs wrote it.
    #[error("{place} has format {found}; this version reads up to {FORMAT}: install the newer csvfs again")]
    Newer {
        /// File or region.
        place: String,
        /// Its format number.
        found: u32,
    },
    /// It is damaged.
    #[error(
        "{place}, {record}: {problem}. This node must not vote with a damaged database: \
         run `csvctl cluster rejoin` to take a fresh one from the other nodes"
    )]
    Damaged {
        /// File or region.
        place: String,
        /// Which record, with its byte offset.
        record: String,
        /// What is wrong.
        problem: String,
    },
    /// Another process has it open.
    #[error("{place} is in use by another process")]
    Busy {
        /// Directory.
        place: String,
    },
    /// Too small for its purpose.
    #[error("{place} has {bytes} bytes; at least {bytes_min} are needed")]
    TooSmall {
        /// Region.
        place: String,
        /// Its size.
        bytes: u64,
        /// The least size.
        bytes_min: u64,
    },
    /// Reading or preparing it failed.
    #[error("{what}: {error}")]
    Io {
        /// What was done.
        what: String,
        /// What the system said.
        error: String,
    },
}

impl OpenError {
    pub(crate) fn io(what: impl Into<String>, error: &io::Error) -> Self {
        OpenError::Io { what: what.into(), error: error.to_string() }
    }

    pub(crate) fn damaged(place: &str, record: impl Into<String>, problem: impl ToString) -> Self {
        OpenError::Damaged { place: place.to_owned(), record: record.into(), problem: problem.to_string() }
    }
}

impl From<StorageFailure> for OpenError {
    fn from(failure: StorageFailure) -> Self {
        OpenError::Io { what: "while opening the database".to_owned(), error: failure.to_string() }
    }
}

/// Where records go. Blocking; one caller at a time; unusable after the first error.
pub(crate) trait Backend: Send + 'static {
    /// Makes the record durable; a snapshot takes the place of the one before. `image` is what is there without it.
    fn write(&mut self, record: &Record, image: &Image) -> Result<(), StorageFailure>;

    /// Would it be good to take a snapshot and to purge the log?
    fn pressed(&self, image: &Image) -> bool;
}

/// A storage with what was found in it; give it to [`crate::Options`].
pub struct OpenStorage {
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) image: Image,
    pub(crate) identity: Identity,
    /// What had to be tidied up, for the log.
    pub warnings: Vec<String>,
}

impl std::fmt::Debug for OpenStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenStorage")
            .field("identity", &self.identity)
            .field("last_log_id", &self.image.last_log_id())
            .finish_non_exhaustive()
    }
}

impl OpenStorage {
    /// Whose storage it is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }
}
