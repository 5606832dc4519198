//! The thread of a resource: runs entry points, one after the other, and turns how they end into states and answers.

use super::super::Shared;
use super::super::queue::{Asked, Job, Kind, Running, Work};
use super::super::services::Offered;
use super::Worker;
use crate::api::{EventLevel, Failure, NodeInfo, Resource, Services, Spec};
use crate::protocol::{Found, FromHost, HostState, Outcome};
use crate::types;
use serde_json::Value;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// How an entry point failed.
#[derive(Debug)]
struct Broken {
    failure: Failure,
    /// Whatever state the resource was in, nothing is known of it now.
    panicked: bool,
}

impl From<Failure> for Broken {
    fn from(failure: Failure) -> Broken {
        Broken { failure, panicked: false }
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Thread {
    shared: Arc<Shared>,
    worker: Arc<Worker>,
    node: Arc<NodeInfo>,
}

impl Thread {
    pub(super) fn new(shared: Arc<Shared>, worker: Arc<Worker>, node: Arc<NodeInfo>) -> Thread {
        Thread { shared, worker, node }
    }

    pub(super) fn run(self, asked: Asked, adopt: bool) {
        let mut resource = match self.open() {
            Ok(resource) => resource,
            Err(broken) => {
                self.leave(&broken.failure);
                return self.answer(Some(asked), Err(broken.failure));
            }
        };
        if adopt {
            self.adopt(&mut resource, Some(asked));
        } else {
            self.done(Some(asked), Ok(Value::Null));
        }
        loop {
            match self.worker.next(&self.shared) {
                Work::LooksAlive => self.look(&mut resource, false),
                Work::IsAlive => self.look(&mut resource, true),
                Work::Job(Job { asked, kind: Kind::Close }) => {
                    let closed = self.enter(move || {
                        drop(resource);
                        Ok(Value::Null)
                    });
                    self.leave(&Failure::new("the resource was closed"));
                    return self.answer(asked, closed.map_err(|broken| broken.failure));
                }
                Work::Job(job) => self.call(&mut resource, job),
            }
        }
    }

    fn call(&self, resource: &mut Box<dyn Resource>, Job { asked, kind }: Job) {
        match kind {
            Kind::Adopt => self.adopt(resource, asked),
            Kind::Online => self.online(resource, asked),
            Kind::Offline => self.offline(resource, asked),
            Kind::Terminate => self.terminate(resource, asked),
            Kind::IsAlive => self.is_alive_now(resource, asked),
            Kind::Control { verb, arguments } => {
                let answer = self.enter(|| resource.control(&verb, &arguments));
                if let Err(Broken { failure, panicked: true }) = &answer {
                    self.fail_if_online(failure);
                }
                self.done(asked, answer);
            }
            // Handled by the loop, which owns the resource.
            Kind::Close => {}
        }
    }

    /// Opens the resource by its specification of now.
    fn open(&self) -> Result<Box<dyn Resource>, Broken> {
        let spec: Spec = {
            let mut inner = self.worker.inner.lock();
            inner.reopen = false;
            inner.spec.clone()
        };
        let offered: Arc<dyn Services> = Arc::new(Offered {
            node: Arc::clone(&self.node),
            shared: Arc::clone(&self.shared),
            worker: Arc::downgrade(&self.worker),
            name: self.worker.name.clone(),
        });
        let worker = Arc::clone(&self.worker);
        self.enter(move || {
            let kind = types::find(&spec.kind, spec.library.as_deref()).map_err(Failure::NotHere)?;
            let info = kind.info();
            worker.inner.lock().of_type = (info.looks_alive, info.is_alive);
            kind.open(spec, offered)
        })
    }

    fn adopt(&self, resource: &mut Box<dyn Resource>, asked: Option<Asked>) {
        if self.state() == HostState::Online {
            return self.done(asked, Ok(found(Ok(()))));
        }
        self.stage("adopt", HostState::OnlinePending);
        let adopted = if self.shared.lease.holds() {
            self.enter(|| resource.adopt())
        } else {
            Err(Failure::new("the host has no lease, so it takes nothing over").into())
        };
        let adopted = self.is_online(adopted);
        self.done(asked, Ok(found(adopted.map_err(|broken| broken.failure))));
    }

    fn online(&self, resource: &mut Box<dyn Resource>, asked: Option<Asked>) {
        let before = self.state();
        if before == HostState::Online {
            return self.done(asked, Ok(Value::Null));
        }
        if before == HostState::Failed {
            // Something of it may be left.
            self.stage("terminate", HostState::OfflinePending);
            if let Err(broken) = self.enter(|| resource.terminate()) {
                let failure = Failure::new(format!("what is left of it cannot be ended: {}", broken.failure));
                return self.went_online(asked, Err(failure.into()));
            }
        }
        self.stage("online", HostState::OnlinePending);
        // After the state: whoever ends the lease now sees it.
        if !self.shared.lease.holds() {
            self.set(HostState::Offline, "");
            let failure = Failure::new("the host has no lease, so it brings nothing online");
            return self.done(asked, Err(failure.into()));
        }
        self.shared.lease.used();
        if self.worker.inner.lock().reopen {
            self.stage("open", HostState::OnlinePending);
            match self.open() {
                Ok(fresh) => *resource = fresh,
                Err(broken) => {
                    self.worker.inner.lock().reopen = true;
                    self.set(HostState::Offline, "");
                    return self.done(asked, Err(broken));
                }
            }
            self.stage("online", HostState::OnlinePending);
        }
        let online = self.enter(|| resource.online());
        self.went_online(asked, online);
    }

    fn went_online(&self, asked: Option<Asked>, ended: Result<(), Broken>) {
        let ended = self.is_online(ended);
        self.done(asked, ended.map(|()| Value::Null));
    }

    /// The end of online and adopt: it is online, unless it has said meanwhile that it is not.
    fn is_online(&self, ended: Result<(), Broken>) -> Result<(), Broken> {
        let mut inner = self.worker.inner.lock();
        let ended = match inner.alarm.take() {
            Some(why) if ended.is_ok() => Err(Failure::Failed(why).into()),
            Some(_) | None => ended,
        };
        match &ended {
            Ok(()) => {
                inner.state = HostState::Online;
                inner.why.clear();
                inner.begin_polls();
            }
            Err(broken) => {
                inner.state = HostState::Failed;
                inner.why = broken.failure.to_string();
            }
        }
        drop(inner);
        ended
    }

    fn offline(&self, resource: &mut Box<dyn Resource>, asked: Option<Asked>) {
        if self.state() == HostState::Offline {
            return self.done(asked, Ok(Value::Null));
        }
        self.stage("offline", HostState::OfflinePending);
        let offline = self.enter(|| resource.offline());
        self.went_offline(asked, offline);
    }

    fn terminate(&self, resource: &mut Box<dyn Resource>, asked: Option<Asked>) {
        self.stage("terminate", HostState::OfflinePending);
        let terminated = self.enter(|| resource.terminate());
        self.went_offline(asked, terminated);
    }

    fn went_offline(&self, asked: Option<Asked>, ended: Result<(), Broken>) {
        match &ended {
            Ok(()) => self.set(HostState::Offline, ""),
            Err(broken) => self.set(HostState::Failed, &broken.failure.to_string()),
        }
        let left = ended.as_ref().err().map(|broken| broken.failure.to_string());
        if left.is_none() || asked.is_none() {
            self.shared.lease.ended(&self.shared, &self.worker.name, left);
        }
        self.done(asked, ended.map(|()| Value::Null));
    }

    fn is_alive_now(&self, resource: &mut Box<dyn Resource>, asked: Option<Asked>) {
        if self.state() != HostState::Online {
            return self.done(asked, Err(Failure::new("it is not online").into()));
        }
        let alive = self.enter_is_alive(resource);
        self.done(asked, alive.map(|()| Value::Null));
    }

    /// A poll. Only the thorough one decides.
    fn look(&self, resource: &mut Box<dyn Resource>, thorough: bool) {
        if !thorough {
            let looked = self.enter(|| resource.looks_alive());
            let mut inner = self.worker.inner.lock();
            match looked {
                Ok(()) => {
                    inner.running = None;
                    return inner.polled(false);
                }
                Err(Broken { failure, panicked: true }) => {
                    inner.running = None;
                    drop(inner);
                    return self.fail_if_online(&failure);
                }
                Err(_) => {
                    let cancelled = inner.running.as_ref().is_some_and(|running| running.cancelled);
                    inner.running = Some(Running { cancelled, ..Running::new("is_alive", None) });
                }
            }
        }
        // How it ended is in the state.
        let _ = self.enter_is_alive(resource);
        self.worker.inner.lock().running = None;
    }

    /// A thorough look, whose failure is the resource's. What a poll says that had to give up counts for nothing.
    fn enter_is_alive(&self, resource: &mut Box<dyn Resource>) -> Result<(), Broken> {
        let alive = self.enter(|| resource.is_alive());
        let mut inner = self.worker.inner.lock();
        inner.polled(true);
        let given_up = inner.running.as_ref().is_some_and(|running| running.cancelled);
        if let Err(broken) = &alive
            && inner.state == HostState::Online
            && (broken.panicked || !given_up)
        {
            self.worker.fail(&mut inner, broken.failure.to_string(), &self.shared);
        }
        alive
    }

    fn fail_if_online(&self, failure: &Failure) {
        let mut inner = self.worker.inner.lock();
        if inner.state == HostState::Online {
            self.worker.fail(&mut inner, failure.to_string(), &self.shared);
        }
    }

    /// Runs an entry point; it was marked as running, and stays so until its call is over.
    fn enter<T>(&self, entry: impl FnOnce() -> Result<T, Failure>) -> Result<T, Broken> {
        match catch_unwind(AssertUnwindSafe(entry)) {
            Ok(ended) => ended.map_err(Broken::from),
            Err(payload) => {
                let entry = self.worker.running_entry().unwrap_or_default();
                let text = format!("{entry} panicked: {}", panic_text(payload.as_ref()));
                tracing::error!(resource = self.worker.name, "{text}");
                let (name, level) = (self.worker.name.clone(), EventLevel::Error);
                self.shared.outbox.tell(FromHost::Event { name, level, text: text.clone() });
                Err(Broken { failure: Failure::Failed(text), panicked: true })
            }
        }
    }

    fn state(&self) -> HostState {
        self.worker.inner.lock().state
    }

    /// Which entry point of a call runs now, in which state.
    fn stage(&self, entry: &'static str, state: HostState) {
        let mut inner = self.worker.inner.lock();
        inner.alarm = None;
        inner.state = state;
        if let Some(running) = &mut inner.running {
            *running = Running { cancelled: running.cancelled, ..Running::new(entry, running.asked) };
        }
    }

    fn set(&self, state: HostState, why: &str) {
        let mut inner = self.worker.inner.lock();
        inner.state = state;
        why.clone_into(&mut inner.why);
    }

    /// A call is over.
    fn done(&self, asked: Option<Asked>, ended: Result<Value, Broken>) {
        self.worker.inner.lock().running = None;
        self.answer(asked, ended.map_err(|broken| broken.failure));
    }

    fn answer(&self, asked: Option<Asked>, ended: Result<Value, Failure>) {
        if let Err(failure) = &ended {
            tracing::info!(resource = self.worker.name, "{failure}");
        }
        self.worker.answer(asked, ended.map_err(|failure| outcome_of(&failure)), &self.shared);
    }

    /// The resource is no more in the list, and nothing can be put into its queue.
    fn leave(&self, why: &Failure) {
        let mut workers = self.shared.workers.lock();
        workers.remove(&self.worker.name);
        let mut inner = self.worker.inner.lock();
        inner.running = None;
        let waiting = std::mem::take(&mut inner.waiting);
        let may_be_there = inner.state != HostState::Offline;
        drop(inner);
        drop(workers);
        for job in waiting {
            if job.asked.is_none() {
                let left = may_be_there.then(|| why.to_string());
                self.shared.lease.ended(&self.shared, &self.worker.name, left);
            }
            self.worker.answer(job.asked, Err(outcome_of(why)), &self.shared);
        }
    }
}

/// Answer to `Open` with `adopt`.
fn found(adopted: Result<(), Failure>) -> Value {
    let found = match adopted {
        Ok(()) => Found { online: true, why: String::new() },
        Err(failure) => Found { online: false, why: failure.to_string() },
    };
    serde_json::to_value(found).unwrap_or_default()
}

/// A failure for csvd.
pub(super) fn outcome_of(failure: &Failure) -> Outcome {
    let (retry, elsewhere) = match failure {
        Failure::Failed(_) | Failure::Cancelled => (true, true),
        Failure::NotHere(_) => (false, true),
        Failure::Config(_) | Failure::Unsupported(_) => (false, false),
    };
    Outcome::Failed { why: failure.to_string(), retry, elsewhere }
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}
