use super::*;
use crate::testutil::{LoopDevice, lun_file};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

fn pattern(len: usize, seed: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::new(len);
    for (block, bytes) in buf.chunks_mut(512).enumerate() {
        bytes.fill(seed.wrapping_add(u8::try_from(block % 251).unwrap()));
    }
    buf
}

fn round_trip(lun: &Lun) {
    let data = pattern(16 * 4096, 3);
    lun.write_at(&data, data.len(), LunOffset(8192)).unwrap();
    lun.flush().unwrap();
    let mut back = AlignedBuf::new(data.len());
    lun.read_at(&mut back, data.len(), LunOffset(8192)).unwrap();
    assert!(back[..] == data[..]);
    lun.read_at(&mut back, 4096, LunOffset(4096)).unwrap();
    assert!(back[..4096].iter().all(|b| *b == 0), "the block before must be untouched");
}

#[test]
fn file_lun_keeps_what_was_written() {
    let file = lun_file(1 << 20);
    let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
    assert_eq!(lun.capacity_bytes(), 1 << 20);
    assert!(!lun.is_block_device());
    round_trip(&lun);
}

#[test]
fn block_device_tells_its_geometry() {
    let Some(device) = LoopDevice::new(8 << 20, 4096) else { return };
    let lun = Lun::open(device.path(), LunOptions::default()).unwrap();
    assert!(lun.is_block_device());
    assert_eq!((lun.capacity_bytes(), lun.logical_block_bytes()), (8 << 20, 4096));
    assert!(lun.memory_align().is_power_of_two() && lun.memory_align() <= 4096);
    round_trip(&lun);
    let error = lun.check_range(IoOp::Read, 512, LunOffset(0)).unwrap_err();
    assert!(matches!(error, LunError::Misaligned { what: "length", value: 512, .. }), "{error}");
}

#[test]
fn what_cannot_be_sent_is_refused() {
    let file = lun_file(1 << 20);
    let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
    let mut buf = AlignedBuf::new(8192);
    let errno = |result: Result<(), LunError>| result.unwrap_err().errno();
    assert_eq!(errno(lun.read_at(&mut buf, 4096, LunOffset(1 << 20))), libc::ENXIO);
    assert_eq!(errno(lun.read_at(&mut buf, 8192, LunOffset((1 << 20) - 4096))), libc::ENXIO);
    assert_eq!(errno(lun.write_at(&buf, 4096, LunOffset(u64::MAX - 4095))), libc::ENXIO);
    assert_eq!(errno(lun.write_at(&buf, 4096, LunOffset(100))), libc::EINVAL);
    assert_eq!(errno(lun.read_at(&mut buf, 12288, LunOffset(0))), libc::EINVAL);
    let options = LunOptions { read_only: true, ..LunOptions::default() };
    let read_only = Lun::open(file.path(), options).unwrap();
    assert_eq!(errno(read_only.write_at(&buf, 4096, LunOffset(0))), libc::EROFS);
    read_only.read_at(&mut buf, 4096, LunOffset(0)).unwrap();
}

#[test]
fn unsuitable_paths_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let read_only = LunOptions { read_only: true, direct: false };
    for (path, errno) in [
        (dir.path(), libc::ENOTBLK),
        (Path::new("/dev/null"), libc::ENOTBLK),
        (&*dir.path().join("missing"), libc::ENOENT),
    ] {
        let error = Lun::open(path, read_only).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_lun_that_shrank_is_told_apart_from_a_failed_path() {
    let file = lun_file(1 << 20);
    let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
    assert_eq!(lun.check_capacity(), Ok(1 << 20));
    file.as_file().set_len(2 << 20).unwrap();
    assert_eq!(lun.check_capacity(), Ok(2 << 20));
    file.as_file().set_len(1 << 19).unwrap();
    let mut buf = AlignedBuf::new(4096);
    let error = lun.read_at(&mut buf, 4096, LunOffset((1 << 20) - 4096)).unwrap_err();
    assert!(matches!(error, LunError::Shrunk { now_bytes: 524_288, .. }), "{error}");
    assert!(!error.is_path_failure());
}

#[test]
fn faults_hit_every_operation_and_heal() {
    let file = lun_file(1 << 20);
    let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
    let mut buf = AlignedBuf::new(4096);
    lun.set_fault(PathFault::ErrorAfter(1));
    lun.read_at(&mut buf, 4096, LunOffset(0)).unwrap();
    let error = lun.read_at(&mut buf, 4096, LunOffset(4096)).unwrap_err();
    let LunError::PathFailed { op: IoOp::Read, offset: 4096, errno: Errno::IO, .. } = error else {
        panic!("{error}")
    };
    lun.set_fault(PathFault::Fail);
    assert!(lun.write_at(&buf, 4096, LunOffset(0)).unwrap_err().is_path_failure());
    assert!(lun.flush().unwrap_err().is_path_failure());
    assert_eq!(lun.check_fault().unwrap_err().errno(), libc::EIO);
    assert_eq!(lun.fault(), PathFault::Fail);
    lun.set_fault(PathFault::Heal);
    round_trip(&lun);
}

#[test]
fn a_reservation_conflict_is_no_path_failure() {
    let file = lun_file(1 << 20);
    let lun = Lun::open(file.path(), LunOptions::default()).unwrap();
    let error = lun.io_error(IoOp::Write, LunOffset(0), Errno::BADE);
    assert!(error.is_fenced() && !error.is_path_failure());
    assert_eq!(error.errno(), libc::EBADE);
}

/// Two loop devices on one file are two nodes: each has a page cache of its own.
#[test]
fn what_another_node_wrote_is_seen_after_the_page_cache_is_dropped() {
    let Some(ours) = LoopDevice::new(1 << 20, 512) else { return };
    let theirs = ours.second();
    let buffered = std::fs::File::open(ours.path()).unwrap();
    let first_byte = || {
        let mut byte = [0];
        buffered.read_exact_at(&mut byte, 0).unwrap();
        byte[0]
    };
    assert_eq!(first_byte(), 0);
    let data = pattern(4096, 3);
    Lun::open(theirs.path(), LunOptions::default()).unwrap().write_at(&data, 4096, LunOffset(0)).unwrap();
    assert_eq!(first_byte(), 0, "the cache was not stale, so this test shows nothing");
    Lun::open(ours.path(), LunOptions::default()).unwrap().drop_page_cache().unwrap();
    assert_eq!(first_byte(), 3);
}

/// A loop device on a loop device: the lower one can be made shorter behind the upper one's back.
#[test]
fn a_page_that_somebody_else_could_not_write_is_no_failed_flush() {
    let Some(lower) = LoopDevice::new(1 << 20, 512) else { return };
    let losetup = |args: &[&str], path: &Path| {
        let output = std::process::Command::new("losetup").args(args).arg(path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
    };
    let set_size = |len: u64| {
        std::fs::OpenOptions::new().write(true).open(lower.backing()).unwrap().set_len(len).unwrap();
        losetup(&["--set-capacity"], lower.path());
    };
    let upper = losetup(&["--find", "--show"], lower.path());
    let lun = Lun::open(&upper, LunOptions::default()).unwrap();
    let cached = std::fs::OpenOptions::new().read(true).write(true).open(&upper).unwrap();
    set_size(4096);
    cached.write_all_at(&[7; 4096], 512 << 10).unwrap();
    let written = cached.sync_data();
    set_size(1 << 20);
    let flushed = lun.flush();
    drop((cached, lun));
    losetup(&["--detach"], &upper);
    written.expect_err("there was no room");
    flushed.unwrap();
}
