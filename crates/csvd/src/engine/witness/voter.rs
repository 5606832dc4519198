//! The witness's voter in this process, of either kind, and when it may lead.
//!
//! **A new witness does not vote before it knows that it is the witness.** It begins empty under the voter number that every
//! witness has. While its own copy of the database does not name it (the LUN's identity, or this machine's certificate), it
//! takes the log and refuses to vote: the log up to the entry that names it says that the former witness was no voter any
//! more by then, see `Engine::give`.
//!
//! **It leads only when nobody else can.** After a partition the witness may have entries that the one node left has not; then
//! that node cannot be elected. So a witness that has heard no leader for [`LEADERLESS`] stands for election, gives a node
//! that has caught up the lead, and stands back again.

use crate::engine::machine::{Db, Machine};
use csv_cluster::db::ClusterDb;
use csv_cluster::quorum::VoterId as Voter;
use csv_raft::{Gate, Handle, OpenStorage, Options, Role, Rpc, SnapshotRule, StartError, Timing, Transport};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longer than nodes take to elect one of them.
const LEADERLESS: Duration = Duration::from_secs(5);
/// A node that answered within this time can take the lead.
const ACK_AGE_MS_MAX: u64 = 1_000;
const STEP_DOWN_LIMIT: Duration = Duration::from_secs(5);

/// Does the database name this very witness?
pub(crate) type Named = Arc<dyn Fn(&ClusterDb) -> bool + Send + Sync>;

/// See the module. Clones are the same voter.
#[derive(Clone)]
pub(crate) struct WitnessVoter {
    handle: Handle,
    db: Db,
    named: Named,
    /// It was named since it runs. One that is not wanted any more votes until it is no voter.
    was_named: Arc<AtomicBool>,
    /// Since when no leader is known.
    leaderless: Arc<Mutex<Option<Instant>>>,
    stepping_down: Arc<AtomicBool>,
}

impl std::fmt::Debug for WitnessVoter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WitnessVoter").field("handle", &self.handle).finish_non_exhaustive()
    }
}

impl WitnessVoter {
    /// Starts it on its storage.
    pub(crate) async fn start(
        storage: OpenStorage,
        transport: Arc<dyn Transport>,
        gate: Option<Arc<dyn Gate>>,
        named: Named,
    ) -> Result<WitnessVoter, StartError> {
        let db = Db::new();
        let handle = Handle::start(Options {
            storage,
            state_machine: Box::new(Machine(db.clone())),
            transport,
            timing: Timing::default(),
            snapshots: SnapshotRule::default(),
            gate,
        })
        .await?;
        handle.set_electable(false);
        Ok(WitnessVoter {
            handle,
            db,
            named,
            was_named: Arc::default(),
            leaderless: Arc::default(),
            stepping_down: Arc::default(),
        })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    pub(crate) fn db(&self) -> &Db {
        &self.db
    }

    /// Processes a call of another voter.
    pub(crate) async fn serve(&self, rpc: Rpc, payload: &[u8]) -> Result<Vec<u8>, String> {
        if rpc == Rpc::Vote && !self.is_named() {
            return Err("this witness is new and has not heard yet that it is one".to_owned());
        }
        self.handle.serve(rpc, payload).await.map_err(|error| error.to_string())
    }

    fn is_named(&self) -> bool {
        if (self.named)(&self.db.read()) {
            self.was_named.store(true, Ordering::Release);
        }
        self.was_named.load(Ordering::Acquire)
    }

    /// To be called several times a second, in a tokio runtime.
    pub(crate) fn tend(&self) {
        let metrics = self.handle.metrics();
        let named = self.is_named();
        match metrics.role {
            Role::Leader => {
                *self.leaderless.lock() = None;
                self.handle.set_electable(false);
                let votes = metrics.voter_ids();
                let other = metrics.followers.iter().any(|(id, follower)| {
                    *id != Voter::WITNESS.0
                        && votes.contains(id)
                        && follower.lag == 0
                        && follower.ack_age_ms.is_some_and(|age| age <= ACK_AGE_MS_MAX)
                });
                if other && !self.stepping_down.swap(true, Ordering::AcqRel) {
                    tokio::spawn(self.clone().step_down());
                }
            }
            Role::Follower | Role::Candidate => {
                let heard = metrics.leader_age_ms.is_some_and(|age| Duration::from_millis(age) < LEADERLESS);
                let since = *self.leaderless.lock().get_or_insert_with(Instant::now);
                if heard {
                    *self.leaderless.lock() = None;
                }
                let alone = !heard && since.elapsed() >= LEADERLESS && named;
                self.handle.set_electable(alone);
            }
            Role::Learner | Role::Stopped => self.handle.set_electable(false),
        }
    }

    async fn step_down(self) {
        if self.handle.step_down(STEP_DOWN_LIMIT).await.is_err() {
            tracing::warn!("nobody has taken the lead from the witness");
        }
        self.stepping_down.store(false, Ordering::Release);
    }
}
