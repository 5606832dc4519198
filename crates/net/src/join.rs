//! The joiner's side of joining.
//!
//! The token names the members to ask and the hash of the cluster's authority. The joiner takes only a server that shows
//! an authority with that hash in its chain and a certificate signed by it; only then does the secret leave this
//! machine. The members are asked in the token's order, until one answers. Once the secret was sent and no answer
//! came, nobody else is asked: the node may have been added.

use crate::error::{CallError, explain, with_sources};
use crate::pki::{Peer, cert_sha256, certificate, check_node_name, peer_of, sha256};
use crate::secrets::{provider, signed_by, signed_by_at};
use crate::socket;
use crate::token::{Token, TokenError, for_people};
use csv_proto::cluster::{
    JoinGrant, JoinRequest, Refusal, RefusalKind, join_answer_from_wire, wire::JoinAnswer,
};
use parking_lot::Mutex;
use rcgen::{CertificateSigningRequestParams, PublicKeyData};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error as TlsError, PeerIncompatible, SignatureScheme,
};
use uuid::Uuid;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Time limits of joining.
#[derive(Debug, Clone)]
pub struct JoinOptions {
    /// For TCP and TLS together, per member.
    pub connect_timeout: Duration,
    /// For the answer: the cluster has to agree on the new node.
    pub answer_timeout: Duration,
}

impl Default for JoinOptions {
    fn default() -> Self {
        JoinOptions { connect_timeout: Duration::from_secs(3), answer_timeout: Duration::from_secs(30) }
    }
}

/// Why a machine did not become a node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The token itself.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// What the node says of itself.
    #[error("{0}")]
    Request(String),
    /// No member could be asked. Nothing happened.
    #[error("no member of the cluster could be asked: {}", attempts(.0))]
    NoAnswer(Vec<(SocketAddr, String)>),
    /// What answers is not the token's cluster. Nothing happened.
    #[error("what answers is not the cluster of this token: {}", attempts(.0))]
    OtherCluster(Vec<(SocketAddr, String)>),
    /// The cluster refused.
    #[error("the cluster refused: {0}")]
    Refused(Refusal),
    /// It may have happened.
    #[error(
        "{0} was asked, and it is not known whether it added this node: {1}; look with csvctl cluster status on a \
         member, and evict the node there before it tries again"
    )]
    Unknown(SocketAddr, String),
    /// The cluster added this node, but what it gave cannot be used.
    #[error("the cluster's answer cannot be used: {0}; evict the node on a member before it tries again")]
    Answer(String),
}

fn attempts(attempts: &[(SocketAddr, String)]) -> String {
    let texts = attempts.iter().map(|(addr, why)| {
        if why.contains(&addr.to_string()) { why.clone() } else { format!("{addr}: {why}") }
    });
    texts.collect::<Vec<_>>().join("; ")
}

/// Asks the token's cluster to make this machine a node, and checks what it gives.
///
/// # Errors
/// See [`JoinError`].
pub async fn join(
    token: &Token,
    request: JoinRequest,
    options: &JoinOptions,
) -> Result<JoinGrant, JoinError> {
    token.check_expiry(request.now_unix_ms)?;
    check_node_name(&request.name).map_err(|error| JoinError::Request(error.to_string()))?;
    let mut failed = Vec::new();
    let mut other_cluster = false;
    for addr in &token.addrs {
        match ask(token, *addr, &request, options).await {
            Ok(grant) => {
                check(token, &request, &grant).map_err(JoinError::Answer)?;
                return Ok(grant);
            }
            Err(Asked::Final(error)) => return Err(error),
            Err(Asked::Elsewhere(why)) => failed.push((*addr, why)),
            Err(Asked::OtherCluster(why)) => {
                other_cluster = true;
                failed.push((*addr, why));
            }
        }
    }
    Err(if other_cluster { JoinError::OtherCluster(failed) } else { JoinError::NoAnswer(failed) })
}

/// How far two clocks may differ is the cluster's setting; the member that is asked compares.
///
/// # Errors
/// In plain words, when they differ by more than `max_ms`.
pub fn check_clocks(theirs_unix_ms: u64, ours_unix_ms: u64, max_ms: u64) -> Result<(), String> {
    let apart = theirs_unix_ms.abs_diff(ours_unix_ms);
    if apart <= max_ms {
        return Ok(());
    }
    let side = if theirs_unix_ms > ours_unix_ms { "ahead of" } else { "behind" };
    Err(format!(
        "the joining node's clock is {} {side} this member's; set it (NTP), then join again",
        for_people(apart)
    ))
}

enum Asked {
    /// Nothing happened here; the next member may do.
    Elsewhere(String),
    OtherCluster(String),
    Final(JoinError),
}

async fn ask(
    token: &Token,
    addr: SocketAddr,
    request: &JoinRequest,
    options: &JoinOptions,
) -> Result<JoinGrant, Asked> {
    let verifier = Arc::new(TokenVerifier::new(token));
    let tls = client_config(Arc::clone(&verifier)).map_err(|error| Asked::Elsewhere(error.to_string()))?;
    let name = ServerName::IpAddress(addr.ip().into());
    let (conn, _certs) = match socket::open(addr, name, Arc::new(tls), options.connect_timeout).await {
        Ok(opened) => opened,
        Err(why) => {
            let other = verifier.other_cluster.lock().take();
            return Err(other.map_or(Asked::Elsewhere(why), Asked::OtherCluster));
        }
    };
    let call = request.clone().into_wire(&token.secret);
    let mut stub = conn.stub();
    let answer = tokio::time::timeout(options.answer_timeout, stub.join(call)).await;
    let answer = match answer {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => {
            let error = CallError::from_status(&status);
            return Err(Asked::Final(if error.may_have_happened() {
                JoinError::Unknown(addr, with_sources(&status))
            } else {
                JoinError::Refused(Refusal::new(RefusalKind::Failed, error.to_string()))
            }));
        }
        Err(_) => return Err(Asked::Final(JoinError::Unknown(addr, CallError::TimedOut.to_string()))),
    };
    answered(addr, answer)
}

fn answered(addr: SocketAddr, answer: JoinAnswer) -> Result<JoinGrant, Asked> {
    let answer = join_answer_from_wire(answer);
    match answer.map_err(|malformed| Asked::Final(JoinError::Answer(malformed.to_string())))? {
        Ok(grant) => Ok(grant),
        Err(refusal) => Err(match refusal.kind {
            RefusalKind::Busy | RefusalKind::NotHere | RefusalKind::Stopped => Asked::Elsewhere(refusal.text),
            RefusalKind::UnknownOutcome => Asked::Final(JoinError::Unknown(addr, refusal.text)),
            RefusalKind::Failed | RefusalKind::NotAllowed => Asked::Final(JoinError::Refused(refusal)),
        }),
    }
}

/// Is the grant of the token's cluster, and the certificate for this node's key?
fn check(token: &Token, request: &JoinRequest, grant: &JoinGrant) -> Result<(), String> {
    let words = |error: crate::PkiError| error.to_string();
    if cert_sha256(&grant.ca_pem).map_err(words)? != token.ca_sha256 {
        return Err("its authority is not the one of the token".to_owned());
    }
    let ca = certificate(&grant.ca_pem, "the cluster's authority").map_err(words)?;
    let cert = certificate(&grant.cert_pem, "the node's certificate").map_err(words)?;
    signed_by(&cert, &ca).map_err(|error| explain(&error))?;
    let Peer { cluster_id, node_id, name, .. } = peer_of(&cert).map_err(words)?;
    if (cluster_id, node_id, &name) != (token.cluster_id, grant.node, &request.name) {
        return Err(format!("the certificate is for {name} ({node_id}) of cluster {cluster_id}"));
    }
    let csr =
        CertificateSigningRequestParams::from_pem(&request.csr_pem).map_err(|error| error.to_string())?;
    let (_, parsed) = X509Certificate::from_der(&cert).map_err(|error| error.to_string())?;
    if *parsed.public_key().subject_public_key.data != *csr.public_key.der_bytes() {
        return Err("the certificate is for another key".to_owned());
    }
    Ok(())
}

fn client_config(verifier: Arc<TokenVerifier>) -> Result<ClientConfig, TlsError> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Takes any node of the token's cluster, whatever its name or address: the authority with the token's hash must be in
/// the chain and have signed its certificate.
struct TokenVerifier {
    ca_sha256: [u8; 32],
    cluster_id: Uuid,
    provider: CryptoProvider,
    /// Why the server is not of the token's cluster.
    other_cluster: Mutex<Option<String>>,
}

impl fmt::Debug for TokenVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenVerifier").field("cluster_id", &self.cluster_id).finish_non_exhaustive()
    }
}

impl TokenVerifier {
    fn new(token: &Token) -> TokenVerifier {
        TokenVerifier {
            ca_sha256: token.ca_sha256,
            cluster_id: token.cluster_id,
            provider: provider(),
            other_cluster: Mutex::new(None),
        }
    }

    fn other(&self, why: String) -> TlsError {
        *self.other_cluster.lock() = Some(why.clone());
        TlsError::General(why)
    }
}

impl ServerCertVerifier for TokenVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let Some(ca) = intermediates.iter().find(|ca| sha256(ca) == self.ca_sha256) else {
            let who = peer_of(end_entity).map_or_else(
                |_| "no node of a cluster".to_owned(),
                |peer| format!("{peer} of cluster {}", peer.cluster_id),
            );
            return Err(self.other(format!("there is {who}, whose authority is not the token's")));
        };
        signed_by_at(end_entity, ca, now)?;
        let peer = peer_of(end_entity).map_err(|error| self.other(error.to_string()))?;
        if peer.cluster_id != self.cluster_id {
            return Err(self.other(format!("{peer} is of cluster {}", peer.cluster_id)));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
