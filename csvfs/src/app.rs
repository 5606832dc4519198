//! Puts a volume together on this node and takes it apart again.
//!
//! Start, on the coordinator: label and LUN are checked, the FUSE mount is made, the epoch is raised, the file
//! system is mounted (hidden), the local session is connected, then the control service and smbd open for others.
//! On a data server: LUN (if there is a path), FUSE mount, session.
//!
//! Whatever fails before the mount is served ends the process with an error that says what to do; csvd starts it
//! again later.

use crate::client::modes::Modes;
use crate::client::{ClientOptions, VolumeClient};
use crate::events::Events;
use crate::fuse::device::Device;
use crate::fuse::hidden::Hidden;
use crate::{admin, export, fuse, link};
use anyhow::{Context, Result, bail};
use csv_coordinator::{Coordinator, FsKind};
use csv_lun::{Lun, LunOptions};
use csv_proto as proto;
use csv_types::admin::Answer;
use csv_types::config::{Config, VolumeConfig};
use csv_types::{Epoch, NodeId};
use parking_lot::{Condvar, Mutex};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Status reports (which renew the lease) and commits of written files.
const TICK: Duration = Duration::from_secs(1);
/// How long a clean stop waits for open files to be closed.
const OPEN_FILES_WAIT: Duration = Duration::from_secs(2);
/// Heartbeat periods for which a label that says "in use" is watched.
const HEARTBEATS_WATCHED: u32 = 3;

/// One volume on one node.
pub(crate) struct App {
    pub(crate) config: Config,
    pub(crate) volume: VolumeConfig,
    pub(crate) client: Arc<VolumeClient>,
    pub(crate) coordinator: Option<Arc<Coordinator>>,
    device: Arc<Device>,
    smbd: Mutex<Option<csv_smb::smbd::Smbd>>,
    stopping: AtomicBool,
    /// The FUSE connection is over.
    served: (Mutex<bool>, Condvar),
    taken_apart: AtomicBool,
    runtime: tokio::runtime::Runtime,
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

/// The LUN with what its label says.
struct Labelled {
    lun: Arc<Lun>,
    label: csv_ondisk::Label,
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
    let served = app.serve();
    *app.served.0.lock() = true;
    app.served.1.notify_all();
    app.take_apart();
    served
}

fn start(config: Config, volume: VolumeConfig) -> Result<Arc<App>> {
    let me = config.me().id;
    let events = Arc::new(Events::new(me, &volume.name, &config.local.state_dir));
    let is_coordinator = volume.coordinator == config.local.node;
    let labelled = open_lun(&config, &volume, is_coordinator, &events)?;
    let mount_point = config.local.mount_dir.join(&volume.name);
    let socket = config.local.run_dir.join(format!("{}.sock", volume.name));
    if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        bail!("another csvfs already serves volume {} here ({} answers)", volume.name, socket.display());
    }
    let device = Arc::new(Device::mount(&volume.name, &mount_point)?);
    let lun = labelled.as_ref().map(|labelled| labelled.lun.clone());
    let client = Arc::new(VolumeClient::new(ClientOptions {
        volume: volume.name.clone(),
        node_name: config.local.node.clone(),
        node: me,
        is_coordinator,
        op_timeout: Duration::from_millis(config.cluster.op_timeout_ms),
        modes: Modes::new(lun, is_coordinator, events.clone()),
        events,
    }));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(net_threads())
        .enable_all()
        .thread_name("csvfs-net")
        .build()
        .context("cannot start the network threads")?;
    let coordinator = match labelled {
        Some(labelled) if is_coordinator => Some(start_coordinator(&config, &volume, &client, &labelled)?),
        Some(_) | None => None,
    };
    let app = Arc::new(App {
        config,
        volume,
        client,
        coordinator,
        device,
        smbd: Mutex::new(None),
        stopping: AtomicBool::new(false),
        served: (Mutex::new(false), Condvar::new()),
        taken_apart: AtomicBool::new(false),
        runtime,
    });
    app.connect()?;
    admin::serve(&app, &socket)?;
    Ok(app)
}

fn open_lun(
    config: &Config,
    volume: &VolumeConfig,
    is_coordinator: bool,
    events: &Events,
) -> Result<Option<Labelled>> {
    let Some(path) = &volume.lun else {
        if is_coordinator {
            bail!("this node coordinates {} but csv.toml names no `lun` for it here", volume.name);
        }
        return Ok(None);
    };
    match open_labelled(config, volume, path) {
        Ok(labelled) => Ok(Some(labelled)),
        Err(error) if is_coordinator => Err(error),
        // A data server works without a path, by redirection, and says why.
        Err(error) => {
            events.report("no-lun", format!("the LUN cannot be used here, I/O is redirected: {error:#}"));
            Ok(None)
        }
    }
}

fn open_labelled(config: &Config, volume: &VolumeConfig, path: &Path) -> Result<Labelled> {
    let lun = Lun::open(path, LunOptions::default())?;
    let label = csv_lun::label::read_label(&lun)?.with_context(|| {
        format!(
            "{} carries no csvfs volume; make one with `csvctl volume create --lun {} --name {}`",
            path.display(),
            path.display(),
            volume.name
        )
    })?;
    if label.cluster_id != config.cluster.id {
        bail!(
            "{} belongs to another cluster (id {}); this cluster is {}. If that cluster is gone, make the volume \
             again with `csvctl volume create --force`",
            path.display(),
            label.cluster_id,
            config.cluster.id
        );
    }
    if label.name != volume.name {
        bail!("{} is volume {}, not {}; correct `lun` in csv.toml", path.display(), label.name, volume.name);
    }
    Ok(Labelled { lun: Arc::new(lun), label })
}

fn start_coordinator(
    config: &Config,
    volume: &VolumeConfig,
    client: &Arc<VolumeClient>,
    labelled: &Labelled,
) -> Result<Arc<Coordinator>> {
    let device = volume.lun.clone().context("no LUN")?;
    if let Some(user) = csv_lun::is_mounted(&device)? {
        bail!("{} is in use: {user}; end that first, csvfs mounts it itself", device.display());
    }
    refuse_in_use_elsewhere(labelled, client.node, config)?;
    let epoch: Epoch = csv_lun::label::bump_epoch(&labelled.lun, client.node)?;
    // What this node's page cache knows of the LUN is older than what other coordinators wrote.
    labelled.lun.drop_page_cache()?;
    let unsynced_lost = unsynced_lost(config, volume, labelled, client.node)?;
    let events = client.events.clone();
    let fence_events = client.events.clone();
    let options = csv_coordinator::Options {
        volume_name: volume.name.clone(),
        volume_id: labelled.label.volume_id.0,
        epoch,
        device,
        fs_kind: match labelled.label.fs {
            csv_ondisk::FsKind::Ext4 => FsKind::Ext4,
            csv_ondisk::FsKind::Xfs => FsKind::Xfs,
        },
        read_only: false,
        unsynced_lost,
        lease_ms: config.cluster.lease_ms,
        recall_ms: config.cluster.recall_ms,
        limits: csv_coordinator::Limits::default(),
        nodes: config.nodes.iter().map(|node| (node.id, node.name.clone())).collect(),
        own_node: client.node,
        on_event: Arc::new(move |kind, message| events.report(kind, message)),
        fence: Arc::new(move |node: NodeId| {
            fence_events.report("fence", format!("node {node} is fenced: its lease has to run out"));
            // Without reservations a node is certain to be out only when its lease is over.
            false
        }),
    };
    Coordinator::start(options).with_context(|| format!("volume {} cannot be taken", volume.name))
}

/// Where this node notes that it has the volume mounted, and since which boot.
fn mount_note(config: &Config, volume: &str) -> PathBuf {
    config.local.state_dir.join(format!("{volume}.mounted"))
}

/// Did the last ownership end without writing back what was not synced? ext4 tells by its superblock. XFS does not:
/// there a csvfs that was only killed (same node, same boot: the kernel has unmounted and written back) is told from a
/// power cut by a note of the boot; whatever is not certain counts as lost.
fn unsynced_lost(config: &Config, volume: &VolumeConfig, labelled: &Labelled, me: NodeId) -> Result<bool> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let note = mount_note(config, &volume.name);
    let same_boot = !boot.is_empty() && std::fs::read_to_string(&note).is_ok_and(|noted| noted == boot);
    let label = &labelled.label;
    let lost = match csv_lun::probe::ext4_needs_recovery(&labelled.lun)? {
        Some(needs_recovery) => needs_recovery,
        None => label.in_use && !(label.owner == me && same_boot),
    };
    std::fs::write(&note, boot).with_context(|| format!("cannot write {}", note.display()))?;
    Ok(lost)
}

/// Watches the heartbeat in the label when another node has the volume in use by its own account: the first guard
/// for every file system, before ext4's `mmp`.
fn refuse_in_use_elsewhere(labelled: &Labelled, me: NodeId, config: &Config) -> Result<()> {
    let seen = &labelled.label;
    if !seen.in_use || seen.owner == me {
        return Ok(());
    }
    std::thread::sleep(csv_lun::label::HEARTBEAT_PERIOD * HEARTBEATS_WATCHED);
    let now = csv_lun::label::read_label(&labelled.lun)?.context("the label vanished")?;
    if (now.heartbeat, now.epoch) != (seen.heartbeat, seen.epoch) {
        let name =
            config.node_by_id(now.owner).map_or_else(|| now.owner.to_string(), |node| node.name.clone());
        bail!(
            "volume {} is mounted on node {name} right now (epoch {}); stop csvd there first, or correct \
             `coordinator` in csv.toml",
            now.name,
            now.epoch
        );
    }
    Ok(())
}

impl App {
    fn hello(&self) -> proto::Hello {
        proto::Hello {
            protocol_version: proto::PROTOCOL_VERSION,
            node: self.client.node.0,
            volume: self.volume.name.clone(),
            session: bytes::Bytes::copy_from_slice(uuid::Uuid::new_v4().as_bytes()),
            last_epoch: 0,
        }
    }

    fn connect(self: &Arc<Self>) -> Result<()> {
        if let Some(coordinator) = &self.coordinator {
            return link::local::connect(&self.client, coordinator, self.hello());
        }
        let node = self.config.node(&self.volume.coordinator).context("checked at parsing")?;
        *self.client.smb.write() = Some(export::pool(&self.config, node, &self.volume.name)?);
        let target = link::remote::Target {
            addr: self.config.control_addr(node),
            name: node.name.clone(),
            hello: self.hello(),
        };
        let tls = link::remote::tls(&self.config.local.secrets_dir, &node.name)?;
        self.runtime.spawn(link::remote::keep(self.client.clone(), target, tls));
        Ok(())
    }

    /// Serves the mount; on the coordinator opens the control service and the SMB export once it answers.
    fn serve(self: &Arc<Self>) -> Result<()> {
        let hidden = match (&self.coordinator, self.client.modes.lun()) {
            (Some(coordinator), Some(lun)) => Hidden::new(coordinator.clone(), self.client.clone(), lun),
            _ => Hidden::none(),
        };
        if let Some(coordinator) = &self.coordinator {
            export::control(&self.runtime, &self.config, coordinator)?;
            // smbd looks at its share when it starts, so the mount has to be served by then.
            let app = self.clone();
            std::thread::Builder::new()
                .name("smbd-start".into())
                .spawn(move || app.start_smbd())
                .context("cannot start a thread")?;
        }
        fuse::serve(self.device.clone(), self.client.clone(), Arc::new(hidden))
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
                    app.beat();
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

    /// The coordinator's heartbeat in the label. Another epoch there means that another node has taken the volume:
    /// this one must not touch it any more, and a crash is the one stop that writes nothing.
    fn beat(&self) {
        let (Some(coordinator), Some(lun)) = (&self.coordinator, self.client.modes.lun()) else { return };
        match csv_lun::label::beat(&lun, coordinator.options().epoch) {
            Ok(_) => {}
            Err(error @ csv_lun::LabelIoError::Stale { .. }) => {
                self.client.events.report("volume-lost", format!("{error}; csvfs ends without writing"));
                let _ = self.crash();
            }
            Err(error) => tracing::warn!(%error, "heartbeat"),
        }
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
        if let Some(coordinator) = &self.coordinator {
            coordinator.stop();
            if let Some(lun) = self.client.modes.lun() {
                let _ = csv_lun::label::mark_unused(&lun, coordinator.options().epoch);
            }
        }
        let _ = std::fs::remove_file(self.config.local.run_dir.join(format!("{}.sock", self.volume.name)));
    }

    /// As a power cut: nothing that is dirty here reaches the LUN any more.
    pub(crate) fn crash(&self) -> Result<Answer> {
        if let Some(coordinator) = &self.coordinator {
            // After a power cut the boot is another; here it is not.
            let _ = std::fs::remove_file(mount_note(&self.config, &self.volume.name));
            coordinator.crash();
        }
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)?;
        Ok(Answer::Ok)
    }
}
