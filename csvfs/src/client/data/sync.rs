//! Sizes and times of what was written under a grant, and making it durable.

use crate::client::VolumeClient;
use crate::client::channel::Caller;
use crate::client::inode::Inode;
use csv_layout::Access;
use csv_proto as proto;
use csv_types::ByteRange;
use proto::call::Op;
use rustix::io::Errno;
use std::sync::Arc;

impl VolumeClient {
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

    pub(super) fn flush_lun(&self) -> Result<(), Errno> {
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
}
