//! The server: takes connections of the other nodes, finds out who calls, and hands each call to the [`Handler`].
//!
//! A caller is asked for a certificate. One of another authority does not get past the handshake; one that names no
//! node of this cluster is turned away after it; a caller without one can call Join and nothing else, on a connection
//! that is short, slow and small. [`Handler::allowed`] is asked for each call and each beat, so that an evicted node
//! is shut out at once, whatever connections it has.
//!
//! When [`ServerHandle`] is stopped or dropped, all connections end, and so do the calls on them, except that a join, a
//! proposal or an administrator's request that was begun runs to its end (its caller cannot know how far it got).

mod service;

use crate::error::{explain_tls, with_sources};
use crate::pki::{Peer, peer_of};
use crate::secrets::Secrets;
use crate::socket::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES, tune};
use bytes::Bytes;
use csv_proto::cluster::wire::cluster_server::ClusterServer;
use csv_proto::cluster::{
    Beat, JOIN_BYTES_MAX, JoinGrant, JoinRequest, MESSAGE_BYTES_MAX, ProposeRefusal, Proposed, RaftCall,
    Refusal, RefusalKind, VoterId,
};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use service::Service;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::codegen::Service as _;

/// Connections at once: 64 nodes, the witness, and those that a node left half open when it was cut off.
const CONNECTIONS_MAX: usize = 256;
/// Of these, from one address and without having shown a certificate (yet): one machine cannot take all of them.
const UNPROVEN_PER_ADDR_MAX: usize = 16;
/// Of these, on which it is certain that there is none.
const STRANGERS_MAX: usize = 16;
/// A connection without a certificate ends after this time.
const STRANGER_MAX: Duration = Duration::from_secs(60);
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Calls at once on a node's connection.
const STREAMS_MAX: u32 = 128;
/// Calls at once on a connection without a certificate.
const STRANGER_STREAMS_MAX: u32 = 2;
/// After an accept that failed (no descriptors left), before the next one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who wants to join, and with which token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joining {
    /// What it says of itself.
    pub request: JoinRequest,
    /// SHA-256 of the secret that it showed, lower-case hex.
    pub token_sha256: String,
    /// Where it calls from.
    pub from: SocketAddr,
}

/// What serves the calls. A witness node needs [`Handler::allowed`] and [`Handler::raft`] only: what is not
/// implemented is refused.
#[tonic::async_trait]
pub trait Handler: Send + Sync + 'static {
    /// May this node (its certificate is of this cluster) call at all? Asked for each call and beat; must not block.
    /// A node that is not known here may have been added a moment ago: what is to be refused is one that was evicted
    /// (ids are never used twice), or whose certificate is not the one that was issued last.
    fn allowed(&self, peer: &Peer) -> bool;

    /// May this node speak for that Raft voter? Besides itself, for the witness that runs on it.
    fn speaks_for(&self, peer: &Peer, voter: VoterId) -> bool {
        voter == VoterId::from(peer.node_id.0)
    }

    /// A call of Raft. Dropped when the caller gives up.
    async fn raft(&self, peer: Peer, call: RaftCall) -> Result<Bytes, Refusal>;

    /// A heartbeat; must not block.
    fn beat(&self, peer: &Peer, beat: Beat) {
        let _unwanted = (peer, beat);
    }

    /// A command for the database. It says who gives it: check that against `peer`.
    async fn propose(&self, peer: Peer, envelope: Bytes) -> Proposed {
        let _unwanted = (peer, envelope);
        Err(ProposeRefusal::Refused(not_here("no database")))
    }

    /// A request of csvctl that another node's csvd passes on.
    async fn admin(&self, peer: Peer, request_json: Bytes) -> Result<Bytes, Refusal> {
        let _unwanted = (peer, request_json);
        Err(not_here("no administration"))
    }

    /// A machine that wants to become a node. It has proved nothing but that it knows the token's secret.
    async fn join(&self, joining: Joining) -> Result<JoinGrant, Refusal> {
        let _unwanted = joining;
        Err(not_here("no joining"))
    }

    /// Somebody was turned away; for the event log. Can come as often as somebody likes to call: bound it.
    fn refused(&self, from: SocketAddr, why: &str) {
        tracing::warn!(%from, why, "a caller was refused");
    }
}

fn not_here(what: &str) -> Refusal {
    Refusal::new(RefusalKind::NotHere, format!("there is {what} on this node; ask a full member"))
}

/// What a server needs.
pub struct ServerOptions {
    /// Where to listen; port 0: any.
    pub addr: SocketAddr,
    /// Whose server it is.
    pub secrets: Arc<Secrets>,
    /// What serves the calls.
    pub handler: Arc<dyn Handler>,
}

impl fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerOptions").field("addr", &self.addr).finish_non_exhaustive()
    }
}

/// Why the server does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listening socket.
    #[error(
        "the cluster service cannot listen on {addr}: {reason}; is another csvd running, or the address not this node's?"
    )]
    Listen {
        /// Where.
        addr: SocketAddr,
        /// Why not.
        reason: std::io::Error,
    },
}

/// A running server; ends when dropped.
#[derive(Debug)]
pub struct ServerHandle {
    addr: SocketAddr,
    task: JoinHandle<()>,
}

impl ServerHandle {
    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Ends it; when this returns, the port is free.
    pub async fn stop(mut self) {
        self.task.abort();
        // Cancelled, which is what was asked for.
        let _ended = (&mut self.task).await;
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Shared {
    secrets: Arc<Secrets>,
    handler: Arc<dyn Handler>,
    strangers: Arc<Semaphore>,
    unproven: Arc<Unproven>,
}

/// Connections that have shown no certificate (yet), by address.
#[derive(Default)]
struct Unproven(Mutex<BTreeMap<IpAddr, usize>>);

impl Unproven {
    /// One more, if there are not too many.
    fn enter(self: &Arc<Self>, addr: IpAddr) -> Option<UnprovenGuard> {
        let mut counts = self.0.lock();
        let count = counts.entry(addr).or_default();
        if *count >= UNPROVEN_PER_ADDR_MAX {
            return None;
        }
        *count += 1;
        Some(UnprovenGuard { all: Arc::clone(self), addr })
    }
}

struct UnprovenGuard {
    all: Arc<Unproven>,
    addr: IpAddr,
}

impl Drop for UnprovenGuard {
    fn drop(&mut self) {
        let mut counts = self.all.0.lock();
        if let Some(count) = counts.get_mut(&self.addr) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.addr);
            }
        }
    }
}

/// Starts a server.
///
/// # Errors
/// See [`ServeError`].
pub async fn serve(options: ServerOptions) -> Result<ServerHandle, ServeError> {
    let ServerOptions { addr, secrets, handler } = options;
    let listen = |reason| ServeError::Listen { addr, reason };
    let listener = TcpListener::bind(addr).await.map_err(listen)?;
    let addr = listener.local_addr().map_err(listen)?;
    let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
    let shared = Shared { secrets, handler, strangers, unproven: Arc::default() };
    Ok(ServerHandle { addr, task: tokio::spawn(accept(listener, Arc::new(shared))) })
}

/// Owns the connections: they end with it.
async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_ended) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, from)) => {
                    connections.spawn(connection(Arc::clone(&shared), stream, from));
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn connection(shared: Arc<Shared>, stream: TcpStream, from: SocketAddr) {
    let Some(unproven) = shared.unproven.enter(from.ip()) else {
        return shared.handler.refused(from, "too many connections without a certificate from this address");
    };
    let tls = match handshake(&shared, stream).await {
        Ok(tls) => tls,
        Err(why) => return shared.handler.refused(from, &why),
    };
    let certs = tls.get_ref().1.peer_certificates();
    let peer = match certs.and_then(|certs| certs.first()).map(|cert| peer_of(cert)) {
        None => None,
        Some(Ok(peer)) if peer.cluster_id == shared.secrets.me().cluster_id => Some(peer),
        Some(Ok(peer)) => {
            return shared.handler.refused(from, &format!("{peer} is of cluster {}", peer.cluster_id));
        }
        Some(Err(error)) => return shared.handler.refused(from, &error.to_string()),
    };
    if peer.is_some() {
        drop(unproven);
        return talk(shared, tls, peer, from).await;
    }
    let Ok(_permit) = Arc::clone(&shared.strangers).try_acquire_owned() else {
        return shared.handler.refused(from, "too many callers without a certificate at once");
    };
    if tokio::time::timeout(STRANGER_MAX, talk(shared, tls, None, from)).await.is_err() {
        tracing::debug!(%from, "the time of a caller without a certificate is over");
    }
}

async fn handshake(shared: &Shared, stream: TcpStream) -> Result<TlsStream<TcpStream>, String> {
    tune(&stream).map_err(|error| error.to_string())?;
    let acceptor = TlsAcceptor::from(shared.secrets.server());
    match tokio::time::timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await {
        Ok(accepted) => {
            accepted.map_err(|error| format!("the TLS handshake failed: {}", explain_tls(&error)))
        }
        Err(_) => Err("the TLS handshake took too long".to_owned()),
    }
}

async fn talk(shared: Arc<Shared>, tls: TlsStream<TcpStream>, peer: Option<Peer>, from: SocketAddr) {
    let (streams, bytes) = match &peer {
        Some(_) => (STREAMS_MAX, MESSAGE_BYTES_MAX),
        None => (STRANGER_STREAMS_MAX, JOIN_BYTES_MAX),
    };
    let service = ClusterServer::new(Service::new(Arc::clone(&shared.handler), peer, from))
        .max_decoding_message_size(bytes)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let served = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(streams)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .serve_connection(TokioIo::new(tls), service_fn(move |request| service.clone().call(request)))
        .await;
    if let Err(error) = served {
        tracing::debug!(%from, error = with_sources(&error), "a connection broke");
    }
}
