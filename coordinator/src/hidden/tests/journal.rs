//! What a crash leaves behind: the end-of-file journal, orphans, latched failures.

use super::data::pattern;
use super::{id, on_each_fs};
use csv_types::ByteRange;
use rustix::io::Errno;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

const MIB: u64 = 1 << 20;

#[test]
fn the_logical_size_is_what_everybody_sees() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        fs.write(file, 0, &pattern(1, 5000)).unwrap();
        assert_eq!(fs.logical_size(file).unwrap(), None);
        fs.set_logical_size(file, 5000).unwrap();
        fs.make_written(file, ByteRange::new(0, MIB)).unwrap();
        assert_eq!(fs.attr(file).unwrap().size, 5000);
        assert_eq!(fs.lookup(rig.root(), b"f").unwrap().size, 5000);
        assert_eq!(fs.append(file, b"behind").unwrap(), 5000);
        assert_eq!(fs.attr(file).unwrap().size, 5006);
        fs.settle_size(file, 5006).unwrap();
        assert_eq!(fs.logical_size(file).unwrap(), None);
        assert_eq!(fs.attr(file).unwrap().size, 5006);
        assert_eq!(fs.read(file, 5000, 100).unwrap(), b"behind");
        fs.clear_logical_size(file).unwrap();
        fs.set_logical_size(file, 1).unwrap();
        fs.truncate(file, 2000).unwrap();
        assert_eq!((fs.logical_size(file).unwrap(), fs.attr(file).unwrap().size), (None, 2000));
    });
}

#[test]
fn a_crash_keeps_the_logical_size_and_what_was_written_under_the_grant() {
    on_each_fs(|rig| {
        let file = rig.file(b"f");
        let fs = rig.fs();
        fs.write(file, 0, &pattern(1, 4096)).unwrap();
        fs.set_logical_size(file, 4096).unwrap();
        fs.make_written(file, ByteRange::new(0, 4 * MIB)).unwrap();
        // A node writes behind the end and tells so; the coordinator notes it and makes that durable.
        let place = fs.map(file, ByteRange::new(4096, 8192)).unwrap()[0].lun_offset.unwrap().0;
        rig.lun.write_all_at(&[7; 4096], place).unwrap();
        fs.set_logical_size(file, 8192).unwrap();
        fs.fsync(file, false).unwrap();
        let unsynced = rig.file(b"unsynced");
        fs.crash().unwrap();
        assert_eq!(fs.create(rig.root(), b"x", 0o644, 0).unwrap_err(), Errno::IO);
        rig.remount();
        let fs = rig.fs();
        assert_eq!(fs.logical_size(file).unwrap(), Some(8192));
        assert_eq!(fs.attr(file).unwrap().size, 8192);
        assert_eq!(fs.attr(unsynced).unwrap_err(), Errno::STALE);
        fs.settle_size(file, 8192).unwrap();
        assert_eq!(fs.read(file, 0, 8192).unwrap(), [pattern(1, 4096), vec![7; 4096]].concat());
        rig.remount();
        assert_eq!(rig.fs().attr(file).unwrap().size, 8192);
        assert_eq!(rig.fs().logical_size(file).unwrap(), None);
    });
}

/// The last block of a file is there and written, only its size ends inside: the other node's data behind that
/// must not be taken for the rubbish behind an end of file.
#[test]
fn what_is_written_behind_the_end_in_the_last_block_stays() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        fs.write(file, 0, &pattern(1, 5000)).unwrap();
        fs.set_logical_size(file, 5000).unwrap();
        fs.make_written(file, ByteRange::new(0, 8192)).unwrap();
        fs.drop_cache(file).unwrap();
        let place = fs.map(file, ByteRange::new(0, 8192)).unwrap()[0].lun_offset.unwrap().0;
        assert!(rig.lun_bytes(place + 5000, 3192).iter().all(|byte| *byte == 0));
        rig.lun.write_all_at(&[pattern(1, 5000), vec![7; 3192]].concat(), place).unwrap();
        fs.settle_size(file, 8000).unwrap();
        fs.drop_cache(file).unwrap();
        assert!(fs.read(file, 0, 9000).unwrap() == [pattern(1, 5000), vec![7; 3000]].concat());
    });
}

#[test]
fn a_page_from_before_the_grant_does_not_come_back_when_the_size_settles() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        fs.set_logical_size(file, 0).unwrap();
        fs.make_written(file, ByteRange::new(0, MIB)).unwrap();
        assert_eq!(fs.read(file, 0, 8192).unwrap(), [0; 8192]);
        let place = fs.map(file, ByteRange::new(0, 8192)).unwrap()[0].lun_offset.unwrap().0;
        rig.lun.write_all_at(&[7; 8192], place).unwrap();
        fs.settle_size(file, 6000).unwrap();
        assert_eq!(fs.read(file, 0, 9000).unwrap(), [7; 6000]);
    });
}

#[test]
fn what_make_written_returned_survives_a_crash() {
    on_each_fs(|rig| {
        let file = rig.file(b"f");
        let range = ByteRange::new(0, 4 * MIB);
        rig.fs().set_logical_size(file, 0).unwrap();
        rig.fs().make_written(file, range).unwrap();
        let lent = rig.fs().map(file, range).unwrap();
        rig.fs().crash().unwrap();
        rig.remount();
        assert_eq!(rig.fs().map(file, range).unwrap(), lent);
        assert_eq!(rig.fs().attr(file).unwrap().size, 0);
    });
}

#[test]
fn orphans_live_without_a_name_until_deleted() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let (file, other) = (rig.file(b"f"), rig.file(b"other"));
        fs.write(file, 0, b"still here").unwrap();
        assert_eq!(fs.orphan_in(root, b"f", other).unwrap_err(), Errno::NOENT);
        fs.orphan_in(root, b"f", file).unwrap();
        assert_eq!(fs.lookup(root, b"f").unwrap_err(), Errno::NOENT);
        assert_eq!(fs.attr(file).unwrap().nlink, 0);
        assert_eq!(fs.read(file, 0, 100).unwrap(), b"still here");
        assert_eq!(fs.link(file, root, b"again").unwrap_err(), Errno::NOENT);
        assert_eq!(fs.orphans(), [file]);
        fs.syncfs().unwrap();
        fs.crash().unwrap();
        rig.remount();
        let fs = rig.fs();
        assert_eq!(fs.orphans(), [file]);
        assert_eq!(fs.attr(file).unwrap().nlink, 0);
        assert_eq!(fs.read(file, 0, 100).unwrap(), b"still here");
        fs.orphan_delete(file).unwrap();
        assert_eq!(fs.attr(file).unwrap_err(), Errno::STALE);
        assert_eq!(fs.orphans(), []);
        assert_eq!(fs.orphan_delete(file).unwrap_err(), Errno::NOENT);
    });
}

#[test]
fn a_replaced_file_is_kept_and_further_names_go_too() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let (old, new) = (rig.file(b"f"), rig.file(b"new"));
        fs.link(old, root, b"second").unwrap();
        fs.orphan_keep(old).unwrap();
        fs.orphan_keep(old).unwrap();
        assert_eq!(fs.attr(old).unwrap().nlink, 2);
        fs.rename(root, b"new", root, b"f", 0).unwrap();
        assert_eq!(id(&fs.lookup(root, b"f").unwrap()), new);
        assert_eq!(fs.attr(old).unwrap().nlink, 1);
        fs.orphan_in(root, b"second", old).unwrap();
        assert_eq!(fs.lookup(root, b"second").unwrap_err(), Errno::NOENT);
        assert_eq!(fs.attr(old).unwrap().nlink, 0);
        fs.orphan_delete(old).unwrap();
        assert_eq!(fs.attr(old).unwrap_err(), Errno::STALE);
    });
}

#[test]
fn a_failed_flush_fails_for_ever() {
    on_each_fs(|rig| {
        let file = rig.file(b"f");
        rig.fs().write(file, 0, b"x").unwrap();
        rig.fs().crash().unwrap();
        assert_eq!(rig.fs().syncfs().and_then(|()| rig.fs().fsync_dir(rig.root())), Err(Errno::IO));
        for _ in 0..3 {
            assert_eq!(rig.fs().syncfs(), Err(Errno::IO));
        }
        rig.remount();
        rig.fs().syncfs().unwrap();
    });
}

/// A reservation conflict at a flush (EBADE) says that this node is fenced; nobody outside is to see it.
#[test]
fn a_flush_that_the_lun_refuses_counts_as_failed() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        assert_eq!(fs.latch(Err(Errno::NOSPC)), Err(Errno::NOSPC), "no failure of the LUN");
        assert_eq!(fs.latch(Ok(())), Ok(()));
        assert_eq!(fs.latch(Err(Errno::BADE)), Err(Errno::IO));
        assert_eq!(fs.latch(Ok(())), Err(Errno::IO));
    });
}

#[test]
fn the_size_that_runs_ahead_is_never_seen() {
    on_each_fs(|rig| {
        let file = rig.file(b"f");
        let fs = rig.fs();
        fs.write(file, 0, &pattern(1, 4096)).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let looks = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(fs.attr(file).unwrap().size, 4096);
                }
            });
            for _ in 0..3000 {
                fs.set_logical_size(file, 4096).unwrap();
                fs.fallocate(file, 0, 4096, 4096).unwrap();
                fs.settle_size(file, 4096).unwrap();
            }
            done.store(true, Ordering::Relaxed);
            looks.join().unwrap();
        });
    });
}
