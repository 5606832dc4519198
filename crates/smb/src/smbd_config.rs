//! Settings of a private smbd, and why one does not run.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Settings of an instance.
#[derive(Clone)]
pub struct SmbdConfig {
    /// Share name.
    pub share: String,
    /// Directory to serve: the FUSE mount of the volume.
    pub path: PathBuf,
    /// The one address to listen on.
    pub addr: IpAddr,
    /// TCP port to listen on.
    pub port: u16,
    /// Directory of the instance's own for what has to survive: passwords, state, logs.
    pub base_dir: PathBuf,
    /// Directory of the instance's own for sockets, locks and pids.
    pub run_dir: PathBuf,
    /// Require encryption.
    pub encrypt: bool,
    /// The only user, mapped to root on this machine.
    pub user: String,
    /// Its password.
    pub password: String,
}

impl std::fmt::Debug for SmbdConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SmbdConfig")
            .field("share", &self.share)
            .field("path", &self.path)
            .field("addr", &SocketAddr::new(self.addr, self.port))
            .finish_non_exhaustive()
    }
}

/// Why smbd does not run.
#[derive(Debug, thiserror::Error)]
pub enum SmbdError {
    /// A setting cannot be used.
    #[error("unusable setting for smbd: {what}")]
    Invalid {
        /// Which.
        what: String,
    },
    /// Samba is not installed.
    #[error("{program} is not installed; install the package {package}")]
    Missing {
        /// The program.
        program: &'static str,
        /// Debian's name of the package.
        package: &'static str,
    },
    /// A program does not start.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program.
        program: &'static str,
        /// The reason.
        source: std::io::Error,
    },
    /// An own file or directory cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    State {
        /// The path.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Samba does not take the user.
    #[error("smbpasswd cannot set the password of user {user}: {text}")]
    User {
        /// The user.
        user: String,
        /// What smbpasswd said.
        text: String,
    },
    /// Somebody else listens there.
    #[error("{addr} is in use by another program; stop it or choose another smb_port in csv.toml")]
    PortInUse {
        /// Address and port.
        addr: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {source}; is it an address of this node?")]
    Address {
        /// Address and port.
        addr: SocketAddr,
        /// The reason.
        source: std::io::Error,
    },
    /// smbd ended before it served.
    #[error("smbd ended at once ({status}); the end of its log {}: {lines}", log.display())]
    Exited {
        /// How it ended.
        status: String,
        /// Its log.
        log: PathBuf,
        /// The last lines.
        lines: String,
    },
    /// smbd runs but does not answer.
    #[error("smbd does not answer on {addr} after {waited:?}; see its log {}", log.display())]
    NotReady {
        /// Address and port.
        addr: SocketAddr,
        /// How long was waited.
        waited: Duration,
        /// Its log.
        log: PathBuf,
    },
}
