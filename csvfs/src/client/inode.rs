//! The inodes that the kernel knows on this node.
//!
//! The kernel names an inode by a node number that is never reused while csvfs runs; the coordinator names it by
//! [`FileId`]. The table maps both ways and counts the kernel's references (`nlookup`); at zero the inode is
//! forgotten and what is held of its layout goes back.

use csv_layout::LayoutCache;
use csv_proto as proto;
use csv_types::FileId;
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
    /// End of the last write, to see sequential ones.
    pub(crate) last_end: u64,
    /// The file cannot be lent; ask again after this.
    pub(crate) redirected_until: Option<Instant>,
    /// Something of this file may be dirty at the coordinator only: fsync has to go there.
    pub(crate) coordinator_dirty: bool,
    /// Device writes since the last flush of the LUN.
    pub(crate) device_dirty: bool,
    /// Handles open on this node.
    pub(crate) opens: u32,
}

#[derive(Debug, Default)]
struct Maps {
    by_node: HashMap<u64, (Arc<Inode>, u64)>,
    by_file: HashMap<FileId, u64>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct InodeTable {
    maps: RwLock<Maps>,
    next: AtomicU64,
}

impl InodeTable {
    pub(crate) fn new() -> InodeTable {
        InodeTable { maps: RwLock::new(Maps::default()), next: AtomicU64::new(ROOT + 1) }
    }

    /// The inode behind a number of the kernel.
    pub(crate) fn get(&self, nodeid: u64) -> Option<Arc<Inode>> {
        self.maps.read().by_node.get(&nodeid).map(|(inode, _)| inode.clone())
    }

    /// The inode of a file, if the kernel references it.
    pub(crate) fn by_file(&self, file: FileId) -> Option<Arc<Inode>> {
        let maps = self.maps.read();
        let nodeid = maps.by_file.get(&file)?;
        maps.by_node.get(nodeid).map(|(inode, _)| inode.clone())
    }

    /// The root; known since the first Welcome.
    pub(crate) fn set_root(&self, file: FileId) {
        let mut maps = self.maps.write();
        maps.by_node.entry(ROOT).or_insert_with(|| (Arc::new(Inode::new(ROOT, file)), u64::MAX / 2));
        maps.by_file.insert(file, ROOT);
    }

    /// One more kernel reference to a file.
    pub(crate) fn reference(&self, file: FileId) -> Arc<Inode> {
        let mut maps = self.maps.write();
        if let Some(nodeid) = maps.by_file.get(&file).copied()
            && let Some((inode, count)) = maps.by_node.get_mut(&nodeid)
        {
            *count += 1;
            return inode.clone();
        }
        let nodeid = self.next.fetch_add(1, Ordering::Relaxed);
        let inode = Arc::new(Inode::new(nodeid, file));
        maps.by_file.insert(file, nodeid);
        maps.by_node.insert(nodeid, (inode.clone(), 1));
        inode
    }

    /// The kernel drops references; the inode when none is left.
    pub(crate) fn forget(&self, nodeid: u64, count: u64) -> Option<Arc<Inode>> {
        if nodeid == ROOT {
            return None;
        }
        let mut maps = self.maps.write();
        let (_, references) = maps.by_node.get_mut(&nodeid)?;
        *references = references.saturating_sub(count);
        if *references > 0 {
            return None;
        }
        let (inode, _) = maps.by_node.remove(&nodeid)?;
        maps.by_file.remove(&inode.file);
        Some(inode)
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<Arc<Inode>> {
        self.maps.read().by_node.values().map(|(inode, _)| inode.clone()).collect()
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.maps.read().by_node.len()
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

    #[test]
    fn numbers_are_not_reused_and_counts_decide() {
        let table = InodeTable::new();
        let file = FileId { ino: 12, generation: 3 };
        let first = table.reference(file);
        assert_eq!(table.reference(file).nodeid, first.nodeid);
        assert!(table.forget(first.nodeid, 1).is_none());
        assert_eq!(table.forget(first.nodeid, 1).unwrap().file, file);
        assert!(table.get(first.nodeid).is_none());
        assert!(table.by_file(file).is_none());
        assert_ne!(table.reference(file).nodeid, first.nodeid);
    }

    #[test]
    fn the_root_stays() {
        let table = InodeTable::new();
        table.set_root(FileId { ino: 2, generation: 0 });
        assert!(table.forget(ROOT, 1_000_000).is_none());
        assert!(table.get(ROOT).is_some());
    }
}
