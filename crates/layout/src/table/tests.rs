//! Histories that the module's text promises, one by one. Random ones are in `crate::model`.

use super::*;

const FILE: FileId = FileId { ino: 9, generation: 1 };
const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);

struct Bed {
    table: LayoutTable,
    now: Tick,
}

fn r(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end)
}

impl Bed {
    fn new() -> Self {
        let config = TableConfig {
            recall_ms: 100,
            resend_ms: 30,
            gets_per_file_max: 3,
            pieces_per_node_max: 8,
            seq_first: 1,
        };
        Bed { table: LayoutTable::new(config), now: 0 }
    }

    fn step(&mut self, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.table.step(self.now, input, &mut effects);
        effects
    }

    fn get(&mut self, request: u64, node: NodeId, range: ByteRange, access: Access) -> Vec<Effect> {
        self.step(Input::Get { request: RequestId(request), node, file: FILE, range, access })
    }

    fn guard(&mut self, request: u64, range: ByteRange) -> Vec<Effect> {
        self.step(Input::Guard {
            request: RequestId(request),
            file: FILE,
            range,
            except: None,
            keep_read: false,
        })
    }

    fn mapped(&mut self, request: u64, range: ByteRange) -> Vec<Effect> {
        self.step(Input::Mapped { request: RequestId(request), range })
    }

    fn release(&mut self, request: u64) -> Vec<Effect> {
        self.step(Input::Release { request: RequestId(request) })
    }

    fn returned(&mut self, node: NodeId, range: ByteRange, up_to_seq: u64) -> Vec<Effect> {
        self.step(Input::Returned { node, file: FILE, range, up_to_seq, recall_id: 0 })
    }

    /// Grants without anything in the way.
    fn lend(&mut self, request: u64, node: NodeId, range: ByteRange, access: Access) {
        let effects = self.get(request, node, range, access);
        assert!(matches!(effects[..], [Effect::Map { .. }]), "{effects:?}");
        assert!(matches!(self.mapped(request, range)[..], [Effect::Granted { .. }]));
    }

    fn tick(&mut self, now: Tick) -> Vec<Effect> {
        self.now = now;
        self.step(Input::Tick)
    }
}

fn held(request: u64) -> Effect {
    Effect::Held { request: RequestId(request) }
}

fn map(request: u64, limit: ByteRange) -> Effect {
    Effect::Map { request: RequestId(request), limit }
}

fn ended(request: u64) -> Effect {
    Effect::GetEnded { request: RequestId(request) }
}

fn recall(node: NodeId, range: ByteRange, up_to_seq: u64, recall_id: u64) -> Effect {
    Effect::Recall { node, file: FILE, range, up_to_seq, recall_id, keep_read: recall_id % 2 == 1 }
}

#[test]
fn writers_share_and_an_exclusive_get_recalls_only_its_range() {
    let mut bed = Bed::new();
    bed.lend(1, A, r(0, 1000), Access::Write);
    assert_eq!(bed.get(2, B, r(0, 1000), Access::Write), [map(2, ByteRange::ALL)]);
    bed.mapped(2, r(0, 1000));
    assert_eq!(bed.get(3, B, r(100, 200), Access::Exclusive), [recall(A, r(100, 200), 2, 2)]);
    assert_eq!(bed.returned(A, r(100, 200), 2), [map(3, r(100, 200))], "A still holds both sides");
    bed.mapped(3, r(100, 200));
    assert!(bed.table.holds(B, FILE, r(100, 200), Access::Exclusive));
    assert!(bed.table.holds(A, FILE, r(200, 1000), Access::Write));
    assert!(!bed.table.holds(A, FILE, r(199, 1000), Access::Read));
}

#[test]
fn own_grants_never_conflict_and_a_read_does_not_weaken() {
    let mut bed = Bed::new();
    bed.lend(1, A, r(0, 100), Access::Exclusive);
    bed.lend(2, A, r(50, 150), Access::Read);
    assert!(bed.table.holds(A, FILE, r(0, 100), Access::Exclusive));
    assert!(bed.table.holds(A, FILE, r(0, 150), Access::Read));
    assert_eq!(bed.table.grants(FILE).count(), 3);
}

#[test]
fn the_limit_stops_at_what_others_hold_or_wait_for() {
    let mut bed = Bed::new();
    bed.lend(1, A, r(0, 10), Access::Exclusive);
    bed.lend(2, A, r(90, 100), Access::Exclusive);
    bed.guard(3, r(95, 96));
    assert_eq!(bed.get(4, B, r(40, 50), Access::Read), [map(4, r(10, 90))]);
    // Until that is answered, the limit counts as taken.
    assert_eq!(bed.get(5, A, r(80, 85), Access::Exclusive), []);
    assert_eq!(bed.mapped(4, ByteRange::ALL)[0], {
        let request = RequestId(4);
        Effect::Granted { request, node: B, file: FILE, range: r(10, 90), access: Access::Read, seq: 3 }
    });
}

#[test]
fn a_guard_waits_for_grants_and_mappings_and_holds_off_later_gets() {
    let mut bed = Bed::new();
    bed.lend(1, A, r(0, 100), Access::Read);
    assert_eq!(bed.get(2, B, r(0, 50), Access::Read), [map(2, ByteRange::ALL)]);
    assert_eq!(bed.guard(3, r(0, 100)), [recall(A, r(0, 100), 1, 2)]);
    assert_eq!(bed.get(4, A, r(0, 10), Access::Read), [], "comes after the guard");
    assert_eq!(bed.returned(A, r(0, 100), 1), [], "still mapping");
    let effects = bed.mapped(2, r(0, 50));
    assert_eq!(effects[1..], [recall(B, r(0, 100), 2, 4)]);
    assert_eq!(bed.returned(B, r(0, 100), 2), [held(3)]);
    assert_eq!(bed.get(5, B, r(200, 210), Access::Write), [map(5, r(100, u64::MAX))]);
    assert_eq!(bed.release(3), [map(4, ByteRange::ALL)]);
}

#[test]
fn guards_of_a_range_run_one_after_the_other() {
    let mut bed = Bed::new();
    assert_eq!(bed.guard(1, r(0, 100)), [held(1)]);
    assert_eq!(bed.guard(2, r(50, 150)), []);
    assert_eq!(bed.guard(3, r(120, 130)), [], "not before the second");
    assert_eq!(bed.guard(4, r(200, 300)), [held(4)]);
    assert_eq!(bed.release(2), [held(3)], "given up while it waited");
    bed.release(1);
    bed.release(3);
    bed.release(4);
    assert_eq!(bed.table.files().count(), 0);
}

#[test]
fn except_and_keep_read_leave_grants_alone() {
    let mut bed = Bed::new();
    bed.lend(1, A, r(0, 100), Access::Write);
    bed.lend(2, B, r(0, 100), Access::Read);
    let (file, range) = (FILE, r(0, 100));
    let except = Input::Guard { request: RequestId(3), file, range, except: Some(A), keep_read: true };
    assert_eq!(bed.step(except), [held(3)]);
    bed.release(3);
    let keep = Input::Guard { request: RequestId(4), file, range, except: None, keep_read: true };
    assert_eq!(bed.step(keep), [recall(A, range, 2, 3)]);
    let answer = Input::Returned { node: A, file, range, up_to_seq: 2, recall_id: 3 };
    assert_eq!(bed.step(answer.clone()), [held(4)]);
    bed.step(answer);
    assert!(bed.table.holds(A, FILE, range, Access::Read), "the doubled answer means no more than the first");
    assert!(!bed.table.holds(A, FILE, range, Access::Write));
}

#[test]
fn stale_returns_do_not_touch_newer_grants() {
    let mut bed = Bed::new();
    bed.lend(1, A, r(0, 100), Access::Write);
    bed.returned(A, r(0, 100), 1);
    assert!(!bed.table.has_grants(FILE));
    bed.lend(2, A, r(0, 100), Access::Write);
    bed.returned(A, r(0, 100), 1);
    assert!(bed.table.holds(A, FILE, r(0, 100), Access::Write));
    assert_eq!(bed.returned(B, r(0, 100), 99), [], "of a node that holds nothing");
    assert_eq!(bed.step(Input::Mapped { request: RequestId(77), range: r(0, 1) }), []);
}

#[test]
fn recalls_are_sent_again_and_then_the_node_is_fenced_once() {
    let mut bed = Bed::new();
    bed.lend(1, A, r(0, 100), Access::Write);
    bed.guard(2, r(0, 50));
    bed.guard(3, r(50, 100));
    assert_eq!(bed.table.next_deadline(), Some(30));
    assert_eq!(bed.tick(29), []);
    assert_eq!(bed.tick(30), [recall(A, r(0, 50), 1, 2), recall(A, r(50, 100), 1, 4)]);
    assert_eq!(bed.tick(30), []);
    assert_eq!(bed.tick(60).len(), 2);
    assert_eq!(bed.tick(100), [Effect::Fence { node: A, file: FILE }]);
    assert_eq!(bed.table.next_deadline(), None);
    assert_eq!(bed.get(4, A, r(500, 600), Access::Read), [ended(4)], "nothing new for a node on its way out");
    assert_eq!(bed.step(Input::NodeGone { node: A }), [held(2), held(3)]);
    bed.release(2);
    bed.release(3);
    bed.lend(5, A, r(500, 600), Access::Read);
}

#[test]
fn a_mapping_blocks_guards_until_the_driver_is_done_with_it() {
    for cancel in [Input::NodeGone { node: A }, Input::CancelGet { request: RequestId(1) }] {
        let mut bed = Bed::new();
        bed.get(1, A, r(0, 100), Access::Write);
        assert_eq!(bed.step(cancel), [], "may still be zeroing blocks");
        assert_eq!(bed.guard(2, r(0, 10)), []);
        assert_eq!(bed.mapped(1, r(0, 100)), [ended(1), held(2)]);
        assert!(!bed.table.has_grants(FILE));
    }
}

#[test]
fn gets_end_when_cancelled_failed_or_too_many() {
    let mut bed = Bed::new();
    bed.guard(1, ByteRange::ALL);
    for request in 2..5 {
        assert_eq!(bed.get(request, A, r(0, 10), Access::Read), []);
    }
    assert_eq!(bed.get(5, A, r(0, 10), Access::Read), [ended(5)]);
    assert_eq!(bed.get(2, A, r(0, 10), Access::Read), [], "a doubled get is one get");
    assert_eq!(bed.step(Input::CancelGet { request: RequestId(2) }), [ended(2)]);
    assert_eq!(bed.table.lowest_pending(), Some(RequestId(3)));
    assert_eq!(bed.step(Input::NodeGone { node: A }), [ended(3), ended(4)]);
    bed.release(1);
    assert!(!bed.table.is_busy(FILE));
    bed.get(6, A, r(0, 10), Access::Read);
    assert_eq!(bed.step(Input::MapFailed { request: RequestId(6) }), [ended(6)]);
    assert_eq!(bed.table.files().count(), 0);
    assert_eq!(bed.get(7, A, r(10, 10), Access::Read), [ended(7)], "nothing asked");
}

#[test]
fn an_exclusive_get_is_not_starved_by_readers() {
    let mut bed = Bed::new();
    bed.lend(1, A, r(0, 100), Access::Read);
    bed.get(2, B, r(0, 100), Access::Exclusive);
    assert_eq!(bed.get(3, A, r(0, 100), Access::Read), [], "behind the exclusive one");
    assert_eq!(bed.returned(A, r(0, 100), 1), [map(2, ByteRange::ALL)]);
    let effects = bed.mapped(2, r(0, 100));
    assert_eq!(effects[1..], [recall(B, r(0, 100), 2, 4)]);
}

#[test]
fn pieces_are_bounded() {
    let mut bed = Bed::new();
    for i in 0..8 {
        bed.lend(i, A, r(i * 10, i * 10 + 10), Access::Read);
    }
    assert_eq!(bed.table.grants(FILE).count(), 8);
    bed.lend(8, A, r(80, 90), Access::Read);
    assert_eq!(bed.table.grants(FILE).count(), 2, "touching ones were joined");
    for i in 9..16 {
        bed.lend(i, A, r(i * 100, i * 100 + 10), Access::Read);
    }
    assert_eq!(bed.get(20, A, r(5000, 5010), Access::Read), [ended(20)]);
    bed.lend(21, B, r(5000, 5010), Access::Read);
}

#[test]
fn reclaim_restores_grants_and_refuses_contradictions() {
    let mut bed = Bed::new();
    let reclaim = |node, range, access, seq| Input::Reclaim { node, file: FILE, range, access, seq };
    assert_eq!(bed.step(reclaim(A, r(0, 100), Access::Exclusive, 40)), []);
    assert_eq!(bed.step(reclaim(A, r(0, 100), Access::Exclusive, 40)), []);
    let refused = Effect::ReclaimRefused { node: B, file: FILE };
    assert_eq!(bed.step(reclaim(B, r(50, 60), Access::Read, 41)), [refused]);
    assert_eq!(bed.guard(1, r(0, 10)), [recall(A, r(0, 10), 41, 2)], "covers all that was ever given out");
    bed.returned(A, r(0, 10), 41);
    assert_eq!(bed.step(reclaim(A, r(0, 10), Access::Read, 40)).len(), 1, "under a held guard");
}
