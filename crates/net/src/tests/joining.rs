//! Joining: with good, wrong, mistyped and expired tokens, and where another cluster answers.

use super::rig::*;
use crate::*;
use csv_types::NodeId;
use std::net::SocketAddr;
use std::sync::Arc;

struct Invited {
    ca: ClusterCa,
    node: Node,
    token: Token,
}

async fn invited() -> Invited {
    let ca = ca();
    let node = Node::start(&ca, 1).await;
    let expires = now_unix_ms() + 3_600_000;
    let sum = pki::cert_sha256(&ca.cert_pem).unwrap();
    let token = Token::create(ca.cluster_id(), "lab", vec![node.server.addr()], sum, expires).unwrap();
    *node.handler.joins.lock() = Some(Admission {
        ca: ca.clone(),
        token_sha256: token.sha256(),
        expires_unix_ms: expires,
        wrong_cert: None,
    });
    Invited { ca, node, token }
}

fn request(identity: &NodeIdentity) -> JoinRequest {
    JoinRequest {
        name: "n9".into(),
        addr: "127.0.0.9".parse().unwrap(),
        csr_pem: identity.csr_pem.clone(),
        feature_level: 1,
        software_version: "0.1.0".into(),
        now_unix_ms: now_unix_ms(),
        rejoin: false,
    }
}

async fn try_join(token: &Token) -> Result<JoinGrant, JoinError> {
    let options = JoinOptions { connect_timeout: LONG, ..JoinOptions::default() };
    join(token, request(&NodeIdentity::create().unwrap()), &options).await
}

#[tokio::test]
async fn a_good_token_makes_a_node() {
    let Invited { ca, node, token } = invited().await;
    let token = Token::parse(&token.encode().unwrap()).unwrap();
    let identity = NodeIdentity::create().unwrap();
    let grant = join(&token, request(&identity), &JoinOptions::default()).await.unwrap();
    assert_eq!((grant.node, grant.cluster_id), (NodeId(9), ca.cluster_id()));
    // What it got is good for calls, and the secret did not get further than its hash.
    let secrets = Arc::new(Secrets::from_pem(&grant.ca_pem, &grant.cert_pem, &identity.key_pem).unwrap());
    let peers = Peers::new(secrets, patient());
    peers.set(&[(node.id, node.addr())].into());
    peers.raft(node.id, raft_call(9, "hello"), LONG).await.unwrap();
    assert_eq!(node.handler.joined.lock()[0].token_sha256, token.sha256());
}

#[tokio::test]
async fn a_wrong_token_is_refused() {
    let Invited { node, mut token, .. } = invited().await;
    token.secret = [1; 32];
    let error = try_join(&token).await.unwrap_err();
    assert!(matches!(&error, JoinError::Refused(refusal) if refusal.text.contains("not known")), "{error}");
    assert_eq!(node.handler.joined.lock().len(), 1);
}

#[tokio::test]
async fn an_expired_token_is_refused_here_and_there() {
    let Invited { node, mut token, .. } = invited().await;
    let expires = now_unix_ms() - 7_200_000;
    node.handler.joins.lock().as_mut().unwrap().expires_unix_ms = expires;
    let error = try_join(&token).await.unwrap_err();
    assert!(matches!(&error, JoinError::Refused(refusal) if refusal.text.contains("expired")), "{error}");
    token.expires_unix_ms = expires;
    let error = try_join(&token).await.unwrap_err();
    assert!(matches!(error, JoinError::Token(TokenError::Expired { .. })), "{error}");
    assert_eq!(node.handler.joined.lock().len(), 1, "nobody was asked the second time");
}

#[tokio::test]
async fn a_clock_that_is_hours_off_is_told() {
    let Invited { node: _node, token, .. } = invited().await;
    let mut request = request(&NodeIdentity::create().unwrap());
    request.now_unix_ms -= 3 * 3_600_000;
    let error = join(&token, request, &JoinOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("clock is 3 hours behind"), "{error}");
}

#[tokio::test]
async fn another_cluster_gets_no_secret() {
    let Invited { node, mut token, .. } = invited().await;
    token.ca_sha256 = [0; 32];
    let error = try_join(&token).await.unwrap_err();
    assert!(matches!(&error, JoinError::OtherCluster(_)), "{error}");
    assert!(error.to_string().contains("authority is not the token's"), "{error}");
    assert!(node.handler.joined.lock().is_empty());
}

#[tokio::test]
async fn an_authority_that_did_not_sign_is_no_proof() {
    // A server that shows the true authority beside a certificate of its own.
    let Invited { ca, token, .. } = invited().await;
    let forger = ClusterCa::create("lab", ca.cluster_id()).unwrap();
    let identity = NodeIdentity::create().unwrap();
    let cert = forger.issue("n1", NodeId(1), "127.0.0.1".parse().unwrap(), &identity.csr_pem).unwrap();
    let addr = forged_server(&cert, &ca.cert_pem, &identity.key_pem).await;
    let token = Token { addrs: vec![addr], ..token };
    let error = try_join(&token).await.unwrap_err();
    assert!(error.to_string().contains("authority"), "{error}");
}

async fn forged_server(cert: &str, ca: &str, key: &str) -> SocketAddr {
    use tokio_rustls::rustls::pki_types::PrivateKeyDer;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::{ServerConfig, crypto};
    let chain = vec![pki::certificate(cert, "it").unwrap(), pki::certificate(ca, "it").unwrap()];
    let config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap())
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind(any()).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        assert!(acceptor.accept(stream).await.is_err(), "the joiner must not go on");
    });
    addr
}

#[tokio::test]
async fn the_next_member_is_asked() {
    let Invited { node, mut token, .. } = invited().await;
    // Nobody listens there; then one that cannot; then one that can.
    let gone = tokio::net::TcpListener::bind(any()).await.unwrap().local_addr().unwrap();
    let ca = node.handler.joins.lock().as_ref().unwrap().ca.clone();
    let busy = Node::start(&ca, 2).await;
    token.addrs = vec![gone, busy.server.addr(), node.server.addr()];
    try_join(&token).await.unwrap();
    assert_eq!(busy.handler.joined.lock().len(), 1);
    token.addrs.pop();
    let error = try_join(&token).await.unwrap_err();
    assert!(matches!(&error, JoinError::NoAnswer(tried) if tried.len() == 2), "{error}");
    assert!(error.to_string().contains("no quorum"), "{error}");
}

#[tokio::test]
async fn no_answer_to_the_secret_is_an_unknown_outcome() {
    let Invited { node, mut token, .. } = invited().await;
    token.addrs.push(token.addrs[0]);
    let handler = Arc::clone(&node.handler);
    let gate = handler.gate.write().await;
    let answer_timeout = std::time::Duration::from_millis(200);
    let options = JoinOptions { connect_timeout: LONG, answer_timeout };
    let request = request(&NodeIdentity::create().unwrap());
    let error = join(&token, request, &options).await.unwrap_err();
    assert!(matches!(error, JoinError::Unknown(..)), "{error}");
    drop(gate);
    until("the join is carried out all the same", || !handler.joined.lock().is_empty()).await;
    assert_eq!(handler.joined.lock().len(), 1, "nobody else was asked");
}

#[tokio::test]
async fn a_certificate_for_another_key_is_refused() {
    let Invited { ca, node, token } = invited().await;
    let other = NodeIdentity::create().unwrap();
    let wrong = ca.issue("n9", NodeId(9), "127.0.0.9".parse().unwrap(), &other.csr_pem).unwrap();
    node.handler.joins.lock().as_mut().unwrap().wrong_cert = Some(wrong);
    let error = try_join(&token).await.unwrap_err();
    assert!(matches!(&error, JoinError::Answer(why) if why.contains("another key")), "{error}");
    let wrong = ca.issue("n8", NodeId(8), "127.0.0.9".parse().unwrap(), &other.csr_pem).unwrap();
    node.handler.joins.lock().as_mut().unwrap().wrong_cert = Some(wrong);
    let error = try_join(&token).await.unwrap_err();
    assert!(matches!(&error, JoinError::Answer(why) if why.contains("n8")), "{error}");
}
