//! The byte-range locks of one owner in one file, and how a request changes them.
//!
//! Invariant: sorted by start, without overlap, and no two of the same type touch. Kept by [`replace`], the
//! only writer.

use crate::types::{LockRange, LockType};

/// One held range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) range: LockRange,
    pub(crate) lock_type: LockType,
    pub(crate) pid: u32,
}

/// What the owner holds after `request`, and whether some byte became free or shared by it (so that
/// waiters have to be looked at).
pub(crate) fn replace(held: &[Piece], request: Piece) -> (Vec<Piece>, bool) {
    let mut merged = request;
    let mut released = false;
    let mut after = Vec::with_capacity(held.len() + 2);
    for piece in held {
        let overlaps = piece.range.overlaps(&request.range);
        if piece.lock_type == request.lock_type && piece.range.touches(&request.range) {
            merged.range.start = merged.range.start.min(piece.range.start);
            merged.range.end = merged.range.end.max(piece.range.end);
        } else if overlaps {
            // Unlock or downgrade of a write lock frees something; an upgrade does not.
            released |= request.lock_type == LockType::Unlock || piece.lock_type == LockType::Write;
            cut(piece, request.range, &mut after);
        } else {
            after.push(*piece);
        }
    }
    if request.lock_type != LockType::Unlock {
        let at = after.partition_point(|piece| piece.range.start < merged.range.start);
        after.insert(at, merged);
    }
    (after, released)
}

/// What is left of `piece` outside `hole`.
fn cut(piece: &Piece, hole: LockRange, after: &mut Vec<Piece>) {
    if piece.range.start < hole.start {
        // hole.start > 0 here, so the subtraction cannot wrap.
        after.push(Piece { range: LockRange { start: piece.range.start, end: hole.start - 1 }, ..*piece });
    }
    if piece.range.end > hole.end {
        after.push(Piece { range: LockRange { start: hole.end + 1, end: piece.range.end }, ..*piece });
    }
}
