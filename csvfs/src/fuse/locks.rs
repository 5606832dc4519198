//! flock(2), fcntl(2) POSIX and OFD locks, all cluster-wide through the coordinator.

use super::abi::{self, LkIn};
use crate::client::VolumeClient;
use crate::client::channel::Caller;
use crate::client::inode::Inode;
use csv_proto as proto;
use proto::call::Op;
use proto::reply::Body;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A blocking lock waits until it is granted or its process is interrupted; this is only a bound.
const WAIT_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// Each waits for the coordinator as long as any operation.
const RELEASE_TRIES: u32 = 3;
/// `F_UNLCK`.
const UNLOCK: u32 = 2;

/// Carries out GETLK, SETLK or SETLKW; the reply's payload.
///
/// # Errors
/// EAGAIN when it would block, EDEADLK, EINTR, ENOLCK.
pub(crate) fn run(
    client: &VolumeClient,
    caller: Caller,
    inode: &Arc<Inode>,
    opcode: u32,
    wanted: LkIn,
) -> Result<Vec<u8>, Errno> {
    let lock = proto::Lock { start: wanted.start, end: wanted.end, r#type: wanted.kind, pid: wanted.pid };
    if opcode == abi::GETLK {
        return get(client, caller, inode, wanted.owner, lock);
    }
    let flock = wanted.flags & abi::LK_FLOCK != 0;
    set(client, caller, inode, SetWhat { owner: wanted.owner, flock, wait: opcode == abi::SETLKW }, lock)?;
    if !flock && wanted.kind != UNLOCK {
        client.locks.taken_through(wanted.handle, inode.file, wanted.owner);
    }
    Ok(Vec::new())
}

#[derive(Debug, Clone, Copy)]
struct SetWhat {
    owner: u64,
    flock: bool,
    wait: bool,
}

fn set(
    client: &VolumeClient,
    caller: Caller,
    inode: &Inode,
    what: SetWhat,
    lock: proto::Lock,
) -> Result<(), Errno> {
    if lock.r#type == UNLOCK && !client.locks.holds(inode.file, what.flock, what.owner) {
        return Ok(());
    }
    inode.locked.store(true, Ordering::Relaxed);
    let op = Op::Setlk(proto::SetLock {
        file: Some(inode.file.into()),
        owner: what.owner,
        lock: Some(lock),
        wait: what.wait,
        flock: what.flock,
        reclaim: false,
    });
    let timeout = if what.wait { WAIT_MAX } else { client.op_timeout };
    client.chan.call_with(caller, op, None, timeout)?;
    client.locks.granted(inode.file, what.flock, what.owner, lock);
    Ok(())
}

fn get(
    client: &VolumeClient,
    caller: Caller,
    inode: &Inode,
    owner: u64,
    lock: proto::Lock,
) -> Result<Vec<u8>, Errno> {
    let op = Op::Getlk(proto::GetLock { file: Some(inode.file.into()), owner, lock: Some(lock) });
    let reply = client.chan.call(caller, op)?;
    let found = match reply.body {
        Some(Body::Lock(found)) => found,
        Some(_) | None => proto::Lock { r#type: UNLOCK, ..lock },
    };
    Ok(abi::lk_out(found.start, found.end, found.r#type, found.pid).to_vec())
}

/// A descriptor was closed: its owner's locks on the file go away (close(2), fcntl(2)).
pub(crate) fn release(client: &VolumeClient, caller: Caller, inode: &Inode, owner: u64, flock: bool) {
    if !inode.locked.load(Ordering::Relaxed) || !client.locks.holds(inode.file, flock, owner) {
        return;
    }
    let all = proto::Lock { start: 0, end: u64::MAX >> 1, r#type: UNLOCK, pid: caller.pid };
    let what = SetWhat { owner, flock, wait: false };
    // Not interruptible: the process may be dying of the very signal.
    let who = Caller { request: 0, ..caller };
    for _ in 0..RELEASE_TRIES {
        match set(client, who, inode, what, all) {
            Ok(()) | Err(Errno::SHUTDOWN) => return,
            Err(error) => {
                tracing::warn!(%error, file = %inode.file, "locks of a closed file are not released yet");
            }
        }
    }
    // Nobody holds them on this node any more: a new coordinator must not be told of them.
    client.locks.granted(inode.file, flock, owner, all);
}

/// The last descriptor of an open file was closed. Its OFD locks end with it, and the kernel does not name their owner
/// in any request; so what was locked through this open file and not released since is released here. (POSIX locks
/// went when the process closed its descriptor.)
pub(crate) fn release_handle(client: &VolumeClient, caller: Caller, inode: &Inode, handle: u64) {
    for owner in client.locks.owners_through(handle, inode.file) {
        release(client, caller, inode, owner, false);
    }
}
