//! Locks that processes of this node hold, so that they can be taken again at a new coordinator.
//!
//! Per owner the granted requests are kept in order; replaying them gives the same locks. A request that covers an
//! older one of the same owner makes it superfluous, so that a program that locks and unlocks the same range for
//! ever does not make the list grow.

use csv_proto as proto;
use csv_types::FileId;
use parking_lot::Mutex;
use std::collections::BTreeMap;

/// `F_UNLCK`.
const UNLOCK: u32 = 2;

type Key = (FileId, bool, u64);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct HeldLocks {
    granted: Mutex<BTreeMap<Key, Vec<proto::Lock>>>,
}

impl HeldLocks {
    /// A lock request was granted.
    pub(crate) fn granted(&self, file: FileId, flock: bool, owner: u64, lock: proto::Lock) {
        let mut all = self.granted.lock();
        let list = all.entry((file, flock, owner)).or_default();
        list.retain(|old| flock || old.start < lock.start || old.end > lock.end);
        let unlock = lock.r#type == UNLOCK;
        let overlaps = list.iter().any(|old| old.start <= lock.end && lock.start <= old.end);
        if !unlock || overlaps {
            list.push(lock);
        }
        if list.is_empty() {
            all.remove(&(file, flock, owner));
        }
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
    fn flock_keeps_only_the_last() {
        let held = HeldLocks::default();
        let file = FileId { ino: 9, generation: 1 };
        held.granted(file, true, 7, lock(0, u64::MAX, 0));
        held.granted(file, true, 7, lock(0, u64::MAX, 1));
        assert_eq!(held.replay().len(), 1);
        assert_eq!(held.replay()[0].lock.unwrap().r#type, 1);
    }
}
