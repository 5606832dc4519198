//! Who may write a LUN: admission and fencing.

use super::super::ClusterDb;
use super::super::command::{Answer, Applied, Command};
use super::super::events::EventKind;
use super::super::key::{GENERATION_MAX, reservation_key};
use super::super::node::Node;
use super::super::refused::Refused;
use super::super::volume::{Member, MemberState, Volume};
use super::{At, done, unchanged};
use csv_types::{Epoch, NodeId};

impl ClusterDb {
    /// The commands of this file; `None` for others.
    pub(super) fn apply_member(&mut self, at: At, command: &Command) -> Option<Answer> {
        Some(if let Command::VolumeFence { name, epoch, node, generation, reason } = command {
            self.volume_fence(at, name, *epoch, (*node, *generation), reason)
        } else if let Command::VolumeFenced { name, epoch, fenced } = command {
            self.volume_fenced(at, name, *epoch, fenced)
        } else if let Command::VolumeAdmit { name, node, incarnation, from_generation } = command {
            self.volume_admit(at, name, *node, *incarnation, *from_generation)
        } else if let Command::VolumeWithdraw { name, node, incarnation, generation } = command {
            self.volume_withdraw(at, name, *node, *incarnation, *generation)
        } else {
            return None;
        })
    }

    /// Each key with which the node may write must go, on every volume.
    pub(super) fn order_fences(&mut self, at: At, id: NodeId, reason: &str) {
        let mut volumes = Vec::new();
        for volume in self.volumes.values_mut() {
            let Some(member) = volume.members.get_mut(&id) else { continue };
            if member.state == MemberState::Admitted {
                member.state = MemberState::FencePending;
                volumes.push(volume.name.clone());
            }
        }
        if !volumes.is_empty() {
            let name = self.node_name(id);
            let message = format!("{name} must be fenced from {}: {reason}", volumes.join(", "));
            self.emit(at, EventKind::FenceOrdered, Some(id), &name, message);
        }
    }

    /// The node's admission that it has or would get as the owner of that volume.
    pub(super) fn admission(&self, at: At, volume: &Volume, node: &Node) -> Result<Member, Refused> {
        match volume.members.get(&node.id) {
            Some(member) if member.incarnation == node.incarnation => match member.state {
                MemberState::Admitted => Ok(*member),
                // Only the node itself knows that nothing is left of what it had: a key that it did not ask for would let
                // that write again.
                MemberState::Fenced => {
                    let why = format!(
                        "it was fenced from volume {} and has not asked to be admitted again; wait for that",
                        volume.name
                    );
                    Err(Self::node_state(node, at, &why))
                }
                MemberState::FencePending => Err(Refused::FencePending {
                    volume: volume.name.clone(),
                    node: node.name.clone(),
                    generation: member.generation,
                }),
            },
            // An earlier incarnation has ended, by the node's own word (see `node`): its key is replaced.
            Some(_) | None => self.next_admission(volume, node),
        }
    }

    fn next_admission(&self, volume: &Volume, node: &Node) -> Result<Member, Refused> {
        let last = volume.members.get(&node.id).map_or(self.generation_floor, |member| member.generation);
        if last >= GENERATION_MAX {
            let what = format!("keys of {} on volume {}", node.name, volume.name);
            return Err(Refused::TooMany { what, max: u64::from(GENERATION_MAX) });
        }
        Ok(Member { generation: last + 1, incarnation: node.incarnation, state: MemberState::Admitted })
    }

    /// Marks what the owner says that it fenced. What is not pending under that generation is passed over: a list that
    /// was made from an older copy of the database. Returns the names for the event.
    pub(super) fn mark_fenced(&mut self, name: &str, fenced: &[(NodeId, u32)]) -> Vec<String> {
        let mut gone = Vec::new();
        for (node, generation) in fenced {
            let exists = self.nodes.contains_key(node);
            let shown = self.node_name(*node);
            let Some(volume) = self.volumes.get_mut(name) else { continue };
            let Some(member) = volume.members.get_mut(node) else { continue };
            if member.state == MemberState::FencePending && member.generation == *generation {
                member.state = MemberState::Fenced;
                gone.push(shown);
                if !exists {
                    volume.members.remove(node);
                }
            }
        }
        gone
    }

    pub(super) fn emit_fenced(&mut self, at: At, name: &str, gone: &[String]) {
        if !gone.is_empty() {
            let message = format!("{} can write volume {name} no more", gone.join(", "));
            self.emit(at, EventKind::Fenced, None, name, message);
        }
    }

    fn volume_fence(
        &mut self,
        at: At,
        name: &str,
        epoch: Epoch,
        (id, generation): (NodeId, u32),
        reason: &str,
    ) -> Answer {
        let volume = self.need_epoch(name, epoch)?;
        if volume.owner.is_none() || volume.owner == Some(id) {
            return Err(Self::volume_state(volume, "only an owner can have other nodes fenced"));
        }
        let node = self.node_name(id);
        let Some(member) = volume.members.get(&id) else {
            return Err(Refused::NotFound { what: format!("member of volume {name}"), name: node });
        };
        if member.generation != generation {
            let (volume, current) = (name.into(), member.generation);
            return Err(Refused::StaleGeneration { volume, node, got: generation, current });
        }
        if member.state != MemberState::Admitted {
            return unchanged();
        }
        if let Some(member) = self.volumes.get_mut(name).and_then(|volume| volume.members.get_mut(&id)) {
            member.state = MemberState::FencePending;
        }
        let message = format!("{node} must be fenced from {name}: {reason}");
        self.emit(at, EventKind::FenceOrdered, Some(id), &node, message);
        done()
    }

    fn volume_fenced(&mut self, at: At, name: &str, epoch: Epoch, fenced: &[(NodeId, u32)]) -> Answer {
        let volume = self.need_epoch(name, epoch)?;
        if volume.owner.is_none() {
            return Err(Self::volume_state(volume, "only an owner fences"));
        }
        let gone = self.mark_fenced(name, fenced);
        if gone.is_empty() {
            return unchanged();
        }
        self.emit_fenced(at, name, &gone);
        done()
    }

    fn volume_withdraw(
        &mut self,
        at: At,
        name: &str,
        id: NodeId,
        incarnation: u64,
        generation: u32,
    ) -> Answer {
        let volume = self.need_volume(name)?;
        let node = self.need_node(id)?;
        let shown = node.name.clone();
        let Some(member) = volume.members.get(&id) else { return unchanged() };
        if member.generation != generation {
            let (volume, node, current) = (name.into(), shown, member.generation);
            return Err(Refused::StaleGeneration { volume, node, got: generation, current });
        }
        if member.incarnation != incarnation {
            let (node, current) = (shown, member.incarnation);
            return Err(Refused::StaleIncarnation { node, got: incarnation, current });
        }
        if volume.owner == Some(id) {
            return Err(Self::volume_state(volume, "its owner must release it first"));
        }
        if member.state == MemberState::Fenced {
            return unchanged();
        }
        if let Some(member) = self.volumes.get_mut(name).and_then(|volume| volume.members.get_mut(&id)) {
            member.state = MemberState::Fenced;
        }
        let message = format!("{shown} has given up its way to the LUN of volume {name}");
        self.emit(at, EventKind::MemberWithdrawn, Some(id), &shown, message);
        done()
    }

    fn volume_admit(&mut self, at: At, name: &str, id: NodeId, incarnation: u64, from: u32) -> Answer {
        let volume = self.need_volume(name)?;
        let node = self.need_node(id)?;
        if incarnation != node.incarnation {
            let (node, current) = (node.name.clone(), node.incarnation);
            return Err(Refused::StaleIncarnation { node, got: incarnation, current });
        }
        if !node.is_up() {
            return Err(Self::node_state(node, at, "only a node that is up can be admitted"));
        }
        let member = volume.members.get(&id);
        let current = member.map_or(0, |member| member.generation);
        if from != current {
            let (volume, node) = (name.into(), node.name.clone());
            return Err(Refused::StaleGeneration { volume, node, got: from, current });
        }
        // As in `admission`: an earlier life has ended by the node's own word. An owner must have lost the volume before.
        let pending = |member: &Member| {
            let back = member.incarnation < incarnation && volume.owner != Some(id);
            member.state == MemberState::FencePending && !back
        };
        if member.is_some_and(pending) {
            let (volume, node) = (name.into(), node.name.clone());
            return Err(Refused::FencePending { volume, node, generation: current });
        }
        let next = self.next_admission(volume, node)?;
        let (shown, key) = (node.name.clone(), reservation_key(self.id, id, next.generation));
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.members.insert(id, next);
        }
        let message = format!("{shown} may write volume {name} (generation {})", next.generation);
        self.emit(at, EventKind::MemberAdmitted, Some(id), &shown, message);
        Ok(Applied::Member { generation: next.generation, key })
    }
}
