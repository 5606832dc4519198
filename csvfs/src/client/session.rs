//! What the coordinator sends: replies, recalls, queries, orders; and what happens when it changed.
//!
//! Everything here runs in the one thread that receives, so nothing here waits. The reclaim after a change of
//! coordinator makes calls and therefore runs in a thread of its own; if its link breaks meanwhile it ends and the
//! next Welcome starts another.
//!
//! After a Welcome:
//! * `resumed`: the coordinator knows this session. Nothing was lost but messages: calls are sent again under
//!   their ids, recalls come again from the coordinator.
//! * not resumed, `grace`: a new coordinator. Opens, locks and layouts are reclaimed; layouts only if this node's
//!   lease never ran out, because only then is it certain that nobody else was given them.
//! * not resumed, no grace: this node's session was expired. Its layouts and locks are gone; opens are made again.

use super::VolumeClient;
use super::channel::Link;
use super::{SessionFacts, now_ms};
use csv_proto as proto;
use csv_types::admin::VolumeState;
use csv_types::{ByteRange, Epoch};
use proto::call::Op;
use proto::client_message::Body as Out;
use proto::server_message::Body as In;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl VolumeClient {
    /// A link is up and the coordinator has accepted the Hello that was sent at `hello_ms`.
    pub(crate) fn welcomed(
        self: &Arc<Self>,
        link: Arc<dyn Link>,
        welcome: &proto::Welcome,
        hello_ms: u64,
    ) -> Result<(), proto::Malformed> {
        let root = proto::file_id(welcome.root)?;
        let lease_was_alive = self.lease_alive();
        self.inodes.set_root(root);
        *self.facts.write() =
            SessionFacts { smb_token: String::from_utf8_lossy(&welcome.smb_token).into_owned() };
        self.set_lease_ms(welcome.lease_ms);
        if let Some(order) = &welcome.order {
            self.modes.ordered(order.fs_redirected, order.maintenance);
        }
        let epoch = Epoch(welcome.epoch);
        let first = self.chan.epoch() == Epoch::default();
        self.chan.linked(link, epoch);
        if welcome.unsynced_lost {
            self.unsynced_lost(epoch);
        }
        if welcome.resumed && !self.reclaiming.load(Ordering::Acquire) {
            self.renew_lease(hello_ms);
            self.chan.open(true);
            self.events.report("session-resumed", format!("session resumed in epoch {epoch}"));
            return Ok(());
        }
        // A session that is resumed in the middle of its reclaim has to begin that again: what the coordinator was
        // not told yet it would give to others.
        self.meta.clear();
        let keep_layouts = (welcome.grace || welcome.resumed) && lease_was_alive;
        self.reclaiming.store(true, Ordering::Release);
        if !keep_layouts {
            self.drop_layouts();
        }
        self.renew_lease(hello_ms);
        if !first {
            let what = if keep_layouts { "layouts are reclaimed" } else { "layouts are gone" };
            self.events.report("session-new", format!("new session in epoch {epoch}; {what}"));
        }
        let client = self.clone();
        let thread = std::thread::Builder::new().name("reclaim".into());
        if let Err(error) = thread.spawn(move || client.reclaim(keep_layouts)) {
            tracing::error!(%error, "cannot start the reclaim thread");
        }
        Ok(())
    }

    fn reclaim(self: &Arc<Self>, layouts: bool) {
        match self.reclaim_all(layouts) {
            Ok(()) => {
                self.reclaiming.store(false, Ordering::Release);
                self.chan.post(Out::ReclaimDone(proto::ReclaimDone {}));
                self.chan.open(false);
            }
            Err(error) => tracing::warn!(%error, "the reclaim ends early; the next session starts it again"),
        }
    }

    fn reclaim_all(self: &Arc<Self>, layouts: bool) -> Result<(), Errno> {
        let handles: Vec<_> = self.handles.lock().iter().map(|(id, open)| (*id, *open)).collect();
        for (handle, open) in handles {
            // Creation and truncation have happened.
            let flags = open.flags & !(libc_flags::CREAT | libc_flags::EXCL | libc_flags::TRUNC);
            let op = proto::Open { file: Some(open.file.into()), flags, handle, reclaim: true };
            if let Err(error) = self.gone_is_fine(self.chan.call_reclaim(Op::Open(op)))? {
                let text = format!("an open file ({}) could not be reclaimed: {error}", open.file);
                self.events.report("reclaim-refused", text);
            }
        }
        for lock in self.locks.replay() {
            if let Err(error) = self.gone_is_fine(self.chan.call_reclaim(Op::Setlk(lock)))? {
                let text = format!("a lock of owner {:x} was lost to another node: {error}", lock.owner);
                self.events.report("lock-lost", text);
            }
        }
        if layouts {
            self.reclaim_layouts()?;
        }
        Ok(())
    }

    fn reclaim_layouts(self: &Arc<Self>) -> Result<(), Errno> {
        for inode in self.inodes.all() {
            let grants = {
                let mut io = inode.io.lock();
                io.cache.forget_recalls();
                io.held_grants()
            };
            if grants.is_empty() {
                continue;
            }
            let op = proto::LayoutReclaim { file: Some(inode.file.into()), grants };
            if let Err(error) = self.gone_is_fine(self.chan.call_reclaim(Op::LayoutReclaim(op)))? {
                let text = format!("the layout of {} could not be reclaimed: {error}", inode.file);
                self.events.report("reclaim-refused", text);
                self.drop_layout(&inode);
            }
        }
        Ok(())
    }

    /// A refusal concerns one object; a broken link ends the reclaim.
    fn gone_is_fine(&self, outcome: Result<proto::Reply, Errno>) -> Result<Result<(), Errno>, Errno> {
        match outcome {
            Ok(_) => Ok(Ok(())),
            Err(error @ (Errno::NOTCONN | Errno::SHUTDOWN)) => Err(error),
            Err(error) => Ok(Err(error)),
        }
    }

    fn drop_layout(&self, inode: &super::inode::Inode) {
        let mut returns = Vec::new();
        let mut io = inode.io.lock();
        if io.cache.eof().is_some_and(|eof| eof.dirty) {
            io.lost = true;
        }
        io.cache.invalidate_all(&mut returns);
    }

    /// Forgets every layout; in-flight I/O ends by itself.
    pub(crate) fn drop_layouts(&self) {
        for inode in self.inodes.all() {
            self.drop_layout(&inode);
        }
    }

    /// A message of the coordinator.
    pub(crate) fn received(self: &Arc<Self>, message: proto::ServerMessage) {
        let Some(body) = message.body else { return };
        let current = self.chan.epoch().0;
        if message.epoch != current {
            tracing::debug!(epoch = message.epoch, current, "message of another epoch is ignored");
            return;
        }
        match body {
            In::Reply(reply) => self.chan.replied(reply),
            In::Recall(recall) => self.recalled(&recall),
            In::CommitQuery(query) => self.answer_query(&query),
            In::Pong(pong) => self.renew_lease(pong.ping),
            In::Invalidate(invalidate) => {
                if let Ok(file) = proto::file_id(invalidate.file) {
                    self.meta.invalidate(file, invalidate.attr, invalidate.names);
                }
                self.chan.post(Out::InvalidateAck(proto::InvalidateAck { id: invalidate.id }));
            }
            In::ModeOrder(order) => {
                self.modes.ordered(order.fs_redirected, order.maintenance);
                self.report_status();
            }
            In::Revoked(revoked) => {
                self.end_lease();
                self.meta.clear();
                self.drop_layouts();
                self.events
                    .report("revoked", format!("the coordinator took everything back: {}", revoked.reason));
            }
            In::Welcome(_) => tracing::warn!("a second Welcome is ignored"),
        }
    }

    fn recalled(&self, recall: &proto::Recall) {
        let Ok(file) = proto::file_id(recall.file) else { return };
        let range = ByteRange::new(recall.offset, recall.end);
        let Some(inode) = self.inodes.by_file(file) else {
            self.chan.post(Out::LayoutReturn(proto::LayoutReturn {
                file: Some(file.into()),
                offset: range.start,
                end: range.end,
                up_to_seq: recall.up_to_seq,
                recall_id: recall.recall_id,
                size: None,
                mtime: None,
            }));
            return;
        };
        let mut returns = Vec::new();
        let mut io = inode.io.lock();
        io.cache.recalled(recall.recall_id, range, recall.up_to_seq, recall.keep_read, &mut returns);
        self.send_returns(file, &mut io, &returns);
        drop(io);
        self.pages_stale(&inode);
    }

    fn answer_query(&self, query: &proto::CommitQuery) {
        let mut answer =
            proto::CommitAnswer { query_id: query.query_id, file: query.file, size: None, mtime: None };
        if let Ok(file) = proto::file_id(query.file)
            && let Some(inode) = self.inodes.by_file(file)
        {
            let mut io = inode.io.lock();
            answer.size = io.cache.eof().map(|eof| eof.size);
            answer.mtime = io.wrote_at.take();
        }
        self.chan.post(Out::CommitAnswer(answer));
    }

    /// Tells the coordinator how this node is, and asks for a longer lease.
    pub(crate) fn report_status(&self) {
        let state_json = serde_json::to_string(&self.state()).unwrap_or_default();
        self.chan.post(Out::Status(proto::StatusReport { ping: now_ms(), state_json }));
    }

    /// This node's row of `csvctl volume state`.
    pub(crate) fn state(&self) -> VolumeState {
        let (mut mode, since_unix_s) = self.modes.current();
        if !self.chan.is_open() && !self.lease_alive() {
            mode.kind = csv_types::ModeKind::Paused;
            mode.reason = csv_types::Reason::CoordinatorUnreachable("no session".into());
        }
        VolumeState {
            node: self.node_name.clone(),
            volume: self.volume.clone(),
            role: if self.is_coordinator() { "coordinator" } else { "data-server" }.to_owned(),
            mode,
            since_unix_s,
            epoch: self.chan.epoch(),
            io: self.io_counts(),
        }
    }
}

/// Open flags as the protocol carries them (those of x86-64 and arm64 Linux alike).
mod libc_flags {
    pub(super) const CREAT: u32 = 0o100;
    pub(super) const EXCL: u32 = 0o200;
    pub(super) const TRUNC: u32 = 0o1000;
}
