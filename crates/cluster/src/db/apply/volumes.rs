//! Commands of the administrator about volumes.

use super::super::command::{Answer, Command};
use super::super::events::EventKind;
use super::super::refused::Refused;
use super::super::volume::{FILE_SYSTEMS, Volume, VolumeState};
use super::super::{ClusterDb, VOLUMES_MAX};
use super::{At, check_name, done, unchanged};
use csv_types::{Epoch, NodeId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

impl ClusterDb {
    /// The commands of this file; `None` for others.
    pub(super) fn apply_volume(&mut self, at: At, command: &Command) -> Option<Answer> {
        Some(if let Command::VolumeAdd { name, id, fs, preferred, label_epoch } = command {
            self.volume_add(at, name, (*id, fs, *label_epoch), preferred)
        } else if let Command::VolumeRemove { name } = command {
            self.volume_remove(at, name)
        } else if let Command::VolumeOffline { name, reason } = command {
            self.volume_offline(at, name, reason)
        } else if let Command::VolumeBringOnline { name } = command {
            self.volume_bring_online(at, name)
        } else if let Command::VolumePreferred { name, preferred } = command {
            self.volume_preferred(at, name, preferred)
        } else {
            return None;
        })
    }

    fn check_preferred(&self, preferred: &[NodeId]) -> Result<(), Refused> {
        let mut seen = BTreeSet::new();
        for &id in preferred {
            let node = self.need_node(id)?;
            if !seen.insert(id) {
                return Err(Refused::Invalid(format!(
                    "{} stands twice among the preferred owners",
                    node.name
                )));
            }
        }
        Ok(())
    }

    fn volume_add(
        &mut self,
        at: At,
        name: &str,
        (id, fs, label_epoch): (VolumeId, &str, Epoch),
        preferred: &[NodeId],
    ) -> Answer {
        check_name("volume", name)?;
        let duplicate = |what: &str, name: String, hint: &str| Refused::Duplicate {
            what: what.into(),
            name,
            hint: hint.into(),
        };
        if self.volumes.contains_key(name) {
            return Err(duplicate("volume", name.into(), ": choose another name"));
        }
        if let Some(other) = self.volumes.values().find(|volume| volume.id == id) {
            let hint = format!(" as {}: a LUN can be one volume only", other.name);
            return Err(duplicate("volume with id", id.to_string(), &hint));
        }
        if self.volumes.len() >= VOLUMES_MAX {
            return Err(Refused::TooMany { what: "volumes".into(), max: VOLUMES_MAX as u64 });
        }
        if !FILE_SYSTEMS.contains(&fs) {
            return Err(Refused::Invalid(format!(
                "file system \"{fs}\" is not one of {}",
                FILE_SYSTEMS.join(", ")
            )));
        }
        self.check_preferred(preferred)?;
        let volume = Volume {
            name: name.into(),
            id,
            fs: fs.into(),
            index: (0..u16::MAX)
                .find(|index| self.volumes.values().all(|volume| volume.index != *index))
                .unwrap_or(u16::MAX),
            preferred: preferred.to_vec(),
            want_online: true,
            owner: None,
            epoch: Epoch(label_epoch.0.max(self.epoch_floor)),
            state: VolumeState::Offline { reason: "it was just added".into() },
            members: BTreeMap::new(),
            since_unix_ms: at,
            failures: Vec::new(),
        };
        self.volumes.insert(name.into(), volume);
        self.emit(at, EventKind::VolumeAdded, None, name, format!("volume {name} ({fs}, {id}) was added"));
        done()
    }

    fn volume_remove(&mut self, at: At, name: &str) -> Answer {
        let volume = self.need_volume(name)?;
        if volume.state.owned() || volume.want_online {
            let why = format!("take it offline first with `csvctl volume offline {name}`");
            return Err(Self::volume_state(volume, &why));
        }
        if let Some((node, generation)) = volume.to_fence().first() {
            let (volume, node, generation) = (name.into(), self.node_name(*node), *generation);
            return Err(Refused::FencePending { volume, node, generation });
        }
        let generation = volume.members.values().map(|member| member.generation).max().unwrap_or(0);
        self.epoch_floor = self.epoch_floor.max(volume.epoch.0);
        self.generation_floor = self.generation_floor.max(generation);
        self.volumes.remove(name);
        self.properties.retain(|key, _| !is_property_of(name, key));
        self.emit(at, EventKind::VolumeRemoved, None, name, format!("volume {name} was removed"));
        done()
    }

    fn volume_offline(&mut self, at: At, name: &str, reason: &str) -> Answer {
        let volume = self.need_volume(name)?;
        if !volume.want_online {
            return unchanged();
        }
        let state = volume.state.clone();
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.want_online = false;
            if !state.owned() {
                volume.state = VolumeState::Offline { reason: reason.into() };
                volume.since_unix_ms = at;
            }
        }
        let message = format!("volume {name} is to be offline: {reason}");
        self.emit(at, EventKind::VolumeOffline, None, name, message);
        // A start or a move under way ends first; then the manager sees that nobody wants the volume online.
        if state == VolumeState::Online {
            self.begin_release(at, name, None, reason);
        }
        done()
    }

    fn volume_bring_online(&mut self, at: At, name: &str) -> Answer {
        let volume = self.need_volume(name)?;
        let failed = matches!(volume.state, VolumeState::Failed { .. });
        if volume.want_online && !failed && volume.failures.is_empty() {
            return unchanged();
        }
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.want_online = true;
            volume.failures.clear();
            if !volume.state.owned() {
                volume.state = VolumeState::Offline { reason: "it is to be brought online".into() };
                volume.since_unix_ms = at;
            }
        }
        let message = format!("volume {name} is to be brought online");
        self.emit(at, EventKind::VolumeBroughtOnline, None, name, message);
        done()
    }

    fn volume_preferred(&mut self, at: At, name: &str, preferred: &[NodeId]) -> Answer {
        let volume = self.need_volume(name)?;
        if volume.preferred == preferred {
            return unchanged();
        }
        self.check_preferred(preferred)?;
        let names: Vec<String> = preferred.iter().map(|id| self.node_name(*id)).collect();
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.preferred = preferred.to_vec();
        }
        let list = if names.is_empty() { "any node".into() } else { names.join(", ") };
        let message = format!("volume {name} prefers {list}");
        self.emit(at, EventKind::VolumePreferredChanged, None, name, message);
        done()
    }
}

/// Is that property one of the volume's (`volume.<name>.redirect` for example)? Names may have dots, so those of volume `a.b` must
/// not be taken for those of `a`.
fn is_property_of(name: &str, key: &str) -> bool {
    let own = key
        .strip_prefix("volume.")
        .and_then(|key| key.strip_prefix(name))
        .and_then(|key| key.strip_prefix('.'));
    own.is_some_and(|own| {
        let node = own.strip_prefix("registered.").unwrap_or_default();
        !own.contains('.') || (!node.is_empty() && node.bytes().all(|byte| byte.is_ascii_digit()))
    })
}
