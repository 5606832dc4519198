//! What an instance is started with.

use crate::error::StartError;
use crate::storage::OpenStorage;
use crate::transport::{Gate, Transport};
use crate::types::StateMachine;
use openraft::{Config, SnapshotPolicy};
use std::sync::Arc;

/// Everything that [`crate::Handle::start`] needs.
pub struct Options {
    /// Storage of this voter, opened; it says who this is.
    pub storage: OpenStorage,
    /// The state machine, empty.
    pub state_machine: Box<dyn StateMachine>,
    /// The way to the others.
    pub transport: Arc<dyn Transport>,
    /// Times.
    pub timing: Timing,
    /// When to take snapshots.
    pub snapshots: SnapshotRule,
    /// Is asked before each answer.
    pub gate: Option<Arc<dyn Gate>>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("storage", &self.storage)
            .field("timing", &self.timing)
            .field("snapshots", &self.snapshots)
            .finish_non_exhaustive()
    }
}

/// Times, in milliseconds, as they can be watched from outside.
///
/// openraft's own numbers are others: its timer runs every 1.5 heartbeat intervals, and the time until an election
/// is its lease plus its election time-out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// A leader sends a heartbeat this often; the timer of everybody runs at this pace.
    pub heartbeat_ms: u64,
    /// A voter that heard no leader for a time between this ...
    pub election_min_ms: u64,
    /// ... and this (drawn once per start, plus up to one heartbeat until the timer sees it) stands for election.
    /// Half of it is the lease: for that long after a leader was heard nobody else gets a vote. At least four
    /// heartbeats.
    pub election_max_ms: u64,
    /// Time for one piece of a snapshot, the last of which includes installing it.
    pub snapshot_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Timing { heartbeat_ms: 300, election_min_ms: 900, election_max_ms: 1500, snapshot_ms: 20_000 }
    }
}

/// When snapshots are taken and how much of the log stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotRule {
    /// After so many committed entries. The storage asks for one earlier when it fills up.
    pub every_entries: u64,
    /// Entries that stay in the log behind a snapshot, for followers that were away for a moment.
    pub keep_entries: u64,
}

impl Default for SnapshotRule {
    fn default() -> Self {
        SnapshotRule { every_entries: 2000, keep_entries: 500 }
    }
}

impl Timing {
    /// For how long voters elect nobody else after they heard a leader.
    #[must_use]
    pub fn lease_ms(&self) -> u64 {
        self.election_max_ms / 2
    }

    pub(crate) fn config(&self, snapshots: SnapshotRule) -> Result<Config, StartError> {
        let heartbeat_interval = self.heartbeat_ms * 2 / 3;
        let lease = self.lease_ms();
        if self.heartbeat_ms < 3
            || lease < 2 * self.heartbeat_ms
            || self.election_min_ms > self.election_max_ms
        {
            let text =
                "the longest election time must be at least four heartbeats and not below the shortest";
            return Err(StartError::Timing(text.to_owned()));
        }
        // openraft waits lease + (min..max) where its lease is max, and gives a vote `min` to arrive.
        let least = self.election_min_ms.saturating_sub(lease).max(lease / 2).min(lease - 1);
        let config = Config {
            cluster_name: "csvfs".to_owned(),
            heartbeat_interval,
            election_timeout_min: least.max(heartbeat_interval + 1),
            election_timeout_max: lease,
            install_snapshot_timeout: self.snapshot_ms,
            max_payload_entries: 512,
            // A member that is further behind than a snapshot covers gets the snapshot.
            replication_lag_threshold: 2 * snapshots.every_entries + snapshots.keep_entries,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshots.every_entries),
            max_in_snapshot_log_to_keep: snapshots.keep_entries,
            purge_batch_size: 1 + snapshots.keep_entries / 2,
            ..Config::default()
        };
        config.validate().map_err(|e| StartError::Timing(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timing_is_what_openraft_makes_of_it() {
        let config = Timing::default().config(SnapshotRule::default()).unwrap();
        assert_eq!(config.heartbeat_interval * 3 / 2, 300);
        let (least, most) = (config.election_timeout_min, config.election_timeout_max);
        assert!(most + least >= 900 && most + most <= 1500, "{least} {most}");
    }

    #[test]
    fn impossible_timing_is_refused() {
        let timing = Timing { heartbeat_ms: 500, ..Timing::default() };
        assert!(matches!(timing.config(SnapshotRule::default()), Err(StartError::Timing(_))));
        let timing = Timing { election_min_ms: 2000, ..Timing::default() };
        assert!(matches!(timing.config(SnapshotRule::default()), Err(StartError::Timing(_))));
    }
}
