//! Redirected reads and writes that the pump starts itself: block-redirected under a layout that is held, fs-redirected
//! by file offset. The pump takes in their ends too and answers the kernel; nobody waits for them.
//!
//! What is more than plain, and whatever does not succeed at the first try, goes the blocking way ([`super::slow`]), which
//! repeats it: the same bytes at the same place.
//!
//! A request longer than SMB_BYTES_MAX is two transfers side by side, and is answered when both are over.

use super::slow::{Slow, WriteWhat};
use crate::client::channel::Caller;
use crate::client::data::SMB_BYTES_MAX;
use crate::client::inode::Inode;
use csv_layout::cache::{IoToken, Segment};
use csv_lun::{AlignedBuf, PooledBuf};
use csv_smb::jobs::{Job, NotDone, Receiver, Transfer};
use csv_smb::pool::SmbPool;
use csv_types::{ByteRange, FS_BLOCK_BYTES, ModeKind};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Instant;

/// See the module.
#[derive(Debug)]
pub(super) struct Redirect {
    slow: Slow,
    receiver: Option<Receiver>,
}

/// Where the data goes.
struct Way {
    pool: Arc<SmbPool>,
    path: Arc<str>,
    /// Offset there.
    offset: u64,
    /// The layout's hold, when it is the LUN that is written.
    token: Option<IoToken>,
}

/// A request, shared by its transfers.
struct Request {
    slow: Slow,
    caller: Caller,
    inode: Arc<Inode>,
    offset: u64,
    len: usize,
    /// Data of a write.
    data: Option<AlignedBuf>,
    state: Mutex<State>,
}

struct State {
    token: Option<IoToken>,
    /// Transfers that are not over.
    left: usize,
    failed: bool,
    /// What was read, in order, and how much of each.
    parts: Vec<Option<(PooledBuf, usize)>>,
}

/// One transfer of a request.
struct Part {
    request: Arc<Request>,
    index: usize,
    /// Of the data of a write.
    range: std::ops::Range<usize>,
    /// For what is read.
    buf: Option<PooledBuf>,
}

impl Redirect {
    pub(super) fn new(slow: Slow) -> Redirect {
        Redirect { slow, receiver: None }
    }

    /// Ends what is over. True when something was.
    pub(super) fn receive(&mut self) -> bool {
        self.receiver.as_mut().is_some_and(|receiver| receiver.is_needed() && receiver.receive())
    }

    /// What is readable when there is something to receive; looked at once in a second in any case. `None`: nothing is
    /// under way.
    pub(super) fn waits_for(&self) -> Option<&Receiver> {
        self.receiver.as_ref().filter(|receiver| receiver.is_needed())
    }

    /// The pool, with a receiver for its jobs.
    fn pool(&mut self) -> Option<Arc<SmbPool>> {
        let pool = self.slow.client.smb_pool().ok()?;
        if !self.receiver.as_ref().is_some_and(|receiver| Arc::ptr_eq(receiver.pool(), &pool)) {
            self.receiver = Receiver::new(pool.clone())
                .inspect_err(|error| tracing::error!(%error, "redirected I/O is slower than it could be"))
                .ok();
        }
        Some(pool)
    }

    /// Reads redirected, if that is the way now and there is nothing to wait for.
    pub(super) fn read(
        &mut self,
        caller: Caller,
        inode: &Arc<Inode>,
        offset: u64,
        len: usize,
        segments: &mut Vec<Segment>,
    ) -> bool {
        let Some(way) = self.way(inode, ByteRange::at(offset, len as u64), false, segments) else {
            return false;
        };
        self.start(way, caller, inode, offset, len, None);
        true
    }

    /// Writes redirected, if that is the way now and there is nothing to wait for; else the data comes back.
    pub(super) fn write(
        &mut self,
        caller: Caller,
        inode: &Arc<Inode>,
        buf: AlignedBuf,
        what: WriteWhat,
        segments: &mut Vec<Segment>,
    ) -> Result<(), AlignedBuf> {
        if !what.is_plain() {
            return Err(buf);
        }
        let range = ByteRange::at(what.offset, what.len as u64);
        let Some(way) = self.way(inode, range, true, segments) else { return Err(buf) };
        self.start(way, caller, inode, what.offset, what.len, Some(buf));
        Ok(())
    }

    fn way(
        &mut self,
        inode: &Inode,
        range: ByteRange,
        write: bool,
        segments: &mut Vec<Segment>,
    ) -> Option<Way> {
        let client = self.slow.client.clone();
        let kind = client.modes.kind();
        if client.is_coordinator() || range.is_empty() || client.smb_on_hold() {
            return None;
        }
        let pool = match kind {
            ModeKind::BlockRedirected | ModeKind::FsRedirected => self.pool()?,
            ModeKind::Direct | ModeKind::Paused | ModeKind::Unavailable => return None,
        };
        if kind == ModeKind::FsRedirected {
            return Some(Way { pool, path: client.smb_file(inode).into(), offset: range.start, token: None });
        }
        if !client.lease_alive() || write && !range.is_aligned(FS_BLOCK_BYTES) {
            return None;
        }
        segments.clear();
        let outcome = {
            let mut io = inode.io.lock();
            if io.redirected_until.is_some_and(|until| Instant::now() < until) {
                return None;
            }
            match write {
                true => io.cache.begin_write(range, FS_BLOCK_BYTES, segments),
                false => io.cache.begin_read(range, segments),
            }
        };
        let token = client.plain_hit(inode, outcome)?;
        match segments.as_slice() {
            [Segment { lun_offset: Some(place), len, .. }] if *len == range.len() => {
                Some(Way { pool, path: client.smb_blocks().into(), offset: place.0, token: Some(token) })
            }
            _ => {
                client.end_io(inode, token, false);
                None
            }
        }
    }

    fn start(
        &self,
        way: Way,
        caller: Caller,
        inode: &Arc<Inode>,
        offset: u64,
        len: usize,
        data: Option<AlignedBuf>,
    ) {
        let count = len.div_ceil(SMB_BYTES_MAX);
        let write = data.is_some();
        let state =
            State { token: way.token, left: count, failed: false, parts: (0..count).map(|_| None).collect() };
        let request = Arc::new(Request {
            slow: self.slow.clone(),
            caller,
            inode: inode.clone(),
            offset,
            len,
            data,
            state: Mutex::new(state),
        });
        for index in 0..count {
            let range = index * SMB_BYTES_MAX..len.min((index + 1) * SMB_BYTES_MAX);
            let buf = (!write).then(|| self.slow.client.bufs.get(range.len()));
            let at = way.offset + range.start as u64;
            let transfer = Box::new(Part { request: request.clone(), index, range, buf });
            let job = Job { path: way.path.clone(), offset: at, write, transfer };
            if let Err(refused) = way.pool.submit(job) {
                refused.transfer.done(Err(NotDone));
            }
        }
    }
}

impl Transfer for Part {
    fn source(&self) -> &[u8] {
        self.request.data.as_ref().map_or(&[], |data| &data[self.range.clone()])
    }

    fn sink(&mut self) -> &mut [u8] {
        self.buf.as_mut().map_or(&mut [], |buf| &mut buf[..])
    }

    fn done(mut self: Box<Self>, outcome: Result<usize, NotDone>) {
        let request = &self.request;
        let over = {
            let mut state = request.state.lock();
            match outcome {
                Ok(moved) => {
                    let part = self.buf.take().map(|buf| (buf, moved));
                    if let Some(place) = state.parts.get_mut(self.index) {
                        *place = part;
                    }
                }
                Err(NotDone) => state.failed = true,
            }
            state.left -= 1;
            state.left == 0
        };
        if over {
            request.over();
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Some(data) = self.data.take() {
            self.slow.client.bufs.put(data);
        }
    }
}

impl Request {
    /// All transfers are over.
    fn over(&self) {
        let (token, failed, parts) = {
            let mut state = self.state.lock();
            (state.token.take(), state.failed, std::mem::take(&mut state.parts))
        };
        let blocks = token.is_some();
        let client = &self.slow.client;
        let parts: Vec<(PooledBuf, usize)> = parts.into_iter().flatten().collect();
        let moved: usize = parts.iter().map(|(_, moved)| moved).sum();
        // By LUN blocks nothing is short; a file is short at its end only, and so not before the last part.
        let short = parts.iter().rev().skip(1).any(|(buf, moved)| *moved < buf.len());
        let good = !failed && (self.data.is_some() || !short && (!blocks || moved == self.len));
        if let Some(token) = token {
            client.end_io(&self.inode, token, good && self.data.is_some());
        }
        match (&self.data, good) {
            (None, false) => {
                self.slow.read(self.caller, self.inode.clone(), self.offset, self.len);
            }
            (Some(data), false) => {
                let mut buf = client.bufs.take(self.len);
                buf.copy_from_slice(&data[..self.len]);
                let what = WriteWhat::plain(self.offset, self.len);
                self.slow.write(self.caller, self.inode.clone(), buf, what);
            }
            (None, true) => {
                let parts: Vec<&[u8]> = parts.iter().map(|(buf, moved)| &buf[..*moved]).collect();
                client.redirected(&self.inode, blocks, None);
                self.slow.device.reply_parts(self.caller.request, &parts);
            }
            (Some(_), true) => {
                let end = self.offset + self.len as u64;
                client.redirected(&self.inode, blocks, Some(end));
                self.slow.device.wrote(self.caller.request, self.len);
            }
        }
    }
}
