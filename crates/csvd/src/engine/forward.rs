//! Events of this node that concern everybody go into the cluster's log; and fences that a coordinator asks for.

use super::Engine;
use anyhow::{Context, Result, bail};
use csv_cluster::db::{Command, EventKind, MemberState, NewEvent};
use csv_types::NodeId;
use std::sync::PoisonError;
use std::time::Duration;

/// Events in one command.
const BATCH: usize = 32;
const PROPOSE_LIMIT: Duration = Duration::from_secs(3);

/// What a local event is called in the cluster's log. Others stay local.
fn kind_of(local: &str) -> Option<EventKind> {
    Some(match local {
        "mode-change" => EventKind::VolumeModeChanged,
        "suspended" | "cut-off" | "volume-lost" => EventKind::SelfFenced,
        "slept" => EventKind::FrozenAwake,
        "witness-taken" => EventKind::WitnessTaken,
        "witness-lost" => EventKind::WitnessLost,
        "witness-failed" | "take-failed" | "step-failed" | "no-lun" | "smbd-failed" | "unmount-stuck"
        | "io-stuck" | "csvfs-stuck" | "start-failed" => EventKind::StorageProblem,
        "resource-restarted" => EventKind::ResourceRestarted,
        "resource-hung" => EventKind::ResourceHung,
        "resource-host-ended" => EventKind::ResourceHostEnded,
        "resource-note" => EventKind::ResourceNote,
        "resource-warning" => EventKind::ResourceWarning,
        _ => return None,
    })
}

/// What an event about a resource is called in this node's log.
pub(super) fn local_kind(kind: EventKind) -> &'static str {
    let names = ["resource-restarted", "resource-hung", "resource-host-ended", "resource-note"];
    let known = names.into_iter().find(|name| kind_of(name) == Some(kind));
    known.unwrap_or("resource-warning")
}

impl Engine {
    /// Gives new events to the cluster. What cannot be given now is given the next time.
    pub(crate) async fn forward_events(&self) {
        if self.cut_off().is_some() {
            return;
        }
        let after = *self.forwarded.lock();
        let news = self.events.lock().unwrap_or_else(PoisonError::into_inner).after(after);
        for batch in news.chunks(BATCH) {
            let events: Vec<NewEvent> = batch
                .iter()
                .filter_map(|event| {
                    let kind = kind_of(&event.kind)?;
                    Some(NewEvent {
                        id: kind.id(),
                        at_unix_ms: event.unix_ms,
                        node: Some(self.me()),
                        subject: if event.volume.is_empty() {
                            self.identity.name.clone()
                        } else {
                            event.volume.clone()
                        },
                        level: kind.level(),
                        message: format!("{}: {}", self.identity.name, event.message),
                    })
                })
                .collect();
            if !events.is_empty() && self.propose(Command::EventAdd { events }, PROPOSE_LIMIT).await.is_err()
            {
                return;
            }
            if let Some(last) = batch.last() {
                *self.forwarded.lock() = last.seq;
            }
        }
    }

    /// A coordinator wants a node fenced. Returns when the majority has decided it and it is done.
    pub(crate) async fn have_fenced(
        &self,
        name: &str,
        node: NodeId,
        reason: &str,
        limit: Duration,
    ) -> Result<()> {
        let deadline = tokio::time::Instant::now() + limit;
        let mut changes = self.db.changes();
        let (epoch, generation) = {
            let db = self.db.read();
            let volume = db.volumes.get(name).with_context(|| format!("there is no volume {name}"))?;
            if volume.owner != Some(self.me()) {
                bail!("{name} is not coordinated here any more");
            }
            // Without a key it cannot write the LUN by itself.
            let Some(member) = volume.members.get(&node) else { return Ok(()) };
            (volume.epoch, member.generation)
        };
        let (name, reason) = (name.to_owned(), reason.to_owned());
        let command = Command::VolumeFence { name: name.clone(), epoch, node, generation, reason };
        self.propose(command, PROPOSE_LIMIT).await?;
        loop {
            {
                let db = self.db.read();
                let member = db.volumes.get(&name).and_then(|volume| volume.members.get(&node));
                if member.is_none_or(|m| m.generation != generation || m.state == MemberState::Fenced) {
                    return Ok(());
                }
            }
            if tokio::time::timeout_at(deadline, changes.changed()).await.is_err() {
                bail!("it was decided to fence node {node}, and it is not done within {} s", limit.as_secs());
            }
        }
    }
}
