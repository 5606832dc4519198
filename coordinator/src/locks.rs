//! Locks that applications take: the coordinator's side of [`csv_locks`]. A waiting lock is a noted call and holds no
//! thread; it is answered when it is granted, cancelled, or its session ends.

use crate::calls::{Answer, Call, Done, Fail};
use crate::coordinator::Coordinator;
use crate::state::{CallRef, Core, Waits};
use csv_locks::{Effect, Input, Kind, LockRange, LockRequest, LockType, Owner, RequestId};
use csv_proto::{GetLock, Lock, Reply, SetLock, reply};
use csv_types::FileId;
use rustix::io::Errno;

impl Coordinator {
    pub(crate) fn getlk(&self, call: &Call, get: GetLock) -> Result<Done, Fail> {
        let file = csv_proto::file_id(get.file)?;
        let lock = get.lock.ok_or(csv_proto::Malformed("lock"))?;
        let request = request(call.at, file, get.owner, &lock, Kind::Posix, false)?;
        let held = self.core.lock().locks.get(&request);
        let answer = match held {
            None => Lock { r#type: libc::F_UNLCK.cast_unsigned(), ..lock },
            Some(held) => Lock {
                start: held.range.start,
                end: held.range.end,
                r#type: wire_type(held.lock_type),
                // A process of another node has no number here; -1 is what Linux says for such.
                pid: if held.owner.node == call.at.node { held.owner.pid } else { u32::MAX },
            },
        };
        Ok(reply::Body::Lock(answer).into())
    }

    pub(crate) fn setlk(&self, call: &Call, set: SetLock) -> Result<Done, Fail> {
        let file = csv_proto::file_id(set.file)?;
        let lock = set.lock.ok_or(csv_proto::Malformed("lock"))?;
        let kind = if set.flock { Kind::Flock } else { Kind::Posix };
        let request = request(call.at, file, set.owner, &lock, kind, set.wait)?;
        let core = &mut *self.core.lock();
        let number = core.number();
        if !core.waits_for(call.at, Waits::Lock(number)) && set.wait {
            return Err(Errno::INTR.into());
        }
        core.lock_calls.insert(number, call.at);
        let req = RequestId(number);
        let input = if set.reclaim { Input::Reclaim { req, request } } else { Input::Set { req, request } };
        self.lock_step(core, input);
        Ok(Done::Sent)
    }

    pub(crate) fn cancel_lock(&self, core: &mut Core, request: u64) {
        self.lock_step(core, Input::Cancel { req: RequestId(request) });
    }

    /// A session is over.
    pub(crate) fn drop_locks(&self, core: &mut Core, session: u64) {
        self.lock_step(core, Input::DropSession { session });
        core.lock_calls.retain(|_, call| call.session != session);
    }

    fn lock_step(&self, core: &mut Core, input: Input) {
        let mut effects = Vec::new();
        core.locks.step(input, &mut effects);
        for effect in effects {
            let (req, errno, reason) = match effect {
                Effect::Queued { .. } => continue,
                Effect::Granted { req } => (req, 0, String::new()),
                Effect::Refused { req, refusal } => (req, refusal.errno(), refusal.to_string()),
                Effect::Interrupted { req } => (req, Errno::INTR.raw_os_error(), String::new()),
            };
            if let Some(at) = core.lock_calls.remove(&req.0) {
                self.answer_lock(core, at, Answer { errno, reason, ..Answer::default() });
            }
        }
    }

    fn answer_lock(&self, core: &mut Core, at: CallRef, answer: Answer) {
        let reply = Reply { id: at.id, errno: answer.errno, reason: answer.reason, ..Reply::default() };
        if let Some(session) = core.session(at.node, at.session) {
            session.replies.put(reply.clone());
        }
        self.reply(core, at, reply);
    }
}

fn request(
    at: CallRef,
    file: FileId,
    owner: u64,
    lock: &Lock,
    kind: Kind,
    wait: bool,
) -> Result<LockRequest, Fail> {
    let lock_type = match i32::try_from(lock.r#type) {
        Ok(libc::F_RDLCK) => LockType::Read,
        Ok(libc::F_WRLCK) => LockType::Write,
        Ok(libc::F_UNLCK) => LockType::Unlock,
        _ => return Err(Fail::new(Errno::INVAL, "unknown lock type")),
    };
    let range = match kind {
        Kind::Flock => LockRange::ALL,
        Kind::Posix => LockRange { start: lock.start, end: lock.end },
    };
    let owner = Owner { session: at.session, owner, pid: lock.pid, node: at.node };
    Ok(LockRequest { file, owner, kind, range, lock_type, wait })
}

fn wire_type(lock_type: LockType) -> u32 {
    let wire = match lock_type {
        LockType::Read => libc::F_RDLCK,
        LockType::Write => libc::F_WRLCK,
        LockType::Unlock => libc::F_UNLCK,
    };
    wire.cast_unsigned()
}
