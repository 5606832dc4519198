//! The blocking way of a read or write: a thread of a pool looks at mode and layout, waits for what there is to wait
//! for, and answers.

use super::abi;
use super::abi::IoIn;
use super::device::Device;
use crate::client::VolumeClient;
use crate::client::channel::Caller;
use crate::client::data::WriteAt;
use crate::client::inode::Inode;
use crate::pool::Pool;
use csv_lun::AlignedBuf;
use std::sync::Arc;

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Slow {
    pub(super) device: Arc<Device>,
    pub(super) client: Arc<VolumeClient>,
    pub(super) pool: Pool,
}

/// A write as the kernel asks for it, without its data.
#[derive(Debug, Clone, Copy)]
pub(super) struct WriteWhat {
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) append: bool,
    pub(super) kill_setid: bool,
    pub(super) sync: Sync,
}

impl WriteWhat {
    /// Nothing but the bytes.
    pub(super) fn plain(offset: u64, len: usize) -> WriteWhat {
        WriteWhat { offset, len, append: false, kill_setid: false, sync: Sync::No }
    }

    pub(super) fn is_plain(&self) -> bool {
        !self.append && !self.kill_setid && self.sync == Sync::No
    }
}

/// Must the write be durable before it is answered? The kernel leaves O_SYNC and O_DSYNC to us with direct I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sync {
    No,
    Data,
    All,
}

impl Sync {
    pub(super) fn of(io: IoIn) -> Sync {
        let flags = io.open_flags.cast_signed();
        if io.io_flags & abi::WRITE_CACHE != 0 {
            return Sync::No;
        }
        if flags & libc::O_SYNC == libc::O_SYNC {
            Sync::All
        } else if flags & libc::O_DSYNC != 0 {
            Sync::Data
        } else {
            Sync::No
        }
    }
}

impl Slow {
    pub(super) fn read(&self, caller: Caller, inode: Arc<Inode>, offset: u64, len: usize) {
        let (client, device) = (self.client.clone(), self.device.clone());
        self.pool.run(move || match client.read(caller, &inode, offset, len) {
            Ok(data) => device.reply(caller.request, &data),
            Err(errno) => device.error(caller.request, errno),
        });
    }

    pub(super) fn write(&self, caller: Caller, inode: Arc<Inode>, buf: AlignedBuf, what: WriteWhat) {
        let (client, device) = (self.client.clone(), self.device.clone());
        self.pool.run(move || {
            let write = WriteAt {
                offset: what.offset,
                data: &buf[..what.len],
                append: what.append,
                kill_setid: what.kill_setid,
                for_other: false,
            };
            let mut outcome = client.write(caller, &inode, write);
            client.bufs.put(buf);
            if outcome.is_ok() && what.sync != Sync::No {
                outcome = client.fsync(caller, &inode, what.sync == Sync::Data);
            }
            match outcome {
                Ok(()) => device.wrote(caller.request, what.len),
                Err(errno) => device.error(caller.request, errno),
            }
        });
    }
}
