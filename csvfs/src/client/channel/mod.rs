//! The client's side of a volume's control session: calls that wait for their reply, across reconnects and changes
//! of the coordinator.
//!
//! Who owns what: [`Channel`] owns the table of calls under way; a [`Link`] (in-process or gRPC) only carries
//! messages and is replaced when it breaks. A message lost with its link is sent again on the next one under the
//! same call id, which the coordinator answers from its reply cache; when the coordinator itself is a new one
//! (another epoch, or it does not know the session), a call that had been sent is marked `resent`, so that the
//! coordinator finds out what became of it (safety rule 9).
//!
//! A call waits at most `op_timeout` for its reply while the coordinator is unreachable, then fails with EIO. An
//! interrupted call that was not sent ends at once with EINTR; one that was sent is cancelled at the coordinator.
//!
//! A call ends in a thread that waits ([`Channel::call`]) or in a function that is run where the reply arrived
//! ([`Channel::start`]): the second kind costs no switch to another thread, and its function must not block.

use csv_proto as proto;
use csv_types::Epoch;
use parking_lot::{Condvar, Mutex, MutexGuard};
use proto::{call::Op, client_message::Body as Out};
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What came of an interrupt.
enum Cancelled {
    NotSent,
    Asked,
    Unreachable,
}

/// How long an interrupted call that was sent waits for a lost coordinator.
const INTERRUPTED_WAIT: Duration = Duration::from_secs(5);

/// Blocking locks waiting at once, at most; one more is refused with ENOLCK.
const LOCK_WAITS_MAX: usize = 4096;

/// Calls under way at once, at most; further ones get EAGAIN from nobody but wait for a place.
const CALLS_MAX: usize = 1024;

/// Interrupts remembered for requests whose handler has not started yet.
const EARLY_INTERRUPTS_MAX: usize = 1024;

/// Carries messages to the coordinator, in order, without blocking. A broken link swallows them.
pub(crate) trait Link: Send + Sync + std::fmt::Debug {
    /// Queues a message.
    fn send(&self, message: proto::ClientMessage);

    /// Is the coordinator in this process?
    fn is_local(&self) -> bool {
        false
    }
}

/// Runs in the thread that received a reply, before anything that the coordinator sent later is looked at.
/// Layout grants are applied there, so that a recall can never overtake the grant it means.
pub(crate) type OnReply = Box<dyn FnOnce(&proto::Reply) + Send>;

/// Runs exactly once when a started call has ended, with the reply (which may carry an errno) or the reason why
/// there is none. It runs in the thread that received, expired or interrupted the call and must not block.
pub(crate) type OnDone = Box<dyn FnOnce(Result<proto::Reply, Errno>) + Send>;

/// A call that was not started because too many are under way; [`Channel::start_waiting`] waits for a place.
pub(crate) struct NotStarted {
    pub(crate) op: Op,
    pub(crate) done: OnDone,
}

/// Where a call ends.
enum End {
    Thread(Arc<Waiter>),
    Run(Run),
}

struct Run {
    /// Taken when the call ends.
    done: Option<OnDone>,
    request: u64,
    deadline: Instant,
    on_timeout: Errno,
}

struct Pending {
    call: proto::Call,
    sent: bool,
    /// Goes out before `open`, and dies with its link.
    reclaim: bool,
    /// See [`Caller`].
    bound: bool,
    /// The coordinator is asked to end it early.
    cancelled: bool,
    /// Nobody waits any more; what it may have taken is given back when its reply comes.
    abandoned: bool,
    end: End,
    on_reply: Option<OnReply>,
}

#[derive(Debug, Default)]
struct Waiter {
    slot: Mutex<WaiterSlot>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct WaiterSlot {
    reply: Option<proto::Reply>,
    interrupted: bool,
}

#[derive(Default)]
struct State {
    link: Option<Arc<dyn Link>>,
    /// Calls may go out: the session is welcomed and, in a grace period, everything is reclaimed.
    open: bool,
    epoch: Epoch,
    calls: BTreeMap<u64, Pending>,
    /// FUSE request number to call id, for interrupts.
    by_request: HashMap<u64, u64>,
    early_interrupts: HashSet<u64>,
    /// Blocking locks among the calls; they do not count as calls under way.
    lock_waits: usize,
    /// The thread of `watch` is going to look at the deadlines by itself.
    watched: bool,
    closed: bool,
}

impl State {
    /// The caller has its answer, or gives up.
    fn end(&mut self, id: u64, answered: bool) {
        let Some(pending) = self.calls.get_mut(&id) else { return };
        if !answered && pending.sent && !pending.reclaim && undo(&pending.call).is_some() {
            pending.abandoned = true;
            return;
        }
        self.remove(id);
    }

    /// Ends a started call without an answer: its function, to be run without the lock.
    fn give_up(&mut self, id: u64) -> Option<(OnDone, Errno)> {
        let End::Run(run) = &mut self.calls.get_mut(&id)?.end else { return None };
        let (done, request, errno) = (run.done.take()?, run.request, run.on_timeout);
        self.by_request.remove(&request);
        self.end(id, false);
        Some((done, errno))
    }

    fn is_full(&self) -> bool {
        self.calls.len() - self.lock_waits >= CALLS_MAX
    }

    fn remove(&mut self, id: u64) -> Option<Pending> {
        let pending = self.calls.remove(&id)?;
        if pending.call.op.as_ref().is_some_and(is_lock_wait) {
            self.lock_waits -= 1;
        }
        Some(pending)
    }
}

fn is_lock_wait(op: &Op) -> bool {
    matches!(op, Op::Setlk(lock) if lock.wait)
}

/// What gives back the thing that a call took for a caller who does not know of it.
fn undo(call: &proto::Call) -> Option<Op> {
    /// `F_UNLCK`.
    const UNLOCK: u32 = 2;
    let op = call.op.as_ref()?;
    if let Op::Setlk(set) = op {
        let lock = set.lock.filter(|lock| lock.r#type != UNLOCK)?;
        let unlock = proto::Lock { r#type: UNLOCK, ..lock };
        return Some(Op::Setlk(proto::SetLock { lock: Some(unlock), wait: false, ..*set }));
    }
    if let Op::Open(open) = op {
        return Some(Op::Close(proto::Close { handle: open.handle, file: open.file }));
    }
    if let Op::Create(create) = op {
        return Some(Op::Close(proto::Close { handle: create.handle, file: None }));
    }
    None
}

/// See the module.
pub(crate) struct Channel {
    state: Mutex<State>,
    /// `State::open`, for those who only look.
    open: AtomicBool,
    room: Condvar,
    deadlines: Condvar,
    next_call: AtomicU64,
    op_timeout: Duration,
    /// Calls sent since the start.
    pub(crate) calls: AtomicU64,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").finish_non_exhaustive()
    }
}

/// Who calls, and under which FUSE request (0 when it is none).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Caller {
    /// FUSE request number, for interrupts.
    pub(crate) request: u64,
    /// User.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Process.
    pub(crate) pid: u32,
    /// Its umask, for creating calls.
    pub(crate) umask: u32,
    /// To be done by this coordinator or not at all: the call ends with ENOTCONN when the link breaks.
    pub(crate) bound: bool,
}

impl Channel {
    pub(crate) fn new(op_timeout: Duration) -> Channel {
        Channel {
            state: Mutex::new(State::default()),
            open: AtomicBool::new(false),
            room: Condvar::new(),
            deadlines: Condvar::new(),
            next_call: AtomicU64::new(1),
            op_timeout,
            calls: AtomicU64::new(0),
        }
    }

    /// Epoch of the ownership that the session belongs to.
    pub(crate) fn epoch(&self) -> Epoch {
        self.state.lock().epoch
    }

    /// The epoch, if the coordinator is another node's: it makes durable what it answers.
    pub(crate) fn remote_epoch(&self) -> Option<Epoch> {
        let state = self.state.lock();
        state.link.as_ref().filter(|link| !link.is_local()).map(|_| state.epoch)
    }

    /// Is the coordinator reachable and ready for calls?
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Sends a message that is no call (returns, answers, reports). Lost when there is no link: what must not be
    /// lost is sent again by reclaim or by the coordinator's next recall.
    pub(crate) fn post(&self, body: Out) {
        let state = self.state.lock();
        if let Some(link) = &state.link {
            link.send(proto::ClientMessage { epoch: state.epoch.0, body: Some(body) });
        }
    }

    /// Calls and waits for the reply.
    ///
    /// # Errors
    /// The coordinator's errno; EIO after the time-out; EINTR when interrupted; ESHUTDOWN after `close`.
    pub(crate) fn call(&self, caller: Caller, op: Op) -> Result<proto::Reply, Errno> {
        self.call_with(caller, op, None, self.op_timeout)
    }

    /// As [`Channel::call`], with work to do in the receiving thread and a time-out of its own.
    pub(crate) fn call_with(
        &self,
        caller: Caller,
        op: Op,
        on_reply: Option<OnReply>,
        timeout: Duration,
    ) -> Result<proto::Reply, Errno> {
        check(self.run(caller, op, on_reply, timeout, false)?)
    }

    /// As [`Channel::call`], but a reply with an errno is a reply.
    ///
    /// # Errors
    /// Only when there is no reply.
    pub(crate) fn ask(&self, caller: Caller, op: Op) -> Result<proto::Reply, Errno> {
        self.run(caller, op, None, self.op_timeout, false)
    }

    /// A call of the reclaim, which goes out before `open` and is not repeated on another link.
    ///
    /// # Errors
    /// As [`Channel::call`]; ENOTCONN when the link broke.
    pub(crate) fn call_reclaim(&self, op: Op) -> Result<proto::Reply, Errno> {
        check(self.run(Caller::default(), op, None, self.op_timeout, true)?)
    }

    fn run(
        &self,
        caller: Caller,
        op: Op,
        on_reply: Option<OnReply>,
        timeout: Duration,
        reclaim: bool,
    ) -> Result<proto::Reply, Errno> {
        let waiter = Arc::new(Waiter::default());
        let deadline = Instant::now() + timeout;
        let id = self.begin(caller, op, &waiter, on_reply, deadline, reclaim)?;
        let outcome = self.wait(id, &waiter, deadline);
        let mut state = self.state.lock();
        if caller.request != 0 {
            state.by_request.remove(&caller.request);
        }
        state.end(id, outcome.is_ok());
        drop(state);
        self.room.notify_one();
        outcome
    }

    /// Starts a call that ends in `done`, without ever blocking.
    ///
    /// # Errors
    /// Too many calls are under way.
    pub(crate) fn start(&self, caller: Caller, op: Op, done: OnDone) -> Result<(), Box<NotStarted>> {
        let state = self.state.lock();
        if state.is_full() && !state.closed {
            return Err(Box::new(NotStarted { op, done }));
        }
        self.start_locked(state, caller, op, done);
        Ok(())
    }

    /// As [`Channel::start`]; waits for a place among the calls under way.
    pub(crate) fn start_waiting(&self, caller: Caller, op: Op, done: OnDone) {
        let deadline = Instant::now() + self.op_timeout;
        let mut state = self.state.lock();
        while state.is_full() && !state.closed {
            if self.room.wait_until(&mut state, deadline).timed_out() {
                drop(state);
                return done(Err(Errno::IO));
            }
        }
        self.start_locked(state, caller, op, done);
    }

    fn start_locked(&self, mut state: MutexGuard<'_, State>, caller: Caller, op: Op, done: OnDone) {
        if state.closed {
            drop(state);
            return done(Err(Errno::SHUTDOWN));
        }
        if caller.request != 0 && state.early_interrupts.remove(&caller.request) {
            drop(state);
            return done(Err(Errno::INTR));
        }
        let deadline = Instant::now() + self.op_timeout;
        let run = Run { done: Some(done), request: caller.request, deadline, on_timeout: Errno::IO };
        self.enter(&mut state, caller, op, End::Run(run), None, false);
        // Every deadline is as far away as the one before, so a thread that sleeps until one need not be woken.
        if !std::mem::replace(&mut state.watched, true) {
            self.deadlines.notify_one();
        }
    }

    /// Ends started calls at their deadlines; returns after [`Channel::close`].
    pub(crate) fn watch(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            let now = Instant::now();
            let times = state.calls.iter().filter_map(|(id, pending)| match &pending.end {
                End::Run(Run { done: Some(_), deadline, .. }) => Some((*deadline, *id)),
                End::Run(_) | End::Thread(_) => None,
            });
            let (due, later): (Vec<_>, Vec<_>) = times.partition(|(deadline, _)| *deadline <= now);
            if !due.is_empty() {
                let ended: Vec<_> = due.into_iter().filter_map(|(_, id)| state.give_up(id)).collect();
                MutexGuard::unlocked(&mut state, || {
                    for (done, errno) in ended {
                        done(Err(errno));
                        self.room.notify_one();
                    }
                });
                continue;
            }
            let next = later.into_iter().min();
            state.watched = next.is_some();
            match next {
                Some((deadline, _)) => drop(self.deadlines.wait_until(&mut state, deadline)),
                None => self.deadlines.wait(&mut state),
            }
        }
    }

    fn begin(
        &self,
        caller: Caller,
        op: Op,
        waiter: &Arc<Waiter>,
        on_reply: Option<OnReply>,
        deadline: Instant,
        reclaim: bool,
    ) -> Result<u64, Errno> {
        let mut state = self.state.lock();
        if reclaim && state.link.is_none() || caller.bound && !state.open {
            return Err(Errno::NOTCONN);
        }
        let waits = is_lock_wait(&op);
        while !waits && state.is_full() && !state.closed {
            if self.room.wait_until(&mut state, deadline).timed_out() {
                return Err(Errno::IO);
            }
        }
        if state.closed {
            return Err(Errno::SHUTDOWN);
        }
        if waits && state.lock_waits >= LOCK_WAITS_MAX {
            return Err(Errno::NOLCK);
        }
        state.lock_waits += usize::from(waits);
        if caller.request != 0 && state.early_interrupts.remove(&caller.request) {
            waiter.slot.lock().interrupted = true;
        }
        Ok(self.enter(&mut state, caller, op, End::Thread(waiter.clone()), on_reply, reclaim))
    }

    /// Puts a call into the table and sends it, if calls go out now.
    fn enter(
        &self,
        state: &mut State,
        caller: Caller,
        op: Op,
        end: End,
        on_reply: Option<OnReply>,
        reclaim: bool,
    ) -> u64 {
        // Ids are given out under the lock, so that they go out in order.
        let id = self.next_call.fetch_add(1, Ordering::Relaxed);
        let call = proto::Call {
            id,
            cred: Some(proto::Cred {
                uid: caller.uid,
                gid: caller.gid,
                pid: caller.pid,
                umask: caller.umask,
            }),
            resent: false,
            first_sent_unix_ms: unix_ms(),
            op: Some(op),
        };
        let mut pending = Pending {
            call,
            sent: false,
            reclaim,
            bound: caller.bound,
            cancelled: false,
            abandoned: false,
            end,
            on_reply,
        };
        if caller.request != 0 {
            state.by_request.insert(caller.request, id);
        }
        if (state.open || reclaim)
            && let Some(link) = state.link.clone()
        {
            pending.sent = true;
            self.calls.fetch_add(1, Ordering::Relaxed);
            let epoch = state.epoch.0;
            let body = Some(Out::Call(pending.call.clone()));
            state.calls.insert(id, pending);
            link.send(proto::ClientMessage { epoch, body });
        } else {
            state.calls.insert(id, pending);
        }
        id
    }

    fn wait(&self, id: u64, waiter: &Waiter, deadline: Instant) -> Result<proto::Reply, Errno> {
        let mut deadline = deadline;
        let mut on_timeout = Errno::IO;
        let mut slot = waiter.slot.lock();
        loop {
            if let Some(reply) = slot.reply.take() {
                return Ok(reply);
            }
            if slot.interrupted {
                slot.interrupted = false;
                drop(slot);
                match self.cancel(id) {
                    Cancelled::NotSent => return Err(Errno::INTR),
                    Cancelled::Asked => {}
                    // What became of it is not known. The link usually comes back soon; but Ctrl-C has to work.
                    Cancelled::Unreachable => {
                        deadline = deadline.min(Instant::now() + INTERRUPTED_WAIT);
                        on_timeout = Errno::INTR;
                    }
                }
                slot = waiter.slot.lock();
                continue;
            }
            if waiter.changed.wait_until(&mut slot, deadline).timed_out() && slot.reply.is_none() {
                return Err(on_timeout);
            }
        }
    }

    fn cancel(&self, id: u64) -> Cancelled {
        Channel::cancel_locked(&mut self.state.lock(), id)
    }

    fn cancel_locked(state: &mut State, id: u64) -> Cancelled {
        let (open, epoch, link) = (state.open, state.epoch.0, state.link.clone());
        let Some(pending) = state.calls.get_mut(&id) else { return Cancelled::NotSent };
        if !pending.sent {
            return Cancelled::NotSent;
        }
        pending.cancelled = true;
        match link.filter(|_| open) {
            Some(link) => {
                let body = Some(Out::Cancel(proto::Cancel { call_id: id }));
                link.send(proto::ClientMessage { epoch, body });
                Cancelled::Asked
            }
            None => Cancelled::Unreachable,
        }
    }

    /// The kernel interrupts a FUSE request.
    pub(crate) fn interrupt(&self, request: u64) {
        let mut state = self.state.lock();
        let found = state.by_request.get(&request).copied().filter(|id| state.calls.contains_key(id));
        let Some(id) = found else {
            // Most of these belong to requests that were just answered; request numbers never come again.
            if state.early_interrupts.len() >= EARLY_INTERRUPTS_MAX {
                state.early_interrupts.clear();
            }
            state.early_interrupts.insert(request);
            return;
        };
        let waiter = match &state.calls[&id].end {
            End::Thread(waiter) => Some(waiter.clone()),
            End::Run(_) => None,
        };
        match waiter {
            Some(waiter) => {
                drop(state);
                waiter.slot.lock().interrupted = true;
                waiter.changed.notify_all();
            }
            None => self.interrupt_started(state, id),
        }
    }

    fn interrupt_started(&self, mut state: MutexGuard<'_, State>, id: u64) {
        match Channel::cancel_locked(&mut state, id) {
            Cancelled::Asked => {}
            Cancelled::NotSent => {
                let ended = state.give_up(id);
                drop(state);
                if let Some((done, _)) = ended {
                    done(Err(Errno::INTR));
                }
                self.room.notify_one();
            }
            // As for a thread that waits.
            Cancelled::Unreachable => {
                if let Some(Pending { end: End::Run(run), .. }) = state.calls.get_mut(&id) {
                    run.deadline = run.deadline.min(Instant::now() + INTERRUPTED_WAIT);
                    run.on_timeout = Errno::INTR;
                }
                self.deadlines.notify_one();
            }
        }
    }

    /// Was this request interrupted while none of its calls was under way? Asking takes the interrupt.
    pub(crate) fn take_interrupt(&self, request: u64) -> bool {
        request != 0 && self.state.lock().early_interrupts.remove(&request)
    }

    /// A reply arrived.
    pub(crate) fn replied(&self, reply: proto::Reply) {
        let mut state = self.state.lock();
        let Some(pending) = state.calls.get_mut(&reply.id) else { return };
        if reply.errno == proto::MOVED {
            // It was not carried out. The link is going to break; on the next one the call is as good as new.
            pending.sent = false;
            if pending.abandoned {
                state.remove(reply.id);
            }
            return;
        }
        if pending.abandoned {
            let call = pending.call.clone();
            state.remove(reply.id);
            if reply.errno == 0
                && let Some(op) = undo(&call)
            {
                self.send_unasked(&state, op);
            }
            return;
        }
        let on_reply = pending.on_reply.take();
        let waiter = match &mut pending.end {
            End::Thread(waiter) => waiter.clone(),
            End::Run(run) => {
                let (done, request) = (run.done.take(), run.request);
                state.by_request.remove(&request);
                state.remove(reply.id);
                drop(state);
                self.room.notify_one();
                if let Some(done) = done {
                    done(Ok(reply));
                }
                return;
            }
        };
        drop(state);
        if let Some(on_reply) = on_reply {
            on_reply(&reply);
        }
        waiter.slot.lock().reply = Some(reply);
        waiter.changed.notify_all();
    }

    /// A link is up and the coordinator has said Welcome. Calls stay back until [`Channel::open`].
    pub(crate) fn linked(&self, link: Arc<dyn Link>, epoch: Epoch) {
        let mut state = self.state.lock();
        state.link = Some(link);
        state.epoch = epoch;
        state.open = false;
        self.open.store(false, Ordering::Release);
    }

    /// Calls may go out; those under way are sent (again). `same_coordinator` means that it still has the reply
    /// cache of this session.
    pub(crate) fn open(&self, same_coordinator: bool) {
        let mut state = self.state.lock();
        state.open = true;
        self.open.store(true, Ordering::Release);
        let Some(link) = state.link.clone() else { return };
        let epoch = state.epoch.0;
        for pending in state.calls.values_mut().filter(|pending| !pending.reclaim && !pending.bound) {
            if pending.sent && !same_coordinator {
                pending.call.resent = true;
            }
            pending.sent = true;
            self.calls.fetch_add(1, Ordering::Relaxed);
            link.send(proto::ClientMessage { epoch, body: Some(Out::Call(pending.call.clone())) });
            if pending.cancelled || pending.abandoned {
                let body = Some(Out::Cancel(proto::Cancel { call_id: pending.call.id }));
                link.send(proto::ClientMessage { epoch, body });
            }
        }
    }

    /// A call whose reply nobody waits for.
    fn send_unasked(&self, state: &State, op: Op) {
        let Some(link) = &state.link else { return };
        let id = self.next_call.fetch_add(1, Ordering::Relaxed);
        let call = proto::Call {
            id,
            cred: Some(proto::Cred::default()),
            resent: false,
            first_sent_unix_ms: unix_ms(),
            op: Some(op),
        };
        link.send(proto::ClientMessage { epoch: state.epoch.0, body: Some(Out::Call(call)) });
    }

    /// The link broke. Calls under way wait for the next one.
    pub(crate) fn unlinked(&self) {
        let mut state = self.state.lock();
        state.link = None;
        state.open = false;
        self.open.store(false, Ordering::Release);
        for pending in state.calls.values_mut().filter(|pending| pending.reclaim || pending.bound) {
            let End::Thread(waiter) = &pending.end else { continue };
            let errno = Errno::NOTCONN.raw_os_error();
            waiter.slot.lock().reply = Some(proto::Reply { errno, ..proto::Reply::default() });
            waiter.changed.notify_all();
        }
    }

    /// No more calls; those waiting end with EIO at their time-out or at once when interrupted.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.room.notify_all();
        self.deadlines.notify_all();
    }
}

/// A reply with an errno as an error.
pub(crate) fn check(reply: proto::Reply) -> Result<proto::Reply, Errno> {
    match reply.errno {
        0 => Ok(reply),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

/// Milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
