//! The request pump: one thread that reads every FUSE request, answers the data path itself, and hands the rest on.
//!
//! For each READ or WRITE that a held layout allows, in direct mode, on one extent:
//! * while nothing else waits, the I/O is done in line (a blocking pread costs less than anything asynchronous);
//! * as soon as something else waits or is in flight, it goes to io_uring, and the reply goes out on completion.
//!
//! What smbd does with blocks of the LUN for another node goes the same way, if that node has the right now.
//!
//! Everything else: data that needs more thought goes to a pool of threads that may block; locks to a pool of
//! their own, since a blocking lock waits for as long as it likes; FORGET and INTERRUPT are done on the spot; all
//! other requests go to fuser over a socket pair. So nothing that waits for the coordinator ever stands in the way
//! of direct I/O.
//!
//! One outstanding invariant: a request has exactly one reply. It is owned by the pump (`Hot`), by a pool job, or
//! by fuser, never by two of them.

use super::abi;
use super::device::{Device, IO_BYTES_MAX};
use super::hidden::{Hidden, Target};
use super::hot::{Holds, Hot, caller, span};
use super::meta::Meta;
use super::redirect::Redirect;
use super::slow::{Slow, Sync, WriteWhat};
use crate::client::VolumeClient;
use crate::client::count;
use crate::client::inode::Inode;
use crate::pool::Pool;
use abi::{InHeader, IoIn, LkIn};
use csv_layout::cache::Segment;
use csv_lun::{AlignedBuf, Lun, LunError, Ring, RingIo};
use csv_types::{ByteRange, FS_BLOCK_BYTES, LunOffset};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use rustix::time::Timespec;
use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// I/Os in flight at once, at most.
const RING_ENTRIES: u32 = 256;
/// Requests taken before completions are looked at again.
const BATCH: usize = 64;
/// From this size on an I/O is submitted and answered by itself and not with its batch, in bytes: copying its data takes
/// as long as the LUN needs for it, and the LUN should have something to do meanwhile.
const LARGE_BYTES: usize = 128 << 10;

/// Up to this size the data of a write is copied once more, in bytes.
const COPIED_BYTES_MAX: usize = 16 << 10;

/// How often the pump looks after redirected I/O that may be too late.
const REPLIES_LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// How long the pump looks for the next request before it sleeps. Waking a sleeping processor costs about as much in
/// a virtual machine, so this is paid back at every queue depth (docs/decisions/004); a longer time is not.
const SPIN: Duration = Duration::from_micros(20);

/// What the pump works with; see the module.
#[derive(Debug)]
pub(crate) struct Pump {
    device: Arc<Device>,
    client: Arc<VolumeClient>,
    hidden: Arc<Hidden>,
    /// Our end of fuser's socket pair.
    fuser: Arc<OwnedFd>,
    io_pool: Pool,
    slow: Slow,
    redirect: Redirect,
    /// What smbd does for other nodes must never wait behind this node's own requests, which may wait for them.
    hidden_pool: Pool,
    lock_pool: Pool,
    meta: Meta,
    lun: Option<Arc<Lun>>,
    ring: Option<Ring>,
    jobs: Vec<Option<Hot>>,
    free_jobs: Vec<usize>,
    /// Finished, and not answered yet.
    done: VecDeque<RingIo>,
    segments: Vec<Segment>,
    /// The inode of the last request: most I/O comes in runs.
    last: Option<Arc<Inode>>,
    /// `InodeTable::replaced` when it was remembered.
    last_replaced: u64,
    deferred: Option<Hot>,
    /// The pump has just woken up from waiting: whatever comes first is most likely alone.
    woken: bool,
    /// An I/O of this node has just ended: the next request is near. When one has just been sent elsewhere, or was done
    /// for another node, it is other processes that have to run first.
    spins: bool,
}

impl Pump {
    pub(crate) fn new(
        device: Arc<Device>,
        client: Arc<VolumeClient>,
        hidden: Arc<Hidden>,
        fuser: Arc<OwnedFd>,
    ) -> Pump {
        let (io_pool, hidden_pool) = (Pool::new("csvfs-io", 128), Pool::new("csvfs-hidden", 128));
        let meta =
            Meta::new(device.clone(), client.clone(), hidden.clone(), io_pool.clone(), hidden_pool.clone());
        let slow = Slow { device: device.clone(), client: client.clone(), pool: io_pool.clone() };
        Pump {
            lun: client.modes.lun(),
            redirect: Redirect::new(slow.clone()),
            slow,
            device,
            client,
            hidden,
            fuser,
            io_pool,
            hidden_pool,
            meta,
            lock_pool: Pool::new("csvfs-lock", 1024),
            ring: None,
            jobs: (0..RING_ENTRIES).map(|_| None).collect(),
            free_jobs: (0..RING_ENTRIES as usize).rev().collect(),
            done: VecDeque::new(),
            segments: Vec::new(),
            last: None,
            last_replaced: 0,
            deferred: None,
            woken: false,
            spins: true,
        }
    }

    /// Runs until the connection is over.
    pub(crate) fn run(mut self) {
        if let Some(lun) = &self.lun {
            match Ring::new(lun.clone(), RING_ENTRIES) {
                Ok(ring) => self.ring = Some(ring),
                Err(error) => tracing::warn!(%error, "no io_uring: direct I/O is slower than it could be"),
            }
        }
        let mut head = [0; abi::WRITE_HEAD_BYTES];
        let mut payload = self.new_payload();
        let mut idle_since: Option<Instant> = None;
        loop {
            let (mut progress, mut drained) = (false, false);
            for _ in 0..BATCH {
                match self.device.receive(&mut head, &mut payload[..IO_BYTES_MAX]) {
                    Ok(size) => {
                        progress = true;
                        self.start_deferred_async();
                        self.request(&head, &mut payload, size);
                        if self.deferred.as_ref().is_some_and(|hot| hot.block_len >= LARGE_BYTES) {
                            self.start_deferred_async();
                            self.submit();
                            break;
                        }
                        // The first after a sleep is most likely alone, and asking first would cost as much as it
                        // saves; at a greater depth the next one is found right behind it.
                        if std::mem::take(&mut self.woken) && self.is_idle() {
                            self.start_deferred();
                        }
                    }
                    Err(Errno::AGAIN) => {
                        drained = true;
                        break;
                    }
                    // The request was taken back before we had it.
                    Err(Errno::INTR | Errno::NOENT) => {}
                    Err(error) => return self.over(error),
                }
            }
            if drained && self.is_idle() && self.start_deferred() {
                continue;
            }
            self.start_deferred_async();
            let received = self.redirect.receive();
            self.spins |= received;
            if self.complete() || received || !drained {
                continue;
            }
            if progress {
                idle_since = None;
            }
            let since = *idle_since.get_or_insert_with(Instant::now);
            self.woken = self.is_idle();
            if self.spins && since.elapsed() < SPIN {
                continue;
            }
            self.sleep();
            idle_since = None;
        }
    }

    /// Is nothing in flight?
    fn is_idle(&self) -> bool {
        self.done.is_empty() && self.ring.as_ref().is_none_or(|ring| ring.in_flight() == 0)
    }

    fn over(&mut self, error: Errno) {
        if error != Errno::NODEV {
            tracing::error!(%error, "reading /dev/fuse failed; the mount ends");
        }
        self.start_deferred();
        while !self.is_idle() {
            if let Some(ring) = self.ring.as_mut().filter(|_| self.done.is_empty()) {
                let _ = ring.wait();
            }
            self.complete();
        }
    }

    fn new_payload(&self) -> AlignedBuf {
        self.client.bufs.take(IO_BYTES_MAX)
    }

    /// What was received, to be kept: little data is copied, so that the place to receive stays in the cache.
    fn payload_of(&self, payload: &mut AlignedBuf, len: usize) -> AlignedBuf {
        if len > COPIED_BYTES_MAX {
            return std::mem::replace(payload, self.new_payload());
        }
        let mut buf = self.client.bufs.take(len);
        buf.copy_from_slice(&payload[..len]);
        buf
    }

    fn sleep(&self) {
        let mut fds = vec![PollFd::new(&self.device, PollFlags::IN)];
        if let Some(ring) = self.ring.as_ref().filter(|ring| ring.in_flight() > 0) {
            fds.push(PollFd::from_borrowed_fd(ring.as_fd(), PollFlags::IN));
        }
        let mut timeout = None;
        if let Some(replies) = self.redirect.waits_for() {
            fds.push(PollFd::from_borrowed_fd(replies.as_fd(), PollFlags::IN));
            timeout = Some(&REPLIES_LOOK);
        }
        // Whatever woke us up, the loop looks at everything.
        let _ = poll(&mut fds, timeout);
    }

    fn request(&mut self, head: &[u8], payload: &mut AlignedBuf, size: usize) {
        let Some(header) = InHeader::parse(head) else { return };
        let body = &head[abi::IN_HEADER_BYTES..];
        match header.opcode {
            abi::READ => match IoIn::parse(body) {
                Some(io) => self.read(&header, io),
                None => self.device.error(header.unique, Errno::INVAL),
            },
            abi::WRITE => match IoIn::parse(body) {
                Some(io) => self.write(&header, io, payload),
                None => self.device.error(header.unique, Errno::INVAL),
            },
            abi::GETLK | abi::SETLK | abi::SETLKW => {
                let mut whole = body.to_vec();
                whole.extend_from_slice(&payload[..size.saturating_sub(abi::WRITE_HEAD_BYTES)]);
                match LkIn::parse(&whole) {
                    Some(lock) => self.lock(&header, lock),
                    None => self.device.error(header.unique, Errno::INVAL),
                }
            }
            abi::INTERRUPT => {
                if let Some(victim) = abi::interrupted(body) {
                    self.client.interrupt(victim);
                }
            }
            abi::FORGET => {
                if let Some(references) = abi::forget_count(body) {
                    self.forget(header.nodeid, references);
                }
            }
            abi::BATCH_FORGET => {
                let mut whole = body.to_vec();
                whole.extend_from_slice(&payload[..size.saturating_sub(abi::WRITE_HEAD_BYTES)]);
                for (nodeid, references) in abi::batch_forget(&whole) {
                    self.forget(nodeid, references);
                }
            }
            opcode if Meta::takes(opcode) => {
                let mut whole = [0; abi::META_BODY_BYTES_MAX];
                let len = size.saturating_sub(abi::IN_HEADER_BYTES).min(whole.len());
                let in_head = len.min(body.len());
                whole[..in_head].copy_from_slice(&body[..in_head]);
                whole[in_head..len].copy_from_slice(&payload[..len - in_head]);
                self.meta.take(&header, &whole[..len]);
            }
            _ => self.hand_on(&header, head, payload, size),
        }
    }

    fn hand_on(&self, header: &InHeader, head: &[u8], payload: &AlignedBuf, size: usize) {
        let in_head = size.min(head.len());
        let parts = [IoSlice::new(&head[..in_head]), IoSlice::new(&payload[..size - in_head])];
        let sent = sendmsg(&self.fuser, &parts, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL);
        if let Err(error) = sent {
            tracing::error!(%error, opcode = header.opcode, "a request could not be handed on");
            self.device.error(header.unique, Errno::IO);
        }
    }

    fn forget(&mut self, nodeid: u64, references: u64) {
        if Hidden::owns(nodeid) {
            return self.hidden.forget(nodeid, references);
        }
        if let Some(inode) = self.client.inodes.forget(nodeid, references) {
            self.client.forgotten(&inode);
            if self.last.as_ref().is_some_and(|last| last.nodeid == nodeid) {
                self.last = None;
            }
        }
    }

    fn inode(&mut self, nodeid: u64) -> Option<Arc<Inode>> {
        let replaced = self.client.inodes.replaced();
        if let Some(last) = &self.last
            && last.nodeid == nodeid
            && self.last_replaced == replaced
        {
            return Some(last.clone());
        }
        self.last_replaced = replaced;
        let inode = self.client.inodes.get(nodeid)?;
        self.last = Some(inode.clone());
        Some(inode)
    }

    /// The LUN when data may go straight to it now.
    fn direct_lun(&self) -> Option<&Arc<Lun>> {
        if !self.client.modes.is_direct() || !self.client.lease_alive() {
            return None;
        }
        // With a fault injected the blocking way has to show it.
        self.lun.as_ref().filter(|lun| !lun.is_faulty())
    }

    fn read(&mut self, header: &InHeader, io: IoIn) {
        if Hidden::owns(header.nodeid) {
            let hot = match self.hidden.target(header.nodeid) {
                Ok(Target::File(inode, owner)) => {
                    self.hot_read(header, io, &inode).map(|hot| hot.for_other_by(owner))
                }
                Ok(Target::Blocks(token)) => self.hot_block_read(header, io, &token),
                Err(errno) => return self.device.error(header.unique, errno),
            };
            match hot {
                Some(hot) => self.deferred = Some(hot),
                None => self.hidden_read(header.unique, header.nodeid, io.offset, io.size as usize),
            }
            return;
        }
        let Some(inode) = self.inode(header.nodeid) else {
            return self.device.error(header.unique, Errno::STALE);
        };
        match self.hot_read(header, io, &inode) {
            Some(hot) => self.deferred = Some(hot),
            None => {
                let (caller, len) = (caller(header), io.size as usize);
                self.spins = false;
                if !self.redirect.read(caller, &inode, io.offset, len, &mut self.segments) {
                    self.slow.read(caller, inode, io.offset, len);
                }
            }
        }
    }

    fn hot_read(&mut self, header: &InHeader, io: IoIn, inode: &Arc<Inode>) -> Option<Hot> {
        let block = u64::from(self.direct_lun()?.logical_block_bytes());
        self.segments.clear();
        let range = ByteRange::at(io.offset, u64::from(io.size));
        let outcome = inode.io.lock().cache.begin_read(range, &mut self.segments);
        let token = self.client.plain_hit(inode, outcome)?;
        let placed = match self.segments.as_slice() {
            [segment] => segment.lun_offset.and_then(|place| span(place, segment.len, block)),
            // Several pieces, or a hole.
            _ => None,
        };
        let Some(span) = placed else {
            self.client.end_io(inode, token, false);
            return None;
        };
        let holds = Holds::Layout { inode: inode.clone(), token };
        Some(Hot::read(header, io, holds, span, self.client.bufs.take(span.1)))
    }

    fn write(&mut self, header: &InHeader, io: IoIn, payload: &mut AlignedBuf) {
        let len = io.size as usize;
        if len > IO_BYTES_MAX {
            return self.device.error(header.unique, Errno::INVAL);
        }
        if Hidden::owns(header.nodeid) {
            let range = ByteRange::at(io.offset, u64::from(io.size));
            let hot = match self.hidden.target(header.nodeid) {
                Ok(Target::File(inode, owner)) if inode.io.lock().overwrites(range, FS_BLOCK_BYTES) => {
                    self.hot_write(header, io, &inode).map(|hot| hot.for_other_by(owner))
                }
                Ok(Target::File(..)) => None,
                Ok(Target::Blocks(token)) => self.hot_block_write(header, io, &token),
                Err(errno) => return self.device.error(header.unique, errno),
            };
            let buf = self.payload_of(payload, len);
            match hot {
                Some(hot) => self.deferred = Some(Hot { buf, ..hot }),
                None => self.hidden_write(header.unique, header.nodeid, io.offset, len, buf),
            }
            return;
        }
        let Some(inode) = self.inode(header.nodeid) else {
            return self.device.error(header.unique, Errno::STALE);
        };
        let append = io.open_flags.cast_signed() & libc::O_APPEND != 0 && io.io_flags & abi::WRITE_CACHE == 0;
        let kill_setid = io.io_flags & abi::WRITE_KILL_SUIDGID != 0 && inode.setid.load(Ordering::Relaxed);
        let sync = Sync::of(io);
        if !append
            && !kill_setid
            && sync == Sync::No
            && let Some(mut hot) = self.hot_write(header, io, &inode)
        {
            hot.buf = self.payload_of(payload, len);
            self.deferred = Some(hot);
            return;
        }
        let buf = self.payload_of(payload, len);
        self.spins = false;
        let (caller, what) = (caller(header), WriteWhat { offset: io.offset, len, append, kill_setid, sync });
        if let Err(buf) = self.redirect.write(caller, &inode, buf, what, &mut self.segments) {
            self.slow.write(caller, inode, buf, what);
        }
    }

    fn hot_write(&mut self, header: &InHeader, io: IoIn, inode: &Arc<Inode>) -> Option<Hot> {
        self.direct_lun()?;
        self.segments.clear();
        let range = ByteRange::at(io.offset, u64::from(io.size));
        if !range.is_aligned(FS_BLOCK_BYTES) {
            return None;
        }
        let (outcome, ahead) = {
            let mut io = inode.io.lock();
            let outcome = io.cache.begin_write(range, FS_BLOCK_BYTES, &mut self.segments);
            (outcome, io.wants_ahead(range.end))
        };
        if let Some(from) = ahead {
            self.client.ask_ahead(inode, from);
        }
        let token = self.client.plain_hit(inode, outcome)?;
        let [Segment { lun_offset: Some(place), .. }] = self.segments.as_slice() else {
            self.client.end_io(inode, token, false);
            return None;
        };
        Some(Hot::write(header, io, Holds::Layout { inode: inode.clone(), token }, *place))
    }

    /// The deferred I/O is alone: in line. True when there was one.
    fn start_deferred(&mut self) -> bool {
        let Some(mut hot) = self.deferred.take() else { return false };
        let Some(lun) = self.lun.clone() else {
            self.push(hot);
            return true;
        };
        let result = if hot.write {
            lun.write_at(&hot.buf, hot.block_len, hot.place)
        } else {
            lun.read_at(&mut hot.buf, hot.block_len, hot.place)
        };
        self.finish(hot, result);
        true
    }

    /// Something else waits: the deferred I/O goes to io_uring.
    fn start_deferred_async(&mut self) {
        if let Some(hot) = self.deferred.take() {
            self.push(hot);
        }
    }

    fn push(&mut self, mut hot: Hot) {
        let (Some(ring), Some(slot)) = (&mut self.ring, self.free_jobs.pop()) else {
            return self.redo(hot);
        };
        let buf = std::mem::replace(&mut hot.buf, AlignedBuf::new(0));
        let pushed = match hot.write {
            true => ring.write(slot as u64, buf, hot.block_len, hot.place),
            false => ring.read(slot as u64, buf, hot.block_len, hot.place),
        };
        match pushed {
            Ok(()) => self.jobs[slot] = Some(hot),
            Err(refused) => {
                self.free_jobs.push(slot);
                hot.buf = refused.buf;
                tracing::debug!(error = %refused.error, "not taken by the ring");
                self.redo(hot);
            }
        }
    }

    /// Submits what is queued and answers what is finished. True when something was.
    fn complete(&mut self) -> bool {
        let Some(ring) = &mut self.ring else { return false };
        if self.done.is_empty()
            && ring.in_flight() > 0
            && let Err(error) = ring.completions(&mut self.done)
        {
            tracing::error!(%error, "io_uring");
        }
        let mut any = false;
        while let Some(io) = self.done.pop_front() {
            any = true;
            let slot = usize::try_from(io.token).unwrap_or(usize::MAX);
            if let Some(mut hot) = self.jobs.get_mut(slot).and_then(Option::take) {
                self.free_jobs.push(slot);
                hot.buf = io.buf;
                let large = hot.len >= LARGE_BYTES;
                self.finish(hot, io.result);
                if large {
                    break;
                }
            }
        }
        any
    }

    fn submit(&mut self) {
        // What is not taken now stays queued for `complete`.
        if let Some(Err(error)) = self.ring.as_mut().map(Ring::submit) {
            tracing::debug!(%error, "io_uring does not take more now");
        }
    }

    fn finish(&mut self, hot: Hot, result: Result<(), LunError>) {
        let counts = &self.client.counts;
        match result {
            Ok(()) => {
                self.spins = hot.for_other.is_none();
                hot.holds.end(&self.client, hot.write);
                if hot.write {
                    self.device.wrote(hot.unique, hot.len);
                } else {
                    self.device.reply(hot.unique, &hot.buf[hot.skip..hot.skip + hot.len]);
                }
                self.client.bufs.put(hot.buf);
                // What is done for another node counts there.
                if hot.for_other.is_none() {
                    let (number, bytes) = match hot.write {
                        true => (&counts.direct_writes, &counts.direct_write_bytes),
                        false => (&counts.direct_reads, &counts.direct_read_bytes),
                    };
                    count(number, 1);
                    count(bytes, hot.len as u64);
                }
            }
            Err(error) => self.failed(hot, &error),
        }
    }

    fn failed(&self, hot: Hot, error: &LunError) {
        let lost = match hot.holds {
            Holds::Layout { .. } => self.client.direct_failed(error).is_err(),
            Holds::Blocks(_) => {
                self.hidden.block_failed(error);
                true
            }
        };
        if lost {
            hot.holds.end(&self.client, false);
            self.device.error(hot.unique, Errno::IO);
        } else {
            self.redo(hot);
        }
    }

    /// Gives a hot I/O to the blocking way, which finds out what there is to do.
    fn redo(&self, hot: Hot) {
        if let Some(nodeid) = hot.for_other {
            hot.holds.end(&self.client, false);
            if hot.write {
                return self.hidden_write(hot.unique, nodeid, hot.offset, hot.len, hot.buf);
            }
            self.client.bufs.put(hot.buf);
            return self.hidden_read(hot.unique, nodeid, hot.offset, hot.len);
        }
        let Holds::Layout { inode, token } = hot.holds else { return };
        self.client.end_io(&inode, token, false);
        if hot.write {
            self.slow.write(hot.caller, inode, hot.buf, WriteWhat::plain(hot.offset, hot.len));
        } else {
            self.slow.read(hot.caller, inode, hot.offset, hot.len);
            self.client.bufs.put(hot.buf);
        }
    }

    /// The LUN when it may be used for other nodes from here.
    fn block_lun(&self) -> Option<&Arc<Lun>> {
        self.lun.as_ref().filter(|lun| !lun.is_faulty())
    }

    fn hot_block_read(&self, header: &InHeader, io: IoIn, token: &str) -> Option<Hot> {
        let block = u64::from(self.block_lun()?.logical_block_bytes());
        let held = self.hidden.block_io(token, ByteRange::at(io.offset, u64::from(io.size)), false)?;
        let span = span(LunOffset(io.offset), u64::from(io.size), block)?;
        Some(Hot::read(header, io, Holds::Blocks(held), span, self.client.bufs.take(span.1)))
    }

    fn hot_block_write(&self, header: &InHeader, io: IoIn, token: &str) -> Option<Hot> {
        self.block_lun()?;
        let held = self.hidden.block_io(token, ByteRange::at(io.offset, u64::from(io.size)), true)?;
        Some(Hot::write(header, io, Holds::Blocks(held), LunOffset(io.offset)))
    }

    fn hidden_read(&self, unique: u64, nodeid: u64, offset: u64, len: usize) {
        let (hidden, device) = (self.hidden.clone(), self.device.clone());
        self.hidden_pool.run(move || match hidden.read(nodeid, offset, len) {
            Ok(data) => device.reply(unique, &data),
            Err(errno) => device.error(unique, errno),
        });
    }

    fn hidden_write(&self, unique: u64, nodeid: u64, offset: u64, len: usize, buf: AlignedBuf) {
        let (hidden, device, client) = (self.hidden.clone(), self.device.clone(), self.client.clone());
        self.hidden_pool.run(move || {
            let outcome = hidden.write(nodeid, offset, &buf[..len]);
            client.bufs.put(buf);
            match outcome {
                Ok(()) => device.wrote(unique, len),
                Err(errno) => device.error(unique, errno),
            }
        });
    }

    fn lock(&mut self, header: &InHeader, lock: LkIn) {
        let Some(inode) = self.inode(header.nodeid) else {
            return self.device.error(header.unique, Errno::STALE);
        };
        let (client, device) = (self.client.clone(), self.device.clone());
        let (caller, opcode) = (caller(header), header.opcode);
        // Only what may wait for another process goes to the pool that such waiters can fill.
        let pool = if opcode == abi::SETLKW { &self.lock_pool } else { &self.io_pool };
        pool.run(move || match super::locks::run(&client, caller, &inode, opcode, lock) {
            Ok(reply) => device.reply(caller.request, &reply),
            Err(errno) => device.error(caller.request, errno),
        });
    }
}
