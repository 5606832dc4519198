//! The control protocol on the network: a gRPC server with mutual TLS in front of the coordinator.
//!
//! Who is at the other end is known from its certificate: it must be of the cluster's own authority, and its DNS name
//! must be a node's name; Hello must then name that node. A peer without such a certificate does not get past the
//! handshake. A message that is too large, or a stream that does not begin with Hello, ends the stream; the session
//! stays until its lease is over.
//!
//! The server lives as long as the node serves the volume, the coordinator only while this node owns it: streams find it
//! in a [`Place`], are refused while that is empty, and keep no coordinator alive.

mod place;
mod tls;

#[cfg(test)]
mod tests;

pub use place::Place;
pub use tls::TlsFiles;

use crate::coordinator::Coordinator;
use crate::options::{Outbox, Refusal, SessionRef};
use csv_proto::volume_server::{Volume, VolumeServer};
use csv_proto::{ClientMessage, Hello, MESSAGE_BYTES_MAX, ServerMessage, client_message};
use csv_types::NodeId;
use parking_lot::Mutex;
use rustix::io::Errno;
use std::net::TcpListener;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// A stream must begin with its Hello within this time.
const HELLO_MAX: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Why the control service does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listening socket.
    #[error("the control service cannot use its socket: {0}")]
    Socket(std::io::Error),
    /// A certificate, key or authority.
    #[error(
        "{file}: {reason}; correct `secrets_dir` in /etc/csv/csv.toml, or run `csvctl cluster rejoin` with a token of another node, which makes the node's certificate anew"
    )]
    Secrets {
        /// Which file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The HTTP/2 server.
    #[error("the control service has ended: {0}")]
    Server(#[from] tonic::transport::Error),
}

/// Serves the coordinator's sessions until `shutdown` becomes true.
///
/// # Errors
/// See [`ServeError`].
pub async fn serve(
    place: Place,
    listener: TcpListener,
    tls: TlsFiles,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let incoming = tls::accept(place.clone(), listener, &tls)?;
    let service = VolumeServer::new(Service { place })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(service)
        .serve_with_incoming(incoming);
    tokio::select! {
        ended = server => Ok(ended?),
        // An error means that nobody can order the end any more, which is the end too.
        _over = shutdown.wait_for(|over| *over) => Ok(()),
    }
}

struct Service {
    place: Place,
}

#[tonic::async_trait]
impl Volume for Service {
    type SessionStream =
        std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<ServerMessage, Status>> + Send + 'static>>;

    async fn session(
        &self,
        request: Request<Streaming<ClientMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let owner = || {
            self.place
                .get()
                .ok_or_else(|| Status::unavailable("this node does not coordinate the volume now"))
        };
        let node = peer(&*owner()?, &request)?;
        let mut inbound = request.into_inner();
        let hello = hello(&self.place, node, &mut inbound).await?;
        let coordinator = owner()?;
        let (sender, receiver) = unbounded_channel();
        let outbox = Arc::new(StreamOutbox { sender: Mutex::new(Some(sender)), closed: Notify::new() });
        let weak = Arc::downgrade(&coordinator);
        let out = Arc::clone(&outbox);
        let connect = tokio::task::spawn_blocking(move || {
            coordinator.connect(node, &hello, out).map_err(|refusal| refused(&coordinator, node, &refusal))
        });
        let session = match connect.await {
            Ok(connected) => connected?,
            Err(error) => return Err(Status::internal(error.to_string())),
        };
        tokio::spawn(receive(weak, session, inbound, outbox));
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(receiver).map(Ok))))
    }
}

/// The node whose name stands in the peer's certificate.
fn peer(coordinator: &Coordinator, request: &Request<Streaming<ClientMessage>>) -> Result<NodeId, Status> {
    let certs =
        request.peer_certs().ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
    let names = certs.first().map(|cert| tls::dns_names(cert)).unwrap_or_default();
    if let Some(node) = coordinator.node_named(&names) {
        return Ok(node);
    }
    let text = format!("a certificate for {names:?} is no node's of this cluster; it was refused");
    coordinator.event("peer-refused", text.clone());
    Err(Status::permission_denied(text))
}

async fn hello(place: &Place, node: NodeId, inbound: &mut Streaming<ClientMessage>) -> Result<Hello, Status> {
    let first = tokio::time::timeout(HELLO_MAX, inbound.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no Hello came"))??;
    let Some(ClientMessage { body: Some(client_message::Body::Hello(hello)), .. }) = first else {
        return Err(Status::invalid_argument("a stream begins with Hello"));
    };
    if hello.node != node.0 {
        let name = place.get().map_or_else(|| node.to_string(), |coordinator| coordinator.name(node));
        let text = format!("the certificate is {name}'s, but Hello says node {}; it was refused", hello.node);
        place.event("peer-refused", text.clone());
        return Err(Status::permission_denied(text));
    }
    Ok(hello)
}

fn refused(coordinator: &Coordinator, node: NodeId, refusal: &Refusal) -> Status {
    let name = coordinator.name(node);
    coordinator.event("session-refused", format!("a session of {name} was refused: {refusal}"));
    match refusal.errno {
        Errno::AGAIN => Status::unavailable(refusal.to_string()),
        Errno::ACCESS => Status::permission_denied(refusal.to_string()),
        _ => Status::failed_precondition(refusal.to_string()),
    }
}

/// Takes messages until the stream ends, breaks, or is closed by the coordinator.
async fn receive(
    coordinator: Weak<Coordinator>,
    session: SessionRef,
    mut inbound: Streaming<ClientMessage>,
    outbox: Arc<StreamOutbox>,
) {
    loop {
        let message = tokio::select! {
            message = inbound.message() => message,
            () = outbox.closed.notified() => break,
        };
        let Some(coordinator) = coordinator.upgrade() else { break };
        match message {
            Ok(Some(message)) => coordinator.message(&session, message),
            Ok(None) => break,
            Err(status) => {
                let name = coordinator.name(session.node());
                coordinator
                    .event("stream-broken", format!("the stream of {name} broke: {}", status.message()));
                break;
            }
        }
    }
    // Ends the stream to the node too, which then connects anew.
    outbox.close("the stream is over");
    if let Some(coordinator) = coordinator.upgrade() {
        coordinator.disconnected(&session);
    }
}

/// The way to a node's stream. The queue has no bound of its own: what goes in is bounded by the calls that a
/// session may have under way and the layouts that it holds.
struct StreamOutbox {
    sender: Mutex<Option<UnboundedSender<ServerMessage>>>,
    closed: Notify,
}

impl Outbox for StreamOutbox {
    fn send(&self, message: ServerMessage) {
        if let Some(sender) = self.sender.lock().as_ref() {
            // The stream may have ended; the session is told by its other half.
            let _sent = sender.send(message);
        }
    }

    fn close(&self, why: &str) {
        if self.sender.lock().take().is_some() {
            tracing::debug!(why, "a session's stream is closed");
        }
        self.closed.notify_one();
    }
}
