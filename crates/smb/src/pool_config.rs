//! Settings of a pool, and the configuration file of libsmbclient made from them.

use crate::error::SmbError;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Settings of a pool.
#[derive(Clone)]
pub struct PoolConfig {
    /// Most worker processes.
    pub workers: usize,
    /// Address of the server.
    pub server: IpAddr,
    /// TCP port of the server.
    pub port: u16,
    /// Share.
    pub share: String,
    /// User.
    pub user: String,
    /// Password.
    pub password: String,
    /// Require encryption.
    pub encrypt: bool,
    /// Path of the `csv-smbc` program.
    pub program: PathBuf,
    /// Directory of the pool's own, for the configuration of libsmbclient; created when missing.
    pub state_dir: PathBuf,
    /// How long one operation may take before its worker is killed.
    pub op_timeout: Duration,
}

impl std::fmt::Debug for PoolConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let server = SocketAddr::new(self.server, self.port);
        f.debug_struct("PoolConfig")
            .field("server", &server)
            .field("share", &self.share)
            .field("workers", &self.workers)
            .finish_non_exhaustive()
    }
}

/// libsmbclient reads a configuration from `$HOME/.smb/smb.conf`; without this one it would take the machine's.
pub(crate) fn write_client_config(config: &PoolConfig) -> Result<(), SmbError> {
    let dir = config.state_dir.join(".smb");
    let path = dir.join("smb.conf");
    let state = config.state_dir.display();
    let encrypt = if config.encrypt { "required" } else { "off" };
    let text = format!(
        "[global]\n\
         workgroup = CSVFS\n\
         unix charset = UTF-8\n\
         client min protocol = SMB3_11\n\
         client max protocol = SMB3_11\n\
         client signing = required\n\
         client smb encrypt = {encrypt}\n\
         client use kerberos = off\n\
         name resolve order = host\n\
         disable netbios = yes\n\
         socket options = TCP_NODELAY\n\
         log level = 0\n\
         log file = /dev/null\n\
         private dir = {state}\n\
         lock directory = {state}\n\
         state directory = {state}\n\
         cache directory = {state}\n\
         pid directory = {state}\n"
    );
    std::fs::create_dir_all(&dir)
        .and_then(|()| std::fs::write(&path, text))
        .map_err(|source| SmbError::State { path, source })
}
