//! Everything is mended; then the cluster must come to where it should be.

use super::{CONVERGE_MS, Event, Sim};
use crate::csvfs::Role;
use crate::world::network::Network;
use csv_cluster::db::{AdminState, Command, VolumeState};
use csv_types::NodeId;

const LOOK_MS: u64 = 500;
/// What each node must get done on each volume.
const PROGRESS_MIN: u64 = 5;

impl Sim {
    pub(super) fn go_quiet(&mut self) {
        self.note("everything is mended");
        self.quiet = Some((self.now_ms, self.oracle.progress.clone()));
        self.network = Network::good();
        self.late_ms.iter_mut().for_each(|late_ms| *late_ms = 0);
        self.witness.broken = false;
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            if let Some(node) = self.nodes.get_mut(&id) {
                for volume in std::mem::take(&mut node.no_path) {
                    self.luns[volume].abort(id, &mut self.rng);
                }
                node.frozen_until_ms = 0;
            }
            self.schedule(0, Event::Wake(id));
            self.boot(id);
            self.start_csvd(id);
        }
        self.schedule(LOOK_MS, Event::Look);
    }

    pub(super) fn look(&mut self) {
        let Some((quiet_ms, _)) = self.quiet else { return };
        let paused: Vec<NodeId> = self
            .oracle
            .db
            .nodes
            .values()
            .filter(|node| node.admin != AdminState::Active)
            .map(|node| node.id)
            .collect();
        for node in paused {
            self.admin(&Command::NodeResume { node });
        }
        match self.missing() {
            None => self.converged = true,
            Some(what) if self.now_ms > quiet_ms + CONVERGE_MS => {
                self.break_with(Err(format!("it does not come back: {what}")));
            }
            Some(_) => self.schedule(LOOK_MS, Event::Look),
        }
    }

    /// What is not yet as it should be.
    fn missing(&self) -> Option<String> {
        let db = &self.oracle.db;
        for node in db.nodes.values() {
            if !node.takes_volumes() {
                return Some(format!("{} is {:?}, {:?}", node.id, node.state, node.admin));
            }
            let copy = self.nodes.get(&node.id).and_then(|node| node.csvd.as_ref()).map(|csvd| &csvd.db);
            if copy.is_none_or(|copy| copy.volumes != db.volumes || copy.nodes != db.nodes) {
                return Some(format!("{} has an old database", node.id));
            }
        }
        for (at, volume) in db.volumes.values().enumerate() {
            if volume.state != VolumeState::Online || !volume.to_fence().is_empty() {
                return Some(format!("{volume:?}"));
            }
            for node in self.nodes.values() {
                let role = node.csvfs[at].as_ref().map(|csvfs| &csvfs.role);
                let good = match role {
                    Some(Role::Owner(owner)) => Some(node.id) == volume.owner && owner.epoch == volume.epoch,
                    Some(Role::Follower(epoch, owner)) => {
                        (*epoch, Some(*owner)) == (volume.epoch, volume.owner)
                            && Some(node.id) != volume.owner
                    }
                    Some(Role::Nobody) | None => false,
                };
                let before = self.quiet.as_ref().and_then(|(_, done)| done.get(&(at, node.id))).copied();
                let done = self.oracle.progress.get(&(at, node.id)).copied().unwrap_or(0);
                if !good || done < before.unwrap_or(0) + PROGRESS_MIN {
                    return Some(format!("{} gets nothing done on volume {at} ({role:?})", node.id));
                }
            }
        }
        None
    }
}
