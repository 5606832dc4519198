//! What waits for a resource's thread: calls in order, a terminate in front, and the next poll.

use super::outbox::Connection;
use crate::api::Spec;
use crate::protocol::HostState;
use serde_json::Value;
use std::collections::VecDeque;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::time::{Duration, Instant};

/// Calls that may wait for one resource.
pub(crate) const WAITING_MAX: usize = 64;
/// A poll interval is not shorter.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Who waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked {
    /// On which connection.
    pub(crate) connection: Connection,
    /// Number of the call there.
    pub(crate) call: u64,
}

/// What a thread is to do.
#[derive(Debug)]
pub(crate) struct Job {
    /// Nobody, when the lease was over.
    pub(crate) asked: Option<Asked>,
    pub(crate) kind: Kind,
}

/// See [`Job`].
#[derive(Debug)]
pub(crate) enum Kind {
    Adopt,
    Online,
    Offline,
    Terminate,
    IsAlive,
    Control { verb: String, arguments: Value },
    Close,
}

/// What the thread does next.
#[derive(Debug)]
pub(crate) enum Work {
    Job(Job),
    LooksAlive,
    IsAlive,
}

/// The entry point in which the thread is.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) entry: &'static str,
    pub(crate) asked: Option<Asked>,
    /// Start, or the last progress.
    pub(crate) sign: Instant,
    /// Last progress that csvd was told.
    pub(crate) told: Option<Instant>,
    pub(crate) cancelled: bool,
}

impl Running {
    pub(crate) fn new(entry: &'static str, asked: Option<Asked>) -> Running {
        Running { entry, asked, sign: Instant::now(), told: None, cancelled: false }
    }
}

/// State of a resource, under its lock.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) spec: Spec,
    /// Between two looks, and between two thorough ones, where the specification leaves it to the type.
    pub(crate) of_type: (Duration, Duration),
    /// The specification changed since the resource was opened: it is opened anew at the next online.
    pub(crate) reopen: bool,
    pub(crate) state: HostState,
    pub(crate) why: String,
    pub(crate) waiting: VecDeque<Job>,
    pub(crate) running: Option<Running>,
    /// Polls are on.
    pub(crate) polls: bool,
    pub(crate) looks_at: Option<Instant>,
    pub(crate) is_at: Option<Instant>,
    /// The resource's own report that it has failed.
    pub(crate) alarm: Option<String>,
}

impl Inner {
    pub(crate) fn new(spec: Spec) -> Inner {
        Inner {
            spec,
            of_type: (Duration::ZERO, Duration::ZERO),
            reopen: false,
            state: HostState::Offline,
            why: String::new(),
            waiting: VecDeque::new(),
            running: None,
            polls: true,
            looks_at: None,
            is_at: None,
            alarm: None,
        }
    }

    /// Polls begin, at a moment that depends on the name: resources that go online together are not polled together.
    pub(crate) fn begin_polls(&mut self) {
        let mut hasher = DefaultHasher::new();
        self.spec.name.hash(&mut hasher);
        // Between 1/1024 of the interval and all of it.
        let share = u32::try_from(hasher.finish() % 1024).unwrap_or(0) + 1;
        let now = Instant::now();
        let (looks, is) = self.intervals();
        self.looks_at = looks.map(|every| now + every / 1024 * share);
        self.is_at = is.map(|every| now + every / 1024 * share);
    }

    /// After a poll.
    pub(crate) fn polled(&mut self, thorough: bool) {
        let now = Instant::now();
        let (looks, is) = self.intervals();
        self.looks_at = looks.map(|every| now + every);
        if thorough {
            self.is_at = is.map(|every| now + every);
        }
    }

    fn intervals(&self) -> (Option<Duration>, Option<Duration>) {
        let (looks, is) = self.of_type;
        (interval(self.spec.looks_alive_ms, looks), interval(self.spec.is_alive_ms, is))
    }

    /// The next poll, when nothing else is to do: whether it is a thorough one, and when.
    pub(crate) fn next_poll(&self) -> Option<(bool, Instant)> {
        if self.state != HostState::Online || !self.polls {
            return None;
        }
        match (self.is_at, self.looks_at) {
            (Some(is), Some(looks)) if is > looks => Some((false, looks)),
            (Some(is), _) => Some((true, is)),
            (None, looks) => looks.map(|looks| (false, looks)),
        }
    }
}

/// 0 is never; a year is as good as never.
fn interval(ms: Option<u64>, of_type: Duration) -> Option<Duration> {
    let year = Duration::from_secs(365 * 86_400);
    let every = ms.map_or(of_type, Duration::from_millis);
    (!every.is_zero()).then(|| every.clamp(INTERVAL_MIN, year))
}
