//! A database that may lack what others have decided becomes the only one: a backup's, of a new cluster of one node, and that
//! of a node that is started by force. The first is no command: it is done on the one node, before there is a log, and what
//! comes out is the log's first snapshot. The second is written into the log together with the membership of one, so
//! that nothing is decided before it.
//!
//! What was given out meanwhile is not known, and none of it may be given out twice: epochs, generations and node numbers go
//! on above a margin that is wider than what a cluster uses between two backups, and every key below it must go before a
//! volume is mounted. The epoch in a LUN's label is a second guard: an owner of the former cluster that comes back
//! cannot begin a later one.

use super::super::ClusterDb;
use super::super::command::{Answer, FEATURE_LEVEL, NewNode};
use super::super::events::EventKind;
use super::super::key::{GENERATION_MAX, NODE_ID_MAX};
use super::super::node::{AdminState, NodeState};
use super::super::quorum_config::Witness;
use super::super::refused::Refused;
use super::super::volume::{Member, MemberState, VolumeState};
use super::{At, check_name, done, is_sha256};
use csv_types::{Epoch, NodeId};
use std::collections::BTreeMap;

/// More ownerships than a volume sees between two backups.
pub const RESTORE_EPOCHS: u64 = 1 << 20;
/// More admissions than a node sees between two backups; leaves room for about 250 restores.
pub const RESTORE_GENERATIONS: u32 = 1 << 16;
/// Nodes that may have been added after the backup.
pub const RESTORE_NODES: u32 = 16;

impl ClusterDb {
    /// Makes this, a backup's database, that of a cluster with `node` as its only one, which has the number of the node of
    /// that name. Secrets, settings, volumes and all other records stay.
    ///
    /// # Errors
    /// The backup has no such node, its feature level is above this software's, or numbers are used up. Nothing
    /// changed then.
    pub fn restore_on(&mut self, at: At, node: &NewNode) -> Result<NodeId, Refused> {
        if !self.initialised() {
            return Err(Refused::Invalid("the backup is of no cluster".into()));
        }
        check_name("node", &node.name)?;
        if node.feature_level < self.feature_level || FEATURE_LEVEL < self.feature_level {
            let (node, has, level) = (node.name.clone(), node.feature_level, self.feature_level);
            return Err(Refused::WrongVersion { node, has, level });
        }
        if !node.cert_sha256.is_empty() && !is_sha256(&node.cert_sha256) {
            return Err(Refused::Invalid(
                "the certificate's SHA-256 must be 64 lower-case hex digits".into(),
            ));
        }
        let Some(me) = self.node_by_name(&node.name).map(|node| node.id) else {
            let names: Vec<&str> = self.nodes.values().map(|node| node.name.as_str()).collect();
            return Err(Refused::Invalid(format!(
                "the backup has no node {}; its nodes are {}: restore it on one of them, or call this machine so in the \
                 section [local] of /etc/csv/csv.toml",
                node.name,
                names.join(", ")
            )));
        };
        let (highest, floor) =
            (self.generation_max(), self.generation_max().saturating_add(RESTORE_GENERATIONS));
        if floor >= GENERATION_MAX {
            return Err(Refused::TooMany {
                what: "restores".into(),
                max: u64::from(highest / RESTORE_GENERATIONS),
            });
        }
        self.raise_floors(floor);
        let gone: Vec<NodeId> = self.nodes.keys().copied().filter(|id| *id != me).collect();
        let names: Vec<String> = gone.iter().map(|id| self.node_name(*id)).collect();
        for id in gone {
            self.remove_node(id, None);
        }
        self.reset_volumes(at, me, "the cluster was restored from a backup");
        self.reset_groups(at, RESTORE_EPOCHS, "the cluster was restored from a backup");
        self.tokens.clear();
        // The witness's disk holds the log of the former cluster.
        self.quorum.witness = Witness::None;
        self.reset_node(at, me, node);
        let without = if names.is_empty() { String::new() } else { format!(" without {}", names.join(", ")) };
        let message = format!("cluster {} was restored from a backup on {}{without}", self.name, node.name);
        let name = self.name.clone();
        self.emit(at, EventKind::Restored, Some(me), &name, message);
        Ok(me)
    }

    /// The node goes on alone, whatever the others have. Its own csvfs may still have something under way, as theirs may: no
    /// node is up before it has begun a new life.
    pub(super) fn force_start(&mut self, (at, by): (At, NodeId), me: NodeId) -> Answer {
        let name = self.need_node(me)?.name.clone();
        let reason = format!("the cluster was started by force on {name}");
        // One start too many must not go on under numbers that may be in use: then no key is left to give out.
        let highest = self.generation_max();
        self.raise_floors(highest.saturating_add(RESTORE_GENERATIONS).min(GENERATION_MAX));
        for node in self.nodes.values_mut() {
            if node.state != NodeState::Joining {
                node.state = NodeState::Down;
                node.since_unix_ms = at;
                node.down_reason.clone_from(&reason);
                node.stopped = false;
                self.down_by.insert(node.id, by);
            }
            node.leaving = false;
            if node.id == me {
                node.vote = true;
                node.admin = AdminState::Active;
                node.failures.clear();
                node.quarantined_until_unix_ms = None;
            }
        }
        self.reset_volumes(at, me, &reason);
        self.reset_groups(at, RESTORE_EPOCHS, &reason);
        let message = format!(
            "{name} was started by force without quorum; what other nodes had decided alone is given up"
        );
        let cluster = self.name.clone();
        self.emit(at, EventKind::QuorumForced, Some(me), &cluster, message);
        done()
    }

    /// Highest generation that is known to have been given out.
    fn generation_max(&self) -> u32 {
        let members = self.volumes.values().flat_map(|volume| volume.members.values());
        members.map(|member| member.generation).max().unwrap_or(0).max(self.generation_floor)
    }

    fn raise_floors(&mut self, generation: u32) {
        self.generation_floor = generation;
        self.epoch_floor = self.epoch_floor.saturating_add(RESTORE_EPOCHS);
        self.next_node_id = self.next_node_id.saturating_add(RESTORE_NODES).min(NODE_ID_MAX + 1);
    }

    fn reset_node(&mut self, at: At, me: NodeId, new: &NewNode) {
        let Some(node) = self.nodes.get_mut(&me) else { return };
        node.addr = new.addr;
        node.feature_level = new.feature_level;
        node.version.clone_from(&new.version);
        node.cert_sha256.clone_from(&new.cert_sha256);
        node.vote = true;
        node.state = NodeState::Down;
        node.admin = AdminState::Active;
        node.leaving = false;
        node.failures.clear();
        node.quarantined_until_unix_ms = None;
        node.since_unix_ms = at;
        node.down_reason = "the cluster was restored from a backup".into();
        node.stopped = false;
    }

    /// Nobody owns a volume, and every key that the former cluster may have registered must go before one is mounted.
    fn reset_volumes(&mut self, at: At, me: NodeId, reason: &str) {
        let (floor, next) = (self.generation_floor, self.next_node_id);
        for volume in self.volumes.values_mut() {
            volume.epoch = Epoch(volume.epoch.0.saturating_add(RESTORE_EPOCHS));
            volume.owner = None;
            volume.state = VolumeState::Offline { reason: reason.into() };
            volume.since_unix_ms = at;
            volume.failures.clear();
            let pending = |id: u32| {
                let state = if NodeId(id) == me { MemberState::Fenced } else { MemberState::FencePending };
                (NodeId(id), Member { generation: floor, incarnation: 0, state })
            };
            volume.members = (1..next).map(pending).collect::<BTreeMap<_, _>>();
        }
    }
}
