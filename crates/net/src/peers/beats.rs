//! Heartbeats: one stream to each peer, one beat in each period.
//!
//! All streams tick at the same moments, so that a node wakes up once in a period. A beat is asked for only when it can
//! be queued, and the queue holds one: a peer that does not take its beats gets fewer, never older ones from here (what
//! lies in its socket while it is frozen, it knows by the time in it).

use super::slot::Slot;
use crate::error::CallError;
use csv_proto::cluster::Beat;
use csv_types::NodeId;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_stream::wrappers::ReceiverStream;

/// Beats that may wait for a peer to take them.
const QUEUE: usize = 1;
/// The answer to the opening of a stream must come within this time.
const OPEN_MAX: Duration = Duration::from_secs(1);
/// Before a stream is opened again that ended.
const AGAIN: Duration = Duration::from_millis(50);
/// The same when the peer refuses this node's beats.
const REFUSED_AGAIN: Duration = Duration::from_secs(1);

/// Where beats come from. Called from tasks that must not block.
pub trait BeatSource: Send + Sync + 'static {
    /// The next beat to `peer`; it will be queued. `first` on a new stream: the peer may know nothing, so everything
    /// goes in. None: no beat this time.
    fn next(&self, peer: NodeId, first: bool) -> Option<Beat>;

    /// `peer` refuses this node's beats (evicted, other cluster). Asked again and again while it does.
    fn refused(&self, peer: NodeId, error: &CallError) {
        tracing::debug!(%peer, %error, "beats are refused");
    }
}

/// What is sent when.
#[derive(Clone)]
pub(super) struct Plan {
    source: Arc<dyn BeatSource>,
    period: Duration,
    start: Instant,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan").field("period", &self.period).finish_non_exhaustive()
    }
}

impl Plan {
    pub(super) fn new(source: Arc<dyn BeatSource>, period: Duration) -> Plan {
        Plan { source, period: period.max(Duration::from_millis(1)), start: Instant::now() }
    }

    /// The next common tick.
    fn next_tick(&self) -> Instant {
        let since = self.start.elapsed().as_millis() / self.period.as_millis().max(1);
        self.start + self.period.saturating_mul(u32::try_from(since).unwrap_or(u32::MAX).saturating_add(1))
    }
}

/// Starts the task that keeps one peer's stream.
pub(super) fn spawn(slot: &Arc<Slot>, plan: watch::Receiver<Option<Plan>>) -> AbortHandle {
    tokio::spawn(keep(Arc::clone(slot), plan)).abort_handle()
}

async fn keep(slot: Arc<Slot>, mut plan: watch::Receiver<Option<Plan>>) {
    loop {
        let now = plan.borrow_and_update().clone();
        let streams = async {
            match &now {
                Some(plan) => streams(&slot, plan).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = streams => {}
            changed = plan.changed() => if changed.is_err() { return },
        }
    }
}

/// Makes stream after stream.
async fn streams(slot: &Arc<Slot>, plan: &Plan) {
    loop {
        let error = stream(slot, plan).await;
        let pause = if matches!(error, CallError::NotAllowed(_)) {
            plan.source.refused(slot.node(), &error);
            REFUSED_AGAIN
        } else {
            tracing::debug!(peer = %slot.node(), %error, "the stream of beats ended");
            AGAIN
        };
        slot.pause(pause).await;
    }
}

/// One stream, until it ends.
async fn stream(slot: &Arc<Slot>, plan: &Plan) -> CallError {
    let conn = match slot.connection().await {
        Ok(conn) => conn,
        Err(error) => return error,
    };
    let (node, me) = (slot.node(), slot.me());
    let (sender, queue) = mpsc::channel(QUEUE);
    let mut first = true;
    if let Some(beat) = plan.source.next(node, first) {
        // The queue is empty.
        first = sender.try_send(beat.into_wire(me)).is_err();
    }
    let mut stub = conn.stub();
    let mut answers = match timeout(OPEN_MAX, stub.beats(ReceiverStream::new(queue))).await {
        Ok(Ok(answers)) => answers.into_inner(),
        Ok(Err(status)) => return slot.refusal(&conn, &status),
        Err(_) => {
            conn.line().kill();
            return CallError::TimedOut;
        }
    };
    slot.healthy(&conn);
    let mut tick = interval_at(plan.next_tick(), plan.period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _now = tick.tick() => match sender.try_reserve() {
                Ok(room) => if let Some(beat) = plan.source.next(node, first) {
                    room.send(beat.into_wire(me));
                    first = false;
                },
                Err(TrySendError::Full(())) => {
                    slot.beats_dropped.fetch_add(1, Ordering::Relaxed);
                }
                Err(TrySendError::Closed(())) => return CallError::Lost("the stream ended".to_owned()),
            },
            answer = answers.message() => match answer {
                // A later version may say something.
                Ok(Some(_)) => {}
                Ok(None) => return CallError::Lost("the peer ended the stream".to_owned()),
                Err(status) => return slot.refusal(&conn, &status),
            },
        }
    }
}
