//! What is lent, taken back, extended and settled.

use super::rig::*;
use csv_proto::{
    Access, AdminOrder, Cancel, Fallocate, GetAttr, LayoutCommit, Recall, Seek, call::Op, client_message,
    reply,
};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const BLOCK: u64 = 4096;

#[test]
fn a_file_is_read_and_written_through_its_grant() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        a.write(file, 0, vec![7; 8 << 10]);
        let read = b.granted(file, 0, 4096, Access::Read);
        assert_eq!((read.offset, read.end, read.size), (0, 8 << 10, 8 << 10), "as much as there is");
        assert_eq!(rig.read_lun(place(&read, 5000), 3), [7; 3]);

        let write = b.granted(file, 0, BLOCK, Access::Write);
        assert_eq!(rig.co().core.lock().table.grants(file).count(), 1, "nothing of n1");
        rig.write_lun(place(&write, 4096), &[9; 4096]);
        assert_eq!(
            a.read(file, 4090, 10),
            [[7; 6].to_vec(), [9; 4].to_vec()].concat(),
            "past the page cache"
        );
        assert!(b.recalls().is_empty(), "reading beside a writer takes nothing");

        // A write through the coordinator takes the blocks back first.
        a.write(file, 100, vec![1; 10]);
        assert_eq!(b.wait_recall().up_to_seq, write.seq);
        assert_eq!(a.read(file, 98, 4), [7, 7, 1, 1]);
        let again = b.granted(file, 0, BLOCK, Access::Read);
        assert_eq!(rig.read_lun(place(&again, 100), 2), [1; 2], "the page cache was written back");
    });
}

#[test]
fn a_hole_is_filled_before_it_is_lent_for_writing() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("sparse", 1);
        a.ok(a.truncate(file, 10 << 20));
        let zeros = a.granted(file, 0, BLOCK, Access::Read);
        assert!(zeros.extents.iter().all(|extent| extent.zeros));
        let write = b.granted(file, 4 << 20, BLOCK, Access::Write);
        a.wait_recall();
        rig.write_lun(place(&write, 4 << 20), &[3; 4096]);
        let seen = a.granted(file, 4 << 20, BLOCK, Access::Read);
        assert_eq!(rig.read_lun(place(&seen, 4 << 20), 1), [3], "not the zeros of the older map");
        assert_eq!(a.size(file), 10 << 20);
    });
}

#[test]
fn an_unaligned_tail_is_lent_exclusively_in_whole_blocks() {
    on_each_fs(|rig| {
        let a = rig.node(N1);
        let file = a.create("tail", 1);
        a.ok(a.truncate(file, 5000));
        let read = a.granted(file, 0, 5000, Access::Read);
        assert_eq!(read.end, 5000);
        let grant = a.granted(file, 4096, 100, Access::Exclusive);
        assert_eq!(grant.end, 8192);
        rig.write_lun(place(&grant, 4096), &[5; 904]);
        assert_eq!(a.size(file), 5000, "a filled last block does not move the end");
        assert_eq!(a.read(file, 4096, 4096), vec![5; 904]);
        let behind = a.call(a.get(file, 8192, 1, Access::Read));
        assert_eq!(behind.errno, libc::ENXIO);
        assert_eq!(attr(&behind).size, 5000);
    });
}

#[test]
fn a_truncate_waits_for_what_is_lent() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        a.write(file, 0, vec![1; 64 << 10]);
        b.answers.store(false, Ordering::SeqCst);
        b.granted(file, 0, 64 << 10, Access::Write);
        let cut = a.start(a.truncate(file, 10_000));
        let recall = b.wait_recall();
        assert!(recall.offset <= 8192 && recall.end >= 64 << 10, "{recall:?}");
        assert!(!a.answered(cut), "blocks under a layout are not freed");
        b.give_back(&recall);
        b.answers.store(true, Ordering::SeqCst);
        assert_eq!(attr(&a.finish(cut)).size, 10_000);
        let core = rig.co().core.lock();
        assert!(core.table.holds(N2, file, csv_types::ByteRange::new(0, 8192), csv_layout::Access::Write));
    });
}

#[test]
fn the_end_of_file_moves_under_its_right_and_is_settled() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = b.create("grow", 1);
        b.write(file, 0, vec![1; 100]);
        let grant = b.extend(file, 100, BLOCK);
        assert!(grant.eof && grant.end == u64::MAX && grant.size == 100 && grant.alloc_end >= 100 + BLOCK);
        let mut block = rig.read_lun(place(&grant, 0), 4096);
        block[100..4000].fill(2);
        rig.write_lun(place(&grant, 0), &block);
        assert_eq!(a.size(file), 100, "n2 has not told");
        b.grew(file, 4000);
        assert_eq!(a.size(file), 4000, "n2 was asked");
        assert!(b.queries() >= 1);
        assert_eq!(a.read(file, 99, 5000), [vec![1], vec![2; 3900]].concat());

        b.grew(file, 4050);
        b.ok(Op::LayoutCommit(LayoutCommit {
            file: Some(file.into()),
            size: Some(4050),
            ..Default::default()
        }));
        assert_eq!(rig.co().fs().logical_size(file).unwrap(), Some(4050));
        // Another node's extension takes the right over.
        b.grew(file, 4060);
        let taken = a.extend(file, 5000, 10);
        assert_eq!(taken.size, 4060);
        assert!(b.recalls().iter().any(|recall| recall.end == u64::MAX));
        a.grew(file, 5010);
        rig.co().stop().unwrap();
        let fs = rig.co().fs();
        assert_eq!((fs.logical_size(file).unwrap(), fs.attr(file).unwrap().size), (None, 5010));
    });
}

#[test]
fn an_extended_unaligned_tail_leaves_no_page_behind() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("tail", 1);
        a.write(file, 0, vec![1; 5000]);
        let grant = b.extend(file, 4096, 2 * BLOCK);
        for block in [4096, 8192] {
            rig.write_lun(place(&grant, block), &[2; 4096]);
        }
        b.grew(file, 12_288);
        // Everything comes back, and then the page cache may be used again.
        b.give_back(&Recall {
            file: Some(file.into()),
            end: u64::MAX,
            up_to_seq: grant.seq,
            ..Default::default()
        });
        b.ping();
        assert_eq!(rig.co().core.lock().table.grants(file).count(), 0);
        assert_eq!(a.read(file, 4096, 8192), [2; 8192], "not what was in the page cache before");
    });
}

#[test]
fn a_tail_is_extended_under_no_io_of_its_own_node() {
    on_each_fs(|rig| {
        let b = rig.node(N2);
        let file = b.create("tail", 1);
        b.write(file, 0, vec![1; 5000]);
        let held = b.granted(file, 4096, 512, Access::Exclusive);
        b.answers.store(false, Ordering::SeqCst);
        let op = csv_proto::LayoutGet {
            file: Some(file.into()),
            offset: 5000,
            len: BLOCK,
            extend: true,
            ..Default::default()
        };
        let extend = b.start(Op::LayoutGet(op));
        let recall = b.wait_recall();
        assert!(recall.offset <= 4096 && recall.end >= 8192 && recall.up_to_seq >= held.seq, "{recall:?}");
        assert!(
            !b.answered(extend),
            "a write of 512 bytes may be under way in the block that is to be zeroed"
        );
        // It ends now.
        rig.write_lun(place(&held, 4096), &[3; 512]);
        b.answers.store(true, Ordering::SeqCst);
        b.give_back(&recall);
        assert!(grant(b.finish(extend)).eof);
        assert_eq!(b.read(file, 4096, 904), [[3; 512].to_vec(), [1; 392].to_vec()].concat());
    });
}

#[test]
fn appends_of_two_nodes_and_a_holder_do_not_overlap() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("log", 1);
        let append = |text: &'static str| {
            let data = bytes::Bytes::from_static(text.as_bytes());
            Op::Write(csv_proto::Write { file: Some(file.into()), data, append: true, ..Default::default() })
        };
        a.ok(append("one"));
        let grant = b.extend(file, 3, 3);
        let mut block = rig.read_lun(place(&grant, 0), 4096);
        block[3..6].copy_from_slice(b"two");
        rig.write_lun(place(&grant, 0), &block);
        b.grew(file, 6);
        a.ok(append("three"));
        b.ok(append("four"));
        assert_eq!(a.read(file, 0, 100), b"onetwothreefour");
    });
}

#[test]
fn a_node_that_keeps_a_layout_is_fenced() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        a.write(file, 0, vec![1; 8192]);
        b.granted(file, 0, 8192, Access::Write);
        b.answers.store(false, Ordering::SeqCst);
        a.ok(a.truncate(file, 0));
        assert!(b.wait_revoked().contains("did not return"));
        b.wait_closed();
        assert!(rig.event("fence").contains("n2"));
        rig.event("fenced");
    });
}

#[test]
fn without_a_fence_the_lease_is_waited_for() {
    on(crate::FsKind::Ext4, |rig| {
        rig.coordinator.take().unwrap().crash();
        rig.lease_ms = 1500;
        rig.recall_ms = 300;
        rig.start();
        rig.fences.store(false, Ordering::SeqCst);
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        a.write(file, 0, vec![1; 8192]);
        b.granted(file, 0, 8192, Access::Write);
        b.answers.store(false, Ordering::SeqCst);
        let begun = std::time::Instant::now();
        let cut = a.start(a.truncate(file, 0));
        b.wait_revoked();
        // A node that still talks is not believed any more.
        b.ping();
        while !a.answered(cut) {
            a.ping();
            assert!(begun.elapsed() < WAIT);
            std::thread::yield_now();
        }
        assert_eq!(a.finish(cut).errno, 0);
        assert!(begun.elapsed().as_millis() >= 3000, "not before the lease and its margin are over");
        rig.event("session-expired");
    });
}

#[test]
fn punched_space_is_not_lent_and_reads_as_zeros() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        a.write(file, 0, vec![1; 256 << 10]);
        b.granted(file, 0, 256 << 10, Access::Write);
        let mode = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).cast_unsigned();
        a.ok(Op::Fallocate(Fallocate { file: Some(file.into()), offset: 64 << 10, len: 64 << 10, mode }));
        b.wait_recall();
        let again = b.granted(file, 0, 256 << 10, Access::Read);
        let zeros: u64 = again.extents.iter().filter(|extent| extent.zeros).map(|extent| extent.len).sum();
        assert_eq!(zeros, 64 << 10);
        let hole = a.ok(Op::Seek(Seek { file: Some(file.into()), offset: 0, whence: 4 }));
        assert!(matches!(hole.body, Some(reply::Body::Count(count)) if count.value == 64 << 10), "{hole:?}");
    });
}

#[test]
fn block_io_is_let_through_only_under_a_grant_and_waited_for() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        a.write(file, 0, vec![1; 16 << 10]);
        let token = String::from_utf8(b.welcome().smb_token.to_vec()).unwrap();
        assert_eq!(rig.co().token_node(&token), Some(N2));
        let grant = b.granted(file, 0, 16 << 10, Access::Read);
        let lun = place(&grant, 4096);
        rig.co().block_check(&token, lun, 4096, false).unwrap();
        assert!(rig.co().block_check(&token, lun, 4096, true).is_err(), "the grant is for reading");
        assert!(rig.co().block_check("00", lun, 4096, false).is_err());
        let io = rig.co().block_begin(&token, lun, 4096, false).unwrap();
        let cut = a.start(a.truncate(file, 0));
        b.wait_recall();
        let other = a.start(a.lookup("nothing"));
        a.finish(other);
        assert!(!a.answered(cut), "I/O of the block service is under way");
        drop(io);
        assert_eq!(a.finish(cut).errno, 0);
        assert!(rig.co().block_check(&token, lun, 4096, false).is_err(), "given back");
    });
}

#[test]
fn redirection_takes_layouts_back_and_gives_none() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        a.write(file, 0, vec![1; 8192]);
        b.granted(file, 0, 8192, Access::Write);
        a.ok(Op::AdminOrder(AdminOrder { redirect: Some(true), ..AdminOrder::default() }));
        b.wait_recall();
        let reply = b.ok(b.get(file, 0, 10, Access::Read));
        assert!(
            matches!(&reply.body, Some(reply::Body::Redirect(r)) if r.reason == "UserRequest" && !r.permanent)
        );
        a.ok(Op::AdminOrder(AdminOrder { redirect: Some(false), ..AdminOrder::default() }));
        b.granted(file, 0, 10, Access::Read);
    });
}

#[test]
fn a_full_volume_says_so_and_keeps_the_size() {
    on_each_fs(|rig| {
        let a = rig.node(N1);
        let file = a.create("big", 1);
        let get = csv_proto::LayoutGet {
            file: Some(file.into()),
            offset: 0,
            len: 900 << 20,
            extend: true,
            ..Default::default()
        };
        assert_eq!(a.call(Op::LayoutGet(get)).errno, libc::ENOSPC);
        assert_eq!(a.size(file), 0);
        let grant = a.extend(file, 0, 4096);
        assert!(grant.alloc_end >= 4096);
    });
}

#[test]
fn nobody_goes_past_a_size_that_is_being_written_down() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = b.create("grow", 1);
        b.extend(file, 0, BLOCK);
        let lock = rig.lock_of(file);
        let idle = Arc::strong_count(&lock);
        let frozen = rig.freeze();
        let size = Some(77);
        let commit =
            b.start(Op::LayoutCommit(LayoutCommit { file: Some(file.into()), size, ..Default::default() }));
        wait_until(|| lock.try_read().is_err());
        let get = a.start(Op::Getattr(GetAttr { file: Some(file.into()) }));
        wait_until(|| a.answered(get) || Arc::strong_count(&lock) >= idle + 2);
        drop(frozen);
        assert_eq!(attr(&a.finish(get)).size, 77);
        assert_eq!(b.finish(commit).errno, 0);
    });
}

#[test]
fn a_get_that_is_cancelled_while_it_is_mapped_is_answered() {
    on(crate::FsKind::Ext4, |rig| {
        let a = rig.node(N1);
        let file = a.create("f", 1);
        a.write(file, 0, vec![1; 8192]);
        let lock = rig.lock_of(file).try_write_owned().unwrap();
        let get = a.start(a.get(file, 0, 8192, Access::Read));
        wait_until(|| rig.co().core.lock().file(file).mapping == 1);
        a.send(client_message::Body::Cancel(Cancel { call_id: get }));
        drop(lock);
        assert_eq!(a.finish(get).errno, libc::EINTR);
        assert!(!rig.co().core.lock().table.is_busy(file));
    });
}

#[test]
fn a_copy_caches_nothing_that_is_lent() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let (src, dst) = (a.create("src", 1), a.create("dst", 2));
        a.write(src, 0, vec![1; 1 << 20]);
        let grant = b.granted(src, 0, 1 << 20, Access::Write);
        assert_eq!((grant.offset, grant.end), (0, 1 << 20));
        let copy = |from, to, to_offset| {
            let op = csv_proto::CopyRange {
                src: Some(csv_proto::FileId::from(from)),
                src_offset: 100,
                dst: Some(csv_proto::FileId::from(to)),
                dst_offset: to_offset,
                len: 60_000,
            };
            let reply = a.ok(Op::CopyRange(op));
            assert!(matches!(reply.body, Some(reply::Body::Count(c)) if c.value == 60_000), "{reply:?}");
        };
        copy(src, dst, 7);
        assert_eq!(a.read(dst, 0, 100_000), [vec![0; 7], vec![1; 60_000]].concat());
        // Inside of one file, too.
        copy(src, src, 65_536);
        let core = rig.co().core.lock();
        let rest = csv_types::ByteRange::new(128 << 10, 1 << 20);
        assert!(
            core.table.holds(N2, src, rest, csv_layout::Access::Write),
            "only the copied bytes came back"
        );
        drop(core);
        rig.write_lun(place(&grant, 128 << 10), &[2; 64 << 10]);
        b.give_back(&Recall {
            file: Some(src.into()),
            end: u64::MAX,
            up_to_seq: grant.seq,
            ..Recall::default()
        });
        assert_eq!(a.read(src, 128 << 10, 64 << 10), vec![2; 64 << 10]);
    });
}

#[test]
fn zeros_that_are_to_be_filled_are_taken_from_the_filler_too() {
    // A grant can be smaller than what is filled for it, and then another node may write where this one sees zeros.
    for access in [Access::Write, Access::Exclusive] {
        on_each_fs(|rig| {
            let a = rig.node(N1);
            let file = a.create("sparse", 1);
            a.ok(a.truncate(file, 10 << 20));
            let zeros = a.granted(file, 0, BLOCK, Access::Read);
            let write = a.granted(file, 4 << 20, BLOCK, access);
            let recalls = a.recalls();
            let [recall] = &recalls[..] else { panic!("{recalls:?}") };
            assert!(recall.up_to_seq >= zeros.seq && recall.up_to_seq < write.seq);
            assert_eq!((recall.offset, recall.end), (4 << 20, 5 << 20), "what was filled");
            place(&write, (5 << 20) - 1);
        });
    }
}

#[test]
fn the_holder_of_the_end_fills_holes_behind_the_size_that_is_known() {
    for access in [Access::Write, Access::Exclusive] {
        on_each_fs(|rig| {
            let b = rig.node(N2);
            let file = b.create("sparse", 1);
            b.extend(file, 10 << 20, BLOCK);
            // Not told yet.
            b.grew(file, (10 << 20) + BLOCK);
            let grant = b.granted(file, 5 << 20, BLOCK, access);
            rig.write_lun(place(&grant, 5 << 20), &[3; 4096]);
            assert_eq!(rig.node(N1).read(file, 5 << 20, 2), [3; 2]);
        });
    }
}
