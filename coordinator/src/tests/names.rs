//! Names, orphans, leases on metadata, and calls that are sent again.

use super::rig::*;
use csv_proto::{
    Access, Call, Close, Create, GetAttr, Link, MkDir, Open, ReadDir, Rename, SetAttr, call::Op, reply,
};
use csv_types::FileId;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

fn rename(node: &Node, from: &str, to: &str) -> Op {
    Op::Rename(Rename {
        parent: node.root(),
        name: from.to_owned().into(),
        new_parent: node.root(),
        new_name: to.to_owned().into(),
        ..Rename::default()
    })
}

fn chmod(file: FileId, mode: u32) -> Op {
    Op::Setattr(SetAttr { file: Some(file.into()), mode: Some(mode), ..SetAttr::default() })
}

#[test]
fn an_open_file_lives_without_its_name() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        a.write(file, 0, vec![4; 100]);
        b.ok(Op::Open(Open { file: Some(file.into()), handle: 9, ..Open::default() }));
        a.ok(Op::Close(Close { handle: 1, file: Some(file.into()) }));
        a.ok(a.unlink("f"));
        assert_eq!(a.call(a.lookup("f")).errno, ENOENT);
        let attr = attr(&b.ok(Op::Getattr(GetAttr { file: Some(file.into()) })));
        assert_eq!((attr.nlink, attr.size), (0, 100));
        let grant = b.granted(file, 0, 100, Access::Read);
        assert_eq!(rig.read_lun(place(&grant, 0), 100), [4; 100]);
        // The last close deletes it, and takes back what is lent.
        b.ok(Op::Close(Close { handle: 9, file: Some(file.into()) }));
        assert_eq!(b.wait_recall().up_to_seq, grant.seq);
        wait_until(|| rig.co().fs().attr(file).is_err() && rig.co().fs().orphans().is_empty());
    });
}

#[test]
fn a_replaced_open_file_lives_on() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let old = b.create("target", 1);
        b.write(old, 0, b"old".to_vec());
        let new = a.create("source", 1);
        a.ok(rename(&a, "source", "target"));
        assert_eq!(id(&attr(&a.ok(a.lookup("target")))), new);
        assert_eq!(b.read(old, 0, 10), b"old");
        assert_eq!(attr(&b.ok(Op::Getattr(GetAttr { file: Some(old.into()) }))).nlink, 0);
        b.ok(Op::Close(Close { handle: 1, file: Some(old.into()) }));
        wait_until(|| rig.co().fs().orphans().is_empty());
    });
}

/// Two calls that have each found one of the two names of an open file when the first of them takes it away.
fn two_names_go_at_once(rig: &Rig, take: impl Fn(&Node) -> Op) {
    let (a, b) = (rig.node(N1), rig.node(N2));
    let file = b.create("f", 1);
    b.write(file, 0, b"kept".to_vec());
    a.create("other", 1);
    let dir = id(&attr(&a.ok(Op::Mkdir(MkDir { parent: a.root(), name: "d".into(), mode: 0o755 }))));
    let link = Link { file: Some(file.into()), new_parent: Some(dir.into()), new_name: "g".into() };
    a.ok(Op::Link(link));
    let lock = rig.lock_of(file);
    let held = Arc::clone(&lock).try_write_owned().unwrap();
    let idle = Arc::strong_count(&lock);
    let first = a.start(take(&a));
    let unlink = csv_proto::Unlink { parent: Some(dir.into()), name: "g".into() };
    let second = b.start(Op::Unlink(unlink));
    wait_until(|| Arc::strong_count(&lock) == idle + 2);
    drop((held, lock));
    assert_eq!((a.finish(first).errno, b.finish(second).errno), (0, 0));
    assert_eq!(rig.co().fs().orphans(), [file]);
    assert_eq!(b.read(file, 0, 10), b"kept");
    b.ok(Op::Close(Close { handle: 1, file: Some(file.into()) }));
    wait_until(|| rig.co().fs().orphans().is_empty());
}

#[test]
fn an_open_file_that_loses_two_names_at_once_lives_on() {
    on_each_fs(|rig| two_names_go_at_once(rig, |node| node.unlink("f")));
    on_each_fs(|rig| two_names_go_at_once(rig, |node| rename(node, "other", "f")));
}

#[test]
fn orphans_of_a_dead_session_go_and_those_of_a_crash_wait_for_grace() {
    on(crate::FsKind::Ext4, |rig| {
        let a = rig.node(N1);
        let file = a.create("f", 1);
        a.ok(a.unlink("f"));
        rig.co().fs().syncfs().unwrap();
        rig.coordinator.take().unwrap().crash();
        drop(a);
        rig.start();
        assert_eq!(rig.co().fs().orphans(), [file]);
        let a = Node::connect(rig.co(), N1, [1; 16], 1);
        assert!(a.welcome().grace);
        a.ok(Op::Open(Open { file: Some(file.into()), handle: 1, reclaim: true, ..Open::default() }));
        a.send(csv_proto::client_message::Body::ReclaimDone(csv_proto::ReclaimDone {}));
        rig.event("grace-end");
        assert_eq!(attr(&a.ok(Op::Getattr(GetAttr { file: Some(file.into()) }))).nlink, 0);
        // The csvfs of the node starts anew: what it had open is closed.
        Node::connect(rig.co(), N1, [9; 16], 0);
        wait_until(|| rig.co().fs().orphans().is_empty());
    });
}

#[test]
fn a_change_takes_others_leases_before_it_is_answered() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        assert!(b.ok(b.lookup("f")).lease);
        let absent = b.call(b.lookup("g"));
        assert!(absent.errno == ENOENT && absent.lease, "absence can be cached too");
        b.answers.store(false, Ordering::SeqCst);
        let change = a.start(chmod(file, 0o600));
        let told = b.wait_invalidated(file);
        assert!(told.attr && !told.names && !a.answered(change));
        b.send(csv_proto::client_message::Body::InvalidateAck(csv_proto::InvalidateAck { id: told.id }));
        assert!(a.finish(change).lease, "the one who changed knows");
        b.answers.store(true, Ordering::SeqCst);
        let dir = csv_proto::file_id(b.root()).unwrap();
        assert!(a.ok(Op::Getattr(GetAttr { file: a.root() })).lease);
        let before = attr(&a.ok(Op::Getattr(GetAttr { file: a.root() })));
        a.create("g", 2);
        assert!(b.wait_invalidated(dir).names);
        assert!(!a.was_invalidated(file));
        assert!(!a.was_invalidated(dir), "the directory is in the reply");
        let unlink = csv_proto::Unlink { parent: a.root(), name: "g".into() };
        let removed = a.ok(Op::Unlink(unlink));
        assert!(removed.lease);
        let (old, new) = (before.mtime.unwrap(), removed.dir_attr.unwrap().mtime.unwrap());
        assert!((old.s, old.ns) < (new.s, new.ns), "as it is after the change");
        let rename = csv_proto::Rename {
            parent: a.root(),
            name: "f".into(),
            new_parent: a.root(),
            new_name: "h".into(),
            ..csv_proto::Rename::default()
        };
        a.ok(Op::Rename(rename));
        assert!(a.was_invalidated(dir), "a rename's reply tells nothing of the directories");
    });
}

#[test]
fn attributes_change_under_the_files_lock() {
    // Filling and cutting put the modification time back, which must not undo somebody's utimens.
    on(crate::FsKind::Ext4, |rig| {
        let a = rig.node(N1);
        let file = a.create("f", 1);
        let lock = rig.lock_of(file);
        let held = Arc::clone(&lock).try_write_owned().unwrap();
        let idle = Arc::strong_count(&lock);
        let mtime = Some(csv_proto::Time { s: 1000, ns: 1 });
        let set = a.start(Op::Setattr(SetAttr { file: Some(file.into()), mtime, ..SetAttr::default() }));
        wait_until(|| Arc::strong_count(&lock) > idle || a.answered(set));
        assert!(!a.answered(set));
        drop((held, lock));
        assert_eq!(attr(&a.finish(set)).mtime, mtime);
    });
}

#[test]
fn attributes_under_anothers_write_grant_are_not_leased() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        a.write(file, 0, vec![1; 4096]);
        assert!(b.ok(b.lookup("f")).lease);
        a.granted(file, 0, 4096, Access::Write);
        assert!(b.wait_invalidated(file).attr);
        assert!(!b.ok(b.lookup("f")).lease);
        assert!(a.ok(a.lookup("f")).lease, "the writer itself knows what it writes");
    });
}

#[test]
fn a_node_that_drops_no_lease_is_given_up() {
    on(crate::FsKind::Ext4, |rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        let file = a.create("f", 1);
        assert!(b.ok(b.lookup("f")).lease);
        b.answers.store(false, Ordering::SeqCst);
        a.ok(chmod(file, 0o600));
        b.wait_revoked();
    });
}

#[test]
fn pages_of_a_directory_carry_attributes_and_a_lease() {
    on_each_fs(|rig| {
        let (a, b) = (rig.node(N1), rig.node(N2));
        for i in 0..100 {
            a.create(&format!("file{i}"), i);
        }
        let op = |cookie| ReadDir { dir: b.root(), cookie, max_bytes: 4096, plus: true };
        let (mut cookie, mut names) = (0, Vec::new());
        loop {
            let reply = b.ok(Op::Readdir(op(cookie)));
            assert!(reply.lease);
            let Some(reply::Body::Dir(page)) = reply.body else { panic!() };
            names.extend(page.entries.iter().map(|entry| String::from_utf8(entry.name.to_vec()).unwrap()));
            cookie = page.entries.last().map_or(cookie, |entry| entry.cookie);
            if page.end {
                break;
            }
        }
        names.retain(|name| name.starts_with("file"));
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 100);
    });
}

#[test]
fn what_was_done_before_is_not_done_twice() {
    on_each_fs(|rig| {
        let a = rig.node(N1);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
        let now = u64::try_from(now).unwrap();
        let resent = |first_sent_unix_ms, op| {
            let call =
                Call { id: a.new_id(), cred: Some(root()), resent: true, first_sent_unix_ms, op: Some(op) };
            a.finish(a.start_as(call)).errno
        };
        let mkdir = || Op::Mkdir(MkDir { parent: a.root(), name: "d".into(), mode: 0o755 });
        a.ok(mkdir());
        assert_eq!(resent(now, mkdir()), 0);
        assert_eq!(a.call(mkdir()).errno, libc::EEXIST, "not sent before");
        assert_eq!(resent(now + 60_000, mkdir()), libc::EEXIST, "older than the call");
        let create = || {
            let flags = libc::O_EXCL.cast_unsigned();
            Op::Create(Create { parent: a.root(), name: "f".into(), mode: 0o644, flags, handle: 5 })
        };
        a.ok(create());
        assert_eq!(resent(now, create()), 0);
        let file = id(&attr(&a.ok(a.lookup("f"))));
        a.ok(rename(&a, "f", "g"));
        let again = |expect: FileId| {
            let Op::Rename(op) = rename(&a, "f", "g") else { panic!() };
            Op::Rename(Rename { expect: Some(expect.into()), ..op })
        };
        assert_eq!(resent(now, again(file)), 0);
        assert_eq!(resent(now, again(FileId { ino: 1, generation: 0 })), ENOENT);
        a.ok(a.unlink("g"));
        assert_eq!(resent(now, a.unlink("g")), 0);
        let append = csv_proto::Write {
            file: Some(file.into()),
            data: "x".into(),
            append: true,
            ..Default::default()
        };
        assert_eq!(resent(now, Op::Write(append)), libc::EIO, "nobody can know");
    });
}

#[test]
fn what_is_created_belongs_to_the_caller() {
    on_each_fs(|rig| {
        let a = rig.node(N1);
        let cred = Some(csv_proto::Cred { uid: 1000, gid: 100, pid: 1, umask: 0o027 });
        let op = Create { parent: a.root(), name: "mine".into(), mode: 0o666, flags: 0, handle: 1 };
        let call = Call { id: 50, cred, op: Some(Op::Create(op)), ..Call::default() };
        let made = attr(&a.finish(a.start_as(call)));
        assert_eq!((made.uid, made.gid, made.mode & 0o777), (1000, 100, 0o640));
    });
}
