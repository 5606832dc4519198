use super::*;

fn label() -> Label {
    Label {
        seq: 7,
        volume_id: VolumeId(Uuid::from_u128(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10)),
        cluster_id: Uuid::from_u128(0x6f1d_6c38_6f0e_4b8a_9f0e_2f7b_3c1d_2e3f),
        name: "Volume1".into(),
        fs: FsKind::Xfs,
        fs_bytes: 10 << 30,
        created_unix_s: 1_790_000_000,
        epoch: Epoch(3),
        owner: NodeId(2),
        in_use: true,
        heartbeat: 99,
    }
}

fn with_crc(mut slot: [u8; SLOT_BYTES]) -> [u8; SLOT_BYTES] {
    let crc = crc32fast::hash(&slot[..CRC_AT]);
    slot[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    slot
}

#[test]
fn what_was_encoded_is_decoded() {
    for name in ["V", "Ablage für Gäste", &"x".repeat(64)] {
        for (fs, in_use) in [(FsKind::Ext4, false), (FsKind::Xfs, true)] {
            let label = Label { name: name.into(), fs, in_use, ..label() };
            assert_eq!(Label::decode(&label.encode().unwrap()), Ok(label));
        }
    }
}

/// The documented layout, spelled out once by hand: a change here is a change of the format.
#[test]
fn bytes_lie_where_the_layout_says() {
    let slot = label().encode().unwrap();
    assert_eq!(&slot[..8], b"CSVLABEL");
    assert_eq!(slot[8..16], [1, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(slot[16..24], [7, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(slot[24..40], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    assert_eq!(slot[40..44], [0x6f, 0x1d, 0x6c, 0x38]);
    assert_eq!(slot[56..64], [2, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(slot[64..72], [3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(slot[72..80], (10_u64 << 30).to_le_bytes());
    assert_eq!(slot[80..88], 1_790_000_000_u64.to_le_bytes());
    assert_eq!(slot[88..100], [99, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]);
    assert_eq!(&slot[100..108], b"Volume1\0");
}

#[test]
fn every_flipped_bit_is_noticed() {
    let good = label().encode().unwrap();
    for at in 0..SLOT_BYTES {
        for bit in 0..8 {
            let mut bad = good;
            bad[at] ^= 1 << bit;
            let want = if at < 8 { LabelError::NotALabel } else { LabelError::Damaged };
            assert_eq!(Label::decode(&bad), Err(want), "byte {at} bit {bit}");
        }
    }
}

#[test]
fn every_torn_write_leaves_the_label_before_it() {
    let old = label();
    let new = Label { seq: 8, epoch: Epoch(4), ..label() };
    let newest = Label { seq: 9, epoch: Epoch(5), ..label() };
    let (a, b, c) = (old.encode().unwrap(), new.encode().unwrap(), newest.encode().unwrap());
    for cut in (0..=SLOT_BYTES).step_by(16) {
        let mut torn = a;
        torn[..cut].copy_from_slice(&c[..cut]);
        let chosen = select([&torn, &b]).unwrap().unwrap();
        let want = if torn == c { &newest } else { &new };
        assert_eq!(&chosen.label, want, "cut at {cut}");
    }
}

#[test]
fn highest_sequence_number_wins_and_the_other_slot_is_next() {
    let low = label().encode().unwrap();
    let high = Label { seq: 8, ..label() }.encode().unwrap();
    let blank = [0; SLOT_BYTES];
    let chosen = |slots| select(slots).unwrap().map(|s| (s.label.seq, s.next_slot));
    assert_eq!(chosen([&low, &high]), Some((8, 0)));
    assert_eq!(chosen([&high, &low]), Some((8, 1)));
    assert_eq!(chosen([&blank, &low]), Some((7, 0)));
    assert_eq!(chosen([&low, &blank]), Some((7, 1)));
    assert_eq!(chosen([&blank, &blank]), None);
}

#[test]
fn damage_and_newer_versions_are_not_taken_for_a_blank_lun() {
    let good = label().encode().unwrap();
    let blank = [0; SLOT_BYTES];
    let mut damaged = good;
    damaged[50] ^= 1;
    assert_eq!(select([&blank, &damaged]), Err(LabelError::Damaged));
    assert_eq!(select([&damaged, &good]).unwrap().unwrap().next_slot, 0);
    let mut newer = good;
    newer[8] = 2;
    let newer = with_crc(newer);
    assert_eq!(select([&good, &newer]), Err(LabelError::UnknownVersion(2)));
}

#[test]
fn impossible_fields_are_refused_even_with_a_good_checksum() {
    for (at, value, field) in [
        (12, 2, "flag"),
        (56, 3, "file system"),
        (96, 0, "volume name"),
        (96, 65, "volume name"),
        (100, 0xff, "volume name"),
        (101, b'/', "volume name"),
        (163, 1, "volume name"),
        (164, 1, "reserved byte"),
        (4091, 1, "reserved byte"),
    ] {
        let mut slot = label().encode().unwrap();
        slot[at] = value;
        assert_eq!(Label::decode(&with_crc(slot)), Err(LabelError::BadField(field)), "byte {at}");
    }
    assert_eq!(Label::decode(&[0; 512]), Err(LabelError::WrongLength(512)));
}

#[test]
fn names_that_cannot_be_directories_are_refused() {
    for name in ["", ".", "..", "a/b", "a\0b", "a\nb", &"x".repeat(65)] {
        let label = Label { name: name.into(), ..label() };
        assert_eq!(label.encode(), Err(LabelError::BadName(name.into())));
    }
    assert_eq!("btrfs".parse::<FsKind>(), Err(LabelError::UnknownFs("btrfs".into())));
    assert_eq!("xfs".parse(), Ok(FsKind::Xfs));
}
