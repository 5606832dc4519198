//! LUN blocks: straight to the device, or over SMB to the coordinator's block service.

use super::{Blocks, SMB_BYTES_MAX};
use crate::client::channel::Caller;
use crate::client::inode::Inode;
use crate::client::{VolumeClient, count, now_ms};
use csv_types::{ByteRange, FS_BLOCK_BYTES, LunOffset, ModeKind};
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Pause before redirected blocks are tried again.
const SMB_RETRY_PAUSE: Duration = Duration::from_millis(20);
/// So long SMB is not tried again after an error that a repetition does not mend, in milliseconds.
const SMB_HOLD_MS: u64 = 5_000;

impl VolumeClient {
    /// Which way blocks go now.
    pub(super) fn blocks(&self) -> Result<Blocks, Errno> {
        match (self.modes.kind(), self.modes.lun()) {
            (ModeKind::Direct, Some(lun)) => Ok(Blocks::Direct(lun)),
            _ => Ok(Blocks::Redirected(self.smb_pool()?, self.smb_blocks())),
        }
    }

    /// Bytes of the smallest read of the LUN.
    fn read_block(&self) -> u64 {
        self.modes.lun().map_or(FS_BLOCK_BYTES, |lun| u64::from(lun.logical_block_bytes()))
    }

    /// Reads any bytes of the LUN. `false`: the way changed under it, look again.
    pub(super) fn read_blocks(
        &self,
        blocks: &Blocks,
        place: LunOffset,
        out: &mut [u8],
    ) -> Result<bool, Errno> {
        let block = self.read_block();
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
    pub(super) fn write_blocks(&self, blocks: &Blocks, place: LunOffset, data: &[u8]) -> Result<bool, Errno> {
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

    pub(super) fn smb_read(
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
    /// place), since the layout may have been recalled or the server restarted meanwhile. A server that goes down can
    /// also refuse the password or cut a read short.
    pub(super) fn smb_done(
        &self,
        done: Result<usize, csv_smb::pool::SmbError>,
        want: usize,
    ) -> Result<bool, Errno> {
        match done {
            Ok(got) if got == want => Ok(true),
            Err(error) if error.is_fatal() => {
                self.smb_useless(&error);
                Ok(false)
            }
            other => {
                match other {
                    Ok(got) => tracing::debug!(got, want, "a short redirected read is repeated"),
                    Err(error) => tracing::debug!(%error, "redirected I/O is repeated"),
                }
                std::thread::sleep(SMB_RETRY_PAUSE);
                Ok(false)
            }
        }
    }

    /// SMB does not work and will not by itself: for a while redirected data goes by the control protocol.
    pub(super) fn smb_useless(&self, error: &csv_smb::pool::SmbError) {
        let (now, until) = (now_ms(), &self.smb_hold_until_ms);
        if until.swap(now + SMB_HOLD_MS, Ordering::AcqRel) < now {
            let text = format!("redirected I/O goes by the control protocol, which is slower: {error}");
            self.events.report("smb-error", text);
        }
    }

    pub(crate) fn smb_on_hold(&self) -> bool {
        now_ms() < self.smb_hold_until_ms.load(Ordering::Acquire)
    }

    /// What stands for the LUN on the share.
    pub(crate) fn smb_blocks(&self) -> String {
        format!("/.csvfs/block-{}", self.facts.read().smb_token)
    }

    /// A redirected I/O succeeded: by LUN blocks or through the file system; `wrote` is the end of a write.
    pub(crate) fn redirected(&self, inode: &Inode, blocks: bool, wrote: Option<u64>) {
        let counts = &self.counts;
        let counter = match (blocks, wrote.is_some()) {
            (true, true) => &counts.block_writes,
            (true, false) => &counts.block_reads,
            (false, true) => &counts.fs_writes,
            (false, false) => &counts.fs_reads,
        };
        count(counter, 1);
        let Some(end) = wrote else { return };
        let mut io = inode.io.lock();
        if blocks {
            io.last_end = end;
            return;
        }
        self.dirty_at_coordinator(&mut io);
        io.known_size = io.known_size.max(end);
        drop(io);
        self.meta.changed(&[inode.file], &[]);
    }

    /// What stands for a file on the share.
    pub(crate) fn smb_file(&self, inode: &Inode) -> String {
        let token = self.facts.read().smb_token.clone();
        format!("/.csvfs/file-{token}-{}-{}", inode.file.ino, inode.file.generation)
    }

    pub(super) fn smb_retry(
        &self,
        caller: Caller,
        error: &csv_smb::pool::SmbError,
        deadline: Instant,
    ) -> Result<(), Errno> {
        if self.chan.take_interrupt(caller.request) {
            return Err(Errno::INTR);
        }
        if Instant::now() >= deadline {
            self.events.report("smb-error", format!("file-system redirected I/O failed: {error}"));
            return Err(Errno::IO);
        }
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    }
}
