use super::*;
use proptest::prelude::*;

const A: u64 = 0x1122_3344_5566_7788;

#[test]
fn commands_are_those_of_the_standard() {
    let wero = ReservationType::WriteExclusiveRegistrantsOnly;
    assert_eq!(out_cdb(OutAction::PreemptAbort, Some(wero)), [0x5f, 5, 5, 0, 0, 0, 0, 0, 24, 0]);
    assert_eq!(out_cdb(OutAction::RegisterIgnore, None), [0x5f, 6, 0, 0, 0, 0, 0, 0, 24, 0]);
    assert_eq!(in_cdb(InAction::ReadFullStatus, 0x1ff8), [0x5e, 3, 0, 0, 0, 0, 0, 0x1f, 0xf8, 0]);
    assert_eq!(is_supported_cdb(OutAction::PreemptAbort, 512), [0xa3, 0x0c, 2, 0x5f, 0, 5, 0, 0, 2, 0, 0, 0]);
    assert_eq!(
        out_parameters(A, 0xff, true),
        [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0, 0, 0, 0, 0, 0, 0, 0xff, 0, 0, 0, 0, 1, 0, 0, 0]
    );
}

/// As sent by LIO with two registrants.
#[test]
fn keys() {
    let data = [
        0, 0, 0, 4, 0, 0, 0, 16, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0, 0, 0, 0, 0, 0, 0, 2, 9, 9,
    ];
    let want = Keys { generation: 4, keys: vec![A, 2] };
    assert_eq!(parse_keys(&data), Ok(Parsed { value: want, whole_bytes: 24 }));
    // Cut short by the allocation length: what is there, and how much there is.
    let cut = parse_keys(&data[..16]).unwrap();
    assert_eq!((cut.value.keys, cut.whole_bytes), (vec![A], 24));
    assert!(parse_keys(&data[..8]).unwrap().value.keys.is_empty());
    assert!(parse_keys(&data[..7]).is_err());
    assert!(parse_keys(&[0, 0, 0, 1, 0, 0, 0, 5, 1, 1, 1, 1, 1]).is_err());
    assert_eq!(parse_keys(&[0; 8]).unwrap().value, Keys::default());
}

#[test]
fn reservation() {
    assert_eq!(parse_reservation(&[0, 0, 0, 9, 0, 0, 0, 0]), Ok(None));
    let mut data = [0_u8; 24];
    data[7] = 16;
    data[8..16].copy_from_slice(&A.to_be_bytes());
    data[21] = 5;
    let holder = Holder { key: A, kind: ReservationType::WriteExclusiveRegistrantsOnly };
    assert_eq!(parse_reservation(&data), Ok(Some(holder)));
    assert!(parse_reservation(&data[..20]).is_err());
    data[21] = 0x15;
    assert!(parse_reservation(&data).is_err(), "a scope that is not the LUN");
    data[21] = 2;
    assert!(parse_reservation(&data).is_err(), "an obsolete type");
}

#[test]
fn capabilities() {
    // LIO: CRH, SIP_C, ATP_C, PTPL_C; TMV, ALLOW COMMANDS 1, PTPL_A; all types.
    let got = parse_capabilities(&[0, 8, 0x1d, 0x91, 0xea, 0x01, 0, 0]).unwrap();
    assert_eq!((got.aptpl, got.aptpl_active), (Some(true), Some(true)));
    assert_eq!(got.types.unwrap(), ReservationType::ALL);
    let got = parse_capabilities(&[0, 8, 0, 0, 0xea, 1, 0, 0]).unwrap();
    assert_eq!((got.aptpl, got.types), (Some(false), None));
    assert!(parse_capabilities(&[0, 8, 1]).is_err());
    assert_eq!(parse_is_supported(&[0, 3]), Some(true));
    assert_eq!(parse_is_supported(&[0, 1]), Some(false));
    assert_eq!((parse_is_supported(&[0, 0]), parse_is_supported(&[0])), (None, None));
}

fn status_descriptor(key: u64, flags: u8, scope_type: u8, id: &[u8]) -> Vec<u8> {
    let mut bytes = key.to_be_bytes().to_vec();
    bytes.extend([0, 0, 0, 0, flags, scope_type, 0, 0, 0, 0, 0, 1]);
    bytes.extend(u32::try_from(id.len()).unwrap().to_be_bytes());
    bytes.extend(id);
    bytes
}

#[test]
fn full_status_names_initiators() {
    let mut iscsi = vec![0x45, 0, 0, 28];
    iscsi.extend(b"iqn.2026-01.test:a,i,0x80\0\0\0");
    let mut fc = vec![0_u8; 24];
    fc[8..16].copy_from_slice(&[0x21, 0, 0, 0x24, 0xff, 1, 2, 3]);
    let mut list = status_descriptor(A, 1, 5, &iscsi);
    list.extend(status_descriptor(2, 0, 0, &fc));
    let mut data = vec![0, 0, 0, 7];
    data.extend(u32::try_from(list.len()).unwrap().to_be_bytes());
    data.extend(list);
    let parsed = parse_full_status(&data).unwrap();
    assert_eq!(parsed.whole_bytes, data.len());
    let wero = Some(ReservationType::WriteExclusiveRegistrantsOnly);
    assert_eq!(
        parsed.value,
        [
            FullStatus {
                key: A,
                holder: true,
                kind: wero,
                initiator: "iscsi:iqn.2026-01.test:a,i,0x80".into()
            },
            FullStatus { key: 2, holder: false, kind: None, initiator: "fc:21000024ff010203".into() },
        ]
    );
    // Cut within the second descriptor.
    let cut = parse_full_status(&data[..data.len() - 5]).unwrap();
    assert_eq!((cut.value.len(), cut.whole_bytes), (1, data.len()));
    // A descriptor that reaches past the list, though nothing was cut.
    data[8 + 23] = 0xff;
    assert!(parse_full_status(&data).is_err());
}

#[test]
fn sense_in_both_formats() {
    let want = Some(Sense { key: 6, code: 0x2a, qualifier: 5 });
    assert_eq!(parse_sense(&[0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x2a, 5, 0, 0, 0, 0]), want);
    assert_eq!(parse_sense(&[0x72, 6, 0x2a, 5, 0, 0, 0, 0]), want);
    assert_eq!(parse_sense(&[0x70, 0, 5]), Some(Sense { key: 5, code: 0, qualifier: 0 }));
    assert_eq!((parse_sense(&[]), parse_sense(&[0x70]), parse_sense(&[0; 18])), (None, None, None));
}

proptest! {
    #[test]
    fn parsers_take_anything(data in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_keys(&data);
        let _ = parse_reservation(&data);
        let _ = parse_capabilities(&data);
        let _ = parse_full_status(&data);
        let _ = parse_sense(&data);
        let _ = parse_is_supported(&data);
    }

    /// The same with plausible lengths, so that the inner code is reached.
    #[test]
    fn parsers_take_lists_of_any_length(
        len in prop_oneof![0_u32..400, any::<u32>()],
        mut list in prop::collection::vec(prop_oneof![Just(0_u8), Just(24), any::<u8>()], 0..300),
    ) {
        let mut data = vec![0, 0, 0, 1];
        data.extend(len.to_be_bytes());
        data.append(&mut list);
        if let Ok(parsed) = parse_keys(&data) {
            prop_assert!(parsed.value.keys.len() <= (data.len() - 8) / 8);
        }
        if let Ok(parsed) = parse_full_status(&data) {
            prop_assert!(parsed.value.len() <= data.len() / 24);
        }
        let _ = parse_reservation(&data);
    }
}
