//! Open descriptors of regular files by id, least recently used first out. Pure bookkeeping: opening and closing
//! happen outside.
//!
//! Invariant: `by_age` and `entries` hold the same descriptors, at most `max` of them.

use csv_types::FileId;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// File, and whether the descriptor is `O_DIRECT`.
type Key = (FileId, bool);

#[derive(Debug)]
pub(super) struct FdCache {
    max: usize,
    clock: u64,
    entries: HashMap<Key, (Arc<OwnedFd>, u64)>,
    by_age: BTreeMap<u64, Key>,
}

impl FdCache {
    pub(super) fn new(max: usize) -> Self {
        FdCache { max: max.max(1), clock: 0, entries: HashMap::new(), by_age: BTreeMap::new() }
    }

    pub(super) fn get(&mut self, file: FileId, direct: bool) -> Option<Arc<OwnedFd>> {
        let key = (file, direct);
        let (fd, age) = self.entries.get_mut(&key)?;
        self.clock += 1;
        self.by_age.remove(age);
        self.by_age.insert(self.clock, key);
        *age = self.clock;
        Some(Arc::clone(fd))
    }

    /// Returns what had to go.
    pub(super) fn insert(&mut self, file: FileId, direct: bool, fd: Arc<OwnedFd>) -> Option<Arc<OwnedFd>> {
        let key = (file, direct);
        self.clock += 1;
        self.by_age.insert(self.clock, key);
        if let Some((old, age)) = self.entries.insert(key, (fd, self.clock)) {
            self.by_age.remove(&age);
            return Some(old);
        }
        if self.entries.len() <= self.max {
            return None;
        }
        let (_, oldest) = self.by_age.pop_first()?;
        self.entries.remove(&oldest).map(|(fd, _)| fd)
    }

    pub(super) fn remove(&mut self, file: FileId) {
        for direct in [false, true] {
            if let Some((_, age)) = self.entries.remove(&(file, direct)) {
                self.by_age.remove(&age);
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.by_age.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/dev/null").unwrap().into())
    }

    fn file(ino: u64) -> FileId {
        FileId { ino, generation: 1 }
    }

    #[test]
    fn least_recently_used_goes_first() {
        let mut cache = FdCache::new(2);
        assert!(cache.insert(file(1), false, fd()).is_none());
        assert!(cache.insert(file(2), false, fd()).is_none());
        assert!(cache.get(file(1), false).is_some());
        assert!(cache.insert(file(3), false, fd()).is_some());
        assert!(cache.get(file(2), false).is_none());
        assert!(cache.get(file(1), false).is_some());
        assert!(cache.get(file(3), false).is_some());
    }

    #[test]
    fn removal_takes_both_kinds_and_keeps_the_books() {
        let mut cache = FdCache::new(4);
        cache.insert(file(1), false, fd());
        cache.insert(file(1), true, fd());
        cache.insert(file(1), true, fd());
        cache.remove(file(1));
        assert!(cache.get(file(1), false).is_none() && cache.get(file(1), true).is_none());
        assert!(cache.by_age.is_empty());
    }
}
