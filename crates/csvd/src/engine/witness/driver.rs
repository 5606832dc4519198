//! The disk witness on this node: a thread that drives [`csv_cluster::witness`] with the real LUN.
//!
//! ```text
//!  ticks, answers of the LUN, requests for verifies ──> thread ──> arbitration ──> effects ──> LUN operations (blocking
//!                                                                                              threads), the voter
//! ```
//!
//! A node wants the witness when it leads and the witness does not answer, or when it hears no leader. Now and then every
//! node tries, in case that the leader has no path to the LUN: whoever holds it and is alive keeps it. Whoever holds it and
//! reaches no majority for [`USELESS`] gives it back for a while: others may need it more.
//!
//! Failure: whatever goes wrong on the LUN stops the voter here; another try, here or elsewhere, takes `challenge_ms`. The thread itself
//! ends with the engine, and gives the LUN back.

use super::effects::Running;
use super::lun::{WitnessLun, is_witness};
use crate::engine::Engine;
use crate::engine::boot_ms;
use crate::engine::volumes::NOT_SHARED;
use anyhow::{Context, Result, bail};
use csv_cluster::db::Witness as Config;
use csv_cluster::quorum::VoterId as Voter;
use csv_cluster::witness::{Effect, Input, Op, Outcome, RoleKind, Timing, Witness};
use csv_raft::{OpenStorage, Role};
use csv_types::config::LocalConfig;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use uuid::Uuid;

/// Longest wait between ticks.
const TICK_MAX: Duration = Duration::from_millis(100);
const TICK_MIN: Duration = Duration::from_millis(10);
/// A witness that did not answer the leader for this long is challenged.
const SILENT_MS: u64 = 1_500;
/// A follower that heard its leader within this time leaves the witness to it.
const LEADER_AGE_MS_MAX: u64 = 1_500;
/// Between two challenges of this node.
const PAUSE: Duration = Duration::from_millis(500);
/// After a voter that failed.
const FAILED_PAUSE: Duration = Duration::from_secs(5);
/// Who holds the witness and reaches no majority for this long gives it back, and leaves it to others as long.
const USELESS: Duration = Duration::from_secs(20);
/// Between two looks for a LUN that was not there.
const FIND_EVERY: Duration = Duration::from_secs(5);
/// For the good end.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// What the thread waits for.
#[derive(Debug)]
pub(crate) enum Message {
    /// An operation ended.
    Done { op: Op, outcome: Outcome, storage: Option<Box<OpenStorage>> },
    /// An answer of the voter wants out.
    Request(oneshot::Sender<bool>),
    /// The voter has stopped by itself.
    VoterEnded { tenure: u64, why: String },
    /// Give everything back and end.
    Stop(oneshot::Sender<()>),
}

/// What the engine keeps of the thread.
#[derive(Debug)]
pub(crate) struct DiskWitness {
    messages: Sender<Message>,
    inbox: Mutex<Option<Receiver<Message>>>,
    /// The path is failed, by order of a test.
    failed: Arc<AtomicBool>,
    /// The LUN as the thread has found it.
    lun: Mutex<Option<Arc<WitnessLun>>>,
    /// Why it has not found it, or what went wrong last.
    problem: Mutex<Option<String>>,
}

impl DiskWitness {
    pub(crate) fn new() -> DiskWitness {
        let (messages, inbox) = channel();
        DiskWitness {
            messages,
            inbox: Mutex::new(Some(inbox)),
            failed: Arc::default(),
            lun: Mutex::default(),
            problem: Mutex::default(),
        }
    }

    /// Fails the path to the LUN, or heals it (lab and tests).
    pub(crate) fn set_failed(&self, failed: bool) {
        self.failed.store(failed, Ordering::Release);
    }

    /// The node that holds the LUN, by the LUN's own word; blocks. `None`: there is no disk witness.
    pub(crate) fn holder(&self) -> Option<Result<Option<csv_types::NodeId>>> {
        let lun = self.lun.lock().clone();
        Some(lun?.holder_node())
    }

    /// What is wrong, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        self.problem.lock().clone()
    }

    /// Ends the thread; the LUN is given back.
    pub(crate) async fn stop(&self) {
        let (done, ended) = oneshot::channel();
        if self.inbox.lock().is_none() && self.messages.send(Message::Stop(done)).is_ok() {
            let _late = tokio::time::timeout(STOP_LIMIT, ended).await;
        }
    }

    /// Starts the thread, once.
    pub(crate) fn start(engine: &Arc<Engine>) -> Result<()> {
        let Some(inbox) = engine.disk_witness.inbox.lock().take() else { return Ok(()) };
        let engine = engine.clone();
        std::thread::Builder::new()
            .name("witness".into())
            .spawn(move || run(&engine, &inbox))
            .context("cannot start a thread")?;
        Ok(())
    }
}

/// A witness LUN that was found, and the arbitration over it.
pub(super) struct Seat {
    pub(super) lun: Arc<WitnessLun>,
    arbiter: Witness,
    pub(super) messages: Sender<Message>,
    pub(super) requests: BTreeMap<u64, oneshot::Sender<bool>>,
    pub(super) running: Running,
    next_request: u64,
    /// No challenge before.
    not_before: Instant,
    /// The last challenge.
    tried: Instant,
    /// Since when it is held without a majority.
    useless: Option<Instant>,
    last_lost: String,
}

impl Seat {
    fn new(lun: Arc<WitnessLun>, messages: Sender<Message>, timing: Timing) -> Seat {
        Seat {
            arbiter: Witness::new(lun.key(), timing),
            lun,
            messages,
            requests: BTreeMap::new(),
            running: Running::default(),
            next_request: 0,
            not_before: Instant::now(),
            tried: Instant::now(),
            useless: None,
            last_lost: String::new(),
        }
    }

    /// Gives the arbitration an input and carries out what it wants.
    pub(super) fn feed(&mut self, engine: &Arc<Engine>, input: Input) {
        let mut effects: Vec<Effect> = Vec::new();
        self.arbiter.step(boot_ms(), input, &mut effects);
        self.carry_out(engine, effects);
    }

    fn take(&mut self, engine: &Arc<Engine>, message: Message) {
        match message {
            Message::Done { op, outcome, storage } => {
                if storage.is_some() {
                    self.running.storage = storage.map(|storage| *storage);
                }
                self.feed(engine, Input::Done { op, outcome });
                // What nobody waited for any more.
                self.running.storage = None;
            }
            Message::Request(answer) => {
                self.next_request += 1;
                let id = self.next_request;
                self.requests.insert(id, answer);
                self.feed(engine, Input::Request { id });
            }
            Message::VoterEnded { tenure, why }
                if tenure == self.running.tenure && self.arbiter.serving() =>
            {
                self.failed(engine, &format!("the witness's voter has stopped: {why}"));
            }
            Message::VoterEnded { .. } | Message::Stop(_) => {}
        }
    }

    /// The voter does not run although the LUN is held.
    pub(super) fn failed(&mut self, engine: &Arc<Engine>, why: &str) {
        engine.event("", "witness-failed", why.to_owned());
        *engine.disk_witness.problem.lock() = Some(why.to_owned());
        self.not_before = Instant::now() + FAILED_PAUSE;
        self.feed(engine, Input::Yield);
    }

    /// A challenge came to nothing.
    pub(super) fn lost(&mut self, engine: &Engine, reason: &str) {
        self.not_before = self.not_before.max(Instant::now() + PAUSE);
        tracing::info!(reason, "the disk witness was not taken");
        let held = reason.contains("another node");
        *engine.disk_witness.problem.lock() = (!held).then(|| reason.to_owned());
        if !held && self.last_lost != reason {
            engine.event("", "witness-failed", format!("the disk witness cannot be taken here: {reason}"));
        }
        reason.clone_into(&mut self.last_lost);
    }

    fn tick(&mut self, engine: &Arc<Engine>) {
        self.arbiter.set_timing(Timing::new(&engine.db.read().settings));
        self.feed(engine, Input::Tick);
        match self.arbiter.role() {
            RoleKind::Idle if Instant::now() >= self.not_before => {
                let challenge = Duration::from_millis(engine.db.read().settings.witness_challenge_ms);
                let due = self.tried.elapsed() >= 2 * challenge;
                match wants(engine) {
                    Wants::Now => self.challenge(engine),
                    Wants::Sometimes if due => self.challenge(engine),
                    Wants::Sometimes | Wants::Never => {}
                }
            }
            RoleKind::Idle | RoleKind::Challenger => {}
            RoleKind::Defender => self.defend(engine),
        }
        let voter = engine.witness.lock().clone();
        if let Some(voter) = voter {
            let _in_runtime = engine.runtime.enter();
            voter.tend();
        }
    }

    fn challenge(&mut self, engine: &Arc<Engine>) {
        self.tried = Instant::now();
        self.feed(engine, Input::Challenge);
    }

    fn defend(&mut self, engine: &Arc<Engine>) {
        if self.arbiter.serving() {
            *engine.disk_witness.problem.lock() = None;
            self.last_lost.clear();
        }
        if engine.raft().metrics().has_quorum() {
            self.useless = None;
        } else if self.useless.get_or_insert_with(Instant::now).elapsed() >= USELESS {
            self.useless = None;
            self.not_before = Instant::now() + USELESS;
            self.feed(engine, Input::Yield);
        }
    }
}

/// How much a node wants the witness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wants {
    Now,
    Sometimes,
    Never,
}

/// Should this node try to take the witness?
fn wants(engine: &Engine) -> Wants {
    let metrics = engine.raft().metrics();
    if !engine.db.read().nodes.contains_key(&engine.me()) {
        return Wants::Never;
    }
    let now = |needed: bool| if needed { Wants::Now } else { Wants::Sometimes };
    match metrics.role {
        Role::Leader if !metrics.nodes.contains_key(&Voter::WITNESS.0) => Wants::Never,
        Role::Leader => {
            let acked = metrics.followers.get(&Voter::WITNESS.0).and_then(|witness| witness.ack_age_ms);
            now(acked.is_none_or(|age| age > SILENT_MS))
        }
        Role::Follower | Role::Learner | Role::Candidate => {
            now(metrics.leader_age_ms.is_none_or(|age| age > LEADER_AGE_MS_MAX))
        }
        Role::Stopped => Wants::Never,
    }
}

fn run(engine: &Arc<Engine>, inbox: &Receiver<Message>) {
    let mut seat: Option<Seat> = None;
    let mut look_at = Instant::now();
    let mut tick_at = Instant::now();
    loop {
        if Instant::now() >= tick_at {
            choose(engine, &mut seat, &mut look_at);
            if let Some(seat) = &mut seat {
                seat.tick(engine);
            }
            let renew = Duration::from_millis(engine.db.read().settings.witness_renew_ms);
            tick_at = Instant::now() + (renew / 20).clamp(TICK_MIN, TICK_MAX);
        }
        match inbox.recv_timeout(tick_at.saturating_duration_since(Instant::now())) {
            Ok(Message::Stop(done)) => {
                leave(engine, &mut seat);
                let _gone = done.send(());
                return;
            }
            Ok(message) => {
                if let Some(seat) = &mut seat {
                    seat.take(engine, message);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn leave(engine: &Arc<Engine>, seat: &mut Option<Seat>) {
    *engine.disk_witness.lun.lock() = None;
    if let Some(mut seat) = seat.take() {
        seat.feed(engine, Input::Yield);
        seat.end(engine);
    }
}

/// Goes with the database: another witness, another LUN, or none.
fn choose(engine: &Arc<Engine>, seat: &mut Option<Seat>, look_at: &mut Instant) {
    let (config, timing) = {
        let db = engine.db.read();
        (db.quorum.witness.clone(), Timing::new(&db.settings))
    };
    let Config::Disk { name, lun_id, device } = config else {
        // It goes on until its vote is gone: the others may still need it for that.
        let member = engine.raft().metrics().nodes.contains_key(&Voter::WITNESS.0);
        if seat.is_some() && !member {
            leave(engine, seat);
        }
        *engine.disk_witness.problem.lock() = None;
        return;
    };
    if seat.as_ref().is_some_and(|seat| seat.lun.id() == lun_id) {
        return;
    }
    leave(engine, seat);
    if Instant::now() < *look_at {
        return;
    }
    *look_at = Instant::now() + FIND_EVERY;
    match find(&engine.config, &name, lun_id, Path::new(&device)) {
        Ok((device, header)) if header.cluster_id == engine.identity.cluster_id => {
            let failed = engine.disk_witness.failed.clone();
            let lun = Arc::new(WitnessLun::new(device, header, engine.me(), failed));
            *engine.disk_witness.lun.lock() = Some(lun.clone());
            *engine.disk_witness.problem.lock() = None;
            *seat = Some(Seat::new(lun, engine.disk_witness.messages.clone(), timing));
        }
        Ok((device, _)) => note(engine, format!("{} is a witness of another cluster", device.display())),
        Err(error) => note(engine, format!("{error:#}")),
    }
}

fn note(engine: &Engine, why: String) {
    let mut problem = engine.disk_witness.problem.lock();
    if problem.as_ref() != Some(&why) {
        engine.event("", "witness-failed", why.clone());
        *problem = Some(why);
    }
}

/// The device of the witness on this node: as the administrator says, else where it was made, else by its header.
pub(crate) fn find(
    local: &LocalConfig,
    name: &str,
    id: Uuid,
    made_at: &Path,
) -> Result<(PathBuf, csv_ondisk::WitnessHeader)> {
    if let Some(device) = local.luns.get(name) {
        let header = is_witness(device, id).with_context(|| {
            format!("{}, which is to be the disk witness {name} on this node, is not", device.display())
        })?;
        return Ok((device.clone(), header));
    }
    if !local.scan_luns {
        bail!("the configuration of this node names no device for the disk witness {name}");
    }
    let mut devices = vec![made_at.to_owned()];
    let mut disks: Vec<String> = std::fs::read_dir("/sys/block")
        .context("cannot list the disks")?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|disk| !NOT_SHARED.iter().any(|prefix| disk.starts_with(prefix)))
        .collect();
    // Multipath devices go before their paths.
    disks.sort_by_key(|disk| !disk.starts_with("dm-"));
    devices.extend(disks.into_iter().map(|disk| Path::new("/dev").join(disk)));
    devices
        .into_iter()
        .find_map(|device| is_witness(&device, id).ok().map(|header| (device, header)))
        .with_context(|| format!("no disk of this node is the disk witness {name} ({id})"))
}
