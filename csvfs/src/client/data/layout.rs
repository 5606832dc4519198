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
        let ahead = inode.io.lock().ahead;
        let op = Op::LayoutGet(proto::LayoutGet {
            file: Some(inode.file.into()),
            offset: range.start,
            len: range.len(),
            access: wire_access(access).into(),
            extend,
            want_ahead_bytes: ahead,
        });
        let receiver = inode.clone();
        let on_reply = Box::new(move |reply: &proto::Reply| match &reply.body {
            Some(Body::Grant(grant)) => receiver.io.lock().take_grant(grant),
            Some(Body::Redirect(_)) => {
                receiver.io.lock().redirected_until = Some(Instant::now() + REDIRECT_HOLD);
            }
            Some(Body::Attr(attr)) => receiver.io.lock().known_size = attr.size,
            Some(_) | None => {}
        });
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
