//! Calls: taken from a session's stream, run on the pool, answered exactly once. A call whose task dies is answered
//! with EIO; one whose session is over is not answered at all.

use crate::coordinator::Coordinator;
use crate::dispatch::reclaims;
use crate::durable::Changes;
use crate::hidden::{MapError, is_device_error};
use crate::leases::{self, Note};
use crate::options::SessionRef;
use crate::state::{CallRef, Core, Waits};
use csv_layout::table::Input;
use csv_proto::{
    ClientMessage, Cred, Malformed, Pong, Reply, ServerMessage, call, client_message, reply, server_message,
};
use csv_types::NodeId;
use rustix::io::Errno;
use std::sync::Weak;
use std::time::Instant;

/// A call under way.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) at: CallRef,
    pub(crate) cred: Cred,
    pub(crate) resent: bool,
    pub(crate) first_sent_ms: u64,
    coordinator: Weak<Coordinator>,
    answered: bool,
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.answered
            && let Some(coordinator) = self.coordinator.upgrade()
        {
            let reason = "the coordinator gave the call up (internal error or stop)".to_owned();
            let reply = Reply { id: self.at.id, errno: Errno::IO.raw_os_error(), reason, ..Reply::default() };
            let core = &mut *coordinator.core.lock();
            // At the end of the coordinator the call is neither done nor undone: its node asks the next one.
            if !core.stopping && !core.stopped {
                coordinator.reply(core, self.at, reply);
            }
        }
    }
}

/// What a call comes to.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) errno: i32,
    pub(crate) reason: String,
    pub(crate) body: Option<reply::Body>,
    /// Attributes of the directory whose names the call changed.
    pub(crate) dir: Option<csv_proto::Attr>,
    /// What the node may cache of it, if all of this still stands when the reply leaves.
    pub(crate) leases: Vec<Note>,
}

/// An answer, or the word that the reply has left already.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one at a time, on its way from the operation to the reply")]
pub(crate) enum Done {
    Answer(Answer),
    Sent,
}

impl From<Answer> for Done {
    fn from(answer: Answer) -> Done {
        Done::Answer(answer)
    }
}

impl From<reply::Body> for Done {
    fn from(body: reply::Body) -> Done {
        Done::Answer(Answer { body: Some(body), ..Answer::default() })
    }
}

impl Done {
    /// Done, and nothing to tell.
    pub(crate) fn nothing() -> Done {
        Done::Answer(Answer::default())
    }
}

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct Fail {
    pub(crate) errno: Errno,
    pub(crate) reason: String,
}

impl Fail {
    pub(crate) fn new(errno: Errno, reason: &str) -> Fail {
        Fail { errno, reason: reason.to_owned() }
    }
}

impl From<Errno> for Fail {
    fn from(errno: Errno) -> Fail {
        Fail { errno, reason: String::new() }
    }
}

impl From<Malformed> for Fail {
    fn from(malformed: Malformed) -> Fail {
        Fail { errno: Errno::INVAL, reason: malformed.to_string() }
    }
}

impl From<MapError> for Fail {
    fn from(error: MapError) -> Fail {
        match error {
            MapError::Errno(errno) => errno.into(),
            MapError::NotLendable(reason) => Fail::new(Errno::OPNOTSUPP, reason),
        }
    }
}

impl Coordinator {
    /// A message of a session. Never blocks: calls go to the pool; what must keep its order (returns, commits,
    /// acknowledgements) is taken at once.
    pub fn message(&self, from: &SessionRef, message: ClientMessage) {
        let core = &mut *self.core.lock();
        let Some(session) = core.session(from.node, from.session) else { return };
        if session.connection != from.connection {
            return;
        }
        let doomed = session.doomed;
        if message.epoch != self.options.epoch.0 {
            if let Some(client_message::Body::Call(call)) = message.body {
                let reason = format!("epoch {} is not {}", message.epoch, self.options.epoch);
                let reply =
                    Reply { id: call.id, errno: Errno::STALE.raw_os_error(), reason, ..Reply::default() };
                core.send(from.node, server_message::Body::Reply(reply));
            }
            return;
        }
        if !doomed {
            session.heard = Instant::now();
        }
        let node = from.node;
        match message.body {
            Some(client_message::Body::Call(call)) if !doomed => self.take_call(core, from, call),
            Some(client_message::Body::LayoutReturn(message)) => self.returned(core, node, message),
            Some(client_message::Body::CommitAnswer(answer)) => {
                if let Ok(file) = csv_proto::file_id(answer.file) {
                    self.note_commit(core, node, file, answer.size, answer.mtime);
                    self.push_answered(core, node, answer.query_id);
                }
            }
            Some(client_message::Body::InvalidateAck(ack)) => self.push_answered(core, node, ack.id),
            Some(client_message::Body::Status(status)) if !doomed => {
                if !status.state_json.is_empty() {
                    session.state_json = status.state_json;
                }
                core.send(node, server_message::Body::Pong(Pong { ping: status.ping }));
            }
            Some(client_message::Body::Cancel(cancel)) => self.cancel(core, from, cancel.call_id),
            Some(client_message::Body::ReclaimDone(_)) => self.reclaim_done(core, node),
            Some(
                client_message::Body::Call(_)
                | client_message::Body::Status(_)
                | client_message::Body::Hello(_),
            )
            | None => {}
        }
    }

    fn take_call(&self, core: &mut Core, from: &SessionRef, call: csv_proto::Call) {
        if core.stopping || core.stopped {
            return;
        }
        let (epoch, moving) = (core.epoch.0, core.moving);
        let max = self.options.limits.calls_per_session_max;
        let Some(session) = core.session(from.node, from.session) else { return };
        if session.running.contains_key(&call.id) {
            return;
        }
        let answer = if let Some(reply) = session.replies.get(call.id) {
            Some(reply.clone())
        } else if moving {
            Some(moved(call.id))
        } else if session.calls() >= max {
            let reason = format!("more than {max} calls at once");
            Some(Reply { id: call.id, errno: Errno::AGAIN.raw_os_error(), reason, ..Reply::default() })
        } else {
            None
        };
        if let Some(reply) = answer {
            if let Some(outbox) = &session.outbox {
                outbox.send(ServerMessage { epoch, body: Some(server_message::Body::Reply(reply)) });
            }
            return;
        }
        session.running.insert(call.id, Waits::Nothing);
        let at = CallRef { node: from.node, session: from.session, id: call.id };
        if let Some(call::Op::LayoutCommit(commit)) = &call.op
            && let Ok(file) = csv_proto::file_id(commit.file)
        {
            // In order with returns; the call only writes it down.
            self.note_commit(core, at.node, file, commit.size, commit.mtime);
        }
        if call.op.as_ref().is_some_and(reclaims) {
            self.reclaims(core, at.node);
        }
        let started = Call {
            at,
            cred: call.cred.unwrap_or_default(),
            resent: call.resent,
            first_sent_ms: call.first_sent_unix_ms,
            coordinator: self.me.clone(),
            answered: false,
        };
        self.spawn(|co| async move { co.run(started, call.op).await });
    }

    async fn run(&self, mut call: Call, op: Option<call::Op>) {
        let keep = op.as_ref().is_some_and(changes_something);
        let reclaims = op.as_ref().is_some_and(reclaims);
        let remote = call.at.node != self.options.own_node;
        let changes = op.as_ref().filter(|_| remote).map(Changes::of).unwrap_or_default();
        let result = match op {
            Some(op) => self.perform(&call, op).await,
            None => Err(Fail::new(Errno::NOSYS, "unknown operation; install the same release on all nodes")),
        };
        let result = match result {
            Ok(done) => self.make_durable(&changes).map(|()| done).map_err(Fail::from),
            failed => failed,
        };
        if reclaims {
            self.reclaims(&mut self.core.lock(), call.at.node);
        }
        let answer = match result {
            Ok(Done::Sent) => {
                call.answered = true;
                return;
            }
            Ok(Done::Answer(answer)) => answer,
            Err(fail)
                if (is_device_error(fail.errno) || fail.errno == Errno::ROFS)
                    && !(self.options.confirm)() =>
            {
                call.answered = true;
                return self.end("the LUN is not this node's any more");
            }
            Err(fail) if is_device_error(fail.errno) => {
                Answer { errno: Errno::IO.raw_os_error(), reason: fail.reason, ..Answer::default() }
            }
            Err(fail) => {
                Answer { errno: fail.errno.raw_os_error(), reason: fail.reason, ..Answer::default() }
            }
        };
        let core = &mut *self.core.lock();
        call.answered = true;
        if core.stopped {
            return;
        }
        let lease = leases::confirmed(core, &answer.leases);
        let Answer { errno, reason, body, dir: dir_attr, .. } = answer;
        let reply = Reply { id: call.at.id, errno, reason, lease, dir_attr, body };
        if keep && let Some(session) = core.session(call.at.node, call.at.session) {
            session.replies.put(reply.clone());
        }
        self.reply(core, call.at, reply);
    }

    /// Answers a call, unless its session is over.
    pub(crate) fn reply(&self, core: &mut Core, at: CallRef, mut reply: Reply) {
        if core.moving {
            self.quiet.notify_all();
            if reply.errno == Errno::INTR.raw_os_error() {
                reply = moved(at.id);
            }
        }
        let Some(session) = core.session(at.node, at.session) else { return };
        session.ended(at.id);
        core.send(at.node, server_message::Body::Reply(reply));
    }

    fn cancel(&self, core: &mut Core, from: &SessionRef, id: u64) {
        let Some(waits) =
            core.session(from.node, from.session).and_then(|session| session.running.get_mut(&id))
        else {
            return;
        };
        match *waits {
            // It has not come to its wait yet.
            Waits::Nothing => *waits = Waits::Cancelled,
            Waits::Cancelled => {}
            Waits::Lock(request) => self.cancel_lock(core, request),
            Waits::Get(request) => {
                *waits = Waits::Cancelled;
                self.step(core, Input::CancelGet { request });
            }
        }
    }

    /// The state that nodes reported, for a call.
    pub(crate) fn order_from(&self, node: NodeId, order: csv_proto::AdminOrder) -> Done {
        tracing::info!(%node, ?order, "order by the control protocol");
        self.order(crate::options::Order {
            redirect: order.redirect,
            maintenance: order.maintenance,
            node: order.node.map(NodeId),
        });
        Done::nothing()
    }
}

/// The call was not carried out: the volume moves.
fn moved(id: u64) -> Reply {
    Reply { id, errno: csv_proto::MOVED, ..Reply::default() }
}

/// Must a repeated call be answered from the reply cache? What only reads, and layouts, are simply done again.
fn changes_something(op: &call::Op) -> bool {
    !matches!(
        op,
        call::Op::Lookup(_)
            | call::Op::Getattr(_)
            | call::Op::Readlink(_)
            | call::Op::Readdir(_)
            | call::Op::Statfs(_)
            | call::Op::Getxattr(_)
            | call::Op::Listxattr(_)
            | call::Op::Fsync(_)
            | call::Op::Syncfs(_)
            | call::Op::Seek(_)
            | call::Op::Read(_)
            | call::Op::LayoutGet(_)
            | call::Op::LayoutCommit(_)
            | call::Op::Getlk(_)
            | call::Op::ListStates(_)
            | call::Op::MapFile(_)
    )
}
