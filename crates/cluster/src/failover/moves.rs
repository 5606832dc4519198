//! Planned moves: draining nodes, and evening out after a join.

use super::candidates::Planner;
use crate::db::{Node, Rebalance, Volume, VolumeState};
use csv_types::NodeId;

fn moving(planner: &Planner<'_>) -> usize {
    let releasing =
        planner.db.volumes.values().filter(|volume| matches!(volume.state, VolumeState::Releasing { .. }));
    releasing.count()
}

/// Moves volumes away from draining and leaving nodes. One that no other node can take stays where it is.
pub(super) fn drain(planner: &mut Planner<'_>) {
    let db = planner.db;
    let most = usize::try_from(db.settings.max_parallel_moves).unwrap_or(usize::MAX);
    let mut room = most.saturating_sub(moving(planner));
    for volume in db.volumes.values() {
        if room == 0 {
            return;
        }
        let Some(owner) = volume.owner.and_then(|owner| db.nodes.get(&owner)) else { continue };
        let stays = volume.state != VolumeState::Online || !volume.want_online || !owner.gives_volumes_up();
        if stays || planner.touched.contains(&volume.name) {
            continue;
        }
        if let Ok(to) = planner.best(volume, Some(owner.id)) {
            let what = if owner.leaving { "is about to stop" } else { "is being drained" };
            planner.release(volume, Some(to), &format!("{} {what}", owner.name));
            room -= 1;
        }
    }
}

/// After a join: at most one move, and none while anything else is on its way.
pub(super) fn rebalance(planner: &mut Planner<'_>) {
    let db = planner.db;
    let quiet = planner.commands.is_empty()
        && db.volumes.values().all(|volume| match volume.state {
            VolumeState::Starting { .. } | VolumeState::Releasing { .. } => false,
            VolumeState::Online | VolumeState::Offline { .. } | VolumeState::Failed { .. } => true,
        });
    let newest = db.nodes.values().filter(|node| node.takes_volumes()).map(|node| node.since_unix_ms).max();
    let Some(newest_join) = newest.filter(|_| quiet && db.settings.rebalance == Rebalance::OnJoin) else {
        return;
    };
    let last_change = db.volumes.values().map(|volume| volume.since_unix_ms).max().unwrap_or(0);
    let settle_ms = db.settings.settle_ms;
    if planner.age_ms(newest_join) < settle_ms || planner.age_ms(last_change) < settle_ms {
        return;
    }
    let placed_before = |volume: &&Volume| {
        volume.state == VolumeState::Online && volume.want_online && volume.since_unix_ms < newest_join
    };
    // The cheap question first: in a balanced cluster nobody is better, and this runs several times a second.
    let better = |volume: &Volume, node: &Node| {
        better_owner(planner, volume, node.id).filter(|_| planner.can_own(volume, node))
    };
    let found = db.volumes.values().filter(placed_before).find_map(|volume| {
        let best = db.nodes.values().filter_map(|node| better(volume, node)).min()?;
        Some((volume, best))
    });
    if let Some((volume, Better { to, reason, .. })) = found {
        planner.release(volume, Some(to), reason);
    }
}

/// A better owner; the least is the best.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Better {
    rank: usize,
    owned: usize,
    to: NodeId,
    reason: &'static str,
}

fn better_owner(planner: &Planner<'_>, volume: &Volume, to: NodeId) -> Option<Better> {
    let owner = volume.owner?;
    let stands = planner.db.nodes.get(&owner).is_some_and(Node::is_up);
    if !stands || owner == to {
        return None;
    }
    let (rank, owner_rank) = (Planner::rank(volume, to), Planner::rank(volume, owner));
    let (owned, owner_owned) = (planner.owned_by(to), planner.owned_by(owner));
    let reason = if rank < owner_rank {
        "it goes to an owner that is preferred"
    } else if rank == owner_rank && owner_owned >= owned + 2 {
        "ownership is spread evenly"
    } else {
        return None;
    };
    Some(Better { rank, owned, to, reason })
}
