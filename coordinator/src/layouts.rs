//! Driver of the layout table: feeds it, carries out its effects, and gives guards and gets a life that ends by
//! itself. See docs/architecture.md, "Layout rules".
//!
//! Order of locks, each wait only for one further right: guards (of files in ascending order), then file locks,
//! then the core lock. Nobody waits for a guard while holding a file lock.

use crate::block::NOBODY;
use crate::coordinator::Coordinator;
use crate::session::revoked;
use crate::state::{CallRef, Core, PendingGet, Waits};
use csv_layout::table::{Effect, Input, RequestId};
use csv_layout::{Access, Extent};
use csv_proto::{LayoutExtent, LayoutGrant, LayoutReturn, Recall, Reply, reply, server_message};
use csv_types::{ByteRange, FileId, NodeId};
use rustix::io::Errno;
use std::sync::{Arc, Weak};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, oneshot};

/// A range that is the coordinator's own while this lives.
#[derive(Debug)]
pub(crate) struct Guard {
    coordinator: Weak<Coordinator>,
    request: RequestId,
    file: FileId,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(coordinator) = self.coordinator.upgrade() {
            let core = &mut *coordinator.core.lock();
            core.guards.remove(&self.request);
            coordinator.step(core, Input::Release { request: self.request });
            if core.files.get(&self.file).is_some_and(|state| state.unlinked) {
                coordinator.look_after(core, self.file);
            }
        }
    }
}

/// A get between `Map` and its grant. Dropped without [`Coordinator::grant`], it ends without a grant.
#[derive(Debug)]
pub(crate) struct Get {
    coordinator: Weak<Coordinator>,
    pub(crate) request: RequestId,
    file: FileId,
    writer: Option<NodeId>,
    /// What may be granted at most.
    pub(crate) limit: ByteRange,
    answered: bool,
}

impl Drop for Get {
    fn drop(&mut self) {
        if let Some(coordinator) = self.coordinator.upgrade() {
            let core = &mut *coordinator.core.lock();
            let state = core.file(self.file);
            state.mapping = state.mapping.saturating_sub(1);
            if let Some(at) = state.write_gets.iter().position(|node| Some(*node) == self.writer) {
                state.write_gets.swap_remove(at);
            }
            if !self.answered {
                core.gets.remove(&self.request);
                coordinator.step(core, Input::MapFailed { request: self.request });
            }
            core.tidy(self.file);
        }
    }
}

/// A file's lock, held; the file's state is tidied up behind it.
#[derive(Debug)]
pub(crate) struct Locked<G> {
    held: Option<G>,
    coordinator: Weak<Coordinator>,
    file: FileId,
}

pub(crate) type Exclusive = Locked<OwnedRwLockWriteGuard<()>>;
pub(crate) type Shared = Locked<OwnedRwLockReadGuard<()>>;

impl<G> Drop for Locked<G> {
    fn drop(&mut self) {
        drop(self.held.take());
        if let Some(coordinator) = self.coordinator.upgrade() {
            coordinator.core.lock().tidy(self.file);
        }
    }
}

impl Coordinator {
    /// Feeds the table and does what it says.
    pub(crate) fn step(&self, core: &mut Core, input: Input) {
        let mut effects = Vec::new();
        core.table.step(self.now(), input, &mut effects);
        for effect in effects {
            self.effect(core, effect);
        }
    }

    fn effect(&self, core: &mut Core, effect: Effect) {
        match effect {
            Effect::Map { request, limit } => {
                let map = core.gets.get_mut(&request).and_then(|get| get.map.take());
                if map.is_none_or(|map| map.send(limit).is_err()) {
                    self.spawn(|co| async move {
                        co.step(&mut co.core.lock(), Input::MapFailed { request });
                    });
                }
            }
            Effect::Granted { request, node, file, range, access, seq } => {
                self.granted(core, request, node, file, range, access, seq);
            }
            Effect::GetEnded { request } => {
                // One that was mapped already is removed by `grant`, which so learns that it was not granted.
                if core.gets.get(&request).is_some_and(|get| get.plan.is_none()) {
                    core.gets.remove(&request);
                }
            }
            Effect::Held { request } => {
                if let Some(held) = core.guards.remove(&request) {
                    // Whoever waited may have given up; then its Release is on the way.
                    let _sent = held.send(());
                }
            }
            Effect::Recall { node, file, range, up_to_seq, recall_id, keep_read } => {
                let recall = Recall {
                    recall_id,
                    file: Some(file.into()),
                    offset: range.start,
                    end: range.end,
                    up_to_seq,
                    keep_read,
                };
                core.send(node, server_message::Body::Recall(recall));
            }
            Effect::Fence { node, file } => {
                let why =
                    format!("it did not return a layout of file {file} within {} ms", self.options.recall_ms);
                // Not from here: giving up can step the table.
                self.spawn(|co| async move { co.give_up(node, &why) });
            }
            Effect::ReclaimRefused { node, file } => {
                let why = format!("its reclaim of file {file} contradicts what another node holds");
                core.send(node, revoked(&why));
                self.spawn(|co| async move { co.give_up(node, &why) });
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one effect")]
    fn granted(
        &self,
        core: &mut Core,
        request: RequestId,
        node: NodeId,
        file: FileId,
        range: ByteRange,
        access: Access,
        seq: u64,
    ) {
        let Some(get) = core.gets.remove(&request) else { return };
        let Some(plan) = get.plan else { return };
        if let Some(eof) = plan.eof {
            let state = core.file(file);
            // A right that is given anew stands where it stood: what was exclusive stays so.
            let start = state.eof.map_or(eof.start, |old| old.start.min(eof.start));
            state.eof = Some(crate::state::Eof { start, ..eof });
            state.settle = false;
        }
        if let Some(session) = core.session(node, get.call.session) {
            session.pieces.granted(file, range, seq, &plan.extents);
        }
        let grant = LayoutGrant {
            seq,
            offset: range.start,
            end: range.end,
            access: wire_access(access),
            eof: plan.eof.is_some(),
            size: plan.size,
            alloc_end: plan.eof.map_or(0, |eof| eof.alloc_end),
            extents: plan.extents.iter().map(wire_extent).collect(),
        };
        let reply = Reply { id: get.call.id, body: Some(reply::Body::Grant(grant)), ..Reply::default() };
        self.reply(core, get.call, reply);
    }

    /// Waits until a range of a file is the coordinator's own: everything lent in it is back (except what
    /// `except` and `keep_read` leave), and no block I/O is under way there.
    ///
    /// # Errors
    /// ESHUTDOWN when the coordinator ends.
    pub(crate) async fn guard(
        &self,
        file: FileId,
        range: ByteRange,
        except: Option<NodeId>,
        keep_read: bool,
    ) -> Result<Guard, Errno> {
        let (guard, held) = {
            let core = &mut *self.core.lock();
            if core.stopped {
                return Err(Errno::SHUTDOWN);
            }
            let request = RequestId(core.number());
            let (tx, held) = oneshot::channel();
            core.guards.insert(request, tx);
            self.step(core, Input::Guard { request, file, range, except, keep_read });
            (Guard { coordinator: self.me.clone(), request, file }, held)
        };
        held.await.map_err(|_| Errno::SHUTDOWN)?;
        self.block_idle(file, range, except.unwrap_or(NOBODY)).await;
        Ok(guard)
    }

    /// Puts a get in and waits until it may be mapped.
    ///
    /// # Errors
    /// EINTR when it was cancelled, ESTALE when its session is over, EAGAIN when the table did not take it or the node is being fenced.
    pub(crate) async fn get(
        &self,
        call: CallRef,
        file: FileId,
        range: ByteRange,
        access: Access,
    ) -> Result<Get, Errno> {
        let (request, map) = {
            let core = &mut *self.core.lock();
            if core.stopped {
                return Err(Errno::SHUTDOWN);
            }
            if core.session(call.node, call.session).is_none() {
                // A get after the session's end would be ended by nobody.
                return Err(Errno::STALE);
            }
            let request = RequestId(core.number());
            if !core.waits_for(call, Waits::Get(request)) {
                return Err(Errno::INTR);
            }
            let (tx, map) = oneshot::channel();
            core.gets.insert(request, PendingGet { call, map: Some(tx), plan: None });
            self.step(core, Input::Get { request, node: call.node, file, range, access });
            (request, map)
        };
        let limit = map.await;
        let core = &mut *self.core.lock();
        let Ok(limit) = limit else {
            let waits = core.session(call.node, call.session).and_then(|s| s.running.get(&call.id));
            return Err(if waits == Some(&Waits::Cancelled) { Errno::INTR } else { Errno::AGAIN });
        };
        let state = core.file(file);
        state.mapping += 1;
        let writer = (access != Access::Read).then_some(call.node);
        state.write_gets.extend(writer);
        Ok(Get { coordinator: self.me.clone(), request, file, writer, limit, answered: false })
    }

    /// A get is over with a plan; the reply leaves from the table's answer, so that no recall of the grant can
    /// overtake it. False when the table did not grant it after all.
    pub(crate) fn grant(&self, mut get: Get, range: ByteRange, plan: crate::state::Plan) -> bool {
        let core = &mut *self.core.lock();
        let Some(pending) = core.gets.get_mut(&get.request) else {
            // Cancelled or its node gone: the table waits for the end of the mapping only.
            get.answered = true;
            self.step(core, Input::MapFailed { request: get.request });
            self.unmap(core, &mut get);
            return false;
        };
        pending.plan = Some(plan);
        get.answered = true;
        self.step(core, Input::Mapped { request: get.request, range });
        let granted = core.gets.remove(&get.request).is_none();
        self.unmap(core, &mut get);
        granted
    }

    /// What `Get`'s drop does, with the core locked already.
    fn unmap(&self, core: &mut Core, get: &mut Get) {
        get.coordinator = Weak::new();
        let state = core.file(get.file);
        state.mapping = state.mapping.saturating_sub(1);
        if let Some(at) = state.write_gets.iter().position(|node| Some(*node) == get.writer) {
            state.write_gets.swap_remove(at);
        }
        core.tidy(get.file);
    }

    /// A node gave a range back. In order with everything else of its session.
    pub(crate) fn returned(&self, core: &mut Core, node: NodeId, message: LayoutReturn) {
        let Ok(file) = csv_proto::file_id(message.file) else { return };
        let Ok(range) = csv_proto::byte_range(message.offset, message.end) else { return };
        self.note_commit(core, node, file, message.size, message.mtime);
        // An odd number answers a recall that let the read right stay; what may be read is asked of the table.
        let keeps_read = message.recall_id % 2 == 1;
        if let Some(session) = core.sessions.get_mut(&node).filter(|_| !keeps_read) {
            session.pieces.removed(file, range, message.up_to_seq);
        }
        let (up_to_seq, recall_id) = (message.up_to_seq, message.recall_id);
        self.step(core, Input::Returned { node, file, range, up_to_seq, recall_id });
        self.look_after(core, file);
    }

    /// Waits for the file's lock alone.
    pub(crate) async fn exclusive(&self, file: FileId) -> Exclusive {
        let held = Some(self.lock_of(file).write_owned().await);
        Locked { held, coordinator: self.me.clone(), file }
    }

    /// Waits for the file's lock together with others.
    pub(crate) async fn shared(&self, file: FileId) -> Shared {
        let held = Some(self.lock_of(file).read_owned().await);
        Locked { held, coordinator: self.me.clone(), file }
    }

    fn lock_of(&self, file: FileId) -> Arc<RwLock<()>> {
        Arc::clone(&self.core.lock().file(file).lock)
    }
}

pub(crate) fn wire_access(access: Access) -> i32 {
    let wire = match access {
        Access::Read => csv_proto::Access::Read,
        Access::Write => csv_proto::Access::Write,
        Access::Exclusive => csv_proto::Access::Exclusive,
    };
    wire.into()
}

pub(crate) fn access_of(wire: i32) -> Result<Access, csv_proto::Malformed> {
    match csv_proto::Access::try_from(wire) {
        Ok(csv_proto::Access::Read) => Ok(Access::Read),
        Ok(csv_proto::Access::Write) => Ok(Access::Write),
        Ok(csv_proto::Access::Exclusive) => Ok(Access::Exclusive),
        Err(_) => Err(csv_proto::Malformed("access")),
    }
}

pub(crate) fn wire_extent(extent: &Extent) -> LayoutExtent {
    LayoutExtent {
        file_offset: extent.file_offset,
        len: extent.len,
        zeros: extent.lun_offset.is_none(),
        lun_offset: extent.lun_offset.map_or(0, |place| place.0),
    }
}
