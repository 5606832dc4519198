//! Commands for the database, from any node: given to the leader, wherever it is.
//!
//! While there is no leader, and when the one that was asked does not lead any more, the command waits for the next
//! one, up to its time limit. An outcome that is not known is reported as such; every command of the engine may be
//! repeated, because the database refuses what is out of date.

use super::Engine;
use csv_cluster::db::{Applied, Command, Refused, decode_answer};
use csv_net::{CallError, ProposeRefusal, RefusalKind};
use csv_raft::ProposeError;
use csv_types::NodeId;
use std::time::Duration;
use tokio::time::Instant;

/// Between tries while nobody leads.
const AGAIN: Duration = Duration::from_millis(50);
/// One try; a leader that has lost its majority answers nothing.
const TRY_MAX: Duration = Duration::from_secs(3);

/// Why a command was not carried out, or may not have been.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failed {
    /// The database says no; nothing happened.
    #[error("{0}")]
    Refused(Refused),
    /// It may have happened.
    #[error(
        "it is not known whether this was carried out: {0}; look with `csvctl cluster status`, and repeat it if need be"
    )]
    Unknown(String),
    /// Nobody could be asked; nothing happened.
    #[error("{0}")]
    NoLeader(String),
}

enum Try {
    Done(Result<Applied, Failed>),
    /// Nothing happened; this one may lead.
    Elsewhere(Option<u64>, String),
}

impl Engine {
    /// Carries a command out.
    pub(crate) async fn propose(&self, command: Command, limit: Duration) -> Result<Applied, Failed> {
        let envelope = command.clone().by(self.me(), super::unix_ms()).encode();
        let deadline = Instant::now() + limit;
        let mut hint = None;
        loop {
            let why = match self.try_once(&command, &envelope, hint.take(), deadline).await {
                Try::Done(outcome) => return outcome,
                Try::Elsewhere(leader, why) => {
                    hint = leader.filter(|leader| *leader != u64::from(self.me().0));
                    why
                }
            };
            if Instant::now() + AGAIN >= deadline {
                return Err(Failed::NoLeader(format!(
                    "the cluster has no leader that can be reached ({why}): without a majority nothing can be changed, \
                     see `csvctl quorum show`"
                )));
            }
            if hint.is_none() {
                tokio::time::sleep(AGAIN).await;
            }
        }
    }

    async fn try_once(
        &self,
        command: &Command,
        envelope: &[u8],
        hint: Option<u64>,
        deadline: Instant,
    ) -> Try {
        let limit = deadline.saturating_duration_since(Instant::now()).min(TRY_MAX);
        let leader = hint.or_else(|| self.raft().metrics().leader);
        match leader {
            Some(leader) if leader != u64::from(self.me().0) => {
                let Some(node) = csv_cluster::quorum::VoterId(leader).node() else {
                    return Try::Elsewhere(None, "the witness leads for a moment".to_owned());
                };
                self.ask_leader(node, envelope, limit).await
            }
            Some(_) => self.lead(command, envelope, limit).await,
            None => Try::Elsewhere(None, "none is known".to_owned()),
        }
    }

    /// Puts a command into the log, on the leader; every command comes by here. A new witness comes in only when there is none,
    /// and none comes in between.
    pub(crate) async fn give(
        &self,
        command: &Command,
        envelope: &[u8],
        limit: Duration,
    ) -> Result<Vec<u8>, ProposeError> {
        let Command::QuorumSet { .. } = command else { return self.raft().propose(envelope, limit).await };
        let _one = self.changing_witness.lock().await;
        self.check_new_witness(command).map_err(ProposeError::Rejected)?;
        self.raft().propose(envelope, limit).await
    }

    async fn lead(&self, command: &Command, envelope: &[u8], limit: Duration) -> Try {
        match self.give(command, envelope, limit).await {
            Ok(answer) => Try::Done(decoded(&answer)),
            Err(ProposeError::NotLeader { leader }) => {
                Try::Elsewhere(leader.map(|(id, _)| id), "this node does not lead any more".to_owned())
            }
            Err(ProposeError::Rejected(why)) => Try::Elsewhere(None, why),
            Err(ProposeError::Unknown(why) | ProposeError::Fatal(why)) => {
                Try::Done(Err(Failed::Unknown(why)))
            }
        }
    }

    async fn ask_leader(&self, node: NodeId, envelope: &[u8], limit: Duration) -> Try {
        match self.peers().propose(node, envelope.to_vec().into(), limit).await {
            Ok(Ok(answer)) => Try::Done(decoded(&answer)),
            Ok(Err(ProposeRefusal::NotLeader { leader })) => {
                Try::Elsewhere(leader, format!("{node} does not lead any more"))
            }
            Ok(Err(ProposeRefusal::Refused(refusal))) => match refusal.kind {
                RefusalKind::UnknownOutcome => Try::Done(Err(Failed::Unknown(refusal.text))),
                RefusalKind::Failed
                | RefusalKind::NotHere
                | RefusalKind::Busy
                | RefusalKind::NotAllowed
                | RefusalKind::Stopped => Try::Elsewhere(None, refusal.text),
            },
            Err(error @ CallError::Unreachable(_)) => Try::Elsewhere(None, error.to_string()),
            Err(error) if error.may_have_happened() => Try::Done(Err(Failed::Unknown(error.to_string()))),
            Err(error) => Try::Elsewhere(None, error.to_string()),
        }
    }
}

fn decoded(answer: &[u8]) -> Result<Applied, Failed> {
    match decode_answer(answer) {
        Ok(answer) => answer.map_err(Failed::Refused),
        Err(error) => Err(Failed::Unknown(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use csv_cluster::db::{CHECKPOINT_BYTES_MAX, PROPERTY_BYTES_MAX};

    #[test]
    fn the_longest_records_fit_into_a_command() {
        let name = "n".repeat(64);
        // A control character takes six bytes in JSON.
        let value = Some("\u{1}".repeat(PROPERTY_BYTES_MAX));
        for command in [
            Command::CheckpointPut {
                name: name.clone(),
                value: vec![0xff; CHECKPOINT_BYTES_MAX],
                owner: None,
            },
            Command::Property { key: name, value },
        ] {
            let bytes = command.by(NodeId(255), u64::MAX).encode().len();
            assert!(bytes <= csv_raft::COMMAND_BYTES_MAX, "{bytes}");
        }
    }
}
