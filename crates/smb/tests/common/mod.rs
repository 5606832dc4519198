//! A private smbd on 127.0.0.1 that serves a temporary directory, and pools that use it.

#![expect(clippy::unwrap_used, reason = "tests")]

use csv_smb::pool::{PoolConfig, SmbPool};
use csv_smb::smbd::{Smbd, SmbdConfig, SmbdError};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use tempfile::TempDir;

pub(crate) const PASSWORD: &str = "a long shared secret";

pub(crate) struct Server {
    pub(crate) smbd: Smbd,
    pub(crate) dir: TempDir,
    pub(crate) port: u16,
    /// What the supervisor reports.
    pub(crate) events: Receiver<String>,
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

pub(crate) fn config(dir: &TempDir, port: u16) -> SmbdConfig {
    let share = dir.path().join("share");
    std::fs::create_dir_all(&share).unwrap();
    SmbdConfig {
        share: "vol".into(),
        path: share,
        addr: Ipv4Addr::LOCALHOST.into(),
        port,
        base_dir: dir.path().join("base"),
        run_dir: dir.path().join("run"),
        encrypt: false,
        user: "csvnode".into(),
        password: PASSWORD.into(),
    }
}

pub(crate) fn serve_with(change: impl Fn(&mut SmbdConfig)) -> Server {
    let dir = TempDir::new().unwrap();
    loop {
        let port = free_port();
        let mut config = config(&dir, port);
        change(&mut config);
        let (told, events) = channel();
        match Smbd::start(config, Box::new(move |event| drop(told.send(event)))) {
            Ok(smbd) => return Server { smbd, dir, port, events },
            // Another test was faster.
            Err(SmbdError::PortInUse { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

pub(crate) fn serve() -> Server {
    serve_with(|_| ())
}

impl Server {
    pub(crate) fn pool_config(&self) -> PoolConfig {
        PoolConfig {
            workers: 4,
            server: Ipv4Addr::LOCALHOST.into(),
            port: self.port,
            share: "vol".into(),
            user: "csvnode".into(),
            password: PASSWORD.into(),
            encrypt: false,
            program: env!("CARGO_BIN_EXE_csv-smbc").into(),
            state_dir: self.dir.path().join("client"),
            op_timeout: Duration::from_secs(10),
        }
    }

    pub(crate) fn pool(&self) -> SmbPool {
        SmbPool::new(self.pool_config()).unwrap()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("share").join(name)
    }
}

/// Bytes that tell their place.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend(state.to_le_bytes());
    }
    out.truncate(len);
    out
}
