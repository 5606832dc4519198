//! What can be mounted, and what the errors say.

use super::on_each_fs;
use super::rig::{Rig, attach, detach, is_root};
use crate::hidden::{FsKind, HiddenFs, MountError};
use rustix::io::Errno;
use std::path::Path;

#[test]
fn what_is_no_file_system_is_told_apart() {
    if !is_root() {
        return;
    }
    let rig = Rig::unformatted(FsKind::Ext4);
    for kind in [FsKind::Ext4, FsKind::Xfs] {
        let error = HiddenFs::mount(&rig.device, kind, false).unwrap_err();
        assert!(matches!(error, MountError::NotFormatted { .. }), "{error}");
    }
    let error = HiddenFs::mount(&rig.image, FsKind::Ext4, false).unwrap_err();
    assert!(matches!(error, MountError::NotBlockDevice { .. }), "{error}");
    let error = HiddenFs::mount(Path::new("/nowhere/lun"), FsKind::Ext4, false).unwrap_err();
    assert!(matches!(error, MountError::Device { errno: Errno::NOENT, .. }), "{error}");
    let xfs = Rig::formatted(FsKind::Xfs, &[]);
    let error = HiddenFs::mount(&xfs.device, FsKind::Ext4, false).unwrap_err();
    assert!(matches!(error, MountError::NotFormatted { .. }), "{error}");
}

#[test]
fn a_mounted_device_is_refused_and_free_again_after_the_drop() {
    on_each_fs(|rig| {
        let error = HiddenFs::mount(&rig.device, rig.kind, false).unwrap_err();
        assert!(matches!(error, MountError::InUseHere { .. }), "{error}");
        // Nobody else on this machine sees the mount.
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(rig.device.to_str().unwrap()));
        rig.remount();
    });
}

#[test]
fn a_read_only_mount_changes_nothing() {
    on_each_fs(|rig| {
        let file = rig.file(b"f");
        rig.fs().write(file, 0, b"text").unwrap();
        rig.unmount();
        let before = rig.lun_bytes(0, 64 << 20);
        let fs = rig.try_mount(true).unwrap();
        assert_eq!(fs.read(file, 0, 10).unwrap(), b"text");
        assert_eq!(fs.create(fs.root(), b"x", 0o644, 0).unwrap_err(), Errno::ROFS);
        assert_eq!(fs.write(file, 0, b"x").unwrap_err(), Errno::PERM);
        drop(fs);
        let after = rig.lun_bytes(0, 64 << 20);
        // XFS puts the number of its last log record into the superblock, the first sector.
        let from = if rig.kind == FsKind::Xfs { 512 } else { 0 };
        let changed: Vec<_> = (from..before.len()).filter(|i| before[*i] != after[*i]).take(64).collect();
        assert!(changed.is_empty(), "{}: {changed:?}", rig.kind);
    });
}

#[test]
fn a_volume_without_our_directory_can_be_read() {
    if !is_root() {
        return;
    }
    for kind in [FsKind::Ext4, FsKind::Xfs] {
        let rig = Rig::formatted(kind, &[]);
        let fs = rig.try_mount(true).unwrap();
        assert!(fs.readdir(fs.root(), 0, 4096, true).unwrap().end);
        assert_eq!(fs.attr(fs.orphans_dir()).unwrap_err(), Errno::STALE);
        assert_eq!(fs.orphans(), []);
    }
}

#[test]
fn a_dirty_journal_is_not_replayed_by_a_read_only_mount() {
    on_each_fs(|rig| {
        if rig.kind != FsKind::Ext4 {
            return;
        }
        rig.file(b"f");
        rig.fs().syncfs().unwrap();
        rig.fs().crash().unwrap();
        rig.unmount();
        let error = rig.try_mount(true).unwrap_err();
        assert!(matches!(error, MountError::NeedsRecovery { .. }), "{error}");
        rig.mount();
        assert!(rig.fs().lookup(rig.root(), b"f").is_ok());
    });
}

/// Two loop devices over one file are what two nodes with one LUN are to ext4. Takes as long as mmp waits.
#[test]
fn mmp_keeps_a_second_node_out() {
    if !is_root() {
        return;
    }
    let mut rig = Rig::formatted(FsKind::Ext4, &["-O", "mmp", "-E", "mmp_update_interval=1"]);
    rig.mount();
    let second = attach(&rig.image);
    let result = HiddenFs::mount(&second, FsKind::Ext4, false);
    detach(&second);
    let error = result.unwrap_err();
    assert!(matches!(error, MountError::InUseElsewhere { .. }), "{error}");
    rig.file(b"f");
    rig.fs().syncfs().unwrap();
}
