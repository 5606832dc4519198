//! `/.csvfs` of the FUSE mount on the coordinator: what smbd exports to the other nodes.
//!
//! * `block-<token>` stands for the LUN: block-redirected I/O by LUN offset. Every access is checked against the
//!   layouts of the node whose session the token is, and holds off recalls while it lasts.
//! * `file-<token>-<ino>-<generation>` is a file by its id: fs-redirected I/O by file offset, through the
//!   coordinator's file system.
//!
//! The directory cannot be listed, its names cannot be guessed (the token has 128 random bits), and it is root's
//! alone. It does not exist on nodes that do not coordinate the volume.

use crate::client::VolumeClient;
use crate::client::channel::Caller;
use csv_coordinator::Coordinator;
use csv_lun::Lun;
use csv_proto as proto;
use csv_types::{ByteRange, FileId, LunOffset};
use parking_lot::{Condvar, Mutex};
use proto::call::Op;
use proto::reply::Body;
use rustix::io::Errno;
use std::collections::HashMap;
use std::sync::Arc;

/// Name of the directory in the volume's root.
pub(crate) const DIR_NAME: &[u8] = b".csvfs";
/// Node numbers of hidden inodes have this bit.
const HIDDEN: u64 = 1 << 62;
/// Number of the directory.
pub(crate) const DIR: u64 = HIDDEN;
/// Hidden files looked up and not forgotten, at most; older ones are looked up again.
const ENTRIES_MAX: usize = 65_536;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Entry {
    Block(String),
    File(String, FileId),
}

#[derive(Debug, Default)]
struct Entries {
    by_node: HashMap<u64, Entry>,
    by_entry: HashMap<Entry, u64>,
    next: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Hidden {
    owner: Option<Owner>,
    entries: Mutex<Entries>,
}

struct Owner {
    coordinator: Arc<Coordinator>,
    client: Arc<VolumeClient>,
    lun: Arc<Lun>,
    writing: Writing,
}

/// Block writes under way. A write waits for those that it overlaps: a node repeats a write whose outcome it does
/// not know, and the first try must not come to the LUN after the second and whatever followed it.
#[derive(Debug, Default)]
struct Writing {
    ranges: Mutex<Vec<ByteRange>>,
    changed: Condvar,
}

/// Ends with the write.
struct Turn<'a> {
    writing: &'a Writing,
    range: ByteRange,
}

impl Writing {
    /// Waits for as long as the LUN needs for the writes before.
    fn turn(&self, range: ByteRange) -> Turn<'_> {
        let mut ranges = self.ranges.lock();
        while ranges.iter().any(|other| other.overlaps(&range)) {
            self.changed.wait(&mut ranges);
        }
        ranges.push(range);
        Turn { writing: self, range }
    }
}

impl Drop for Turn<'_> {
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

/// Attributes of a hidden inode.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HiddenAttr {
    pub(crate) nodeid: u64,
    pub(crate) size: u64,
    pub(crate) directory: bool,
}

impl Hidden {
    /// On a node that does not coordinate the volume: there is no such directory.
    pub(crate) fn none() -> Hidden {
        Hidden::default()
    }

    pub(crate) fn new(coordinator: Arc<Coordinator>, client: Arc<VolumeClient>, lun: Arc<Lun>) -> Hidden {
        let owner = Owner { coordinator, client, lun, writing: Writing::default() };
        Hidden { owner: Some(owner), entries: Mutex::default() }
    }

    /// Is this the number of a hidden inode?
    pub(crate) fn owns(nodeid: u64) -> bool {
        nodeid & HIDDEN != 0
    }

    fn owner(&self) -> Result<&Owner, Errno> {
        self.owner.as_ref().ok_or(Errno::NOENT)
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
        let nodeid = self.number(&entry);
        self.attr(nodeid)
    }

    fn number(&self, entry: &Entry) -> u64 {
        let mut entries = self.entries.lock();
        if let Some(nodeid) = entries.by_entry.get(entry) {
            return *nodeid;
        }
        if entries.by_node.len() >= ENTRIES_MAX {
            entries.by_node.clear();
            entries.by_entry.clear();
        }
        entries.next += 1;
        let nodeid = HIDDEN | entries.next;
        entries.by_entry.insert(entry.clone(), nodeid);
        entries.by_node.insert(nodeid, entry.clone());
        nodeid
    }

    fn entry(&self, nodeid: u64) -> Result<Entry, Errno> {
        self.entries.lock().by_node.get(&nodeid).cloned().ok_or(Errno::STALE)
    }

    /// Attributes by number.
    pub(crate) fn attr(&self, nodeid: u64) -> Result<HiddenAttr, Errno> {
        let owner = self.owner()?;
        if nodeid == DIR {
            return self.directory();
        }
        let size = match self.entry(nodeid)? {
            Entry::Block(_) => owner.lun.capacity_bytes(),
            Entry::File(_, file) => owner.attr(file)?.size,
        };
        Ok(HiddenAttr { nodeid, size, directory: false })
    }

    /// Reads.
    pub(crate) fn read(&self, nodeid: u64, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let owner = self.owner()?;
        match self.entry(nodeid)? {
            Entry::Block(token) => owner.read_block(&token, offset, len),
            Entry::File(token, file) => owner.read_file(&token, file, offset, len),
        }
    }

    /// Writes.
    pub(crate) fn write(&self, nodeid: u64, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let owner = self.owner()?;
        match self.entry(nodeid)? {
            Entry::Block(token) => owner.write_block(&token, offset, data),
            Entry::File(token, file) => owner.write_file(&token, file, offset, data),
        }
    }

    /// fsync of a hidden file: the LUN, or the file behind it.
    pub(crate) fn fsync(&self, nodeid: u64) -> Result<(), Errno> {
        let owner = self.owner()?;
        match self.entry(nodeid)? {
            Entry::Block(_) => owner.lun.flush().map_err(|_| Errno::IO),
            Entry::File(_, file) => {
                let op = Op::Fsync(proto::Fsync { file: Some(file.into()), datasync: false, dir: false });
                owner.client.chan.call(Caller::default(), op).map(|_| ())
            }
        }
    }
}

impl Owner {
    fn attr(&self, file: FileId) -> Result<proto::Attr, Errno> {
        let op = Op::Getattr(proto::GetAttr { file: Some(file.into()) });
        match self.client.chan.call(Caller::default(), op)?.body {
            Some(Body::Attr(attr)) => Ok(attr),
            Some(_) | None => Err(Errno::PROTO),
        }
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
        // Before the check: a write that had to wait may have lost its right meanwhile.
        let _turn = self.writing.turn(ByteRange::at(offset, data.len() as u64));
        let _guard = self.coordinator.block_begin(token, offset, data.len() as u64, true)?;
        let mut buf = self.client.bufs.get(data.len());
        buf[..data.len()].copy_from_slice(data);
        self.lun.write_at(&buf, data.len(), LunOffset(offset)).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &csv_lun::LunError) -> Errno {
        self.client.events.report("block-service-error", error.to_string());
        Errno::IO
    }

    fn read_file(&self, token: &str, file: FileId, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        self.coordinator.token_node(token).ok_or(Errno::ACCESS)?;
        let len = u32::try_from(len).map_err(|_| Errno::INVAL)?;
        let op = Op::Read(proto::Read { file: Some(file.into()), offset, len });
        match self.client.chan.call(Caller::default(), op)?.body {
            Some(Body::Data(data)) => Ok(data.data.into()),
            Some(_) | None => Err(Errno::PROTO),
        }
    }

    fn write_file(&self, token: &str, file: FileId, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.coordinator.token_node(token).ok_or(Errno::ACCESS)?;
        let op = Op::Write(proto::Write {
            file: Some(file.into()),
            offset,
            data: bytes::Bytes::copy_from_slice(data),
            append: false,
            kill_suidgid: false,
            sync: false,
        });
        let outcome = self.client.chan.call(Caller::default(), op);
        // To the coordinator this is a write of this node, whose own lease stays: the reply tells it what is new.
        self.client.meta.changed(&[file], &[]);
        outcome.map(|_| ())
    }
}

fn parse(name: &[u8]) -> Option<Entry> {
    let name = std::str::from_utf8(name).ok()?;
    if let Some(token) = name.strip_prefix("block-") {
        return Some(Entry::Block(token.to_owned()));
    }
    let mut parts = name.strip_prefix("file-")?.split('-');
    let token = parts.next()?.to_owned();
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
        let writing = Writing::default();
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
            drop(first);
        });
        assert_eq!(*order.lock(), ["first", "second"]);
    }

    #[test]
    fn other_nodes_have_no_hidden_directory() {
        assert_eq!(Hidden::none().lookup(b"block-abc").unwrap_err(), Errno::NOENT);
        assert!(Hidden::owns(DIR) && !Hidden::owns(77));
    }
}
