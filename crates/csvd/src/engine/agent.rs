//! The agent of one volume on this node: a thread that looks at the database, at csvfs and at what is registered on the
//! LUN, asks [`csv_cluster::agent::next_step`] what to do, and does it. It waits in between until something changes.
//!
//! What it knows by itself (the registered generation, who was fenced for the present take-over) is lost with csvd; the
//! decision function is made for that.

use super::Engine;
use super::reservation::{Fenced, Fencing, NO_ABORT_WAIT};
use super::volumes::node_configs;
use crate::volume::Volume;
use anyhow::{Context, Result, bail};
use csv_cluster::agent::{Local, Role, Step, may_start, next_step};
use csv_cluster::db::{ClusterDb, Command, NodeState, parse_own_key, reservation_key};
use csv_cluster::failover::{PathState, VolumeReport};
use csv_lun::reservation::{ErrorKind, ReservationError};
use csv_lun::{Lun, LunOptions};
use csv_types::admin::{Answer, Request, RoleKind, RoleOrder, RoleStatus, TakeOrder};
use csv_types::config::NodeConfig;
use csv_types::{Epoch, NodeId, Reason};
use csvd::client::ClientError;
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest wait between looks: csvfs may change without a word.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Waits after steps that failed, doubling.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Failures in a row that make an event.
const FAILURES_TOLD: u32 = 3;
/// For so long a csvfs that ended is given time to be unmounted.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// csvfs tells its role at once.
const STATUS_LIMIT: Duration = Duration::from_secs(2);
/// Orders take as long as journals and dirty pages do.
const ORDER_LIMIT: Duration = Duration::from_secs(60);
/// Proposals of this node.
const PROPOSE_LIMIT: Duration = Duration::from_secs(5);
/// How often a coordinator looks whether its key is still on the LUN: its file system's I/O tells nobody.
const VERIFY_EVERY: Duration = Duration::from_secs(1);
/// A LUN that cannot be registered on is done without, after so many tries: csvfs then works redirected.
const REGISTER_TRIES: u32 = 5;
/// And after so long it is tried again.
const REGISTER_AGAIN: Duration = Duration::from_secs(10);
/// No step takes so long.
const STEP_LIMIT: Duration = Duration::from_secs(120);
/// Exit status of a csvd with a fault in it (`EX_SOFTWARE` of sysexits.h).
const FAULT: i32 = 70;
/// A lease that is over is given this much more, as the coordinator does.
const LEASE_MARGIN: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) volume: Arc<Volume>,
    /// Where the LUN is on this node, if it has a path.
    pub(crate) device: Option<PathBuf>,
    state: Mutex<State>,
    woken: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    poked: bool,
    ended: bool,
    /// When the thread last looked around.
    looked: Option<Instant>,
    /// csvfs may do direct I/O, or coordinate.
    does_io: bool,
    report: VolumeReport,
}

/// What the thread knows.
struct Memory {
    fencing: Option<Fencing>,
    registered: Option<u32>,
    /// Incarnation and generation whose key this node registered last. Kept in `<run_dir>`, for the next csvd. A key is not
    /// registered a second time, because that could undo a fence that this node's database does not know of yet: when it
    /// is gone, the majority is asked for the next one.
    last: Option<(u64, u32)>,
    fenced_others: (Epoch, Vec<(NodeId, u32)>),
    /// Nodes of which the coordinator here knows that they are down.
    told_gone: BTreeSet<(NodeId, u64)>,
    /// The nodes that csvfs knows of in its present role.
    told_nodes: Option<(RoleKind, Vec<NodeConfig>)>,
    /// Since when somebody has to be fenced who can only be waited for.
    waiting: BTreeMap<(NodeId, u32), Instant>,
    /// Since when csvfs of the owner is gone.
    closing: Option<Instant>,
    /// Failed registrations in a row.
    not_registered: u32,
    /// The LUN is done without since then, or since it was tried last.
    without: Option<Instant>,
    /// The key was found to be gone.
    key_lost: bool,
    verified: Instant,
    retry: Duration,
    /// Failed steps in a row.
    failed: u32,
    last_error: String,
}

impl Agent {
    pub(crate) fn new(volume: Arc<Volume>, device: Option<PathBuf>) -> Agent {
        Agent { volume, device, state: Mutex::default(), woken: Condvar::new(), thread: Mutex::default() }
    }

    /// Starts the thread.
    pub(crate) fn start(self: &Arc<Self>, engine: &Arc<Engine>) -> Result<()> {
        let (agent, engine) = (self.clone(), engine.clone());
        let waker = Arc::downgrade(self);
        self.volume.on_change(Box::new(move || {
            if let Some(agent) = waker.upgrade() {
                agent.wake();
            }
        }));
        let thread = std::thread::Builder::new()
            .name(format!("agent-{}", self.volume.name))
            .spawn(move || {
                if catch_unwind(AssertUnwindSafe(|| agent.run(&engine))).is_err() {
                    // Without this thread nobody would stop csvfs when this node is fenced. A new csvd finds everything as it is.
                    tracing::error!(
                        volume = agent.volume.name,
                        "a fault in csvd (above); it ends, and is started anew"
                    );
                    std::process::exit(FAULT);
                }
            })
            .context("cannot start a thread")?;
        *self.thread.lock() = Some(thread);
        Ok(())
    }

    /// Something may have changed.
    pub(crate) fn wake(&self) {
        self.state.lock().poked = true;
        self.woken.notify_all();
    }

    /// Ends the thread, and waits for the step that it may be at.
    pub(crate) fn end(&self) {
        self.state.lock().ended = true;
        self.woken.notify_all();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            // A panic there has been reported.
            let _ = thread.join();
        }
    }

    /// Has csvfs seen I/O fail, by its last word?
    fn path_failed(&self) -> bool {
        match self.status() {
            Some(status) => matches!(status.mode.reason, Reason::PathFailed(_)),
            None => self.report().path == PathState::Failed,
        }
    }

    /// For how long the thread has been at one step, if that is too long.
    pub(crate) fn stands_still(&self) -> Option<Duration> {
        let state = self.state.lock();
        let silence = state.looked.filter(|_| !state.ended)?.elapsed();
        (silence > STEP_LIMIT).then_some(silence)
    }

    /// Could csvfs do I/O, when it was last seen?
    pub(crate) fn does_io(&self) -> bool {
        self.state.lock().does_io
    }

    /// What is told to the others.
    pub(crate) fn report(&self) -> VolumeReport {
        self.state.lock().report.clone()
    }

    fn wait(&self, limit: Duration) -> bool {
        let mut state = self.state.lock();
        let deadline = Instant::now() + limit;
        while !state.poked && !state.ended {
            if self.woken.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.poked = false;
        !state.ended
    }

    fn run(&self, engine: &Arc<Engine>) {
        let mut memory = Memory {
            fencing: None,
            registered: None,
            last: read_last(&self.last_file(engine)),
            fenced_others: (Epoch(0), Vec::new()),
            told_gone: BTreeSet::new(),
            told_nodes: None,
            waiting: BTreeMap::new(),
            closing: None,
            not_registered: 0,
            without: None,
            key_lost: false,
            verified: Instant::now(),
            retry: RETRY_MIN,
            failed: 0,
            last_error: String::new(),
        };
        let mut wait = Duration::ZERO;
        while self.wait(wait) {
            if engine.is_stopping() {
                return;
            }
            if engine.is_starting() {
                wait = LOOK_EVERY;
                continue;
            }
            let status = self.status();
            {
                let mut state = self.state.lock();
                state.looked = Some(Instant::now());
                state.does_io = match &status {
                    Some(status) => !status.suspended,
                    None => !self.volume.is_absent(),
                };
            }
            self.note(engine, &mut memory, status.as_ref());
            self.verify(engine, &mut memory, status.as_ref());
            memory.without.take_if(|tried| tried.elapsed() > REGISTER_AGAIN);
            let (step, epoch) = self.decide(engine, &memory, status.as_ref());
            if step == Step::Wait {
                self.tell_nodes(engine, &mut memory, status.as_ref());
                self.tell_gone(engine, &mut memory, status.as_ref());
                self.tell_registered(engine, &memory, status.as_ref());
                wait = LOOK_EVERY;
                continue;
            }
            match self.act(engine, &mut memory, &step, epoch) {
                Ok(()) => {
                    memory.retry = RETRY_MIN;
                    memory.failed = 0;
                    memory.last_error.clear();
                    wait = Duration::ZERO;
                }
                Err(error) => {
                    let text = format!("{error:#}");
                    memory.failed += 1;
                    // A step that was overtaken succeeds, or is not wanted, the next time.
                    if memory.failed >= FAILURES_TOLD && text != memory.last_error {
                        engine.event(&self.volume.name, "step-failed", format!("{}: {text}", name_of(&step)));
                        memory.last_error = text;
                    }
                    wait = memory.retry;
                    memory.retry = (memory.retry * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// What csvfs is, if it answers.
    fn status(&self) -> Option<RoleStatus> {
        self.volume.pid()?;
        match self.volume.ask(&Request::RoleStatus { volume: self.volume.name.clone() }, STATUS_LIMIT) {
            Ok(Answer::Role { status }) => Some(status),
            Ok(_) | Err(_) => None,
        }
    }

    fn note(&self, engine: &Engine, memory: &mut Memory, status: Option<&RoleStatus>) {
        if status.is_none() && self.is_closing(engine, memory) {
            return;
        }
        let path = match (&self.device, status.map(|status| &status.mode.reason)) {
            (None, _) | (_, Some(Reason::NoDiskConnectivity)) => PathState::None,
            (_, Some(Reason::PathFailed(_))) => PathState::Failed,
            (Some(_), _) => PathState::Good,
        };
        if status.is_some() {
            memory.closing = None;
        }
        let report = VolumeReport {
            path,
            csvfs: status.is_some(),
            role_epoch: match status.map(|status| status.role) {
                Some(RoleKind::Owner { epoch }) => epoch.0,
                Some(RoleKind::Nobody | RoleKind::Follower { .. }) | None => 0,
            },
            problem: None,
        };
        let changed = {
            let mut state = self.state.lock();
            let changed = state.report != report;
            state.report = report;
            changed
        };
        if changed {
            engine.report_changed();
        }
    }

    /// csvfs of the owner ended: the others are told when the file system is closed, so that nobody is fenced for
    /// nothing. Not for ever.
    fn is_closing(&self, engine: &Engine, memory: &mut Memory) -> bool {
        let owns = {
            let db = engine.db.read();
            db.volumes.get(&self.volume.name).is_some_and(|volume| volume.owner == Some(engine.me()))
        };
        if !owns {
            memory.closing = None;
            return false;
        }
        memory.closing.get_or_insert_with(Instant::now).elapsed() < CLOSE_LIMIT
    }

    fn decide(&self, engine: &Engine, memory: &Memory, status: Option<&RoleStatus>) -> (Step, Epoch) {
        let db = engine.db.read();
        let Some(volume) = db.volumes.get(&self.volume.name) else { return (Step::Wait, Epoch(0)) };
        let local = Local {
            me: engine.me(),
            incarnation: engine.incarnation.get(),
            cut_off: engine.cut_off(),
            path: self.device.is_some()
                && memory.without.is_none()
                && status.is_none_or(|status| {
                    status.unregistered || status.mode.reason != Reason::NoDiskConnectivity
                }),
            role: match status.map(|status| status.role) {
                None if self.volume.is_absent() => Role::Gone,
                None => Role::Silent,
                Some(RoleKind::Nobody) => Role::Nobody,
                Some(RoleKind::Owner { epoch }) => Role::Owner(epoch),
                Some(RoleKind::Follower { epoch, owner }) => Role::Follower(epoch, owner),
            },
            suspended: status.is_some_and(|status| status.suspended),
            fenced: memory.key_lost || status.is_some_and(|status| status.refused_by_lun),
            registered: memory.registered,
            fenced_others: match &memory.fenced_others {
                (epoch, fenced) if *epoch == volume.epoch => fenced.clone(),
                _ => Vec::new(),
            },
        };
        let step = next_step(&db, volume, &local);
        if local.role == Role::Gone && may_start(&db, volume, &local) {
            self.volume.permit();
        }
        (step, volume.epoch)
    }

    /// Is the coordinator's key still there?
    fn verify(&self, engine: &Engine, memory: &mut Memory, status: Option<&RoleStatus>) {
        let owns = matches!(status.map(|status| status.role), Some(RoleKind::Owner { .. }));
        if !owns || memory.registered.is_none() || memory.verified.elapsed() < VERIFY_EVERY {
            return;
        }
        memory.verified = Instant::now();
        let key = {
            let db = engine.db.read();
            db.volumes.get(&self.volume.name).and_then(|volume| db.key_of(volume, engine.me()))
        };
        if let (Some(key), Some(fencing)) = (key, &memory.fencing)
            && fencing.has_key(key) == Some(false)
        {
            memory.key_lost = true;
        }
    }

    fn act(&self, engine: &Engine, memory: &mut Memory, step: &Step, epoch: Epoch) -> Result<()> {
        let name = self.volume.name.clone();
        match step {
            Step::Wait => Ok(()),
            Step::Suspend { reason } => {
                memory.registered = None;
                memory.key_lost = false;
                self.order(RoleOrder::Suspend { reason: reason.clone() })
            }
            Step::Admit { from_generation } => {
                self.nothing_left()?;
                self.admit(engine, *from_generation)
            }
            Step::Register { generation } => {
                memory.not_registered += 1;
                let registered = self.register(engine, memory, *generation);
                match &registered {
                    Ok(()) => memory.not_registered = 0,
                    Err(error) if memory.not_registered >= REGISTER_TRIES => {
                        if memory.not_registered == REGISTER_TRIES {
                            let text =
                                format!("the LUN is done without until it can be registered on: {error:#}");
                            engine.event(&self.volume.name, "not-registered", text);
                        }
                        memory.without = Some(Instant::now());
                    }
                    Err(_) => {}
                }
                registered
            }
            Step::Withdraw { generation } => self.withdraw(engine, *generation),
            Step::Take { epoch, fence } => self.take(engine, memory, *epoch, fence),
            Step::TellOnline { epoch } => self.tell_online(engine, memory, *epoch),
            Step::Fence { epoch, fence } => {
                self.fence(engine, memory, fence)?;
                let nodes = fence.iter().map(|(node, _)| *node).collect();
                self.order(RoleOrder::Gone { epoch: *epoch, nodes })?;
                let command = Command::VolumeFenced { name, epoch: *epoch, fenced: fence.clone() };
                self.propose(engine, command)
            }
            Step::HandOver { epoch } => {
                self.order(RoleOrder::HandOver { epoch: *epoch })?;
                self.propose(engine, Command::VolumeReleased { name, epoch: *epoch, node: engine.me() })
            }
            Step::Close { epoch } => {
                // A write that failed may still be on its way: then the manager has this node fenced, since its path is bad.
                if self.path_failed() {
                    bail!("the path to the LUN failed; what was written last is not known");
                }
                self.close(engine, *epoch)
            }
            Step::Follow { epoch: of, owner } => {
                debug_assert_eq!(*of, epoch);
                self.follow(engine, *of, *owner, memory.without.is_some())
            }
        }
    }

    fn order(&self, order: RoleOrder) -> Result<()> {
        let request = Request::Role { volume: self.volume.name.clone(), order };
        let answer = self.volume.ask(&request, ORDER_LIMIT)?;
        let Answer::Ok = answer else { bail!("csvfs answered {answer:?}") };
        Ok(())
    }

    fn propose(&self, engine: &Engine, command: Command) -> Result<()> {
        engine.runtime.block_on(engine.propose(command, PROPOSE_LIMIT))?;
        Ok(())
    }

    fn follow(&self, engine: &Engine, epoch: Epoch, owner: NodeId, unregistered: bool) -> Result<()> {
        let (owner, nodes) = {
            let nodes = node_configs(&engine.db.read());
            (nodes.iter().find(|node| node.id == owner).cloned(), nodes)
        };
        let owner = owner.context("the owner is no node of the cluster")?;
        self.order(RoleOrder::Follow { epoch, owner, nodes, key: self.key(engine), unregistered })
    }

    /// Tells csvfs when it need not do without the LUN any more.
    fn tell_registered(&self, engine: &Engine, memory: &Memory, status: Option<&RoleStatus>) {
        let Some(RoleStatus { role: RoleKind::Follower { epoch, owner }, unregistered: true, .. }) = status
        else {
            return;
        };
        if memory.registered.is_some()
            && let Err(error) = self.follow(engine, *epoch, *owner, false)
        {
            tracing::debug!(%error, "csvfs is told again that the LUN can be used");
        }
    }

    fn admit(&self, engine: &Engine, from_generation: u32) -> Result<()> {
        let (node, incarnation) = (engine.me(), engine.incarnation.get());
        let name = self.volume.name.clone();
        self.propose(engine, Command::VolumeAdmit { name, node, incarnation, from_generation })
    }

    /// Gives up a membership under which nothing is written any more. While what was written last may still be on its way the
    /// key stays, so that whoever takes the volume meanwhile finds it and has those writes aborted.
    fn withdraw(&self, engine: &Engine, generation: u32) -> Result<()> {
        if self.path_failed() {
            bail!("the path to the LUN failed, and what was written last may still be on its way");
        }
        self.nothing_left()?;
        std::thread::sleep(NO_ABORT_WAIT);
        if let Some(device) = &self.device {
            let key = reservation_key(engine.db.read().id, engine.me(), generation);
            Fencing::open(device)?.unregister(key)?;
        }
        let (name, node) = (self.volume.name.clone(), engine.me());
        let incarnation = engine.incarnation.get();
        self.propose(engine, Command::VolumeWithdraw { name, node, incarnation, generation })
    }

    /// A csvfs that is killed is gone before its mount is: what the kernel still writes there must not find a new key. (An
    /// owner that goes on under a new csvd has its mount by right.)
    fn nothing_left(&self) -> Result<()> {
        let owns = matches!(self.status().map(|status| status.role), Some(RoleKind::Owner { .. }));
        match (&self.device, owns) {
            (Some(device), false) => {
                let user = match csv_lun::is_mounted(device) {
                    Ok(user) => user,
                    // Without a device there is no mount of it.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                    Err(error) => {
                        return Err(error).with_context(|| {
                            format!("cannot see whether {} is in use here", device.display())
                        });
                    }
                };
                user.map_or(Ok(()), |user| bail!("{} is still in use here: {user}", device.display()))
            }
            (Some(_), true) | (None, _) => Ok(()),
        }
    }

    fn last_file(&self, engine: &Engine) -> PathBuf {
        engine.config.run_dir.join(format!("{}.registered", self.volume.name))
    }

    fn register(&self, engine: &Engine, memory: &mut Memory, generation: u32) -> Result<()> {
        self.nothing_left()?;
        let device = self.device.as_ref().context("there is no path to the LUN")?;
        let key = {
            let db = engine.db.read();
            let volume = db.volumes.get(&self.volume.name).context("the volume is gone")?;
            db.key_of(volume, engine.me()).context("this node is not admitted any more")?
        };
        // Anew: there may be other paths now.
        let fencing = memory.fencing.insert(Fencing::open(device)?);
        let this = (engine.incarnation.get(), generation);
        if memory.last == Some(this) {
            // Only a csvfs that has been going on under it meanwhile has the key by right, and by the same path: one that
            // stopped may have been refused because the initiator is another one for the storage than it was.
            let in_use = self.status().is_some_and(|status| !status.suspended && !status.refused_by_lun);
            let gone = matches!(fencing, Fencing::Reservations(_)) && fencing.has_key(key) != Some(true);
            if gone || !in_use {
                return self.admit(engine, generation);
            }
        } else {
            // Before it is there: a csvd that ends in between has its successor ask for the next one.
            write_last(&self.last_file(engine), this)?;
            memory.last = Some(this);
            let (id, me) = (engine.db.read().id, engine.me());
            let older = |key| parse_own_key(id, key).is_some_and(|(node, of)| node == me && of < generation);
            if let Some(note) = fencing.register(key, older)? {
                engine.event(&self.volume.name, "reservation", note);
            }
        }
        if let Err(error) = self.confirm(engine, generation) {
            // Nobody fences a key that was given after the fence.
            fencing.unregister(key)?;
            return Err(error);
        }
        memory.registered = Some(generation);
        memory.key_lost = false;
        Ok(())
    }

    /// Whoever fenced this node before its key was there has seen nothing to take away. What had been decided until now is
    /// known here when a command that is given now is applied here.
    fn confirm(&self, engine: &Engine, generation: u32) -> Result<()> {
        let property = format!("registered.{}", engine.me().0);
        let mark = engine.next_mark();
        let mut changes = engine.db.changes();
        let value = Some(format!("{} {mark}", engine.incarnation.get()));
        self.propose(engine, Command::Property { key: property.clone(), value })?;
        let deadline = tokio::time::Instant::now() + PROPOSE_LIMIT;
        // Those of other volumes are given after this one when they are greater.
        while engine.db.read().properties.get(&property).is_none_or(|value| mark_of(value) < mark) {
            let change = async { tokio::time::timeout_at(deadline, changes.changed()).await };
            let waited = engine.runtime.block_on(change);
            waited.context("this node's database lags behind")??;
        }
        let db = engine.db.read();
        let admitted = db.volumes.get(&self.volume.name).is_some_and(|volume| {
            volume.admitted(engine.me()).is_some_and(|member| member.generation == generation)
        });
        if !admitted {
            bail!("this node was fenced while it registered");
        }
        Ok(())
    }

    /// Returns when these can write the LUN no more.
    fn fence(&self, engine: &Engine, memory: &mut Memory, members: &[(NodeId, u32)]) -> Result<()> {
        let (fenced, lease) = {
            let fencing = memory.fencing.as_ref().context("this node has not registered")?;
            let (db, volume) = {
                let db = engine.db.read().clone();
                let volume = db.volumes.get(&self.volume.name).cloned().context("the volume is gone")?;
                (db, volume)
            };
            let fenced = fencing.fence(&db, &volume, engine.me(), members);
            (fenced, Duration::from_millis(db.settings.lease_ms) + LEASE_MARGIN)
        };
        match fenced {
            Ok(Fenced::Out(note)) => {
                if let Some(note) = note {
                    engine.event(&self.volume.name, "fence", note);
                }
                memory.waiting.clear();
                Ok(())
            }
            Ok(Fenced::ByLease) => {
                let now = Instant::now();
                memory.waiting.retain(|member, _| members.contains(member));
                for member in members {
                    memory.waiting.entry(*member).or_insert(now);
                }
                let left = memory.waiting.values().map(|since| lease.saturating_sub(since.elapsed())).max();
                match left.filter(|left| !left.is_zero()) {
                    None => Ok(()),
                    Some(left) => {
                        bail!("the lease of a node that cannot be fenced is over in {} s", left.as_secs() + 1)
                    }
                }
            }
            Err(error) => {
                // It may be this node that is out.
                memory.registered = None;
                let out = error.downcast_ref::<ReservationError>();
                memory.key_lost |= out.is_some_and(|error| error.kind() == ErrorKind::Fatal);
                Err(error.context("fencing"))
            }
        }
    }

    fn take(
        &self,
        engine: &Engine,
        memory: &mut Memory,
        epoch: Epoch,
        fence: &[(NodeId, u32)],
    ) -> Result<()> {
        self.fence(engine, memory, fence)?;
        memory.fenced_others = (epoch, fence.to_vec());
        let certain = matches!(memory.fencing, Some(Fencing::Reservations(_)));
        let (order, down) = {
            let db = engine.db.read();
            let volume = db.volumes.get(&self.volume.name).context("the volume is gone")?;
            if volume.epoch != epoch || volume.to_fence().iter().any(|member| !fence.contains(member)) {
                bail!("somebody else is to be fenced meanwhile");
            }
            let down = down_and_out(&db, volume);
            let fenced = fence.iter().map(|(node, _)| *node);
            let gone: BTreeSet<NodeId> = down.iter().map(|(node, _)| *node).chain(fenced).collect();
            let flag = |name: &str| db.properties.get(&format!("volume.{}.{name}", self.volume.name));
            let redirected = flag("redirect-nodes").map(String::as_str).unwrap_or_default();
            let order = TakeOrder {
                epoch,
                key: self.volume_key(engine, &db),
                nodes: node_configs(&db),
                gone: gone.into_iter().collect(),
                certain,
                redirect_all: flag("redirect").is_some(),
                redirect_nodes: redirected.split(',').filter_map(|id| id.parse().ok().map(NodeId)).collect(),
                maintenance: flag("maintenance").is_some(),
            };
            (order, down)
        };
        if let Err(error) = self.order(RoleOrder::Take(order)) {
            let why = format!("{error:#}");
            engine.event(&self.volume.name, "take-failed", why.clone());
            // Who gets the volume next fences nobody for this: it must be certain that nothing is mounted here, and that
            // nothing is on its way. If it is not, the manager has this node fenced, for its path or for the time it took.
            if !matches!(error.downcast_ref::<ClientError>(), Some(ClientError::Refused(_))) {
                bail!("it is not known what became of the take-over: {why}");
            }
            if self.path_failed() {
                bail!("the path to the LUN failed: {why}");
            }
            if let Some(user) = self.device.as_deref().map(csv_lun::is_mounted).transpose()?.flatten() {
                bail!("the volume could not be taken ({why}), and it is still in use here: {user}");
            }
            let (name, node) = (self.volume.name.clone(), engine.me());
            return self.propose(engine, Command::VolumeStartFailed { name, epoch, node, why });
        }
        memory.told_gone = down;
        self.tell_online(engine, memory, epoch)
    }

    fn key(&self, engine: &Engine) -> Option<u64> {
        self.volume_key(engine, &engine.db.read())
    }

    fn volume_key(&self, engine: &Engine, db: &ClusterDb) -> Option<u64> {
        db.volumes.get(&self.volume.name).and_then(|volume| db.key_of(volume, engine.me()))
    }

    /// The kernel unmounts when the process that had the mount is gone, and writes what is dirty; that is waited for.
    fn close(&self, engine: &Engine, epoch: Epoch) -> Result<()> {
        if let Some(device) = &self.device {
            if let Some(user) = csv_lun::is_mounted(device)? {
                bail!("{} is still in use: {user}", device.display());
            }
            // A file system that was shut down like in a power cut is not clean, and has no note any more.
            let note = engine.config.state_dir.join(format!("{}.mounted", self.volume.name));
            if self.volume.is_absent() && note.exists() {
                let lun = Lun::open(device, LunOptions::default())?;
                csv_lun::label::mark_unused(&lun, epoch)?;
            }
        }
        let why = "csvfs ended".to_owned();
        let (name, node) = (self.volume.name.clone(), engine.me());
        self.propose(engine, Command::VolumeClosed { name, epoch, node, why })
    }

    fn tell_online(&self, engine: &Engine, memory: &Memory, epoch: Epoch) -> Result<()> {
        let fenced = memory.fenced_others.1.clone();
        let (name, node) = (self.volume.name.clone(), engine.me());
        self.propose(engine, Command::VolumeOnline { name, epoch, node, fenced })
    }

    /// Who is in the cluster, for a csvfs that has its role already.
    fn tell_nodes(&self, engine: &Engine, memory: &mut Memory, status: Option<&RoleStatus>) {
        let role = match status.map(|status| status.role) {
            Some(role @ (RoleKind::Owner { .. } | RoleKind::Follower { .. })) => role,
            Some(RoleKind::Nobody) | None => return,
        };
        let now = (role, node_configs(&engine.db.read()));
        if memory.told_nodes.as_ref() != Some(&now)
            && self.order(RoleOrder::Nodes { nodes: now.1.clone() }).is_ok()
        {
            memory.told_nodes = Some(now);
        }
    }

    /// Nodes that had no path are not fenced; that they are down the coordinator has to know all the same.
    fn tell_gone(&self, engine: &Engine, memory: &mut Memory, status: Option<&RoleStatus>) {
        let Some(RoleKind::Owner { epoch }) = status.map(|status| status.role) else { return };
        let down: BTreeSet<(NodeId, u64)> = {
            let db = engine.db.read();
            db.volumes.get(&self.volume.name).map(|volume| down_and_out(&db, volume)).unwrap_or_default()
        };
        let news: Vec<NodeId> = down.difference(&memory.told_gone).map(|(node, _)| *node).collect();
        if news.is_empty() || self.order(RoleOrder::Gone { epoch, nodes: news }).is_ok() {
            memory.told_gone = down;
        }
    }

    /// Is nothing of csvfs's I/O left, and none begun?
    pub(crate) fn is_quiet(&self) -> bool {
        match self.status() {
            // Not there, or not answering: the first is quiet, the second cannot be known.
            None => self.volume.is_absent() && self.nothing_left().is_ok(),
            Some(status) => status.role == RoleKind::Nobody && status.suspended,
        }
    }
}

/// Nodes that are down and have no way to the LUN: nothing that they hold is waited for. One that went down a moment ago and is not
/// fenced yet may still write.
fn down_and_out(db: &ClusterDb, volume: &csv_cluster::db::Volume) -> BTreeSet<(NodeId, u64)> {
    let is_out = |node: NodeId| {
        volume.members.get(&node).is_none_or(|member| member.state == csv_cluster::db::MemberState::Fenced)
    };
    db.nodes
        .values()
        .filter(|node| matches!(node.state, NodeState::Down | NodeState::Joining) && is_out(node.id))
        .map(|node| (node.id, node.incarnation))
        .collect()
}

/// What a `registered.N` property says: incarnation and mark; the order is that of their giving.
fn mark_of(value: &str) -> u64 {
    value.split_whitespace().nth(1).and_then(|mark| mark.parse().ok()).unwrap_or(0)
}

fn read_last(path: &Path) -> Option<(u64, u32)> {
    let text = std::fs::read_to_string(path).ok()?;
    let (incarnation, generation) = text.trim().split_once(' ')?;
    Some((incarnation.parse().ok()?, generation.parse().ok()?))
}

fn write_last(path: &Path, (incarnation, generation): (u64, u32)) -> Result<()> {
    let new = path.with_extension("registered.new");
    std::fs::write(&new, format!("{incarnation} {generation}"))
        .and_then(|()| std::fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn name_of(step: &Step) -> &'static str {
    match step {
        Step::Wait => "waiting",
        Step::Suspend { .. } => "stopping I/O",
        Step::Admit { .. } => "being admitted",
        Step::Register { .. } => "registering on the LUN",
        Step::Take { .. } => "taking the volume",
        Step::TellOnline { .. } => "reporting the volume online",
        Step::Withdraw { .. } => "giving the key back",
        Step::Fence { .. } => "fencing",
        Step::HandOver { .. } => "handing the volume over",
        Step::Close { .. } => "closing the file system",
        Step::Follow { .. } => "following the owner",
    }
}
