//! The cluster's certificate authority and the nodes' certificates.
//!
//! A node makes its key itself and asks with a certificate request; the key never leaves it. Of the request only the
//! public key is used: what stands in the certificate is the issuer's word. A node's certificate says
//!
//! * common name and DNS name: the node's name, by which the volume servers know it,
//! * IP address: where it was when the certificate was issued (TLS to another address works by the name),
//! * URI `csv://<cluster id>/<node id>`: which node of which cluster it is.
//!
//! The authority's certificate has the URI `csv://<cluster id>`. Certificates hold for ten years, from one day before
//! they were made, so that clocks that differ by hours do no harm here.

use csv_types::NodeId;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use ring::rand::SecureRandom;
use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use uuid::Uuid;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

const DAY: Duration = Duration::from_secs(24 * 3600);
const VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Longest node name, in bytes.
const NAME_BYTES_MAX: usize = 63;
const SERIAL_BYTES: usize = 16;

/// What is wrong with a certificate, a key or a request for one.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Not readable as what it should be.
    #[error("{what} cannot be used: {reason}")]
    Unusable {
        /// Which of them.
        what: &'static str,
        /// In the parser's words.
        reason: String,
    },
    /// A node name that cannot stand in a certificate.
    #[error("\"{0}\" cannot be a node's name: 1 to 63 letters, digits, hyphens and dots, as in a DNS name")]
    Name(String),
    /// A certificate that names no node.
    #[error(
        "the certificate names no node of a cluster (no URI csv://<cluster id>/<node id>); it was made for something else"
    )]
    NotANode,
    /// No random numbers.
    #[error("the kernel gives no random numbers")]
    Random,
}

fn unusable(what: &'static str, reason: impl fmt::Display) -> PkiError {
    PkiError::Unusable { what, reason: reason.to_string() }
}

/// Who is at the other end of a connection, by its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its cluster.
    pub cluster_id: Uuid,
    /// Its id. A witness on a machine of its own has one above those of nodes.
    pub node_id: NodeId,
    /// Its name.
    pub name: String,
    /// SHA-256 of its certificate (DER), lower-case hex.
    pub cert_sha256: String,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.node_id)
    }
}

/// A cluster's certificate authority. Stands in the cluster database, so that every member can issue.
#[derive(Clone)]
pub struct ClusterCa {
    /// Its certificate.
    pub cert_pem: String,
    /// Its key: secret.
    pub key_pem: String,
    cluster_id: Uuid,
}

impl fmt::Debug for ClusterCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterCa").field("cluster_id", &self.cluster_id).finish_non_exhaustive()
    }
}

impl ClusterCa {
    /// Makes an authority for a new cluster.
    ///
    /// # Errors
    /// [`PkiError::Random`], or what the certificate library refuses.
    pub fn create(cluster_name: &str, cluster_id: Uuid) -> Result<ClusterCa, PkiError> {
        let what = "the cluster's authority";
        let key = KeyPair::generate().map_err(|error| unusable(what, error))?;
        let mut params = dated(what)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name.push(DnType::CommonName, format!("csv cluster {cluster_name}"));
        params.distinguished_name.push(DnType::OrganizationName, cluster_id.to_string());
        params.subject_alt_names.push(uri(&format!("csv://{cluster_id}"))?);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert_pem = params.self_signed(&key).map_err(|error| unusable(what, error))?.pem();
        Ok(ClusterCa { cert_pem, key_pem: key.serialize_pem(), cluster_id })
    }

    /// The authority from the cluster database.
    ///
    /// # Errors
    /// [`PkiError::Unusable`] when certificate and key are not such a pair.
    pub fn load(cert_pem: &str, key_pem: &str) -> Result<ClusterCa, PkiError> {
        let what = "the cluster's authority";
        let key = KeyPair::from_pem(key_pem).map_err(|error| unusable("the authority's key", error))?;
        let der = certificate(cert_pem, what)?;
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|error| unusable(what, error))?;
        if *parsed.public_key().subject_public_key.data != *key.public_key_raw() {
            return Err(unusable(what, "certificate and key do not belong together"));
        }
        let cluster_id = uris(&parsed)
            .find_map(|uri| Uuid::try_parse(uri.strip_prefix("csv://")?).ok())
            .ok_or_else(|| unusable(what, "it names no cluster"))?;
        Ok(ClusterCa { cert_pem: cert_pem.to_owned(), key_pem: key_pem.to_owned(), cluster_id })
    }

    /// The cluster that it is the authority of.
    #[must_use]
    pub fn cluster_id(&self) -> Uuid {
        self.cluster_id
    }

    /// Issues a node's certificate for the key in the request.
    ///
    /// # Errors
    /// [`PkiError::Name`], or [`PkiError::Unusable`] for a request that is damaged or not signed by its own key.
    pub fn issue(
        &self,
        node_name: &str,
        node_id: NodeId,
        addr: IpAddr,
        csr_pem: &str,
    ) -> Result<String, PkiError> {
        check_node_name(node_name)?;
        let request = CertificateSigningRequestParams::from_pem(csr_pem)
            .map_err(|error| unusable("the certificate request", error))?;
        let what = "the cluster's authority";
        let key = KeyPair::from_pem(&self.key_pem).map_err(|error| unusable(what, error))?;
        let issuer = Issuer::from_ca_cert_pem(&self.cert_pem, key).map_err(|error| unusable(what, error))?;
        let mut params = dated("the node's certificate")?;
        params.distinguished_name.push(DnType::CommonName, node_name);
        let name = Ia5String::try_from(node_name).map_err(|_| PkiError::Name(node_name.to_owned()))?;
        params.subject_alt_names = vec![
            SanType::DnsName(name),
            SanType::IpAddress(addr),
            uri(&format!("csv://{}/{}", self.cluster_id, node_id.0))?,
        ];
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let cert = params
            .signed_by(&request.public_key, &issuer)
            .map_err(|error| unusable("the node's certificate", error))?;
        Ok(cert.pem())
    }
}

/// A node's new key, and the request for a certificate for it.
#[derive(Clone)]
pub struct NodeIdentity {
    /// The key: secret, stays on the node.
    pub key_pem: String,
    /// What goes to the cluster.
    pub csr_pem: String,
}

impl fmt::Debug for NodeIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeIdentity").field("csr_pem", &self.csr_pem).finish_non_exhaustive()
    }
}

impl NodeIdentity {
    /// Makes a key (ECDSA P-256).
    ///
    /// # Errors
    /// What the certificate library refuses.
    pub fn create() -> Result<NodeIdentity, PkiError> {
        let what = "the node's key";
        let key = KeyPair::generate().map_err(|error| unusable(what, error))?;
        let request = CertificateParams::default()
            .serialize_request(&key)
            .and_then(|request| request.pem())
            .map_err(|error| unusable(what, error))?;
        Ok(NodeIdentity { key_pem: key.serialize_pem(), csr_pem: request })
    }
}

/// Is this a name that a node can have? It becomes a DNS name.
///
/// # Errors
/// [`PkiError::Name`].
pub fn check_node_name(name: &str) -> Result<(), PkiError> {
    let label = |label: &str| {
        label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // What looks like an address would be taken for one in TLS.
    let good = name.len() <= NAME_BYTES_MAX && name.split('.').all(label) && name.parse::<IpAddr>().is_err();
    if good { Ok(()) } else { Err(PkiError::Name(name.to_owned())) }
}

/// Which node a certificate (DER) is of. Says nothing about who signed it.
///
/// # Errors
/// [`PkiError::Unusable`], or [`PkiError::NotANode`].
pub fn peer_of(cert: &[u8]) -> Result<Peer, PkiError> {
    let (_, parsed) = X509Certificate::from_der(cert).map_err(|error| unusable("the certificate", error))?;
    let mut nodes = uris(&parsed).filter_map(|uri| {
        let (cluster, node) = uri.strip_prefix("csv://")?.split_once('/')?;
        Some((Uuid::try_parse(cluster).ok()?, node.parse::<u32>().ok().filter(|node| *node != 0)?))
    });
    let (Some((cluster_id, node)), None) = (nodes.next(), nodes.next()) else {
        return Err(PkiError::NotANode);
    };
    let names = parsed.subject_alternative_name().ok().flatten();
    let name = names.and_then(|names| {
        names.value.general_names.iter().find_map(|name| {
            if let GeneralName::DNSName(name) = name { Some((*name).to_owned()) } else { None }
        })
    });
    let name = name.ok_or(PkiError::NotANode)?;
    Ok(Peer { cluster_id, node_id: NodeId(node), name, cert_sha256: hex(&sha256(cert)) })
}

/// SHA-256 of the first certificate in a PEM text (of its DER form), lower-case hex: what the database keeps.
///
/// # Errors
/// [`PkiError::Unusable`].
pub fn sha256_hex(cert_pem: &str) -> Result<String, PkiError> {
    Ok(hex(&cert_sha256(cert_pem)?))
}

/// The same as bytes, as in a join token.
///
/// # Errors
/// [`PkiError::Unusable`].
pub fn cert_sha256(cert_pem: &str) -> Result<[u8; 32], PkiError> {
    Ok(sha256(&certificate(cert_pem, "the certificate")?))
}

/// The first certificate in a PEM text.
pub(crate) fn certificate(pem: &str, what: &'static str) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| unusable(what, error))
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut sum = [0; 32];
    sum.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    sum
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], PkiError> {
    let mut bytes = [0; N];
    ring::rand::SystemRandom::new().fill(&mut bytes).map_err(|_| PkiError::Random)?;
    Ok(bytes)
}

/// A certificate with a serial number and a validity.
fn dated(what: &'static str) -> Result<CertificateParams, PkiError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| unusable(what, error))?;
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.serial_number = Some(SerialNumber::from_slice(&random::<SERIAL_BYTES>()?));
    params.not_before = epoch + now.saturating_sub(DAY);
    params.not_after = epoch + now + VALIDITY;
    Ok(params)
}

fn uri(text: &str) -> Result<SanType, PkiError> {
    let text = Ia5String::try_from(text).map_err(|error| unusable("the cluster's id", error))?;
    Ok(SanType::URI(text))
}

fn uris<'a>(cert: &'a X509Certificate<'_>) -> impl Iterator<Item = &'a str> {
    let names = cert.subject_alternative_name().ok().flatten();
    names
        .into_iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
}
