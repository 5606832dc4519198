//! The coordinator on another node: one bidirectional gRPC stream with mutual TLS, made again whenever it breaks.
//!
//! Retries have no end, because a node waits for its coordinator as long as it takes; what is bounded is each
//! operation's wait (`op_timeout`). Back-off: 50 ms doubling to 1 s. A link that is silent for [`SILENT_MAX`] is
//! given up, so that a coordinator that vanished without closing is noticed.

use crate::client::channel::Link;
use crate::client::{VolumeClient, count, now_ms};
use anyhow::{Context, Result, bail};
use csv_proto as proto;
use prost::Message;
use proto::server_message::Body as In;
use proto::volume_client::VolumeClient as Stub;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// Pings go out every second.
const SILENT_MAX: Duration = Duration::from_secs(5);

struct RemoteLink {
    out: UnboundedSender<proto::ClientMessage>,
    client: Arc<VolumeClient>,
}

impl std::fmt::Debug for RemoteLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteLink").finish_non_exhaustive()
    }
}

impl Link for RemoteLink {
    fn send(&self, message: proto::ClientMessage) {
        count(&self.client.counts.control_bytes, message.encoded_len() as u64);
        // A closed channel means that the stream is over: the session is made again and repeats what matters.
        let _ = self.out.send(message);
    }
}

/// Who to talk to.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) addr: SocketAddr,
    /// DNS name in the coordinator's certificate.
    pub(crate) name: String,
    pub(crate) hello: proto::Hello,
}

/// TLS with the cluster's own CA and this node's certificate.
///
/// # Errors
/// When a file is missing; the text names it.
pub(crate) fn tls(secrets: &Path, server_name: &str) -> Result<ClientTlsConfig> {
    let read = |name: &str| {
        let path = secrets.join(name);
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    Ok(ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read("ca.pem")?))
        .identity(Identity::from_pem(read("node.pem")?, read("node.key")?))
        .domain_name(server_name))
}

/// Keeps a session with the coordinator until the process ends.
pub(crate) async fn keep(client: Arc<VolumeClient>, target: Target, tls: ClientTlsConfig) {
    let mut backoff = BACKOFF_MIN;
    let mut lost = false;
    loop {
        match run(&client, &target, &tls).await {
            Ok(()) => backoff = BACKOFF_MIN,
            Err(error) => {
                client.chan.unlinked();
                if !lost {
                    lost = true;
                    let text = format!("the coordinator {} cannot be reached: {error:#}", target.name);
                    client.events.report("coordinator-lost", text);
                }
            }
        }
        if client.chan.epoch().0 != 0 && lost && backoff == BACKOFF_MIN {
            lost = false;
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

async fn run(client: &Arc<VolumeClient>, target: &Target, tls: &ClientTlsConfig) -> Result<()> {
    let endpoint = Endpoint::from_shared(format!("https://{}", target.addr))?
        .tls_config(tls.clone())?
        .tcp_nodelay(true)
        .connect_timeout(CONNECT_MAX)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(3))
        .keep_alive_while_idle(true);
    let channel: Channel = endpoint.connect().await?;
    let mut stub = Stub::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
    let (out, queue) = unbounded_channel();
    let mut hello = target.hello.clone();
    hello.last_epoch = client.chan.epoch().0;
    let hello_ms = now_ms();
    out.send(proto::ClientMessage { epoch: 0, body: Some(proto::client_message::Body::Hello(hello)) })
        .context("own queue closed")?;
    let reply = tokio::time::timeout(CONNECT_MAX, stub.session(UnboundedReceiverStream::new(queue)));
    let mut stream = reply.await.context("no answer to the session request")??.into_inner();
    let first = tokio::time::timeout(CONNECT_MAX, stream.message()).await.context("no Welcome")??;
    let Some(proto::ServerMessage { body: Some(In::Welcome(welcome)), .. }) = first else {
        bail!("the coordinator did not begin with a Welcome");
    };
    let link = Arc::new(RemoteLink { out, client: client.clone() });
    client.welcomed(link, &welcome, hello_ms)?;
    let outcome = receive(client, &mut stream).await;
    client.chan.unlinked();
    client.events.report("link-lost", format!("the link to {} broke; reconnecting", target.name));
    outcome
}

async fn receive(
    client: &Arc<VolumeClient>,
    stream: &mut tonic::Streaming<proto::ServerMessage>,
) -> Result<()> {
    loop {
        let Ok(message) = tokio::time::timeout(SILENT_MAX, stream.message()).await else {
            tracing::warn!("the coordinator is silent; the link is given up");
            return Ok(());
        };
        match message {
            Ok(Some(message)) => {
                count(&client.counts.control_bytes, message.encoded_len() as u64);
                client.received(message);
            }
            Ok(None) => return Ok(()),
            Err(status) => {
                tracing::warn!(%status, "the session stream broke");
                return Ok(());
            }
        }
    }
}
