//! A node's certificate, its key and the cluster's authority, checked and made into TLS settings.
//!
//! [`Secrets::reload`] replaces them as a whole or not at all; connections that exist go on with the old ones. Only
//! TLS 1.3 is spoken, every handshake shows and verifies certificates anew (no resumption), and the authority
//! stands in the chain that a server shows, so that a joiner can compare it with its token.

use crate::error::explain;
use crate::files::{CA_FILE, CERT_FILE, KEY_FILE};
use crate::pki::{Peer, PkiError, certificate, peer_of};
use parking_lot::RwLock;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio_rustls::rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, Error as TlsError, RootCertStore, ServerConfig};

/// Why a node's secrets cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    /// A file cannot be read.
    #[error("{file}: {reason}; let the node join the cluster again")]
    File {
        /// Which.
        file: String,
        /// Why.
        reason: String,
    },
    /// Not a certificate, or none of a node.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// They do not belong together, or do not hold now.
    #[error("this node's secrets cannot be used: {0}")]
    Unusable(String),
}

/// A node's secrets; see the module's text.
pub struct Secrets {
    dir: Option<PathBuf>,
    current: RwLock<Arc<Loaded>>,
}

struct Loaded {
    me: Peer,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secrets").field("dir", &self.dir).field("me", &self.me()).finish_non_exhaustive()
    }
}

impl Secrets {
    /// Reads them from the files that [`crate::write_secrets`] writes.
    ///
    /// # Errors
    /// See [`SecretsError`].
    pub fn load(dir: &Path) -> Result<Secrets, SecretsError> {
        let loaded = read(dir)?;
        Ok(Secrets { dir: Some(dir.to_owned()), current: RwLock::new(Arc::new(loaded)) })
    }

    /// Takes them as PEM texts. [`Secrets::reload`] then has nothing to read.
    ///
    /// # Errors
    /// See [`SecretsError`].
    pub fn from_pem(ca_pem: &str, cert_pem: &str, key_pem: &str) -> Result<Secrets, SecretsError> {
        let loaded = Loaded::new(ca_pem, cert_pem, key_pem)?;
        Ok(Secrets { dir: None, current: RwLock::new(Arc::new(loaded)) })
    }

    /// Reads the files again, for connections made from now on.
    ///
    /// # Errors
    /// See [`SecretsError`]; the old ones stay in use then.
    pub fn reload(&self) -> Result<(), SecretsError> {
        if let Some(dir) = &self.dir {
            let loaded = Arc::new(read(dir)?);
            *self.current.write() = loaded;
        }
        Ok(())
    }

    /// The node that these secrets are of.
    #[must_use]
    pub fn me(&self) -> Peer {
        self.current.read().me.clone()
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.current.read().client)
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().server)
    }
}

fn read(dir: &Path) -> Result<Loaded, SecretsError> {
    let text = |name: &str| {
        let path = dir.join(name);
        std::fs::read_to_string(&path).map_err(|error| SecretsError::File {
            file: path.display().to_string(),
            reason: error.to_string(),
        })
    };
    Loaded::new(&text(CA_FILE)?, &text(CERT_FILE)?, &text(KEY_FILE)?)
}

impl Loaded {
    fn new(ca_pem: &str, cert_pem: &str, key_pem: &str) -> Result<Loaded, SecretsError> {
        let ca = certificate(ca_pem, "the cluster's authority")?;
        let cert = certificate(cert_pem, "the node's certificate")?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|error| SecretsError::Unusable(format!("its key: {error}")))?;
        let me = peer_of(&cert)?;
        signed_by(&cert, &ca).map_err(|error| unusable(&error))?;
        let roots = Arc::new(roots(&ca).map_err(|error| unusable(&error))?);
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::new(provider()))
            .allow_unauthenticated()
            .build()
            .map_err(|error| SecretsError::Unusable(error.to_string()))?;
        let mut server = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![cert.clone(), ca], key.clone_key())
            .map_err(|error| unusable(&error))?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![cert], key)
            .map_err(|error| unusable(&error))?;
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.resumption = Resumption::disabled();
        Ok(Loaded { me, client: Arc::new(client), server: Arc::new(server) })
    }
}

fn unusable(error: &TlsError) -> SecretsError {
    SecretsError::Unusable(explain(error))
}

pub(crate) fn provider() -> CryptoProvider {
    ring::default_provider()
}

fn roots(ca: &CertificateDer<'_>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone().into_owned())?;
    Ok(roots)
}

/// Was `cert` signed by `ca`, and does it hold now?
///
/// # Errors
/// What is wrong with it.
pub(crate) fn signed_by(cert: &CertificateDer<'_>, ca: &CertificateDer<'_>) -> Result<(), TlsError> {
    signed_by_at(cert, ca, UnixTime::now())
}

pub(crate) fn signed_by_at(
    cert: &CertificateDer<'_>,
    ca: &CertificateDer<'_>,
    now: UnixTime,
) -> Result<(), TlsError> {
    verify_server_cert_signed_by_trust_anchor(
        &ParsedCertificate::try_from(cert)?,
        &roots(ca)?,
        &[],
        now,
        provider().signature_verification_algorithms.all,
    )
}
