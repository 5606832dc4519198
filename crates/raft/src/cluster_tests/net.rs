//! Calls between instances in memory: lost, late, doubled, or cut off in one direction.

use crate::handle::Handle;
use crate::transport::{BoxFuture, CallError, Rpc, Transport};
use crate::types::{RaftNode, VoterId};
use parking_lot::Mutex;
use rand::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Clone, Default)]
pub(crate) struct Faults {
    /// Directions in which nothing gets through.
    pub(crate) cut: BTreeSet<(VoterId, VoterId)>,
    /// Chances of 0 to 1.
    pub(crate) lost: f64,
    pub(crate) doubled: f64,
    /// Each way takes up to so long.
    pub(crate) delay_ms_max: u64,
}

#[derive(Default)]
pub(crate) struct Net {
    pub(crate) running: Mutex<BTreeMap<VoterId, Handle>>,
    pub(crate) faults: Mutex<Faults>,
}

impl Net {
    /// Does a message get through, and after how long?
    fn way(&self, from: VoterId, to: VoterId) -> Option<Duration> {
        let faults = self.faults.lock();
        let lost = faults.cut.contains(&(from, to)) || rand::rng().random_bool(faults.lost);
        let delay_ms = rand::rng().random_range(0..=faults.delay_ms_max);
        (!lost).then(|| Duration::from_millis(delay_ms))
    }

    pub(crate) fn isolate(&self, voter: VoterId) {
        for other in 0..20 {
            self.faults.lock().cut.extend([(voter, other), (other, voter)]);
        }
    }

    pub(crate) fn heal(&self) {
        *self.faults.lock() = Faults::default();
    }
}

pub(crate) struct MemTransport {
    pub(crate) net: Arc<Net>,
    pub(crate) me: VoterId,
}

impl Transport for MemTransport {
    fn call<'a>(
        &'a self,
        target: VoterId,
        _node: &'a RaftNode,
        rpc: Rpc,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, CallError>> {
        Box::pin(async move {
            let there = self.net.way(self.me, target);
            let doubled = rand::rng().random_bool(self.net.faults.lock().doubled);
            let net = self.net.clone();
            let me = self.me;
            // A call that its caller gave up goes on.
            let call = tokio::spawn(async move {
                let Some(delay) = there else { return std::future::pending().await };
                pause(delay).await;
                let Some(handle) = net.running.lock().get(&target).cloned() else {
                    return Err(CallError::Unreachable("not running".to_owned()));
                };
                if doubled {
                    let (handle, payload) = (handle.clone(), payload.clone());
                    tokio::spawn(async move {
                        pause(delay * 2).await;
                        let _ = handle.serve(rpc, &payload).await;
                    });
                }
                let answer = handle.serve(rpc, &payload).await;
                drop(handle);
                let Some(delay) = net.way(target, me) else { return std::future::pending().await };
                pause(delay).await;
                answer.map_err(|e| CallError::Remote(e.to_string()))
            });
            let abort = call.abort_handle();
            let answer = tokio::time::timeout(timeout, call).await;
            if answer.is_err() && there.is_none() {
                abort.abort();
            }
            answer.map_err(|_| CallError::TimedOut)?.map_err(|e| CallError::Unreachable(e.to_string()))?
        })
    }
}

async fn pause(delay: Duration) {
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
}
