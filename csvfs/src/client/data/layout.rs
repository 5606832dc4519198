//! Asking for layouts, and what a grant looks like on the wire.

use crate::client::channel::Caller;
use crate::client::inode::{FileIo, Inode};
use crate::client::{VolumeClient, count};
use csv_layout::{Access, Extent};
use csv_proto as proto;
use csv_types::{ByteRange, LunOffset};
use proto::call::Op;
use proto::reply::Body;
use rustix::io::Errno;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a file that cannot be lent is left alone before the next try.
const REDIRECT_HOLD: Duration = Duration::from_secs(5);
/// Space asked for ahead of a sequential writer, at first and at most, in bytes. It doubles, so that no more than about
/// twice a file's size is written with zeros for it.
pub(super) const AHEAD_MIN: u64 = 1 << 20;
const AHEAD_MAX: u64 = 64 << 20;
/// Pause before a layout is asked for again when the coordinator has too many such requests for the file.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

impl VolumeClient {
    /// Asks for a layout. The grant is taken into the cache by the receiving thread, in order with recalls.
    pub(crate) fn get_layout(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        range: ByteRange,
        access: Access,
        extend: bool,
    ) -> Result<(), Errno> {
        let op = Op::LayoutGet(layout_get(inode, range, access, extend));
        let receiver = inode.clone();
        let on_reply = Box::new(move |reply: &proto::Reply| receiver.io.lock().take_layout_reply(reply));
        match self.chan.call_with(caller, op, Some(on_reply), self.op_timeout) {
            Ok(_) => {
                count(&self.counts.layouts_granted, 1);
                if access != Access::Read {
                    self.meta.changed(&[inode.file], &[]);
                }
                Ok(())
            }
            // The range lies behind the end of the file now; the caller looks at the new size.
            Err(Errno::NXIO) => Ok(()),
            // Too many ask for this file at once: the caller looks again.
            Err(Errno::AGAIN) => {
                std::thread::sleep(BUSY_PAUSE);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Asks for the end-of-file right and space up to the end of `range`, or waits for the answer to somebody else who
    /// does: several writes of one sequential writer come here together, and each would have space made for it alone.
    ///
    /// # Errors
    /// As [`VolumeClient::get_layout`]; EINTR.
    pub(super) fn get_end(&self, caller: Caller, inode: &Arc<Inode>, range: ByteRange) -> Result<(), Errno> {
        let others = {
            let mut io = inode.io.lock();
            io.no_ahead = false;
            std::mem::replace(&mut io.asking_ahead, true).then_some(io.asked)
        };
        if let Some(seen) = others {
            return self.wait_asked(caller, inode, seen);
        }
        let outcome = self.get_layout(caller, inode, range, Access::Exclusive, true);
        self.asked(inode);
        self.closed(inode);
        outcome
    }

    /// No program has the file open here any more: space that was made ahead of its writer goes back.
    ///
    /// Not while more is asked for: the answer could put the right back with the size of before. And not with a size that
    /// the coordinator was not told, which would be lost with a broken link; the commit comes here again.
    pub(crate) fn closed(&self, inode: &Inode) {
        let mut io = inode.io.lock();
        let Some(eof) = io.cache.eof().filter(|eof| !eof.dirty && !io.asking_ahead) else { return };
        if !self.chan.is_open() || self.handles.lock().values().any(|open| open.file == inode.file) {
            return;
        }
        let mut returns = Vec::new();
        io.cache.give_back(ByteRange::new(eof.size, u64::MAX), &mut returns);
        io.ahead = 0;
        self.send_returns(inode.file, &mut io, &returns);
    }

    /// The request for space is answered, and so far nobody else asks: the next one may.
    fn asked(&self, inode: &Inode) {
        {
            let mut io = inode.io.lock();
            io.asking_ahead = false;
            io.asked += 1;
        }
        self.modes.wake();
    }

    /// Waits for the next answer after `seen`; ends at the latest with the time-out of the request that is under way.
    fn wait_asked(&self, caller: Caller, inode: &Inode, seen: u64) -> Result<(), Errno> {
        let interrupted = std::cell::Cell::new(false);
        self.modes.wait_change(self.modes.kind(), || {
            interrupted.set(interrupted.get() || self.chan.take_interrupt(caller.request));
            interrupted.get() || inode.io.lock().asked != seen
        });
        if interrupted.get() { Err(Errno::INTR) } else { Ok(()) }
    }

    /// Asks for more space behind a file whose writer will soon need it; nobody waits for that.
    pub(crate) fn ask_ahead(self: &Arc<Self>, inode: &Arc<Inode>, from: u64) {
        let get = layout_get(inode, ByteRange::at(from, 1), Access::Exclusive, true);
        let want_ahead_bytes = get.want_ahead_bytes;
        let (client, receiver) = (self.clone(), inode.clone());
        let done = Box::new(move |outcome: Result<proto::Reply, Errno>| {
            {
                let mut io = receiver.io.lock();
                if let Ok(reply) = &outcome {
                    io.take_layout_reply(reply);
                }
                // What went wrong the writer finds out when it asks itself.
                let came = io.cache.eof().map_or(0, |eof| eof.alloc_end.saturating_sub(from));
                io.no_ahead = outcome.is_err() || came < want_ahead_bytes / 2;
            }
            if outcome.is_ok_and(|reply| reply.errno == 0) {
                count(&client.counts.layouts_granted, 1);
                client.meta.changed(&[receiver.file], &[]);
            }
            client.asked(&receiver);
            client.closed(&receiver);
        });
        if self.chan.start(Caller::default(), Op::LayoutGet(get), done).is_err() {
            self.asked(inode);
        }
    }
}

/// Space to ask for ahead of a writer that goes on, after this much, in bytes.
pub(super) fn next_ahead(ahead: u64) -> u64 {
    (ahead * 2).clamp(AHEAD_MIN, AHEAD_MAX)
}

fn layout_get(inode: &Inode, range: ByteRange, access: Access, extend: bool) -> proto::LayoutGet {
    proto::LayoutGet {
        file: Some(inode.file.into()),
        offset: range.start,
        len: range.len(),
        access: wire_access(access).into(),
        extend,
        want_ahead_bytes: inode.io.lock().ahead,
    }
}

fn wire_access(access: Access) -> proto::Access {
    match access {
        Access::Read => proto::Access::Read,
        Access::Write => proto::Access::Write,
        Access::Exclusive => proto::Access::Exclusive,
    }
}

fn access_of(wire: i32) -> Access {
    match proto::Access::try_from(wire) {
        Ok(proto::Access::Exclusive) => Access::Exclusive,
        Ok(proto::Access::Write) => Access::Write,
        // A coordinator that knows more kinds than this node gives at least the right to read.
        Ok(proto::Access::Read) | Err(_) => Access::Read,
    }
}

impl FileIo {
    /// What the answer to a request for a layout says.
    fn take_layout_reply(&mut self, reply: &proto::Reply) {
        match &reply.body {
            Some(Body::Grant(grant)) => self.take_grant(grant),
            Some(Body::Redirect(_)) => self.redirected_until = Some(Instant::now() + REDIRECT_HOLD),
            Some(Body::Attr(attr)) => self.known_size = attr.size,
            Some(_) | None => {}
        }
    }

    /// Is a write of this range one of whole blocks that does not move the end of the file?
    pub(crate) fn overwrites(&self, range: ByteRange, block: u64) -> bool {
        let size = self.cache.eof().map_or(self.known_size, |eof| eof.size);
        range.end <= size && range.is_aligned(block)
    }

    /// A write up to `end` under the end-of-file right: from where on space is to be asked for now, so that a writer
    /// that goes on never waits for it. The caller asks.
    pub(crate) fn wants_ahead(&mut self, end: u64) -> Option<u64> {
        self.last_end = end;
        let eof = self.cache.eof()?;
        if self.asking_ahead
            || self.no_ahead
            || end <= eof.size
            || eof.alloc_end.saturating_sub(end) >= self.ahead
        {
            return None;
        }
        self.asking_ahead = true;
        self.ahead = next_ahead(self.ahead);
        Some(eof.alloc_end)
    }

    /// Takes a grant into the cache.
    pub(crate) fn take_grant(&mut self, grant: &proto::LayoutGrant) {
        let extents: Vec<Extent> = grant
            .extents
            .iter()
            .filter(|extent| extent.len > 0)
            .map(|extent| Extent {
                file_offset: extent.file_offset,
                len: extent.len,
                lun_offset: (!extent.zeros).then_some(LunOffset(extent.lun_offset)),
            })
            .collect();
        let eof = grant.eof.then_some(csv_layout::cache::EofRight {
            size: grant.size,
            alloc_end: grant.alloc_end,
            dirty: false,
        });
        if eof.is_none() {
            self.cache.set_size_limit(grant.size);
        }
        self.cache.granted(grant.seq, grant.range(), access_of(grant.access), &extents, eof);
        self.known_size = grant.size;
        self.small_written = 0;
        self.small_reads = 0;
    }

    /// The grants held, as the protocol writes them (for reclaim).
    pub(crate) fn held_grants(&self) -> Vec<proto::LayoutGrant> {
        self.cache
            .held()
            .into_iter()
            .map(|held| proto::LayoutGrant {
                seq: held.seq,
                offset: held.range.start,
                end: held.range.end,
                access: wire_access(held.access).into(),
                eof: held.eof.is_some(),
                size: held.eof.as_ref().map_or(self.known_size, |eof| eof.size),
                alloc_end: held.eof.as_ref().map_or(0, |eof| eof.alloc_end),
                extents: held
                    .extents
                    .iter()
                    .map(|extent| proto::LayoutExtent {
                        file_offset: extent.file_offset,
                        len: extent.len,
                        zeros: extent.lun_offset.is_none(),
                        lun_offset: extent.lun_offset.map_or(0, |place| place.0),
                    })
                    .collect(),
            })
            .collect()
    }
}
