//! Cases with a name: semantics that are easy to get wrong, fairness, deadlock, bounds.

use super::*;
use csv_types::{FileId, NodeId};

const FILE: FileId = FileId { ino: 7, generation: 1 };
const OTHER: FileId = FileId { ino: 8, generation: 1 };

/// A table with a counter for request ids.
struct Bench {
    table: LockTable,
    next: u64,
}

impl Bench {
    fn new() -> Self {
        Bench { table: LockTable::new(Limits::default()), next: 0 }
    }

    fn ask(&mut self, request: LockRequest) -> (RequestId, Vec<Effect>) {
        let req = RequestId(self.next);
        self.next += 1;
        let mut effects = Vec::new();
        self.table.step(Input::Set { req, request }, &mut effects);
        (req, effects)
    }

    /// Asks and expects to be granted with nothing else happening.
    fn granted(&mut self, request: LockRequest) {
        let (req, effects) = self.ask(request);
        assert_eq!(effects, [Effect::Granted { req }], "{request:?}");
    }

    fn queued(&mut self, request: LockRequest) -> RequestId {
        let (req, effects) = self.ask(request);
        assert_eq!(effects, [Effect::Queued { req }], "{request:?}");
        req
    }

    fn refused(&mut self, request: LockRequest) -> Refusal {
        let (req, effects) = self.ask(request);
        match effects[..] {
            [Effect::Refused { req: answered, refusal }] if answered == req => refusal,
            _ => panic!("expected a refusal, got {effects:?}"),
        }
    }

    fn shape(&self, file: FileId) -> Vec<(u64, u64, u64, LockType)> {
        self.table
            .held(file)
            .map(|held| (held.owner.owner, held.range.start, held.range.end, held.lock_type))
            .collect()
    }
}

fn posix(owner: u64, start: u64, end: u64, lock_type: LockType) -> LockRequest {
    LockRequest {
        file: FILE,
        owner: Owner { session: 1, owner, pid: 100, node: NodeId(1) },
        kind: Kind::Posix,
        range: LockRange { start, end },
        lock_type,
        wait: true,
    }
}

fn flock(owner: u64, lock_type: LockType) -> LockRequest {
    LockRequest { kind: Kind::Flock, ..posix(owner, 0, u64::MAX, lock_type) }
}

fn now(request: LockRequest) -> LockRequest {
    LockRequest { wait: false, ..request }
}

use LockType::{Read, Unlock, Write};

#[test]
fn unlock_in_the_middle_splits_and_relock_merges() {
    let mut bench = Bench::new();
    bench.granted(posix(1, 0, u64::MAX, Write));
    bench.granted(posix(1, 10, 19, Unlock));
    assert_eq!(bench.shape(FILE), [(1, 0, 9, Write), (1, 20, u64::MAX, Write)]);
    bench.granted(posix(1, 10, 19, Read));
    assert_eq!(bench.shape(FILE), [(1, 0, 9, Write), (1, 10, 19, Read), (1, 20, u64::MAX, Write)]);
    bench.granted(posix(1, 10, 19, Write));
    assert_eq!(bench.shape(FILE), [(1, 0, u64::MAX, Write)]);
    bench.granted(posix(1, 0, u64::MAX, Unlock));
    assert_eq!(bench.table.file_count(), 0);
}

#[test]
fn upgrade_that_waits_keeps_the_read_lock() {
    let mut bench = Bench::new();
    bench.granted(posix(1, 0, 9, Read));
    bench.granted(posix(2, 0, 9, Read));
    let upgrade = bench.queued(posix(1, 0, 9, Write));
    assert_eq!(bench.refused(now(posix(3, 0, 9, Write))), Refusal::WouldBlock);
    assert_eq!(bench.refused(posix(2, 0, 9, Write)), Refusal::Deadlock);
    let (req, effects) = bench.ask(posix(2, 0, 9, Unlock));
    assert_eq!(effects, [Effect::Granted { req }, Effect::Granted { req: upgrade }]);
    assert_eq!(bench.shape(FILE), [(1, 0, 9, Write)]);
}

#[test]
fn waiters_are_served_in_the_order_of_arrival() {
    let mut bench = Bench::new();
    bench.granted(posix(1, 0, 9, Write));
    let order: Vec<RequestId> = (2..6).map(|owner| bench.queued(posix(owner, 0, 9, Write))).collect();
    for (holder, next) in (1..5).zip(order) {
        let (req, effects) = bench.ask(posix(holder, 0, 9, Unlock));
        assert_eq!(effects, [Effect::Granted { req }, Effect::Granted { req: next }]);
    }
}

#[test]
fn downgrade_lets_readers_in_but_no_writer() {
    let mut bench = Bench::new();
    bench.granted(posix(1, 0, 9, Write));
    let first = bench.queued(posix(2, 0, 9, Read));
    let writer = bench.queued(posix(3, 5, 5, Write));
    let second = bench.queued(posix(4, 9, 20, Read));
    let (req, effects) = bench.ask(posix(1, 0, 9, Read));
    let expected = [Effect::Granted { req }, Effect::Granted { req: first }, Effect::Granted { req: second }];
    assert_eq!(effects, expected);
    assert_eq!(bench.table.waiters(FILE).map(|(req, _)| req).collect::<Vec<_>>(), [writer]);
}

#[test]
fn cancel_interrupts_once_and_leaves_no_trace() {
    let mut bench = Bench::new();
    bench.granted(posix(1, 0, 9, Write));
    let req = bench.queued(posix(2, 0, 9, Write));
    let mut effects = Vec::new();
    bench.table.step(Input::Cancel { req }, &mut effects);
    bench.table.step(Input::Cancel { req }, &mut effects);
    assert_eq!(effects, [Effect::Interrupted { req }]);
    bench.granted(posix(1, 0, 9, Unlock));
    assert_eq!(bench.table.file_count(), 0);
}

#[test]
fn deadlock_is_found_over_several_files_and_owners() {
    let mut bench = Bench::new();
    let on = |file, request| LockRequest { file, ..request };
    bench.granted(on(FILE, posix(1, 0, 0, Write)));
    bench.granted(on(OTHER, posix(2, 0, 0, Write)));
    bench.granted(on(FILE, posix(3, 5, 5, Write)));
    bench.queued(on(OTHER, posix(1, 0, 0, Read)));
    bench.queued(on(FILE, posix(2, 5, 5, Write)));
    assert_eq!(bench.refused(on(FILE, posix(3, 0, 0, Write))), Refusal::Deadlock);
    assert_eq!(bench.refused(now(on(FILE, posix(3, 0, 0, Write)))), Refusal::WouldBlock);
}

#[test]
fn a_circle_that_a_wake_closes_is_refused() {
    // Owner 1 has two threads: one waits for 2's lock, the other gets a lock for which 2 waits.
    let mut bench = Bench::new();
    bench.granted(posix(2, 0, 0, Write));
    bench.granted(posix(3, 5, 5, Write));
    let thread_a = bench.queued(posix(1, 5, 5, Write));
    let victim = bench.queued(posix(2, 5, 5, Write));
    bench.queued(posix(1, 0, 0, Write));
    let (req, effects) = bench.ask(posix(3, 5, 5, Unlock));
    let expected = [
        Effect::Granted { req },
        Effect::Granted { req: thread_a },
        Effect::Refused { req: victim, refusal: Refusal::Deadlock },
    ];
    assert_eq!(effects, expected);
}

#[test]
fn a_circle_longer_than_the_bound_is_given_up() {
    let mut bench = Bench::new();
    let owners = deadlock::OWNERS_VISITED_MAX as u64 + 8;
    for owner in 0..owners {
        bench.granted(posix(owner, owner, owner, Write));
    }
    for owner in 0..owners - 1 {
        bench.queued(posix(owner, owner + 1, owner + 1, Write));
    }
    bench.queued(posix(owners - 1, 0, 0, Write));
}

#[test]
fn flock_and_posix_do_not_meet() {
    let mut bench = Bench::new();
    bench.granted(posix(1, 0, u64::MAX, Write));
    bench.granted(flock(2, Write));
    assert_eq!(bench.refused(now(flock(3, Read))), Refusal::WouldBlock);
    assert_eq!(bench.table.get(&flock(3, Read)).map(|held| held.owner.owner), Some(2));
    assert_eq!(bench.table.get(&posix(3, 4, 4, Read)).map(|held| held.owner.owner), Some(1));
    assert_eq!(bench.table.get(&posix(1, 4, 4, Write)), None);
}

#[test]
fn a_refused_flock_conversion_loses_the_old_lock() {
    let mut bench = Bench::new();
    bench.granted(flock(1, Read));
    bench.granted(flock(2, Read));
    assert_eq!(bench.refused(now(flock(1, Write))), Refusal::WouldBlock);
    assert_eq!(bench.shape(FILE), [(2, 0, u64::MAX, Read)]);
}

#[test]
fn two_flock_upgrades_do_not_deadlock() {
    let mut bench = Bench::new();
    bench.granted(flock(1, Read));
    bench.granted(flock(2, Read));
    let first = bench.queued(flock(1, Write));
    let (second, effects) = bench.ask(flock(2, Write));
    // 2 gave its read lock up and stood alone before the waiter was looked at, so it wins, as on Linux.
    assert_eq!(effects, [Effect::Granted { req: second }]);
    let (req, effects) = bench.ask(flock(2, Unlock));
    assert_eq!(effects, [Effect::Granted { req }, Effect::Granted { req: first }]);
}

#[test]
fn flock_downgrade_wakes_readers() {
    let mut bench = Bench::new();
    bench.granted(flock(1, Write));
    let reader = bench.queued(flock(2, Read));
    let (req, effects) = bench.ask(flock(1, Read));
    assert_eq!(effects, [Effect::Granted { req }, Effect::Granted { req: reader }]);
}

#[test]
fn close_drops_locks_but_not_waits() {
    let mut bench = Bench::new();
    bench.granted(posix(1, 0, 0, Write));
    bench.granted(flock(1, Write));
    bench.granted(posix(2, 9, 9, Write));
    let waits = bench.queued(posix(1, 9, 9, Write));
    let other = bench.queued(posix(3, 0, 0, Write));
    let other_flock = bench.queued(flock(3, Read));
    let mut effects = Vec::new();
    let owner = OwnerKey { session: 1, owner: 1 };
    bench.table.step(Input::DropOwner { file: FILE, owner }, &mut effects);
    assert_eq!(effects, [Effect::Granted { req: other }, Effect::Granted { req: other_flock }]);
    assert_eq!(bench.table.waiters(FILE).map(|(req, _)| req).collect::<Vec<_>>(), [waits]);
}

#[test]
fn end_of_a_session_interrupts_its_waiters_and_serves_the_others() {
    let mut bench = Bench::new();
    let from = |session, mut request: LockRequest| {
        request.owner.session = session;
        request
    };
    bench.granted(from(2, posix(1, 0, 9, Write)));
    bench.granted(from(2, LockRequest { file: OTHER, ..flock(1, Write) }));
    let gone = bench.queued(from(2, posix(5, 0, 9, Write)));
    let served = bench.queued(from(3, posix(1, 3, 4, Write)));
    let mut effects = Vec::new();
    bench.table.step(Input::DropSession { session: 2 }, &mut effects);
    assert_eq!(effects, [Effect::Interrupted { req: gone }, Effect::Granted { req: served }]);
    assert_eq!(bench.table.held(OTHER).count(), 0);
    assert_eq!(bench.table.file_count(), 1);
}

#[test]
fn reclaim_never_waits() {
    let mut bench = Bench::new();
    bench.granted(posix(1, 0, 9, Write));
    let mut effects = Vec::new();
    let req = RequestId(900);
    bench.table.step(Input::Reclaim { req, request: posix(2, 9, 9, Read) }, &mut effects);
    bench.table.step(Input::Reclaim { req, request: posix(2, 10, 10, Read) }, &mut effects);
    let expected = [Effect::Refused { req, refusal: Refusal::WouldBlock }, Effect::Granted { req }];
    assert_eq!(effects, expected);
}

#[test]
fn bounds_are_kept_and_unlock_still_works_at_the_bound() {
    let limits = Limits { locks_per_file_max: 2, waiters_per_file_max: 1, files_max: 1 };
    let mut bench = Bench { table: LockTable::new(limits), next: 0 };
    bench.granted(posix(1, 0, 9, Write));
    bench.granted(flock(1, Read));
    assert_eq!(bench.refused(posix(2, 20, 29, Read)), Refusal::NoLocks);
    assert_eq!(bench.refused(flock(2, Read)), Refusal::NoLocks);
    assert_eq!(bench.refused(posix(1, 4, 5, Unlock)), Refusal::NoLocks);
    assert_eq!(bench.refused(LockRequest { file: OTHER, ..posix(1, 0, 0, Read) }), Refusal::NoLocks);
    bench.queued(posix(2, 0, 0, Write));
    assert_eq!(bench.refused(posix(3, 0, 0, Write)), Refusal::NoLocks);
    bench.granted(posix(1, 5, 9, Unlock));
    assert_eq!(bench.refused(posix(4, 9, 4, Read)), Refusal::Invalid);
}
