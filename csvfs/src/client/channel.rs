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

use csv_proto as proto;
use csv_types::Epoch;
use parking_lot::{Condvar, Mutex};
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
}

/// Runs in the thread that received a reply, before anything that the coordinator sent later is looked at.
/// Layout grants are applied there, so that a recall can never overtake the grant it means.
pub(crate) type OnReply = Box<dyn FnOnce(&proto::Reply) + Send>;

struct Pending {
    call: proto::Call,
    sent: bool,
    /// Goes out before `open`, and dies with its link.
    reclaim: bool,
    /// The coordinator is asked to end it early.
    cancelled: bool,
    /// Nobody waits any more; what it may have taken is given back when its reply comes.
    abandoned: bool,
    waiter: Arc<Waiter>,
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
}

impl Channel {
    pub(crate) fn new(op_timeout: Duration) -> Channel {
        Channel {
            state: Mutex::new(State::default()),
            open: AtomicBool::new(false),
            room: Condvar::new(),
            next_call: AtomicU64::new(1),
            op_timeout,
            calls: AtomicU64::new(0),
        }
    }

    /// Epoch of the ownership that the session belongs to.
    pub(crate) fn epoch(&self) -> Epoch {
        self.state.lock().epoch
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
        if reclaim && state.link.is_none() {
            return Err(Errno::NOTCONN);
        }
        let waits = is_lock_wait(&op);
        while !waits && state.calls.len() - state.lock_waits >= CALLS_MAX && !state.closed {
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
            cancelled: false,
            abandoned: false,
            waiter: waiter.clone(),
            on_reply,
        };
        if caller.request != 0 {
            state.by_request.insert(caller.request, id);
            if state.early_interrupts.remove(&caller.request) {
                waiter.slot.lock().interrupted = true;
            }
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
        Ok(id)
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
        let mut state = self.state.lock();
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
        let waiter = state
            .by_request
            .get(&request)
            .and_then(|id| state.calls.get(id))
            .map(|pending| pending.waiter.clone());
        match waiter {
            Some(waiter) => {
                drop(state);
                waiter.slot.lock().interrupted = true;
                waiter.changed.notify_all();
            }
            None => {
                // Most of these belong to requests that were just answered; request numbers never come again.
                if state.early_interrupts.len() >= EARLY_INTERRUPTS_MAX {
                    state.early_interrupts.clear();
                }
                state.early_interrupts.insert(request);
            }
        }
    }

    /// Was this request interrupted while none of its calls was under way? Asking takes the interrupt.
    pub(crate) fn take_interrupt(&self, request: u64) -> bool {
        request != 0 && self.state.lock().early_interrupts.remove(&request)
    }

    /// A reply arrived.
    pub(crate) fn replied(&self, reply: proto::Reply) {
        let (waiter, on_reply) = {
            let mut state = self.state.lock();
            let Some(pending) = state.calls.get_mut(&reply.id) else { return };
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
            (pending.waiter.clone(), pending.on_reply.take())
        };
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
        for pending in state.calls.values_mut().filter(|pending| !pending.reclaim) {
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
        for pending in state.calls.values_mut().filter(|pending| pending.reclaim) {
            let errno = Errno::NOTCONN.raw_os_error();
            pending.waiter.slot.lock().reply = Some(proto::Reply { errno, ..proto::Reply::default() });
            pending.waiter.changed.notify_all();
        }
    }

    /// No more calls; those waiting end with EIO at their time-out or at once when interrupted.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.room.notify_all();
    }
}

fn check(reply: proto::Reply) -> Result<proto::Reply, Errno> {
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
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct FakeLink {
        sent: Mutex<Vec<proto::ClientMessage>>,
    }
    impl Link for FakeLink {
        fn send(&self, message: proto::ClientMessage) {
            self.sent.lock().push(message);
        }
    }

    fn calls(link: &FakeLink) -> Vec<proto::Call> {
        let calls = link.sent.lock();
        calls
            .iter()
            .filter_map(|m| match &m.body {
                Some(Out::Call(call)) => Some(call.clone()),
                Some(_) | None => None,
            })
            .collect()
    }

    fn stat_op() -> Op {
        Op::Statfs(proto::StatFs {})
    }

    fn until(mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done() {
            assert!(Instant::now() < deadline, "did not happen within 10 s");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_call_survives_a_broken_link_and_is_marked_only_for_a_new_coordinator() {
        let channel = Arc::new(Channel::new(Duration::from_secs(10)));
        let first = Arc::new(FakeLink::default());
        channel.linked(first.clone(), Epoch(1));
        channel.open(true);
        let caller = {
            let channel = channel.clone();
            std::thread::spawn(move || channel.call(Caller::default(), stat_op()))
        };
        until(|| calls(&first).len() == 1);
        let id = calls(&first)[0].id;
        channel.unlinked();
        let second = Arc::new(FakeLink::default());
        channel.linked(second.clone(), Epoch(1));
        channel.open(true);
        assert_eq!(calls(&second).len(), 1);
        assert!(!calls(&second)[0].resent);
        channel.unlinked();
        let third = Arc::new(FakeLink::default());
        channel.linked(third.clone(), Epoch(2));
        channel.open(false);
        assert!(calls(&third)[0].resent);
        assert_eq!(calls(&third)[0].id, id);
        channel.replied(proto::Reply { id, ..Default::default() });
        assert!(caller.join().unwrap().is_ok());
    }

    #[test]
    fn unreachable_coordinator_ends_with_eio_and_interrupt_with_eintr() {
        let channel = Arc::new(Channel::new(Duration::from_millis(20)));
        assert_eq!(channel.call(Caller::default(), stat_op()).unwrap_err(), Errno::IO);
        let channel = Arc::new(Channel::new(Duration::from_secs(60)));
        let caller = {
            let channel = channel.clone();
            let who = Caller { request: 77, ..Caller::default() };
            std::thread::spawn(move || channel.call(who, stat_op()))
        };
        until(|| !channel.state.lock().calls.is_empty());
        channel.interrupt(77);
        assert_eq!(caller.join().unwrap().unwrap_err(), Errno::INTR);
    }

    #[test]
    fn an_interrupt_that_comes_first_is_not_lost() {
        let channel = Channel::new(Duration::from_secs(60));
        channel.interrupt(5);
        let who = Caller { request: 5, ..Caller::default() };
        assert_eq!(channel.call(who, stat_op()).unwrap_err(), Errno::INTR);
    }

    #[test]
    fn an_interrupted_call_that_is_out_is_cancelled_at_the_coordinator() {
        let channel = Arc::new(Channel::new(Duration::from_secs(60)));
        let link = Arc::new(FakeLink::default());
        channel.linked(link.clone(), Epoch(1));
        channel.open(true);
        let caller = {
            let channel = channel.clone();
            let who = Caller { request: 9, ..Caller::default() };
            std::thread::spawn(move || channel.call(who, stat_op()))
        };
        until(|| calls(&link).len() == 1);
        channel.interrupt(9);
        until(|| link.sent.lock().iter().any(|m| matches!(m.body, Some(Out::Cancel(_)))));
        let id = calls(&link)[0].id;
        channel.replied(proto::Reply { id, errno: 4, ..Default::default() });
        assert_eq!(caller.join().unwrap().unwrap_err(), Errno::INTR);
    }

    #[test]
    fn a_lock_that_is_granted_to_nobody_is_given_back() {
        let channel = Channel::new(Duration::from_millis(20));
        let link = Arc::new(FakeLink::default());
        channel.linked(link.clone(), Epoch(1));
        channel.open(true);
        let lock = proto::Lock { start: 0, end: 9, r#type: 1, pid: 7 };
        let set = proto::SetLock { lock: Some(lock), owner: 3, ..proto::SetLock::default() };
        assert_eq!(channel.call(Caller::default(), Op::Setlk(set)).unwrap_err(), Errno::IO);
        let id = calls(&link)[0].id;
        channel.replied(proto::Reply { id, ..Default::default() });
        let sent = calls(&link);
        let Some(Op::Setlk(undo)) = &sent[1].op else { panic!("no unlock was sent") };
        assert_eq!(undo.lock.unwrap().r#type, 2);
        assert!(channel.state.lock().calls.is_empty());
    }

    #[test]
    fn a_sent_call_is_not_answered_by_guess_at_once() {
        let channel = Arc::new(Channel::new(Duration::from_secs(60)));
        let first = Arc::new(FakeLink::default());
        channel.linked(first.clone(), Epoch(1));
        channel.open(true);
        let who = Caller { request: 4, ..Caller::default() };
        let caller = {
            let channel = channel.clone();
            std::thread::spawn(move || channel.call(who, stat_op()))
        };
        until(|| calls(&first).len() == 1);
        channel.unlinked();
        channel.interrupt(4);
        let id = calls(&first)[0].id;
        until(|| channel.state.lock().calls.get(&id).is_some_and(|pending| pending.cancelled));
        let second = Arc::new(FakeLink::default());
        channel.linked(second.clone(), Epoch(1));
        channel.open(true);
        assert!(second.sent.lock().iter().any(|m| matches!(m.body, Some(Out::Cancel(_)))));
        channel.replied(proto::Reply { id, ..Default::default() });
        assert!(caller.join().unwrap().is_ok());
    }
}
