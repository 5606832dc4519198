//! The metadata requests that programs make most, started by the pump itself: LOOKUP, GETATTR, OPEN, CREATE, FLUSH,
//! RELEASE and UNLINK.
//!
//! What is known under a lease is answered at once. Everything else becomes a call whose end answers the kernel in the
//! thread that received the reply: so a request costs the switches that the network needs, and none between threads
//! of this process. (By way of fuser's threads it was six more, at some 15 us each on a processor that sleeps; see
//! docs/decisions/007.)
//!
//! Nothing here blocks, because the pump carries the data path too. What has to wait goes to a pool: requests for
//! which there is no place among the calls, files of smbd's hidden directory, closing a file that has something to
//! commit or locks to release.

use super::abi::{self, AttrOut, CloseIn, CreateIn, InHeader};
use super::device::Device;
use super::hidden::{self, Hidden, HiddenAttr};
use super::locks;
use crate::client::attrs::{attr_of, holds_something};
use crate::client::channel::{Caller, NotStarted, OnDone, check};
use crate::client::inode::{Inode, ROOT};
use crate::client::meta::Known;
use crate::client::{OpenHandle, VolumeClient};
use crate::pool::Pool;
use csv_proto as proto;
use csv_types::FileId;
use proto::call::Op;
use proto::reply::Body;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const O_TRUNC: u32 = libc::O_TRUNC.cast_unsigned();

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Meta {
    device: Arc<Device>,
    client: Arc<VolumeClient>,
    hidden: Arc<Hidden>,
    pool: Pool,
    hidden_pool: Pool,
}

impl Meta {
    pub(crate) fn new(
        device: Arc<Device>,
        client: Arc<VolumeClient>,
        hidden: Arc<Hidden>,
        pool: Pool,
        hidden_pool: Pool,
    ) -> Meta {
        Meta { device, client, hidden, pool, hidden_pool }
    }

    /// Is this one of the requests that [`Meta::take`] takes?
    pub(crate) fn takes(opcode: u32) -> bool {
        matches!(
            opcode,
            abi::LOOKUP | abi::GETATTR | abi::OPEN | abi::CREATE | abi::FLUSH | abi::RELEASE | abi::UNLINK
        )
    }

    /// Answers a request or sees to it that it is answered. `body` is what stands behind its header.
    pub(crate) fn take(&self, header: &InHeader, body: &[u8]) {
        let done = match header.opcode {
            abi::LOOKUP => self.lookup(header, body),
            abi::GETATTR => self.getattr(header),
            abi::OPEN => self.open(header, body),
            abi::CREATE => self.create(header, body),
            abi::FLUSH => self.flush(header, body),
            abi::RELEASE => self.release(header, body),
            abi::UNLINK => self.unlink(header, body),
            _ => Err(Errno::NOSYS),
        };
        if let Err(errno) = done {
            self.device.error(header.unique, errno);
        }
    }

    /// Starts a call; `then` makes the reply to the kernel out of what comes of it.
    fn call(
        &self,
        caller: Caller,
        op: Op,
        then: impl FnOnce(&Meta, Result<proto::Reply, Errno>) -> Result<Vec<u8>, Errno> + Send + 'static,
    ) {
        let meta = self.clone();
        self.start(
            caller,
            op,
            Box::new(move |outcome| {
                let reply = then(&meta, outcome);
                meta.reply(caller.request, reply);
            }),
        );
    }

    fn start(&self, caller: Caller, op: Op, done: OnDone) {
        if let Err(refused) = self.client.chan.start(caller, op, done) {
            let NotStarted { op, done } = *refused;
            let client = self.client.clone();
            self.pool.run(move || client.chan.start_waiting(caller, op, done));
        }
    }

    fn reply(&self, unique: u64, reply: Result<Vec<u8>, Errno>) {
        match reply {
            Ok(bytes) => self.device.reply(unique, &bytes),
            Err(errno) => self.device.error(unique, errno),
        }
    }

    /// For what may block.
    fn in_pool(
        &self,
        pool: &Pool,
        unique: u64,
        work: impl FnOnce(&Meta) -> Result<Vec<u8>, Errno> + Send + 'static,
    ) {
        let meta = self.clone();
        pool.run(move || {
            let reply = work(&meta);
            meta.reply(unique, reply);
        });
    }

    fn inode(&self, nodeid: u64) -> Result<Arc<Inode>, Errno> {
        if Hidden::owns(nodeid) {
            return Err(Errno::PERM);
        }
        self.client.inodes.get(nodeid).ok_or(Errno::STALE)
    }

    /// A directory and a name in it.
    fn place<'a>(&self, header: &InHeader, name: Option<&'a [u8]>) -> Result<(FileId, &'a [u8]), Errno> {
        let name = name.ok_or(Errno::INVAL)?;
        if name.len() > proto::NAME_BYTES_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        Ok((self.inode(header.nodeid)?.file, name))
    }

    /// Takes a kernel reference to a file and shows it.
    fn enter(&self, attr: &proto::Attr) -> Result<(Arc<Inode>, AttrOut), Errno> {
        let (inode, attr) = self.client.enter(attr)?;
        let shown = shown(&inode, attr);
        Ok((inode, shown))
    }

    fn lookup(&self, header: &InHeader, body: &[u8]) -> Result<(), Errno> {
        let name = abi::name(body).ok_or(Errno::INVAL)?;
        if header.nodeid == ROOT && name == hidden::DIR_NAME {
            let out = self.hidden.directory().map(|attr| abi::entry_out(&hidden_out(attr)));
            self.reply(header.unique, out);
            return Ok(());
        }
        if header.nodeid == hidden::DIR {
            let name = name.to_vec();
            self.in_pool(&self.hidden_pool, header.unique, move |meta| {
                meta.hidden.lookup(&name).map(|attr| abi::entry_out(&hidden_out(attr)))
            });
            return Ok(());
        }
        let (dir, name) = self.place(header, Some(name))?;
        let known = &self.client.meta;
        if self.client.session_live() {
            match known.name(dir, name) {
                Some(Known::File(attr)) => {
                    let (_, shown) = self.enter(&attr)?;
                    self.device.reply(header.unique, &abi::entry_out(&shown));
                    return Ok(());
                }
                Some(Known::Absent) => return Err(Errno::NOENT),
                None => {}
            }
        }
        let asked = known.ask();
        let name = bytes::Bytes::copy_from_slice(name);
        let op = Op::Lookup(proto::Lookup { parent: Some(dir.into()), name: name.clone() });
        self.call(caller(header, 0), op, move |meta, outcome| {
            let reply = outcome?;
            let known = &meta.client.meta;
            if reply.lease && reply.errno == Errno::NOENT.raw_os_error() {
                known.learn_name(asked, dir, &name, None);
            }
            let attr = attr_of(&reply)?;
            let (inode, shown) = meta.enter(&attr)?;
            if reply.lease && !holds_something(&inode) {
                known.learn_name(asked, dir, &name, Some((inode.file, &attr)));
            }
            Ok(abi::entry_out(&shown))
        });
        Ok(())
    }

    fn getattr(&self, header: &InHeader) -> Result<(), Errno> {
        let nodeid = header.nodeid;
        if Hidden::owns(nodeid) {
            self.in_pool(&self.hidden_pool, header.unique, move |meta| {
                meta.hidden.attr(nodeid).map(|attr| abi::attr_out(&hidden_out(attr)))
            });
            return Ok(());
        }
        let inode = self.inode(nodeid)?;
        if let Some(attr) = self.client.known_attr(&inode) {
            self.device.reply(header.unique, &abi::attr_out(&shown(&inode, attr)));
            return Ok(());
        }
        let asked = self.client.meta.ask();
        let op = VolumeClient::getattr_op(&inode);
        self.call(caller(header, 0), op, move |meta, outcome| {
            let attr = meta.client.got_attr(&inode, asked, &outcome?)?;
            Ok(abi::attr_out(&shown(&inode, attr)))
        });
        Ok(())
    }

    fn open(&self, header: &InHeader, body: &[u8]) -> Result<(), Errno> {
        if Hidden::owns(header.nodeid) {
            self.device.reply(header.unique, &abi::open_out(0));
            return Ok(());
        }
        let inode = self.inode(header.nodeid)?;
        let flags = abi::open_flags(body).ok_or(Errno::INVAL)?;
        let handle = self.client.new_handle();
        let op = proto::Open { file: Some(inode.file.into()), flags, handle, reclaim: false };
        self.call(caller(header, 0), Op::Open(op), move |meta, outcome| {
            if flags & O_TRUNC != 0 {
                meta.client.meta.changed(&[inode.file], &[]);
            }
            if let Some(Body::Attr(attr)) = check(outcome?)?.body {
                meta.client.note(&inode, &attr);
            }
            meta.opened(&inode, handle, flags);
            Ok(abi::open_out(handle).to_vec())
        });
        Ok(())
    }

    fn opened(&self, inode: &Inode, handle: u64, flags: u32) {
        self.client.handles.lock().insert(handle, OpenHandle { file: inode.file, flags });
    }

    fn create(&self, header: &InHeader, body: &[u8]) -> Result<(), Errno> {
        let (CreateIn { flags, mode, umask }, name) = CreateIn::parse(body).ok_or(Errno::INVAL)?;
        let (dir, name) = self.place(header, abi::name(name))?;
        let handle = self.client.new_handle();
        let name = bytes::Bytes::copy_from_slice(name);
        let op = proto::Create { parent: Some(dir.into()), name: name.clone(), mode, flags, handle };
        let asked = self.client.meta.ask();
        self.call(caller(header, umask), Op::Create(op), move |meta, outcome| {
            let reply = outcome.as_ref().ok();
            let found = reply.and_then(|reply| attr_of(reply).ok());
            let file = found.and_then(|attr| Some((proto::file_id(attr.file).ok()?, attr)));
            // What is held of a file that was there before is newer than any attributes.
            let held = file
                .and_then(|(file, _)| meta.client.inodes.by_file(file))
                .is_some_and(|inode| holds_something(&inode));
            let kept = reply.filter(|_| !held);
            meta.client.meta.named(asked, dir, &name, kept, file.as_ref().map(|(file, attr)| (*file, attr)));
            let (inode, shown) = meta.enter(&attr_of(&outcome?)?)?;
            meta.opened(&inode, handle, flags);
            Ok([&abi::entry_out(&shown)[..], &abi::open_out(handle)].concat())
        });
        Ok(())
    }

    fn unlink(&self, header: &InHeader, body: &[u8]) -> Result<(), Errno> {
        let (dir, name) = self.place(header, abi::name(body))?;
        let name = bytes::Bytes::copy_from_slice(name);
        let op = Op::Unlink(proto::Unlink { parent: Some(dir.into()), name: name.clone() });
        let asked = self.client.meta.ask();
        self.call(caller(header, 0), op, move |meta, outcome| {
            meta.client.meta.named(asked, dir, &name, outcome.as_ref().ok(), None);
            check(outcome?).map(|_| Vec::new())
        });
        Ok(())
    }

    /// close(2): commits, and releases the owner's POSIX locks.
    fn flush(&self, header: &InHeader, body: &[u8]) -> Result<(), Errno> {
        let CloseIn { owner, .. } = CloseIn::parse(body).ok_or(Errno::INVAL)?;
        if Hidden::owns(header.nodeid) {
            self.device.reply(header.unique, &[]);
            return Ok(());
        }
        let inode = self.inode(header.nodeid)?;
        if !inode.locked.load(Ordering::Relaxed) && !self.client.has_uncommitted(&inode) {
            self.device.reply(header.unique, &[]);
            return Ok(());
        }
        let who = caller(header, 0);
        self.in_pool(&self.pool, header.unique, move |meta| {
            let committed = meta.client.flush(who, &inode);
            locks::release(&meta.client, who, &inode, owner, false);
            committed.map(|()| Vec::new())
        });
        Ok(())
    }

    /// The last descriptor of an open file is closed. Nobody waits for the reply.
    fn release(&self, header: &InHeader, body: &[u8]) -> Result<(), Errno> {
        let CloseIn { handle, flags, owner } = CloseIn::parse(body).ok_or(Errno::INVAL)?;
        let inode = self.inode(header.nodeid).ok().filter(|inode| inode.locked.load(Ordering::Relaxed));
        let Some(inode) = inode else {
            self.close(handle);
            self.device.reply(header.unique, &[]);
            return Ok(());
        };
        let who = caller(header, 0);
        self.in_pool(&self.pool, header.unique, move |meta| {
            if flags & abi::RELEASE_FLOCK_UNLOCK != 0 {
                locks::release(&meta.client, who, &inode, owner, true);
            }
            locks::release_handle(&meta.client, who, &inode, handle);
            meta.close(handle);
            Ok(Vec::new())
        });
        Ok(())
    }

    fn close(&self, handle: u64) {
        let Some(open) = self.client.handles.lock().remove(&handle) else { return };
        // Before the close: an orphan's last close frees it.
        if let Some(inode) = self.client.inodes.by_file(open.file) {
            self.client.closed(&inode);
        }
        let op = Op::Close(proto::Close { handle, file: Some(open.file.into()) });
        self.start(
            Caller::default(),
            op,
            Box::new(|outcome| {
                if let Err(error) = outcome.and_then(check) {
                    tracing::debug!(%error, "close");
                }
            }),
        );
    }
}

fn caller(header: &InHeader, umask: u32) -> Caller {
    Caller { request: header.unique, uid: header.uid, gid: header.gid, pid: header.pid, umask, bound: false }
}

fn shown(inode: &Inode, attr: proto::Attr) -> AttrOut {
    AttrOut { ino: inode.file.ino, generation: inode.file.generation, attr }
}

fn hidden_out(hidden: HiddenAttr) -> AttrOut {
    const DIR_MODE: u32 = 0o040_700;
    const FILE_MODE: u32 = 0o100_600;
    let attr = proto::Attr {
        mode: if hidden.directory { DIR_MODE } else { FILE_MODE },
        nlink: 1,
        size: hidden.size,
        blocks: hidden.size / 512,
        blksize: 4096,
        ..proto::Attr::default()
    };
    AttrOut { ino: hidden.nodeid, generation: 0, attr }
}
