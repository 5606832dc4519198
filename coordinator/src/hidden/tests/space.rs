//! What is lent: where it lies, that it is zeros, and that the page cache hides nothing.

use super::data::pattern;
use super::rig::is_root;
use super::{Rig, on_each_fs};
use crate::hidden::{FsKind, MapError};
use csv_layout::Extent;
use csv_proto::{SetAttr, Time};
use csv_types::{ByteRange, FileId};
use rustix::io::Errno;
use std::os::unix::fs::FileExt;

const MIB: u64 = 1 << 20;

/// The file's bytes as another node sees them on the LUN; every piece must have a place.
fn bytes_on_lun(rig: &Rig, extents: &[Extent]) -> Vec<u8> {
    extents.iter().flat_map(|e| rig.lun_bytes(e.lun_offset.expect("has no place").0, e.len)).collect()
}

/// Puts rubbish into all free space, so that zeros found there later were written there.
fn soil_free_space(rig: &Rig) {
    let fs = rig.fs();
    let file = rig.file(b"rubbish");
    let rubbish = vec![0xee; 8 << 20];
    for i in 0.. {
        match fs.write(file, i * rubbish.len() as u64, &rubbish) {
            Ok(()) => {}
            Err(Errno::NOSPC) => break,
            Err(errno) => panic!("{errno}"),
        }
    }
    fs.fsync(file, true).ok();
    fs.truncate(file, 0).unwrap();
    // So that the freed blocks may be given out again at once.
    fs.syncfs().unwrap();
}

fn total(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len).sum()
}

#[test]
fn written_space_is_lendable_zero_on_the_lun_and_spares_data() {
    on_each_fs(|rig| {
        soil_free_space(rig);
        let fs = rig.fs();
        let file = rig.file(b"f");
        let old = pattern(3, 100_000);
        fs.write(file, 5 * MIB, &old).unwrap();
        // FALLOC_FL_KEEP_SIZE: an unwritten piece beside holes and data.
        fs.fallocate(file, 1, 10 * MIB, MIB).unwrap();
        let range = ByteRange::new(MIB + 1, 70 * MIB);
        assert!(fs.map(file, range).unwrap().iter().any(|extent| extent.lun_offset.is_none()));
        fs.make_written(file, range).unwrap();
        let extents = fs.map(file, ByteRange::new(MIB, 70 * MIB)).unwrap();
        assert_eq!(total(&extents), 69 * MIB);
        let bytes = bytes_on_lun(rig, &extents);
        let at = usize::try_from(4 * MIB).unwrap();
        assert!(bytes[at..at + old.len()] == old);
        assert!(bytes[..at].iter().chain(&bytes[at + old.len()..]).all(|byte| *byte == 0));
        assert_eq!(fs.attr(file).unwrap().size, 70 * MIB);
        assert_eq!(fs.map(file, ByteRange::new(0, MIB)).unwrap()[0].lun_offset, None);
    });
}

#[test]
fn making_space_twice_changes_nothing() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        let range = ByteRange::new(0, 8 * MIB);
        fs.make_written(file, range).unwrap();
        let extents = fs.map(file, range).unwrap();
        // Another node writes under its grant.
        let place = extents[0].lun_offset.unwrap().0;
        rig.lun.write_all_at(&[7; 4096], place).unwrap();
        fs.make_written(file, range).unwrap();
        assert_eq!(fs.map(file, range).unwrap(), extents);
        assert_eq!(rig.lun_bytes(place, 4096), [7; 4096]);
        assert_eq!(fs.read_direct(file, 0, 4096).unwrap(), [7; 4096]);
    });
}

#[test]
fn zeros_are_written_where_the_device_cannot_make_them() {
    on_each_fs(|rig| {
        soil_free_space(rig);
        let fs = rig.fs();
        fs.no_write_zeroes.store(true, std::sync::atomic::Ordering::Relaxed);
        let file = rig.file(b"f");
        let range = ByteRange::new(0, 37 * MIB + 4096);
        fs.make_written(file, range).unwrap();
        let extents = fs.map(file, range).unwrap();
        assert_eq!(total(&extents), range.len());
        assert!(bytes_on_lun(rig, &extents).iter().all(|byte| *byte == 0));
    });
}

#[test]
fn making_space_keeps_the_modification_time() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        let mtime = Some(Time { s: 1_234_567_890, ns: 123_456_789 });
        fs.setattr(file, &SetAttr { mtime, ..SetAttr::default() }).unwrap();
        fs.set_logical_size(file, 0).unwrap();
        fs.make_written(file, ByteRange::new(0, MIB)).unwrap();
        assert_eq!(fs.attr(file).unwrap().mtime, mtime);
        fs.settle_size(file, 1000).unwrap();
        let attr = fs.attr(file).unwrap();
        assert_eq!((attr.mtime, attr.size), (mtime, 1000));
    });
}

fn free_bytes(rig: &Rig) -> u64 {
    let stat = rig.fs().statfs().unwrap();
    stat.bfree * u64::from(stat.frsize)
}

fn no_space(rig: &Rig, file: FileId, range: ByteRange) {
    let before = free_bytes(rig);
    assert_eq!(rig.fs().make_written(file, range).unwrap_err(), Errno::NOSPC);
    rig.fs().syncfs().unwrap();
    // Extent trees may have grown a little; the data space is back.
    let lost = before.saturating_sub(free_bytes(rig));
    assert!(lost < MIB, "{lost} bytes lost of {before}");
}

#[test]
fn a_full_volume_keeps_its_data_and_gives_back_what_was_taken() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        let old = pattern(4, 300_000);
        fs.write(file, 0, &old).unwrap();
        fs.write(file, 2 * MIB, &old).unwrap();
        fs.syncfs().unwrap();
        let size = fs.attr(file).unwrap().size;
        no_space(rig, file, ByteRange::new(0, 2 * super::rig::IMAGE_BYTES));
        assert_eq!(fs.attr(file).unwrap().size, size);
        fs.drop_cache(file).unwrap();
        assert!(fs.read(file, 0, 300_000).unwrap() == old);
        assert!(fs.read(file, 2 * MIB, 300_000).unwrap() == old);
        assert!(fs.read(file, MIB, 4096).unwrap().iter().all(|byte| *byte == 0));
        // And not as a state: smaller wishes are granted.
        fs.make_written(file, ByteRange::new(0, 4 * MIB)).unwrap();
    });
}

#[test]
fn a_dropped_cache_hides_nothing() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        fs.write(file, 0, &pattern(5, 4 << 20)).unwrap();
        fs.drop_cache(file).unwrap();
        assert!(fs.read(file, 0, 4 << 20).unwrap() == pattern(5, 4 << 20));
        fs.drop_cache(file).unwrap();
        let fd = fs.data_fd(file).unwrap();
        assert_eq!(csv_lun::sys::cachestat(&*fd, 0, 0).unwrap(), csv_lun::sys::CacheStat::default());
        let place = fs.map(file, ByteRange::new(MIB, MIB + 4096)).unwrap()[0].lun_offset.unwrap().0;
        rig.lun.write_all_at(&[9; 4096], place).unwrap();
        assert_eq!(fs.read(file, MIB, 4096).unwrap(), [9; 4096]);
    });
}

#[test]
fn data_inside_the_inode_is_not_lent() {
    if !is_root() {
        return;
    }
    let mut rig = Rig::formatted(FsKind::Ext4, &["-O", "inline_data"]);
    rig.mount();
    let fs = rig.fs();
    let file = rig.file(b"f");
    fs.write(file, 0, b"tiny").unwrap();
    let refused = fs.map(file, ByteRange::new(0, 4096)).unwrap_err();
    assert_eq!(refused, MapError::NotLendable("its data lies inside the inode"));
    // Blocks bring it out of the inode.
    fs.make_written(file, ByteRange::new(0, 8192)).unwrap();
    let extents = fs.map(file, ByteRange::new(0, 8192)).unwrap();
    assert_eq!(bytes_on_lun(&rig, &extents)[..6], *b"tiny\0\0");
}

#[test]
fn mapping_far_behind_the_end_is_a_hole_and_making_too_much_is_refused() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        let extents = fs.map(file, ByteRange::new(0, 1 << 40)).unwrap();
        assert_eq!(extents, [Extent { file_offset: 0, len: 1 << 40, lun_offset: None }]);
        assert_eq!(fs.map(file, ByteRange::new(7, 7)).unwrap(), []);
        assert_eq!(fs.make_written(file, ByteRange::ALL).unwrap_err(), Errno::FBIG);
        assert_eq!(fs.make_written(rig.root(), ByteRange::new(0, 1)).unwrap_err(), Errno::ISDIR);
    });
}
