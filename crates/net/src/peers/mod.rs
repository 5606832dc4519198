//! Connections to the other nodes: one HTTP/2 connection to each, for calls and for heartbeats.
//!
//! ```text
//!            first call, or a beat is due                 TLS done
//!   Down -------------------------------> Connecting ---------------> Up
//!     ^  <---- failed: back-off 50 ms..1 s ----+                       |
//!     +------- broken, or silent during a call that got no answer -----+
//! ```
//!
//! While Down and in back-off, calls fail at once with the last error; [`Peers::retry_now`] ends the back-off. Nothing
//! queues behind a dead connection: a call that runs out of time on a connection where nothing came in meanwhile takes
//! the connection down with it. [`Peers::set`] names the peers, level-triggered; this node itself is left out.
//! When the last clone of [`Peers`] goes, so do all connections.

mod beats;
mod slot;

pub use beats::BeatSource;

use crate::error::CallError;
use crate::secrets::Secrets;
use crate::socket::{Conn, Stub};
use beats::Plan;
use bytes::Bytes;
use csv_proto::cluster::{
    MESSAGE_BYTES_MAX, PROTOCOL_VERSION, Proposed, RaftCall, Refusal, RefusalKind, admin_answer_from_wire,
    propose_answer_from_wire, raft_answer_from_wire, wire,
};
use csv_types::NodeId;
use parking_lot::Mutex;
use slot::Slot;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tonic::{Response, Status};

/// Where a node's cluster service is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddr {
    /// Its name, which its certificate must show.
    pub name: String,
    /// Its address.
    pub addr: SocketAddr,
}

/// Time limits of connections.
#[derive(Debug, Clone)]
pub struct PeersOptions {
    /// For TCP and TLS together.
    pub connect_timeout: Duration,
    /// First wait after a connection failed; doubles from there.
    pub backoff_min: Duration,
    /// Longest wait.
    pub backoff_max: Duration,
}

impl Default for PeersOptions {
    fn default() -> Self {
        PeersOptions {
            connect_timeout: Duration::from_millis(500),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(1),
        }
    }
}

/// How a peer's connection is, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// There is a connection.
    pub connected: bool,
    /// Why there is none.
    pub problem: Option<String>,
    /// Connections made so far.
    pub connects: u64,
    /// Beats that were not sent because the peer did not take the last one.
    pub beats_dropped: u64,
}

/// The other nodes.
#[derive(Debug, Clone)]
pub struct Peers {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    secrets: Arc<Secrets>,
    options: PeersOptions,
    slots: Mutex<BTreeMap<NodeId, Arc<Slot>>>,
    plan: watch::Sender<Option<Plan>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        for slot in self.slots.lock().values() {
            slot.close();
        }
    }
}

impl Peers {
    /// No peers yet.
    #[must_use]
    pub fn new(secrets: Arc<Secrets>, options: PeersOptions) -> Peers {
        let slots = Mutex::new(BTreeMap::new());
        Peers { shared: Arc::new(Shared { secrets, options, slots, plan: watch::Sender::new(None) }) }
    }

    /// Says who the peers are now. Those that are gone, or have another name or address, lose their connection.
    ///
    /// Needs a tokio runtime.
    pub fn set(&self, peers: &BTreeMap<NodeId, PeerAddr>) {
        let me = self.shared.secrets.me().node_id;
        let mut slots = self.shared.slots.lock();
        slots.retain(|node, slot| {
            let stays = peers.get(node) == Some(slot.target());
            if !stays {
                slot.close();
            }
            stays
        });
        for (node, target) in peers.iter().filter(|(node, _)| **node != me) {
            slots.entry(*node).or_insert_with(|| {
                let (secrets, options) = (Arc::clone(&self.shared.secrets), self.shared.options.clone());
                let slot = Arc::new(Slot::new(*node, target.clone(), secrets, options));
                slot.owns(beats::spawn(&slot, self.shared.plan.subscribe()));
                slot
            });
        }
    }

    /// Ends the peer's back-off: it was heard, so it can be reached.
    pub fn retry_now(&self, node: NodeId) {
        if let Some(slot) = self.slot(node) {
            slot.retry_now();
        }
    }

    /// Sends a beat to each peer in each period from now on, in place of any earlier such order. A peer that does not
    /// take its beats misses some; nobody waits for it.
    pub fn start_beats(&self, source: Arc<dyn BeatSource>, period: Duration) {
        self.shared.plan.send_replace(Some(Plan::new(source, period)));
    }

    /// Sends no more beats.
    pub fn stop_beats(&self) {
        self.shared.plan.send_replace(None);
    }

    /// How the connections are.
    #[must_use]
    pub fn status(&self) -> BTreeMap<NodeId, PeerStatus> {
        self.shared.slots.lock().iter().map(|(node, slot)| (*node, slot.status())).collect()
    }

    /// A call of Raft to a voter on `target`.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn raft(&self, target: NodeId, call: RaftCall, timeout: Duration) -> Result<Bytes, CallError> {
        fits(call.payload.len())?;
        let call = call.into_wire();
        let answer = self.call(target, timeout, |mut stub| async move { stub.raft(call).await }).await?;
        match raft_answer_from_wire(answer) {
            Ok(answer) => answer.map_err(CallError::Refused),
            Err(malformed) => Err(CallError::Protocol(malformed.to_string())),
        }
    }

    /// Hands a command for the database to `target`.
    ///
    /// # Errors
    /// Of the call, see [`CallError`]. The answer itself may be a [`csv_proto::cluster::ProposeRefusal`].
    pub async fn propose(
        &self,
        target: NodeId,
        envelope: Bytes,
        timeout: Duration,
    ) -> Result<Proposed, CallError> {
        fits(envelope.len())?;
        let call = wire::ProposeCall { version: PROTOCOL_VERSION, from: self.me().0, envelope };
        let answer = self.call(target, timeout, |mut stub| async move { stub.propose(call).await }).await?;
        propose_answer_from_wire(answer).map_err(|malformed| CallError::Protocol(malformed.to_string()))
    }

    /// Passes a request of csvctl (json) on to `target`.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn admin(
        &self,
        target: NodeId,
        request_json: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        fits(request_json.len())?;
        let call = wire::AdminCall { version: PROTOCOL_VERSION, from: self.me().0, request_json };
        let answer = self.call(target, timeout, |mut stub| async move { stub.admin(call).await }).await?;
        match admin_answer_from_wire(answer) {
            Ok(answer) => answer.map_err(CallError::Refused),
            Err(malformed) => Err(CallError::Protocol(malformed.to_string())),
        }
    }

    fn me(&self) -> NodeId {
        self.shared.secrets.me().node_id
    }

    fn slot(&self, node: NodeId) -> Option<Arc<Slot>> {
        self.shared.slots.lock().get(&node).cloned()
    }

    async fn call<A, F, Fut>(&self, target: NodeId, timeout: Duration, send: F) -> Result<A, CallError>
    where
        F: FnOnce(Stub) -> Fut,
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        let deadline = Instant::now() + timeout;
        let unknown = || CallError::Unreachable(format!("{target} is no other node of this cluster"));
        let slot = self.slot(target).ok_or_else(unknown)?;
        let conn: Arc<Conn> = match timeout_at(deadline, slot.connection()).await {
            Ok(conn) => conn?,
            Err(_) => return Err(CallError::Unreachable(format!("still connecting to {target}"))),
        };
        let reads = conn.line().reads();
        match timeout_at(deadline, send(conn.stub())).await {
            Ok(Ok(answer)) => {
                slot.healthy(&conn);
                Ok(answer.into_inner())
            }
            Ok(Err(status)) => Err(slot.refusal(&conn, &status)),
            Err(_) => {
                if conn.line().reads() == reads {
                    // Not even a ping was answered: the connection is dead, or the peer frozen.
                    conn.line().kill();
                }
                Err(CallError::TimedOut)
            }
        }
    }
}

/// Is a payload small enough, with room for what stands around it?
fn fits(bytes: usize) -> Result<(), CallError> {
    const AROUND: usize = 64;
    if bytes + AROUND <= MESSAGE_BYTES_MAX {
        return Ok(());
    }
    let text = format!("a message of {bytes} bytes is too large; the limit is {MESSAGE_BYTES_MAX}");
    Err(CallError::Refused(Refusal::new(RefusalKind::Failed, text)))
}
