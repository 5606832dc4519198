//! A client's TCP connection with TLS and HTTP/2 on it: made within a time limit, watched, and ended at once.
//!
//! A connection on which nothing comes in any more looks just like an idle one. So pings go out when nothing was
//! received for [`PING_INTERVAL`], the kernel gives up on data that is not acknowledged for [`UNACKED_MAX`], and
//! whoever got no answer can ask whether anything at all came in meanwhile ([`Line::reads`]).

use crate::error::{explain_tls, with_sources};
use csv_proto::cluster::MESSAGE_BYTES_MAX;
use csv_proto::cluster::wire::cluster_client::ClusterClient;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use rustix::net::sockopt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tonic::body::Body;
use tonic::codegen::{Service, http};

/// A client pings when it has received nothing for this long.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// The answer to a ping must come within this time.
const PING_MAX: Duration = Duration::from_secs(2);
/// Sent data must be acknowledged by the peer's kernel within this time.
const UNACKED_MAX: Duration = Duration::from_secs(2);
/// TCP's own probes find a dead peer that nothing is sent to.
const PROBE_IDLE: Duration = Duration::from_secs(4);
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
const PROBES: u32 = 3;
pub(crate) const STREAM_WINDOW_BYTES: u32 = 1 << 20;
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// Requests name this as their authority; nobody looks at it.
const ORIGIN: &str = "https://csv";

/// Sets what both ends want of their sockets.
pub(crate) fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, PROBE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, PROBE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, PROBES)?;
    sockopt::set_tcp_user_timeout(stream, u32::try_from(UNACKED_MAX.as_millis()).unwrap_or(u32::MAX))?;
    Ok(())
}

/// What is known of a connection's TCP stream from outside of the task that drives it.
#[derive(Debug, Default)]
pub(crate) struct Line {
    reads: AtomicU64,
    killed: AtomicBool,
    reader: Mutex<Option<Waker>>,
}

impl Line {
    /// How often something was received.
    pub(crate) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Ends the connection: everything on it fails at once, nothing more is sent.
    pub(crate) fn kill(&self) {
        self.killed.store(true, Ordering::SeqCst);
        if let Some(waker) = self.reader.lock().take() {
            waker.wake();
        }
    }

    /// Has it been ended here?
    pub(crate) fn is_killed(&self) -> bool {
        self.killed.load(Ordering::SeqCst)
    }

    fn check(&self) -> io::Result<()> {
        if self.is_killed() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "given up, the peer was silent"));
        }
        Ok(())
    }
}

/// A TCP stream and its [`Line`].
#[derive(Debug)]
struct Watched {
    stream: TcpStream,
    line: Arc<Line>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        {
            let mut reader = self.line.reader.lock();
            if !reader.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                *reader = Some(cx.waker().clone());
            }
        }
        // After the waker is in place, so that a kill in between is not missed.
        self.line.check()?;
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.line.reads.fetch_add(1, Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.line.check()?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.line.check()?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Client of the protocol on one connection.
pub(crate) type Stub = ClusterClient<Wire>;

/// An open connection to a node.
#[derive(Debug)]
pub(crate) struct Conn {
    wire: Wire,
    line: Arc<Line>,
    /// The peer has answered on it: its server took this node's certificate.
    proven: AtomicBool,
}

impl Conn {
    /// Can a call still be sent?
    pub(crate) fn is_live(&self) -> bool {
        !self.line.is_killed() && !self.wire.0.is_closed()
    }

    pub(crate) fn line(&self) -> &Line {
        &self.line
    }

    pub(crate) fn prove(&self) {
        self.proven.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Relaxed)
    }

    pub(crate) fn stub(&self) -> Stub {
        ClusterClient::with_origin(self.wire.clone(), http::Uri::from_static(ORIGIN))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.line.kill();
    }
}

/// Opens a connection. The certificates are those that the server showed, and that `tls` has verified.
///
/// # Errors
/// In plain words, when it failed or took longer than `limit`.
pub(crate) async fn open(
    addr: SocketAddr,
    name: ServerName<'static>,
    tls: Arc<ClientConfig>,
    limit: Duration,
) -> Result<(Conn, Vec<CertificateDer<'static>>), String> {
    match tokio::time::timeout(limit, open_slowly(addr, name, tls)).await {
        Ok(opened) => opened,
        Err(_) => Err(format!("no connection to {addr} within {} ms", limit.as_millis())),
    }
}

async fn open_slowly(
    addr: SocketAddr,
    name: ServerName<'static>,
    tls: Arc<ClientConfig>,
) -> Result<(Conn, Vec<CertificateDer<'static>>), String> {
    let stream = TcpStream::connect(addr).await.map_err(|error| format!("{addr}: {error}"))?;
    tune(&stream).map_err(|error| format!("{addr}: {error}"))?;
    let line = Arc::new(Line::default());
    let watched = Watched { stream, line: Arc::clone(&line) };
    let stream = TlsConnector::from(tls)
        .connect(name, watched)
        .await
        .map_err(|error| format!("{addr}: {}", explain_tls(&error)))?;
    let certs = stream.get_ref().1.peer_certificates().map(<[_]>::to_vec).unwrap_or_default();
    let (send, driver) = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_MAX)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| format!("{addr}: {}", with_sources(&error)))?;
    tokio::spawn(async move {
        if let Err(error) = driver.await {
            tracing::debug!(%addr, error = with_sources(&error), "a connection broke");
        }
    });
    Ok((Conn { wire: Wire(send), line, proven: AtomicBool::new(false) }, certs))
}

/// Hyper's connection as tonic wants it.
#[derive(Debug, Clone)]
pub(crate) struct Wire(SendRequest<Body>);

impl Service<http::Request<Body>> for Wire {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
