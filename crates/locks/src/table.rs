//! The lock table of a volume.
//!
//! A request is granted, refused or queued at once. A queued one is answered when a release lets it through
//! (first come, first served), when it is cancelled, when its session ends, or when a lock granted to somebody
//! else has closed a circle. Files without locks and waiters are forgotten.

use crate::deadlock::would_deadlock;
use crate::file::{Applied, FileLocks, Waiter};
use crate::types::{Effect, HeldLock, Input, Kind, LockRequest, LockType, OwnerKey, Refusal, RequestId};
use csv_types::FileId;
use std::collections::{BTreeMap, BTreeSet};

/// Bounds of a table; a request beyond one is refused with `NoLocks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Locks held on one file, both lock spaces together.
    pub locks_per_file_max: usize,
    /// Requests that wait on one file.
    pub waiters_per_file_max: usize,
    /// Files with locks or waiters.
    pub files_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { locks_per_file_max: 16_384, waiters_per_file_max: 4_096, files_max: 262_144 }
    }
}

/// Locks of all files of one volume.
#[derive(Debug, Default)]
pub struct LockTable {
    limits: Limits,
    files: BTreeMap<FileId, FileLocks>,
    /// Where each waiting request stands.
    waiting: BTreeMap<RequestId, (FileId, u64)>,
    /// POSIX requests that wait, by owner: the edges of the deadlock search.
    waiting_of: BTreeMap<OwnerKey, BTreeSet<RequestId>>,
    next_arrival: u64,
}

/// What the first look at a request did.
#[derive(Debug, Clone, Copy)]
struct Admitted {
    /// Something was given up, so waiters have to be looked at.
    released: bool,
    /// A byte-range lock was granted, so others may wait for this owner now.
    locked: bool,
}

impl LockTable {
    /// An empty table.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        LockTable { limits, ..LockTable::default() }
    }

    /// Does what `input` says; effects are appended in the order in which they have to be answered.
    pub fn step(&mut self, input: Input, effects: &mut Vec<Effect>) {
        match input {
            Input::Set { req, request } => self.set(req, request, effects),
            Input::Reclaim { req, request } => self.reclaim(req, request, effects),
            Input::Cancel { req } => self.cancel(req, effects),
            Input::DropOwner { file, owner } => self.drop_owner(file, owner.session, owner.owner, effects),
            Input::DropSession { session } => self.drop_session(session, effects),
        }
    }

    /// Sets, converts or gives up a lock. A request that already waits under the same id is left as it is.
    pub fn set(&mut self, req: RequestId, request: LockRequest, effects: &mut Vec<Effect>) {
        if request.kind == Kind::Posix && request.range.start > request.range.end {
            effects.push(Effect::Refused { req, refusal: Refusal::Invalid });
            return;
        }
        if self.waiting.contains_key(&req) {
            effects.push(Effect::Queued { req });
            return;
        }
        if !self.files.contains_key(&request.file) {
            if request.lock_type == LockType::Unlock {
                effects.push(Effect::Granted { req });
                return;
            }
            if self.files.len() >= self.limits.files_max {
                effects.push(Effect::Refused { req, refusal: Refusal::NoLocks });
                return;
            }
        }
        let admitted = self.admit(req, request, effects);
        if admitted.released {
            self.wake(request.file, effects);
        }
        // A lock that was granted at once can close a circle when its owner waits with another thread.
        if admitted.locked && self.waiting_of.contains_key(&request.owner.key()) {
            self.refuse_circles(request.file, effects);
        }
        self.forget_if_idle(request.file);
    }

    /// Enters a lock that the owner held at an earlier coordinator. Never waits: a conflict means that the lock
    /// was lost, and is refused with `WouldBlock`.
    pub fn reclaim(&mut self, req: RequestId, request: LockRequest, effects: &mut Vec<Effect>) {
        self.set(req, LockRequest { wait: false, ..request }, effects);
    }

    /// Stops waiting. A request that was answered before is not known any more, and nothing comes out.
    pub fn cancel(&mut self, req: RequestId, effects: &mut Vec<Effect>) {
        if let Some(waiter) = self.unqueue(req) {
            effects.push(Effect::Interrupted { req });
            self.forget_if_idle(waiter.request.file);
        }
    }

    /// A lock that would stand in the way of `request` (`F_GETLK`): the one that starts first.
    #[must_use]
    pub fn get(&self, request: &LockRequest) -> Option<HeldLock> {
        self.files.get(&request.file)?.conflicts(request).min_by_key(|held| held.range.start)
    }

    /// The owner closed the file: its locks there go. Requests of the owner that wait go on waiting, as on
    /// Linux, where another thread may have closed another descriptor of the file.
    pub fn drop_owner(&mut self, file: FileId, session: u64, owner: u64, effects: &mut Vec<Effect>) {
        let Some(locks) = self.files.get_mut(&file) else { return };
        if locks.drop_owner(OwnerKey { session, owner }) {
            self.wake(file, effects);
            self.forget_if_idle(file);
        }
    }

    /// A session ended: its waiting requests are interrupted, then its locks go, then others are served.
    pub fn drop_session(&mut self, session: u64, effects: &mut Vec<Effect>) {
        let mine: Vec<RequestId> = self
            .files
            .values()
            .flat_map(|locks| locks.waiters.values())
            .filter(|waiter| waiter.request.owner.session == session)
            .map(|waiter| waiter.req)
            .collect();
        for req in mine {
            self.cancel(req, effects);
        }
        let files: Vec<FileId> = self.files.keys().copied().collect();
        for file in files {
            let Some(locks) = self.files.get_mut(&file) else { continue };
            let owners = locks.owners_of(session);
            for owner in &owners {
                locks.drop_owner(*owner);
            }
            if !owners.is_empty() {
                self.wake(file, effects);
                self.forget_if_idle(file);
            }
        }
    }

    /// Locks held on `file`.
    pub fn held(&self, file: FileId) -> impl Iterator<Item = HeldLock> {
        self.files.get(&file).into_iter().flat_map(FileLocks::held)
    }

    /// Requests that wait for `file`, first come first.
    pub fn waiters(&self, file: FileId) -> impl Iterator<Item = (RequestId, LockRequest)> {
        self.files
            .get(&file)
            .into_iter()
            .flat_map(|locks| locks.waiters.values().map(|waiter| (waiter.req, waiter.request)))
    }

    /// Files with locks or waiters.
    #[must_use]
    pub fn file_count(&self) -> usize {
        self.files.len()
    }

    /// Requests that wait, over all files.
    #[must_use]
    pub fn waiter_count(&self) -> usize {
        self.waiting.len()
    }

    /// Owners whose locks stand in the way of `request`.
    pub(crate) fn blockers<'a>(&'a self, request: &'a LockRequest) -> impl Iterator<Item = OwnerKey> + 'a {
        self.files
            .get(&request.file)
            .into_iter()
            .flat_map(move |locks| locks.conflicts(request).map(|held| held.owner.key()))
    }

    /// POSIX requests of `owner` that wait.
    pub(crate) fn waiting_requests(&self, owner: OwnerKey) -> impl Iterator<Item = &LockRequest> {
        self.waiting_of.get(&owner).into_iter().flatten().filter_map(|req| {
            let (file, arrival) = self.waiting.get(req)?;
            Some(&self.files.get(file)?.waiters.get(arrival)?.request)
        })
    }

    /// Grants, refuses or queues a new request.
    fn admit(&mut self, req: RequestId, request: LockRequest, effects: &mut Vec<Effect>) -> Admitted {
        let locks_max = self.limits.locks_per_file_max;
        let locks = self.files.entry(request.file).or_default();
        // Linux gives the old flock up before it looks for conflicts, so a conversion is not atomic.
        let dropped =
            request.kind == Kind::Flock && locks.drop_other_flock(request.owner.key(), request.lock_type);
        if locks.conflicts(&request).next().is_none() {
            return match locks.apply(&request, locks_max) {
                Applied::Done { released } => {
                    effects.push(Effect::Granted { req });
                    let locked = request.kind == Kind::Posix && request.lock_type != LockType::Unlock;
                    Admitted { released: released || dropped, locked }
                }
                Applied::TooMany => {
                    effects.push(Effect::Refused { req, refusal: Refusal::NoLocks });
                    Admitted { released: dropped, locked: false }
                }
            };
        }
        let full = locks.waiters.len() >= self.limits.waiters_per_file_max;
        let refusal = if !request.wait {
            Some(Refusal::WouldBlock)
        } else if would_deadlock(self, &request) {
            Some(Refusal::Deadlock)
        } else if full {
            Some(Refusal::NoLocks)
        } else {
            None
        };
        match refusal {
            Some(refusal) => effects.push(Effect::Refused { req, refusal }),
            None => {
                self.enqueue(req, request);
                effects.push(Effect::Queued { req });
            }
        }
        Admitted { released: dropped, locked: false }
    }

    /// Serves the waiters of `file` in the order of arrival until none can be granted. A grant can itself
    /// release something (a downgrade that waited for a part of its range); then it starts from the front
    /// again, as an earlier waiter may be free now. Each round takes a waiter out, which bounds the rounds.
    fn wake(&mut self, file: FileId, effects: &mut Vec<Effect>) {
        let mut granted_to: BTreeSet<OwnerKey> = BTreeSet::new();
        while self.wake_round(file, &mut granted_to, effects) {}
        if granted_to.iter().any(|owner| self.waiting_of.contains_key(owner)) {
            self.refuse_circles(file, effects);
        }
    }

    /// One pass over the waiters. True when it stopped early because a grant released something.
    fn wake_round(
        &mut self,
        file: FileId,
        granted_to: &mut BTreeSet<OwnerKey>,
        effects: &mut Vec<Effect>,
    ) -> bool {
        for waiter in self.queue_of(file) {
            let Some(locks) = self.files.get_mut(&file) else { return false };
            if locks.conflicts(&waiter.request).next().is_some() {
                continue;
            }
            let applied = locks.apply(&waiter.request, self.limits.locks_per_file_max);
            self.unqueue(waiter.req);
            match applied {
                Applied::Done { released } => {
                    effects.push(Effect::Granted { req: waiter.req });
                    if waiter.request.kind == Kind::Posix {
                        granted_to.insert(waiter.request.owner.key());
                    }
                    if released {
                        return true;
                    }
                }
                Applied::TooMany => {
                    effects.push(Effect::Refused { req: waiter.req, refusal: Refusal::NoLocks });
                }
            }
        }
        false
    }

    /// Refuses those waiters of `file` that stand in a circle. Needed only when an owner with several threads
    /// got a lock while it waits for another one: those who wait for the new lock may now wait for themselves.
    fn refuse_circles(&mut self, file: FileId, effects: &mut Vec<Effect>) {
        for waiter in self.queue_of(file) {
            if would_deadlock(self, &waiter.request) {
                self.unqueue(waiter.req);
                effects.push(Effect::Refused { req: waiter.req, refusal: Refusal::Deadlock });
            }
        }
    }

    fn queue_of(&self, file: FileId) -> Vec<Waiter> {
        self.files.get(&file).map_or_else(Vec::new, |locks| locks.waiters.values().copied().collect())
    }

    fn enqueue(&mut self, req: RequestId, request: LockRequest) {
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        self.files.entry(request.file).or_default().waiters.insert(arrival, Waiter { req, request });
        self.waiting.insert(req, (request.file, arrival));
        if request.kind == Kind::Posix {
            self.waiting_of.entry(request.owner.key()).or_default().insert(req);
        }
    }

    fn unqueue(&mut self, req: RequestId) -> Option<Waiter> {
        let (file, arrival) = self.waiting.remove(&req)?;
        let waiter = self.files.get_mut(&file)?.waiters.remove(&arrival)?;
        let key = waiter.request.owner.key();
        if let Some(requests) = self.waiting_of.get_mut(&key) {
            requests.remove(&req);
            if requests.is_empty() {
                self.waiting_of.remove(&key);
            }
        }
        Some(waiter)
    }

    fn forget_if_idle(&mut self, file: FileId) {
        if self.files.get(&file).is_some_and(FileLocks::is_idle) {
            self.files.remove(&file);
        }
    }
}
