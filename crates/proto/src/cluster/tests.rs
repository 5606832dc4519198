//! Ways to the wire and back, and what is refused on the way.

use super::*;
use prost::Message;

#[test]
fn calls_come_back_as_they_went() {
    for kind in [RaftKind::Append, RaftKind::Vote, RaftKind::Snapshot] {
        let call = RaftCall { from: 3, instance: 1000, kind, payload: Bytes::from_static(b"x") };
        let bytes = call.clone().into_wire().encode_to_vec();
        assert_eq!(RaftCall::from_wire(wire::RaftCall::decode(&*bytes).unwrap()), Ok(call));
    }
    let beat = Beat {
        incarnation: 1,
        seq: 2,
        sent_unix_ms: 3,
        term: 4,
        leader: Some(5),
        applied: 6,
        has_quorum: true,
        want_report: true,
        report_json: Some(Bytes::from_static(b"{}")),
    };
    assert_eq!(Beat::from_wire(beat.clone().into_wire(NodeId(7))), Ok((NodeId(7), beat)));
    let empty = Beat::default();
    assert_eq!(Beat::from_wire(empty.clone().into_wire(NodeId(7))), Ok((NodeId(7), empty)));
}

#[test]
fn refusals_keep_their_kind() {
    use RefusalKind::{Busy, Failed, NotAllowed, NotHere, Stopped, UnknownOutcome};
    for kind in [Failed, NotHere, Busy, NotAllowed, Stopped, UnknownOutcome] {
        let refusal = Refusal::new(kind, "why");
        assert_eq!(Refusal::from_wire(refusal.clone().into_wire()), refusal);
        let answer = raft_answer_into_wire(Err(refusal.clone()));
        assert_eq!(raft_answer_from_wire(answer), Ok(Err(refusal)));
    }
    let newer = wire::Refusal { kind: 99, text: String::new() };
    assert_eq!(Refusal::from_wire(newer).kind, Failed);
}

#[test]
fn answers_to_proposals_tell_the_leader() {
    for leader in [None, Some(2)] {
        let answer = Err(ProposeRefusal::NotLeader { leader });
        assert_eq!(propose_answer_from_wire(propose_answer_into_wire(answer.clone())), Ok(answer));
    }
    let answer = Ok(Bytes::from_static(b"done"));
    assert_eq!(propose_answer_from_wire(propose_answer_into_wire(answer.clone())), Ok(answer));
}

#[test]
fn a_join_comes_back_and_hides_its_password() {
    let grant = JoinGrant {
        node: NodeId(4),
        cluster_id: uuid::Uuid::from_u128(9),
        cluster_name: "lab".into(),
        cert_pem: "cert".into(),
        ca_pem: "ca".into(),
        smb_password: "geheim".into(),
        members: vec![Member { node: NodeId(4), name: "n4".into(), addr: "[fd00::1]:7450".parse().unwrap() }],
    };
    assert!(!format!("{grant:?}").contains("geheim"));
    assert_eq!(join_answer_from_wire(join_answer_into_wire(Ok(grant.clone()))), Ok(Ok(grant)));
}

fn join_call() -> wire::JoinCall {
    let request = JoinRequest {
        name: "n4".into(),
        addr: "10.0.0.4".parse().unwrap(),
        csr_pem: "csr".into(),
        feature_level: 1,
        software_version: "0.1.0".into(),
        now_unix_ms: 5,
        rejoin: true,
    };
    request.into_wire(&[7; SECRET_BYTES])
}

#[test]
fn what_is_malformed_is_refused() {
    JoinRequest::from_wire(join_call()).unwrap();
    for (field, spoil) in [
        ("version", (|c| c.version = 0) as fn(&mut wire::JoinCall)),
        ("secret", |c| c.secret = Bytes::from_static(b"short")),
        ("name", |c| c.name = "n".repeat(64)),
        ("name", |c| c.name.clear()),
        ("address", |c| c.addr = "10.0.0".into()),
        ("certificate request", |c| c.csr_pem = "x".repeat(20_000)),
        ("software version", |c| c.software_version = "x".repeat(65)),
    ] {
        let mut call = join_call();
        spoil(&mut call);
        let error = JoinRequest::from_wire(call).unwrap_err();
        assert!(error.0.contains(field), "{field}: {error}");
    }
    assert!(Beat::from_wire(wire::Beat::default()).is_err());
    assert!(Beat::from_wire(wire::Beat { version: 1, ..Default::default() }).is_err());
    let call = wire::RaftCall { version: 1, from: 1, instance: 1, ..Default::default() };
    assert!(RaftCall::from_wire(call).is_err(), "no kind");
    assert!(raft_answer_from_wire(wire::RaftAnswer { version: 1, outcome: None }).is_err());
    assert!(admin_answer_from_wire(wire::AdminAnswer { version: 1, outcome: None }).is_err());
}

#[test]
fn a_newer_version_is_welcome() {
    let mut beat = Beat::default().into_wire(NodeId(1));
    beat.version = PROTOCOL_VERSION + 1;
    assert!(Beat::from_wire(beat).is_ok());
}
