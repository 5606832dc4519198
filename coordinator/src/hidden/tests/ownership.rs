//! Who owns what is created, with which mode, and what changes of owner and mode do.

use super::{cred, id, on_each_fs};
use crate::hidden::CredScope;
use csv_proto::{SetAttr, Time};
use rustix::io::Errno;

#[test]
fn created_files_belong_to_the_caller_and_obey_the_umask() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        {
            let _as = CredScope::enter(&cred(1000, 1001, 0o027)).unwrap();
            let made = [
                (fs.create(root, b"file", 0o666, 0).unwrap().0, 0o100_640),
                (fs.mkdir(root, b"dir", 0o777).unwrap(), 0o040_750),
                (fs.mknod(root, b"fifo", 0o010_666, 0).unwrap(), 0o010_640),
                (fs.mknod(root, b"disk", 0o060_666, (259 << 8) | 5).unwrap(), 0o060_640),
                (fs.symlink(root, b"link", b"nowhere").unwrap(), 0o120_777),
            ];
            for (attr, mode) in &made {
                assert_eq!((attr.uid, attr.gid, attr.mode), (1000, 1001, *mode));
            }
            assert_eq!(made[3].0.rdev, (259 << 8) | 5);
        }
        let attr = fs.mkdir(root, b"by-root", 0o755).unwrap();
        assert_eq!((attr.uid, attr.gid), (0, 0));
    });
}

#[test]
fn the_identity_is_the_threads_own() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let _as = CredScope::enter(&cred(1000, 1000, 0o077)).unwrap();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let _as = CredScope::enter(&cred(2000, 2000, 0)).unwrap();
                fs.create(root, b"theirs", 0o666, 0).unwrap().0
            });
            let theirs = other.join().unwrap();
            let ours = fs.create(root, b"ours", 0o666, 0).unwrap().0;
            assert_eq!((theirs.uid, theirs.mode & 0o7777), (2000, 0o666));
            assert_eq!((ours.uid, ours.mode & 0o7777), (1000, 0o600));
        });
    });
}

#[test]
fn an_impossible_identity_is_refused_and_leaves_root() {
    on_each_fs(|rig| {
        assert_eq!(CredScope::enter(&cred(u32::MAX, 5, 0)).unwrap_err(), Errno::PERM);
        let attr = rig.fs().mkdir(rig.root(), b"d", 0o755).unwrap();
        assert_eq!((attr.uid, attr.gid), (0, 0));
    });
}

#[test]
fn set_group_id_directories_hand_their_group_down() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let dir = id(&fs.mkdir(root, b"shared", 0o777).unwrap());
        let set = SetAttr { gid: Some(5000), mode: Some(0o2775), ..SetAttr::default() };
        assert_eq!(fs.setattr(dir, &set).unwrap().mode, 0o042_775);
        let _as = CredScope::enter(&cred(1000, 1001, 0o022)).unwrap();
        let file = fs.create(dir, b"file", 0o644, 0).unwrap().0;
        let sub = fs.mkdir(dir, b"sub", 0o755).unwrap();
        assert_eq!((file.uid, file.gid, file.mode), (1000, 5000, 0o100_644));
        assert_eq!((sub.uid, sub.gid, sub.mode), (1000, 5000, 0o042_755));
    });
}

/// `user::rwx user:1234:rwx group::r-x mask::rwx other::r--`, as the kernel takes it.
fn acl() -> Vec<u8> {
    let entries: [(u16, u16, u32); 5] =
        [(1, 7, u32::MAX), (2, 7, 1234), (4, 5, u32::MAX), (0x10, 7, u32::MAX), (0x20, 4, u32::MAX)];
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        bytes.extend([tag.to_le_bytes(), perm.to_le_bytes()].concat());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

#[test]
fn default_acls_are_inherited_and_replace_the_umask() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let dir = id(&fs.mkdir(root, b"dir", 0o777).unwrap());
        fs.setxattr(dir, b"system.posix_acl_default", &acl(), 0, false).unwrap();
        let _as = CredScope::enter(&cred(1000, 1000, 0o077)).unwrap();
        let attr = fs.create(dir, b"file", 0o666, 0).unwrap().0;
        assert_eq!(attr.mode & 0o7777, 0o664);
        let inherited = fs.getxattr(id(&attr), b"system.posix_acl_access").unwrap();
        assert!(inherited.windows(4).any(|id| id == 1234_u32.to_le_bytes()));
        assert_eq!(fs.getxattr(dir, b"system.posix_acl_default").unwrap(), acl());
        let sub = id(&fs.mkdir(dir, b"sub", 0o777).unwrap());
        assert_eq!(fs.getxattr(sub, b"system.posix_acl_default").unwrap(), acl());
    });
}

#[test]
fn setting_an_access_acl_can_drop_the_set_group_id_bit() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        fs.setattr(file, &SetAttr { mode: Some(0o2775), ..SetAttr::default() }).unwrap();
        fs.setxattr(file, b"system.posix_acl_access", &acl(), 0, false).unwrap();
        assert_eq!(fs.attr(file).unwrap().mode & 0o7777, 0o2774);
        fs.setxattr(file, b"system.posix_acl_access", &acl(), 0, true).unwrap();
        assert_eq!(fs.attr(file).unwrap().mode & 0o7777, 0o774);
    });
}

#[test]
fn changing_the_owner_clears_set_id_bits_as_linux_does() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        let set_id = SetAttr { mode: Some(0o6755), ..SetAttr::default() };
        assert_eq!(fs.setattr(file, &set_id).unwrap().mode & 0o7777, 0o6755);
        let owner = SetAttr { uid: Some(7), gid: Some(8), ..SetAttr::default() };
        let attr = fs.setattr(file, &owner).unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (7, 8, 0o755));
        // In one request the mode wins.
        let attr = fs.setattr(file, &SetAttr { uid: Some(9), ..set_id }).unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (9, 8, 0o6755));
        let attr = fs.setattr(file, &SetAttr { kill_suidgid: true, ..SetAttr::default() }).unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (9, 8, 0o755));
    });
}

#[test]
fn symbolic_links_have_owner_and_times_but_no_mode() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let target = rig.file(b"target");
        let before = fs.attr(target).unwrap();
        let link = id(&fs.symlink(root, b"link", b"target").unwrap());
        let chmod = SetAttr { mode: Some(0o600), ..SetAttr::default() };
        assert_eq!(fs.setattr(link, &chmod).unwrap_err(), Errno::OPNOTSUPP);
        let when = Time { s: -5, ns: 123_456_789 };
        let set = SetAttr { uid: Some(7), mtime: Some(when), ..SetAttr::default() };
        let attr = fs.setattr(link, &set).unwrap();
        assert_eq!((attr.uid, attr.mtime), (7, Some(when)));
        assert_eq!(fs.attr(target).unwrap(), before);
        assert_eq!(fs.readlink(link).unwrap(), b"target");
        assert_eq!(fs.readlink(target).unwrap_err(), Errno::INVAL);
    });
}

#[test]
fn times_are_set_to_the_nanosecond_or_to_now() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        let (atime, mtime) = (Time { s: 1_000_000_000, ns: 1 }, Time { s: 2_000_000_000, ns: 999_999_999 });
        let set = SetAttr { atime: Some(atime), mtime: Some(mtime), ..SetAttr::default() };
        let attr = fs.setattr(file, &set).unwrap();
        assert_eq!((attr.atime, attr.mtime), (Some(atime), Some(mtime)));
        let attr = fs.setattr(file, &SetAttr { mtime_now: true, ..SetAttr::default() }).unwrap();
        assert_eq!(attr.atime, Some(atime));
        assert_eq!(attr.mtime, attr.ctime);
        let bad = SetAttr { mtime: Some(Time { s: 0, ns: 1_000_000_000 }), ..SetAttr::default() };
        assert_eq!(fs.setattr(file, &bad).unwrap_err(), Errno::INVAL);
    });
}
