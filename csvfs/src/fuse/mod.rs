//! The FUSE session of `/ClusterStorage/<volume>`.
//!
//! ```text
//! /dev/fuse ── pump ──┬─ READ, WRITE: at once (in line or io_uring), or in a pool
//!                     ├─ locks: pool
//!                     ├─ LOOKUP, GETATTR, OPEN, CREATE ...: at once, or a call that answers when it ends ([`meta`])
//!                     ├─ FORGET, INTERRUPT: at once
//!                     └─ the rest ── socket pair ── fuser ── [`fs::CsvFs`] ── calls to the coordinator
//! ```

pub(crate) mod abi;
pub(crate) mod device;
pub(crate) mod fs;
pub(crate) mod hidden;
mod hot;
pub(crate) mod locks;
pub(crate) mod meta;
pub(crate) mod pump;
mod redirect;
mod slow;

use crate::client::VolumeClient;
use anyhow::{Context, Result};
use device::{Device, IO_BYTES_MAX};
use fuser::{Session, SessionACL};
use hidden::Hidden;
use pump::Pump;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair, sockopt};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Threads in which fuser's requests may wait for the coordinator.
const META_THREADS: usize = 64;
/// Room for requests that wait for one of those threads, in bytes.
const QUEUE_BYTES: usize = 8 << 20;

/// Serves the mount until it is taken away.
///
/// # Errors
/// When a thread cannot be started or the kernel refuses the handshake.
pub(crate) fn serve(device: Arc<Device>, client: Arc<VolumeClient>, hidden: Arc<Hidden>) -> Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .context("cannot make a socket pair")?;
    for end in [&ours, &theirs] {
        sockopt::set_socket_send_buffer_size_force(end, QUEUE_BYTES)
            .context("cannot enlarge a socket buffer")?;
    }
    let ours = Arc::new(ours);
    let replies = {
        let (ours, device) = (ours.clone(), device.clone());
        std::thread::Builder::new().name("fuse-replies".into()).spawn(move || pass_replies(&ours, &device))
    };
    replies.context("cannot start a thread")?;
    drop_stale_pages(&device, &client)?;
    let pump = Pump::new(device, client.clone(), hidden.clone(), ours.clone());
    let pump = std::thread::Builder::new()
        .name("fuse-pump".into())
        .spawn(move || pump.run())
        .context("cannot start a thread")?;
    let mut config = fuser::Config::default();
    config.n_threads = Some(META_THREADS);
    let fs = fs::CsvFs::new(client, hidden);
    let session = Session::from_fd(fs, theirs, SessionACL::All, config).context("FUSE handshake failed")?;
    let session = std::thread::Builder::new()
        .name("fuse-meta".into())
        .spawn(move || session.run())
        .context("cannot start a thread")?;
    // The connection is over when the pump is; fuser's threads end when their socket is shut.
    let _ = pump.join();
    let _ = rustix::net::shutdown(&ours, rustix::net::Shutdown::Both);
    let _ = session.join();
    Ok(())
}

/// Files waiting for their pages to be dropped, at most; more are left as they are.
const STALE_PAGES_MAX: usize = 1024;

/// A thread of its own, because the kernel may have to write dirty pages back first, through this very mount.
fn drop_stale_pages(device: &Arc<Device>, client: &VolumeClient) -> Result<()> {
    let (sender, files) = std::sync::mpsc::sync_channel(STALE_PAGES_MAX);
    client.report_stale_pages(sender);
    let device = Arc::downgrade(device);
    std::thread::Builder::new()
        .name("stale-pages".into())
        .spawn(move || {
            for nodeid in files {
                let Some(device) = device.upgrade() else { return };
                device.drop_pages(nodeid);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// Hands fuser's replies and notifications to the kernel.
fn pass_replies(socket: &OwnedFd, device: &Device) {
    let mut buf = vec![0; IO_BYTES_MAX + 4096];
    loop {
        match recv(socket, &mut buf[..], RecvFlags::empty()) {
            Ok((0, _)) => return,
            Ok((size, _)) => device.send_raw(&buf[..size]),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::debug!(%error, "fuser's socket is closed");
                return;
            }
        }
    }
}
