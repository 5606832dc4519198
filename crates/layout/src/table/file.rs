//! What is lent of one file, and the queue of those who want some of it.

use super::pieces::Pieces;
use super::waiter::{Admitted, Recalled, Waiter, Want};
use super::{Effect, Numbers, RequestId, TableConfig, Tick};
use crate::Access;
use crate::mutation::{Mutant, Mutation};
use csv_types::{ByteRange, FileId, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// One file. Idle (to be forgotten) when nothing is lent and nobody waits.
#[derive(Debug, Default)]
pub(super) struct FileState {
    grants: BTreeMap<NodeId, Pieces>,
    /// In order of arrival: waiting, being mapped, held.
    queue: BTreeMap<u64, Waiter>,
    /// Gets in `queue`.
    gets: usize,
    deadline: Option<Tick>,
}

impl FileState {
    pub(super) fn grants(&self) -> impl Iterator<Item = (NodeId, ByteRange, Access, u64)> {
        self.grants.iter().flat_map(|(&node, pieces)| {
            pieces
                .iter()
                .filter_map(move |(range, rights)| Some((node, range, rights.access()?, rights.seq())))
        })
    }

    pub(super) fn has_grants(&self) -> bool {
        !self.grants.is_empty()
    }

    pub(super) fn holds(&self, node: NodeId, range: ByteRange, access: Access) -> bool {
        self.grants.get(&node).is_some_and(|pieces| pieces.covers(range, access))
    }

    pub(super) fn is_idle(&self) -> bool {
        self.grants.is_empty() && self.queue.is_empty()
    }

    pub(super) fn gets(&self) -> usize {
        self.gets
    }

    pub(super) fn oldest_waiting(&self) -> Option<(u64, RequestId)> {
        self.queue.iter().find(|(_, w)| !w.active).map(|(&arrival, w)| (arrival, w.request))
    }

    /// May the node get one more piece? Joins pieces when it may not.
    pub(super) fn has_room(&mut self, node: NodeId, pieces_max: usize) -> bool {
        let Some(pieces) = self.grants.get_mut(&node) else { return true };
        if pieces.len() >= pieces_max {
            pieces.coarsen();
        }
        pieces.len() < pieces_max
    }

    pub(super) fn enqueue(&mut self, arrival: u64, request: RequestId, admitted: Admitted) {
        let Admitted { range, want } = admitted;
        self.gets += usize::from(!want.is_guard());
        self.queue.insert(arrival, Waiter { request, range, want, active: false, recalls: Vec::new() });
    }

    pub(super) fn lend(&mut self, node: NodeId, range: ByteRange, access: Access, seq: u64) {
        self.grants.entry(node).or_default().update(range, |rights| rights.add(access, seq));
    }

    pub(super) fn take_back(
        &mut self,
        node: NodeId,
        range: ByteRange,
        up_to_seq: u64,
        keep_read: bool,
        mutation: Mutation,
    ) {
        let Some(pieces) = self.grants.get_mut(&node) else { return };
        let up_to_seq = if mutation.is(Mutant::TableReturnIgnoresSeq) { u64::MAX } else { up_to_seq };
        let keep_read = keep_read && !mutation.is(Mutant::TableReturnIgnoresKeepRead);
        pieces.update(range, |rights| rights.take(up_to_seq, keep_read));
        if pieces.is_empty() {
            self.grants.remove(&node);
        }
    }

    /// Ends the mapping of a get. Outer `None`: it was not being mapped. Inner `None`: nothing is to be granted.
    #[expect(clippy::option_option, reason = "the two kinds of nothing are told apart at once by the caller")]
    pub(super) fn finish_mapping(
        &mut self,
        arrival: u64,
        range: ByteRange,
    ) -> Option<Option<(NodeId, ByteRange, Access)>> {
        let waiter = self.queue.get(&arrival).filter(|w| w.active)?;
        let Want::Get { node, access, cancelled } = waiter.want else { return None };
        let range = range.intersect(&waiter.range);
        self.queue.remove(&arrival);
        self.gets -= 1;
        Some((!cancelled && !range.is_empty()).then_some((node, range, access)))
    }

    /// Removes a guard; false when this is none.
    pub(super) fn release(&mut self, arrival: u64) -> bool {
        let guard = self.queue.get(&arrival).is_some_and(|w| w.want.is_guard());
        if guard {
            self.queue.remove(&arrival);
        }
        guard
    }

    /// Gives a get up; true when it is gone at once, false when the answer to its `Map` will end it.
    pub(super) fn cancel_get(&mut self, arrival: u64) -> bool {
        let Some(waiter) = self.queue.get_mut(&arrival) else { return false };
        let Want::Get { cancelled, .. } = &mut waiter.want else { return false };
        if waiter.active {
            *cancelled = true;
            return false;
        }
        self.queue.remove(&arrival);
        self.gets -= 1;
        true
    }

    /// Drops all of a node: whether something changed, and the gets that ended.
    pub(super) fn node_gone(&mut self, node: NodeId) -> (bool, Vec<RequestId>) {
        let held = self.grants.remove(&node).is_some();
        let of_node = |w: &Waiter| matches!(w.want, Want::Get { node: getter, .. } if getter == node);
        let arrivals: Vec<_> = self.queue.iter().filter(|(_, w)| of_node(w)).map(|(&at, _)| at).collect();
        let mut ended = Vec::new();
        for arrival in arrivals {
            let request = self.queue.get(&arrival).map(|w| w.request);
            if self.cancel_get(arrival) {
                ended.extend(request);
            }
        }
        (held || !ended.is_empty(), ended)
    }

    /// Would a reclaimed grant contradict what is lent, being mapped or guarded?
    pub(super) fn can_reclaim(&self, node: NodeId, range: ByteRange, access: Access) -> bool {
        let want = Want::Get { node, access, cancelled: false };
        let (_, floor) = want.against();
        let lent = |(&holder, pieces): (&NodeId, &Pieces)| {
            holder != node && pieces.overlapping(range).any(|(_, rights)| rights.allows(floor))
        };
        let in_way = |w: &Waiter| {
            let (except, floor) = w.want.against();
            w.active
                && w.range.overlaps(&range)
                && if w.want.is_guard() {
                    except != Some(node) && access >= floor
                } else {
                    w.want.conflicts(want)
                }
        };
        !self.grants.iter().any(lent) && !self.queue.values().any(in_way)
    }

    /// Lets on whoever can go on, in order of arrival; emits recalls for what is in the way of the others. One
    /// pass is enough: going on only puts more in the way of those behind, never clears it.
    pub(super) fn pump(
        &mut self,
        now: Tick,
        file: FileId,
        numbers: &mut Numbers,
        mutation: Mutation,
        effects: &mut Vec<Effect>,
    ) {
        let waiting: Vec<u64> = self.queue.iter().filter(|(_, w)| !w.active).map(|(&at, _)| at).collect();
        for arrival in waiting {
            let in_way = self.lent_in_way(arrival);
            if in_way.is_empty() && !self.queue_in_way(arrival, mutation) {
                self.activate(arrival, effects);
            } else if let Some(waiter) = self.queue.get_mut(&arrival) {
                waiter.recall(now, file, &in_way, numbers, effects);
            }
        }
    }

    /// Oldest and newest conflicting sequence number of each node.
    fn lent_in_way(&self, arrival: u64) -> BTreeMap<NodeId, (u64, u64)> {
        let mut in_way = BTreeMap::new();
        let Some(waiter) = self.queue.get(&arrival) else { return in_way };
        let (except, floor) = waiter.want.against();
        for (&node, pieces) in &self.grants {
            let seqs = pieces.overlapping(waiter.range).filter_map(|(_, rights)| rights.seqs_from(floor));
            let span = seqs.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
            if let Some(span) = span.filter(|_| except != Some(node)) {
                in_way.insert(node, span);
            }
        }
        in_way
    }

    /// Does another request make this one wait?
    fn queue_in_way(&self, arrival: u64, mutation: Mutation) -> bool {
        let Some(waiter) = self.queue.get(&arrival) else { return true };
        self.queue.iter().any(|(&other_arrival, other)| {
            if other_arrival == arrival || !other.range.overlaps(&waiter.range) {
                return false;
            }
            let first = other.active || other_arrival < arrival;
            match (waiter.want.is_guard(), other.want.is_guard()) {
                (true, true) => first,
                (true, false) => other.active && !mutation.is(Mutant::TableGuardIgnoresMapping),
                (false, true) => first && !mutation.is(Mutant::TableMapsUnderGuard),
                (false, false) => first && waiter.want.conflicts(other.want),
            }
        })
    }

    fn activate(&mut self, arrival: u64, effects: &mut Vec<Effect>) {
        let limit = self.limit(arrival);
        let Some(waiter) = self.queue.get_mut(&arrival) else { return };
        waiter.active = true;
        waiter.recalls.clear();
        let request = waiter.request;
        if waiter.want.is_guard() {
            effects.push(Effect::Held { request });
        } else {
            waiter.range = limit;
            effects.push(Effect::Map { request, limit });
        }
    }

    /// The largest range around that of a get which touches nothing lent to others in conflict, no guard and no
    /// conflicting get, waiting ones included: those would only recall it again.
    fn limit(&self, arrival: u64) -> ByteRange {
        let Some(waiter) = self.queue.get(&arrival) else { return ByteRange::new(0, 0) };
        let asked = waiter.range;
        let (except, floor) = waiter.want.against();
        let mut limit = ByteRange::ALL;
        for (_, pieces) in self.grants.iter().filter(|(node, _)| except != Some(**node)) {
            let (before, after) = pieces.neighbours(asked, floor);
            limit = limit.intersect(&ByteRange::new(before, after));
        }
        for (_, other) in self.queue.iter().filter(|(at, _)| **at != arrival) {
            if other.range.is_empty() || !(other.want.is_guard() || other.want.conflicts(waiter.want)) {
                continue;
            }
            if other.range.start < asked.start {
                limit.start = limit.start.max(other.range.end.min(asked.start));
            }
            if other.range.end > asked.end {
                limit.end = limit.end.min(other.range.start.max(asked.end));
            }
        }
        limit
    }

    pub(super) fn timers(
        &mut self,
        now: Tick,
        file: FileId,
        config: &TableConfig,
        fencing: &mut BTreeSet<NodeId>,
        effects: &mut Vec<Effect>,
    ) {
        for waiter in self.queue.values_mut() {
            let (range, keep_read) = (waiter.range, waiter.want.keep_read());
            for recall in &mut waiter.recalls {
                let Recalled { id: recall_id, node, up_to_seq, .. } = *recall;
                if fencing.contains(&node) {
                    continue;
                }
                if now >= recall.first_ms.saturating_add(config.recall_ms) {
                    fencing.insert(node);
                    effects.push(Effect::Fence { node, file });
                } else if now >= recall.last_ms.saturating_add(config.resend_ms) {
                    recall.last_ms = now;
                    effects.push(Effect::Recall { node, file, range, up_to_seq, recall_id, keep_read });
                }
            }
        }
    }

    pub(super) fn deadline(&self) -> Option<Tick> {
        self.deadline
    }

    /// Recomputes the time of the next resend or fence.
    pub(super) fn refresh_deadline(
        &mut self,
        config: &TableConfig,
        fencing: &BTreeSet<NodeId>,
    ) -> Option<Tick> {
        let recalls = self.queue.values().flat_map(|waiter| &waiter.recalls);
        let due = |recall: &Recalled| {
            let fence = recall.first_ms.saturating_add(config.recall_ms);
            fence.min(recall.last_ms.saturating_add(config.resend_ms.max(1)))
        };
        self.deadline = recalls.filter(|recall| !fencing.contains(&recall.node)).map(due).min();
        self.deadline
    }
}
