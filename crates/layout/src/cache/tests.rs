//! What the module's text promises, one by one. Random histories are in `crate::model`.

use super::*;

const BLOCK: u64 = 512;

fn r(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end)
}

/// File offset 0 lies at this place on the LUN.
const LUN: u64 = 1 << 30;

fn extents(range: ByteRange) -> [Extent; 1] {
    [Extent { file_offset: range.start, len: range.len(), lun_offset: Some(LunOffset(LUN + range.start)) }]
}

struct Bed {
    cache: LayoutCache,
    segments: Vec<Segment>,
    returns: Vec<Return>,
}

impl Bed {
    fn with(range: ByteRange, access: Access) -> Self {
        let mut cache = LayoutCache::new();
        cache.granted(1, range, access, &extents(range), None);
        Bed { cache, segments: Vec::new(), returns: Vec::new() }
    }

    /// Holds the right to move the end from 5000, space to 64 KiB.
    fn at_end() -> Self {
        let mut bed = Bed::with(r(0, 0), Access::Read);
        let right = EofRight { size: 5000, alloc_end: 65536, dirty: false };
        bed.cache.granted(2, r(4096, u64::MAX), Access::Exclusive, &extents(r(4096, 65536)), Some(right));
        bed
    }

    fn write(&mut self, range: ByteRange) -> Outcome {
        self.cache.begin_write(range, BLOCK, &mut self.segments)
    }

    fn write_hit(&mut self, range: ByteRange) -> IoToken {
        match self.write(range) {
            Outcome::Hit(token) | Outcome::HitRmw(token) => token,
            missed @ (Outcome::Miss | Outcome::Busy) => panic!("{range}: {missed:?}"),
        }
    }

    fn read(&mut self, range: ByteRange) -> Outcome {
        self.cache.begin_read(range, &mut self.segments)
    }

    fn end(&mut self, token: IoToken, wrote: bool) -> Vec<Return> {
        self.cache.end(token, wrote, &mut self.returns);
        std::mem::take(&mut self.returns)
    }

    fn recall(&mut self, id: u64, range: ByteRange, up_to_seq: u64) -> Vec<Return> {
        self.cache.recalled(id, range, up_to_seq, id % 2 == 1, &mut self.returns);
        std::mem::take(&mut self.returns)
    }
}

#[test]
fn reads_of_any_bytes_hit_exactly() {
    let mut bed = Bed::with(r(0, 4096), Access::Read);
    let outcome = bed.read(r(100, 4000));
    assert_eq!(
        bed.segments,
        [Segment { file_offset: 100, len: 3900, lun_offset: Some(LunOffset(LUN + 100)) }]
    );
    let Outcome::Hit(token) = outcome else { panic!("{outcome:?}") };
    assert_eq!(bed.end(token, false), []);
    assert_eq!(bed.read(r(100, 4097)), Outcome::Miss);
    assert!(bed.segments.is_empty());
    assert_eq!(bed.write(r(0, 512)), Outcome::Miss);
}

#[test]
fn writes_that_are_not_whole_blocks_need_exclusive() {
    let mut bed = Bed::with(r(0, 4096), Access::Write);
    let token = bed.write_hit(r(512, 1024));
    bed.end(token, true);
    assert!(bed.cache.take_wrote());
    assert!(!bed.cache.take_wrote());
    assert_eq!(bed.write(r(512, 1000)), Outcome::Miss);
    bed.cache.granted(2, r(512, 1024), Access::Exclusive, &extents(r(512, 1024)), None);
    assert!(matches!(bed.write(r(600, 1000)), Outcome::HitRmw(_)));
    assert_eq!(bed.segments[0].lun_offset, Some(LunOffset(LUN + 600)));
    assert_eq!(bed.write(r(1000, 1030)), Outcome::Miss, "the second block is only held for writing");
}

#[test]
fn holes_read_as_zeros_and_are_not_written() {
    let mut bed = Bed::with(r(0, 0), Access::Read);
    let hole = Extent { file_offset: 0, len: 4096, lun_offset: None };
    bed.cache.granted(1, r(0, 4096), Access::Exclusive, &[hole], None);
    assert!(matches!(bed.read(r(0, 10)), Outcome::Hit(_)));
    assert_eq!(bed.segments, [Segment { file_offset: 0, len: 10, lun_offset: None }]);
    assert_eq!(bed.write(r(0, 512)), Outcome::Miss);
    assert_eq!(bed.write(r(0, 10)), Outcome::Miss);
}

#[test]
fn read_modify_write_excludes_other_writes_of_its_blocks() {
    let mut bed = Bed::with(r(0, 4096), Access::Exclusive);
    let rmw = bed.write_hit(r(600, 700));
    assert_eq!(bed.write(r(800, 900)), Outcome::Busy);
    assert_eq!(bed.write(r(512, 1024)), Outcome::Busy);
    let beside = bed.write_hit(r(1024, 2048));
    assert_eq!(bed.write(r(2000, 2100)), Outcome::Busy);
    assert!(matches!(bed.read(r(600, 700)), Outcome::Hit(_)));
    bed.end(rmw, true);
    bed.end(beside, true);
    assert!(matches!(bed.write(r(2000, 2100)), Outcome::HitRmw(_)));
}

#[test]
fn a_recall_waits_for_what_began_before_and_for_nothing_else() {
    let mut bed = Bed::with(r(0, 4096), Access::Write);
    let old = bed.write_hit(r(0, 512));
    assert_eq!(bed.recall(2, r(0, 1024), 1), []);
    assert_eq!(bed.recall(2, r(0, 1024), 1), [], "doubled while it waits");
    assert_eq!(bed.read(r(0, 10)), Outcome::Miss);
    let outside = bed.write_hit(r(1024, 2048));
    bed.cache.granted(2, r(0, 4096), Access::Write, &extents(r(0, 4096)), None);
    let newer = bed.write_hit(r(0, 512));
    let answer =
        Return { recall_id: 2, range: r(0, 1024), up_to_seq: 1, size: None, size_dirty: false, wrote: true };
    assert_eq!(bed.end(old, true), [answer]);
    assert_eq!(bed.recall(2, r(0, 1024), 1), [], "doubled again: now for the newer write");
    assert_eq!(bed.end(outside, false), []);
    assert_eq!(bed.end(newer, false), [Return { wrote: false, ..answer }]);
    assert_eq!(bed.recall(2, r(0, 1024), 1), [Return { wrote: false, ..answer }], "answered every time");
}

#[test]
fn keep_read_keeps_reading() {
    let mut bed = Bed::with(r(0, 4096), Access::Exclusive);
    let Outcome::Hit(read) = bed.read(r(0, 4096)) else { panic!("held") };
    let write = bed.write_hit(r(0, 512));
    assert_eq!(bed.recall(3, r(0, 4096), 1), []);
    assert_eq!(bed.write(r(0, 512)), Outcome::Miss);
    assert!(matches!(bed.read(r(0, 4096)), Outcome::Hit(_)));
    assert_eq!(bed.end(write, true).len(), 1, "reads in flight may go on");
    bed.end(read, false);
}

#[test]
fn what_was_recalled_or_given_back_does_not_come_to_life() {
    let mut bed = Bed::with(r(0, 4096), Access::Write);
    assert_eq!(bed.recall(2, r(0, 1024), 3).len(), 1);
    bed.cache.granted(3, r(0, 4096), Access::Write, &extents(r(0, 4096)), None);
    assert_eq!(bed.read(r(0, 512)), Outcome::Miss);
    assert!(matches!(bed.read(r(1024, 4096)), Outcome::Hit(_)));
    bed.cache.give_back(r(3072, 4096), &mut bed.returns);
    bed.cache.granted(3, r(0, 4096), Access::Write, &extents(r(0, 4096)), None);
    assert_eq!(bed.write(r(3072, 4096)), Outcome::Miss);
    bed.cache.granted(4, r(0, 4096), Access::Write, &extents(r(0, 4096)), None);
    assert!(matches!(bed.write(r(0, 4096)), Outcome::Hit(_)));
}

#[test]
fn the_end_of_file_moves_with_successful_writes_only() {
    let mut bed = Bed::at_end();
    assert_eq!(bed.cache.readable_len(r(4900, 6000)), 100);
    assert!(matches!(bed.read(r(4900, 6000)), Outcome::Hit(_)));
    assert_eq!(bed.segments.iter().map(|s| s.len).sum::<u64>(), 100);
    let failed = bed.write_hit(r(5000, 5100));
    bed.end(failed, false);
    assert_eq!(bed.cache.eof(), Some(EofRight { size: 5000, alloc_end: 65536, dirty: false }));
    let token = bed.write_hit(r(5000, 5100));
    bed.end(token, true);
    assert_eq!(bed.cache.eof(), Some(EofRight { size: 5100, alloc_end: 65536, dirty: true }));
    bed.cache.size_committed(5000);
    assert!(bed.cache.eof().unwrap().dirty, "grew since");
    bed.cache.size_committed(5100);
    assert!(!bed.cache.eof().unwrap().dirty);
    assert_eq!(bed.write(r(65024, 66048)), Outcome::Miss, "behind the allocated space");
    let empty = bed.write_hit(r(6000, 6000));
    bed.end(empty, true);
    assert_eq!(bed.cache.eof().unwrap().size, 5100);
}

#[test]
fn the_end_of_file_goes_back_with_its_final_size() {
    let mut bed = Bed::at_end();
    let far = bed.write_hit(r(32768, 36864));
    assert_eq!(bed.recall(2, r(0, 4200), 2), [], "touches the block of the end: all of the right must go");
    assert_eq!(bed.cache.eof(), None);
    assert_eq!(bed.write(r(8192, 12288)), Outcome::Miss);
    let answer = Return {
        recall_id: 2,
        range: r(0, u64::MAX),
        up_to_seq: 2,
        size: Some(36864),
        size_dirty: true,
        wrote: true,
    };
    assert_eq!(bed.end(far, true), [answer]);
    let again = bed.recall(2, r(0, 36870), 2);
    assert_eq!(again[0].size, Some(36864), "the first answer may be lost");
    assert_eq!(bed.recall(4, ByteRange::ALL, 9)[0].size, None, "may mean a newer right");
    assert!(bed.cache.is_empty());
}

#[test]
fn recalls_in_front_of_the_end_leave_it_alone() {
    let mut bed = Bed::at_end();
    assert_eq!(bed.recall(2, r(0, 4096), 2)[0].size, None);
    assert!(bed.cache.eof().is_some());
    let right = EofRight { size: 5000, alloc_end: 1 << 20, dirty: false };
    let token = bed.write_hit(r(5000, 6000));
    bed.end(token, true);
    bed.cache.granted(5, r(4096, u64::MAX), Access::Exclusive, &extents(r(4096, 1 << 20)), Some(right));
    assert_eq!(bed.cache.eof(), Some(EofRight { size: 6000, alloc_end: 1 << 20, dirty: true }));
}

#[test]
fn an_end_of_file_right_that_was_recalled_on_its_way_is_not_taken_up() {
    let mut bed = Bed::with(r(0, 4096), Access::Read);
    bed.recall(2, r(4096, 8192), 6);
    let right = EofRight { size: 5000, alloc_end: 65536, dirty: false };
    bed.cache.granted(6, r(0, u64::MAX), Access::Exclusive, &extents(r(0, 65536)), Some(right));
    assert_eq!(bed.cache.eof(), None);
    assert_eq!(bed.write(r(8192, 12288)), Outcome::Miss, "behind the end without the right");
    assert!(matches!(bed.write(r(0, 4096)), Outcome::Hit(_)));
}

#[test]
fn revoked_means_nothing_begins_and_all_drains() {
    let mut bed = Bed::with(r(0, 4096), Access::Write);
    let token = bed.write_hit(r(0, 4096));
    bed.cache.invalidate_all(&mut bed.returns);
    assert!(bed.returns.is_empty());
    assert_eq!(bed.read(r(0, 1)), Outcome::Miss);
    bed.cache.granted(1, r(0, 4096), Access::Write, &extents(r(0, 4096)), None);
    assert_eq!(bed.read(r(0, 1)), Outcome::Miss, "an old grant");
    assert!(!bed.cache.is_empty());
    assert_eq!(bed.end(token, true).len(), 1);
    assert!(bed.cache.is_empty());
}

#[test]
fn held_names_grants_the_end_and_io_on_recalled_ranges() {
    let mut bed = Bed::at_end();
    bed.cache.granted(3, r(0, 4096), Access::Write, &extents(r(0, 4096)), None);
    let token = bed.write_hit(r(0, 512));
    bed.recall(2, r(0, 1024), 3);
    let held = bed.cache.held();
    let what: Vec<_> = held.iter().map(|g| (g.range, g.access, g.extents.len(), g.eof.is_some())).collect();
    assert_eq!(
        what,
        [
            (r(1024, 4096), Access::Write, 1, false),
            (r(4096, u64::MAX), Access::Exclusive, 1, true),
            (r(0, 512), Access::Write, 0, false),
        ]
    );
    bed.cache.forget_recalls();
    assert_eq!(bed.end(token, true), [], "the old coordinator is gone");
}

#[test]
fn an_end_that_is_on_its_way_back_is_kept_when_the_coordinator_dies() {
    let mut bed = Bed::at_end();
    let token = bed.write_hit(r(4096, 8192));
    bed.recall(2, ByteRange::ALL, 2);
    assert!(bed.cache.held().iter().any(|grant| grant.eof.is_some()));
    bed.cache.forget_recalls();
    bed.end(token, true);
    assert_eq!(bed.cache.eof().map(|right| right.size), Some(8192));
    assert_eq!(bed.recall(2, ByteRange::ALL, 50)[0].size, Some(8192));
}

#[test]
fn in_flight_is_bounded() {
    let mut bed = Bed::with(r(0, 4096), Access::Read);
    let mut tokens: Vec<_> = (0..IO_MAX).map(|_| bed.read(r(0, 1))).collect();
    assert_eq!(bed.read(r(0, 1)), Outcome::Busy);
    let Some(Outcome::Hit(token)) = tokens.pop() else { panic!("not a hit") };
    bed.end(token, false);
    assert!(matches!(bed.read(r(0, 1)), Outcome::Hit(_)));
    assert_eq!(bed.cache.in_flight(), IO_MAX);
}

#[test]
fn without_the_end_of_file_right_nothing_begins_behind_the_size() {
    // An exclusive grant of whole blocks on a file of 5,000 bytes.
    let mut bed = Bed::with(r(0, 8192), Access::Exclusive);
    bed.cache.set_size_limit(5000);
    assert_eq!(bed.read(r(4096, 8192)), Outcome::Miss);
    let mut out = Vec::new();
    assert_eq!(bed.cache.begin_write(r(4096, 8192), 512, &mut out), Outcome::Miss);
    assert_eq!(bed.cache.begin_write(r(4999, 5001), 512, &mut out), Outcome::Miss);
    assert!(matches!(bed.cache.begin_write(r(4990, 5000), 512, &mut out), Outcome::HitRmw(_)));
    assert!(matches!(bed.read(r(4096, 5000)), Outcome::Hit(_)));
}
