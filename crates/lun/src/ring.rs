//! Asynchronous I/O on a LUN through io_uring, for the one thread that owns the [`Ring`].
//!
//! Invariants:
//! * A buffer that the kernel may touch belongs to the ring's slot table until its completion was reaped, and the
//!   ring waits for every I/O in flight before it frees its slots (`Drop`).
//! * Never more I/Os in flight than the ring has entries: [`Ring::has_room`] says so, and a push without room is
//!   refused with the buffer handed back.
//! * A large I/O that is alone goes out in pieces, which the device does side by side; it is one I/O all the same: it
//!   ends with its last piece, and with the first error of any.
//! * Faults injected into the [`Lun`] apply before and after each I/O, as for the blocking calls.
//!
//! The LUN's file descriptor is registered, which spares a reference count per I/O. `DEFER_TASKRUN` is not used: with it
//! (kernel 6.18) a completion does not wake whoever polls the ring's descriptor, and the owner would sleep on.

use crate::{AlignedBuf, IoOp, Lun, LunError};
use csv_types::LunOffset;
use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

/// A finished I/O with the buffer it used.
#[derive(Debug)]
pub struct RingIo {
    /// What the caller gave to [`Ring::read`] or [`Ring::write`].
    pub token: u64,
    /// The caller's buffer.
    pub buf: AlignedBuf,
    /// How it ended.
    pub result: Result<(), LunError>,
}

/// An I/O that was not started, with its buffer.
#[derive(Debug)]
pub struct Refused {
    /// The caller's buffer.
    pub buf: AlignedBuf,
    /// Why.
    pub error: LunError,
}

/// From this length on a lone I/O is cut into pieces, and how many those are. They are whole blocks of every device.
const CUT_FROM: u32 = 512 << 10;
const PIECES: u32 = 4;
const PIECE_ALIGN: u32 = 64 << 10;

#[derive(Debug)]
struct Slot {
    token: u64,
    buf: AlignedBuf,
    len: u32,
    pieces_left: u32,
    /// Bytes of the finished pieces, or the first error (negative).
    result: i32,
    op: IoOp,
    offset: LunOffset,
}

impl Slot {
    fn piece_done(&mut self, result: i32) {
        self.pieces_left = self.pieces_left.saturating_sub(1);
        if self.result >= 0 {
            self.result = if result < 0 { result } else { self.result.saturating_add(result) };
        }
    }
}

/// Submission and completion rings on one LUN.
pub struct Ring {
    uring: IoUring,
    lun: Arc<Lun>,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    unsubmitted: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("lun", &self.lun.path()).field("in_flight", &self.in_flight()).finish()
    }
}

impl Ring {
    /// A ring for at most `entries` I/Os in flight (rounded up to a power of two by the kernel).
    ///
    /// # Errors
    /// Those of io_uring_setup(2) and io_uring_register(2).
    pub fn new(lun: Arc<Lun>, entries: u32) -> io::Result<Ring> {
        let uring =
            IoUring::builder().setup_single_issuer().build(entries).or_else(|_| IoUring::new(entries))?;
        uring.submitter().register_files(&[lun.as_fd().as_raw_fd()])?;
        Ok(Ring {
            uring,
            lun,
            slots: (0..entries).map(|_| None).collect(),
            free: (0..entries).rev().collect(),
            unsubmitted: 0,
        })
    }

    /// I/Os whose completion was not reaped yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// May one more I/O be pushed?
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Queues a read of `len` bytes (whole LUN blocks) at `offset` into the start of `buf`.
    ///
    /// # Errors
    /// [`Refused`] with the buffer, when out of bounds, misaligned, under an injected fault, or without room.
    pub fn read(
        &mut self,
        token: u64,
        buf: AlignedBuf,
        len: usize,
        offset: LunOffset,
    ) -> Result<(), Box<Refused>> {
        self.push(token, buf, len, offset, false)
    }

    /// Queues a write of the first `len` bytes of `buf` (whole LUN blocks) at `offset`.
    ///
    /// # Errors
    /// As [`Ring::read`].
    pub fn write(
        &mut self,
        token: u64,
        buf: AlignedBuf,
        len: usize,
        offset: LunOffset,
    ) -> Result<(), Box<Refused>> {
        self.push(token, buf, len, offset, true)
    }

    fn push(
        &mut self,
        token: u64,
        mut buf: AlignedBuf,
        len: usize,
        offset: LunOffset,
        write: bool,
    ) -> Result<(), Box<Refused>> {
        let op = if write { IoOp::Write } else { IoOp::Read };
        let len32 = match self.check(op, &buf, len, offset) {
            Ok(len32) => len32,
            Err(error) => return Err(Box::new(Refused { buf, error })),
        };
        let Some(slot) = self.free.pop() else {
            let error = self.lun.io_error(op, offset, Errno::AGAIN);
            return Err(Box::new(Refused { buf, error }));
        };
        let alone = self.in_flight() == 1;
        let piece_len = match alone && len32 >= CUT_FROM {
            true => len32.div_ceil(PIECES).next_multiple_of(PIECE_ALIGN),
            false => len32.max(1),
        };
        let pieces = len32.div_ceil(piece_len).max(1);
        let start = buf.as_mut_ptr();
        self.slots[slot as usize] =
            Some(Slot { token, buf, len: len32, pieces_left: pieces, result: 0, op, offset });
        for piece in 0..pieces {
            let at = piece * piece_len;
            let len = piece_len.min(len32 - at);
            let place = offset.0 + u64::from(at);
            let pointer = start.wrapping_add(at as usize);
            let fd = types::Fixed(0);
            let entry = if write {
                opcode::Write::new(fd, pointer.cast_const(), len).offset(place).build()
            } else {
                opcode::Read::new(fd, pointer, len).offset(place).build()
            };
            self.push_entry(&entry.user_data(u64::from(slot)));
        }
        Ok(())
    }

    fn check(&self, op: IoOp, buf: &AlignedBuf, len: usize, offset: LunOffset) -> Result<u32, LunError> {
        self.lun.check_range(op, len, offset)?;
        if buf.len() < len {
            return Err(LunError::BufferTooSmall { op, have_bytes: buf.len(), need_bytes: len });
        }
        // The owner of a ring must not sleep: an injected delay is for the blocking calls, which it turns to.
        if self.lun.admit_io(op, offset)?.is_some() {
            return Err(self.lun.io_error(op, offset, Errno::AGAIN));
        }
        u32::try_from(len).map_err(|_| self.lun.io_error(op, offset, Errno::INVAL))
    }

    fn push_entry(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the entry's buffer is heap memory owned by a slot, which stays until the completion is
            // reaped (`completions`, `Drop`); its length was checked by `Lun::check_io`.
            let pushed = unsafe { self.uring.submission().push(entry) };
            if pushed.is_ok() {
                self.unsubmitted += 1;
                return;
            }
            // The submission ring has as many entries as there are slots, so it is full only with unsubmitted
            // entries; submitting makes room.
            let _ = self.submit();
        }
    }

    /// Hands everything queued to the kernel.
    ///
    /// # Errors
    /// Those of io_uring_enter(2); entries that were not taken stay queued.
    pub fn submit(&mut self) -> io::Result<()> {
        if self.unsubmitted == 0 {
            return Ok(());
        }
        let taken = self.uring.submit()?;
        self.unsubmitted = self.unsubmitted.saturating_sub(taken);
        Ok(())
    }

    /// Submits and waits until at least one I/O has finished (if any is in flight).
    ///
    /// # Errors
    /// Those of io_uring_enter(2).
    pub fn wait(&mut self) -> io::Result<()> {
        if self.in_flight() == 0 {
            return Ok(());
        }
        match self.uring.submit_and_wait(1) {
            Ok(taken) => {
                self.unsubmitted = self.unsubmitted.saturating_sub(taken);
                Ok(())
            }
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Submits what is queued and moves what finished to `out`.
    ///
    /// # Errors
    /// Those of io_uring_enter(2).
    pub fn completions(&mut self, out: &mut VecDeque<RingIo>) -> io::Result<()> {
        if self.in_flight() == 0 {
            return Ok(());
        }
        // With nothing to submit no system call: completions are posted whenever this thread comes out of any.
        match self.submit() {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(error) => return Err(error),
        }
        self.reap(out);
        Ok(())
    }

    fn reap(&mut self, out: &mut VecDeque<RingIo>) {
        let mut finished = self.uring.completion();
        finished.sync();
        for entry in finished {
            let Ok(index) = usize::try_from(entry.user_data()) else { continue };
            let Some(slot) = self.slots.get_mut(index) else { continue };
            let Some(under_way) = slot else { continue };
            under_way.piece_done(entry.result());
            if under_way.pieces_left > 0 {
                continue;
            }
            let Some(slot) = slot.take() else { continue };
            if let Ok(index) = u32::try_from(index) {
                self.free.push(index);
            }
            let result = outcome(&self.lun, &slot, slot.result);
            out.push_back(RingIo { token: slot.token, buf: slot.buf, result });
        }
    }
}

fn outcome(lun: &Lun, slot: &Slot, result: i32) -> Result<(), LunError> {
    match u32::try_from(result) {
        Ok(done) if done == slot.len => lun.check_fault_completed(slot.op, slot.offset),
        // A block device is short only at its end: the LUN shrank.
        Ok(_) => {
            lun.check_capacity()?;
            Err(lun.io_error(slot.op, slot.offset, Errno::IO))
        }
        Err(_) => Err(lun.io_error(slot.op, slot.offset, Errno::from_raw_os_error(-result))),
    }
}

impl AsRawFd for Ring {
    /// Readable when a completion can be reaped.
    fn as_raw_fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        // SAFETY: the descriptor is owned by `self.uring` and lives as long as the borrow of `self`.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(self.uring.as_raw_fd()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut out = VecDeque::new();
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                // The kernel still owns the buffers: leaking them is the only sound way out.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            self.reap(&mut out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LunOptions;
    use csv_types::admin::PathFault;

    fn lun(bytes: u64) -> (tempfile::NamedTempFile, Arc<Lun>) {
        let file = tempfile::Builder::new().tempfile_in("/var/tmp").unwrap();
        file.as_file().set_len(bytes).unwrap();
        let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
        (file, Arc::new(lun))
    }

    fn finish(ring: &mut Ring) -> RingIo {
        let [one] = finish_all(ring);
        one
    }

    /// What is in flight, in the order in which it ends.
    fn finish_all<const COUNT: usize>(ring: &mut Ring) -> [RingIo; COUNT] {
        let mut out = VecDeque::new();
        while out.len() < COUNT {
            ring.wait().unwrap();
            ring.completions(&mut out).unwrap();
        }
        Vec::from(out).try_into().unwrap()
    }

    #[test]
    fn a_large_io_that_is_alone_is_cut_and_ends_once() {
        let (file, lun) = lun(4 << 20);
        let mut ring = Ring::new(lun, 4).unwrap();
        let len = (1 << 20) + 4096;
        let mut buf = AlignedBuf::new(len);
        let bytes: Vec<u8> = (0..len).map(|at| u8::try_from(at / 4096 % 251).unwrap()).collect();
        buf.copy_from_slice(&bytes);
        ring.write(1, buf, len, LunOffset(8192)).unwrap();
        assert_eq!(ring.slots.iter().flatten().map(|slot| slot.pieces_left).collect::<Vec<_>>(), [4]);
        // Beside another one it is not cut.
        ring.read(2, AlignedBuf::new(1 << 20), 1 << 20, LunOffset(2 << 20)).unwrap();
        let [first, second] = finish_all(&mut ring);
        assert_eq!(first.token + second.token, 3);
        first.result.unwrap();
        second.result.unwrap();
        ring.read(3, AlignedBuf::new(len), len, LunOffset(8192)).unwrap();
        let done = finish(&mut ring);
        done.result.unwrap();
        assert!(done.buf[..len] == bytes[..]);

        // The device is shorter than the last piece reaches: the I/O fails as a whole.
        file.as_file().set_len(3 << 20).unwrap();
        ring.read(4, AlignedBuf::new(1 << 20), 1 << 20, LunOffset((2 << 20) + (512 << 10))).unwrap();
        assert!(matches!(finish(&mut ring).result, Err(LunError::Shrunk { .. })));
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let (_file, lun) = lun(1 << 20);
        let mut ring = Ring::new(lun, 8).unwrap();
        let mut buf = AlignedBuf::new(8192);
        buf[..8192].fill(0xa5);
        ring.write(7, buf, 8192, LunOffset(4096)).unwrap();
        let done = finish(&mut ring);
        assert_eq!(done.token, 7);
        done.result.unwrap();
        ring.read(8, AlignedBuf::new(4096), 4096, LunOffset(8192)).unwrap();
        let done = finish(&mut ring);
        done.result.unwrap();
        assert!(done.buf[..4096].iter().all(|&b| b == 0xa5));
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    fn bounds_and_room_are_checked() {
        let (_file, lun) = lun(1 << 20);
        let mut ring = Ring::new(lun, 1).unwrap();
        assert!(ring.read(1, AlignedBuf::new(4096), 4096, LunOffset(1 << 20)).is_err());
        assert!(ring.read(1, AlignedBuf::new(4096), 8192, LunOffset(0)).is_err());
        assert!(ring.read(1, AlignedBuf::new(4096), 4096, LunOffset(1)).is_err());
        ring.read(1, AlignedBuf::new(4096), 4096, LunOffset(0)).unwrap();
        assert!(!ring.has_room());
        assert!(ring.read(2, AlignedBuf::new(4096), 4096, LunOffset(0)).is_err());
        finish(&mut ring).result.unwrap();
        assert!(ring.has_room());
    }

    #[test]
    fn injected_faults_reach_the_ring() {
        let (_file, lun) = lun(1 << 20);
        let mut ring = Ring::new(lun.clone(), 4).unwrap();
        ring.read(1, AlignedBuf::new(4096), 4096, LunOffset(0)).unwrap();
        lun.set_fault(PathFault::Fail);
        assert!(finish(&mut ring).result.is_err());
        assert!(ring.read(2, AlignedBuf::new(4096), 4096, LunOffset(0)).is_err());
        lun.set_fault(PathFault::Heal);
        ring.read(3, AlignedBuf::new(4096), 4096, LunOffset(0)).unwrap();
        finish(&mut ring).result.unwrap();
    }
}
