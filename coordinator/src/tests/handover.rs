//! Planned hand-over, and nodes that are known to be fenced.

use super::rig::*;
use csv_proto::{LayoutReclaim, Lock, ReclaimDone, SetLock, call::Op, client_message};
use csv_types::FileId;
use std::time::Duration;

fn lock(file: FileId, owner: u64, wait: bool) -> Op {
    let lock = Lock { start: 0, end: u64::MAX, r#type: libc::F_WRLCK.cast_unsigned(), pid: 10 };
    Op::Setlk(SetLock { file: Some(file.into()), owner, lock: Some(lock), wait, ..SetLock::default() })
}

fn reclaimed(node: &Node) {
    node.send(client_message::Body::ReclaimDone(ReclaimDone {}));
}

#[test]
fn what_waits_is_sent_on_and_layouts_stay() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        let grant = b.extend(file, 0, 1 << 20);
        a.ok(lock(file, 1, false));
        let waits = b.start(lock(file, 2, true));
        wait_until(|| rig.co().core.lock().lock_calls.values().any(|at| at.id == waits));
        // As by an order, which would recall layouts besides.
        rig.co().maintenance.send_replace(true);
        let held = a.start(a.truncate(file, 1));
        let coordinator = rig.coordinator.take().unwrap();
        let went = coordinator.hand_over(WAIT);
        assert_eq!((went.unfinished, went.synced), (0, Ok(())));
        assert_eq!(b.finish(waits).errno, csv_proto::MOVED);
        assert_eq!(a.finish(held).errno, csv_proto::MOVED);
        assert!(b.recalls().is_empty(), "a hand-over recalls nothing");
        b.wait_closed();
        let epoch = coordinator.options().epoch.0;
        drop((coordinator, a, b));

        rig.start();
        let (a, b) =
            (Node::connect(rig.co(), N1, [1; 16], epoch), Node::connect(rig.co(), N2, [2; 16], epoch));
        assert!(a.welcome().grace && b.welcome().grace && !b.welcome().unsynced_lost);
        reclaimed(&a);
        b.ok(Op::LayoutReclaim(LayoutReclaim { file: Some(file.into()), grants: vec![grant] }));
        reclaimed(&b);
        assert!(rig.event("grace-end").contains("every node"));
        b.grew(file, 5000);
        assert_eq!(a.size(file), 5000);
    });
}

#[test]
fn a_call_under_way_is_finished_and_later_ones_are_not_begun() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        let grant = b.extend(file, 0, 1 << 20);
        assert!(!grant.extents.is_empty());
        b.returns.store(false, std::sync::atomic::Ordering::SeqCst);
        let under_way = a.start(a.truncate(file, 1));
        let recall = b.wait_recall();
        let coordinator = rig.coordinator.take().unwrap();
        let giver = std::sync::Arc::clone(&coordinator);
        let moving = std::thread::spawn(move || giver.hand_over(WAIT));
        wait_until(|| coordinator.core.lock().moving);
        let late = a.start(a.lookup("f"));
        assert_eq!(a.finish(late).errno, csv_proto::MOVED);
        b.give_back(&recall);
        assert_eq!(a.finish(under_way).errno, 0);
        assert_eq!(moving.join().unwrap().unfinished, 0);
        drop((coordinator, a, b));
        rig.start();
        assert_eq!(rig.co().fs().attr(file).unwrap().size, 1);
    });
}

#[test]
fn what_is_not_finished_in_time_is_not_answered() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        b.extend(file, 0, 1 << 20);
        b.answers.store(false, std::sync::atomic::Ordering::SeqCst);
        let stuck = a.start(a.truncate(file, 1));
        b.wait_recall();
        let went = rig.coordinator.take().unwrap().hand_over(Duration::from_millis(50));
        assert_eq!((went.unfinished, went.synced), (1, Ok(())));
        a.wait_closed();
        assert!(!a.answered(stuck));
    });
}

#[test]
fn grace_does_not_wait_for_the_fenced() {
    on_each_fs(|rig| {
        let (a, b, c) = (rig.node(N1), rig.node(N2), rig.node(N3));
        let file = b.create("f", 1);
        b.extend(file, 0, 4096);
        let epoch = rig.co().options().epoch.0;
        rig.coordinator.take().unwrap().crash();
        drop((a, b, c));
        rig.gone = vec![N1];
        rig.start();
        let b = Node::connect(rig.co(), N2, [2; 16], epoch);
        reclaimed(&b);
        // The third is found to be dead only now.
        rig.co().nodes_gone(&[N3]);
        assert!(rig.event("grace-end").contains("every node that is left"));
        b.ok(b.truncate(file, 3));
    });
}

#[test]
fn a_fenced_node_holds_nothing_any_more() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        b.extend(file, 0, 1 << 20);
        b.answers.store(false, std::sync::atomic::Ordering::SeqCst);
        let call = a.start(a.truncate(file, 1));
        b.wait_recall();
        rig.co().nodes_gone(&[N2]);
        assert_eq!(a.finish(call).errno, 0);
        b.wait_closed();
    });
}

#[test]
fn a_coordinator_that_was_fenced_answers_nothing() {
    on(crate::FsKind::Ext4, |rig| {
        let a = rig.node(N1);
        let file = a.create("f", 1);
        rig.co().fs().crash().unwrap();
        assert_eq!(a.call(a.truncate(file, 5)).errno, libc::EIO, "a disk that fails is told");
        rig.confirms.store(false, std::sync::atomic::Ordering::SeqCst);
        let call = a.start(a.truncate(file, 5));
        a.wait_closed();
        assert!(!a.answered(call));
    });
}

#[test]
fn a_sync_that_fails_at_the_end_leaves_the_file_system_unclean() {
    for (by_stop, fails) in [(false, false), (false, true), (true, false), (true, true)] {
        on(crate::FsKind::Ext4, |rig| {
            let a = rig.node(N1);
            a.create("f", 1);
            if fails {
                rig.co().fs().fail_flushes();
            }
            let coordinator = rig.coordinator.take().unwrap();
            let synced = if by_stop { coordinator.stop() } else { coordinator.hand_over(WAIT).synced };
            assert_eq!(synced, if fails { Err(rustix::io::Errno::IO) } else { Ok(()) });
            drop((coordinator, a));
            assert_eq!(rig.needs_recovery(), fails, "by stop: {by_stop}");
        });
    }
}
