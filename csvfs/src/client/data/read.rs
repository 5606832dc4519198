//! Reading.

use super::{ROUNDS_MAX, SMALL_WRITE_MAX, SMB_BYTES_MAX, Step, Way};
use crate::client::channel::Caller;
use crate::client::inode::Inode;
use crate::client::{VolumeClient, count};
use csv_layout::Access;
use csv_layout::cache::{IoToken, Outcome, Segment};
use csv_proto as proto;
use csv_types::ByteRange;
use proto::call::Op;
use proto::reply::Body;
use rustix::io::Errno;
use std::sync::Arc;
use std::time::Instant;

/// Small reads of a file without a layout before one is asked for.
const SMALL_READS_MAX: u32 = 8;

impl VolumeClient {
    /// Reads up to `len` bytes; fewer only at the end of the file.
    ///
    /// # Errors
    /// The errno for the application.
    pub(crate) fn read(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, Errno> {
        let mut deadline = Instant::now() + self.op_timeout;
        for _ in 0..ROUNDS_MAX {
            match self.next_way(caller, &mut deadline)? {
                Way::Blocks => {}
                Way::Fs => return self.read_through_fs(caller, inode, offset, len),
                Way::Call => break,
            }
            if let Step::Done(data) = self.read_round(caller, inode, offset, len)? {
                return Ok(data);
            }
        }
        self.read_by_call(caller, inode, offset, len)
    }

    pub(super) fn read_round(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        offset: u64,
        len: usize,
    ) -> Result<Step<Vec<u8>>, Errno> {
        let Some(range) = self.readable(caller, inode, offset, len)? else {
            return Ok(Step::Done(Vec::new()));
        };
        let mut segments = Vec::new();
        let outcome = {
            let mut io = inode.io.lock();
            if io.redirected_until.is_some_and(|until| Instant::now() < until) {
                drop(io);
                return self.read_through_fs(caller, inode, offset, len).map(Step::Done);
            }
            if self.lease_alive() { io.cache.begin_read(range, &mut segments) } else { Outcome::Miss }
        };
        match outcome {
            Outcome::Hit(token) => self.read_held(inode, token, range, &segments),
            Outcome::HitRmw(token) => {
                self.end_io(inode, token, false);
                Ok(Step::Again)
            }
            Outcome::Busy | Outcome::Miss => self.read_missed(caller, inode, range),
        }
    }

    pub(super) fn read_missed(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        range: ByteRange,
    ) -> Result<Step<Vec<u8>>, Errno> {
        let small = {
            let mut io = inode.io.lock();
            io.small_reads += 1;
            range.len() <= SMALL_WRITE_MAX as u64
                && io.small_reads <= SMALL_READS_MAX
                && io.known_size <= SMALL_WRITE_MAX as u64
                && io.cache.is_empty()
        };
        if small {
            let len = usize::try_from(range.len()).unwrap_or(usize::MAX);
            return self.read_by_call(caller, inode, range.start, len).map(Step::Done);
        }
        self.get_layout(caller, inode, range, Access::Read, false)?;
        Ok(Step::Again)
    }

    /// The part of a read that lies before the end of the file, or `None`. Asks the coordinator unless this node
    /// knows for certain.
    pub(super) fn readable(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        offset: u64,
        len: usize,
    ) -> Result<Option<ByteRange>, Errno> {
        let want = ByteRange::at(offset, len as u64);
        let (known, certain) = {
            let io = inode.io.lock();
            match io.cache.eof() {
                Some(eof) if self.lease_alive() => (eof.size, true),
                Some(_) | None => (io.known_size, false),
            }
        };
        let size = if want.end <= known || certain {
            known
        } else {
            let op = Op::Getattr(proto::GetAttr { file: Some(inode.file.into()) });
            let reply = self.chan.call(caller, op)?;
            let size = match reply.body {
                Some(Body::Attr(attr)) => attr.size,
                Some(_) | None => return Err(Errno::PROTO),
            };
            let mut io = inode.io.lock();
            // The right may have come in the meantime; then it knows better.
            let size = io.cache.eof().map_or(size, |eof| eof.size);
            io.known_size = size;
            size
        };
        let range = ByteRange::new(want.start, want.end.min(size));
        Ok((!range.is_empty()).then_some(range))
    }

    pub(super) fn read_held(
        &self,
        inode: &Arc<Inode>,
        token: IoToken,
        range: ByteRange,
        segments: &[Segment],
    ) -> Result<Step<Vec<u8>>, Errno> {
        let mut data = vec![0; usize::try_from(range.len()).map_err(|_| Errno::INVAL)?];
        let done = self.blocks().and_then(|blocks| {
            for segment in segments {
                let Some(place) = segment.lun_offset else { continue };
                let at = usize::try_from(segment.file_offset - range.start).map_err(|_| Errno::INVAL)?;
                let len = usize::try_from(segment.len).map_err(|_| Errno::INVAL)?;
                if !self.read_blocks(&blocks, place, &mut data[at..at + len])? {
                    return Ok(false);
                }
            }
            Ok(true)
        });
        self.end_io(inode, token, false);
        match done? {
            true => {
                let direct = self.modes.is_direct();
                count(if direct { &self.counts.direct_reads } else { &self.counts.block_reads }, 1);
                Ok(Step::Done(data))
            }
            false => Ok(Step::Again),
        }
    }

    pub(super) fn read_by_call(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, Errno> {
        let len = u32::try_from(len).map_err(|_| Errno::INVAL)?;
        let op = Op::Read(proto::Read { file: Some(inode.file.into()), offset, len });
        let reply = self.chan.call(caller, op)?;
        count(&self.counts.control_reads, 1);
        match reply.body {
            Some(Body::Data(data)) => Ok(data.data.into()),
            Some(_) | None => Err(Errno::PROTO),
        }
    }

    /// The coordinator's file system, by file offset: over SMB, or in-process on the coordinator itself.
    pub(super) fn read_through_fs(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, Errno> {
        if self.is_coordinator() || self.smb_pool().is_err() {
            return self.read_by_call(caller, inode, offset, len);
        }
        let pool = self.smb_pool()?;
        let deadline = Instant::now() + self.op_timeout;
        let mut data = vec![0; len];
        let mut done = 0;
        while done < len {
            let end = len.min(done + SMB_BYTES_MAX);
            // The path is made anew each time: after a change of coordinator the session has another token.
            match pool.read_at(&self.smb_file(inode), offset + done as u64, &mut data[done..end]) {
                Ok(got) => {
                    done += got;
                    if got == 0 || done < end {
                        break;
                    }
                }
                Err(error) if error.is_rejected() => return self.read_by_call(caller, inode, offset, len),
                Err(error) if error.is_fatal() => {
                    self.smb_useless(&error);
                    return self.read_by_call(caller, inode, offset, len);
                }
                Err(error) => self.smb_retry(caller, &error, deadline)?,
            }
        }
        self.redirected(inode, false, None);
        data.truncate(done);
        Ok(data)
    }
}
