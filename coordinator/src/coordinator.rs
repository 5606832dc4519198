//! The coordinator as one value: start, the clock, administrator's orders, and the two ends (a clean stop and a crash).

use crate::exec::Pool;
use crate::hidden::{HiddenFs, MountError};
use crate::options::{Options, Order};
use crate::state::{Core, Session};
use csv_layout::Extent;
use csv_layout::table::{Input, LayoutTable, TableConfig, Tick};
use csv_proto::server_message;
use csv_types::{ByteRange, FileId, NodeId};
use parking_lot::{Condvar, Mutex, RwLock};
use rustix::io::Errno;
use std::future::Future;
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(50);
/// A node uses its layouts for `lease_ms` after it was last heard; this much longer nobody else does, because two
/// clocks may differ a little in speed and a write may be on its way to the LUN.
pub(crate) const LEASE_MARGIN: Duration = Duration::from_secs(2);

/// Why a coordinator did not start. Nothing is left mounted.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The file system.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// No thread.
    #[error("cannot start the coordinator's threads: {0}")]
    Threads(std::io::Error),
    /// The list of sessions in the volume cannot be read or written.
    #[error(
        "cannot read or write /.csvfs/sessions of volume {volume}: {errno}; check the LUN and the file system"
    )]
    Sessions {
        /// Volume name.
        volume: String,
        /// Of the file operation.
        errno: Errno,
    },
}

/// The coordinator of a volume.
pub struct Coordinator {
    pub(crate) options: Options,
    pub(crate) fs: HiddenFs,
    pub(crate) pool: Pool,
    pub(crate) core: Mutex<Core>,
    pub(crate) me: Weak<Coordinator>,
    /// True while nodes reclaim what they had at the former coordinator.
    pub(crate) grace: watch::Sender<bool>,
    pub(crate) maintenance: watch::Sender<bool>,
    /// The volume is being handed over.
    pub(crate) moved: watch::Sender<bool>,
    /// During a hand-over: a call or a block I/O has ended.
    pub(crate) quiet: Condvar,
    /// Serialises writing of the list of sessions.
    pub(crate) roster: Mutex<crate::grace::Roster>,
    started: Instant,
    /// Who is in the cluster now.
    nodes: RwLock<Vec<(NodeId, String)>>,
}

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coordinator").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Coordinator {
    /// Mounts the file system and starts serving. When nodes had sessions at the former coordinator, the first
    /// `lease_ms` and a margin are a grace period for them, and more if they need it.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(options: Options) -> Result<Arc<Coordinator>, StartError> {
        let fs = HiddenFs::mount(&options.device, options.fs_kind, options.read_only)?;
        let pool = Pool::new("csv-coord", options.limits.threads_max).map_err(StartError::Threads)?;
        let table = LayoutTable::new(TableConfig::for_epoch(options.epoch, options.recall_ms));
        let mut core = Core::new(options.epoch, table);
        core.redirect_all = options.redirect_all;
        core.redirect_nodes.extend(options.redirect_nodes.iter().copied());
        core.maintenance = options.maintenance;
        let core = Mutex::new(core);
        let coordinator = Arc::new_cyclic(|me| Coordinator {
            fs,
            pool,
            core,
            me: me.clone(),
            grace: watch::Sender::new(false),
            maintenance: watch::Sender::new(options.maintenance),
            moved: watch::Sender::new(false),
            quiet: Condvar::new(),
            roster: Mutex::default(),
            started: Instant::now(),
            nodes: RwLock::new(options.nodes.clone()),
            options,
        });
        coordinator.begin_grace().map_err(|errno| StartError::Sessions {
            volume: coordinator.options.volume_name.clone(),
            errno,
        })?;
        coordinator.start_clock();
        Ok(coordinator)
    }

    /// The hidden file system.
    #[must_use]
    pub fn fs(&self) -> &HiddenFs {
        &self.fs
    }

    /// What it was started with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The state that each node reported last, as JSON.
    #[must_use]
    pub fn states(&self) -> Vec<String> {
        let core = self.core.lock();
        core.sessions.values().map(|s| s.state_json.clone()).filter(|state| !state.is_empty()).collect()
    }

    /// An administrator's order: told to the nodes at once; with redirection every layout is taken back too.
    pub fn order(&self, order: Order) {
        let core = &mut *self.core.lock();
        if let Some(on) = order.redirect {
            match order.node {
                None => {
                    core.redirect_all = on;
                    core.redirect_nodes.clear();
                }
                Some(node) if on => {
                    core.redirect_nodes.insert(node);
                }
                Some(node) => {
                    core.redirect_nodes.remove(&node);
                }
            }
            let whom = order.node.map_or_else(|| "all nodes".to_owned(), |node| self.name(node));
            let what = if on { "on" } else { "off" };
            self.event("redirect", format!("file-system redirection {what} for {whom}, on request"));
        }
        if let Some(on) = order.maintenance {
            core.maintenance = on;
            self.maintenance.send_replace(on);
            let what = if on { "on: data operations wait" } else { "off" };
            self.event("maintenance", format!("maintenance {what}, on request"));
        }
        let nodes: Vec<NodeId> = core.sessions.keys().copied().collect();
        for node in nodes {
            core.send(node, server_message::Body::ModeOrder(core.mode_order(node)));
        }
        if order.redirect == Some(true) || order.maintenance == Some(true) {
            self.spawn(|co| async move { co.recall_everything().await });
        }
    }

    /// Where a file lies on the LUN. Blocks.
    ///
    /// # Errors
    /// As lookup; EOPNOTSUPP when the file is kept in a way that has no plain place.
    pub fn map_path(&self, path: &[u8]) -> Result<Vec<Extent>, Errno> {
        let mut file = self.fs.root();
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            let attr = self.fs.lookup(file, name)?;
            file = csv_proto::file_id(attr.file).map_err(|_| Errno::IO)?;
        }
        let size = self.fs.attr(file)?.size;
        self.fs.map(file, ByteRange::new(0, size)).map_err(|error| match error {
            crate::hidden::MapError::NotLendable(_) => Errno::OPNOTSUPP,
            crate::hidden::MapError::Errno(errno) => errno,
        })
    }

    /// As a power cut: the file system is shut down without flushing its log, and nobody is answered any more.
    pub fn crash(&self) {
        // First: what fails because of the shutdown is no answer to anybody.
        self.end("the coordinator crashed");
        self.shut_down();
    }

    /// What is not on the LUN stays off it, and the file system is not clean: the next coordinator knows by that.
    pub(crate) fn shut_down(&self) {
        if let Err(errno) = self.fs.crash() {
            self.event("crash", format!("shutting the file system down failed: {errno}"));
        }
    }

    /// Takes every layout back, settles sizes, makes everything durable, and ends. Blocks, for not much longer than
    /// the lease. Opens and locks are reclaimed at the next coordinator.
    ///
    /// # Errors
    /// What the last sync said; the file system was then shut down as in a power cut.
    pub fn stop(&self) -> Result<(), Errno> {
        let (done, wait) = mpsc::channel();
        self.core.lock().stopping = true;
        self.spawn(|co| async move {
            co.recall_everything().await;
            // The receiver only goes away with the caller.
            let _sent = done.send(());
        });
        let limit = Duration::from_millis(self.options.lease_ms + 2 * self.options.recall_ms) + LEASE_MARGIN;
        if wait.recv_timeout(limit).is_err() {
            self.event(
                "stop",
                "not every layout came back in time; the next coordinator settles the files".to_owned(),
            );
        }
        let synced = if self.options.read_only { Ok(()) } else { self.fs.syncfs() };
        self.end("the coordinator stopped");
        if let Err(errno) = synced {
            self.event("stop", format!("the last sync of the volume failed: {errno}"));
            self.shut_down();
        }
        synced
    }

    pub(crate) fn end(&self, why: &str) {
        let sessions: Vec<Session> = {
            let core = &mut *self.core.lock();
            core.stopped = true;
            core.pushes.clear();
            core.guards.clear();
            core.gets.clear();
            core.block_waits.clear();
            std::mem::take(&mut core.sessions).into_values().collect()
        };
        for session in sessions {
            if let Some(outbox) = session.outbox {
                outbox.close(why);
            }
        }
        self.pool.stop();
    }

    /// Recalls every layout and waits until all are back and settled.
    pub(crate) async fn recall_everything(&self) {
        let files: Vec<FileId> = self.core.lock().table.files().collect();
        for file in files {
            self.reclaim_file(file).await;
        }
    }

    /// Runs `work` on the pool.
    pub(crate) fn spawn<F>(&self, work: impl FnOnce(Arc<Coordinator>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if let Some(coordinator) = self.me.upgrade() {
            self.pool.spawn(work(coordinator));
        }
    }

    fn start_clock(&self) {
        let me = self.me.clone();
        let first = self.pool.sleep_until(Instant::now() + TICK);
        self.pool.spawn(async move {
            first.await;
            while let Some(coordinator) = me.upgrade() {
                if !coordinator.tick() {
                    return;
                }
                let next = coordinator.pool.sleep_until(Instant::now() + TICK);
                drop(coordinator);
                next.await;
            }
        });
    }

    /// False when the coordinator has ended.
    fn tick(&self) -> bool {
        let core = &mut *self.core.lock();
        if core.stopped {
            return false;
        }
        self.step(core, Input::Tick);
        self.expire(core);
        self.push_tick(core);
        self.grace_tick(core);
        true
    }

    /// Milliseconds since the start.
    pub(crate) fn now(&self) -> Tick {
        Tick::try_from(self.started.elapsed().as_millis()).unwrap_or(Tick::MAX)
    }

    /// A node's lease and the margin.
    pub(crate) fn lease_over(&self) -> Duration {
        Duration::from_millis(self.options.lease_ms) + LEASE_MARGIN
    }

    /// Tells what was decided.
    pub(crate) fn event(&self, kind: &str, message: String) {
        tracing::info!(volume = %self.options.volume_name, kind, "{message}");
        (self.options.on_event)(kind, message);
    }

    /// A node's name for people.
    pub(crate) fn name(&self, node: NodeId) -> String {
        let nodes = self.nodes.read();
        let found = nodes.iter().find(|(id, _)| *id == node);
        found.map_or_else(|| node.to_string(), |(_, name)| name.clone())
    }

    /// Nodes have joined or left the cluster. Whoever is not in the list any more cannot connect again; what it has is
    /// ended by [`Coordinator::nodes_gone`].
    pub fn set_nodes(&self, nodes: Vec<(NodeId, String)>) {
        *self.nodes.write() = nodes;
    }

    /// Is that a node of the cluster?
    pub(crate) fn is_known(&self, node: NodeId) -> bool {
        self.nodes.read().iter().any(|(known, _)| *known == node)
    }

    /// The node that has one of these names.
    pub(crate) fn node_named(&self, names: &[String]) -> Option<NodeId> {
        self.nodes.read().iter().find(|(_, name)| names.contains(name)).map(|(node, _)| *node)
    }
}
