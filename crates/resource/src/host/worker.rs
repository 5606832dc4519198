//! A resource in its host: its queue, its state, and its thread.
//!
//! ```text
//!            Online            ok                     Offline, Terminate
//! Offline ──────────> OnlinePending ──> Online ──────────────> OfflinePending ──ok──> Offline
//!    ^                     │ failed      │ poll, report              │ failed
//!    │                     └───────────> Failed <────────────────────┘
//!    └───────── Terminate ────────────────┘
//! ```
//!
//! Adopting goes the way of going online. One that failed is terminated before it goes online again. The lock is never held
//! while an entry point runs.

mod calls;

use super::Shared;
use super::outbox::Connection;
use super::queue::{Asked, Inner, Job, Kind, Running, WAITING_MAX, Work};
use crate::api::{Failure, NodeInfo, Spec};
use crate::protocol::{FromHost, HostState, Outcome, Snapshot, Stuck};
use parking_lot::{Condvar, Mutex};
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, thread};

/// Between two messages about progress of one call.
const PROGRESS_PAUSE: Duration = Duration::from_millis(200);

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) name: String,
    inner: Mutex<Inner>,
    wake: Condvar,
}

impl Worker {
    /// Starts the resource's thread, which opens it.
    pub(crate) fn start(
        shared: &Arc<Shared>,
        node: Arc<NodeInfo>,
        spec: Spec,
        asked: Asked,
        adopt: bool,
    ) -> io::Result<Arc<Worker>> {
        let mut inner = Inner::new(spec);
        if adopt {
            // It may be online, so it is terminated if the lease ends before it is known.
            inner.state = HostState::OnlinePending;
        }
        inner.running = Some(Running::new("open", Some(asked)));
        let name = inner.spec.name.clone();
        let worker = Arc::new(Worker { name, inner: Mutex::new(inner), wake: Condvar::new() });
        let thread = calls::Thread::new(Arc::clone(shared), Arc::clone(&worker), node);
        // The name of a thread takes no NUL; a resource's has none.
        thread::Builder::new().name("resource".to_owned()).spawn(move || thread.run(asked, adopt))?;
        Ok(worker)
    }

    /// Another specification for an open resource.
    pub(crate) fn respecify(&self, spec: Spec, asked: Asked, adopt: bool, shared: &Shared) {
        let mut inner = self.inner.lock();
        let polls = (spec.looks_alive_ms, spec.is_alive_ms);
        let polls_change = (inner.spec.looks_alive_ms, inner.spec.is_alive_ms) != polls;
        // The number of the ownership alone needs no other resource.
        inner.reopen |= Spec { generation: inner.spec.generation, ..spec.clone() } != inner.spec;
        inner.spec = spec;
        if polls_change && inner.state == HostState::Online {
            inner.begin_polls();
        }
        drop(inner);
        self.wake.notify_all();
        if adopt {
            self.submit(Job { asked: Some(asked), kind: Kind::Adopt }, shared);
        } else {
            self.answer(Some(asked), Ok(Value::Null), shared);
        }
    }

    /// A call waits for its turn; a terminate goes in front, and nobody waits for anything else then.
    pub(crate) fn submit(&self, job: Job, shared: &Shared) {
        let mut inner = self.inner.lock();
        if matches!(job.kind, Kind::Terminate) {
            self.put_in_front(&mut inner, job, shared);
        } else if inner.waiting.len() >= WAITING_MAX {
            let why = "too many calls wait for this resource".to_owned();
            self.answer(job.asked, Err(Outcome::Failed { why, retry: true, elsewhere: false }), shared);
        } else {
            inner.waiting.push_back(job);
        }
        drop(inner);
        self.wake.notify_all();
    }

    fn put_in_front(&self, inner: &mut Inner, job: Job, shared: &Shared) {
        let (mut stays, given_up): (VecDeque<Job>, VecDeque<Job>) = std::mem::take(&mut inner.waiting)
            .into_iter()
            .partition(|job| matches!(job.kind, Kind::Terminate | Kind::Close));
        for job in given_up {
            self.answer(job.asked, Err(given_up_outcome()), shared);
        }
        // The lease's own always has room: what asks for an answer is what there may be many of.
        if stays.len() >= WAITING_MAX && job.asked.is_some() {
            self.answer(job.asked, Err(given_up_outcome()), shared);
        } else {
            stays.push_front(job);
        }
        inner.waiting = stays;
        if let Some(running) = &mut inner.running
            && running.entry != "terminate"
        {
            running.cancelled = true;
        }
    }

    /// Nobody waits any more for that call. True when it is one of this resource.
    pub(crate) fn cancel(&self, asked: Asked, shared: &Shared) -> bool {
        let mut inner = self.inner.lock();
        if let Some(running) = &mut inner.running
            && running.asked == Some(asked)
        {
            running.cancelled = true;
            return true;
        }
        let Some(at) = inner.waiting.iter().position(|job| job.asked == Some(asked)) else { return false };
        inner.waiting.remove(at);
        self.answer(Some(asked), Err(given_up_outcome()), shared);
        true
    }

    /// A new connection: calls that nobody waits for any more are not begun.
    pub(crate) fn forget_calls_before(&self, connection: Connection) {
        let mut inner = self.inner.lock();
        inner.waiting.retain(|job| job.asked.is_none_or(|asked| asked.connection >= connection));
    }

    pub(crate) fn set_polls(&self, on: bool) {
        let mut inner = self.inner.lock();
        if on && !inner.polls {
            inner.begin_polls();
        }
        inner.polls = on;
        drop(inner);
        self.wake.notify_all();
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let inner = self.inner.lock();
        Snapshot {
            name: self.name.clone(),
            group: inner.spec.group.clone(),
            generation: inner.spec.generation,
            state: inner.state,
            why: inner.why.clone(),
        }
    }

    /// In one entry point for too long?
    pub(crate) fn stuck(&self) -> Option<Stuck> {
        let inner = self.inner.lock();
        let running = inner.running.as_ref()?;
        let for_ms = u64::try_from(running.sign.elapsed().as_millis()).unwrap_or(u64::MAX);
        (for_ms > inner.spec.deadlock_timeout_ms).then(|| Stuck {
            name: self.name.clone(),
            entry: running.entry.to_owned(),
            for_ms,
        })
    }

    pub(crate) fn running_entry(&self) -> Option<String> {
        self.inner.lock().running.as_ref().map(|running| running.entry.to_owned())
    }

    /// May something of it be on this node?
    pub(crate) fn must_end(&self) -> bool {
        self.inner.lock().state != HostState::Offline
    }

    /// The lease is over. False when there is nothing to end.
    pub(crate) fn end_for_lease(&self, shared: &Shared) -> bool {
        let mut inner = self.inner.lock();
        if inner.state == HostState::Offline {
            return false;
        }
        self.put_in_front(&mut inner, Job { asked: None, kind: Kind::Terminate }, shared);
        drop(inner);
        self.wake.notify_all();
        true
    }

    /// From the resource: its running call gets on.
    pub(crate) fn progress(&self, text: &str, shared: &Shared) {
        let mut inner = self.inner.lock();
        let Some(running) = &mut inner.running else { return };
        let now = Instant::now();
        running.sign = now;
        let Some(asked) = running.asked else { return };
        if running.told.is_none_or(|told| now.duration_since(told) >= PROGRESS_PAUSE) {
            running.told = Some(now);
            let said =
                FromHost::Progress { call: asked.call, name: self.name.clone(), text: text.to_owned() };
            shared.outbox.answer(asked.connection, said);
        }
    }

    pub(crate) fn cancelled(&self) -> bool {
        self.inner.lock().running.as_ref().is_some_and(|running| running.cancelled)
    }

    /// From the resource: it has failed, or that is over.
    pub(crate) fn report(&self, alive: Result<(), String>, shared: &Shared) {
        let mut inner = self.inner.lock();
        match alive {
            Ok(()) => inner.alarm = None,
            Err(why) if inner.state == HostState::Online && inner.polls => self.fail(&mut inner, why, shared),
            // Going online, or under maintenance: counts when that is over.
            Err(why) => inner.alarm = Some(why),
        }
    }

    /// It was online, and has failed by itself.
    fn fail(&self, inner: &mut Inner, why: String, shared: &Shared) {
        inner.alarm = None;
        inner.state = HostState::Failed;
        inner.why.clone_from(&why);
        tracing::warn!(resource = self.name, "failed: {why}");
        shared.outbox.tell(FromHost::Failed { name: self.name.clone(), why });
    }

    /// Waits for what is to do next, and marks it as running.
    fn next(&self, shared: &Shared) -> Work {
        let mut inner = self.inner.lock();
        loop {
            if let Some(job) = inner.waiting.pop_front() {
                inner.running = Some(Running::new(entry_name(&job.kind), job.asked));
                return Work::Job(job);
            }
            if inner.state == HostState::Online
                && inner.polls
                && let Some(why) = inner.alarm.take()
            {
                self.fail(&mut inner, why, shared);
            }
            match inner.next_poll() {
                None => self.wake.wait(&mut inner),
                Some((thorough, at)) if at <= Instant::now() => {
                    inner.running =
                        Some(Running::new(if thorough { "is_alive" } else { "looks_alive" }, None));
                    return if thorough { Work::IsAlive } else { Work::LooksAlive };
                }
                Some((_, at)) => {
                    self.wake.wait_until(&mut inner, at);
                }
            }
        }
    }

    fn answer(&self, asked: Option<Asked>, outcome: Result<Value, Outcome>, shared: &Shared) {
        let Some(Asked { connection, call }) = asked else { return };
        let outcome = outcome.map_or_else(|failed| failed, Outcome::Done);
        shared.outbox.answer(connection, FromHost::Answer { call, name: self.name.clone(), outcome });
    }
}

fn given_up_outcome() -> Outcome {
    calls::outcome_of(&Failure::Cancelled)
}

fn entry_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Adopt => "adopt",
        Kind::Online => "online",
        Kind::Offline => "offline",
        Kind::Terminate => "terminate",
        Kind::IsAlive => "is_alive",
        Kind::Control { .. } => "control",
        Kind::Close => "close",
    }
}
