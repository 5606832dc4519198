//! The connection to one peer; the states are drawn in the parent module.

use super::{PeerAddr, PeerStatus, PeersOptions};
use crate::error::CallError;
use crate::pki::peer_of;
use crate::secrets::Secrets;
use crate::socket::{self, Conn};
use csv_types::NodeId;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::Status;

type Opened = Option<Result<Arc<Conn>, CallError>>;

#[derive(Debug)]
enum Link {
    Down { until: Instant, why: String },
    Connecting(watch::Receiver<Opened>),
    Up(Arc<Conn>),
    Closed,
}

#[derive(Debug)]
struct State {
    link: Link,
    /// Connections in a row that failed, or broke before the peer had answered anything.
    failures: u32,
    task: Option<AbortHandle>,
}

/// One peer.
#[derive(Debug)]
pub(super) struct Slot {
    node: NodeId,
    target: PeerAddr,
    secrets: Arc<Secrets>,
    options: PeersOptions,
    state: Mutex<State>,
    /// The back-off was ended from outside.
    retry: Notify,
    connects: AtomicU64,
    pub(super) beats_dropped: AtomicU64,
}

impl Slot {
    pub(super) fn new(node: NodeId, target: PeerAddr, secrets: Arc<Secrets>, options: PeersOptions) -> Slot {
        let link = Link::Down { until: Instant::now(), why: "not tried yet".to_owned() };
        Slot {
            node,
            target,
            secrets,
            options,
            state: Mutex::new(State { link, failures: 0, task: None }),
            retry: Notify::new(),
            connects: AtomicU64::new(0),
            beats_dropped: AtomicU64::new(0),
        }
    }

    pub(super) fn node(&self) -> NodeId {
        self.node
    }

    /// The node that calls.
    pub(super) fn me(&self) -> NodeId {
        self.secrets.me().node_id
    }

    pub(super) fn target(&self) -> &PeerAddr {
        &self.target
    }

    /// A task that ends with the slot.
    pub(super) fn owns(&self, task: AbortHandle) {
        self.state.lock().task = Some(task);
    }

    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        if let Link::Up(conn) = &state.link {
            conn.line().kill();
        }
        state.link = Link::Closed;
        if let Some(task) = state.task.take() {
            task.abort();
        }
    }

    pub(super) fn retry_now(&self) {
        let mut state = self.state.lock();
        if let Link::Down { until, .. } = &mut state.link {
            *until = Instant::now();
            state.failures = 0;
            self.retry.notify_waiters();
        }
    }

    pub(super) fn status(&self) -> PeerStatus {
        let state = self.state.lock();
        let (connected, problem) = match &state.link {
            Link::Up(conn) if conn.is_live() => (true, None),
            Link::Up(_) => (false, Some("the connection broke".to_owned())),
            Link::Down { why, .. } => (false, Some(why.clone())),
            Link::Connecting(_) => (false, Some("connecting".to_owned())),
            Link::Closed => (false, Some("no longer a peer".to_owned())),
        };
        PeerStatus {
            connected,
            problem,
            connects: self.connects.load(Ordering::Relaxed),
            beats_dropped: self.beats_dropped.load(Ordering::Relaxed),
        }
    }

    /// The connection, made when there is none. Several callers wait for the same attempt, which goes on when they
    /// give up.
    pub(super) async fn connection(self: &Arc<Self>) -> Result<Arc<Conn>, CallError> {
        let mut opened = match self.look()? {
            Found::Up(conn) => return Ok(conn),
            Found::Connecting(opened) => opened,
        };
        let outcome = match opened.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            Err(_) => None,
        };
        outcome.unwrap_or_else(|| Err(CallError::Unreachable("connecting was broken off".to_owned())))
    }

    fn look(self: &Arc<Self>) -> Result<Found, CallError> {
        let mut state = self.state.lock();
        let dead = match &state.link {
            Link::Up(conn) if conn.is_live() => return Ok(Found::Up(Arc::clone(conn))),
            Link::Up(conn) => Some(conn.is_proven()),
            Link::Connecting(opened) if opened.has_changed().is_ok() => {
                return Ok(Found::Connecting(opened.clone()));
            }
            // The task that connected has ended without a word.
            Link::Connecting(_) => None,
            Link::Down { until, why } if Instant::now() < *until => {
                return Err(CallError::Unreachable(why.clone()));
            }
            Link::Closed => return Err(CallError::Unreachable("no longer a peer".to_owned())),
            Link::Down { .. } => None,
        };
        if dead == Some(false) {
            // It broke before the peer had answered anything: counts as a failed attempt, so that a peer that
            // drops each connection at once is not tried in a tight loop.
            let why = "the peer ended the connection at once".to_owned();
            self.down(&mut state, why.clone());
            return Err(CallError::Unreachable(why));
        }
        let (sender, opened) = watch::channel(None);
        state.link = Link::Connecting(opened.clone());
        tokio::spawn(Arc::clone(self).open(sender));
        Ok(Found::Connecting(opened))
    }

    fn down(&self, state: &mut State, why: String) {
        let wait = self.options.backoff_min.saturating_mul(1 << state.failures.min(16));
        let wait = wait.min(self.options.backoff_max);
        state.failures = state.failures.saturating_add(1);
        state.link = Link::Down { until: Instant::now() + wait, why };
    }

    async fn open(self: Arc<Self>, done: watch::Sender<Opened>) {
        let outcome = self.attempt().await;
        let mut state = self.state.lock();
        if matches!(state.link, Link::Closed) {
            done.send_replace(Some(Err(CallError::Unreachable("no longer a peer".to_owned()))));
            return;
        }
        let outcome = match outcome {
            Ok(conn) => {
                let conn = Arc::new(conn);
                self.connects.fetch_add(1, Ordering::Relaxed);
                state.link = Link::Up(Arc::clone(&conn));
                Ok(conn)
            }
            Err(why) => {
                self.down(&mut state, why.clone());
                Err(CallError::Unreachable(why))
            }
        };
        drop(state);
        done.send_replace(Some(outcome));
    }

    async fn attempt(&self) -> Result<Conn, String> {
        let target = &self.target;
        let name = ServerName::try_from(target.name.clone())
            .map_err(|_| format!("\"{}\" is no name that a certificate can show", target.name))?;
        let limit = self.options.connect_timeout;
        let (conn, certs) = socket::open(target.addr, name, self.secrets.client(), limit).await?;
        let cert = certs.first().ok_or("the peer showed no certificate")?;
        let peer = peer_of(cert).map_err(|error| format!("{}: {error}", target.addr))?;
        if peer.node_id != self.node {
            // The name may have been given to a new node since.
            return Err(format!("at {} is {peer}, not {}", target.addr, self.node));
        }
        Ok(conn)
    }

    /// What a failed call's status means. One that the peer itself sent proves the connection.
    pub(super) fn refusal(&self, conn: &Arc<Conn>, status: &Status) -> CallError {
        let error = CallError::from_status(status);
        match &error {
            CallError::Lost(why) if !conn.is_live() && !conn.is_proven() => {
                self.broke(conn, why.clone());
            }
            CallError::NotAllowed(why) if !conn.is_live() => self.broke(conn, why.clone()),
            CallError::Lost(_) | CallError::NotAllowed(_) => {}
            CallError::Refused(_)
            | CallError::Protocol(_)
            | CallError::TimedOut
            | CallError::Unreachable(_) => self.healthy(conn),
        }
        error
    }

    fn broke(&self, conn: &Arc<Conn>, why: String) {
        let mut state = self.state.lock();
        if matches!(&state.link, Link::Up(up) if Arc::ptr_eq(up, conn)) {
            self.down(&mut state, why);
        }
    }

    /// The peer works: the next failure is the first one again.
    pub(super) fn healthy(&self, conn: &Conn) {
        if !conn.is_proven() {
            conn.prove();
            self.state.lock().failures = 0;
        }
    }

    /// Waits until the back-off is over, or for `at_least`, or until it is ended from outside.
    pub(super) async fn pause(&self, at_least: Duration) {
        let retry = self.retry.notified();
        let until = match &self.state.lock().link {
            Link::Down { until, .. } => *until,
            Link::Connecting(_) | Link::Up(_) | Link::Closed => Instant::now(),
        };
        let until = until.max(Instant::now() + at_least);
        tokio::select! {
            () = tokio::time::sleep_until(until) => {}
            () = retry => {}
        }
    }
}

enum Found {
    Up(Arc<Conn>),
    Connecting(watch::Receiver<Opened>),
}
