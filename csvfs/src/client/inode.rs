//! The inodes that the kernel knows on this node.
//!
//! The kernel names an inode by a node number; here that is the inode number (1 for the root), because fuser shows
//! it as `st_ino` too, and all nodes have to see the same one. When the file system reuses an inode number, the new
//! file has another generation: the kernel then makes its old inode bad and takes a new one under the same node
//! number, and this table replaces its entry. The count of the kernel's references (`nlookup`) goes on over both;
//! at zero the inode is forgotten and what is held of its layout goes back.

use csv_layout::cache::LayoutCache;
use csv_proto as proto;
use csv_types::{Epoch, FileId};
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// FUSE node number of the volume's root.
pub(crate) const ROOT: u64 = 1;

/// An inode that the kernel references.
#[derive(Debug)]
pub(crate) struct Inode {
    /// The kernel's number.
    pub(crate) nodeid: u64,
    /// The coordinator's name for it.
    pub(crate) file: FileId,
    /// Set-id bits may have to be cleared by a write.
    pub(crate) setid: AtomicBool,
    /// Some lock was taken through this node; closing has to release.
    pub(crate) locked: AtomicBool,
    /// Layout and what belongs to it.
    pub(crate) io: Mutex<FileIo>,
}

/// What the node knows and owes about a file's data.
#[derive(Debug, Default)]
pub(crate) struct FileIo {
    /// Grants held.
    pub(crate) cache: LayoutCache,
    /// Size in the newest attributes or grant; a hint unless the end-of-file right is held.
    pub(crate) known_size: u64,
    /// When this node last wrote under a grant, if the coordinator was not told yet.
    pub(crate) wrote_at: Option<proto::Time>,
    /// Bytes written by small writes through the coordinator since the last grant.
    pub(crate) small_written: u64,
    /// Reads answered by the coordinator since the last grant.
    pub(crate) small_reads: u32,
    /// Space to ask for ahead of a sequential writer, in bytes.
    pub(crate) ahead: u64,
    /// Space behind the end is being asked for.
    pub(crate) asking_ahead: bool,
    /// How often that was answered.
    pub(crate) asked: u64,
    /// The last time little came of it: the volume is nearly full. Until the next write that needs space, none is asked
    /// for ahead.
    pub(crate) no_ahead: bool,
    /// End of the last write, to see sequential ones.
    pub(crate) last_end: u64,
    /// The file cannot be lent; ask again after this.
    pub(crate) redirected_until: Option<Instant>,
    /// What may be dirty at the coordinator only: fsync has to go there.
    pub(crate) at_coordinator: Unsynced,
    /// A size was given back that the coordinator had not been told: it is made durable with the next commits.
    pub(crate) size_left: bool,
    /// Acknowledged data may be lost: the next fsync says so, once.
    pub(crate) lost: bool,
    /// Device writes that no flush of the LUN has covered.
    pub(crate) on_device: Unsynced,
}

/// Changes that are not durable yet. Counted, because a sync covers only what was there when it began, and a second
/// one that begins meanwhile must not believe that the first is over.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Unsynced {
    made: u64,
    synced: u64,
    since: Epoch,
}

impl Unsynced {
    /// One more change, made under this ownership.
    pub(crate) fn made(&mut self, epoch: Epoch) {
        if !self.any() {
            self.since = epoch;
        }
        self.made += 1;
    }

    /// Is anything not durable?
    pub(crate) fn any(&self) -> bool {
        self.made > self.synced
    }

    /// To be noted when a sync begins.
    pub(crate) fn begin(&self) -> u64 {
        self.made
    }

    /// The sync that noted this is over.
    pub(crate) fn done(&mut self, begun: u64) {
        self.synced = self.synced.max(begun);
    }

    /// Is something not durable that was made before this ownership?
    pub(crate) fn older_than(&self, epoch: Epoch) -> bool {
        self.any() && self.since < epoch
    }
}

#[derive(Debug, Default)]
struct Nodes {
    root: FileId,
    by_node: HashMap<u64, (Arc<Inode>, u64)>,
}

impl Nodes {
    fn number(&self, file: FileId) -> u64 {
        if file == self.root { ROOT } else { file.ino }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct InodeTable {
    nodes: RwLock<Nodes>,
    replaced: AtomicU64,
}

impl InodeTable {
    pub(crate) fn new() -> InodeTable {
        InodeTable::default()
    }

    /// The inode behind a number of the kernel.
    pub(crate) fn get(&self, nodeid: u64) -> Option<Arc<Inode>> {
        self.nodes.read().by_node.get(&nodeid).map(|(inode, _)| inode.clone())
    }

    /// Changes when a number may stand for another inode than before; for those who remember an inode.
    pub(crate) fn replaced(&self) -> u64 {
        self.replaced.load(Ordering::Acquire)
    }

    /// The inode of a file, if the kernel references it.
    pub(crate) fn by_file(&self, file: FileId) -> Option<Arc<Inode>> {
        let nodes = self.nodes.read();
        let (inode, _) = nodes.by_node.get(&nodes.number(file))?;
        (inode.file == file).then(|| inode.clone())
    }

    /// The root; known since the first Welcome.
    pub(crate) fn set_root(&self, file: FileId) {
        let mut nodes = self.nodes.write();
        nodes.root = file;
        nodes.by_node.entry(ROOT).or_insert_with(|| (Arc::new(Inode::new(ROOT, file)), u64::MAX / 2));
    }

    /// One more kernel reference to a file.
    pub(crate) fn reference(&self, file: FileId) -> Arc<Inode> {
        let mut nodes = self.nodes.write();
        let nodeid = nodes.number(file);
        let (inode, count) =
            nodes.by_node.entry(nodeid).or_insert_with(|| (Arc::new(Inode::new(nodeid, file)), 0));
        if inode.file != file {
            *inode = Arc::new(Inode::new(nodeid, file));
            self.replaced.fetch_add(1, Ordering::Release);
        }
        *count += 1;
        inode.clone()
    }

    /// As `reference`, but a number that stands for another file stays with that.
    pub(crate) fn reference_unless_other(&self, file: FileId) -> Option<Arc<Inode>> {
        let mut nodes = self.nodes.write();
        let nodeid = nodes.number(file);
        let (inode, count) =
            nodes.by_node.entry(nodeid).or_insert_with(|| (Arc::new(Inode::new(nodeid, file)), 0));
        if inode.file != file {
            return None;
        }
        *count += 1;
        Some(inode.clone())
    }

    /// The kernel drops references; the inode when none is left.
    pub(crate) fn forget(&self, nodeid: u64, count: u64) -> Option<Arc<Inode>> {
        if nodeid == ROOT {
            return None;
        }
        let mut nodes = self.nodes.write();
        let (_, references) = nodes.by_node.get_mut(&nodeid)?;
        *references = references.saturating_sub(count);
        if *references > 0 {
            return None;
        }
        self.replaced.fetch_add(1, Ordering::Release);
        nodes.by_node.remove(&nodeid).map(|(inode, _)| inode)
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<Arc<Inode>> {
        self.nodes.read().by_node.values().map(|(inode, _)| inode.clone()).collect()
    }
}

impl Inode {
    fn new(nodeid: u64, file: FileId) -> Inode {
        Inode {
            nodeid,
            file,
            setid: AtomicBool::new(false),
            locked: AtomicBool::new(false),
            io: Mutex::new(FileIo::default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use csv_layout::cache::Outcome;
    use csv_types::ByteRange;

    #[test]
    fn counts_decide_and_a_reused_number_is_another_file() {
        let table = InodeTable::new();
        let file = FileId { ino: 12, generation: 3 };
        let first = table.reference(file);
        assert_eq!(table.reference(file).nodeid, first.nodeid);
        assert!(table.forget(first.nodeid, 1).is_none());
        assert_eq!(table.forget(first.nodeid, 1).unwrap().file, file);
        assert!(table.get(first.nodeid).is_none());
        assert_ne!(table.replaced(), 0, "whoever remembers it has to look again");
        assert!(table.by_file(file).is_none());
        let old = table.reference(file);
        let reused = FileId { ino: 12, generation: 4 };
        assert_eq!(table.reference(reused).file, reused);
        assert!(table.by_file(file).is_none());
        assert!(table.forget(old.nodeid, 1).is_none());
        assert_eq!(table.forget(old.nodeid, 1).unwrap().file, reused);
    }

    #[test]
    fn the_last_block_is_no_right_to_move_the_end() {
        let mut io = FileIo::default();
        let extent = proto::LayoutExtent { file_offset: 0, len: 4096, zeros: false, lun_offset: 1 << 20 };
        let exclusive = proto::Access::Exclusive.into();
        let grant = proto::LayoutGrant {
            seq: 1,
            end: 4096,
            access: exclusive,
            size: 1000,
            extents: vec![extent],
            ..proto::LayoutGrant::default()
        };
        io.take_grant(&grant);
        let mut segments = Vec::new();
        let inside = io.cache.begin_write(ByteRange::new(500, 1000), 512, &mut segments);
        assert!(matches!(inside, Outcome::HitRmw(_)), "{inside:?}");
        for (start, end) in [(900, 1001), (512, 1024), (4000, 4096)] {
            assert_eq!(io.cache.begin_write(ByteRange::new(start, end), 512, &mut segments), Outcome::Miss);
            assert_eq!(io.cache.begin_read(ByteRange::new(start, end), &mut segments), Outcome::Miss);
        }
        let eof = proto::LayoutGrant { seq: 2, end: u64::MAX, eof: true, alloc_end: 4096, ..grant };
        io.take_grant(&eof);
        let outcome = io.cache.begin_write(ByteRange::new(1024, 1536), 512, &mut segments);
        assert!(matches!(outcome, Outcome::Hit(_)), "{outcome:?}");
    }

    #[test]
    fn space_is_asked_for_ahead_of_a_writer_that_goes_on_and_once() {
        const MIB: u64 = 1 << 20;
        let mut io = FileIo::default();
        let extent = proto::LayoutExtent { file_offset: 0, len: 8 * MIB, zeros: false, lun_offset: 1 << 30 };
        let grant = proto::LayoutGrant {
            seq: 1,
            end: u64::MAX,
            access: proto::Access::Exclusive.into(),
            eof: true,
            size: MIB,
            alloc_end: 8 * MIB,
            extents: vec![extent],
            ..proto::LayoutGrant::default()
        };
        assert_eq!(io.wants_ahead(4096), None, "without the right nothing is asked for");
        io.take_grant(&grant);
        io.ahead = 4 * MIB;
        assert_eq!(io.wants_ahead(MIB), None, "an overwrite needs no space");
        assert_eq!(io.wants_ahead(4 * MIB), None, "there is enough");
        assert_eq!(io.wants_ahead(5 * MIB), Some(8 * MIB));
        assert_eq!((io.ahead, io.asking_ahead), (8 * MIB, true));
        assert_eq!(io.wants_ahead(6 * MIB), None, "it is asked for already");
        io.asking_ahead = false;
        io.no_ahead = true;
        assert_eq!(io.wants_ahead(6 * MIB), None, "the volume is nearly full");
        assert!(io.overwrites(ByteRange::new(0, MIB), 4096));
        assert!(!io.overwrites(ByteRange::new(0, MIB + 4096), 4096), "it moves the end");
        assert!(!io.overwrites(ByteRange::new(0, 512), 4096), "no whole block");
    }

    #[test]
    fn a_sync_covers_only_what_was_there_when_it_began() {
        let mut dirty = Unsynced::default();
        dirty.made(Epoch(1));
        let begun = dirty.begin();
        assert!(dirty.any(), "a second sync has to wait for its own");
        dirty.made(Epoch(2));
        dirty.done(begun);
        assert!(dirty.any());
        assert!(dirty.older_than(Epoch(2)) && !dirty.older_than(Epoch(1)));
        dirty.done(dirty.begin());
        assert!(!dirty.any());
    }

    #[test]
    fn a_dead_file_takes_no_number_away() {
        let table = InodeTable::new();
        table.set_root(FileId { ino: 2, generation: 0 });
        let live = table.reference(FileId { ino: 12, generation: 4 });
        assert!(table.reference_unless_other(FileId { ino: 12, generation: 3 }).is_none());
        assert!(table.reference_unless_other(FileId { ino: ROOT, generation: 0 }).is_none());
        assert!(Arc::ptr_eq(&table.reference_unless_other(live.file).unwrap(), &live));
        assert!(table.forget(live.nodeid, 1).is_none());
        assert!(table.forget(live.nodeid, 1).is_some());
    }

    #[test]
    fn the_root_stays() {
        let table = InodeTable::new();
        table.set_root(FileId { ino: 2, generation: 0 });
        assert!(table.forget(ROOT, 1_000_000).is_none());
        assert!(table.get(ROOT).is_some());
    }
}
