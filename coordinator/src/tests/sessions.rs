//! Sessions, replies, locks, expiry, grace.

use super::rig::*;
use csv_proto::{
    Access, AdminOrder, Call, Cancel, ClientMessage, Hello, LayoutReclaim, Lock, MkDir, ReclaimDone, SetLock,
    call::Op, client_message, reply,
};
use csv_types::FileId;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn lock(file: FileId, owner: u64, kind: i32, wait: bool) -> Op {
    let lock = Lock { start: 0, end: u64::MAX, r#type: kind.cast_unsigned(), pid: 10 };
    Op::Setlk(SetLock { file: Some(file.into()), owner, lock: Some(lock), wait, ..SetLock::default() })
}

#[test]
fn a_repeated_call_is_answered_and_not_done_again() {
    on(crate::FsKind::Ext4, |rig| {
        let a = rig.node(N1);
        let mkdir = Op::Mkdir(MkDir { parent: a.root(), name: "d".into(), mode: 0o755 });
        let call = Call { id: 77, cred: Some(root()), op: Some(mkdir), ..Call::default() };
        let first = a.finish(a.start_as(call.clone()));
        rig.co().disconnected(&a.session.lock().clone().unwrap());
        a.plug([1; 16], 1);
        assert!(a.welcome().resumed);
        let second = a.finish(a.start_as(call));
        assert_eq!((first.errno, second.errno), (0, 0));
        assert_eq!(attr(&first).file, attr(&second).file);
        assert!(!second.lease);
    });
}

#[test]
fn a_resumed_session_is_asked_again() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        assert!(b.ok(b.lookup("f")).lease);
        rig.co().disconnected(&b.session.lock().clone().unwrap());
        let change = a.start(a.truncate(file, 10));
        b.plug([2; 16], 1);
        assert!(b.wait_invalidated(file).attr);
        assert_eq!(a.finish(change).errno, 0);
    });
}

#[test]
fn hello_must_fit() {
    on(crate::FsKind::Ext4, |rig| {
        struct Nowhere;
        impl crate::Outbox for Nowhere {
            fn send(&self, _: csv_proto::ServerMessage) {}
            fn close(&self, _: &str) {}
        }
        let good = Hello {
            protocol_version: csv_proto::PROTOCOL_VERSION,
            node: 1,
            volume: "vol".to_owned(),
            session: vec![1; 16].into(),
            last_epoch: 0,
        };
        for bad in [
            Hello { protocol_version: 99, ..good.clone() },
            Hello { node: 2, ..good.clone() },
            Hello { volume: "other".to_owned(), ..good.clone() },
            Hello { session: vec![1; 3].into(), ..good.clone() },
            Hello { last_epoch: 99, ..good.clone() },
        ] {
            assert!(rig.co().connect(N1, &bad, Arc::new(Nowhere)).is_err(), "{bad:?}");
        }
        rig.co().connect(N1, &good, Arc::new(Nowhere)).unwrap();
    });
}

#[test]
fn a_stale_epoch_is_refused() {
    on(crate::FsKind::Ext4, |rig| {
        let a = rig.node(N1);
        let call = Call { id: 5, op: Some(a.lookup("x")), ..Call::default() };
        let message = ClientMessage { epoch: 99, body: Some(client_message::Body::Call(call)) };
        rig.co().message(&a.session.lock().clone().unwrap(), message);
        assert_eq!(a.finish(5).errno, libc::ESTALE);
    });
}

#[test]
fn locks_wait_are_cancelled_and_go_with_their_session() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b, c) = (rig.node(N1), rig.node(N2), rig.node(N3));
        let file = a.create("f", 1);
        a.ok(lock(file, 1, libc::F_WRLCK, false));
        assert_eq!(b.call(lock(file, 1, libc::F_WRLCK, false)).errno, libc::EAGAIN);
        let waits = b.start(lock(file, 1, libc::F_WRLCK, true));
        let cancelled = c.start(lock(file, 1, libc::F_RDLCK, true));
        c.ok(c.lookup("f"));
        c.send(client_message::Body::Cancel(Cancel { call_id: cancelled }));
        assert_eq!(c.finish(cancelled).errno, libc::EINTR);
        assert!(!b.answered(waits));
        a.ok(lock(file, 1, libc::F_UNLCK, false));
        assert_eq!(b.finish(waits).errno, 0);
        let range = Lock { start: 5, end: 9, r#type: libc::F_RDLCK.cast_unsigned(), pid: 1 };
        let get = csv_proto::GetLock { file: Some(file.into()), owner: 1, lock: Some(range) };
        let held = a.ok(Op::Getlk(get));
        assert!(
            matches!(&held.body, Some(reply::Body::Lock(l)) if l.r#type == libc::F_WRLCK.cast_unsigned())
        );
        let waits = a.start(lock(file, 1, libc::F_WRLCK, true));
        // n2's csvfs starts anew.
        Node::connect(rig.co(), N2, [22; 16], 0);
        assert_eq!(a.finish(waits).errno, 0);
    });
}

#[test]
fn a_silent_node_expires_and_everything_of_it_is_free() {
    on(crate::FsKind::Ext4, |rig| {
        rig.coordinator.take().unwrap().crash();
        rig.lease_ms = 1000;
        rig.recall_ms = 500;
        rig.fences.store(false, Ordering::SeqCst);
        rig.start();
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = b.create("f", 1);
        b.ok(lock(file, 1, libc::F_WRLCK, false));
        let grant = b.extend(file, 0, 4096);
        rig.write_lun(place(&grant, 0), &[1; 4096]);
        b.ok(Op::LayoutCommit(csv_proto::LayoutCommit {
            file: Some(file.into()),
            size: Some(1000),
            ..Default::default()
        }));
        b.answers.store(false, Ordering::SeqCst);
        rig.co().disconnected(&b.session.lock().clone().unwrap());
        let waits = a.start(lock(file, 1, libc::F_WRLCK, true));
        while !a.answered(waits) {
            a.ping();
            std::thread::yield_now();
        }
        rig.event("session-expired");
        assert_eq!(a.size(file), 1000, "what was committed counts");
        assert_eq!(a.read(file, 0, 5000), vec![1; 1000]);
        let back = Node::connect(rig.co(), N2, [2; 16], rig.co().options().epoch.0);
        assert!(!back.welcome().resumed && !back.welcome().grace);
        back.wait_revoked();
    });
}

#[test]
fn grace_lets_nodes_reclaim_and_nobody_else_in() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = b.create("f", 1);
        b.write(file, 0, vec![1; 8192]);
        let other = b.create("g", 2);
        b.write(other, 0, vec![1; 8192]);
        rig.co().fs().syncfs().unwrap();
        let grant = b.extend(file, 8192, 4096);
        b.ok(lock(file, 1, libc::F_WRLCK, false));
        let epoch = rig.co().options().epoch.0;
        rig.coordinator.take().unwrap().crash();
        drop((a, b));
        rig.start();
        rig.event("grace-begin");
        let a = Node::connect(rig.co(), N1, [1; 16], epoch);
        let b = Node::connect(rig.co(), N2, [2; 16], epoch);
        assert!(b.welcome().grace && !b.welcome().resumed);
        // Its size is not known before grace is over, which must not hold up what grace waits for.
        for node in [&a, &b] {
            let open =
                csv_proto::Open { file: Some(file.into()), handle: 9, reclaim: true, ..Default::default() };
            node.ok(Op::Open(open));
        }
        let cut = a.start(a.truncate(file, 0));
        let get = a.start(a.get(other, 0, 4096, Access::Read));
        a.send(client_message::Body::ReclaimDone(ReclaimDone {}));
        let mut reclaim = SetLock { reclaim: true, ..SetLock::default() };
        if let Op::Setlk(op) = lock(file, 1, libc::F_WRLCK, false) {
            reclaim = SetLock { reclaim: true, ..op };
        }
        b.ok(Op::Setlk(reclaim));
        b.grew(file, 10_000);
        b.ok(Op::LayoutReclaim(LayoutReclaim { file: Some(file.into()), grants: vec![grant.clone()] }));
        assert!(!a.answered(cut) && !a.answered(get));
        assert!(b.recalls().is_empty());
        b.send(client_message::Body::ReclaimDone(ReclaimDone {}));
        rig.event("grace-end");
        assert_eq!(a.finish(get).errno, 0);
        assert_eq!(a.finish(cut).errno, 0);
        assert!(b.wait_recall().up_to_seq >= grant.seq);
        assert_eq!(a.call(lock(file, 1, libc::F_WRLCK, false)).errno, libc::EAGAIN, "n2 has its lock back");
    });
}

#[test]
fn an_open_file_whose_end_moves_is_reclaimed_before_its_layout() {
    on_each_fs(|rig| {
        let b = rig.node(N2);
        let file = b.create("f", 1);
        let grant = b.extend(file, 0, 4096);
        let epoch = rig.co().options().epoch.0;
        rig.coordinator.take().unwrap().crash();
        drop(b);
        rig.start();
        let b = Node::connect(rig.co(), N2, [2; 16], epoch);
        assert!(b.welcome().grace);
        b.ok(Op::Open(csv_proto::Open { file: Some(file.into()), flags: 0, handle: 1, reclaim: true }));
        b.ok(Op::LayoutReclaim(LayoutReclaim { file: Some(file.into()), grants: vec![grant] }));
        b.send(client_message::Body::ReclaimDone(ReclaimDone {}));
        assert!(rig.event("grace-end").contains("every node"));
    });
}

#[test]
fn after_a_crash_the_logical_size_counts_and_is_settled() {
    on_each_fs(|rig| {
        let b = rig.node(N2);
        let file = b.create("f", 1);
        b.extend(file, 0, 4096);
        b.ok(Op::LayoutCommit(csv_proto::LayoutCommit {
            file: Some(file.into()),
            size: Some(77),
            ..Default::default()
        }));
        b.ok(Op::Fsync(csv_proto::Fsync { file: Some(file.into()), ..Default::default() }));
        rig.coordinator.take().unwrap().crash();
        drop(b);
        rig.start();
        // Both nodes come without anything to reclaim.
        let b = Node::connect(rig.co(), N2, [3; 16], 0);
        b.send(client_message::Body::ReclaimDone(ReclaimDone {}));
        rig.event("grace-end");
        assert_eq!(b.size(file), 77);
        b.write(file, 77, vec![1; 3]);
        assert_eq!(b.size(file), 80);
        assert_eq!(rig.co().fs().logical_size(file).unwrap(), None);
        assert_eq!(b.read(file, 0, 100), [vec![0; 77], vec![1; 3]].concat());
    });
}

#[test]
fn too_many_calls_and_opens_are_refused() {
    on(crate::FsKind::Ext4, |rig| {
        rig.coordinator.take().unwrap().crash();
        rig.limits.calls_per_session_max = 3;
        rig.limits.opens_per_session_max = 2;
        rig.start();
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        a.ok(lock(file, 1, libc::F_WRLCK, false));
        // Locks that wait hold up nothing else.
        let locks: Vec<u64> = (0..5)
            .map(|owner| {
                let call = b.start(lock(file, owner, libc::F_WRLCK, true));
                wait_until(|| rig.co().core.lock().lock_calls.values().any(|at| at.id == call));
                call
            })
            .collect();
        b.ok(b.lookup("f"));
        a.ok(Op::AdminOrder(AdminOrder { maintenance: Some(true), ..AdminOrder::default() }));
        let waiting: Vec<u64> = (0..3).map(|_| b.start(b.truncate(file, 1))).collect();
        assert_eq!(b.call(b.lookup("f")).errno, libc::EAGAIN);
        a.ok(Op::AdminOrder(AdminOrder { maintenance: Some(false), ..AdminOrder::default() }));
        for call_id in waiting {
            assert_eq!(b.finish(call_id).errno, 0);
        }
        for call_id in locks {
            b.send(client_message::Body::Cancel(Cancel { call_id }));
            assert_eq!(b.finish(call_id).errno, libc::EINTR);
        }
        a.create("g", 2);
        let open = csv_proto::Open { file: Some(file.into()), handle: 3, ..Default::default() };
        assert_eq!(a.call(Op::Open(open)).errno, libc::ENFILE);
    });
}
