//! Accepting connections: TCP, then a TLS handshake with a certificate from both sides. Handshakes run beside each
//! other, bounded in number and time, so that a silent peer keeps nobody else out. A failed one is an event.

use super::{Place, ServeError};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
const HANDSHAKES_MAX: usize = 64;
/// After an accept that failed (no descriptors left), before the next one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// PEM files of a node.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The cluster's certificate authority.
    pub ca: PathBuf,
    /// The node's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Connections whose peer has a certificate of the cluster.
pub(super) fn accept(
    place: Place,
    listener: TcpListener,
    files: &TlsFiles,
) -> Result<ReceiverStream<std::io::Result<TlsStream<TcpStream>>>, ServeError> {
    let acceptor = TlsAcceptor::from(Arc::new(server_config(files)?));
    listener.set_nonblocking(true).map_err(ServeError::Socket)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(ServeError::Socket)?;
    let (connections, incoming) = mpsc::channel(HANDSHAKES_MAX);
    tokio::spawn(async move {
        let permits = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = connections.closed() => return,
            };
            let (stream, addr) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accepting a control connection failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (acceptor, connections) = (acceptor.clone(), connections.clone());
            let place = place.clone();
            tokio::spawn(async move {
                let _permit = permit;
                match handshake(&acceptor, stream).await {
                    // The server may be ending.
                    Ok(stream) => drop(connections.send(Ok(stream)).await),
                    Err(error) => place.event(
                        "peer-refused",
                        format!("the TLS handshake of {addr} failed: {error}; it was refused"),
                    ),
                }
            });
        }
    });
    Ok(ReceiverStream::new(incoming))
}

async fn handshake(acceptor: &TlsAcceptor, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
    stream.set_nodelay(true)?;
    match tokio::time::timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await {
        Ok(accepted) => accepted,
        Err(_) => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "it took too long")),
    }
}

/// The DNS names in a certificate.
pub(super) fn dns_names(cert: &[u8]) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(cert) else { return Vec::new() };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return Vec::new() };
    let dns = |name: &GeneralName<'_>| {
        if let GeneralName::DNSName(name) = name { Some((*name).to_owned()) } else { None }
    };
    names.value.general_names.iter().filter_map(dns).collect()
}

fn server_config(files: &TlsFiles) -> Result<ServerConfig, ServeError> {
    let mut roots = RootCertStore::empty();
    for cert in certificates(&files.ca)? {
        roots.add(cert).map_err(|error| secrets(&files.ca, &error))?;
    }
    let provider = Arc::new(crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| secrets(&files.ca, &error))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| secrets(&files.key, &error))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| secrets(&files.cert, &error))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(&files.cert)?, key)
        .map_err(|error| secrets(&files.cert, &error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, ServeError> {
    let certs = CertificateDer::pem_file_iter(file).map_err(|error| secrets(file, &error))?;
    let certs: Vec<_> = certs.collect::<Result<_, _>>().map_err(|error| secrets(file, &error))?;
    if certs.is_empty() {
        return Err(secrets(file, &"it holds no certificate"));
    }
    Ok(certs)
}

fn secrets(file: &Path, reason: &impl std::fmt::Display) -> ServeError {
    ServeError::Secrets { file: file.display().to_string(), reason: reason.to_string() }
}
