//! Applying a command. Every handler checks everything first and changes something only then, so that a refusal leaves
//! the database as it was.

mod admin;
mod groups;
mod members;
mod nodes;
mod placement;
mod records;
mod resources;
pub(super) mod restore;
mod volumes;

use super::ClusterDb;
use super::command::{Answer, Applied, Command, Envelope};
use super::events::{EventKind, NewEvent};
use super::node::Node;
use super::refused::Refused;
use super::volume::Volume;
use csv_types::{Epoch, NodeId};

/// The time of the command that is being applied (Unix ms).
type At = u64;

/// Bytes of a name.
const NAME_BYTES_MAX: usize = 64;

impl ClusterDb {
    /// Applies a command.
    ///
    /// # Errors
    /// Refused; nothing changed. The text is for the administrator.
    pub fn apply(&mut self, envelope: &Envelope) -> Answer {
        let Envelope { at_unix_ms: at, by, command } = envelope;
        if let Command::Init(init) = command {
            return self.init(*at, init);
        }
        if !self.initialised() {
            return Err(Refused::NoCluster);
        }
        let needed = command.min_level();
        if needed > self.feature_level {
            return Err(Refused::FeatureLevel { needed, level: self.feature_level });
        }
        self.apply_node(*at, *by, command)
            .or_else(|| self.apply_volume(*at, command))
            .or_else(|| self.apply_owner(*at, command))
            .or_else(|| self.apply_admin(*at, command))
            .or_else(|| self.apply_record(*at, command))
            .or_else(|| self.apply_group(*at, command))
            .or_else(|| self.apply_resource(*at, command))
            .unwrap_or_else(|| Err(Refused::Invalid("this version of csvd does not know the command".into())))
    }

    /// Writes an event into the log.
    fn emit(&mut self, at: At, kind: EventKind, node: Option<NodeId>, subject: &str, message: String) {
        self.events.push(NewEvent {
            id: kind.id(),
            at_unix_ms: at,
            node,
            subject: subject.into(),
            level: kind.level(),
            message,
        });
    }

    fn need_node(&self, id: NodeId) -> Result<&Node, Refused> {
        self.nodes
            .get(&id)
            .ok_or_else(|| Refused::NotFound { what: "node number".into(), name: id.0.to_string() })
    }

    fn need_volume(&self, name: &str) -> Result<&Volume, Refused> {
        self.volumes.get(name).ok_or_else(|| Refused::NotFound { what: "volume".into(), name: name.into() })
    }

    /// The volume, if it still is at that epoch.
    fn need_epoch(&self, name: &str, epoch: Epoch) -> Result<&Volume, Refused> {
        let volume = self.need_volume(name)?;
        if volume.epoch == epoch {
            Ok(volume)
        } else {
            Err(Refused::StaleEpoch { volume: name.into(), got: epoch.0, current: volume.epoch.0 })
        }
    }

    /// The volume, if it still is at that epoch and that node owns it.
    fn need_owner(&self, name: &str, epoch: Epoch, node: NodeId) -> Result<&Volume, Refused> {
        let volume = self.need_epoch(name, epoch)?;
        if volume.owner == Some(node) {
            return Ok(volume);
        }
        let owner = volume.owner.map_or_else(|| "nobody".into(), |owner| self.node_name(owner));
        Err(Refused::NotOwner { volume: name.into(), node: self.node_name(node), owner })
    }

    fn volume_state(volume: &Volume, why: &str) -> Refused {
        Refused::VolumeState { volume: volume.name.clone(), state: volume.state.to_string(), why: why.into() }
    }

    fn node_state(node: &Node, at: At, why: &str) -> Refused {
        let state = node.display_state(at).to_string();
        Refused::NodeState { node: node.name.clone(), state, why: why.into() }
    }
}

/// Names of nodes, volumes, groups, resources become directories, certificate names and arguments.
fn check_name(what: &str, name: &str) -> Result<(), Refused> {
    let why = if name.is_empty() || name.len() > NAME_BYTES_MAX {
        "it must have 1 to 64 bytes"
    } else if name.starts_with(['.', '-']) {
        "it must not begin with a dot or a dash"
    } else if name.contains(|c: char| c == '/' || c == '\\' || c.is_control() || c.is_whitespace()) {
        "it must not have slashes, blanks or control characters"
    } else {
        return Ok(());
    };
    Err(Refused::BadName { what: what.into(), name: name.into(), why: why.into() })
}

/// SHA-256 as lower-case hex.
fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

fn done() -> Answer {
    Ok(Applied::Done)
}

fn unchanged() -> Answer {
    Ok(Applied::Unchanged)
}
