use super::*;
use crate::device::LunOptions;
use crate::testutil::{lun_file, run};
use csv_ondisk::FsKind;
use csv_types::VolumeId;
use std::fs::File;
use std::os::unix::fs::FileExt;
use uuid::Uuid;

const LUN_BYTES: u64 = 64 << 20;

fn label() -> Label {
    Label {
        seq: 0,
        volume_id: VolumeId(Uuid::from_u128(1)),
        cluster_id: Uuid::from_u128(2),
        name: "Volume1".into(),
        fs: FsKind::Ext4,
        fs_bytes: LUN_BYTES - AREA_BYTES,
        created_unix_s: 5,
        epoch: Epoch(0),
        owner: NodeId(0),
        in_use: false,
        heartbeat: 0,
    }
}

fn open(file: &tempfile::NamedTempFile) -> Lun {
    Lun::open(file.path(), LunOptions::default()).unwrap()
}

fn slot_magics(file: &File, area: u64) -> [bool; 2] {
    SLOT_OFFSETS.map(|offset| {
        let mut magic = [0; 8];
        file.read_exact_at(&mut magic, area + offset).unwrap();
        magic == MAGIC
    })
}

#[test]
fn writes_alternate_between_the_slots_of_the_last_mib() {
    let file = lun_file(LUN_BYTES);
    let lun = open(&file);
    let area = LUN_BYTES - AREA_BYTES;
    assert_eq!(read_label(&lun), Ok(None));
    assert_eq!(write_label(&lun, &label()).unwrap().seq, 1);
    assert_eq!(slot_magics(file.as_file(), area), [true, false]);
    assert_eq!(write_label(&lun, &label()).unwrap().seq, 2);
    assert_eq!(slot_magics(file.as_file(), area), [true, true]);
    assert_eq!(read_label(&lun), Ok(Some(Label { seq: 2, ..label() })));
}

#[test]
fn a_torn_second_write_leaves_the_first_label() {
    let file = lun_file(LUN_BYTES);
    let lun = open(&file);
    write_label(&lun, &label()).unwrap();
    assert_eq!(bump_epoch(&lun, NodeId(2)), Ok(Epoch(1)));
    let at = LUN_BYTES - AREA_BYTES + SLOT_OFFSETS[1];
    file.as_file().write_all_at(&[0xff; 512], at + 512).unwrap();
    assert_eq!(read_label(&lun).unwrap().unwrap().epoch, Epoch(0));
    // The next write replaces the torn slot, not the good one.
    assert_eq!(bump_epoch(&lun, NodeId(3)), Ok(Epoch(1)));
    assert_eq!(slot_magics(file.as_file(), LUN_BYTES - AREA_BYTES), [true, true]);
    assert_eq!(read_label(&lun).unwrap().unwrap().owner, NodeId(3));
}

#[test]
fn ownership_moves_by_epoch_and_a_former_owner_is_refused() {
    let file = lun_file(LUN_BYTES);
    let lun = open(&file);
    assert_eq!(bump_epoch(&lun, NodeId(1)), Err(LabelIoError::NoLabel));
    write_label(&lun, &label()).unwrap();
    let first = bump_epoch(&lun, NodeId(1)).unwrap();
    let before = read_label(&lun).unwrap().unwrap();
    assert!(before.in_use);
    assert_eq!(beat(&lun, first).unwrap(), before.heartbeat + 1);
    let second = bump_epoch(&lun, NodeId(2)).unwrap();
    let stale = LabelIoError::Stale { expected: first, found: second, owner: NodeId(2) };
    assert_eq!(beat(&lun, first), Err(stale.clone()));
    assert_eq!(mark_unused(&lun, first), Err(stale));
    mark_unused(&lun, second).unwrap();
    let after = read_label(&lun).unwrap().unwrap();
    assert_eq!((after.in_use, after.epoch, after.owner), (false, second, NodeId(2)));
}

#[test]
fn the_label_is_found_and_stays_behind_the_file_system_when_the_lun_grows() {
    let file = lun_file(LUN_BYTES);
    let fs_kib = (LUN_BYTES - AREA_BYTES) / 1024;
    // One MiB less than would fit, as mkfs.xfs may leave.
    let size = format!("{}k", fs_kib - 1024);
    let path = file.path().to_str().unwrap();
    run("mkfs.ext4", &["-q", "-F", "-b", "4096", path], std::path::Path::new(&size));
    write_label(&open(&file), &label()).unwrap();
    file.as_file().set_len(2 * LUN_BYTES).unwrap();
    let lun = open(&file);
    assert_eq!(read_label(&lun).unwrap().unwrap().seq, 1);
    assert_eq!(bump_epoch(&lun, NodeId(1)), Ok(Epoch(1)));
    assert_eq!(slot_magics(file.as_file(), LUN_BYTES - AREA_BYTES), [true, true]);
    assert_eq!(slot_magics(file.as_file(), 2 * LUN_BYTES - AREA_BYTES), [false, false]);

    wipe_labels(&lun).unwrap();
    assert_eq!(slot_magics(file.as_file(), LUN_BYTES - AREA_BYTES), [false, false]);
    assert_eq!(read_label(&lun), Ok(None));
}

#[test]
fn a_lun_without_room_has_no_label() {
    assert_eq!(label_area_at(AREA_BYTES), None);
    assert_eq!(label_area_at(AREA_BYTES + 4096), Some(LunOffset(4096)));
    assert_eq!(label_area_at(LUN_BYTES + 512), Some(LunOffset(LUN_BYTES - AREA_BYTES)));
    let file = lun_file(AREA_BYTES);
    assert_eq!(read_label(&open(&file)), Ok(None));
    assert_eq!(write_label(&open(&file), &label()), Err(LabelIoError::TooSmall));
}

#[test]
fn a_path_failure_is_reported_as_one() {
    let file = lun_file(LUN_BYTES);
    let lun = open(&file);
    lun.set_fault(csv_types::admin::PathFault::Fail);
    assert!(matches!(read_label(&lun), Err(LabelIoError::Lun(error)) if error.is_path_failure()));
}
