//! What must hold after every step, and what must come to an end.

use super::*;
use crate::cache::Segment;

impl World {
    /// A hit goes to where the file lies now.
    pub(super) fn check_hit(&self, node: usize, file: usize, segments: &[Segment]) -> Result<(), String> {
        for segment in segments {
            for block in segment.file_offset / BLOCK..(segment.file_offset + segment.len).div_ceil(BLOCK) {
                let start = segment.file_offset.max(block * BLOCK);
                let lun = segment.lun_offset.map(|at| at.0 + (start - segment.file_offset));
                let want = self.lun_offset(file, block).0 + (start - block * BLOCK);
                if lun != Some(want) {
                    return Err(format!(
                        "n{node} does I/O of file {file} block {block} at {lun:?}, not {want}"
                    ));
                }
            }
        }
        Ok(())
    }

    pub(super) fn check(&self) -> Result<(), String> {
        for file in 0..FILES {
            for block in 0..=BLOCKS {
                // Ranges begin and end at blocks, except those of reads in flight.
                self.check_byte(file, block * BLOCK)?;
                self.check_byte(file, block * BLOCK + BLOCK / 2)?;
            }
            for node in 0..NODES {
                self.check_writes(node, file)?;
                self.check_eof(node, file)?;
            }
        }
        Ok(())
    }

    /// The strongest thing that a node does or could begin to do.
    fn usable(&self, node: usize, file: usize, byte: ByteRange) -> Option<Access> {
        let client = &self.clients[node];
        if client.fenced {
            return None;
        }
        let touches = |io: &&InFlight| io.file == file && io.blocks().overlaps(&byte);
        let in_flight = client.io.iter().filter(touches).map(|io| io.access).max();
        in_flight.max(client.caches[file].access_at(byte.start))
    }

    fn check_byte(&self, file: usize, at: u64) -> Result<(), String> {
        let byte = ByteRange::at(at, 1);
        for a in 0..NODES {
            let Some(access) = self.usable(a, file, byte) else { continue };
            let what = format!("n{a} may {access:?} file {file} at {at}");
            if !self.table.holds(node_id(a), file_id(file), byte, access) {
                return Err(format!("{what}, which the table does not know"));
            }
            for guard in self.guards.values().filter(|guard| guard.held && guard.file == file) {
                let allowed = guard.except == Some(a) || (guard.keep_read && access == Access::Read);
                if !allowed && guard.range.overlaps(&byte) {
                    return Err(format!("{what} under {guard:?}"));
                }
            }
            for b in a + 1..NODES {
                if let Some(other) = self.usable(b, file, byte)
                    && !access.compatible(other)
                {
                    return Err(format!("{what} while n{b} may {other:?}"));
                }
            }
        }
        Ok(())
    }

    /// No read-modify-write beside another write of the same blocks on one node.
    fn check_writes(&self, node: usize, file: usize) -> Result<(), String> {
        let writes: Vec<_> =
            self.clients[node].io.iter().filter(|io| io.file == file && io.access != Access::Read).collect();
        for (i, a) in writes.iter().enumerate() {
            for b in &writes[..i] {
                let rmw = a.access == Access::Exclusive || b.access == Access::Exclusive;
                if rmw && a.blocks().overlaps(&b.blocks()) {
                    return Err(format!("n{node} runs {a:?} beside {b:?}"));
                }
            }
        }
        Ok(())
    }

    fn check_eof(&self, node: usize, file: usize) -> Result<(), String> {
        let client = &self.clients[node];
        let Some(right) = client.caches[file].eof().filter(|_| !client.fenced) else { return Ok(()) };
        let state = &self.files[file];
        if state.eof_holder.is_none_or(|(holder, _)| holder != node) {
            return Err(format!("n{node} has the end of file {file}, says the client only"));
        }
        if right.size != state.true_size {
            return Err(format!(
                "n{node} thinks that file {file} ends at {right:?}, not {}",
                state.true_size
            ));
        }
        Ok(())
    }

    /// Everything works again: all that waits must come through, and the sizes must be right.
    pub(super) fn heal(&mut self) -> Result<(), String> {
        self.settle("healing")?;
        for file in 0..FILES {
            self.guard(file, ByteRange::ALL, None, false);
        }
        self.settle("taking everything back")?;
        for (number, file) in self.files.iter().enumerate() {
            if self.table.has_grants(file_id(number)) || file.eof_holder.is_some() {
                return Err(format!("file {number}: something is still lent after all was recalled"));
            }
            if file.size != file.true_size {
                return Err(format!("file {number}: size {}, written to {}", file.size, file.true_size));
            }
        }
        if self.table.files().next().is_some() || self.table.next_deadline().is_some() {
            return Err(format!("the table remembers files that nobody uses: {:?}", self.table));
        }
        Ok(())
    }

    fn settle(&mut self, what: &str) -> Result<(), String> {
        // As long as a fence takes, for each of the requests in a row, and some more.
        for _ in 0..100 {
            for node in 0..NODES {
                while !self.clients[node].io.is_empty() {
                    self.end_io(node, 0, true)?;
                    self.check()?;
                }
            }
            while !self.net.is_empty() {
                let message = self.net.remove(0);
                self.deliver(message);
                self.check()?;
            }
            let mapping: Vec<_> = self
                .gets
                .iter()
                .filter(|(_, get)| get.limit.is_some())
                .map(|(&request, _)| request)
                .collect();
            for request in mapping {
                self.answer_map(request, 1);
                self.check()?;
            }
            let held: Vec<_> =
                self.guards.iter().filter(|(_, guard)| guard.held).map(|(&request, _)| request).collect();
            for request in held {
                self.release(request, false)?;
                self.check()?;
            }
            while let Some(&node) = self.fences.first() {
                self.node_gone(node);
                self.check()?;
            }
            (0..NODES).for_each(|node| self.rejoin(node));
            if self.gets.is_empty() && self.guards.is_empty() && self.net.is_empty() {
                return match self.table.lowest_pending() {
                    None => Ok(()),
                    Some(request) => Err(format!("{what}: {request:?} waits for nothing")),
                };
            }
            self.advance(RESEND_MS);
        }
        Err(format!("{what} does not end: gets {:?}, guards {:?}", self.gets, self.guards))
    }
}
