//! Modes of this node on the volume: which way data goes, why, and since when (design section 7).
//!
//! Inputs: the path to the LUN (there, failed, healed), orders from the coordinator (redirect, maintenance) and
//! being fenced. The mode is a pure function of them ([`Inputs::mode`]), so that every combination has one
//! answer; each change is an event. The hot path reads one atomic.
//!
//! A path that failed is probed every second by reading the label's place; three good reads in a row bring direct
//! mode back, so that a path that comes and goes does not make the mode flutter.

use crate::events::Events;
use csv_lun::{AlignedBuf, Lun};
use csv_types::{LunOffset, Mode, ModeKind, Reason};
use parking_lot::{Condvar, Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Time between probes of a failed path.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Good probes in a row that bring a path back.
const PROBES_GOOD: u32 = 3;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Path {
    Never,
    Good,
    Failed(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Inputs {
    path: Path,
    /// This node could not register on the LUN, whose guard would refuse its writes.
    unregistered: bool,
    redirect: bool,
    maintenance: bool,
    /// The node was refused by the LUN, or may be presumed dead: no I/O.
    stopped: Option<String>,
    is_coordinator: bool,
}

impl Inputs {
    fn mode(&self) -> Mode {
        if let Some(why) = &self.stopped {
            return Mode { kind: ModeKind::Paused, reason: Reason::Fenced(why.clone()) };
        }
        if self.maintenance {
            return Mode { kind: ModeKind::Paused, reason: Reason::Maintenance };
        }
        if self.redirect {
            return Mode { kind: ModeKind::FsRedirected, reason: Reason::UserRequest };
        }
        // The coordinator has no one to send blocks to: its own file system is the other way to its disk.
        let without_path =
            if self.is_coordinator { ModeKind::FsRedirected } else { ModeKind::BlockRedirected };
        match &self.path {
            Path::Good if !self.unregistered => Mode::DIRECT,
            Path::Good | Path::Never => Mode { kind: without_path, reason: Reason::NoDiskConnectivity },
            Path::Failed(why) => Mode { kind: without_path, reason: Reason::PathFailed(why.clone()) },
        }
    }
}

#[derive(Debug)]
struct State {
    inputs: Inputs,
    mode: Mode,
    since: SystemTime,
    probing: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Modes {
    kind: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
    lun: RwLock<Option<Arc<Lun>>>,
    events: Arc<Events>,
}

fn code(kind: ModeKind) -> u8 {
    match kind {
        ModeKind::Direct => 0,
        ModeKind::BlockRedirected => 1,
        ModeKind::FsRedirected => 2,
        ModeKind::Paused => 3,
        ModeKind::Unavailable => 4,
    }
}

impl Modes {
    /// With the LUN as this node reaches it, if it does.
    pub(crate) fn new(lun: Option<Arc<Lun>>, events: Arc<Events>) -> Modes {
        let path = if lun.is_some() { Path::Good } else { Path::Never };
        let inputs = Inputs {
            path,
            unregistered: false,
            redirect: false,
            maintenance: false,
            stopped: None,
            is_coordinator: false,
        };
        let mode = inputs.mode();
        Modes {
            kind: AtomicU8::new(code(mode.kind)),
            state: Mutex::new(State { inputs, mode, since: SystemTime::now(), probing: false }),
            changed: Condvar::new(),
            lun: RwLock::new(lun),
            events,
        }
    }

    /// The way data goes now.
    pub(crate) fn kind(&self) -> ModeKind {
        match self.kind.load(Ordering::Acquire) {
            0 => ModeKind::Direct,
            1 => ModeKind::BlockRedirected,
            2 => ModeKind::FsRedirected,
            3 => ModeKind::Paused,
            _ => ModeKind::Unavailable,
        }
    }

    /// Does data go straight to the LUN? For the hot path.
    pub(crate) fn is_direct(&self) -> bool {
        self.kind.load(Ordering::Acquire) == 0
    }

    /// Mode, reason and since when (seconds since the Unix epoch).
    pub(crate) fn current(&self) -> (Mode, u64) {
        let state = self.state.lock();
        let since = state.since.duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs());
        (state.mode.clone(), since)
    }

    /// The LUN, where there is a device at all.
    pub(crate) fn lun(&self) -> Option<Arc<Lun>> {
        self.lun.read().clone()
    }

    /// Waits until the mode is another than `seen`, or `stop` says so; that is asked again after [`Modes::wake`].
    pub(crate) fn wait_change(&self, seen: ModeKind, stop: impl Fn() -> bool) {
        let mut state = self.state.lock();
        while state.mode.kind == seen && !stop() {
            self.changed.wait(&mut state);
        }
    }

    /// Something that a waiter may want to know has happened.
    pub(crate) fn wake(&self) {
        // Under the lock, so that nobody is between asking and waiting.
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    fn change(&self, with: impl FnOnce(&mut Inputs)) -> bool {
        let mut state = self.state.lock();
        with(&mut state.inputs);
        let mode = state.inputs.mode();
        if mode == state.mode {
            return false;
        }
        let mut message = format!("mode changes from {} to {}", state.mode.kind, mode.kind);
        if mode.reason != Reason::None {
            message = format!("{message}, reason: {}", mode.reason);
        }
        self.kind.store(code(mode.kind), Ordering::Release);
        state.mode = mode;
        state.since = SystemTime::now();
        drop(state);
        self.changed.notify_all();
        self.events.report("mode-change", message);
        true
    }

    /// Orders of the coordinator.
    pub(crate) fn ordered(&self, redirect: bool, maintenance: bool) -> bool {
        self.change(|inputs| {
            inputs.redirect = redirect;
            inputs.maintenance = maintenance;
        })
    }

    /// csvd could not register this node on the LUN; or could.
    pub(crate) fn unregistered(&self, unregistered: bool) {
        self.change(|inputs| inputs.unregistered = unregistered);
    }

    /// See [`Modes::unregistered`].
    pub(crate) fn is_unregistered(&self) -> bool {
        self.state.lock().inputs.unregistered
    }

    /// This node begins or ends to coordinate the volume.
    pub(crate) fn set_coordinator(&self, on: bool) {
        self.change(|inputs| inputs.is_coordinator = on);
    }

    /// The node must do no I/O, for this reason; or may again.
    pub(crate) fn stopped(&self, why: Option<String>) {
        self.change(|inputs| inputs.stopped = why);
    }

    /// A direct I/O failed. Starts probing.
    pub(crate) fn path_failed(self: &Arc<Self>, why: &str) {
        self.change(|inputs| {
            if inputs.path == Path::Good {
                inputs.path = Path::Failed(why.to_owned());
            }
        });
        let mut state = self.state.lock();
        if !state.probing {
            let modes = self.clone();
            let thread = std::thread::Builder::new().name("path-probe".into());
            match thread.spawn(move || modes.probe_until_good()) {
                Ok(_) => state.probing = true,
                // The next failed I/O tries again.
                Err(error) => tracing::error!(%error, "cannot start the path probe"),
            }
        }
    }

    fn probe_until_good(&self) {
        let mut good = 0;
        while good < PROBES_GOOD {
            std::thread::sleep(PROBE_INTERVAL);
            good = if self.probe_once() { good + 1 } else { 0 };
        }
        self.state.lock().probing = false;
        self.change(|inputs| inputs.path = Path::Good);
    }

    fn probe_once(&self) -> bool {
        let Some(lun) = self.lun() else { return false };
        let len = lun.logical_block_bytes().max(4096) as usize;
        let mut buf = AlignedBuf::new(len);
        let place = LunOffset(lun.capacity_bytes().saturating_sub(1 << 20) & !4095);
        lun.read_at(&mut buf, len, place).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> Inputs {
        Inputs {
            path: Path::Good,
            unregistered: false,
            redirect: false,
            maintenance: false,
            stopped: None,
            is_coordinator: false,
        }
    }

    #[test]
    fn one_answer_for_every_combination() {
        assert_eq!(inputs().mode(), Mode::DIRECT);
        let unregistered = Inputs { unregistered: true, ..inputs() };
        assert_eq!(unregistered.mode().kind, ModeKind::BlockRedirected);
        assert_eq!(unregistered.mode().reason, Reason::NoDiskConnectivity);
        let failed = Inputs { path: Path::Failed("EIO".into()), ..unregistered };
        assert_eq!(failed.mode().reason, Reason::PathFailed("EIO".into()));
        let failed = Inputs { path: Path::Failed("EIO".into()), ..inputs() };
        assert_eq!(failed.mode().kind, ModeKind::BlockRedirected);
        assert_eq!(failed.mode().reason, Reason::PathFailed("EIO".into()));
        let never = Inputs { path: Path::Never, ..inputs() };
        assert_eq!(never.mode().reason, Reason::NoDiskConnectivity);
        let owner = Inputs { path: Path::Never, is_coordinator: true, ..inputs() };
        assert_eq!(owner.mode().kind, ModeKind::FsRedirected);
        let ordered = Inputs { redirect: true, path: Path::Never, ..inputs() };
        assert_eq!(ordered.mode().reason, Reason::UserRequest);
        let paused = Inputs { maintenance: true, redirect: true, ..inputs() };
        assert_eq!(paused.mode().kind, ModeKind::Paused);
        let fenced = Inputs { stopped: Some("preempted".into()), maintenance: true, ..inputs() };
        assert_eq!(fenced.mode().reason, Reason::Fenced("preempted".into()));
    }
}
