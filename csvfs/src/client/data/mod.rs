//! Reads and writes of file data, the whole way: layouts, direct or redirected I/O, small I/O through the
//! coordinator, unaligned writes, appends. The hot path of the FUSE pump answers what a held layout allows at once
//! and sends everything else here, into a thread that may block.
//!
//! Each function is a loop: look at the mode, look at the layout, do the I/O or change what is in the way, look
//! again. Every round makes progress or the loop ends at the operation's time-out or after [`ROUNDS_MAX`] rounds. A
//! direct I/O that fails on its path is repeated block-redirected, so the application sees no error.
//!
//! * [`read`], [`mod@write`]: the loops; * [`blocks`]: LUN blocks, direct or over SMB; * [`layout`]: grants;
//! * [`sync`]: sizes, times and durability.

mod blocks;
mod layout;
mod read;
mod sync;
mod write;

use super::channel::Caller;
use super::inode::Inode;
use super::{VolumeClient, proto_now};
use csv_layout::cache::{IoToken, Outcome, Return};
use csv_lun::LunError;
use csv_types::ModeKind;
use rustix::io::Errno;
use std::sync::Arc;
use std::time::Instant;

/// Rounds of one operation before it goes through the coordinator whatever else.
const ROUNDS_MAX: u32 = 64;
/// A write up to this size into space that is not lent goes along with the request, in bytes.
const SMALL_WRITE_MAX: usize = 64 << 10;
/// Largest request over SMB, in bytes. smbd's buffers are not page-aligned, and FUSE on the coordinator splits what
/// touches more than 256 pages: a full MiB would reach the block service in pieces that are no whole blocks.
pub(crate) const SMB_BYTES_MAX: usize = 512 << 10;

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
    /// Written for another node, for which only an overwrite of whole blocks is durable enough: see `fuse::hidden`.
    pub(crate) for_other: bool,
}

/// Where the blocks of an I/O go in this round.
pub(super) enum Blocks {
    Direct(Arc<csv_lun::Lun>),
    Redirected(Arc<csv_smb::pool::SmbPool>, String),
}

/// Which way data goes in one round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// By LUN blocks, under a layout.
    Blocks,
    /// Through the coordinator's file system.
    Fs,
    /// By the control protocol: redirected, and SMB cannot be used now.
    Call,
}

pub(super) enum Step<T> {
    Done(T),
    Again,
}

impl VolumeClient {
    /// A direct I/O failed: the path is given up for now, or the node is fenced, or the fault is the caller's.
    pub(crate) fn direct_failed(&self, error: &LunError) -> Result<(), Errno> {
        match error {
            LunError::PathFailed { .. } => {
                self.path_failed(&error.to_string());
                Ok(())
            }
            LunError::Fenced { .. } => {
                // Whoever waits goes on when the cluster has let this node in again.
                self.refused_by_lun(error.to_string());
                Ok(())
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

    /// The beginning of each round of a read or write: which way it goes now. Waits out a pause, which does not count
    /// against the deadline.
    ///
    /// # Errors
    /// EINTR when interrupted; EIO after the deadline or when the volume is unavailable here.
    pub(super) fn next_way(&self, caller: Caller, deadline: &mut Instant) -> Result<Way, Errno> {
        loop {
            if self.chan.take_interrupt(caller.request) {
                return Err(Errno::INTR);
            }
            if Instant::now() >= *deadline {
                return Err(Errno::IO);
            }
            match self.modes.kind() {
                ModeKind::Unavailable => return Err(Errno::IO),
                ModeKind::Paused => {
                    self.wait_paused(caller)?;
                    *deadline = Instant::now() + self.op_timeout;
                }
                ModeKind::FsRedirected | ModeKind::BlockRedirected if self.smb_on_hold() => {
                    return Ok(Way::Call);
                }
                ModeKind::FsRedirected => return Ok(Way::Fs),
                ModeKind::Direct | ModeKind::BlockRedirected => return Ok(Way::Blocks),
            }
        }
    }

    /// The volume is in maintenance: data operations wait until that is over, however long it takes, or until they are
    /// interrupted.
    ///
    /// # Errors
    /// EINTR.
    pub(super) fn wait_paused(&self, caller: Caller) -> Result<(), Errno> {
        let interrupted = std::cell::Cell::new(false);
        self.modes.wait_change(ModeKind::Paused, || {
            interrupted.set(interrupted.get() || self.chan.take_interrupt(caller.request));
            interrupted.get()
        });
        if interrupted.get() { Err(Errno::INTR) } else { Ok(()) }
    }

    /// The path to the LUN failed: redirect, and probe until it is back.
    pub(crate) fn path_failed(&self, why: &str) {
        self.modes.path_failed(why);
    }

    /// The token of an I/O that needs no read-modify-write.
    pub(crate) fn plain_hit(&self, inode: &Inode, outcome: Outcome) -> Option<IoToken> {
        match outcome {
            Outcome::Hit(token) => Some(token),
            Outcome::HitRmw(token) => {
                self.end_io(inode, token, false);
                None
            }
            Outcome::Busy | Outcome::Miss => None,
        }
    }

    /// Ends an I/O under a layout and sends what became free to return.
    pub(crate) fn end_io(&self, inode: &Inode, token: IoToken, wrote: bool) {
        let mut returns: Vec<Return> = Vec::new();
        let mut io = inode.io.lock();
        io.cache.end(token, wrote, &mut returns);
        if wrote {
            io.wrote_at = Some(proto_now());
            io.on_device.made(csv_types::Epoch::default());
        }
        self.send_returns(inode.file, &mut io, &returns);
    }
}
