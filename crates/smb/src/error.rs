//! What can go wrong with an operation of the pool, and what is known about its outcome.

use std::path::PathBuf;
use std::time::Duration;

/// What a caller may conclude from an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing happened on the server.
    Rejected,
    /// It may have happened, or may still happen. A read or write at an offset can be repeated.
    Unknown,
    /// Repeating it is no use before somebody changes the set-up.
    Fatal,
}

/// Error of an operation of the pool.
#[derive(Debug, thiserror::Error)]
pub enum SmbError {
    /// The server refused the operation.
    #[error("server {server} refused {op} on {path}: {source}")]
    Refused {
        /// Address and port.
        server: String,
        /// Operation.
        op: &'static str,
        /// Path on the share.
        path: String,
        /// The reason.
        source: std::io::Error,
    },
    /// Connection lost or no answer in time.
    #[error(
        "outcome of {op} on {path} at server {server} is unknown ({reason}); repeat it when the server is back"
    )]
    Unknown {
        /// Address and port.
        server: String,
        /// Operation.
        op: &'static str,
        /// Path on the share.
        path: String,
        /// What was seen.
        reason: String,
    },
    /// No connection; the operation was not sent.
    #[error("no SMB connection to {server} ({reason}); the operation was not sent, try again later")]
    Unavailable {
        /// Address and port.
        server: String,
        /// What was seen.
        reason: String,
    },
    /// All workers are busy for too long, or too many callers wait already.
    #[error(
        "no SMB worker for {server} became free within {waited:?}; try again or raise the number of workers"
    )]
    Busy {
        /// Address and port.
        server: String,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The server does not accept user and password.
    #[error(
        "server {server} does not accept the password of user {user} for share {share}; check the shared secret on both nodes"
    )]
    Auth {
        /// Address and port.
        server: String,
        /// User.
        user: String,
        /// Share.
        share: String,
    },
    /// The worker program cannot be started.
    #[error("cannot start the SMB worker {}: {source}; install csv-smbc next to csvfs or correct its path", program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The pool cannot write its own files.
    #[error("cannot write {}: {source}; check the run directory", path.display())]
    State {
        /// What was to be written.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
}

impl SmbError {
    /// What is known about the outcome.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match self {
            SmbError::Refused { .. } | SmbError::Unavailable { .. } | SmbError::Busy { .. } => {
                Outcome::Rejected
            }
            SmbError::Unknown { .. } => Outcome::Unknown,
            SmbError::Auth { .. } | SmbError::Program { .. } | SmbError::State { .. } => Outcome::Fatal,
        }
    }

    /// Nothing happened on the server.
    #[must_use]
    pub fn is_rejected(&self) -> bool {
        self.outcome() == Outcome::Rejected
    }

    /// Repeating is no use before somebody changes the set-up.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        self.outcome() == Outcome::Fatal
    }

    /// May the same read or write be tried again, with hope?
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            SmbError::Unknown { .. } | SmbError::Unavailable { .. } | SmbError::Busy { .. } => true,
            SmbError::Refused { .. }
            | SmbError::Auth { .. }
            | SmbError::Program { .. }
            | SmbError::State { .. } => false,
        }
    }

    /// The errno the server's answer stands for, when it refused.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            SmbError::Refused { source, .. } => source.raw_os_error(),
            SmbError::Unknown { .. }
            | SmbError::Unavailable { .. }
            | SmbError::Busy { .. }
            | SmbError::Auth { .. }
            | SmbError::Program { .. }
            | SmbError::State { .. } => None,
        }
    }
}
