use super::*;
use crate::label::{beat, bump_epoch};
use crate::testutil::{LoopDevice, Mounted, lun_file, run};
use rustix::fs::{Mode, OFlags};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

const XFS_LUN_BYTES: u64 = 320 << 20;

fn request(lun: &Path, fs: FsKind) -> CreateRequest {
    CreateRequest {
        lun: lun.into(),
        name: "Volume1".into(),
        fs,
        cluster_id: Uuid::from_u128(7),
        force: false,
    }
}

fn create(request: &CreateRequest) -> Result<Label, CreateError> {
    create_volume(request, &mut |_| {})
}

fn open(path: &Path) -> Lun {
    Lun::open(path, LunOptions::default()).unwrap()
}

/// A fresh volume is complete: label as returned, clean file system of the label's UUID that ends before it.
fn check_volume(path: &Path, label: &Label) {
    let lun = open(path);
    assert_eq!(read_label(&lun).unwrap().as_ref(), Some(label));
    let fs = probe_fs(&lun).unwrap().unwrap();
    assert_eq!((fs.kind, fs.uuid, fs.fs_bytes), (label.fs, label.volume_id.0, label.fs_bytes));
    assert_eq!(fs.block_bytes, 4096);
    assert!(fs.fs_bytes <= lun.capacity_bytes() - AREA_BYTES);
    match label.fs {
        FsKind::Ext4 => run("e2fsck", &["-f", "-n"], path),
        FsKind::Xfs => run("xfs_repair", &["-n"], path),
    }
}

#[test]
fn ext4_volume_on_a_block_device_mounts_and_has_no_unlendable_features() {
    let Some(device) = LoopDevice::new(EXT4_LUN_BYTES_MIN, 512) else { return };
    let mut steps = Vec::new();
    let label = create_volume(&request(device.path(), FsKind::Ext4), &mut |s| steps.push(s.to_string()));
    let label = label.unwrap();
    assert_eq!((label.seq, label.epoch, label.in_use), (1, Epoch(0), false));
    assert_eq!(steps.last().unwrap(), "writing the label");
    check_volume(device.path(), &label);
    let output = Command::new("dumpe2fs").arg("-h").arg(device.path()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let features: Vec<&str> = text
        .lines()
        .find_map(|line| line.strip_prefix("Filesystem features:"))
        .unwrap()
        .split_whitespace()
        .collect();
    for feature in ["mmp", "extent", "has_journal", "metadata_csum", "64bit"] {
        assert!(features.contains(&feature), "{feature} is missing: {features:?}");
    }
    for feature in ["inline_data", "bigalloc", "encrypt", "quota", "project", "orphan_file", "verity"] {
        assert!(!features.contains(&feature), "{feature} is on: {features:?}");
    }
    let mounted = Mounted::new(device.path());
    std::fs::write(mounted.point().join("a"), b"data").unwrap();
    drop(mounted);
    assert_eq!(read_label(&open(device.path())).unwrap(), Some(label), "a mount must not touch the label");
}

#[test]
fn xfs_volume_has_no_reflinks_and_the_sector_of_the_device() {
    for sector_bytes in [512, 4096] {
        let Some(device) = LoopDevice::new(XFS_LUN_BYTES, sector_bytes) else { return };
        let label = create(&request(device.path(), FsKind::Xfs)).unwrap();
        check_volume(device.path(), &label);
        let mounted = Mounted::new(device.path());
        let output = Command::new("xfs_info").arg(mounted.point()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("reflink=0"), "{text}");
        assert!(text.contains(&format!("sectsz={sector_bytes}")), "{text}");
    }
}

#[test]
fn volumes_on_files_work_too() {
    for (fs, len) in [(FsKind::Ext4, EXT4_LUN_BYTES_MIN), (FsKind::Xfs, XFS_LUN_BYTES)] {
        let file = lun_file(len);
        check_volume(file.path(), &create(&request(file.path(), fs)).unwrap());
    }
}

#[test]
fn what_is_there_is_named_and_kept_without_force() {
    let file = lun_file(EXT4_LUN_BYTES_MIN);
    file.as_file().write_all_at(b"LUKS\xba\xbe", 0).unwrap();
    let ask = request(file.path(), FsKind::Ext4);
    let error = create(&ask).unwrap_err().to_string();
    assert!(error.contains("a LUKS encrypted device") && error.contains("--force"), "{error}");
    let mut magic = [0; 6];
    file.as_file().read_exact_at(&mut magic, 0).unwrap();
    assert_eq!(&magic, b"LUKS\xba\xbe");

    let forced = CreateRequest { force: true, ..ask.clone() };
    let first = create(&forced).unwrap();
    let error = create(&ask).unwrap_err().to_string();
    assert!(error.contains("Volume1") && error.contains(&first.cluster_id.to_string()), "{error}");
    let second = create(&CreateRequest { fs: FsKind::Ext4, name: "Other".into(), ..forced }).unwrap();
    assert_ne!(first.volume_id, second.volume_id);
    check_volume(file.path(), &second);
    assert_eq!(probe(&open(file.path())).unwrap().signatures, ["an ext2, ext3 or ext4 file system"]);
}

#[test]
fn force_does_not_override_a_mount() {
    let Some(device) = LoopDevice::new(EXT4_LUN_BYTES_MIN, 512) else { return };
    let forced = CreateRequest { force: true, ..request(device.path(), FsKind::Ext4) };
    let label = create(&forced).unwrap();
    let mounted = Mounted::new(device.path());
    let error = create(&forced).unwrap_err();
    assert!(matches!(&error, CreateError::InUse { by, .. } if by.contains("mounted at")), "{error}");
    drop(mounted);
    check_volume(device.path(), &label);
}

/// Another node has the volume: its heartbeat moves while create watches.
#[test]
fn force_overrides_a_stale_mark_but_not_a_beating_heart() {
    let file = lun_file(EXT4_LUN_BYTES_MIN);
    let forced = CreateRequest { force: true, ..request(file.path(), FsKind::Ext4) };
    create(&forced).unwrap();
    let lun = open(file.path());
    let epoch = bump_epoch(&lun, NodeId(2)).unwrap();
    let mut beats = 0;
    let error = create_volume(&forced, &mut |step| {
        if step.contains("heartbeat") {
            beat(&lun, epoch).unwrap();
            beats += 1;
        }
    })
    .unwrap_err();
    assert_eq!(beats, 1);
    assert!(matches!(&error, CreateError::InUse { by, .. } if by.contains("n2")), "{error}");
    assert!(read_label(&lun).unwrap().unwrap().in_use);
    // Nobody beats any more: the owner crashed.
    let label = create(&forced).unwrap();
    check_volume(file.path(), &label);
}

#[test]
fn small_read_only_and_badly_named_luns_are_refused() {
    let file = lun_file(EXT4_LUN_BYTES_MIN - 4096);
    let error = create(&request(file.path(), FsKind::Ext4)).unwrap_err();
    assert!(matches!(error, CreateError::TooSmall { need_bytes: EXT4_LUN_BYTES_MIN, .. }), "{error}");
    let file = lun_file(XFS_LUN_BYTES_MIN - 4096);
    let error = create(&request(file.path(), FsKind::Xfs)).unwrap_err();
    assert!(error.to_string().contains("301 MiB"), "{error}");
    let bad = CreateRequest { name: "a/b".into(), ..request(file.path(), FsKind::Ext4) };
    assert!(matches!(create(&bad), Err(CreateError::Name(_))));

    let Some(device) = LoopDevice::with_args(EXT4_LUN_BYTES_MIN, &["--read-only"]) else { return };
    let error = create(&request(device.path(), FsKind::Ext4)).unwrap_err();
    assert!(matches!(error, CreateError::Lun(LunError::ReadOnly { .. })), "{error}");
}

#[test]
fn a_create_that_fails_in_the_middle_leaves_no_volume() {
    let Some(device) = LoopDevice::new(EXT4_LUN_BYTES_MIN, 512) else { return };
    let forced = CreateRequest { force: true, ..request(device.path(), FsKind::Ext4) };
    create(&forced).unwrap();
    // Somebody claims the device under mkfs, which has to fail then.
    let mut claim = None;
    let error = create_volume(&forced, &mut |step| {
        if step.contains("file system") {
            let flags = OFlags::RDONLY | OFlags::EXCL;
            claim = Some(rustix::fs::open(device.path(), flags, Mode::empty()).unwrap());
        }
    })
    .unwrap_err();
    assert!(matches!(error, CreateError::MkfsFailed { .. }), "{error}");
    drop(claim);
    assert!(probe(&open(device.path())).unwrap().is_blank());
}
