//! What the coordinator opens for the other nodes: the control service and the SMB share; and the other end of the
//! share, the pool of SMB workers.

use crate::events::Events;
use anyhow::{Context, Result};
use csv_coordinator::grpc::{self, Place};
use csv_smb::pool::{PoolConfig, SmbPool};
use csv_smb::smbd::{Smbd, SmbdConfig};
use csv_types::config::{Config, NodeConfig, VolumeConfig};
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The only user of the private smbd.
const SMB_USER: &str = "csvnode";

fn smb_password(config: &Config) -> Result<String> {
    let path = config.local.secrets_dir.join("smb.password");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// Workers that reach the coordinator's share.
///
/// # Errors
/// When the password or the worker program is missing.
pub(crate) fn pool(config: &Config, node: &NodeConfig, volume: &VolumeConfig) -> Result<Arc<SmbPool>> {
    let program = std::env::current_exe().context("cannot find own program")?.with_file_name("csv-smbc");
    let pool = SmbPool::new(PoolConfig {
        workers: config.cluster.smb_workers,
        server: config.smb_addr(node, volume).ip(),
        port: config.smb_addr(node, volume).port(),
        share: volume.name.clone(),
        user: SMB_USER.to_owned(),
        password: smb_password(config)?,
        encrypt: config.cluster.smb_encrypt,
        program,
        state_dir: config.local.run_dir.join(format!("{}.smbc", volume.name)),
        op_timeout: Duration::from_millis(config.cluster.op_timeout_ms.min(10_000)),
    })?;
    Ok(Arc::new(pool))
}

/// Starts the private smbd of a volume.
///
/// # Errors
/// When smbd is not installed, its port is taken, or it ends at once.
pub(crate) fn smbd(config: &Config, volume: &VolumeConfig, events: &Arc<Events>) -> Result<Smbd> {
    let events = events.clone();
    let smbd = Smbd::start(
        SmbdConfig {
            share: volume.name.clone(),
            path: config.local.mount_dir.join(&volume.name),
            addr: config.me().addr,
            port: config.smb_addr(config.me(), volume).port(),
            base_dir: config.local.state_dir.join("smb").join(&volume.name),
            run_dir: config.local.run_dir.join(format!("{}.smbd", volume.name)),
            encrypt: config.cluster.smb_encrypt,
            user: SMB_USER.to_owned(),
            password: smb_password(config)?,
        },
        Box::new(move |message| events.report("smbd", message)),
    )?;
    Ok(smbd)
}

/// Opens the control service.
///
/// # Errors
/// When the port is taken or a certificate is missing.
pub(crate) fn control(
    runtime: &tokio::runtime::Runtime,
    config: &Config,
    volume: &VolumeConfig,
    place: Place,
) -> Result<()> {
    let addr = config.control_addr(config.me(), volume);
    let listener = TcpListener::bind(addr).with_context(|| {
        format!("cannot listen on {addr} (control_port in csv.toml): is the port in use?")
    })?;
    let pem = |name: &str| -> PathBuf { config.local.secrets_dir.join(name) };
    let tls = grpc::TlsFiles { ca: pem("ca.pem"), cert: pem("node.pem"), key: pem("node.key") };
    let (_keep, shutdown) = tokio::sync::watch::channel(false);
    runtime.spawn(async move {
        let _keep = _keep;
        if let Err(error) = grpc::serve(place, listener, tls, shutdown).await {
            tracing::error!(%error, "the control service ended");
        }
    });
    Ok(())
}
