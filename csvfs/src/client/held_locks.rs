//! Locks that processes of this node hold, so that they can be taken again at a new coordinator.
//!
//! Per owner the granted requests are kept in order; replaying them gives the same locks. A request that covers an
//! older one of the same owner makes it superfluous, so that a program that locks and unlocks the same range for
//! ever does not make the list grow.
//!
//! Besides, for every open file the owners that hold POSIX or OFD locks taken through it: the kernel tells the end of
//! an open file, but not which owner its OFD locks had.

use csv_proto as proto;
use csv_types::FileId;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};

/// `F_UNLCK`.
const UNLOCK: u32 = 2;

type Key = (FileId, bool, u64);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct HeldLocks {
    granted: Mutex<BTreeMap<Key, Vec<proto::Lock>>>,
    /// Handle, file, owner.
    through: Mutex<BTreeSet<(u64, FileId, u64)>>,
}

impl HeldLocks {
    /// A lock request was granted.
    pub(crate) fn granted(&self, file: FileId, flock: bool, owner: u64, lock: proto::Lock) {
        let mut all = self.granted.lock();
        let list = all.entry((file, flock, owner)).or_default();
        // flock has one lock for the whole file.
        list.retain(|old| !flock && (old.start < lock.start || old.end > lock.end));
        let unlock = lock.r#type == UNLOCK;
        let overlaps = list.iter().any(|old| old.start <= lock.end && lock.start <= old.end);
        if !unlock || overlaps {
            list.push(lock);
        }
        if list.is_empty() {
            all.remove(&(file, flock, owner));
            drop(all);
            if !flock {
                self.through.lock().retain(|(_, f, o)| (*f, *o) != (file, owner));
            }
        }
    }

    /// The owner has taken a POSIX or OFD lock through this open file.
    pub(crate) fn taken_through(&self, handle: u64, file: FileId, owner: u64) {
        self.through.lock().insert((handle, file, owner));
    }

    /// Owners that still hold locks taken through this open file, which has come to its end.
    pub(crate) fn owners_through(&self, handle: u64, file: FileId) -> Vec<u64> {
        let mut through = self.through.lock();
        let of_it = |entry: &(u64, FileId, u64)| (entry.0, entry.1) == (handle, file);
        let owners = through.iter().filter(|entry| of_it(entry)).map(|entry| entry.2).collect();
        through.retain(|entry| !of_it(entry));
        owners
    }

    /// Does this owner hold anything?
    pub(crate) fn holds(&self, file: FileId, flock: bool, owner: u64) -> bool {
        self.granted.lock().contains_key(&(file, flock, owner))
    }

    /// Requests that take everything again.
    pub(crate) fn replay(&self) -> Vec<proto::SetLock> {
        let all = self.granted.lock();
        all.iter()
            .flat_map(|((file, flock, owner), list)| {
                list.iter().map(|lock| proto::SetLock {
                    file: Some((*file).into()),
                    owner: *owner,
                    lock: Some(*lock),
                    wait: false,
                    flock: *flock,
                    reclaim: true,
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(start: u64, end: u64, kind: u32) -> proto::Lock {
        proto::Lock { start, end, r#type: kind, pid: 1 }
    }

    #[test]
    fn covered_requests_vanish_and_unlock_empties() {
        let held = HeldLocks::default();
        let file = FileId { ino: 9, generation: 1 };
        for _ in 0..100 {
            held.granted(file, false, 7, lock(0, 99, 1));
            held.granted(file, false, 7, lock(10, 19, UNLOCK));
        }
        assert_eq!(held.replay().len(), 2);
        held.granted(file, false, 7, lock(0, u64::MAX, UNLOCK));
        assert!(held.replay().is_empty());
        assert!(!held.holds(file, false, 7));
    }

    #[test]
    fn an_open_file_ends_with_the_locks_taken_through_it() {
        let held = HeldLocks::default();
        let file = FileId { ino: 9, generation: 1 };
        for (handle, owner) in [(1, 7), (1, 8), (2, 7), (3, 9)] {
            held.granted(file, false, owner, lock(0, 99, 1));
            held.taken_through(handle, file, owner);
        }
        // As at a close by owner 7: nothing of it may be released later through another handle.
        held.granted(file, false, 7, lock(0, u64::MAX, UNLOCK));
        assert_eq!(held.owners_through(1, file), [8]);
        assert!(held.owners_through(1, file).is_empty() && held.owners_through(2, file).is_empty());
        assert_eq!(held.owners_through(3, file), [9]);
    }

    #[test]
    fn flock_keeps_only_the_last() {
        let held = HeldLocks::default();
        let file = FileId { ino: 9, generation: 1 };
        held.granted(file, true, 7, lock(0, u64::MAX, 0));
        held.granted(file, true, 7, lock(0, u64::MAX, 1));
        assert_eq!(held.replay().len(), 1);
        assert_eq!(held.replay()[0].lock.unwrap().r#type, 1);
    }
}
