//! Brings into the database what the driver sees: states of groups and resources, and that a group was released.
//!
//! Compared, not queued: whatever is not in the database yet is proposed; what was proposed a moment ago is given time to
//! arrive. Refusals need nothing: the group has another owner by then, and the driver sees that.

use super::Told;
use crate::engine::Engine;
use csv_cluster::db::{Command, Group, GroupState, ResourceStatus};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PROPOSE_LIMIT: Duration = Duration::from_secs(5);
/// A proposal that has not arrived in the database after so long is repeated.
const AGAIN: Duration = Duration::from_secs(1);
/// Resources in one command.
const BATCH: usize = 32;

/// What was proposed last, of one group.
type Sent = BTreeMap<String, (Told, Instant)>;

impl Engine {
    /// The loop.
    pub(super) async fn tell_groups(self: Arc<Self>) {
        let mut sent = Sent::new();
        while !self.is_stopping() {
            let told = self.groups.told.lock().clone();
            sent.retain(|group, _| told.contains_key(group));
            if self.cut_off().is_none() {
                for (name, told) in told {
                    self.tell_group(&name, told, &mut sent).await;
                }
            }
            let _news = tokio::time::timeout(AGAIN, self.groups.tell.notified()).await;
        }
    }

    async fn tell_group(&self, name: &str, told: Told, sent: &mut Sent) {
        if sent.get(name).is_some_and(|(last, at)| *last == told && at.elapsed() < AGAIN) {
            return;
        }
        let commands = {
            let db = self.db.read();
            let Some(group) = db.groups.get(name) else { return };
            if group.owner != Some(self.me()) || group.generation != told.generation {
                return;
            }
            let news: BTreeMap<String, ResourceStatus> = told
                .resources
                .iter()
                .filter(|(name, status)| {
                    db.resources.get(*name).is_some_and(|known| known.status != **status)
                })
                .map(|(name, status)| (name.clone(), status.clone()))
                .collect();
            self.status_commands(group, &told, news)
        };
        if commands.is_empty() {
            return;
        }
        for command in commands {
            if let Err(error) = self.propose(command, PROPOSE_LIMIT).await {
                tracing::debug!(group = name, %error, "the state of a group could not be told");
                return;
            }
        }
        sent.insert(name.to_owned(), (told, Instant::now()));
    }

    fn status_commands(
        &self,
        group: &Group,
        told: &Told,
        news: BTreeMap<String, ResourceStatus>,
    ) -> Vec<Command> {
        let moving = matches!(group.state, GroupState::Releasing { .. });
        let state = (!moving && group.state != told.state).then(|| told.state.clone());
        let status = |state, resources| Command::GroupStatus {
            name: group.name.clone(),
            generation: told.generation,
            node: self.me(),
            state,
            resources,
        };
        let news: Vec<(String, ResourceStatus)> = news.into_iter().collect();
        let mut commands: Vec<Command> =
            news.chunks(BATCH).map(|part| status(None, part.iter().cloned().collect())).collect();
        if let Some(state) = state {
            // After its resources: whoever waits for a group that is online finds them online.
            commands.push(status(Some(state), BTreeMap::new()));
        }
        if moving && told.released {
            let (name, generation, node) = (group.name.clone(), told.generation, self.me());
            commands.push(Command::GroupReleased { name, generation, node });
        }
        commands
    }
}
