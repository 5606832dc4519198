//! Commands of the administrator about nodes and the cluster as a whole.

use super::super::ClusterDb;
use super::super::command::{Answer, Command};
use super::super::events::EventKind;
use super::super::node::{AdminState, Node};
use super::super::quorum_config::{QuorumConfig, Witness};
use super::super::refused::Refused;
use super::super::settings::SettingError;
use super::{At, check_name, done, is_sha256, unchanged};
use csv_types::NodeId;
use std::net::IpAddr;

impl ClusterDb {
    /// The commands of this file; `None` for others.
    pub(super) fn apply_admin(&mut self, at: At, command: &Command) -> Option<Answer> {
        Some(if let Command::NodePause { node, drain } = command {
            self.node_pause(at, *node, *drain)
        } else if let Command::NodeDrained { node } = command {
            self.node_drained(at, *node)
        } else if let Command::NodeResume { node } = command {
            self.node_resume(at, *node)
        } else if let Command::NodeClearQuarantine { node } = command {
            self.node_clear_quarantine(at, *node)
        } else if let Command::NodeAddr { node, addr } = command {
            self.node_addr(at, *node, *addr)
        } else if let Command::NodeVersion { node, feature_level, version } = command {
            self.node_version(at, *node, *feature_level, version)
        } else if let Command::NodeCertificate { node, cert_sha256 } = command {
            self.node_certificate(at, *node, cert_sha256)
        } else if let Command::NodeVote { node, vote } = command {
            self.node_vote(at, *node, *vote)
        } else if let Command::QuorumSet { config } = command {
            self.quorum_set(at, config)
        } else if let Command::Setting { key, value } = command {
            self.setting(at, key, value)
        } else if let Command::RaiseFeatureLevel { level } = command {
            self.raise_feature_level(at, *level)
        } else {
            return None;
        })
    }

    /// Changes a node and writes an event about it.
    fn change_node(
        &mut self,
        at: At,
        id: NodeId,
        kind: EventKind,
        message: String,
        change: impl FnOnce(&mut Node),
    ) -> Answer {
        let Some(node) = self.nodes.get_mut(&id) else { return unchanged() };
        change(node);
        let name = node.name.clone();
        self.emit(at, kind, Some(id), &name, message);
        done()
    }

    fn node_pause(&mut self, at: At, id: NodeId, drain: bool) -> Answer {
        let node = self.need_node(id)?;
        let name = &node.name;
        let (kind, message) = if drain {
            // An idle node that is drained again is drained at once; the manager says so.
            (EventKind::NodeDraining, format!("{name} is being drained"))
        } else {
            (EventKind::NodePaused, format!("{name} is paused: it keeps its volumes and gets no more"))
        };
        let owns = !self.volumes_of(id).is_empty() || !self.groups_of(id).is_empty();
        let wanted = AdminState::paused(drain && (owns || node.admin == AdminState::Active));
        if node.admin == wanted {
            return unchanged();
        }
        self.change_node(at, id, kind, message, |node| set_admin(node, at, wanted))
    }

    fn node_drained(&mut self, at: At, id: NodeId) -> Answer {
        let node = self.need_node(id)?;
        if node.admin != AdminState::Draining {
            return unchanged();
        }
        let owned = self.volumes_of(id);
        if !owned.is_empty() {
            return Err(Refused::OwnsVolumes { node: node.name.clone(), volumes: owned.join(", ") });
        }
        let groups = self.groups_of(id);
        if !groups.is_empty() {
            return Err(Refused::OwnsGroups { node: node.name.clone(), groups: groups.join(", ") });
        }
        let message = format!("{} is drained: it owns no volume and no group any more", node.name);
        self.change_node(at, id, EventKind::NodeDrained, message, |node| {
            set_admin(node, at, AdminState::Paused)
        })
    }

    fn node_resume(&mut self, at: At, id: NodeId) -> Answer {
        let node = self.need_node(id)?;
        if node.admin == AdminState::Active && !node.leaving {
            return unchanged();
        }
        let message = format!("{} takes volumes again", node.name);
        self.change_node(at, id, EventKind::NodeResumed, message, |node| {
            set_admin(node, at, AdminState::Active);
            node.leaving = false;
        })
    }

    fn node_clear_quarantine(&mut self, at: At, id: NodeId) -> Answer {
        let node = self.need_node(id)?;
        if node.quarantined_until_unix_ms.is_none() && node.failures.is_empty() {
            return unchanged();
        }
        let message = format!("{} may come back; its failures are forgotten", node.name);
        self.change_node(at, id, EventKind::NodeQuarantineCleared, message, |node| {
            node.quarantined_until_unix_ms = None;
            node.failures.clear();
        })
    }

    fn node_addr(&mut self, at: At, id: NodeId, addr: IpAddr) -> Answer {
        let node = self.need_node(id)?;
        if node.addr == addr {
            return unchanged();
        }
        if let Some(other) = self.nodes.values().find(|other| other.addr == addr) {
            let hint = format!(" (node {}): every node needs an address of its own", other.name);
            return Err(Refused::Duplicate { what: "address".into(), name: addr.to_string(), hint });
        }
        let message = format!("{} moved from {} to {addr}", node.name, node.addr);
        self.change_node(at, id, EventKind::NodeAddressChanged, message, |node| node.addr = addr)
    }

    fn node_version(&mut self, at: At, id: NodeId, level: u32, version: &str) -> Answer {
        let node = self.need_node(id)?;
        if node.feature_level == level && node.version == version {
            return unchanged();
        }
        if level < self.feature_level {
            let node = node.name.clone();
            return Err(Refused::WrongVersion { node, has: level, level: self.feature_level });
        }
        let message = format!("{} runs csvd {version} (feature level {level})", node.name);
        self.change_node(at, id, EventKind::NodeVersionChanged, message, |node| {
            node.feature_level = level;
            node.version = version.into();
        })
    }

    fn node_certificate(&mut self, at: At, id: NodeId, cert_sha256: &str) -> Answer {
        let node = self.need_node(id)?;
        if node.cert_sha256 == cert_sha256 {
            return unchanged();
        }
        if !is_sha256(cert_sha256) {
            return Err(Refused::Invalid(
                "the certificate's SHA-256 must be 64 lower-case hex digits".into(),
            ));
        }
        let message = format!("{} has a new certificate", node.name);
        self.change_node(at, id, EventKind::NodeCertificateChanged, message, |node| {
            node.cert_sha256 = cert_sha256.into();
        })
    }

    fn node_vote(&mut self, at: At, id: NodeId, vote: bool) -> Answer {
        let node = self.need_node(id)?;
        if node.vote == vote {
            return unchanged();
        }
        if !vote && !self.nodes.values().any(|other| other.id != id && other.vote) {
            let why = "it has the only vote; give another node a vote first";
            return Err(Self::node_state(node, at, why));
        }
        let message = format!("{} {}", node.name, if vote { "has a vote" } else { "has no vote any more" });
        self.change_node(at, id, EventKind::NodeVoteChanged, message, |node| node.vote = vote)
    }

    fn quorum_set(&mut self, at: At, config: &QuorumConfig) -> Answer {
        if self.quorum == *config {
            return unchanged();
        }
        if self.quorum.witness != Witness::None
            && config.witness != Witness::None
            && self.quorum.witness != config.witness
        {
            // Both would be the same voter, with different memories.
            return Err(Refused::Invalid(format!(
                "the cluster has the {}: take it away first with `csvctl quorum set --no-witness`",
                self.quorum.witness
            )));
        }
        match &config.witness {
            Witness::None => {}
            Witness::Disk { name, lun_id, .. } => {
                check_name("witness", name)?;
                if lun_id.is_nil() {
                    return Err(Refused::Invalid(
                        "the witness LUN has no identity: format it with `csvctl quorum set --disk`".into(),
                    ));
                }
            }
            Witness::Node { name, addr } => {
                check_name("witness", name)?;
                if let Some(node) = self.nodes.values().find(|node| node.addr == *addr || node.name == *name)
                {
                    return Err(Refused::Invalid(format!(
                        "the witness must be on another machine: {name} ({addr}) is node {} of the cluster",
                        node.name
                    )));
                }
            }
        }
        self.quorum = config.clone();
        let message = format!(
            "witness: {}; dynamic quorum {}",
            config.witness,
            if config.dynamic { "on" } else { "off" }
        );
        self.emit(at, EventKind::QuorumChanged, None, "quorum", message);
        done()
    }

    fn setting(&mut self, at: At, key: &str, value: &str) -> Answer {
        let mut next = self.settings.clone();
        next.set(key, value)?;
        if next == self.settings {
            return unchanged();
        }
        // csvfs reads it when it starts. Whoever waits for a lease must not believe it to be shorter than it is.
        if next.lease_ms < self.settings.lease_ms && !self.volumes.is_empty() {
            let why = format!(
                "it is {}, and nodes go on with that for the volumes that they have: take the volumes out with `csvctl \
                 volume offline` and `csvctl volume remove`, which leaves their data alone, then lower it, then `csvctl \
                 volume add` them",
                self.settings.lease_ms
            );
            return Err(SettingError::Contradiction { key: key.into(), value: value.into(), why }.into());
        }
        self.settings = next;
        self.emit(at, EventKind::SettingChanged, None, key, format!("{key} is {value} now"));
        done()
    }

    fn raise_feature_level(&mut self, at: At, to: u32) -> Answer {
        if to == self.feature_level {
            return unchanged();
        }
        let cannot = |why: String| Err(Refused::CannotRaise { to, why });
        if to < self.feature_level {
            return cannot(format!("it is at {} and never goes down", self.feature_level));
        }
        if let Some(node) = self.nodes.values().find(|node| node.feature_level < to) {
            return cannot(format!(
                "csvd on {} knows only level {}; update it first",
                node.name, node.feature_level
            ));
        }
        self.feature_level = to;
        let name = self.name.clone();
        self.emit(at, EventKind::FeatureLevelRaised, None, &name, format!("feature level {to}"));
        done()
    }
}

/// A node that is up shows this as its state, so it counts from now; one that takes volumes again is as one that joined.
fn set_admin(node: &mut Node, at: At, admin: AdminState) {
    node.admin = admin;
    if node.is_up() {
        node.since_unix_ms = at;
    }
}
