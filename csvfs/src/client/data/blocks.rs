//! LUN blocks: straight to the device, or over SMB to the coordinator's block service.

use super::{Blocks, SMB_BYTES_MAX};
use crate::client::channel::Caller;
use crate::client::inode::Inode;
use crate::client::{VolumeClient, count};
use csv_types::{ByteRange, LunOffset, ModeKind};
use rustix::io::Errno;
use std::time::{Duration, Instant};

impl VolumeClient {
    /// Which way blocks go now.
    pub(super) fn blocks(&self) -> Result<Blocks, Errno> {
        match (self.modes.kind(), self.modes.lun()) {
            (ModeKind::Direct, Some(lun)) => Ok(Blocks::Direct(lun)),
            _ => {
                let path = format!("/.csvfs/block-{}", self.facts.read().smb_token);
                Ok(Blocks::Redirected(self.smb_pool()?, path))
            }
        }
    }

    pub(super) fn lun_block(&self) -> u64 {
        self.modes.lun().map_or(4096, |lun| u64::from(lun.logical_block_bytes()))
    }

    /// Reads any bytes of the LUN. `false`: the way changed under it, look again.
    pub(super) fn read_blocks(
        &self,
        blocks: &Blocks,
        place: LunOffset,
        out: &mut [u8],
    ) -> Result<bool, Errno> {
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
    /// place), since the layout may have been recalled or the server restarted meanwhile.
    pub(super) fn smb_done(
        &self,
        done: Result<usize, csv_smb::pool::SmbError>,
        want: usize,
    ) -> Result<bool, Errno> {
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

    pub(super) fn smb_file(&self, inode: &Inode) -> String {
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
        if error.is_fatal() || Instant::now() >= deadline {
            self.events.report("smb-error", format!("file-system redirected I/O failed: {error}"));
            return Err(Errno::IO);
        }
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    }
}
