//! Would a POSIX request that has to wait close a circle of owners that wait for each other?
//!
//! A search over all files of the volume: from the owners that stand in the way, on to what those wait for.
//! It is bounded as in Linux (which gives up after 10 steps); a circle longer than the bound is not found and
//! its members wait until one of them is interrupted.

use crate::table::LockTable;
use crate::types::{Kind, LockRequest, OwnerKey};
use std::collections::BTreeSet;

/// Owners looked at before the search gives up.
pub(crate) const OWNERS_VISITED_MAX: usize = 256;

/// Does somebody who blocks `request` wait, directly or by others, for the owner of `request`?
pub(crate) fn would_deadlock(table: &LockTable, request: &LockRequest) -> bool {
    if request.kind != Kind::Posix {
        return false;
    }
    let target = request.owner.key();
    let mut seen: BTreeSet<OwnerKey> = BTreeSet::new();
    let mut open: Vec<OwnerKey> = table.blockers(request).collect();
    while let Some(owner) = open.pop() {
        if owner == target {
            return true;
        }
        if !seen.insert(owner) {
            continue;
        }
        if seen.len() > OWNERS_VISITED_MAX {
            return false;
        }
        for waiting in table.waiting_requests(owner) {
            open.extend(table.blockers(waiting).filter(|next| !seen.contains(next)));
        }
    }
    false
}
