//! Locks and waiters of one file.

use crate::posix::{self, Piece};
use crate::types::{HeldLock, Kind, LockRange, LockRequest, LockType, Owner, OwnerKey, RequestId};
use csv_types::NodeId;
use std::collections::BTreeMap;

/// A request that waits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waiter {
    pub(crate) req: RequestId,
    pub(crate) request: LockRequest,
}

/// The POSIX locks of one owner.
#[derive(Debug)]
struct Ranges {
    node: NodeId,
    pieces: Vec<Piece>,
}

/// One flock.
#[derive(Debug, Clone, Copy)]
struct Whole {
    owner: Owner,
    lock_type: LockType,
}

/// What one application of a request did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Applied {
    /// Done; `released` when waiters have to be looked at.
    Done { released: bool },
    /// It would pass the bound on locks; nothing changed.
    TooMany,
}

/// Everything about one file.
#[derive(Debug, Default)]
pub(crate) struct FileLocks {
    posix: BTreeMap<OwnerKey, Ranges>,
    flock: BTreeMap<OwnerKey, Whole>,
    posix_count: usize,
    /// By order of arrival.
    pub(crate) waiters: BTreeMap<u64, Waiter>,
}

impl FileLocks {
    pub(crate) fn is_idle(&self) -> bool {
        self.posix.is_empty() && self.flock.is_empty() && self.waiters.is_empty()
    }

    /// Number of locks held.
    pub(crate) fn count(&self) -> usize {
        self.posix_count + self.flock.len()
    }

    /// Locks of other owners that stand in the way of `request`.
    pub(crate) fn conflicts<'a>(
        &'a self,
        request: &'a LockRequest,
    ) -> Box<dyn Iterator<Item = HeldLock> + 'a> {
        let key = request.owner.key();
        let in_the_way = move |held: &HeldLock| {
            held.owner.key() != key
                && held.lock_type.conflicts(request.lock_type)
                && held.range.overlaps(&request.range)
        };
        match request.kind {
            Kind::Posix => Box::new(self.held_posix().filter(in_the_way)),
            Kind::Flock => {
                Box::new(self.held_flock().filter(move |held| {
                    held.owner.key() != key && held.lock_type.conflicts(request.lock_type)
                }))
            }
        }
    }

    /// All locks held, POSIX first, by owner and start.
    pub(crate) fn held(&self) -> impl Iterator<Item = HeldLock> {
        self.held_posix().chain(self.held_flock())
    }

    fn held_posix(&self) -> impl Iterator<Item = HeldLock> {
        self.posix.iter().flat_map(|(key, ranges)| {
            ranges.pieces.iter().map(|piece| HeldLock {
                owner: Owner { session: key.session, owner: key.owner, pid: piece.pid, node: ranges.node },
                kind: Kind::Posix,
                range: piece.range,
                lock_type: piece.lock_type,
            })
        })
    }

    fn held_flock(&self) -> impl Iterator<Item = HeldLock> {
        self.flock.values().map(|whole| HeldLock {
            owner: whole.owner,
            kind: Kind::Flock,
            range: LockRange::ALL,
            lock_type: whole.lock_type,
        })
    }

    /// Does what `request` asks. The caller has made sure that nothing conflicts.
    pub(crate) fn apply(&mut self, request: &LockRequest, locks_max: usize) -> Applied {
        match request.kind {
            Kind::Posix => self.apply_posix(request, locks_max),
            Kind::Flock => self.apply_flock(request, locks_max),
        }
    }

    fn apply_posix(&mut self, request: &LockRequest, locks_max: usize) -> Applied {
        let key = request.owner.key();
        let held = self.posix.get(&key).map_or(&[][..], |ranges| &ranges.pieces);
        let wanted = Piece { range: request.range, lock_type: request.lock_type, pid: request.owner.pid };
        let (after, released) = posix::replace(held, wanted);
        let before = held.len();
        if after.len() > before && self.count() - before + after.len() > locks_max {
            return Applied::TooMany;
        }
        self.posix_count = self.posix_count - before + after.len();
        if after.is_empty() {
            self.posix.remove(&key);
        } else {
            self.posix.insert(key, Ranges { node: request.owner.node, pieces: after });
        }
        Applied::Done { released }
    }

    fn apply_flock(&mut self, request: &LockRequest, locks_max: usize) -> Applied {
        let key = request.owner.key();
        let old = self.flock.get(&key).map(|whole| whole.lock_type);
        if request.lock_type == LockType::Unlock {
            self.flock.remove(&key);
            return Applied::Done { released: old.is_some() };
        }
        if old.is_none() && self.count() >= locks_max {
            return Applied::TooMany;
        }
        self.flock.insert(key, Whole { owner: request.owner, lock_type: request.lock_type });
        Applied::Done { released: old == Some(LockType::Write) && request.lock_type == LockType::Read }
    }

    /// Gives up the flock of `key` when its type is not `wanted`: the first half of a conversion.
    pub(crate) fn drop_other_flock(&mut self, key: OwnerKey, wanted: LockType) -> bool {
        match self.flock.get(&key) {
            Some(whole) if whole.lock_type != wanted => self.flock.remove(&key).is_some(),
            _ => false,
        }
    }

    /// Removes what `key` holds, in both lock spaces. Was there anything?
    pub(crate) fn drop_owner(&mut self, key: OwnerKey) -> bool {
        let ranges = self.posix.remove(&key);
        self.posix_count -= ranges.as_ref().map_or(0, |ranges| ranges.pieces.len());
        let whole = self.flock.remove(&key);
        ranges.is_some() || whole.is_some()
    }

    /// Owners of `session` that hold something here.
    pub(crate) fn owners_of(&self, session: u64) -> Vec<OwnerKey> {
        let all = OwnerKey { session, owner: 0 }..=OwnerKey { session, owner: u64::MAX };
        let mut keys: Vec<_> = self.posix.range(all.clone()).map(|(key, _)| *key).collect();
        keys.extend(self.flock.range(all).map(|(key, _)| *key));
        keys
    }
}
