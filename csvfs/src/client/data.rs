//! Reads and writes of file data, the whole way: layouts, direct or redirected I/O, small I/O through the
//! coordinator, unaligned writes, appends. The hot path of the FUSE pump answers what a held layout allows at once
//! and sends everything else here, into a thread that may block.
//!
//! Each function is a loop: look at the mode, look at the layout, do the I/O or change what is in the way, look
//! again. Every round makes progress or the loop ends at the operation's time-out or after [`ROUNDS_MAX`] rounds. A
//! direct I/O that fails on its path is repeated block-redirected, so the application sees no error.

use super::channel::Caller;
use super::inode::{FileIo, Inode};
use super::{VolumeClient, count, proto_now};
use csv_layout::cache::{IoToken, Outcome, Return, Segment};
use csv_layout::{Access, Extent};
use csv_lun::LunError;
use csv_proto as proto;
use csv_types::{ByteRange, LunOffset, ModeKind};
use proto::call::Op;
use proto::reply::Body;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Rounds of one operation before it goes through the coordinator whatever else.
const ROUNDS_MAX: u32 = 64;
/// A write up to this size into space that is not lent goes along with the request, in bytes.
const SMALL_WRITE_MAX: usize = 64 << 10;
/// After so many small bytes written, a layout is asked for.
const SMALL_WRITTEN_MAX: u64 = 256 << 10;
/// Small reads of a file without a layout before one is asked for.
const SMALL_READS_MAX: u32 = 8;
/// Space asked for ahead of a sequential writer, at first and at most, in bytes.
const AHEAD_MIN: u64 = 1 << 20;
const AHEAD_MAX: u64 = 64 << 20;
/// Largest request over SMB, in bytes. smbd's buffers are not page-aligned, and FUSE on the coordinator splits what
/// touches more than 256 pages: a full MiB would reach the block service in pieces that are no whole blocks.
const SMB_BYTES_MAX: usize = 512 << 10;
/// How long a file that cannot be lent is left alone before the next try.
const REDIRECT_HOLD: Duration = Duration::from_secs(5);

/// A write as FUSE asks for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WriteAt<'a> {
    /// Place; ignored with `append`.
    pub(crate) offset: u64,
    /// Data.
    pub(crate) data: &'a [u8],
    /// O_APPEND.
    pub(crate) append: bool,
    /// Clear set-id bits.
    pub(crate) kill_setid: bool,
}

/// Where the blocks of an I/O go in this round.
enum Blocks {
    Direct(Arc<csv_lun::Lun>),
    Redirected(Arc<csv_smb::pool::SmbPool>, String),
}

enum Step<T> {
    Done(T),
    Again,
}

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
        let deadline = Instant::now() + self.op_timeout;
        for _ in 0..ROUNDS_MAX {
            if Instant::now() >= deadline {
                return Err(Errno::IO);
            }
            match self.modes.kind() {
                ModeKind::Unavailable => return Err(Errno::IO),
                ModeKind::Paused => {
                    self.modes.wait_change(deadline);
                    continue;
                }
                ModeKind::FsRedirected => return self.read_through_fs(caller, inode, offset, len),
                ModeKind::Direct | ModeKind::BlockRedirected => {}
            }
            if let Step::Done(data) = self.read_round(caller, inode, offset, len)? {
                return Ok(data);
            }
        }
        self.read_by_call(caller, inode, offset, len)
    }

    fn read_round(
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
            if self.lease_alive() { io.begin_read(range, &mut segments) } else { Outcome::Miss }
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

    fn read_missed(
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
    fn readable(
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

    fn read_held(
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

    /// Which way blocks go now.
    fn blocks(&self) -> Result<Blocks, Errno> {
        match (self.modes.kind(), self.modes.lun()) {
            (ModeKind::Direct, Some(lun)) => Ok(Blocks::Direct(lun)),
            _ => {
                let path = format!("/.csvfs/block-{}", self.facts.read().smb_token);
                Ok(Blocks::Redirected(self.smb_pool()?, path))
            }
        }
    }

    fn lun_block(&self) -> u64 {
        self.modes.lun().map_or(4096, |lun| u64::from(lun.logical_block_bytes()))
    }

    /// Reads any bytes of the LUN. `false`: the way changed under it, look again.
    fn read_blocks(&self, blocks: &Blocks, place: LunOffset, out: &mut [u8]) -> Result<bool, Errno> {
        let block = self.lun_block();
        let wide = ByteRange::at(place.0, out.len() as u64).align_out(block);
        let len = usize::try_from(wide.len()).map_err(|_| Errno::INVAL)?;
        let skip = usize::try_from(place.0 - wide.start).map_err(|_| Errno::INVAL)?;
        match blocks {
            Blocks::Direct(lun) => {
                let mut buf = self.bufs.get(len);
                if let Err(error) = lun.read_at(&mut buf, len, LunOffset(wide.start)) {
                    return self.direct_failed(&error).map(|()| false);
                }
                out.copy_from_slice(&buf[skip..skip + out.len()]);
                count(&self.counts.direct_read_bytes, out.len() as u64);
                Ok(true)
            }
            // The block service reads around what is asked, but gives out only bytes that are lent: the last
            // block of a file is lent up to the end of the file.
            Blocks::Redirected(pool, path) => self.smb_read(pool, path, place.0, out),
        }
    }

    /// Writes whole blocks of the LUN. `false`: the way changed under it, look again (the write is repeated).
    fn write_blocks(&self, blocks: &Blocks, place: LunOffset, data: &[u8]) -> Result<bool, Errno> {
        match blocks {
            Blocks::Direct(lun) => {
                let mut buf = self.bufs.get(data.len());
                buf[..data.len()].copy_from_slice(data);
                if let Err(error) = lun.write_at(&buf, data.len(), place) {
                    return self.direct_failed(&error).map(|()| false);
                }
                count(&self.counts.direct_write_bytes, data.len() as u64);
                Ok(true)
            }
            Blocks::Redirected(pool, path) => {
                let mut at = place.0;
                for piece in data.chunks(SMB_BYTES_MAX) {
                    if !self.smb_done(pool.write_at(path, at, piece).map(|()| piece.len()), piece.len())? {
                        return Ok(false);
                    }
                    at += piece.len() as u64;
                }
                Ok(true)
            }
        }
    }

    fn smb_read(
        &self,
        pool: &csv_smb::pool::SmbPool,
        path: &str,
        place: u64,
        out: &mut [u8],
    ) -> Result<bool, Errno> {
        let mut at = place;
        for piece in out.chunks_mut(SMB_BYTES_MAX) {
            let len = piece.len();
            if !self.smb_done(pool.read_at(path, at, piece), len)? {
                return Ok(false);
            }
            at += len as u64;
        }
        Ok(true)
    }

    /// What an SMB transfer means for the loop: a refused or unknown outcome is repeated (the same bytes at the same
    /// place), since the layout may have been recalled or the server restarted meanwhile.
    fn smb_done(&self, done: Result<usize, csv_smb::pool::SmbError>, want: usize) -> Result<bool, Errno> {
        match done {
            Ok(got) if got == want => Ok(true),
            Ok(_) => Err(Errno::IO),
            Err(error) if error.is_fatal() => {
                self.events.report("smb-error", format!("redirected I/O cannot work: {error}"));
                Err(Errno::IO)
            }
            Err(error) => {
                tracing::warn!(%error, "redirected I/O is repeated");
                std::thread::sleep(Duration::from_millis(20));
                Ok(false)
            }
        }
    }

    /// A direct I/O failed: the path is given up for now, or the node is fenced, or the fault is the caller's.
    pub(crate) fn direct_failed(&self, error: &LunError) -> Result<(), Errno> {
        match error {
            LunError::PathFailed { .. } => {
                self.path_failed(&error.to_string());
                Ok(())
            }
            LunError::Fenced { .. } => {
                self.end_lease();
                self.modes.fenced(error.to_string());
                Err(Errno::IO)
            }
            LunError::ReadOnly { .. }
            | LunError::OutOfBounds { .. }
            | LunError::Misaligned { .. }
            | LunError::BufferTooSmall { .. }
            | LunError::Shrunk { .. }
            | LunError::Unsuitable { .. } => {
                self.events.report("lun-error", error.to_string());
                Err(Errno::IO)
            }
        }
    }

    /// Ends an I/O under a layout and sends what became free to return.
    pub(crate) fn end_io(&self, inode: &Inode, token: IoToken, wrote: bool) {
        let mut returns: Vec<Return> = Vec::new();
        let mut io = inode.io.lock();
        io.cache.end(token, wrote, &mut returns);
        if wrote {
            io.wrote_at = Some(proto_now());
            io.device_dirty = true;
        }
        for back in &returns {
            let mtime = io.wrote_at.take();
            self.send_return(inode.file, back, mtime);
        }
    }

    fn read_by_call(
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
    fn read_through_fs(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, Errno> {
        if self.is_coordinator || self.smb_pool().is_err() {
            return self.read_by_call(caller, inode, offset, len);
        }
        let pool = self.smb_pool()?;
        let path = self.smb_file(inode);
        let deadline = Instant::now() + self.op_timeout;
        let mut data = vec![0; len];
        let mut done = 0;
        while done < len {
            let end = len.min(done + SMB_BYTES_MAX);
            match pool.read_at(&path, offset + done as u64, &mut data[done..end]) {
                Ok(got) => {
                    done += got;
                    if got == 0 || done < end {
                        break;
                    }
                }
                Err(error) => self.smb_retry(&error, deadline)?,
            }
        }
        count(&self.counts.fs_reads, 1);
        data.truncate(done);
        Ok(data)
    }

    fn smb_file(&self, inode: &Inode) -> String {
        let token = self.facts.read().smb_token.clone();
        format!("/.csvfs/file-{token}-{}-{}", inode.file.ino, inode.file.generation)
    }

    fn smb_retry(&self, error: &csv_smb::pool::SmbError, deadline: Instant) -> Result<(), Errno> {
        if error.is_fatal() || Instant::now() >= deadline {
            self.events.report("smb-error", format!("file-system redirected I/O failed: {error}"));
            return Err(Errno::IO);
        }
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    }

    /// Writes all of the data.
    ///
    /// # Errors
    /// The errno for the application; nothing is known about what was written then, as after a failed write(2).
    pub(crate) fn write(&self, caller: Caller, inode: &Arc<Inode>, write: WriteAt<'_>) -> Result<(), Errno> {
        if write.kill_setid && inode.setid.load(Ordering::Relaxed) {
            self.kill_setid(caller, inode)?;
        }
        let deadline = Instant::now() + self.op_timeout;
        for _ in 0..ROUNDS_MAX {
            if Instant::now() >= deadline {
                return Err(Errno::IO);
            }
            match self.modes.kind() {
                ModeKind::Unavailable => return Err(Errno::IO),
                ModeKind::Paused => {
                    self.modes.wait_change(deadline);
                    continue;
                }
                ModeKind::FsRedirected => return self.write_through_fs(caller, inode, write),
                ModeKind::Direct | ModeKind::BlockRedirected => {}
            }
            if let Step::Done(()) = self.write_round(caller, inode, write)? {
                return Ok(());
            }
        }
        self.write_by_call(caller, inode, write)
    }

    fn write_round(&self, caller: Caller, inode: &Arc<Inode>, write: WriteAt<'_>) -> Result<Step<()>, Errno> {
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
            let outcome = match alive {
                true => io.begin_write(range, self.lun_block(), &mut segments),
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

    fn write_missed(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        range: ByteRange,
        write: WriteAt<'_>,
    ) -> Result<Step<()>, Errno> {
        let block = self.lun_block();
        let whole = range.start.is_multiple_of(block) && range.end.is_multiple_of(block);
        let (small, extend) = {
            let mut io = inode.io.lock();
            let extend = range.end > io.known_size;
            let small = write.data.len() <= SMALL_WRITE_MAX
                && io.small_written < SMALL_WRITTEN_MAX
                && (extend || io.cache.is_empty() && !whole);
            if small {
                io.small_written += write.data.len() as u64;
            }
            if io.last_end == range.start {
                io.ahead = (io.ahead * 2).clamp(AHEAD_MIN, AHEAD_MAX);
            } else {
                io.ahead = AHEAD_MIN;
            }
            io.last_end = range.end;
            (small, extend)
        };
        if small {
            return self.write_by_call(caller, inode, write).map(Step::Done);
        }
        let access = if whole && !extend { Access::Write } else { Access::Exclusive };
        self.get_layout(caller, inode, range, access, extend)?;
        Ok(Step::Again)
    }

    fn write_held(
        &self,
        inode: &Arc<Inode>,
        token: IoToken,
        range: ByteRange,
        data: &[u8],
        segments: &[Segment],
    ) -> Result<Step<()>, Errno> {
        let done = self.blocks().and_then(|blocks| {
            for segment in segments {
                // The cache gives no hit for a write without real extents.
                let place = segment.lun_offset.ok_or(Errno::IO)?;
                let at = usize::try_from(segment.file_offset - range.start).map_err(|_| Errno::INVAL)?;
                let len = usize::try_from(segment.len).map_err(|_| Errno::INVAL)?;
                if !self.write_blocks(&blocks, place, &data[at..at + len])? {
                    return Ok(false);
                }
            }
            Ok(true)
        });
        let wrote = matches!(done, Ok(true));
        self.end_io(inode, token, wrote);
        if wrote {
            self.count_write();
            inode.io.lock().last_end = range.end;
        }
        Ok(if done? { Step::Done(()) } else { Step::Again })
    }

    fn count_write(&self) {
        let direct = self.modes.is_direct();
        count(if direct { &self.counts.direct_writes } else { &self.counts.block_writes }, 1);
    }

    /// Read-modify-write under an exclusive grant. The segments name the exact bytes; extents are whole file-system
    /// blocks, so the LUN blocks around a segment belong to the same extent.
    fn write_unaligned(
        &self,
        inode: &Arc<Inode>,
        token: IoToken,
        range: ByteRange,
        data: &[u8],
        segments: &[Segment],
    ) -> Result<Step<()>, Errno> {
        let done = self.blocks().and_then(|blocks| {
            for segment in segments {
                let at = usize::try_from(segment.file_offset - range.start).map_err(|_| Errno::INVAL)?;
                let len = usize::try_from(segment.len).map_err(|_| Errno::INVAL)?;
                if !self.change_blocks(&blocks, segment, &data[at..at + len])? {
                    return Ok(false);
                }
            }
            Ok(true)
        });
        let wrote = matches!(done, Ok(true));
        self.end_io(inode, token, wrote);
        if wrote {
            self.count_write();
            inode.io.lock().last_end = range.end;
        }
        Ok(if done? { Step::Done(()) } else { Step::Again })
    }

    fn change_blocks(&self, blocks: &Blocks, segment: &Segment, data: &[u8]) -> Result<bool, Errno> {
        let block = self.lun_block();
        let place = segment.lun_offset.ok_or(Errno::IO)?;
        let exact = ByteRange::at(place.0, segment.len);
        let wide = exact.align_out(block);
        let edge_len = usize::try_from(block).map_err(|_| Errno::INVAL)?;
        let mut buf = vec![0; usize::try_from(wide.len()).map_err(|_| Errno::INVAL)?];
        let head = usize::try_from(exact.start - wide.start).map_err(|_| Errno::INVAL)?;
        if head > 0 && !self.read_blocks(blocks, LunOffset(wide.start), &mut buf[..edge_len])? {
            return Ok(false);
        }
        let one_block_read = head > 0 && buf.len() == edge_len;
        if exact.end < wide.end && !one_block_read {
            let tail = buf.len() - edge_len;
            if !self.read_blocks(blocks, LunOffset(wide.end - block), &mut buf[tail..])? {
                return Ok(false);
            }
        }
        buf[head..head + data.len()].copy_from_slice(data);
        self.write_blocks(blocks, LunOffset(wide.start), &buf)
    }

    /// Through the control protocol, in pieces that fit a message. A short append is one piece or none.
    fn write_by_call(&self, caller: Caller, inode: &Arc<Inode>, write: WriteAt<'_>) -> Result<(), Errno> {
        let mut done = 0;
        for piece in write.data.chunks(super::super::fuse::device::IO_BYTES_MAX) {
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
            io.coordinator_dirty = true;
            match reply.body {
                Some(Body::Count(proto::Count { attr: Some(attr), .. })) => io.known_size = attr.size,
                Some(_) | None => io.known_size = io.known_size.max(write.offset + done),
            }
            io.last_end = write.offset + done;
        }
        Ok(())
    }

    fn write_through_fs(&self, caller: Caller, inode: &Arc<Inode>, write: WriteAt<'_>) -> Result<(), Errno> {
        // SMB has no append, and a writer that loses set-id bits must lose them at the coordinator.
        if self.is_coordinator || write.append || write.kill_setid || self.smb_pool().is_err() {
            return self.write_by_call(caller, inode, write);
        }
        let pool = self.smb_pool()?;
        let path = self.smb_file(inode);
        let deadline = Instant::now() + self.op_timeout;
        let mut done = 0;
        for piece in write.data.chunks(SMB_BYTES_MAX) {
            let offset = write.offset + done;
            done += piece.len() as u64;
            loop {
                match pool.write_at(&path, offset, piece) {
                    Ok(()) => break,
                    // SMB knows "disk full" only as one error among many: the control call tells exactly.
                    Err(error) if error.is_rejected() => {
                        let rest = WriteAt { offset, data: piece, ..write };
                        self.write_by_call(caller, inode, rest)?;
                        break;
                    }
                    Err(error) => self.smb_retry(&error, deadline)?,
                }
            }
        }
        count(&self.counts.fs_writes, 1);
        self.meta.changed(&[inode.file], &[]);
        let mut io = inode.io.lock();
        io.coordinator_dirty = true;
        io.known_size = io.known_size.max(write.offset + done);
        Ok(())
    }

    /// Clears set-id bits because of a write by someone who may not keep them.
    fn kill_setid(&self, caller: Caller, inode: &Inode) -> Result<(), Errno> {
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
            Err(error) => Err(error),
        }
    }

    /// Tells the coordinator the size and the time of what was written under a grant.
    pub(crate) fn commit(&self, caller: Caller, inode: &Inode) -> Result<(), Errno> {
        let (size, mtime) = {
            let mut io = inode.io.lock();
            let size = io.cache.eof().filter(|eof| eof.dirty).map(|eof| eof.size);
            (size, io.wrote_at.take())
        };
        if size.is_none() && mtime.is_none() {
            return Ok(());
        }
        let op = Op::LayoutCommit(proto::LayoutCommit {
            file: Some(inode.file.into()),
            size,
            mtime,
            kill_suidgid: false,
        });
        let outcome = self.chan.call(caller, op);
        self.meta.changed(&[inode.file], &[]);
        let mut io = inode.io.lock();
        match outcome {
            Ok(_) => {
                if let Some(size) = size {
                    io.cache.size_committed(size);
                    io.coordinator_dirty = true;
                }
                Ok(())
            }
            Err(error) => {
                if io.wrote_at.is_none() {
                    io.wrote_at = mtime;
                }
                Err(error)
            }
        }
    }

    /// fsync(2), fdatasync(2). What this node wrote to the LUN is flushed by this node; size and times, and
    /// whatever went through the coordinator, are made durable there.
    pub(crate) fn fsync(&self, caller: Caller, inode: &Arc<Inode>, datasync: bool) -> Result<(), Errno> {
        self.commit(caller, inode)?;
        let (device_dirty, at_coordinator) = {
            let mut io = inode.io.lock();
            let held = io.cache.covers(ByteRange::new(0, io.known_size), Access::Write);
            let at_coordinator = !datasync || io.coordinator_dirty || !held || !self.lease_alive();
            (std::mem::take(&mut io.device_dirty), at_coordinator)
        };
        if device_dirty && let Err(error) = self.flush_lun() {
            inode.io.lock().device_dirty = true;
            return Err(error);
        }
        if at_coordinator || !self.modes.is_direct() {
            inode.io.lock().coordinator_dirty = false;
            let op = Op::Fsync(proto::Fsync { file: Some(inode.file.into()), datasync, dir: false });
            if let Err(error) = self.chan.call(caller, op) {
                inode.io.lock().coordinator_dirty = true;
                return Err(error);
            }
        }
        Ok(())
    }

    fn flush_lun(&self) -> Result<(), Errno> {
        if !self.modes.is_direct() {
            return Ok(());
        }
        let Some(lun) = self.modes.lun() else { return Ok(()) };
        match lun.flush() {
            Ok(()) => Ok(()),
            // The coordinator's flush (which follows in any other mode) reaches the same device.
            Err(error) => self.direct_failed(&error),
        }
    }

    /// Files written since their last commit, for the timer.
    pub(crate) fn commit_all(&self) {
        for inode in self.inodes.all() {
            let due = {
                let io = inode.io.lock();
                io.wrote_at.is_some() || io.cache.eof().is_some_and(|eof| eof.dirty)
            };
            if due && let Err(error) = self.commit(Caller::default(), &inode) {
                tracing::debug!(%error, file = %inode.file, "commit is tried again later");
                return;
            }
        }
    }

    /// The path to the LUN failed: redirect, and probe until it is back.
    pub(crate) fn path_failed(&self, why: &str) {
        self.modes.path_failed(why);
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
        self.cache.granted(grant.seq, grant.range(), access_of(grant.access), &extents, eof);
        self.known_size = grant.size;
        self.granted_size = grant.size;
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
