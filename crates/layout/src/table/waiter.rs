//! Who waits for a range, and what has been recalled for him.

use super::{Effect, Numbers, RequestId, Tick};
use crate::Access;
use csv_types::{ByteRange, FileId, NodeId};
use std::collections::BTreeMap;

/// What a request wants.
#[derive(Debug, Clone, Copy)]
pub(super) enum Want {
    Get {
        node: NodeId,
        access: Access,
        /// Given up while it was being mapped.
        cancelled: bool,
    },
    Guard {
        except: Option<NodeId>,
        keep_read: bool,
    },
}

/// A request as it comes in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Admitted {
    pub(super) range: ByteRange,
    pub(super) want: Want,
}

/// A request in its queue.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) request: RequestId,
    /// What was asked; while a get is mapped, its limit.
    pub(super) range: ByteRange,
    pub(super) want: Want,
    /// A get is being mapped, a guard is held.
    pub(super) active: bool,
    /// Unanswered recalls for this request.
    pub(super) recalls: Vec<Recalled>,
}

/// A recall under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recalled {
    pub(super) id: u64,
    pub(super) node: NodeId,
    pub(super) up_to_seq: u64,
    pub(super) first_ms: Tick,
    pub(super) last_ms: Tick,
}

impl Admitted {
    pub(super) fn get(range: ByteRange, node: NodeId, access: Access) -> Self {
        Admitted { range, want: Want::Get { node, access, cancelled: false } }
    }

    pub(super) fn guard(range: ByteRange, except: Option<NodeId>, keep_read: bool) -> Self {
        Admitted { range, want: Want::Guard { except, keep_read } }
    }

    pub(super) fn range(&self) -> ByteRange {
        self.range
    }
}

impl Want {
    /// The node whose grants are not in the way, and the weakest access of the others that is.
    pub(super) fn against(self) -> (Option<NodeId>, Access) {
        match self {
            Want::Get { node, access: Access::Exclusive, .. } => (Some(node), Access::Read),
            Want::Get { node, access: Access::Read | Access::Write, .. } => (Some(node), Access::Exclusive),
            Want::Guard { except, keep_read: true } => (except, Access::Write),
            Want::Guard { except, keep_read: false } => (except, Access::Read),
        }
    }

    /// Are these gets of two nodes that must not both be granted?
    pub(super) fn conflicts(self, other: Want) -> bool {
        match (self, other) {
            (Want::Get { node: a, access: x, .. }, Want::Get { node: b, access: y, .. }) => {
                a != b && !x.compatible(y)
            }
            (Want::Guard { .. }, _) | (_, Want::Guard { .. }) => false,
        }
    }

    pub(super) fn keep_read(self) -> bool {
        matches!(self, Want::Guard { keep_read: true, .. })
    }

    pub(super) fn is_guard(self) -> bool {
        matches!(self, Want::Guard { .. })
    }
}

impl Waiter {
    /// Forgets recalls that were answered, sends those that are missing.
    pub(super) fn recall(
        &mut self,
        now: Tick,
        file: FileId,
        in_way: &BTreeMap<NodeId, (u64, u64)>,
        numbers: &mut Numbers,
        effects: &mut Vec<Effect>,
    ) {
        self.recalls.retain(|r| in_way.get(&r.node).is_some_and(|&(oldest, _)| oldest <= r.up_to_seq));
        for (&node, &(_, newest)) in in_way {
            if self.recalls.iter().any(|r| r.node == node && r.up_to_seq >= newest) {
                continue;
            }
            let keep_read = self.want.keep_read();
            numbers.recall += 1;
            let id = numbers.recall * 2 + u64::from(keep_read);
            let up_to_seq = numbers.seq;
            self.recalls.push(Recalled { id, node, up_to_seq, first_ms: now, last_ms: now });
            let range = self.range;
            effects.push(Effect::Recall { node, file, range, up_to_seq, recall_id: id, keep_read });
        }
    }
}
