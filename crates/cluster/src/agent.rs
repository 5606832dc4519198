//! What a node does next about one volume. A pure function of the database, of what csvfs is there, and of what this node
//! has registered on the LUN: level-triggered, so a step that was lost, repeated or overtaken does no harm. csvd carries
//! the step out and asks again.
//!
//! Order of the rules (the first that applies):
//! 1. A node that is not up in its incarnation, or has no quorum, stops its I/O ([`Step::Suspend`]): it may be presumed dead.
//! 2. A node that was fenced, or is to be, stops likewise; what it had is gone. Only when csvfs has no role any more and has
//!    stopped (a csvfs without a role may hold layouts all the same) the node asks to be admitted again.
//! 3. A node with a path registers its key before csvfs is started ([`may_start`]) or may use the path.
//! 4. The owner: fences whoever must go, then takes; fences while online; hands over.
//! 5. Everybody else follows the owner, once the volume is online there.
//!
//! Why a registration never revives an old writer: a node asks for a new generation only after csvfs has confirmed
//! that nothing of the old one is under way (`Suspend` is carried out), and a fence names the generation that it is against.

use crate::db::{ClusterDb, MemberState, NodeState, Volume, VolumeState};
use csv_types::{Epoch, NodeId};

/// What csvfs is for the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It does not run.
    Gone,
    /// It runs and does not answer, or nobody has looked yet whether it runs.
    Silent,
    /// It runs and has no role.
    Nobody,
    /// It coordinates the volume.
    Owner(Epoch),
    /// It is a data server.
    Follower(Epoch, NodeId),
}

/// What is the case on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// This node.
    pub me: NodeId,
    /// Its incarnation.
    pub incarnation: u64,
    /// Why this node must not go on (no quorum), if so.
    pub cut_off: Option<String>,
    /// It has a path to the LUN that can be used.
    pub path: bool,
    /// What csvfs is.
    pub role: Role,
    /// csvfs does no direct I/O and has none under way.
    pub suspended: bool,
    /// csvfs was refused by the LUN.
    pub fenced: bool,
    /// Generation whose key is registered on the LUN by this node.
    pub registered: Option<u32>,
    /// Who was fenced by this node for the present take-over.
    pub fenced_others: Vec<(NodeId, u32)>,
}

/// What to do now. Steps with an epoch are void in any other one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Wait,
    /// Stop csvfs's I/O; a coordinator ends without writing.
    Suspend {
        /// Why.
        reason: String,
    },
    /// Propose `VolumeAdmit`.
    Admit {
        /// Generation that is known now; 0 for none.
        from_generation: u32,
    },
    /// Register the key of this generation on the LUN.
    Register {
        /// The generation.
        generation: u32,
    },
    /// Nothing of what this node had is left, and it is still to be fenced, while nobody owns the volume who could do that:
    /// take its key off the LUN, then propose `VolumeWithdraw`.
    Withdraw {
        /// The generation that is given up.
        generation: u32,
    },
    /// Fence these, then let csvfs take the volume, then propose `VolumeOnline`. On failure propose `VolumeStartFailed`.
    Take {
        /// Epoch of the ownership.
        epoch: Epoch,
        /// Members whose keys must go.
        fence: Vec<(NodeId, u32)>,
    },
    /// csvfs coordinates; the database does not know yet: propose `VolumeOnline`.
    TellOnline {
        /// Epoch of the ownership.
        epoch: Epoch,
    },
    /// Fence these, tell csvfs that they are gone, then propose `VolumeFenced`.
    Fence {
        /// Epoch of the ownership.
        epoch: Epoch,
        /// Members whose keys must go.
        fence: Vec<(NodeId, u32)>,
    },
    /// Let csvfs hand over, then propose `VolumeReleased`.
    HandOver {
        /// Epoch of the ownership that ends.
        epoch: Epoch,
    },
    /// csvfs does not coordinate the volume any more, which the database does not know: see that the file system is closed here, then propose `VolumeClosed`.
    Close {
        /// Epoch of the ownership that ends.
        epoch: Epoch,
    },
    /// Let csvfs follow this owner.
    Follow {
        /// Epoch of the ownership.
        epoch: Epoch,
        /// The owner.
        owner: NodeId,
    },
}

/// The step for this volume. See the module's text.
#[must_use]
pub fn next_step(db: &ClusterDb, volume: &Volume, local: &Local) -> Step {
    if local.role == Role::Silent {
        return Step::Wait;
    }
    if let Some(reason) = cut_off(db, local) {
        return if local.suspended || local.role == Role::Gone {
            Step::Wait
        } else {
            Step::Suspend { reason }
        };
    }
    if let Some(reason) = lost(volume, local) {
        return Step::Suspend { reason };
    }
    if local.path
        && let Some(step) = membership(volume, local)
    {
        return step;
    }
    if local.role == Role::Gone {
        let epoch = volume.epoch;
        return if is_to_close(volume, local) { Step::Close { epoch } } else { Step::Wait };
    }
    match &volume.state {
        VolumeState::Starting { .. } | VolumeState::Online | VolumeState::Releasing { .. } => {
            if volume.owner == Some(local.me) { own(volume, local) } else { follow(volume, local) }
        }
        VolumeState::Offline { .. } | VolumeState::Failed { .. } => Step::Wait,
    }
}

/// Why this node may be presumed dead, if so.
fn cut_off(db: &ClusterDb, local: &Local) -> Option<String> {
    if let Some(reason) = &local.cut_off {
        return Some(reason.clone());
    }
    let Some(node) = db.nodes.get(&local.me) else {
        return Some("this node is not in the cluster any more".into());
    };
    let up = matches!(node.state, NodeState::Up | NodeState::Isolated);
    (!up || node.incarnation != local.incarnation)
        .then(|| format!("{} is not up in the cluster ({:?})", node.name, node.state))
}

/// Why what csvfs has is not its own any more, if so.
fn lost(volume: &Volume, local: &Local) -> Option<String> {
    let epoch = match local.role {
        Role::Gone | Role::Silent => return None,
        Role::Nobody if local.suspended => return None,
        Role::Owner(epoch) => Some(epoch),
        // Without a role too it may hold layouts of a time before the fence.
        Role::Nobody | Role::Follower(..) => None,
    };
    if local.fenced {
        return Some("the LUN refuses this node: it was fenced".into());
    }
    if let Some(member) = volume.members.get(&local.me).filter(|_| local.path)
        && (member.state != MemberState::Admitted
            || member.incarnation != local.incarnation
            // It was fenced and given the volume again before this was looked at.
            || local.registered.is_some_and(|registered| registered != member.generation))
    {
        return Some(format!("the cluster has this node fenced (generation {})", member.generation));
    }
    // The same node under a later epoch takes anew, which ends the old ownership.
    (epoch.is_some_and(|epoch| volume.epoch >= epoch) && volume.owner != Some(local.me))
        .then(|| format!("the volume was taken from this node (epoch {})", volume.epoch))
}

/// May csvfs be started? Where there is a path, not before its key is registered: a LUN that keeps this node out cannot be
/// opened, and what csvfs finds at its start is what it works with.
#[must_use]
pub fn may_start(db: &ClusterDb, volume: &Volume, local: &Local) -> bool {
    cut_off(db, local).is_none()
        && !is_to_close(volume, local)
        && (!local.path || membership(volume, local).is_none())
}

/// The database has this node for the owner, and its csvfs has ended. (While it starts it may not have been there yet.)
fn is_to_close(volume: &Volume, local: &Local) -> bool {
    let ended = matches!(volume.state, VolumeState::Online | VolumeState::Releasing { .. });
    ended && volume.owner == Some(local.me)
}

/// Admission and registration of a node with a path.
fn membership(volume: &Volume, local: &Local) -> Option<Step> {
    let Some(member) = volume.members.get(&local.me) else {
        return Some(Step::Admit { from_generation: 0 });
    };
    match member.state {
        MemberState::FencePending if member.incarnation == local.incarnation => {
            let idle = local.role == Role::Gone || (local.role == Role::Nobody && local.suspended);
            let generation = member.generation;
            // An owner fences it, and lets go of what its coordinator has lent to it.
            let withdraw = idle && volume.owner.is_none();
            Some(if withdraw { Step::Withdraw { generation } } else { Step::Wait })
        }
        MemberState::Admitted if member.incarnation == local.incarnation => (local.registered
            != Some(member.generation))
        .then_some(Step::Register { generation: member.generation }),
        // A key of an earlier life protects against a machine that is not back; it must not keep out one that is.
        MemberState::FencePending | MemberState::Fenced | MemberState::Admitted => {
            Some(Step::Admit { from_generation: member.generation })
        }
    }
}

fn own(volume: &Volume, local: &Local) -> Step {
    let epoch = volume.epoch;
    let here = local.role == Role::Owner(epoch);
    match &volume.state {
        VolumeState::Starting { .. } if here => {
            let missing: Vec<_> =
                volume.to_fence().into_iter().filter(|one| !local.fenced_others.contains(one)).collect();
            // Somebody went down during the start.
            if missing.is_empty() {
                Step::TellOnline { epoch }
            } else {
                Step::Take { epoch, fence: volume.to_fence() }
            }
        }
        VolumeState::Starting { .. } => Step::Take { epoch, fence: volume.to_fence() },
        VolumeState::Online if here => {
            let fence = volume.to_fence();
            if fence.is_empty() { Step::Wait } else { Step::Fence { epoch, fence } }
        }
        // It stopped, or ended and was started again.
        VolumeState::Online => Step::Close { epoch },
        // Also when csvfs has ended meanwhile: then nothing is mounted here.
        VolumeState::Releasing { .. } => Step::HandOver { epoch },
        VolumeState::Offline { .. } | VolumeState::Failed { .. } => Step::Wait,
    }
}

fn follow(volume: &Volume, local: &Local) -> Step {
    let Some(owner) = volume.owner else { return Step::Wait };
    let online = matches!(volume.state, VolumeState::Online | VolumeState::Releasing { .. });
    let here = local.role == Role::Follower(volume.epoch, owner) && !local.suspended;
    if online && !here { Step::Follow { epoch: volume.epoch, owner } } else { Step::Wait }
}

#[cfg(test)]
mod tests;
