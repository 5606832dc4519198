//! Who may call what.

use super::rig::*;
use crate::*;
use bytes::Bytes;
use csv_proto::cluster::wire;
use csv_types::NodeId;
use std::sync::Arc;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

#[tokio::test]
async fn nodes_call_each_other() {
    let nodes = cluster(&ca(), 3).await;
    let peers = &nodes[0].peers;
    let answer = peers.raft(NodeId(2), raft_call(1, "vote for me"), LONG).await.unwrap();
    assert_eq!(&answer[..], b"vote for me");
    let mut elsewhere = raft_call(1, "x");
    elsewhere.instance = 404;
    let error = peers.raft(NodeId(2), elsewhere, LONG).await.unwrap_err();
    assert!(matches!(&error, CallError::Refused(refusal) if refusal.kind == RefusalKind::NotHere), "{error}");
    let answer = peers.propose(NodeId(3), Bytes::from_static(b"put"), LONG).await.unwrap();
    assert_eq!(answer.unwrap(), "put");
    let answer = peers.propose(NodeId(3), Bytes::new(), LONG).await.unwrap();
    assert_eq!(answer, Err(ProposeRefusal::NotLeader { leader: Some(2) }));
    let answer = peers.admin(NodeId(3), Bytes::from_static(b"{}"), LONG).await.unwrap();
    assert_eq!(answer, "n1:2");
    assert_eq!(peers.status()[&NodeId(3)].connects, 1, "one connection for all calls");
    let error = peers.raft(NodeId(1), raft_call(1, "x"), LONG).await.unwrap_err();
    assert!(matches!(error, CallError::Unreachable(_)), "itself is no peer: {error}");
}

#[tokio::test]
async fn a_certificate_of_another_cluster_is_refused() {
    let (ours, theirs) = (ca(), ca());
    let node = Node::start(&ours, 1).await;
    // One that takes this cluster's server for good, but has its certificate from elsewhere: only the server can
    // refuse it.
    let stranger = secrets_of(&theirs, 2);
    let mut config = (*stranger.client()).clone();
    config.dangerous().set_certificate_verifier(Arc::new(TakesAll));
    let opened =
        socket::open(node.server.addr(), ServerName::try_from("n1").unwrap(), Arc::new(config), LONG);
    if let Ok((conn, _)) = opened.await {
        let status = conn.stub().raft(raft_call(2, "x").into_wire()).await.unwrap_err();
        let error = CallError::from_status(&status);
        assert!(matches!(error, CallError::NotAllowed(_) | CallError::Lost(_)), "{error}");
    }
    until("the refusal", || node.handler.refused.lock().iter().any(|why| why.contains("handshake"))).await;
    // And the other way round: a client does not take a server of another cluster.
    let peers = Peers::new(stranger, patient());
    peers.set(&[(node.id, node.addr())].into());
    let error = peers.raft(node.id, raft_call(2, "x"), LONG).await.unwrap_err();
    assert!(error.to_string().contains("another cluster"), "{error}");
    assert!(!error.may_have_happened());
}

/// A client that verifies nothing.
#[derive(Debug)]
struct TakesAll;

mod takes_all {
    use super::TakesAll;
    use tokio_rustls::rustls::client::danger::{
        HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
    };
    use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use tokio_rustls::rustls::{DigitallySignedStruct, Error, SignatureScheme};

    impl ServerCertVerifier for TakesAll {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }
}

#[tokio::test]
async fn without_a_certificate_there_is_joining_only() {
    let ca = ca();
    let node = Node::start(&ca, 1).await;
    let mut config = ClientConfig::builder_with_provider(Arc::new(crate::secrets::provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TakesAll))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from("n1").unwrap();
    let (conn, _) = socket::open(node.server.addr(), name, Arc::new(config), LONG).await.unwrap();
    let status = conn.stub().raft(raft_call(2, "x").into_wire()).await.unwrap_err();
    assert!(matches!(CallError::from_status(&status), CallError::NotAllowed(_)), "{status}");
    let beats = conn.stub().beats(tokio_stream::pending()).await.unwrap_err();
    assert!(matches!(CallError::from_status(&beats), CallError::NotAllowed(_)), "{beats}");
    let admin = wire::AdminCall { version: 1, from: 0, request_json: Bytes::new() };
    let status = conn.stub().admin(admin).await.unwrap_err();
    assert!(matches!(CallError::from_status(&status), CallError::NotAllowed(_)), "{status}");
    // Joining is served, but not with large messages.
    let call = wire::JoinCall { version: 1, csr_pem: "x".repeat(100_000), ..Default::default() };
    let status = conn.stub().join(call).await.unwrap_err();
    assert!(matches!(CallError::from_status(&status), CallError::Protocol(_)), "{status}");
    assert!(node.handler.joined.lock().is_empty() && node.handler.beats.lock().is_empty());
}

#[tokio::test]
async fn a_node_speaks_for_itself_only() {
    let ca = ca();
    let nodes = cluster(&ca, 2).await;
    let peers = &nodes[0].peers;
    let error = peers.raft(NodeId(2), raft_call(3, "I am n3"), LONG).await.unwrap_err();
    assert!(matches!(&error, CallError::NotAllowed(why) if why.contains("voter 3")), "{error}");
    let name = ServerName::try_from("n2").unwrap();
    let (conn, _) =
        socket::open(nodes[1].server.addr(), name, nodes[0].secrets.client(), LONG).await.unwrap();
    let call = wire::ProposeCall { version: 1, from: 2, envelope: Bytes::from_static(b"x") };
    let status = conn.stub().propose(call).await.unwrap_err();
    assert!(matches!(CallError::from_status(&status), CallError::NotAllowed(_)), "{status}");
    let beat = Beat::default().into_wire(NodeId(2));
    let mut answers = conn.stub().beats(tokio_stream::once(beat)).await.unwrap().into_inner();
    let status = answers.message().await.unwrap_err();
    assert!(matches!(CallError::from_status(&status), CallError::NotAllowed(_)), "{status}");
    assert!(nodes[1].handler.beats.lock().is_empty());
    assert_eq!(nodes[1].handler.refused.lock().len(), 3);
    // A message without a version is not understood.
    let call = wire::RaftCall { from: 1, instance: 2, ..Default::default() };
    let status = conn.stub().raft(call).await.unwrap_err();
    assert!(matches!(CallError::from_status(&status), CallError::Refused(_)), "{status}");
}

#[tokio::test]
async fn an_evicted_node_is_shut_out_at_once() {
    let nodes = cluster(&ca(), 2).await;
    let peers = &nodes[0].peers;
    peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap();
    nodes[1].handler.evicted.lock().insert(NodeId(1));
    let error = peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap_err();
    assert!(matches!(&error, CallError::NotAllowed(why) if why.contains("join again")), "{error}");
    nodes[1].handler.evicted.lock().clear();
    peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap();
}

#[tokio::test]
async fn the_wrong_node_at_an_address_is_noticed() {
    let nodes = cluster(&ca(), 3).await;
    let peers = &nodes[0].peers;
    // The right address with the wrong name, and the right name with the wrong number.
    let wrong = PeerAddr { name: "n2".into(), addr: nodes[2].server.addr() };
    peers.set(&[(NodeId(2), wrong)].into());
    let error = peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap_err();
    assert!(matches!(&error, CallError::Unreachable(why) if why.contains("wrong node")), "{error}");
    peers.set(&[(NodeId(5), nodes[2].addr())].into());
    let error = peers.raft(NodeId(5), raft_call(1, "x"), LONG).await.unwrap_err();
    assert!(matches!(&error, CallError::Unreachable(why) if why.contains("not n5")), "{error}");
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_here() {
    let nodes = cluster(&ca(), 2).await;
    let mut call = raft_call(1, "");
    call.payload = Bytes::from(vec![0; csv_proto::cluster::MESSAGE_BYTES_MAX]);
    let error = nodes[0].peers.raft(NodeId(2), call.clone(), LONG).await.unwrap_err();
    assert!(matches!(&error, CallError::Refused(refusal) if refusal.text.contains("too large")), "{error}");
    call.payload = call.payload.slice(64..);
    let answer = nodes[0].peers.raft(NodeId(2), call.clone(), LONG).await.unwrap();
    assert_eq!(answer.len(), call.payload.len());
}

#[tokio::test]
async fn half_open_connections_of_one_machine_keep_no_other_out() {
    let nodes = cluster(&ca(), 2).await;
    let addr = nodes[1].server.addr();
    let mut open = Vec::new();
    for _ in 0..17 {
        open.push(tokio::net::TcpStream::connect(addr).await.unwrap());
    }
    until("one too many", || nodes[1].handler.refused.lock().iter().any(|why| why.contains("too many")))
        .await;
    // From another address of the loopback network.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let stream = socket.connect(addr).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(nodes[0].secrets.client());
    connector.connect(ServerName::try_from("n2").unwrap(), stream).await.unwrap();
    // And when they are gone, from the same.
    drop(open);
    nodes[0].peers.retry_now(NodeId(2));
    call_until_ok(&nodes[0].peers, NodeId(2), 1).await;
}
