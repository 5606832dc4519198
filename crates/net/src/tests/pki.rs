//! Certificates: what stands in them, and which are refused.

use super::rig::*;
use crate::*;
use csv_types::NodeId;
use std::net::IpAddr;
use uuid::Uuid;

fn localhost() -> IpAddr {
    "10.77.0.4".parse().unwrap()
}

#[test]
fn a_certificate_says_which_node_it_is() {
    let id = Uuid::new_v4();
    let ca = ClusterCa::create("lab", id).unwrap();
    let identity = NodeIdentity::create().unwrap();
    let cert = ca.issue("n4", NodeId(4), localhost(), &identity.csr_pem).unwrap();
    let der = crate::pki::certificate(&cert, "it").unwrap();
    let peer = peer_of(&der).unwrap();
    assert_eq!((peer.cluster_id, peer.node_id, peer.name.as_str()), (id, NodeId(4), "n4"));
    assert_eq!(peer.cert_sha256, sha256_hex(&cert).unwrap());
    let secrets = Secrets::from_pem(&ca.cert_pem, &cert, &identity.key_pem).unwrap();
    assert_eq!(secrets.me(), peer);
    let authority = crate::pki::certificate(&ca.cert_pem, "it").unwrap();
    assert!(matches!(peer_of(&authority), Err(PkiError::NotANode)));
}

#[test]
fn an_authority_from_the_database_issues_too() {
    let ca = ca();
    let loaded = ClusterCa::load(&ca.cert_pem, &ca.key_pem).unwrap();
    assert_eq!(loaded.cluster_id(), ca.cluster_id());
    secrets_of(&loaded, 3);
    let other = super::rig::ca();
    let error = ClusterCa::load(&ca.cert_pem, &other.key_pem).unwrap_err();
    assert!(error.to_string().contains("belong together"), "{error}");
    let node = NodeIdentity::create().unwrap();
    let cert = ca.issue("n1", NodeId(1), localhost(), &node.csr_pem).unwrap();
    ClusterCa::load(&cert, &node.key_pem).unwrap_err();
    let shown = format!("{ca:?} {node:?}");
    assert!(!shown.contains("PRIVATE"), "{shown}");
}

#[test]
fn names_that_are_none_are_refused() {
    let (ca, node) = (ca(), NodeIdentity::create().unwrap());
    let long = "n".repeat(64);
    for name in ["", "a b", "-n1", "n1-", "n1.", "n/1", "ä", "10.0.0.1", long.as_str()] {
        let error = ca.issue(name, NodeId(1), localhost(), &node.csr_pem).unwrap_err();
        assert!(matches!(error, PkiError::Name(_)), "{name}: {error}");
    }
    for name in ["n1", "Node-7", "node1.example.org", "7"] {
        ca.issue(name, NodeId(1), localhost(), &node.csr_pem).unwrap();
    }
}

#[test]
fn a_request_that_was_tampered_with_is_refused() {
    let (ca, node) = (ca(), NodeIdentity::create().unwrap());
    ca.issue("n1", NodeId(1), localhost(), "nonsense").unwrap_err();
    let lines: Vec<&str> = node.csr_pem.lines().collect();
    // A character in the midst of the signature, which is the last thing in it.
    let line = lines[lines.len() - 2];
    let at = line.len() / 2;
    let other = if line.as_bytes()[at] == b'A' { 'B' } else { 'A' };
    let spoilt = format!("{}{other}{}", &line[..at], &line[at + 1..]);
    let csr = node.csr_pem.replace(line, &spoilt);
    let error = ca.issue("n1", NodeId(1), localhost(), &csr).unwrap_err();
    assert!(matches!(error, PkiError::Unusable { .. }), "{error}");
}

#[test]
fn secrets_that_do_not_belong_together_are_refused() {
    let (ca, other) = (ca(), ca());
    let (node, thief) = (NodeIdentity::create().unwrap(), NodeIdentity::create().unwrap());
    let cert = ca.issue("n1", NodeId(1), localhost(), &node.csr_pem).unwrap();
    let error = Secrets::from_pem(&ca.cert_pem, &cert, &thief.key_pem).unwrap_err();
    assert!(matches!(error, SecretsError::Unusable(_)), "{error}");
    let error = Secrets::from_pem(&other.cert_pem, &cert, &node.key_pem).unwrap_err();
    assert!(error.to_string().contains("another cluster"), "{error}");
}

#[test]
fn secrets_are_reloaded_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let error = Secrets::load(dir.path()).unwrap_err();
    assert!(error.to_string().contains("ca.pem"), "{error}");
    let (ca, node) = (ca(), NodeIdentity::create().unwrap());
    let cert = |name: &str, id| ca.issue(name, NodeId(id), localhost(), &node.csr_pem).unwrap();
    write_secrets(dir.path(), &ca.cert_pem, &cert("n1", 1), &node.key_pem, "pw").unwrap();
    let secrets = Secrets::load(dir.path()).unwrap();
    assert_eq!(secrets.me().node_id, NodeId(1));
    std::fs::write(dir.path().join("node.pem"), "damaged").unwrap();
    secrets.reload().unwrap_err();
    assert_eq!(secrets.me().node_id, NodeId(1));
    write_secrets(dir.path(), &ca.cert_pem, &cert("n2", 2), &node.key_pem, "pw").unwrap();
    secrets.reload().unwrap();
    assert_eq!(secrets.me().node_id, NodeId(2));
}

#[test]
fn a_clock_before_the_certificate_or_after_it_is_told() {
    use tokio_rustls::rustls::pki_types::UnixTime;
    let (ca, node) = (ca(), NodeIdentity::create().unwrap());
    let cert = ca.issue("n1", NodeId(1), localhost(), &node.csr_pem).unwrap();
    let (ca, cert) = (pki::certificate(&ca.cert_pem, "ca").unwrap(), pki::certificate(&cert, "it").unwrap());
    let hour = std::time::Duration::from_secs(3600);
    let now = std::time::Duration::from_millis(now_unix_ms());
    let at = |at| crate::secrets::signed_by_at(&cert, &ca, UnixTime::since_unix_epoch(at));
    at(now - 23 * hour).unwrap();
    at(now + 9 * 365 * 24 * hour).unwrap();
    for time in [now - 25 * hour, now + 11 * 365 * 24 * hour] {
        let text = crate::error::explain(&at(time).unwrap_err());
        assert!(text.contains("clock"), "{text}");
    }
}

/// The volume servers and their clients (coordinator, csvfs) use the same certificates: they know a node by the DNS name
/// alone, want a certificate from both sides, and show no authority.
#[tokio::test]
async fn volume_servers_work_with_these_certificates() {
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{PrivateKeyDer, ServerName};
    use tokio_rustls::rustls::server::WebPkiClientVerifier;
    use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
    let ca = ca();
    let mut roots = RootCertStore::empty();
    roots.add(pki::certificate(&ca.cert_pem, "ca").unwrap()).unwrap();
    let roots = std::sync::Arc::new(roots);
    let provider = std::sync::Arc::new(crate::secrets::provider());
    let node = |name: &str, id| {
        let identity = NodeIdentity::create().unwrap();
        let cert = ca.issue(name, NodeId(id), localhost(), &identity.csr_pem).unwrap();
        let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap();
        (vec![pki::certificate(&cert, "it").unwrap()], key)
    };
    let (cert, key) = node("n1", 1);
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build().unwrap();
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(cert, key)
        .unwrap();
    let (cert, key) = node("Node-2.example", 2);
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(cert, key)
        .unwrap();
    let (here, there) = tokio::io::duplex(64 << 10);
    let name = ServerName::try_from("n1").unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(client));
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(server));
    let (connected, accepted) = tokio::join!(connector.connect(name, here), acceptor.accept(there));
    connected.unwrap();
    let accepted = accepted.unwrap();
    let cert = &accepted.get_ref().1.peer_certificates().unwrap()[0];
    assert_eq!(peer_of(cert).unwrap().name, "Node-2.example");
}
