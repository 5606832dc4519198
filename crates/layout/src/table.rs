//! Coordinator side: what has been lent. See docs/architecture.md, "Layout rules".
//!
//! Two kinds of request want a range of a file: a **get** (a client wants a grant) and a **guard** (the
//! coordinator wants to act on the range itself). Both wait in order of arrival until nothing conflicts; the table
//! emits recalls for what is in the way. A get that got through is `Mapping` (the driver allocates and maps;
//! guards and conflicting gets wait), then granted; a guard that got through is `Held` until released.
//!
//! ```text
//! Get ──> waiting ──Map──> mapping ──Mapped──> Granted            Guard ──> waiting ──Held──> held ──Release──> gone
//!            └── CancelGet, NodeGone ──> GetEnded <── MapFailed ──┘            └────────── Release ──────────┘
//! ```
//!
//! Invariants
//! * Two nodes never hold incompatible accesses on a common byte; nothing overlaps a `Held` guard except grants of
//!   its `except` node and, with `keep_read`, read rights.
//! * Sequence numbers grow over the whole table and start at `seq_first`, which must be above whatever an earlier
//!   coordinator of the volume gave out (the epoch in the upper bits does it).
//! * What a client holds is part of what the table believes: a client gives up before it returns, the table takes
//!   away after it heard. So a late, doubled or lost return is harmless: the next recall clears it up.
//! * Order: a get waits for every earlier guard and for every earlier conflicting get that overlaps; a guard for
//!   every earlier guard. Nobody waits for a later waiter, only for a later guard that is `Held` already.
//!
//! Contract of the driver
//! * Every `Map` is answered by `Mapped` or `MapFailed`, also after `CancelGet` or `NodeGone`: until then guards
//!   wait, because the mapping may still be zeroing blocks. Every get ends in exactly one `Granted` or `GetEnded`.
//! * To fill a hole that nodes may hold as zeros for reading, guard the range and allocate *before* the get is put in; a
//!   guard taken while answering `Map` would wait for that very get. Not `except` the getter: until its grant
//!   arrives it would read zeros, even when another node was granted the blocks and has written them meanwhile.
//! * Do not put in a get or a second guard for a range under a guard of one's own and wait for it.
//! * Guards are as many as operations of the coordinator are under way; the driver bounds those.
//!
//! Failure: a client that does not answer a recall within `recall_ms` is named once by `Fence`; everything that
//! it holds stays lent until `NodeGone` says that it cannot write any more.

mod file;
mod pieces;
mod waiter;

use crate::Access;
use crate::mutation::Mutation;
use csv_types::{ByteRange, FileId, NodeId};
use file::FileState;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use waiter::Admitted;

/// Milliseconds of a monotonic clock.
pub type Tick = u64;

/// Number that the driver gives a get or a guard; unique while it is pending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A client asks for a grant.
    Get { request: RequestId, node: NodeId, file: FileId, range: ByteRange, access: Access },
    /// The driver mapped the range of a get that was told to `Map`; `range` is what can be granted (inside or
    /// around the asked one; cut to `Effect::Map::limit`).
    Mapped { request: RequestId, range: ByteRange },
    /// The driver could not map; the get is over without a grant.
    MapFailed { request: RequestId },
    /// The coordinator wants to act on a range. `except` names a node whose grants may stay (its own I/O order
    /// is its own business), `keep_read` lets read grants stay.
    Guard { request: RequestId, file: FileId, range: ByteRange, except: Option<NodeId>, keep_read: bool },
    /// The guarded action is over (or is given up: allowed in every state of the guard).
    Release { request: RequestId },
    /// A get is given up by its caller before it was granted.
    CancelGet { request: RequestId },
    /// A client returned a range: grants with `seq <= up_to_seq` are gone there. `recall_id` is the recall that
    /// it answers, 0 for none: an odd one let the read right stay, and the answer means just that.
    Returned { node: NodeId, file: FileId, range: ByteRange, up_to_seq: u64, recall_id: u64 },
    /// After a coordinator restart: a client holds this. Refused (by `Effect::ReclaimRefused`) on conflict.
    Reclaim { node: NodeId, file: FileId, range: ByteRange, access: Access, seq: u64 },
    /// The node can write the LUN no more (lease over, fenced, clean goodbye): everything it held is gone.
    NodeGone { node: NodeId },
    /// Time passed.
    Tick,
}

/// What the driver must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Allocate and map; nothing conflicts within `limit` (which contains the asked range) until answered.
    Map { request: RequestId, limit: ByteRange },
    /// Send the grant.
    Granted { request: RequestId, node: NodeId, file: FileId, range: ByteRange, access: Access, seq: u64 },
    /// The get ends without a grant: cancelled, not mapped, its node gone or being fenced, or too many at once.
    GetEnded { request: RequestId },
    /// Act now.
    Held { request: RequestId },
    /// Send a recall. Sent once per grant and cause; sent again by `Tick` every `resend_ms` until answered.
    /// `recall_id` is odd exactly when `keep_read` is set, so that an answer is understood even when the recall
    /// that it belongs to is long forgotten.
    Recall { node: NodeId, file: FileId, range: ByteRange, up_to_seq: u64, recall_id: u64, keep_read: bool },
    /// The node did not return in time: make sure it cannot write, then feed `NodeGone`. Sent once per node.
    Fence { node: NodeId, file: FileId },
    /// A reclaim that contradicts what is lent already: the node must be told `Revoked`.
    ReclaimRefused { node: NodeId, file: FileId },
}

/// Times and bounds.
#[derive(Debug, Clone, Copy)]
pub struct TableConfig {
    /// A recall older than this gets its node fenced.
    pub recall_ms: u64,
    /// An unanswered recall is sent again this often.
    pub resend_ms: u64,
    /// Gets that may wait or be mapped for one file at once; more end at once without a grant.
    pub gets_per_file_max: usize,
    /// Pieces of one file that a node may hold apart; beyond that touching pieces are joined, and when that does
    /// not help its gets end without a grant. A grant that fills gaps can overshoot by a factor of two.
    pub pieces_per_node_max: usize,
    /// First sequence number, at least 1; above all that an earlier coordinator of the volume gave out.
    pub seq_first: u64,
}

impl TableConfig {
    /// Usual times and bounds for the ownership `epoch`; room for 2^40 grants in each epoch.
    #[must_use]
    pub fn for_epoch(epoch: csv_types::Epoch, recall_ms: u64) -> Self {
        TableConfig {
            recall_ms,
            resend_ms: (recall_ms / 10).max(1),
            gets_per_file_max: 256,
            pieces_per_node_max: 4096,
            seq_first: (epoch.0 << 40) + 1,
        }
    }
}

/// What is lent of every file of a volume, and who waits for what.
#[derive(Debug)]
pub struct LayoutTable {
    config: TableConfig,
    files: BTreeMap<FileId, FileState>,
    /// Pending gets and guards: their file and place in its queue.
    requests: HashMap<RequestId, (FileId, u64)>,
    /// Files by the time of their next resend or fence; each at most once, as in `FileState::deadline`.
    deadlines: BTreeSet<(Tick, FileId)>,
    /// Named by `Fence`, not gone yet.
    fencing: BTreeSet<NodeId>,
    numbers: Numbers,
    pub(crate) mutation: Mutation,
}

/// Counters, all ever growing.
#[derive(Debug)]
struct Numbers {
    /// Newest sequence number given out or reclaimed.
    seq: u64,
    /// Place of the next request in its queue.
    arrival: u64,
    /// Last recall, without the `keep_read` bit.
    recall: u64,
}

impl LayoutTable {
    /// Nothing lent.
    #[must_use]
    pub fn new(config: TableConfig) -> Self {
        LayoutTable {
            numbers: Numbers { seq: config.seq_first.max(1) - 1, arrival: 0, recall: 0 },
            config,
            files: BTreeMap::new(),
            requests: HashMap::new(),
            deadlines: BTreeSet::new(),
            fencing: BTreeSet::new(),
            mutation: Mutation::default(),
        }
    }

    /// Takes one input; appends what the driver must do, in order.
    pub fn step(&mut self, now: Tick, input: Input, effects: &mut Vec<Effect>) {
        match input {
            Input::Get { request, node, file, range, access } => {
                self.get(request, node, file, Admitted::get(range, node, access), effects);
                self.pump(now, file, effects);
            }
            Input::Guard { request, file, range, except, keep_read } => {
                self.admit(request, file, Admitted::guard(range, except, keep_read));
                self.pump(now, file, effects);
            }
            Input::Mapped { request, range } => self.mapped(now, request, range, effects),
            Input::MapFailed { request } => {
                self.mapped(now, request, ByteRange::new(0, 0), effects);
            }
            Input::Release { request } => self.release(now, request, effects),
            Input::CancelGet { request } => self.cancel_get(now, request, effects),
            Input::Returned { node, file, range, up_to_seq, recall_id } => {
                self.returned(node, file, range, up_to_seq, recall_id);
                self.pump(now, file, effects);
            }
            Input::Reclaim { node, file, range, access, seq } => {
                self.reclaim(node, file, range, access, seq, effects);
                self.pump(now, file, effects);
            }
            Input::NodeGone { node } => self.node_gone(now, node, effects),
            Input::Tick => self.tick(now, effects),
        }
    }

    /// What is lent of a file: node, range, strongest access, newest sequence number.
    pub fn grants(&self, file: FileId) -> impl Iterator<Item = (NodeId, ByteRange, Access, u64)> {
        self.files.get(&file).into_iter().flat_map(FileState::grants)
    }

    /// Is anything of the file lent?
    #[must_use]
    pub fn has_grants(&self, file: FileId) -> bool {
        self.files.get(&file).is_some_and(FileState::has_grants)
    }

    /// Is anything of the file lent, waited for, being mapped or guarded?
    #[must_use]
    pub fn is_busy(&self, file: FileId) -> bool {
        self.files.contains_key(&file)
    }

    /// Does the node hold at least `access` on every byte of `range`?
    #[must_use]
    pub fn holds(&self, node: NodeId, file: FileId, range: ByteRange, access: Access) -> bool {
        self.files.get(&file).is_some_and(|state| state.holds(node, range, access))
    }

    /// When to feed the next `Tick`, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Tick> {
        self.deadlines.first().map(|&(at, _)| at)
    }

    /// Files of which something is lent or wanted, in order.
    pub fn files(&self) -> impl Iterator<Item = FileId> {
        self.files.keys().copied()
    }

    /// The oldest get or guard that still waits, over all files; for status and diagnosis.
    #[must_use]
    pub fn lowest_pending(&self) -> Option<RequestId> {
        self.files
            .values()
            .filter_map(FileState::oldest_waiting)
            .min_by_key(|&(arrival, _)| arrival)
            .map(|w| w.1)
    }

    fn get(
        &mut self,
        request: RequestId,
        node: NodeId,
        file: FileId,
        get: Admitted,
        effects: &mut Vec<Effect>,
    ) {
        if self.requests.contains_key(&request) {
            return;
        }
        let max = self.config.pieces_per_node_max;
        let refused = get.range().is_empty()
            || self.fencing.contains(&node)
            || self.files.get_mut(&file).is_some_and(|state| {
                state.gets() >= self.config.gets_per_file_max || !state.has_room(node, max)
            });
        if refused {
            effects.push(Effect::GetEnded { request });
        } else {
            self.admit(request, file, get);
        }
    }

    fn admit(&mut self, request: RequestId, file: FileId, admitted: Admitted) {
        if self.requests.contains_key(&request) {
            return;
        }
        self.numbers.arrival += 1;
        self.requests.insert(request, (file, self.numbers.arrival));
        self.files.entry(file).or_default().enqueue(self.numbers.arrival, request, admitted);
    }

    /// A get's `Map` is answered; an empty `range` means that it failed.
    fn mapped(&mut self, now: Tick, request: RequestId, range: ByteRange, effects: &mut Vec<Effect>) {
        let Some(&(file, arrival)) = self.requests.get(&request) else { return };
        let Some(state) = self.files.get_mut(&file) else { return };
        let Some(mapped) = state.finish_mapping(arrival, range) else { return };
        self.requests.remove(&request);
        match mapped {
            Some((node, range, access)) => {
                self.numbers.seq += 1;
                let seq = self.numbers.seq;
                state.lend(node, range, access, seq);
                effects.push(Effect::Granted { request, node, file, range, access, seq });
            }
            None => effects.push(Effect::GetEnded { request }),
        }
        self.pump(now, file, effects);
    }

    fn release(&mut self, now: Tick, request: RequestId, effects: &mut Vec<Effect>) {
        let Some(&(file, arrival)) = self.requests.get(&request) else { return };
        if self.files.get_mut(&file).is_some_and(|state| state.release(arrival)) {
            self.requests.remove(&request);
            self.pump(now, file, effects);
        }
    }

    fn cancel_get(&mut self, now: Tick, request: RequestId, effects: &mut Vec<Effect>) {
        let Some(&(file, arrival)) = self.requests.get(&request) else { return };
        if self.files.get_mut(&file).is_some_and(|state| state.cancel_get(arrival)) {
            self.requests.remove(&request);
            effects.push(Effect::GetEnded { request });
            self.pump(now, file, effects);
        }
    }

    fn returned(&mut self, node: NodeId, file: FileId, range: ByteRange, up_to_seq: u64, recall_id: u64) {
        if let Some(state) = self.files.get_mut(&file) {
            state.take_back(node, range, up_to_seq, recall_id % 2 == 1, self.mutation);
        }
    }

    fn reclaim(
        &mut self,
        node: NodeId,
        file: FileId,
        range: ByteRange,
        access: Access,
        seq: u64,
        effects: &mut Vec<Effect>,
    ) {
        if range.is_empty() || seq == 0 {
            return;
        }
        self.numbers.seq = seq.max(self.numbers.seq);
        let max = self.config.pieces_per_node_max;
        let state = self.files.entry(file).or_default();
        // What was lent must stay usable, so the bound only makes pieces coarser first; beyond that, no good faith.
        let room = state.has_room(node, max) || state.has_room(node, max.saturating_mul(4));
        if self.fencing.contains(&node) || !room || !state.can_reclaim(node, range, access) {
            effects.push(Effect::ReclaimRefused { node, file });
        } else {
            state.lend(node, range, access, seq);
        }
    }

    fn node_gone(&mut self, now: Tick, node: NodeId, effects: &mut Vec<Effect>) {
        self.fencing.remove(&node);
        let files: Vec<FileId> = self.files.keys().copied().collect();
        for file in files {
            let Some(state) = self.files.get_mut(&file) else { continue };
            let (touched, ended) = state.node_gone(node);
            for request in ended {
                self.requests.remove(&request);
                effects.push(Effect::GetEnded { request });
            }
            if touched {
                self.pump(now, file, effects);
            }
        }
    }

    fn tick(&mut self, now: Tick, effects: &mut Vec<Effect>) {
        while let Some(&(at, file)) = self.deadlines.first()
            && at <= now
        {
            if let Some(state) = self.files.get_mut(&file) {
                state.timers(now, file, &self.config, &mut self.fencing, effects);
            }
            self.deadlines.remove(&(at, file));
            self.settle(file, Some(at));
        }
    }

    /// Lets on whoever can go on; recalls what is in the way of the others.
    fn pump(&mut self, now: Tick, file: FileId, effects: &mut Vec<Effect>) {
        if let Some(state) = self.files.get_mut(&file) {
            state.pump(now, file, &mut self.numbers, self.mutation, effects);
            let old = state.deadline();
            self.settle(file, old);
        }
    }

    /// Forgets a file of which nothing is left; puts the others into `deadlines`, where they stood at `old`.
    fn settle(&mut self, file: FileId, old: Option<Tick>) {
        let Some(state) = self.files.get_mut(&file) else { return };
        let new = state.refresh_deadline(&self.config, &self.fencing);
        let gone = state.is_idle();
        if let Some(at) = old.filter(|_| new != old) {
            self.deadlines.remove(&(at, file));
        }
        if let Some(at) = new {
            self.deadlines.insert((at, file));
        }
        if gone {
            self.files.remove(&file);
        }
    }
}

#[cfg(test)]
mod tests;
