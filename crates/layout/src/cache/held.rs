//! What a client tells a new coordinator. Blocks are in use under what is held, and under I/O that is still in flight
//! on ranges that the old coordinator recalled; both must be told, or the new one could give the blocks away.

use super::flight::IoKind;
use super::map::Place;
use super::{EofRight, LayoutCache, eof_range};
use crate::{Access, Extent};
use csv_types::ByteRange;

/// One thing held, for reclaim at a new coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldGrant {
    /// Newest grant that gave it.
    pub seq: u64,
    /// Where.
    pub range: ByteRange,
    /// Strongest access.
    pub access: Access,
    /// Known places, in file order; empty for I/O that is still in flight on something recalled already.
    pub extents: Vec<Extent>,
    /// Present in one of the grants when the end-of-file right is held.
    pub eof: Option<EofRight>,
}

impl LayoutCache {
    /// Before reclaim at a new coordinator: the recalls of the old one are void and will not be answered. What they
    /// took stays taken, except for the end-of-file right, which is still here while writes may move the end.
    pub fn forget_recalls(&mut self) {
        self.recalls.clear();
        self.eof = self.eof.or(self.eof_leaving);
        self.eof_leaving = None;
    }

    /// Everything that blocks may be read or written under, for reclaim: what is held, and what is in flight on
    /// ranges that an earlier coordinator recalled.
    #[must_use]
    pub fn held(&self) -> Vec<HeldGrant> {
        let mut held: Vec<HeldGrant> = Vec::new();
        let mut last_rights = None;
        for piece in self.map.iter() {
            let Some(access) = piece.rights.access() else { continue };
            let extent =
                |lun_offset| Extent { file_offset: piece.range.start, len: piece.range.len(), lun_offset };
            let extent = match piece.place {
                Place::Lun(at) => Some(extent(Some(at))),
                Place::Zeros => Some(extent(None)),
                Place::Unknown => None,
            };
            match held.last_mut() {
                Some(grant) if grant.range.end == piece.range.start && last_rights == Some(piece.rights) => {
                    grant.range.end = piece.range.end;
                    grant.extents.extend(extent);
                }
                _ => held.push(HeldGrant {
                    seq: piece.rights.seq(),
                    range: piece.range,
                    access,
                    extents: extent.into_iter().collect(),
                    eof: None,
                }),
            }
            last_rights = Some(piece.rights);
        }
        self.held_in_flight(&mut held);
        self.held_eof(&mut held);
        held
    }

    fn held_in_flight(&self, held: &mut Vec<HeldGrant>) {
        for io in self.flight.iter() {
            let access = match io.kind {
                IoKind::Read => Access::Read,
                IoKind::Write => Access::Write,
                IoKind::Rmw => Access::Exclusive,
            };
            if !io.range.is_empty() && !self.map.allows(io.range, access) {
                let extents = Vec::new();
                held.push(HeldGrant { seq: self.seq_seen, range: io.range, access, extents, eof: None });
            }
        }
    }

    fn held_eof(&self, held: &mut Vec<HeldGrant>) {
        let Some(eof) = self.eof.or(self.eof_leaving) else { return };
        let to_the_end =
            |grant: &&mut HeldGrant| grant.range.end == u64::MAX && grant.access == Access::Exclusive;
        if let Some(grant) = held.iter_mut().find(to_the_end) {
            grant.eof = Some(eof.right);
        } else {
            let (range, access) = (eof_range(eof.right.size), Access::Exclusive);
            let extents = Vec::new();
            held.push(HeldGrant { seq: eof.seq, range, access, extents, eof: Some(eof.right) });
        }
    }
}
