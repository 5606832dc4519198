//! `/.csvfs` of the FUSE mount on the coordinator: what smbd exports to the other nodes.
//!
//! * `block-<token>` stands for the LUN: block-redirected I/O by LUN offset. Every access is checked against the
//!   layouts of the node whose session the token is, and holds off recalls while it lasts.
//! * `file-<token>-<ino>-<generation>` is a file by its id: fs-redirected I/O by file offset. The coordinator's node does
//!   it as its own, under its own layouts; but a write that is more than an overwrite of whole blocks goes through the
//!   file system, whose page cache outlives this process: what was acknowledged must not go with it.
//!
//! The directory cannot be listed, its names cannot be guessed (the token has 128 random bits), and it is root's
//! alone. It exists while this node coordinates the volume: [`Hidden::open`] to [`Hidden::close`].

use crate::client::VolumeClient;
use crate::client::attrs::attr_of;
use crate::client::channel::Caller;
use crate::client::data::WriteAt;
use crate::client::inode::Inode;
use csv_coordinator::{BlockGuard, Coordinator};
use csv_lun::Lun;
use csv_types::{ByteRange, FS_BLOCK_BYTES, FileId, LunOffset};
use parking_lot::{Condvar, Mutex, RwLock};
use rustix::io::Errno;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Name of the directory in the volume's root.
pub(crate) const DIR_NAME: &[u8] = b".csvfs";
/// Node numbers of hidden inodes have this bit.
const HIDDEN: u64 = 1 << 62;
/// Number of the directory.
pub(crate) const DIR: u64 = HIDDEN;
/// Hidden files looked up and not forgotten, at most; older ones are looked up again.
const ENTRIES_MAX: usize = 65_536;

/// What is done for another node is not carried over to the next coordinator: that node repeats it there, and nothing of it
/// may happen here afterwards.
const FOR_OTHER: Caller = Caller { request: 0, uid: 0, gid: 0, pid: 0, umask: 0, bound: true };

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Entry {
    Block(Arc<str>),
    File(Arc<str>, FileId),
}

/// See [`Hidden::target`].
#[derive(Debug)]
pub(crate) enum Target {
    /// The LUN, for the node with this token.
    Blocks(Arc<str>),
    /// The right to the owner's things is held until the I/O is over.
    File(Arc<Inode>, OwnerRef),
}

/// As long as there is one, [`Hidden::close`] waits.
#[derive(Debug, Clone)]
pub(crate) struct OwnerRef {
    _owner: Arc<Owner>,
}

/// A block I/O that may go to the LUN now, and holds everybody else off as long as it lives.
#[derive(Debug)]
pub(crate) struct BlockIo {
    // Fields are dropped in this order: the next write may come only when this one holds nothing any more.
    _guard: BlockGuard,
    _turn: Option<Turn>,
}

#[derive(Debug)]
struct Known {
    entry: Entry,
    /// References of the kernel.
    lookups: u64,
    /// While there are any, an entry that is a file has one to the inode of this number.
    inode: Option<u64>,
}

#[derive(Debug, Default)]
struct Entries {
    by_node: HashMap<u64, Known>,
    by_entry: HashMap<Entry, u64>,
    next: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Hidden {
    client: Arc<VolumeClient>,
    owner: RwLock<Option<Arc<Owner>>>,
    entries: Mutex<Entries>,
}

struct Owner {
    coordinator: Arc<Coordinator>,
    client: Arc<VolumeClient>,
    lun: Arc<Lun>,
    writing: Arc<Writing>,
    /// Dropped with the last reference, see [`Hidden::close`].
    _used: Sender<Infallible>,
}

/// Block writes under way. A write waits for those that it overlaps: a node repeats a write whose outcome it does
/// not know, and the first try must not come to the LUN after the second and whatever followed it.
#[derive(Debug, Default)]
struct Writing {
    ranges: Mutex<Vec<ByteRange>>,
    changed: Condvar,
}

/// Ends with the write.
#[derive(Debug)]
struct Turn {
    writing: Arc<Writing>,
    range: ByteRange,
}

impl Writing {
    /// Waits for as long as the LUN needs for the writes before.
    fn turn(self: &Arc<Self>, range: ByteRange) -> Turn {
        let mut ranges = self.ranges.lock();
        loop {
            if let Some(turn) = self.take(&mut ranges, range) {
                return turn;
            }
            self.changed.wait(&mut ranges);
        }
    }

    /// The turn, if there is nobody to wait for.
    fn turn_now(self: &Arc<Self>, range: ByteRange) -> Option<Turn> {
        self.take(&mut self.ranges.lock(), range)
    }

    fn take(self: &Arc<Self>, ranges: &mut Vec<ByteRange>, range: ByteRange) -> Option<Turn> {
        if ranges.iter().any(|other| other.overlaps(&range)) {
            return None;
        }
        ranges.push(range);
        Some(Turn { writing: self.clone(), range })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut ranges = self.writing.ranges.lock();
        if let Some(at) = ranges.iter().position(|range| *range == self.range) {
            ranges.swap_remove(at);
        }
        self.writing.changed.notify_all();
    }
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner").finish_non_exhaustive()
    }
}

/// See [`Hidden::open`].
#[derive(Debug)]
pub(crate) struct Open {
    unused: Receiver<Infallible>,
}

/// Attributes of a hidden inode.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HiddenAttr {
    pub(crate) nodeid: u64,
    pub(crate) size: u64,
    pub(crate) directory: bool,
}

impl Hidden {
    /// There is no such directory yet.
    pub(crate) fn new(client: Arc<VolumeClient>) -> Hidden {
        Hidden { client, owner: RwLock::default(), entries: Mutex::default() }
    }

    /// This node coordinates the volume from now on. The result is for [`Hidden::close`].
    pub(crate) fn open(&self, coordinator: Arc<Coordinator>, lun: Arc<Lun>) -> Open {
        let (used, unused) = channel();
        let client = self.client.clone();
        let owner = Owner { coordinator, client, lun, writing: Arc::default(), _used: used };
        *self.owner.write() = Some(Arc::new(owner));
        Open { unused }
    }

    /// This node does not coordinate the volume any more. Nothing is begun for other nodes from now on; waits until what was
    /// begun is over, for up to `limit`. False when it was not in time.
    pub(crate) fn close(&self, open: &Open, limit: Duration) -> bool {
        self.owner.write().take();
        // Nothing is ever sent: it ends when the sender is dropped.
        matches!(open.unused.recv_timeout(limit), Err(RecvTimeoutError::Disconnected))
    }

    /// Is this the number of a hidden inode?
    pub(crate) fn owns(nodeid: u64) -> bool {
        nodeid & HIDDEN != 0
    }

    fn owner(&self) -> Result<Arc<Owner>, Errno> {
        self.owner.read().clone().ok_or(Errno::NOENT)
    }

    /// Looks up the directory itself.
    pub(crate) fn directory(&self) -> Result<HiddenAttr, Errno> {
        self.owner()?;
        Ok(HiddenAttr { nodeid: DIR, size: 0, directory: true })
    }

    /// Looks up a name in the directory.
    pub(crate) fn lookup(&self, name: &[u8]) -> Result<HiddenAttr, Errno> {
        let owner = self.owner()?;
        let entry = parse(name).ok_or(Errno::NOENT)?;
        let token = match &entry {
            Entry::Block(token) | Entry::File(token, _) => token,
        };
        owner.coordinator.token_node(token).ok_or(Errno::NOENT)?;
        let nodeid = self.number(&entry)?;
        self.attr(nodeid).inspect_err(|_| self.forget(nodeid, 1))
    }

    fn number(&self, entry: &Entry) -> Result<u64, Errno> {
        let entries = &mut *self.entries.lock();
        if let Some(nodeid) = entries.by_entry.get(entry)
            && let Some(known) = entries.by_node.get_mut(nodeid)
        {
            known.lookups += 1;
            return Ok(*nodeid);
        }
        if entries.by_node.len() >= ENTRIES_MAX {
            entries.by_entry.clear();
            entries.by_node.drain().for_each(|(_, known)| self.release(&known));
        }
        let inode = match entry {
            Entry::Block(_) => None,
            // Whether the file is still there is seen when its attributes are asked for.
            Entry::File(_, file) => {
                Some(self.client.inodes.reference_unless_other(*file).ok_or(Errno::STALE)?.nodeid)
            }
        };
        entries.next += 1;
        let nodeid = HIDDEN | entries.next;
        entries.by_entry.insert(entry.clone(), nodeid);
        entries.by_node.insert(nodeid, Known { entry: entry.clone(), lookups: 1, inode });
        Ok(nodeid)
    }

    /// The kernel drops references.
    pub(crate) fn forget(&self, nodeid: u64, count: u64) {
        let gone = {
            let entries = &mut *self.entries.lock();
            let Some(known) = entries.by_node.get_mut(&nodeid) else { return };
            known.lookups = known.lookups.saturating_sub(count);
            if known.lookups > 0 {
                return;
            }
            let gone = entries.by_node.remove(&nodeid);
            if let Some(known) = &gone {
                entries.by_entry.remove(&known.entry);
            }
            gone
        };
        if let Some(known) = gone {
            self.release(&known);
        }
    }

    /// An entry that the kernel referenced is gone.
    fn release(&self, known: &Known) {
        if let Some(unused) = known.inode.and_then(|nodeid| self.client.inodes.forget(nodeid, 1)) {
            self.client.forgotten(&unused);
        }
    }

    fn entry(&self, nodeid: u64) -> Result<Entry, Errno> {
        self.entries.lock().by_node.get(&nodeid).map(|known| known.entry.clone()).ok_or(Errno::STALE)
    }

    /// What a hidden file stands for now.
    ///
    /// # Errors
    /// ESTALE for one that nobody looked up or whose file is gone; EACCES for a file without a session of the node that asks
    /// (of blocks that is asked with the right to them).
    pub(crate) fn target(&self, nodeid: u64) -> Result<Target, Errno> {
        let owner = self.owner()?;
        match self.entry(nodeid)? {
            Entry::Block(token) => Ok(Target::Blocks(token)),
            Entry::File(token, file) => {
                owner.coordinator.token_node(&token).ok_or(Errno::ACCESS)?;
                // Looked up each time: the number may have been given to another file.
                let inode = owner.client.inodes.by_file(file).ok_or(Errno::STALE)?;
                Ok(Target::File(inode, OwnerRef { _owner: owner }))
            }
        }
    }

    /// Attributes by number.
    pub(crate) fn attr(&self, nodeid: u64) -> Result<HiddenAttr, Errno> {
        let owner = self.owner()?;
        if nodeid == DIR {
            return self.directory();
        }
        let size = match self.entry(nodeid)? {
            Entry::Block(_) => owner.lun.capacity_bytes(),
            Entry::File(_, file) => owner.size(file)?,
        };
        Ok(HiddenAttr { nodeid, size, directory: false })
    }

    /// The right to read or write these blocks of the LUN without waiting for anybody, for the hot path. `None`: the
    /// blocking way has to look.
    pub(crate) fn block_io(&self, token: &str, range: ByteRange, write: bool) -> Option<BlockIo> {
        let owner = self.owner().ok()?;
        if range.is_empty()
            || range.end > owner.lun.capacity_bytes()
            || write && !range.is_aligned(FS_BLOCK_BYTES)
        {
            return None;
        }
        let turn = if write { Some(owner.writing.turn_now(range)?) } else { None };
        let guard = owner.coordinator.block_begin(token, range.start, range.len(), write).ok()?;
        Some(BlockIo { _guard: guard, _turn: turn })
    }

    /// A block I/O failed on the LUN.
    pub(crate) fn block_failed(&self, error: &csv_lun::LunError) {
        block_service_error(&self.client, error);
    }

    /// Reads; may block.
    pub(crate) fn read(&self, nodeid: u64, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        match self.target(nodeid)? {
            Target::Blocks(token) => self.owner()?.read_block(&token, offset, len),
            Target::File(inode, _owner) => self.client.read(FOR_OTHER, &inode, offset, len),
        }
    }

    /// Writes; may block.
    pub(crate) fn write(&self, nodeid: u64, offset: u64, data: &[u8]) -> Result<(), Errno> {
        match self.target(nodeid)? {
            Target::Blocks(token) => self.owner()?.write_block(&token, offset, data),
            Target::File(inode, _owner) => {
                let write = WriteAt { offset, data, append: false, kill_setid: false, for_other: true };
                self.client.write(FOR_OTHER, &inode, write)
            }
        }
    }

    /// fsync of a hidden file: the LUN, or the file behind it.
    pub(crate) fn fsync(&self, nodeid: u64) -> Result<(), Errno> {
        match self.target(nodeid)? {
            Target::Blocks(_) => self.owner()?.lun.flush().map_err(|_| Errno::IO),
            Target::File(inode, _owner) => self.client.fsync(FOR_OTHER, &inode, false),
        }
    }
}

impl Owner {
    fn size(&self, file: FileId) -> Result<u64, Errno> {
        let inode = self.client.inodes.by_file(file).ok_or(Errno::STALE)?;
        let reply = self.client.chan.call(FOR_OTHER, VolumeClient::getattr_op(&inode))?;
        Ok(self.client.note(&inode, &attr_of(&reply)?).size)
    }

    fn read_block(&self, token: &str, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        // smbd may ask past the end.
        let len = len.min(usize::try_from(self.lun.capacity_bytes().saturating_sub(offset)).unwrap_or(len));
        let _guard = self.coordinator.block_begin(token, offset, len as u64, false)?;
        // What is lent may end within a block, where the file ends.
        let block = u64::from(self.lun.logical_block_bytes());
        let wide = ByteRange::at(offset, len as u64).align_out(block);
        let wide_len = usize::try_from(wide.len()).map_err(|_| Errno::INVAL)?;
        let skip = usize::try_from(offset - wide.start).map_err(|_| Errno::INVAL)?;
        let mut buf = self.client.bufs.get(wide_len);
        self.lun.read_at(&mut buf, wide_len, LunOffset(wide.start)).map_err(|error| self.failed(&error))?;
        Ok(buf[skip..skip + len].to_vec())
    }

    fn write_block(&self, token: &str, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let range = ByteRange::at(offset, data.len() as u64);
        if !range.is_aligned(FS_BLOCK_BYTES) {
            return Err(Errno::INVAL);
        }
        // Before the check: a write that had to wait may have lost its right meanwhile.
        let _turn = self.writing.turn(range);
        let _guard = self.coordinator.block_begin(token, offset, data.len() as u64, true)?;
        let mut buf = self.client.bufs.get(data.len());
        buf[..data.len()].copy_from_slice(data);
        self.lun.write_at(&buf, data.len(), LunOffset(offset)).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &csv_lun::LunError) -> Errno {
        block_service_error(&self.client, error);
        Errno::IO
    }
}

fn block_service_error(client: &VolumeClient, error: &csv_lun::LunError) {
    client.events.report("block-service-error", error.to_string());
}

fn parse(name: &[u8]) -> Option<Entry> {
    let name = std::str::from_utf8(name).ok()?;
    if let Some(token) = name.strip_prefix("block-") {
        return Some(Entry::Block(token.into()));
    }
    let mut parts = name.strip_prefix("file-")?.split('-');
    let token = parts.next()?.into();
    let ino = parts.next()?.parse().ok()?;
    let generation = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some(Entry::File(token, FileId { ino, generation }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_stand_for() {
        assert_eq!(parse(b"block-abc"), Some(Entry::Block("abc".into())));
        let file = FileId { ino: 12, generation: 7 };
        assert_eq!(parse(b"file-abc-12-7"), Some(Entry::File("abc".into(), file)));
        for bad in [&b"file-abc-12"[..], b"file-abc-12-7-8", b"file-abc-x-7", b"other", b"\xff"] {
            assert_eq!(parse(bad), None);
        }
    }

    #[test]
    fn a_repeated_write_waits_for_its_first_try() {
        let writing = Arc::new(Writing::default());
        let first = writing.turn(ByteRange::new(0, 8192));
        let _elsewhere = writing.turn(ByteRange::new(8192, 12288));
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _second = writing.turn(ByteRange::new(4096, 8192));
                order.lock().push("second");
            });
            // Time for the second to overtake, if it could.
            for _ in 0..1000 {
                std::thread::yield_now();
            }
            order.lock().push("first");
            assert!(writing.turn_now(ByteRange::new(0, 4096)).is_none());
            drop(first);
        });
        assert_eq!(*order.lock(), ["first", "second"]);
    }

    #[test]
    fn hidden_numbers_are_told_from_others() {
        assert!(Hidden::owns(DIR) && !Hidden::owns(77));
    }
}
