use super::*;

#[test]
fn a_snapshot_comes_back_and_newer_or_damaged_ones_are_refused() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 1);
    bed.ok(Command::CheckpointPut { name: "c".into(), value: vec![0, 255, 7], owner: None });
    bed.ok(Command::Property { key: "site".into(), value: Some("hall 3".into()) });
    let bytes = bed.db.encode_snapshot();
    assert_eq!(ClusterDb::decode_snapshot(&bytes).unwrap(), bed.db);
    let text = String::from_utf8(bytes.clone()).unwrap();
    let newer = text.replacen("\"format\":1", "\"format\":2", 1);
    let error = ClusterDb::decode_snapshot(newer.as_bytes()).unwrap_err();
    assert!(matches!(error, SnapshotError::Newer { found: 2, known: 1 }), "{error}");
    let unknown = text.replacen('{', "{\"from_the_future\":[1],", 1);
    assert_eq!(ClusterDb::decode_snapshot(unknown.as_bytes()).unwrap(), bed.db);
    let error = ClusterDb::decode_snapshot(&bytes[..bytes.len() - 1]).unwrap_err().to_string();
    assert!(error.contains("csvctl cluster rejoin"), "{error}");
    let twins = text.replacen("\"name\":\"n2\"", "\"name\":\"n1\"", 1);
    let error = ClusterDb::decode_snapshot(twins.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("same name"), "{error}");
    let empty = ClusterDb::default();
    assert_eq!(ClusterDb::decode_snapshot(&empty.encode_snapshot()).unwrap(), empty);
}

#[test]
fn a_command_of_a_newer_version_is_not_guessed_at() {
    let error = Envelope::decode(br#"{"at_unix_ms":1,"by":1,"command":{"volume-teleport":{}}}"#).unwrap_err();
    assert!(error.to_string().contains("newer version"), "{error}");
    let text = String::from_utf8(Command::NodeResume { node: n(1) }.by(n(1), 5).encode()).unwrap();
    assert_eq!(text, r#"{"at_unix_ms":5,"by":1,"command":{"node-resume":{"node":1}}}"#);
}

#[test]
fn secrets_are_not_shown() {
    let secrets = Secrets { smb_password: "geheim".into(), ..Secrets::default() };
    assert!(!format!("{:?}", Command::SecretsSet { secrets }).contains("geheim"));
}

#[test]
fn settings_quorum_and_votes() {
    let mut bed = Bed::nodes(2);
    bed.refused(Command::Setting { key: "heartbeat_ms".into(), value: "0".into() }, "50 to 60_000 ms");
    bed.setting("heartbeat_ms", "500");
    let quorum =
        |name: &str, addr| QuorumConfig { witness: Witness::Node { name: name.into(), addr }, dynamic: true };
    bed.refused(Command::QuorumSet { config: quorum("w", addr(2)) }, "another machine");
    bed.ok(Command::QuorumSet { config: quorum("w", addr(200)) });
    assert_eq!(bed.ok(Command::QuorumSet { config: quorum("w", addr(200)) }), Applied::Unchanged);
    bed.refused(Command::QuorumSet { config: quorum("v", addr(201)) }, "--no-witness");
    bed.ok(Command::QuorumSet { config: QuorumConfig::default() });
    bed.ok(Command::QuorumSet { config: quorum("v", addr(201)) });
    bed.ok(Command::NodeVote { node: n(1), vote: false });
    bed.refused(Command::NodeVote { node: n(2), vote: false }, "only vote");
}

#[test]
fn records_are_bounded() {
    let mut bed = Bed::nodes(1);
    let big = "x".repeat(PROPERTY_BYTES_MAX + 1);
    bed.refused(Command::Property { key: "k".into(), value: Some(big) }, "65536 bytes");
    let value = vec![0; CHECKPOINT_BYTES_MAX + 1];
    bed.refused(Command::CheckpointPut { name: "c".into(), value, owner: None }, "512000 bytes");
    for i in 0..TOKENS_MAX - 1 {
        bed.ok(Command::TokenAdd { sha256: format!("{i:064x}"), expires_unix_ms: bed.now + 1, uses: 1 });
    }
    let more = |at| Command::TokenAdd { sha256: "f".repeat(64), expires_unix_ms: at + 1, uses: 1 };
    bed.refused(more(bed.now), "no more than 64 join tokens");
    bed.now += 1;
    bed.ok(more(bed.now));
    assert_eq!(bed.db.tokens.len(), 2, "the expired ones are gone");
    let event = NewEvent {
        id: 3014,
        at_unix_ms: 1,
        node: None,
        subject: "V".into(),
        level: Level::Info,
        message: "m".into(),
    };
    bed.ok(Command::EventAdd { events: vec![event.clone(); 64] });
    bed.refused(Command::EventAdd { events: vec![event; 65] }, "64 events");
}

#[test]
fn a_lease_is_not_lowered_under_volumes() {
    let mut bed = Bed::nodes(2);
    bed.setting("recall_ms", "2000");
    bed.setting("lease_ms", "15000");
    bed.volume("V", 1);
    let lower = || Command::Setting { key: "lease_ms".into(), value: "10000".into() };
    bed.refused(lower(), "csvctl volume remove");
    // Whoever waits for a lease waits longer than needed then.
    bed.setting("lease_ms", "20000");
    bed.refused(Command::Setting { key: "lease_ms".into(), value: "15000".into() }, "it is 20000");
    bed.ok(Command::VolumeOffline { name: "V".into(), reason: "r".into() });
    bed.refused(lower(), "volume add");
    let (epoch, node) = (bed.db.volumes["V"].epoch, n(1));
    if bed.db.volumes["V"].state.owned() {
        bed.ok(Command::VolumeReleased { name: "V".into(), epoch, node });
    }
    bed.ok(Command::VolumeRemove { name: "V".into() });
    bed.ok(lower());
}

#[test]
fn properties_go_with_their_volume_and_node() {
    let mut bed = Bed::nodes(2);
    bed.volume("V", 1);
    bed.volume("V.W", 1);
    let gone =
        ["volume.V.redirect", "volume.V.redirect-nodes", "volume.V.registered.2", "registered.2", "awake.2"];
    let stay =
        ["volume.V.W.redirect", "volume.V.W.registered.2", "volume.VV.redirect", "registered.1", "volume.V"];
    for key in gone.iter().chain(&stay) {
        bed.ok(Command::Property { key: (*key).into(), value: Some("1".into()) });
    }
    bed.ok(Command::VolumeOffline { name: "V".into(), reason: "r".into() });
    let (epoch, node) = (bed.db.volumes["V"].epoch, n(1));
    if bed.db.volumes["V"].state.owned() {
        bed.ok(Command::VolumeReleased { name: "V".into(), epoch, node });
    }
    bed.ok(Command::VolumeRemove { name: "V".into() });
    bed.down(2);
    bed.ok(Command::NodeEvict { node: n(2) });
    let left: Vec<&str> = bed.db.properties.keys().map(String::as_str).collect();
    let mut stay = stay.to_vec();
    stay.sort_unstable();
    assert_eq!(left, stay);
}

#[test]
fn all_records_together_have_a_bound_and_one_that_shrinks_is_taken() {
    let mut db = Bed::nodes(1).db;
    let put = |db: &mut ClusterDb, name: String, bytes: usize| {
        db.apply(&Command::CheckpointPut { name, value: vec![7; bytes], owner: None }.by(n(1), 1))
    };
    let mut taken = 0;
    while put(&mut db, format!("c{taken}"), CHECKPOINT_BYTES_MAX).is_ok() {
        taken += 1;
    }
    assert_eq!(taken, RECORDS_BYTES_MAX / (2 * CHECKPOINT_BYTES_MAX));
    assert!(put(&mut db, "c0".into(), CHECKPOINT_BYTES_MAX).is_ok(), "another of the same size");
    put(&mut db, "c0".into(), 10).unwrap();
    put(&mut db, "new".into(), CHECKPOINT_BYTES_MAX - 100).unwrap();
    let property = |value: usize| Command::Property { key: "p".into(), value: Some("x".repeat(value)) };
    while db.apply(&put_next(&mut taken)).is_ok() {}
    let refused = db.apply(&property(PROPERTY_BYTES_MAX).by(n(1), 1)).unwrap_err().to_string();
    assert!(refused.contains("together"), "{refused}");
    db.apply(&property(1).by(n(1), 1)).unwrap();
    let snapshot = db.encode_snapshot();
    assert!(snapshot.len() > RECORDS_BYTES_MAX - (1 << 20) && snapshot.len() < RECORDS_BYTES_MAX + (1 << 20));
}

/// A small record under a new name.
fn put_next(taken: &mut usize) -> Envelope {
    *taken += 1;
    let name = format!("small{taken}");
    Command::CheckpointPut { name, value: vec![7; 30_000], owner: None }.by(n(1), 1)
}
