//! Sizes and times of what was written under a grant, and making it durable.

use crate::client::VolumeClient;
use crate::client::channel::Caller;
use crate::client::inode::Inode;
use csv_layout::Access;
use csv_proto as proto;
use csv_types::{ByteRange, Epoch};
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
        let told_here = self.chan.remote_epoch().is_none();
        let outcome = self.chan.call(caller, op);
        self.meta.changed(&[inode.file], &[]);
        let mut io = inode.io.lock();
        match outcome {
            Ok(_) => {
                if let Some(size) = size {
                    io.cache.size_committed(size);
                    // Another node's coordinator has made it durable before it answered.
                    if told_here || self.chan.remote_epoch().is_none() {
                        self.dirty_at_coordinator(&mut io);
                    }
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

    /// Has [`VolumeClient::flush`] anything to do for this file?
    pub(crate) fn has_uncommitted(&self, inode: &Inode) -> bool {
        let io = inode.io.lock();
        io.lost || io.wrote_at.is_some() || io.cache.eof().is_some_and(|eof| eof.dirty)
    }

    /// flush (close) and the beginning of fsync: commits, and tells once when acknowledged data may be lost (safety
    /// rule 7): the lease ended over a size that was not committed, or a coordinator went down without writing
    /// back what went through it. The data that lies on the LUN under a layout is not concerned.
    ///
    /// # Errors
    /// EIO for lost data; those of the commit.
    pub(crate) fn flush(&self, caller: Caller, inode: &Inode) -> Result<(), Errno> {
        self.commit(caller, inode)?;
        if std::mem::take(&mut inode.io.lock().lost) {
            let text =
                format!("data written to file {} may be lost; its fsync or close reports EIO", inode.file);
            self.events.report("data-lost", text);
            return Err(Errno::IO);
        }
        Ok(())
    }

    /// A coordinator ended without writing back: what depended on it is lost. A size that only this node knows is
    /// not: what was written is on the LUN, the space for it was durable when it was lent, and the next
    /// coordinator is told the size.
    pub(crate) fn unsynced_lost(&self, epoch: Epoch) {
        for inode in self.inodes.all() {
            let mut io = inode.io.lock();
            if io.at_coordinator.older_than(epoch) {
                io.lost = true;
                let gone = io.at_coordinator.begin();
                io.at_coordinator.done(gone);
            }
        }
    }

    /// fsync(2), fdatasync(2). What this node wrote to the LUN is flushed by this node; size and times, and
    /// whatever went through the coordinator, are made durable there.
    pub(crate) fn fsync(&self, caller: Caller, inode: &Arc<Inode>, datasync: bool) -> Result<(), Errno> {
        self.flush(caller, inode)?;
        let (on_device, at_coordinator, ask_coordinator) = {
            let io = inode.io.lock();
            let held = io.cache.covers(ByteRange::new(0, io.known_size), Access::Write);
            let ask = !datasync || io.at_coordinator.any() || !held || !self.lease_alive();
            (io.on_device.any().then(|| io.on_device.begin()), io.at_coordinator.begin(), ask)
        };
        if on_device.is_some() {
            self.flush_lun()?;
        }
        if ask_coordinator || !self.modes.is_direct() {
            self.sync_there(caller, inode, at_coordinator, datasync)?;
        }
        if let Some(begun) = on_device {
            inode.io.lock().on_device.done(begun);
        }
        Ok(())
    }

    /// Makes what had been done at the coordinator when `begun` was noted durable there.
    fn sync_there(&self, caller: Caller, inode: &Inode, begun: u64, datasync: bool) -> Result<(), Errno> {
        let op = Op::Fsync(proto::Fsync { file: Some(inode.file.into()), datasync, dir: false });
        self.chan.call(caller, op)?;
        inode.io.lock().at_coordinator.done(begun);
        Ok(())
    }

    /// A size that a recall took along was told to a coordinator that had others waiting for it.
    fn sync_size_left(&self, inode: &Inode) -> Result<(), Errno> {
        let begun = {
            let mut io = inode.io.lock();
            if !std::mem::take(&mut io.size_left) {
                return Ok(());
            }
            io.at_coordinator.begin()
        };
        let synced = self.sync_there(Caller::default(), inode, begun, true);
        inode.io.lock().size_left |= synced.is_err();
        synced
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
            let committed = if self.has_uncommitted(&inode) {
                let committed = self.commit(Caller::default(), &inode);
                self.closed(&inode);
                committed
            } else {
                Ok(())
            };
            let committed = committed.and_then(|()| self.sync_size_left(&inode));
            if let Err(error) = committed {
                tracing::debug!(%error, file = %inode.file, "commit is tried again later");
                if error == Errno::IO {
                    // Nobody answers: the others would wait as long.
                    return;
                }
            }
        }
    }
}
