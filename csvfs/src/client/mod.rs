//! The volume client: what this node knows and holds of a volume, and how its data moves.
//!
//! * [`attrs`], [`meta`]: attributes and names, and what of them may be kept.
//! * [`channel`]: calls to the coordinator, across reconnects.
//! * [`session`]: what the coordinator says without being asked (recalls, queries, orders), and reclaim after it
//!   changed.
//! * [`inode`]: the kernel's inodes and what is held of each file's layout.
//! * [`data`]: reads and writes that the hot path could not answer at once.
//! * [`modes`]: direct, block-redirected, fs-redirected, paused; why, and since when.
//! * [`held_locks`]: locks taken through this node, so that they can be reclaimed.
//!
//! Safety rules 1 and 6: nothing goes to the LUN unless a layout is held *and* the lease is alive
//! ([`VolumeClient::lease_alive`]); the lease ends before the coordinator may presume this node dead.

pub(crate) mod attrs;
pub(crate) mod channel;
pub(crate) mod data;
pub(crate) mod held_locks;
pub(crate) mod inode;
pub(crate) mod meta;
pub(crate) mod modes;
pub(crate) mod session;

use crate::events::Events;
use channel::Channel;
use csv_lun::BufPool;
use csv_proto as proto;
use csv_proto::client_message::Body as Out;
use csv_smb::pool::SmbPool;
use csv_types::admin::IoCounts;
use csv_types::{FileId, NodeId};
use held_locks::HeldLocks;
use inode::InodeTable;
use modes::Modes;
use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

/// What the client reports about itself besides its mode.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) direct_reads: AtomicU64,
    pub(crate) direct_writes: AtomicU64,
    pub(crate) direct_read_bytes: AtomicU64,
    pub(crate) direct_write_bytes: AtomicU64,
    pub(crate) block_reads: AtomicU64,
    pub(crate) block_writes: AtomicU64,
    pub(crate) fs_reads: AtomicU64,
    pub(crate) fs_writes: AtomicU64,
    pub(crate) control_reads: AtomicU64,
    pub(crate) control_writes: AtomicU64,
    pub(crate) control_bytes: AtomicU64,
    pub(crate) layouts_granted: AtomicU64,
    pub(crate) layouts_recalled: AtomicU64,
}

/// Adds to a counter.
pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// A file open on this node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpenHandle {
    pub(crate) file: FileId,
    pub(crate) flags: u32,
}

/// A call that changes a file, while it is under way.
#[derive(Debug)]
pub(crate) struct Change {
    begun: u64,
    /// The epoch of the other node's coordinator that was asked, if it was another's.
    remote: Option<csv_types::Epoch>,
}

/// What a Welcome told.
#[derive(Debug, Clone, Default)]
pub(crate) struct SessionFacts {
    /// Secret part of this session's SMB paths.
    pub(crate) smb_token: String,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct VolumeClient {
    pub(crate) volume: String,
    pub(crate) node_name: String,
    pub(crate) node: NodeId,
    pub(crate) chan: Channel,
    pub(crate) inodes: InodeTable,
    pub(crate) modes: Arc<Modes>,
    pub(crate) counts: Counts,
    pub(crate) bufs: Arc<BufPool>,
    pub(crate) events: Arc<Events>,
    pub(crate) locks: HeldLocks,
    pub(crate) meta: meta::MetaCache,
    pub(crate) handles: Mutex<HashMap<u64, OpenHandle>>,
    pub(crate) facts: RwLock<SessionFacts>,
    pub(crate) smb: RwLock<Option<Arc<SmbPool>>>,
    /// This process owns the file system now: no SMB, no wire.
    is_coordinator: AtomicBool,
    /// The cluster engine forbids direct I/O: the node may be presumed dead.
    suspended: AtomicBool,
    /// The LUN has refused this node since the last [`VolumeClient::suspend`].
    refused: AtomicBool,
    pub(crate) op_timeout: Duration,
    /// Files whose pages the kernel should drop (mmap): a recall says that another node is about to change them.
    stale_pages: Mutex<Option<SyncSender<u64>>>,
    /// A reclaim has begun and is not finished.
    reclaiming: AtomicBool,
    next_handle: AtomicU64,
    /// Until then redirected I/O does not try SMB, in milliseconds of [`now_ms`].
    smb_hold_until_ms: AtomicU64,
    /// Monotonic milliseconds until which layouts may be used.
    lease_until_ms: AtomicU64,
    lease_ms: AtomicU64,
}

/// What a [`VolumeClient`] is made of.
#[derive(Debug)]
pub(crate) struct ClientOptions {
    pub(crate) volume: String,
    pub(crate) node_name: String,
    pub(crate) node: NodeId,
    pub(crate) op_timeout: Duration,
    pub(crate) events: Arc<Events>,
    pub(crate) modes: Modes,
}

/// Milliseconds of CLOCK_BOOTTIME, which goes on while the machine sleeps: a lease does not outlive a suspend.
pub(crate) fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let millis = u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000;
    seconds * 1000 + millis
}

impl VolumeClient {
    pub(crate) fn new(options: ClientOptions) -> VolumeClient {
        VolumeClient {
            volume: options.volume,
            node_name: options.node_name,
            node: options.node,
            chan: Channel::new(options.op_timeout),
            inodes: InodeTable::new(),
            modes: Arc::new(options.modes),
            counts: Counts::default(),
            bufs: BufPool::new(),
            events: options.events,
            locks: HeldLocks::default(),
            meta: meta::MetaCache::default(),
            handles: Mutex::new(HashMap::new()),
            facts: RwLock::new(SessionFacts::default()),
            smb: RwLock::new(None),
            is_coordinator: AtomicBool::new(false),
            suspended: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            op_timeout: options.op_timeout,
            stale_pages: Mutex::new(None),
            reclaiming: AtomicBool::new(false),
            next_handle: AtomicU64::new(1),
            smb_hold_until_ms: AtomicU64::new(0),
            lease_until_ms: AtomicU64::new(0),
            lease_ms: AtomicU64::new(0),
        }
    }

    /// May layouts be used now?
    pub(crate) fn lease_alive(&self) -> bool {
        now_ms() < self.lease_until_ms.load(Ordering::Acquire)
    }

    /// May cached metadata be used now?
    pub(crate) fn session_live(&self) -> bool {
        self.chan.is_open() && self.lease_alive()
    }

    /// The coordinator answered a message that was sent at `sent_ms`.
    pub(crate) fn renew_lease(&self, sent_ms: u64) {
        if self.suspended.load(Ordering::Acquire) {
            return;
        }
        let until = sent_ms + self.lease_ms.load(Ordering::Acquire);
        self.lease_until_ms.fetch_max(until, Ordering::AcqRel);
    }

    /// Everything is revoked, or the lease is known to be over.
    pub(crate) fn end_lease(&self) {
        self.lease_until_ms.store(0, Ordering::Release);
    }

    /// Does this node coordinate the volume?
    pub(crate) fn is_coordinator(&self) -> bool {
        self.is_coordinator.load(Ordering::Acquire)
    }

    /// This node begins or ends to coordinate the volume.
    pub(crate) fn set_coordinator(&self, on: bool) {
        self.is_coordinator.store(on, Ordering::Release);
        self.modes.set_coordinator(on);
    }

    /// No direct I/O is begun from now on, whatever a coordinator says, until [`VolumeClient::resume`].
    pub(crate) fn suspend(&self, why: String) {
        self.suspended.store(true, Ordering::Release);
        self.refused.store(false, Ordering::Release);
        self.end_lease();
        self.modes.stopped(Some(why));
    }

    /// Is nothing under way that [`VolumeClient::suspend`] came too late for?
    pub(crate) fn is_quiet(&self) -> bool {
        self.inodes.all().iter().all(|inode| inode.io.lock().cache.in_flight() == 0)
    }

    /// May this node do no direct I/O, by order?
    pub(crate) fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::Acquire)
    }

    /// The LUN refuses this node: it is fenced.
    pub(crate) fn refused_by_lun(&self, why: String) {
        self.refused.store(true, Ordering::Release);
        self.end_lease();
        self.modes.stopped(Some(why));
    }

    /// See [`VolumeClient::refused_by_lun`].
    pub(crate) fn is_refused_by_lun(&self) -> bool {
        self.refused.load(Ordering::Acquire)
    }

    /// Leases count again. What was held before is not used any more: the lease was over.
    pub(crate) fn resume(&self) {
        if self.suspended.swap(false, Ordering::AcqRel) {
            self.end_lease();
            self.drop_layouts();
            self.modes.stopped(None);
        }
    }

    pub(crate) fn set_lease_ms(&self, lease_ms: u64) {
        self.lease_ms.store(lease_ms, Ordering::Release);
    }

    /// Where files with stale pages are reported from now on.
    pub(crate) fn report_stale_pages(&self, to: SyncSender<u64>) {
        *self.stale_pages.lock() = Some(to);
    }

    /// Another node changes this file. Best effort: mapped pages are no part of the coherence promise.
    pub(crate) fn pages_stale(&self, inode: &inode::Inode) {
        if let Some(to) = &*self.stale_pages.lock() {
            let _ = to.try_send(inode.nodeid);
        }
    }

    /// A number for a new open file.
    pub(crate) fn new_handle(&self) -> u64 {
        self.next_handle.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends what a layout cache gives back; the caller holds the inode's lock, so that nothing overtakes it. A size
    /// that goes back with it is known to the coordinator, but not durable there.
    pub(crate) fn send_returns(
        &self,
        file: FileId,
        io: &mut inode::FileIo,
        returns: &[csv_layout::cache::Return],
    ) {
        for back in returns {
            if back.size_dirty {
                self.dirty_at_coordinator(io);
                io.size_left = true;
            }
            let mtime = io.wrote_at.take();
            self.send_return(file, back, mtime);
        }
    }

    /// fsync of the file has to go to the coordinator from now on.
    pub(crate) fn dirty_at_coordinator(&self, io: &mut inode::FileIo) {
        io.at_coordinator.made(self.chan.epoch());
    }

    /// A call is going to change the file; to be given to [`VolumeClient::change_answered`].
    pub(crate) fn change_begins(&self, io: &mut inode::FileIo) -> Change {
        self.dirty_at_coordinator(io);
        Change { begun: io.at_coordinator.begin(), remote: self.chan.remote_epoch() }
    }

    /// It succeeded. Another node's coordinator makes the whole file durable before it answers (`durable.rs` there).
    pub(crate) fn change_answered(&self, io: &mut inode::FileIo, change: &Change) {
        if change.remote.is_some() && change.remote == self.chan.remote_epoch() {
            io.at_coordinator.done(change.begun);
        }
    }

    fn send_return(&self, file: FileId, back: &csv_layout::cache::Return, mtime: Option<proto::Time>) {
        count(&self.counts.layouts_recalled, 1);
        self.meta.changed(&[file], &[]);
        self.chan.post(Out::LayoutReturn(proto::LayoutReturn {
            file: Some(file.into()),
            offset: back.range.start,
            end: back.range.end,
            up_to_seq: back.up_to_seq,
            recall_id: back.recall_id,
            size: back.size,
            mtime,
        }));
    }

    /// The kernel interrupts a FUSE request.
    pub(crate) fn interrupt(&self, request: u64) {
        self.chan.interrupt(request);
        self.modes.wake();
    }

    /// The SMB pool.
    pub(crate) fn smb_pool(&self) -> Result<Arc<SmbPool>, Errno> {
        self.smb.read().clone().ok_or(Errno::IO)
    }

    /// The kernel forgot an inode: what is held of its layout goes back.
    pub(crate) fn forgotten(&self, inode: &inode::Inode) {
        let mut returns = Vec::new();
        let mut io = inode.io.lock();
        io.cache.invalidate_all(&mut returns);
        self.send_returns(inode.file, &mut io, &returns);
    }

    /// I/O counts for `csvctl volume state`.
    pub(crate) fn io_counts(&self) -> IoCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &self.counts;
        let smb_bytes = self.smb.read().as_ref().map_or(0, |pool| pool.bytes_moved());
        IoCounts {
            direct_reads: get(&c.direct_reads),
            direct_writes: get(&c.direct_writes),
            direct_read_bytes: get(&c.direct_read_bytes),
            direct_write_bytes: get(&c.direct_write_bytes),
            block_reads: get(&c.block_reads),
            block_writes: get(&c.block_writes),
            fs_reads: get(&c.fs_reads),
            fs_writes: get(&c.fs_writes),
            control_reads: get(&c.control_reads),
            control_writes: get(&c.control_writes),
            control_bytes: get(&c.control_bytes),
            smb_bytes,
            control_calls: get(&self.chan.calls),
            layouts_granted: get(&c.layouts_granted),
            layouts_recalled: get(&c.layouts_recalled),
            open_files: self.handles.lock().len() as u64,
        }
    }
}

/// The time now as the protocol writes it.
pub(crate) fn proto_now() -> proto::Time {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    proto::Time { s: now.tv_sec, ns: u32::try_from(now.tv_nsec).unwrap_or(0) }
}
