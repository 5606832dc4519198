//! Writing.

use super::layout::{AHEAD_MIN, next_ahead};
use super::{Blocks, ROUNDS_MAX, SMALL_WRITE_MAX, SMB_BYTES_MAX, Step, Way, WriteAt};
use crate::client::channel::Caller;
use crate::client::inode::Inode;
use crate::client::{VolumeClient, count};
use crate::fuse::device::IO_BYTES_MAX;
use csv_layout::Access;
use csv_layout::cache::{IoToken, Outcome, Segment};
use csv_proto as proto;
use csv_types::{ByteRange, FS_BLOCK_BYTES, LunOffset};
use proto::call::Op;
use proto::reply::Body;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// A write this close to the end of the last one counts as sequential, in bytes.
const SEQUENTIAL_BYTES: u64 = 16 << 20;
/// After so many small bytes written, a layout is asked for.
const SMALL_WRITTEN_MAX: u64 = 256 << 10;

impl VolumeClient {
    /// Writes all of the data.
    ///
    /// # Errors
    /// The errno for the application; nothing is known about what was written then, as after a failed write(2).
    pub(crate) fn write(&self, caller: Caller, inode: &Arc<Inode>, write: WriteAt<'_>) -> Result<(), Errno> {
        if write.kill_setid && inode.setid.load(Ordering::Relaxed) {
            self.kill_setid(caller, inode)?;
        }
        let mut deadline = Instant::now() + self.op_timeout;
        for _ in 0..ROUNDS_MAX {
            match self.next_way(caller, &mut deadline)? {
                Way::Blocks => {}
                Way::Fs => return self.write_through_fs(caller, inode, write),
                Way::Call => break,
            }
            if let Step::Done(()) = self.write_round(caller, inode, write)? {
                return Ok(());
            }
        }
        self.write_by_call(caller, inode, write)
    }

    pub(super) fn write_round(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        write: WriteAt<'_>,
    ) -> Result<Step<()>, Errno> {
        let mut segments = Vec::new();
        let len = write.data.len() as u64;
        let (range, outcome) = {
            let mut io = inode.io.lock();
            if io.redirected_until.is_some_and(|until| Instant::now() < until) {
                drop(io);
                return self.write_through_fs(caller, inode, write).map(Step::Done);
            }
            let alive = self.lease_alive();
            let offset = match io.cache.eof() {
                Some(eof) if write.append && alive => eof.size,
                Some(_) | None if write.append => {
                    drop(io);
                    return self.write_by_call(caller, inode, write).map(Step::Done);
                }
                Some(_) | None => write.offset,
            };
            let range = ByteRange::at(offset, len);
            if write.for_other && !io.overwrites(range, FS_BLOCK_BYTES) {
                drop(io);
                return self.write_by_call(caller, inode, write).map(Step::Done);
            }
            let outcome = match alive {
                true => io.cache.begin_write(range, FS_BLOCK_BYTES, &mut segments),
                false => Outcome::Miss,
            };
            (range, outcome)
        };
        match outcome {
            Outcome::Hit(token) => self.write_held(inode, token, range, write.data, &segments),
            Outcome::HitRmw(token) => self.write_unaligned(inode, token, range, write.data, &segments),
            Outcome::Busy => {
                std::thread::yield_now();
                Ok(Step::Again)
            }
            Outcome::Miss => self.write_missed(caller, inode, range, write),
        }
    }

    pub(super) fn write_missed(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        range: ByteRange,
        write: WriteAt<'_>,
    ) -> Result<Step<()>, Errno> {
        let whole = range.is_aligned(FS_BLOCK_BYTES);
        let (small, extend) = {
            let mut io = inode.io.lock();
            let extend = range.end > io.known_size;
            let small = !write.for_other
                && write.data.len() <= SMALL_WRITE_MAX
                && io.small_written < SMALL_WRITTEN_MAX
                && (extend || io.cache.is_empty() && !whole);
            if small {
                io.small_written += write.data.len() as u64;
            }
            // Several writes of one sequential writer are in flight, and come here in any order.
            if io.last_end.abs_diff(range.start) <= SEQUENTIAL_BYTES {
                io.ahead = next_ahead(io.ahead);
            } else {
                io.ahead = AHEAD_MIN;
            }
            io.last_end = range.end;
            (small, extend)
        };
        if small {
            return self.write_by_call(caller, inode, write).map(Step::Done);
        }
        if extend {
            self.get_end(caller, inode, range)?;
        } else {
            let access = if whole { Access::Write } else { Access::Exclusive };
            self.get_layout(caller, inode, range, access, false)?;
        }
        Ok(Step::Again)
    }

    pub(super) fn write_held(
        &self,
        inode: &Arc<Inode>,
        token: IoToken,
        range: ByteRange,
        data: &[u8],
        segments: &[Segment],
    ) -> Result<Step<()>, Errno> {
        let done = self.write_segments(range, data, segments, |blocks, segment, piece| {
            // The cache gives no hit for a write without real extents.
            self.write_blocks(blocks, segment.lun_offset.ok_or(Errno::IO)?, piece)
        });
        self.written(inode, token, range, done)
    }

    /// Writes each segment's part of the data by `write`; `false` as soon as the way changed under one.
    pub(super) fn write_segments(
        &self,
        range: ByteRange,
        data: &[u8],
        segments: &[Segment],
        write: impl Fn(&Blocks, &Segment, &[u8]) -> Result<bool, Errno>,
    ) -> Result<bool, Errno> {
        let blocks = self.blocks()?;
        for segment in segments {
            let at = usize::try_from(segment.file_offset - range.start).map_err(|_| Errno::INVAL)?;
            let len = usize::try_from(segment.len).map_err(|_| Errno::INVAL)?;
            if !write(&blocks, segment, &data[at..at + len])? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Ends a write under a layout. `done` tells whether the blocks were written, or whether the way changed meanwhile.
    pub(super) fn written(
        &self,
        inode: &Arc<Inode>,
        token: IoToken,
        range: ByteRange,
        done: Result<bool, Errno>,
    ) -> Result<Step<()>, Errno> {
        let wrote = matches!(done, Ok(true));
        self.end_io(inode, token, wrote);
        if wrote {
            self.count_write();
            inode.io.lock().last_end = range.end;
        }
        Ok(if done? { Step::Done(()) } else { Step::Again })
    }

    pub(super) fn count_write(&self) {
        let direct = self.modes.is_direct();
        count(if direct { &self.counts.direct_writes } else { &self.counts.block_writes }, 1);
    }

    /// Read-modify-write under an exclusive grant. The segments name the exact bytes; extents are whole file-system
    /// blocks, so the blocks around a segment belong to the same extent.
    pub(super) fn write_unaligned(
        &self,
        inode: &Arc<Inode>,
        token: IoToken,
        range: ByteRange,
        data: &[u8],
        segments: &[Segment],
    ) -> Result<Step<()>, Errno> {
        let done = self.write_segments(range, data, segments, |blocks, segment, piece| {
            self.change_blocks(blocks, segment, piece)
        });
        self.written(inode, token, range, done)
    }

    pub(super) fn change_blocks(
        &self,
        blocks: &Blocks,
        segment: &Segment,
        data: &[u8],
    ) -> Result<bool, Errno> {
        let place = segment.lun_offset.ok_or(Errno::IO)?;
        let exact = ByteRange::at(place.0, segment.len);
        let wide = exact.align_out(FS_BLOCK_BYTES);
        let edge_len = usize::try_from(FS_BLOCK_BYTES).map_err(|_| Errno::INVAL)?;
        let mut buf = vec![0; usize::try_from(wide.len()).map_err(|_| Errno::INVAL)?];
        let head = usize::try_from(exact.start - wide.start).map_err(|_| Errno::INVAL)?;
        if head > 0 && !self.read_blocks(blocks, LunOffset(wide.start), &mut buf[..edge_len])? {
            return Ok(false);
        }
        let one_block_read = head > 0 && buf.len() == edge_len;
        if exact.end < wide.end && !one_block_read {
            let tail = buf.len() - edge_len;
            if !self.read_blocks(blocks, LunOffset(wide.end - FS_BLOCK_BYTES), &mut buf[tail..])? {
                return Ok(false);
            }
        }
        buf[head..head + data.len()].copy_from_slice(data);
        self.write_blocks(blocks, LunOffset(wide.start), &buf)
    }

    /// Through the control protocol, in pieces that fit a message. A short append is one piece or none.
    pub(super) fn write_by_call(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        write: WriteAt<'_>,
    ) -> Result<(), Errno> {
        let mut done = 0;
        for piece in write.data.chunks(IO_BYTES_MAX) {
            let change = self.change_begins(&mut inode.io.lock());
            let op = Op::Write(proto::Write {
                file: Some(inode.file.into()),
                offset: write.offset + done,
                data: bytes::Bytes::copy_from_slice(piece),
                append: write.append,
                kill_suidgid: write.kill_setid,
                sync: false,
            });
            let reply = self.chan.call(caller, op)?;
            self.meta.changed(&[inode.file], &[]);
            done += piece.len() as u64;
            count(&self.counts.control_writes, 1);
            let mut io = inode.io.lock();
            self.change_answered(&mut io, &change);
            match reply.body {
                Some(Body::Count(proto::Count { attr: Some(attr), .. })) => io.known_size = attr.size,
                Some(_) | None => io.known_size = io.known_size.max(write.offset + done),
            }
            io.last_end = write.offset + done;
        }
        Ok(())
    }

    pub(super) fn write_through_fs(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        write: WriteAt<'_>,
    ) -> Result<(), Errno> {
        // SMB has no append, and a writer that loses set-id bits must lose them at the coordinator.
        if self.is_coordinator() || write.append || write.kill_setid || self.smb_pool().is_err() {
            return self.write_by_call(caller, inode, write);
        }
        let pool = self.smb_pool()?;
        let deadline = Instant::now() + self.op_timeout;
        let mut done = 0;
        for piece in write.data.chunks(SMB_BYTES_MAX) {
            let offset = write.offset + done;
            done += piece.len() as u64;
            loop {
                // Made anew each time: after a change of coordinator the session has another token.
                match pool.write_at(&self.smb_file(inode), offset, piece) {
                    Ok(()) => break,
                    // SMB knows "disk full" only as one error among many: the control call tells exactly.
                    Err(error) if error.is_rejected() || error.is_fatal() => {
                        if error.is_fatal() {
                            self.smb_useless(&error);
                        }
                        let rest = WriteAt { offset, data: piece, ..write };
                        self.write_by_call(caller, inode, rest)?;
                        break;
                    }
                    Err(error) => self.smb_retry(caller, &error, deadline)?,
                }
            }
        }
        self.redirected(inode, false, Some(write.offset + done));
        Ok(())
    }

    /// Clears set-id bits because of a write by someone who may not keep them.
    pub(super) fn kill_setid(&self, caller: Caller, inode: &Inode) -> Result<(), Errno> {
        let op = Op::Setattr(proto::SetAttr {
            file: Some(inode.file.into()),
            kill_suidgid: true,
            ..proto::SetAttr::default()
        });
        self.chan.call(caller, op)?;
        self.meta.changed(&[inode.file], &[]);
        inode.setid.store(false, Ordering::Relaxed);
        Ok(())
    }
}
