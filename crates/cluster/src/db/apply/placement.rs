//! Commands that move a volume between owners.

use super::super::ClusterDb;
use super::super::command::{Answer, Applied, Command};
use super::super::events::EventKind;
use super::super::refused::Refused;
use super::super::volume::{FAILURES_MAX, Member, MemberState, StartFailure, Volume, VolumeState};
use super::{At, done, unchanged};
use csv_types::{Epoch, NodeId};

impl ClusterDb {
    /// The commands of this file; `None` for others.
    pub(super) fn apply_owner(&mut self, at: At, command: &Command) -> Option<Answer> {
        Some(if let Command::VolumeAssign { name, from_epoch, to, reason } = command {
            self.volume_assign(at, name, *from_epoch, *to, reason)
        } else if let Command::VolumeOnline { name, epoch, node, fenced } = command {
            self.volume_online(at, name, *epoch, *node, fenced)
        } else if let Command::VolumeStartFailed { name, epoch, node, why } = command {
            self.volume_start_failed(at, name, *epoch, *node, why)
        } else if let Command::VolumeRelease { name, epoch, to, reason } = command {
            self.volume_release(at, name, *epoch, *to, reason)
        } else if let Command::VolumeReleased { name, epoch, node } = command {
            self.volume_released(at, name, *epoch, *node)
        } else if let Command::VolumeClosed { name, epoch, node, why } = command {
            self.volume_closed(at, name, *epoch, *node, why)
        } else if let Command::VolumeReleaseCancelled { name, epoch, node, reason } = command {
            self.volume_release_cancelled(at, name, *epoch, *node, reason)
        } else if let Command::VolumeUnowned { name, from_epoch, reason } = command {
            self.volume_unowned(at, name, *from_epoch, reason)
        } else if let Command::VolumeFail { name, from_epoch, reason } = command {
            self.volume_fail(at, name, *from_epoch, reason)
        } else {
            return self.apply_member(at, command);
        })
    }

    /// May `to` own the volume? Its membership as the owner.
    fn check_target(&self, at: At, volume: &Volume, to: NodeId) -> Result<Member, Refused> {
        let node = self.need_node(to)?;
        if !node.takes_volumes() {
            let why = "it cannot be given a volume; choose a node that is Up";
            return Err(Self::node_state(node, at, why));
        }
        self.admission(at, volume, node)
    }

    /// Makes `to` the owner under the next epoch. The caller has checked it.
    fn give(&mut self, at: At, name: &str, to: NodeId, member: Member, reason: &str) -> Answer {
        let shown = self.node_name(to);
        let Some(volume) = self.volumes.get_mut(name) else { return unchanged() };
        volume.epoch = Epoch(volume.epoch.0 + 1);
        volume.owner = Some(to);
        volume.members.insert(to, member);
        volume.state = VolumeState::Starting { reason: reason.into() };
        volume.since_unix_ms = at;
        let epoch = volume.epoch;
        let message = format!("volume {name} goes to {shown} (epoch {epoch}): {reason}");
        self.emit(at, EventKind::VolumeAssigned, Some(to), name, message);
        Ok(Applied::Epoch(epoch))
    }

    /// Takes the volume from an owner that has not released it: whatever it may still write must be fenced.
    fn dispossess(&mut self, at: At, name: &str, reason: &str) {
        let Some(volume) = self.volumes.get_mut(name) else { return };
        let Some(last) = volume.owner.take() else { return };
        let started = matches!(volume.state, VolumeState::Starting { .. });
        if started {
            remember_failure(volume, last, at, "it did not get the volume online");
        }
        let Some(member) = volume.members.get_mut(&last) else { return };
        if member.state != MemberState::Admitted {
            return;
        }
        member.state = MemberState::FencePending;
        let shown = self.node_name(last);
        let message = format!("{shown} must be fenced from {name}: {reason}");
        self.emit(at, EventKind::FenceOrdered, Some(last), &shown, message);
    }

    fn volume_assign(&mut self, at: At, name: &str, from: Epoch, to: NodeId, reason: &str) -> Answer {
        let volume = self.need_epoch(name, from)?;
        if !volume.want_online {
            let why = format!("it is to stay offline; run `csvctl volume online {name}` first");
            return Err(Self::volume_state(volume, &why));
        }
        if matches!(volume.state, VolumeState::Failed { .. }) {
            let why = format!("find out why it could not start, then run `csvctl volume online {name}`");
            return Err(Self::volume_state(volume, &why));
        }
        let member = self.check_target(at, volume, to)?;
        if volume.owner != Some(to) {
            self.dispossess(at, name, reason);
        }
        self.give(at, name, to, member, reason)
    }

    fn volume_online(
        &mut self,
        at: At,
        name: &str,
        epoch: Epoch,
        id: NodeId,
        fenced: &[(NodeId, u32)],
    ) -> Answer {
        let volume = self.need_owner(name, epoch, id)?;
        match &volume.state {
            VolumeState::Starting { .. } => {}
            VolumeState::Online => return unchanged(),
            VolumeState::Offline { .. } | VolumeState::Releasing { .. } | VolumeState::Failed { .. } => {
                return Err(Self::volume_state(volume, "only a volume that is Starting can go online"));
            }
        }
        if !self.owner_stands(volume) {
            return Err(Self::volume_state(volume, "its owner was given up and may not write it any more"));
        }
        let left = volume.to_fence().into_iter().find(|pending| !fenced.contains(pending));
        if let Some((node, generation)) = left {
            return Err(Refused::FencePending {
                volume: name.into(),
                node: self.node_name(node),
                generation,
            });
        }
        let gone = self.mark_fenced(name, fenced);
        self.emit_fenced(at, name, &gone);
        let shown = self.node_name(id);
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.state = VolumeState::Online;
            volume.since_unix_ms = at;
            volume.failures.clear();
        }
        let message = format!("volume {name} is online on {shown} (epoch {epoch})");
        self.emit(at, EventKind::VolumeOnline, Some(id), name, message);
        done()
    }

    fn volume_start_failed(&mut self, at: At, name: &str, epoch: Epoch, id: NodeId, why: &str) -> Answer {
        let volume = self.need_owner(name, epoch, id)?;
        if !matches!(volume.state, VolumeState::Starting { .. }) {
            return Err(Self::volume_state(volume, "it is not Starting"));
        }
        let shown = self.node_name(id);
        if let Some(volume) = self.volumes.get_mut(name) {
            remember_failure(volume, id, at, why);
            volume.owner = None;
            volume.state =
                VolumeState::Offline { reason: format!("could not be brought online on {shown}: {why}") };
            volume.since_unix_ms = at;
        }
        let message = format!("volume {name} could not be brought online on {shown}: {why}");
        self.emit(at, EventKind::VolumeStartFailed, Some(id), name, message);
        done()
    }

    fn volume_release(
        &mut self,
        at: At,
        name: &str,
        epoch: Epoch,
        to: Option<NodeId>,
        reason: &str,
    ) -> Answer {
        let volume = self.need_epoch(name, epoch)?;
        match &volume.state {
            VolumeState::Online => {}
            VolumeState::Releasing { to: already, .. } if *already == to => return unchanged(),
            VolumeState::Offline { .. }
            | VolumeState::Starting { .. }
            | VolumeState::Releasing { .. }
            | VolumeState::Failed { .. } => {
                return Err(Self::volume_state(
                    volume,
                    "only a volume that is Online can be moved; wait for it",
                ));
            }
        }
        match to {
            None if volume.want_online => {
                let why =
                    format!("it is wanted online; run `csvctl volume offline {name}` to take it offline");
                return Err(Self::volume_state(volume, &why));
            }
            None => {}
            Some(to) if volume.owner == Some(to) => {
                return Err(Self::volume_state(volume, &format!("{} owns it already", self.node_name(to))));
            }
            Some(to) => {
                self.check_target(at, volume, to)?;
            }
        }
        self.begin_release(at, name, to, reason);
        done()
    }

    pub(super) fn begin_release(&mut self, at: At, name: &str, to: Option<NodeId>, reason: &str) {
        let target = to.map_or_else(|| "nobody".into(), |to| self.node_name(to));
        let Some(volume) = self.volumes.get_mut(name) else { return };
        volume.state = VolumeState::Releasing { to, reason: reason.into() };
        volume.since_unix_ms = at;
        let owner = volume.owner;
        let from = owner.map_or_else(String::new, |owner| self.node_name(owner));
        let message = format!("volume {name} moves from {from} to {target}: {reason}");
        self.emit(at, EventKind::VolumeReleasing, owner, name, message);
    }

    fn volume_released(&mut self, at: At, name: &str, epoch: Epoch, id: NodeId) -> Answer {
        let volume = self.need_owner(name, epoch, id)?;
        let VolumeState::Releasing { to, reason } = &volume.state else {
            return Err(Self::volume_state(volume, "it is not being moved"));
        };
        let (to, reason, want_online) = (*to, reason.clone(), volume.want_online);
        let target = to.filter(|_| want_online).map(|to| (to, self.check_target(at, volume, to)));
        let shown = self.node_name(id);
        let message = format!("{shown} has released volume {name}");
        self.emit(at, EventKind::VolumeReleased, Some(id), name, message);
        if let Some((to, Ok(member))) = target {
            return self.give(at, name, to, member, &reason);
        }
        let reason = match target {
            Some((_, Err(why))) => format!("released by {shown}, but: {why}"),
            Some((_, Ok(_))) | None if to.is_some() => "it was taken offline".into(),
            Some((_, Ok(_))) | None => reason,
        };
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.owner = None;
            volume.state = VolumeState::Offline { reason: reason.clone() };
            volume.since_unix_ms = at;
        }
        let message = format!("volume {name} is offline: {reason}");
        self.emit(at, EventKind::VolumeOffline, None, name, message);
        done()
    }

    fn volume_closed(&mut self, at: At, name: &str, epoch: Epoch, id: NodeId, why: &str) -> Answer {
        let volume = self.need_owner(name, epoch, id)?;
        match &volume.state {
            VolumeState::Starting { .. } => return self.volume_start_failed(at, name, epoch, id, why),
            VolumeState::Releasing { .. } => return self.volume_released(at, name, epoch, id),
            VolumeState::Online | VolumeState::Offline { .. } | VolumeState::Failed { .. } => {}
        }
        let shown = self.node_name(id);
        let reason = format!("{why} on {shown}; the file system is closed there");
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.owner = None;
            volume.state = VolumeState::Offline { reason: reason.clone() };
            volume.since_unix_ms = at;
        }
        self.emit(at, EventKind::VolumeUnowned, Some(id), name, format!("volume {name}: {reason}"));
        done()
    }

    fn volume_release_cancelled(
        &mut self,
        at: At,
        name: &str,
        epoch: Epoch,
        id: NodeId,
        reason: &str,
    ) -> Answer {
        let volume = self.need_owner(name, epoch, id)?;
        match &volume.state {
            VolumeState::Releasing { .. } => {}
            VolumeState::Online => return unchanged(),
            VolumeState::Offline { .. } | VolumeState::Starting { .. } | VolumeState::Failed { .. } => {
                return Err(Self::volume_state(volume, "it is not being moved"));
            }
        }
        if !self.owner_stands(volume) {
            return Err(Self::volume_state(volume, "its owner was given up and may not write it any more"));
        }
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.state = VolumeState::Online;
            volume.since_unix_ms = at;
        }
        let message = format!("volume {name} stays on {}: {reason}", self.node_name(id));
        self.emit(at, EventKind::VolumeReleaseCancelled, Some(id), name, message);
        done()
    }

    fn volume_unowned(&mut self, at: At, name: &str, from: Epoch, reason: &str) -> Answer {
        let volume = self.need_epoch(name, from)?;
        match &volume.state {
            VolumeState::Offline { reason: already } if already == reason => return unchanged(),
            VolumeState::Failed { .. } => {
                return Err(Self::volume_state(volume, "it has no owner already"));
            }
            VolumeState::Offline { .. }
            | VolumeState::Starting { .. }
            | VolumeState::Online
            | VolumeState::Releasing { .. } => {}
        }
        self.dispossess(at, name, reason);
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.state = VolumeState::Offline { reason: reason.into() };
            volume.since_unix_ms = at;
        }
        let message = format!("volume {name} is offline: {reason}");
        self.emit(at, EventKind::VolumeUnowned, None, name, message);
        done()
    }

    fn volume_fail(&mut self, at: At, name: &str, from: Epoch, reason: &str) -> Answer {
        let volume = self.need_epoch(name, from)?;
        match &volume.state {
            VolumeState::Offline { .. } => {}
            VolumeState::Failed { .. } => return unchanged(),
            VolumeState::Starting { .. } | VolumeState::Online | VolumeState::Releasing { .. } => {
                return Err(Self::volume_state(volume, "it has an owner"));
            }
        }
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.state = VolumeState::Failed { reason: reason.into() };
            volume.since_unix_ms = at;
        }
        self.emit(at, EventKind::VolumeFailed, None, name, format!("volume {name} failed: {reason}"));
        done()
    }
}

fn remember_failure(volume: &mut Volume, node: NodeId, at: At, why: &str) {
    if volume.failures.len() >= FAILURES_MAX {
        volume.failures.remove(0);
    }
    volume.failures.push(StartFailure { node, at_unix_ms: at, why: why.into() });
}
