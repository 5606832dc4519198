//! Names, directories and extended attributes.

use super::{Rig, id, on_each_fs};
use crate::hidden::INTERNAL_NAME;
use csv_types::FileId;
use rustix::io::Errno;
use std::collections::BTreeMap;

const EXCL: u32 = rustix::fs::OFlags::EXCL.bits();
const NOREPLACE: u32 = 1;
const EXCHANGE: u32 = 2;
const WHITEOUT: u32 = 4;

#[test]
fn create_tells_new_from_old() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let (first, existed) = fs.create(root, b"f", 0o644, EXCL).unwrap();
        assert!(!existed);
        let (again, existed) = fs.create(root, b"f", 0o600, 0).unwrap();
        assert!(existed);
        assert_eq!(again, first);
        assert_eq!(fs.create(root, b"f", 0o644, EXCL).unwrap_err(), Errno::EXIST);
        assert_eq!(fs.lookup(root, b"f").unwrap(), first);
        assert_eq!(fs.attr(id(&first)).unwrap(), first);
        assert_eq!(fs.create(id(&first), b"x", 0o644, 0).unwrap_err(), Errno::NOTDIR);
    });
}

#[test]
fn every_name_that_linux_takes_works() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let longest = [0xfe_u8; 255];
        for name in [&longest[..], b"\xff\x01\n:*?", b" ", b"...", b"a\\b"] {
            let file = id(&fs.create(root, name, 0o644, 0).unwrap().0);
            assert_eq!(id(&fs.lookup(root, name).unwrap()), file);
            let page = fs.readdir(root, 0, 1 << 20, false).unwrap();
            assert!(page.entries.iter().any(|entry| entry.name.as_ref() == name), "{}", name.escape_ascii());
        }
        assert_eq!(fs.create(root, &[b'x'; 256], 0o644, 0).unwrap_err(), Errno::NAMETOOLONG);
        assert_eq!(fs.lookup(root, &[b'x'; 256]).unwrap_err(), Errno::NAMETOOLONG);
        for bad in [&b""[..], b"a/b", b"a\0b", b".."] {
            assert_eq!(fs.mkdir(root, bad, 0o755).unwrap_err(), Errno::INVAL);
        }
    });
}

#[test]
fn dots_lead_to_parents_and_the_root_is_its_own() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let dir = id(&fs.mkdir(root, b"dir", 0o755).unwrap());
        let sub = id(&fs.mkdir(dir, b"sub", 0o755).unwrap());
        assert_eq!(id(&fs.lookup(sub, b"..").unwrap()), dir);
        assert_eq!(id(&fs.lookup(sub, b".").unwrap()), sub);
        assert_eq!(id(&fs.lookup(root, b"..").unwrap()), root);
        let page = fs.readdir(sub, 0, 4096, true).unwrap();
        let inos: BTreeMap<&[u8], u64> = page.entries.iter().map(|e| (e.name.as_ref(), e.ino)).collect();
        assert_eq!(inos, BTreeMap::from([(&b"."[..], sub.ino), (b"..", dir.ino)]));
        let page = fs.readdir(root, 0, 4096, false).unwrap();
        let up = page.entries.iter().find(|entry| entry.name.as_ref() == b"..").unwrap();
        assert_eq!(up.ino, root.ino);
    });
}

#[test]
fn the_hidden_directory_is_hidden() {
    on_each_fs(|rig| {
        let (fs, root, name) = (rig.fs(), rig.root(), INTERNAL_NAME);
        let file = rig.file(b"f");
        assert_eq!(fs.lookup(root, name).unwrap_err(), Errno::NOENT);
        assert_eq!(fs.rmdir(root, name).unwrap_err(), Errno::NOENT);
        assert_eq!(fs.unlink(root, name).unwrap_err(), Errno::NOENT);
        assert_eq!(fs.rename(root, name, root, b"x", 0).unwrap_err(), Errno::NOENT);
        assert_eq!(fs.rename(root, b"f", root, name, 0).unwrap_err(), Errno::PERM);
        assert_eq!(fs.create(root, name, 0o644, 0).unwrap_err(), Errno::PERM);
        assert_eq!(fs.mkdir(root, name, 0o755).unwrap_err(), Errno::PERM);
        assert_eq!(fs.mknod(root, name, 0o010_644, 0).unwrap_err(), Errno::PERM);
        assert_eq!(fs.symlink(root, name, b"x").unwrap_err(), Errno::PERM);
        assert_eq!(fs.link(file, root, name).unwrap_err(), Errno::PERM);
        let seen = |page: csv_proto::DirPage| page.entries.iter().any(|e| e.name.as_ref() == name);
        assert!(!seen(fs.readdir(root, 0, 4096, true).unwrap()));
        assert!(seen(fs.internal_readdir(root, 0, 4096, false).unwrap()));
        let dir = fs.internal_lookup(root, name).unwrap();
        assert_eq!((id(&dir), dir.mode), (fs.csvfs_dir(), 0o040_700));
        // Elsewhere the name is a name like any other.
        let sub = id(&fs.mkdir(root, b"sub", 0o755).unwrap());
        fs.mkdir(sub, name, 0o755).unwrap();
        assert!(fs.lookup(sub, name).is_ok());
    });
}

#[test]
fn the_roots_link_count_leaves_the_hidden_directory_out() {
    on_each_fs(|rig| {
        let subdirs = u32::from(rig.fs().lookup(rig.root(), b"lost+found").is_ok());
        assert_eq!(rig.fs().attr(rig.root()).unwrap().nlink, 2 + subdirs);
    });
}

#[test]
fn links_and_removals_count() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let file = rig.file(b"f");
        let soft = id(&fs.symlink(root, b"soft", b"f").unwrap());
        assert_eq!(fs.link(file, root, b"g").unwrap().nlink, 2);
        assert_eq!(fs.link(soft, root, b"soft2").unwrap().nlink, 2);
        assert_eq!(id(&fs.lookup(root, b"soft2").unwrap()), soft);
        assert_eq!(fs.link(file, root, b"g").unwrap_err(), Errno::EXIST);
        fs.unlink(root, b"f").unwrap();
        assert_eq!(fs.attr(file).unwrap().nlink, 1);
        fs.unlink(root, b"g").unwrap();
        fs.forget(file);
        assert_eq!(fs.attr(file).unwrap_err(), Errno::STALE);
        assert_eq!(fs.read(file, 0, 1).unwrap_err(), Errno::STALE);
        assert_eq!(fs.unlink(root, b"g").unwrap_err(), Errno::NOENT);
        let dir = id(&fs.mkdir(root, b"d", 0o755).unwrap());
        rig.fs().mkdir(dir, b"sub", 0o755).unwrap();
        assert_eq!(fs.rmdir(root, b"d").unwrap_err(), Errno::NOTEMPTY);
        assert_eq!(fs.unlink(root, b"d").unwrap_err(), Errno::ISDIR);
        fs.rmdir(dir, b"sub").unwrap();
        fs.rmdir(root, b"d").unwrap();
        assert_eq!(fs.attr(dir).unwrap_err(), Errno::STALE);
    });
}

#[test]
fn an_inode_number_out_of_the_world_is_stale() {
    on_each_fs(|rig| {
        for ino in [1 << 31, 1 << 40, u64::MAX] {
            assert_eq!(rig.fs().attr(FileId { ino, generation: 1 }).unwrap_err(), Errno::STALE);
        }
    });
}

#[test]
fn renames_replace_exchange_or_refuse() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let dir = id(&fs.mkdir(root, b"dir", 0o755).unwrap());
        let (a, b) = (rig.file(b"a"), rig.file(b"b"));
        assert_eq!(fs.rename(root, b"a", root, b"b", NOREPLACE).unwrap_err(), Errno::EXIST);
        assert_eq!(fs.rename(root, b"a", root, b"c", WHITEOUT).unwrap_err(), Errno::INVAL);
        assert_eq!(fs.rename(root, b"a", root, b"c", NOREPLACE | EXCHANGE).unwrap_err(), Errno::INVAL);
        fs.rename(root, b"a", root, b"b", EXCHANGE).unwrap();
        assert_eq!((id(&fs.lookup(root, b"a").unwrap()), id(&fs.lookup(root, b"b").unwrap())), (b, a));
        fs.rename(root, b"b", dir, b"moved", 0).unwrap();
        assert_eq!(id(&fs.lookup(dir, b"moved").unwrap()), a);
        fs.rename(dir, b"moved", root, b"a", 0).unwrap();
        assert_eq!(id(&fs.lookup(root, b"a").unwrap()), a);
        fs.forget(b);
        assert_eq!(fs.attr(b).unwrap_err(), Errno::STALE);
        assert_eq!(fs.rename(root, b"dir", dir, b"inside", 0).unwrap_err(), Errno::INVAL);
    });
}

fn names_of(rig: &Rig, dir: FileId, max_bytes: u32, mut between: impl FnMut(&[u8])) -> Vec<Vec<u8>> {
    let (mut names, mut cookie) = (Vec::new(), 0);
    loop {
        let page = rig.fs().readdir(dir, cookie, max_bytes, false).unwrap();
        for entry in &page.entries {
            cookie = entry.cookie;
            names.push(entry.name.to_vec());
            between(&entry.name);
        }
        if page.end {
            return names;
        }
        assert!(!page.entries.is_empty(), "a page without progress");
    }
}

#[test]
fn a_huge_directory_is_read_in_small_pages_while_entries_vanish() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let dir = id(&fs.mkdir(root, b"huge", 0o755).unwrap());
        let name =
            |i: u32| format!("entry-{i:05}-{}", "x".repeat(usize::try_from(i % 60).unwrap())).into_bytes();
        for i in 0..5000 {
            fs.mknod(dir, &name(i), 0o100_644, 0).unwrap();
        }
        // Every entry that was seen is removed at once; none of the others may be missed or seen twice.
        let mut seen = names_of(rig, dir, 700, |name| {
            if name != b"." && name != b".." {
                fs.unlink(dir, name).unwrap();
            }
        });
        seen.sort();
        let mut want: Vec<Vec<u8>> = (0..5000).map(name).chain([b".".to_vec(), b"..".to_vec()]).collect();
        want.sort();
        assert_eq!(seen.len(), want.len());
        assert!(seen == want);
        assert_eq!(names_of(rig, dir, 4096, |_| {}).len(), 2);
    });
}

#[test]
fn pages_hold_attributes_and_types() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let dir = id(&fs.mkdir(root, b"dir", 0o755).unwrap());
        let made = [
            (fs.create(dir, b"f", 0o644, 0).unwrap().0, 8),
            (fs.mkdir(dir, b"d", 0o755).unwrap(), 4),
            (fs.symlink(dir, b"l", b"x").unwrap(), 10),
            (fs.mknod(dir, b"p", 0o010_644, 0).unwrap(), 1),
        ];
        let page = fs.readdir(dir, 0, 1 << 20, true).unwrap();
        assert!(page.end);
        for (attr, kind) in made {
            let entry = page.entries.iter().find(|e| e.attr.as_ref() == Some(&attr)).unwrap();
            assert_eq!((entry.kind, entry.ino), (kind, id(&attr).ino));
        }
        // However small the page, there is progress.
        assert_eq!(fs.readdir(dir, 0, 0, false).unwrap().entries.len(), 1);
        assert_eq!(fs.readdir(rig.file(b"plain"), 0, 4096, false).unwrap_err(), Errno::NOTDIR);
    });
}

#[test]
fn extended_attributes_of_all_types_of_files() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let file = rig.file(b"f");
        let link = id(&fs.symlink(root, b"l", b"f").unwrap());
        let fifo = id(&fs.mknod(root, b"p", 0o010_644, 0).unwrap());
        let largest = if rig.kind == crate::hidden::FsKind::Xfs { 64 << 10 } else { 3000 };
        let value: Vec<u8> = (0..largest).map(|i: u32| (i % 251).to_le_bytes()[0]).collect();
        fs.setxattr(file, b"user.big", &value, 1, false).unwrap();
        assert_eq!(fs.getxattr(file, b"user.big").unwrap(), value);
        assert_eq!(fs.setxattr(file, b"user.big", b"x", 1, false).unwrap_err(), Errno::EXIST);
        assert_eq!(fs.setxattr(file, b"user.no", b"x", 2, false).unwrap_err(), Errno::NODATA);
        assert_eq!(fs.setxattr(file, b"user.x", &vec![0; 65537], 0, false).unwrap_err(), Errno::TOOBIG);
        assert_eq!(fs.getxattr(file, b"").unwrap_err(), Errno::RANGE);
        for node in [link, fifo] {
            // As locally: only regular files and directories have user attributes.
            assert_eq!(fs.setxattr(node, b"user.x", b"x", 0, false).unwrap_err(), Errno::PERM);
            fs.setxattr(node, b"trusted.x", b"on the node itself", 0, false).unwrap();
            assert_eq!(fs.getxattr(node, b"trusted.x").unwrap(), b"on the node itself");
        }
        assert_eq!(fs.getxattr(file, b"trusted.x").unwrap_err(), Errno::NODATA);
        assert_eq!(fs.listxattr(link, true).unwrap(), [b"trusted.x".to_vec()]);
        assert_eq!(fs.listxattr(link, false).unwrap(), Vec::<Vec<u8>>::new());
        fs.removexattr(link, b"trusted.x").unwrap();
        assert_eq!(fs.removexattr(link, b"trusted.x").unwrap_err(), Errno::NODATA);
    });
}

#[test]
fn our_own_attributes_are_nobodys() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        fs.set_logical_size(file, 5).unwrap();
        assert_eq!(fs.listxattr(file, true).unwrap(), Vec::<Vec<u8>>::new());
        assert_eq!(fs.getxattr(file, b"trusted.csv.size").unwrap_err(), Errno::NODATA);
        assert_eq!(fs.setxattr(file, b"trusted.csv.size", b"x", 0, false).unwrap_err(), Errno::PERM);
        assert_eq!(fs.removexattr(file, b"trusted.csv.size").unwrap_err(), Errno::PERM);
        assert_eq!(fs.logical_size(file).unwrap(), Some(5));
    });
}
