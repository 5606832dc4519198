//! The block service's gate: a node without a path to the LUN does its block I/O through the coordinator, and may
//! touch only LUN bytes that are lent to it right now. Whoever then acts on a range waits until such I/O is over,
//! because a node may give a grant back while an abandoned request of it is still on its way here.

use crate::coordinator::Coordinator;
use crate::state::Core;
use csv_layout::{Access, Extent};
use csv_types::{ByteRange, FileId, NodeId};
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
use std::sync::Weak;
use tokio::sync::oneshot;

/// Which file bytes lie where on the LUN, as far as they were granted to one node. What is noted here is only a
/// hint where to look: whether it is lent is asked of the layout table.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    by_lun: BTreeMap<u64, Piece>,
    by_file: HashMap<FileId, BTreeMap<u64, u64>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    file: FileId,
    range: ByteRange,
    seq: u64,
}

impl Pieces {
    /// Notes a grant's extents in place of what was known of `range`.
    pub(crate) fn granted(&mut self, file: FileId, range: ByteRange, seq: u64, extents: &[Extent]) {
        self.removed(file, range, u64::MAX);
        for extent in extents {
            let Some(place) = extent.lun_offset else { continue };
            self.cut_lun(ByteRange::at(place.0, extent.len));
            self.insert(place.0, Piece { file, range: ByteRange::at(extent.file_offset, extent.len), seq });
        }
    }

    /// Forgets what was granted up to `up_to_seq` in `range`.
    pub(crate) fn removed(&mut self, file: FileId, range: ByteRange, up_to_seq: u64) {
        let Some(places) = self.by_file.get(&file) else { return };
        // Pieces of one file do not overlap: the first that can matter is the last that starts before the range.
        let from = places.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let luns: Vec<u64> = places.range(from..range.end.max(from)).map(|(_, lun)| *lun).collect();
        for lun in luns {
            let Some(piece) = self.by_lun.get(&lun).copied() else { continue };
            if piece.seq > up_to_seq || !piece.range.overlaps(&range) {
                continue;
            }
            self.take(lun);
            for rest in piece.range.subtract(&range) {
                self.insert(lun + (rest.start - piece.range.start), Piece { range: rest, ..piece });
            }
        }
    }

    /// The file bytes behind LUN bytes, or `None` when some of them are not known to be lent. What is lent of a block
    /// counts for all of it; with 1 as block size every byte has to be lent.
    pub(crate) fn find(&self, lun: ByteRange, block: u64) -> Option<Vec<(FileId, ByteRange)>> {
        let wide = lun.align_out(block);
        let before = self.by_lun.range(..=wide.start).next_back();
        let behind = self.by_lun.range(wide.start.saturating_add(1)..wide.end.max(wide.start + 1));
        let mut found = Vec::new();
        let mut at = lun.start;
        for (start, piece) in before.into_iter().chain(behind) {
            let here = ByteRange::at(*start, piece.range.len()).intersect(&wide);
            if here.is_empty() {
                continue;
            }
            let blocks = here.align_out(block);
            if blocks.start > at {
                return None;
            }
            found.push((piece.file, ByteRange::at(piece.range.start + (here.start - start), here.len())));
            at = at.max(blocks.end);
        }
        (at >= lun.end).then_some(found)
    }

    /// LUN bytes that now belong to another file range: the old note is wrong.
    fn cut_lun(&mut self, lun: ByteRange) {
        let from = self.by_lun.range(..=lun.start).next_back().map_or(lun.start, |(start, _)| *start);
        let old: Vec<u64> = self.by_lun.range(from..lun.end.max(from)).map(|(start, _)| *start).collect();
        for start in old {
            let Some(piece) = self.by_lun.get(&start).copied() else { continue };
            let here = ByteRange::at(start, piece.range.len());
            if !here.overlaps(&lun) {
                continue;
            }
            self.take(start);
            for rest in here.subtract(&lun) {
                let range = ByteRange::at(piece.range.start + (rest.start - start), rest.len());
                self.insert(rest.start, Piece { range, ..piece });
            }
        }
    }

    fn insert(&mut self, lun: u64, piece: Piece) {
        self.by_lun.insert(lun, piece);
        self.by_file.entry(piece.file).or_default().insert(piece.range.start, lun);
    }

    fn take(&mut self, lun: u64) {
        let Some(piece) = self.by_lun.remove(&lun) else { return };
        if let Some(places) = self.by_file.get_mut(&piece.file) {
            places.remove(&piece.range.start);
            if places.is_empty() {
                self.by_file.remove(&piece.file);
            }
        }
    }
}

/// An I/O of the block service under way; recalls and guards of its range wait until this is dropped.
#[derive(Debug)]
#[must_use = "the I/O is only covered while this lives"]
pub struct BlockGuard {
    coordinator: Weak<Coordinator>,
    id: u64,
    files: Vec<FileId>,
}

impl Drop for BlockGuard {
    fn drop(&mut self) {
        if let Some(coordinator) = self.coordinator.upgrade() {
            let mut core = coordinator.core.lock();
            for file in &self.files {
                core.file(*file).block_io.retain(|(id, _, _)| *id != self.id);
                core.tidy(*file);
            }
            wake(&mut core);
            if core.moving {
                coordinator.quiet.notify_all();
            }
        }
    }
}

/// Lets those go on who wait for I/O that is over.
fn wake(core: &mut Core) {
    let waits = std::mem::take(&mut core.block_waits);
    for (file, range, except, done) in waits {
        if busy(core, file, range, except) {
            core.block_waits.push((file, range, except, done));
        } else {
            // The waiter may have given up.
            drop(done);
        }
    }
}

fn busy(core: &Core, file: FileId, range: ByteRange, except: NodeId) -> bool {
    let state = core.files.get(&file);
    state.is_some_and(|state| {
        state.block_io.iter().any(|(_, node, io)| *node != except && io.overlaps(&range))
    })
}

/// A node id that no node has: nobody is excepted.
pub(crate) const NOBODY: NodeId = NodeId(0);

impl Coordinator {
    /// The node of the session with this token.
    #[must_use]
    pub fn token_node(&self, token: &str) -> Option<NodeId> {
        let core = self.core.lock();
        token_session(&core, token)
    }

    /// May the session with this token touch these LUN bytes now?
    ///
    /// # Errors
    /// EACCES for an unknown token, ESTALE when the bytes are not lent to that node (any more).
    pub fn block_check(&self, token: &str, lun_offset: u64, len: u64, write: bool) -> Result<(), Errno> {
        self.lent(&self.core.lock(), token, ByteRange::at(lun_offset, len), write).map(|_| ())
    }

    /// As `block_check`, and keeps everybody else off these bytes until the result is dropped.
    ///
    /// # Errors
    /// As `block_check`; EAGAIN while the volume is being handed over.
    pub fn block_begin(
        &self,
        token: &str,
        lun_offset: u64,
        len: u64,
        write: bool,
    ) -> Result<BlockGuard, Errno> {
        let mut core = self.core.lock();
        if core.moving {
            return Err(Errno::AGAIN);
        }
        let (node, pieces) = self.lent(&core, token, ByteRange::at(lun_offset, len), write)?;
        let id = core.number();
        for (file, range) in &pieces {
            core.file(*file).block_io.push((id, node, *range));
        }
        let files = pieces.into_iter().map(|(file, _)| file).collect();
        Ok(BlockGuard { coordinator: self.me.clone(), id, files })
    }

    /// Waits until no block I/O of other nodes than `except` is under way in the range. It is the own LUN that such
    /// I/O waits for, so it ends.
    pub(crate) async fn block_idle(&self, file: FileId, range: ByteRange, except: NodeId) {
        let idle = {
            let mut core = self.core.lock();
            if !busy(&core, file, range, except) {
                return;
            }
            let (tx, rx) = oneshot::channel();
            core.block_waits.push((file, range, except, tx));
            rx
        };
        // An error is the signal: the sender is dropped when the range is idle.
        let _idle = idle.await;
    }

    /// A grant to read ends with the file, which need not be the end of a block; the LUN is read in whole blocks. The
    /// rest of the block belongs to the same file, so to read it does no harm. Writes are exact.
    fn lent(
        &self,
        core: &Core,
        token: &str,
        lun: ByteRange,
        write: bool,
    ) -> Result<(NodeId, Vec<(FileId, ByteRange)>), Errno> {
        let node = token_session(core, token).ok_or(Errno::ACCESS)?;
        let session = core.sessions.get(&node).ok_or(Errno::ACCESS)?;
        let block = if write { 1 } else { u64::from(self.fs.block_bytes()) };
        let pieces = session.pieces.find(lun, block).ok_or(Errno::STALE)?;
        let access = if write { Access::Write } else { Access::Read };
        if pieces.iter().all(|(file, range)| core.table.holds(node, *file, *range, access)) {
            Ok((node, pieces))
        } else {
            Err(Errno::STALE)
        }
    }
}

fn token_session(core: &Core, token: &str) -> Option<NodeId> {
    // Tokens are as long as a digest and random; which one matches first tells nothing.
    let found = core.sessions.iter().find(|(_, session)| !session.doomed && session.token == token);
    found.map(|(node, _)| *node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use csv_types::LunOffset;

    const F: FileId = FileId { ino: 12, generation: 1 };
    const G: FileId = FileId { ino: 13, generation: 1 };

    fn extent(file_offset: u64, len: u64, lun: u64) -> Extent {
        Extent { file_offset, len, lun_offset: Some(LunOffset(lun)) }
    }

    #[test]
    fn pieces_follow_grants_and_returns() {
        let mut pieces = Pieces::default();
        pieces.granted(F, ByteRange::new(0, 300), 1, &[extent(0, 100, 5000), extent(100, 200, 9000)]);
        assert_eq!(pieces.find(ByteRange::new(9050, 9100), 1), Some(vec![(F, ByteRange::new(150, 200))]));
        assert_eq!(pieces.find(ByteRange::new(5090, 5110), 1), None, "behind the piece");
        pieces.removed(F, ByteRange::new(150, 200), 1);
        assert_eq!(pieces.find(ByteRange::new(9040, 9060), 1), None);
        assert!(pieces.find(ByteRange::new(9100, 9200), 1).is_some());
        pieces.removed(F, ByteRange::new(0, 300), 0);
        assert!(pieces.find(ByteRange::new(9100, 9200), 1).is_some(), "granted after the recall");
    }

    #[test]
    fn a_read_may_take_the_rest_of_the_last_block() {
        let mut pieces = Pieces::default();
        pieces.granted(F, ByteRange::new(0, 5000), 1, &[extent(0, 5000, 8192)]);
        let last = ByteRange::new(12_288, 16_384);
        assert_eq!(pieces.find(last, 4096), Some(vec![(F, ByteRange::new(4096, 5000))]));
        assert_eq!(
            pieces.find(ByteRange::new(14_336, 16_384), 4096),
            Some(vec![(F, ByteRange::new(4096, 5000))])
        );
        assert_eq!(pieces.find(last, 1), None, "a write may not");
        assert_eq!(pieces.find(ByteRange::new(12_288, 20_480), 4096), None, "the next block is nobody's");
        assert_eq!(pieces.find(ByteRange::new(4096, 12_288), 4096), None, "the block before is nobody's");
    }

    #[test]
    fn a_block_that_moved_to_another_file_is_found_there_only() {
        let mut pieces = Pieces::default();
        pieces.granted(F, ByteRange::new(0, 100), 1, &[extent(0, 100, 5000)]);
        pieces.granted(G, ByteRange::new(0, 50), 2, &[extent(0, 50, 5025)]);
        let whole = pieces.find(ByteRange::new(5000, 5100), 1).unwrap();
        assert_eq!(
            whole,
            [(F, ByteRange::new(0, 25)), (G, ByteRange::new(0, 50)), (F, ByteRange::new(75, 100))]
        );
        pieces.removed(F, ByteRange::ALL, 9);
        assert_eq!(pieces.find(ByteRange::new(5025, 5075), 1), Some(vec![(G, ByteRange::new(0, 50))]));
        assert_eq!(pieces.find(ByteRange::new(5000, 5001), 1), None);
    }
}
