//! Puts a volume together on this node and takes it apart again.
//!
//! Start: the LUN is opened (if there is a path) and its label checked, the FUSE mount is made and served, the control
//! service listens, smbd stands by. Then csvd says what this node is to be for the volume ([`crate::role`]).
//!
//! Whatever fails before the mount is served ends the process with an error that says what to do; csvd starts it
//! again later.

use crate::client::modes::Modes;
use crate::client::{ClientOptions, VolumeClient};
use crate::events::Events;
use crate::fuse::device::Device;
use crate::fuse::hidden::Hidden;
use crate::gate::Gate;
use crate::heartbeat::Heartbeat;
use crate::role::Role;
use crate::takeover::{mark_unused, open_labelled};
use crate::{admin, export, fuse};
use anyhow::{Context, Result, bail};
use csv_coordinator::grpc::Place;
use csv_lun::Lun;
use csv_proto as proto;
use csv_types::admin::{Answer, RoleKind};
use csv_types::config::{Config, NodeConfig, VolumeConfig};
use csv_types::{Epoch, NodeId};
use parking_lot::{Condvar, Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Status reports (which renew the lease) and commits of written files.
const TICK: Duration = Duration::from_secs(1);
/// How long a clean stop waits for open files to be closed.
const OPEN_FILES_WAIT: Duration = Duration::from_secs(2);

/// The nodes, as this node knows them.
#[derive(Debug, Clone)]
pub(crate) struct Nodes {
    pub(crate) all: Vec<NodeConfig>,
    /// Who coordinates the volume.
    pub(crate) owner: Option<NodeId>,
}

/// How long a power cut waits for an order that is being carried out.
const CRASH_WAIT: Duration = Duration::from_secs(1);

/// One volume on one node.
pub(crate) struct App {
    pub(crate) config: Config,
    pub(crate) volume: VolumeConfig,
    pub(crate) client: Arc<VolumeClient>,
    pub(crate) role: Mutex<Role>,
    /// What the role was when the last order had been carried out: for whoever must not wait for the present one.
    pub(crate) role_noted: Mutex<RoleKind>,
    pub(crate) gate: Gate,
    pub(crate) heartbeat: Heartbeat,
    pub(crate) last_epoch: Mutex<Epoch>,
    /// Names this process to coordinators: one that knows it goes on with what it held.
    session: uuid::Uuid,
    pub(crate) nodes: RwLock<Nodes>,
    pub(crate) hidden: Arc<Hidden>,
    pub(crate) place: Place,
    device: Arc<Device>,
    smbd: Mutex<Option<csv_smb::smbd::Smbd>>,
    stopping: AtomicBool,
    /// The FUSE connection is over.
    served: (Mutex<bool>, Condvar),
    taken_apart: AtomicBool,
    pub(crate) runtime: tokio::runtime::Runtime,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("volume", &self.volume.name).finish_non_exhaustive()
    }
}

/// Network threads: on a small machine one, since a second one is woken for every message and finds nothing to do.
fn net_threads() -> usize {
    const THREADS_MAX: usize = 4;
    std::thread::available_parallelism().map_or(1, |cpus| (cpus.get() / 2).clamp(1, THREADS_MAX))
}

/// Runs the volume until it is stopped.
///
/// # Errors
/// In words for the administrator.
pub(crate) fn run(config: Config, volume: &str) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("csvfs must run as root: it mounts file systems and opens the LUN");
    }
    let volume = config.volume(volume).cloned().with_context(|| {
        let known: Vec<_> = config.volumes.iter().map(|volume| volume.name.as_str()).collect();
        format!("csv.toml has no volume \"{volume}\"; it has: {}", known.join(", "))
    })?;
    for dir in [&config.local.run_dir, &config.local.state_dir] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let app = start(config, volume)?;
    app.watch_signals()?;
    app.tick()?;
    app.start_heartbeat()?;
    let served = app.serve();
    *app.served.0.lock() = true;
    app.served.1.notify_all();
    app.take_apart();
    served
}

fn start(config: Config, volume: VolumeConfig) -> Result<Arc<App>> {
    let me = config.me().id;
    let events = Arc::new(Events::new(me, &volume.name, &config.local.state_dir));
    let lun = open_lun(&config, &volume, &events)?;
    let mount_point = config.local.mount_dir.join(&volume.name);
    let socket = config.local.run_dir.join(format!("{}.sock", volume.name));
    if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        bail!("another csvfs already serves volume {} here ({} answers)", volume.name, socket.display());
    }
    let device = Arc::new(Device::mount(&volume.name, &mount_point)?);
    let client = Arc::new(VolumeClient::new(ClientOptions {
        volume: volume.name.clone(),
        node_name: config.local.node.clone(),
        node: me,
        op_timeout: Duration::from_millis(config.cluster.op_timeout_ms),
        modes: Modes::new(lun, events.clone()),
        events,
    }));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(net_threads())
        .enable_all()
        .thread_name("csvfs-net")
        .build()
        .context("cannot start the network threads")?;
    let app = Arc::new(App {
        role: Mutex::default(),
        role_noted: Mutex::new(RoleKind::Nobody),
        gate: Gate::default(),
        heartbeat: Heartbeat::default(),
        last_epoch: Mutex::new(Epoch(0)),
        session: uuid::Uuid::new_v4(),
        nodes: RwLock::new(Nodes { all: config.nodes.clone(), owner: None }),
        hidden: Arc::new(Hidden::new(client.clone())),
        place: Place::default(),
        config,
        volume,
        client,
        device,
        smbd: Mutex::new(None),
        stopping: AtomicBool::new(false),
        served: (Mutex::new(false), Condvar::new()),
        taken_apart: AtomicBool::new(false),
        runtime,
    });
    export::control(&app.runtime, &app.config, &app.volume, app.place.clone())?;
    admin::serve(&app, &socket)?;
    Ok(app)
}

fn open_lun(config: &Config, volume: &VolumeConfig, events: &Events) -> Result<Option<Arc<Lun>>> {
    let Some(path) = &volume.lun else { return Ok(None) };
    match open_labelled(config, volume, path) {
        Ok(lun) => Ok(Some(lun)),
        // A data server works without a path, by redirection, and says why.
        Err(error) => {
            events.report("no-lun", format!("the LUN cannot be used here, I/O is redirected: {error:#}"));
            Ok(None)
        }
    }
}

impl App {
    pub(crate) fn hello(&self) -> proto::Hello {
        proto::Hello {
            protocol_version: proto::PROTOCOL_VERSION,
            node: self.client.node.0,
            volume: self.volume.name.clone(),
            session: bytes::Bytes::copy_from_slice(self.session.as_bytes()),
            last_epoch: 0,
        }
    }

    /// Who is in the cluster now.
    pub(crate) fn set_nodes(&self, all: Vec<NodeConfig>, owner: Option<NodeId>) {
        *self.nodes.write() = Nodes { all, owner };
    }

    fn serve(self: &Arc<Self>) -> Result<()> {
        // smbd looks at its share when it starts, so the mount has to be served by then. On a node that does not
        // coordinate the volume it stands by, so that a take-over need not wait for it.
        let app = self.clone();
        std::thread::Builder::new()
            .name("smbd-start".into())
            .spawn(move || app.start_smbd())
            .context("cannot start a thread")?;
        fuse::serve(self.device.clone(), self.client.clone(), self.hidden.clone())
    }

    fn start_smbd(&self) {
        match export::smbd(&self.config, &self.volume, &self.client.events) {
            Ok(smbd) if !self.stopping.load(Ordering::Acquire) => *self.smbd.lock() = Some(smbd),
            Ok(smbd) => drop(smbd),
            Err(error) => {
                let text = format!("no SMB export, redirected I/O of other nodes fails: {error:#}");
                self.client.events.report("smbd-failed", text);
            }
        }
    }

    fn tick(self: &Arc<Self>) -> Result<()> {
        let app = self.clone();
        std::thread::Builder::new()
            .name("tick".into())
            .spawn(move || {
                while !app.stopping.load(Ordering::Acquire) {
                    app.client.report_status();
                    std::thread::sleep(TICK);
                }
            })
            .context("cannot start a thread")?;
        let app = self.clone();
        std::thread::Builder::new()
            .name("call-times".into())
            .spawn(move || app.client.chan.watch())
            .context("cannot start a thread")?;
        // Commits wait for the coordinator; reports must not wait behind them.
        let app = self.clone();
        std::thread::Builder::new()
            .name("commit".into())
            .spawn(move || {
                while !app.stopping.load(Ordering::Acquire) {
                    std::thread::sleep(TICK);
                    app.client.commit_all();
                }
            })
            .context("cannot start a thread")?;
        Ok(())
    }

    fn watch_signals(self: &Arc<Self>) -> Result<()> {
        let app = self.clone();
        let mut terminate = {
            let _inside = self.runtime.enter();
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?
        };
        let mut interrupt = {
            let _inside = self.runtime.enter();
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?
        };
        self.runtime.spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            app.stop_soon();
        });
        Ok(())
    }

    /// Begins a clean stop; returns at once.
    pub(crate) fn stop_soon(self: &Arc<Self>) {
        if self.stopping.swap(true, Ordering::AcqRel) {
            return;
        }
        let app = self.clone();
        std::thread::spawn(move || {
            app.client.commit_all();
            app.device.unmount();
            // Open files keep the connection alive; they must not keep the volume from being handed over.
            let mut served = app.served.0.lock();
            if !*served {
                app.served.1.wait_for(&mut served, OPEN_FILES_WAIT);
            }
            drop(served);
            app.take_apart();
            std::process::exit(0);
        });
    }

    fn take_apart(&self) {
        self.stopping.store(true, Ordering::Release);
        if self.taken_apart.swap(true, Ordering::AcqRel) {
            // The other thread ends the process when it is done.
            std::thread::park_timeout(OPEN_FILES_WAIT * 10);
            return;
        }
        self.client.chan.close();
        if let Some(smbd) = self.smbd.lock().take() {
            drop(smbd);
        }
        self.device.unmount();
        if let Role::Owner(owner) = &*self.role.lock() {
            if owner.coordinator.stop().is_err() {
                // Not marked as unused: the next owner has to know that something was lost.
                self.forget_mount();
            } else if let Some(lun) = self.client.modes.lun() {
                let _ = mark_unused(&lun, owner.coordinator.options().epoch);
            }
        }
        let _ = std::fs::remove_file(self.config.local.run_dir.join(format!("{}.sock", self.volume.name)));
    }

    /// As a power cut: nothing that is dirty here reaches the LUN any more.
    pub(crate) fn crash(&self) -> Result<Answer> {
        // Whoever holds it may hang in the kernel, which a power cut does not wait for.
        if let Some(role) = self.role.try_lock_for(CRASH_WAIT)
            && let Role::Owner(owner) = &*role
        {
            self.forget_mount();
            owner.coordinator.crash();
        }
        self.end_now();
        Ok(Answer::Ok)
    }

    /// Ends the process without anything else.
    pub(crate) fn end_now(&self) {
        // A process can always signal itself.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}
