//! The coordinator's driver of the model: carries out the table's effects.

use super::*;
use crate::cache::HeldGrant;

impl World {
    pub(super) fn step(&mut self, input: Input) {
        let mut effects = Vec::new();
        self.table.step(self.now, input, &mut effects);
        for effect in effects {
            self.carry_out(effect);
        }
    }

    pub(super) fn take_get(
        &mut self,
        node: usize,
        file: usize,
        range: ByteRange,
        access: Access,
        extend: bool,
    ) {
        let request = self.request();
        let size = self.files[file].size;
        let (range, access) =
            if extend { (ByteRange::new(floor(size), u64::MAX), Access::Exclusive) } else { (range, access) };
        self.gets.insert(request, Get { file, range, extend, limit: None });
        self.step(Input::Get { request, node: node_id(node), file: file_id(file), range, access });
    }

    pub(super) fn take_return(&mut self, node: usize, file: usize, answer: Return) {
        let Return { recall_id, range, up_to_seq, size, .. } = answer;
        let state = &mut self.files[file];
        state.eof_recalls.remove(&recall_id);
        if let Some((holder, seq)) = state.eof_holder
            && holder == node
            && seq <= up_to_seq
            && range.end == u64::MAX
        {
            state.size = size.unwrap_or(state.size);
            state.eof_holder = None;
        }
        let (node, file) = (node_id(node), file_id(file));
        self.step(Input::Returned { node, file, range, up_to_seq, recall_id });
    }

    /// Answers a `Map`: 0 fails, 1 grants what was asked, else all that may be granted.
    pub(super) fn answer_map(&mut self, request: RequestId, how: u8) {
        let get = &self.gets[&request];
        let limit = get.limit.unwrap();
        let end = floor(self.files[get.file].size);
        let range = match (get.extend, how) {
            (_, 0) => ByteRange::new(0, 0),
            (true, _) if limit.start <= end => ByteRange::new(end, u64::MAX),
            (true, _) => ByteRange::new(0, 0),
            (false, 1) => get.range.intersect(&ByteRange::new(0, end)),
            (false, _) => limit.intersect(&ByteRange::new(0, end)),
        };
        if range.is_empty() {
            self.step(Input::MapFailed { request });
        } else {
            self.step(Input::Mapped { request, range });
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Map { request, limit } => {
                let get = self.gets.get_mut(&request).unwrap();
                assert!(limit.contains(&get.range), "limit {limit} does not contain {}", get.range);
                get.limit = Some(limit);
            }
            Effect::Granted { request, node, file, range, access, seq } => {
                self.grant(request, node_of(node), file_of(file), range, access, seq);
            }
            Effect::GetEnded { request } => {
                assert!(self.gets.remove(&request).is_some(), "{request:?} ended twice");
            }
            Effect::Held { request } => self.guards.get_mut(&request).unwrap().held = true,
            Effect::Recall { node, file, range, up_to_seq, recall_id, keep_read } => {
                let (node, file) = (node_of(node), file_of(file));
                let state = &mut self.files[file];
                if let Some((holder, seq)) = state.eof_holder
                    && holder == node
                    && seq <= up_to_seq
                    && range.end > floor(state.size)
                {
                    state.eof_recalls.insert(recall_id);
                }
                self.send(node, Body::Recall { file, recall_id, range, up_to_seq, keep_read });
            }
            Effect::Fence { node, .. } => {
                assert!(self.fences.insert(node_of(node)), "{node} is to be fenced twice");
            }
            Effect::ReclaimRefused { node, file } => panic!("{node} contradicts others on {file}"),
        }
    }

    fn grant(
        &mut self,
        request: RequestId,
        node: usize,
        file: usize,
        range: ByteRange,
        access: Access,
        seq: u64,
    ) {
        let get = self.gets.remove(&request).expect("granted or ended before");
        let state = &mut self.files[file];
        let mut eof = None;
        let mut range = range;
        if get.extend {
            if state.eof_recalls.is_empty() {
                state.eof_holder = Some((node, seq));
                eof = Some(EofRight { size: state.size, alloc_end: BLOCKS * BLOCK, dirty: false });
            } else {
                range = ByteRange::new(range.start, floor(state.size));
            }
        }
        let blocks = range.intersect(&ByteRange::new(0, BLOCKS * BLOCK));
        let extents = (blocks.start / BLOCK..blocks.end / BLOCK)
            .map(|block| Extent {
                file_offset: block * BLOCK,
                len: BLOCK,
                lun_offset: Some(self.lun_offset(file, block)),
            })
            .collect();
        if !range.is_empty() {
            self.send(node, Body::Grant { file, seq, range, access, extents, eof });
        }
    }

    pub(super) fn lun_offset(&self, file: usize, block: u64) -> LunOffset {
        let block = usize::try_from(block).unwrap();
        LunOffset(self.files[file].lun_blocks[block] * BLOCK)
    }

    pub(super) fn guard(&mut self, file: usize, range: ByteRange, except: Option<usize>, keep_read: bool) {
        let request = self.request();
        self.guards.insert(request, Guard { file, range, except, keep_read, held: false });
        let except = except.map(node_id);
        self.step(Input::Guard { request, file: file_id(file), range, except, keep_read });
    }

    /// Does what the guard was for, if it is held, and releases it.
    pub(super) fn release(&mut self, request: RequestId, truncate: bool) -> Result<(), String> {
        let guard = self.guards.remove(&request).unwrap();
        if guard.held && guard.except.is_none() && !guard.keep_read {
            self.act(&guard, truncate)?;
        }
        self.step(Input::Release { request });
        Ok(())
    }

    /// Moves the guarded blocks elsewhere; the check of hits finds whoever still uses the old place. With
    /// `truncate`, cuts the file when the guard allows.
    fn act(&mut self, guard: &Guard, truncate: bool) -> Result<(), String> {
        let (first, last) = (guard.range.start / BLOCK, (guard.range.end / BLOCK).min(BLOCKS));
        let file = &mut self.files[guard.file];
        for block in first..last {
            file.lun_blocks[usize::try_from(block).unwrap()] = self.next_lun_block;
            self.next_lun_block += 1;
        }
        if guard.range.end == u64::MAX {
            if let Some((holder, seq)) = file.eof_holder
                && guard.range.start <= floor(file.size)
            {
                return Err(format!("guard of the end of file held, n{holder} still has it ({seq})"));
            }
            if truncate && file.eof_holder.is_none() && guard.range.start < file.size {
                file.size = guard.range.start + 10;
                file.true_size = file.size;
            }
        }
        Ok(())
    }

    /// The node can write no more, and all learn of it.
    pub(super) fn node_gone(&mut self, node: usize) {
        if self.clients[node].fenced {
            return;
        }
        self.clients[node].fenced = true;
        self.fences.remove(&node);
        for file in &mut self.files {
            if file.eof_holder.is_some_and(|(holder, _)| holder == node) {
                file.eof_holder = None;
                file.eof_recalls.clear();
                file.true_size = file.size;
            }
        }
        self.step(Input::NodeGone { node: node_id(node) });
    }

    /// Another coordinator takes over: the table, all requests and all messages under way are gone. The clients
    /// go on with their I/O and tell what they hold.
    pub(super) fn fail_over(&mut self) {
        self.epoch += 1;
        self.table = new_table(self.epoch, self.table.mutation.on);
        self.gets.clear();
        self.guards.clear();
        self.fences.clear();
        for message in std::mem::take(&mut self.net) {
            // A size that may not have arrived is committed again by the owner of the cache.
            if let Body::Return { file, answer: Return { size: Some(size), up_to_seq, .. } } = message.body
                && message.session == self.clients[message.node].session
                && let Some((holder, seq)) = self.files[file].eof_holder
                && (holder, true) == (message.node, seq <= up_to_seq)
            {
                self.files[file].size = size;
                self.files[file].eof_holder = None;
            }
        }
        for state in &mut self.files {
            state.eof_holder = None;
            state.eof_recalls.clear();
        }
        for node in 0..NODES {
            for file in 0..FILES {
                if !self.clients[node].fenced {
                    self.reclaim(node, file);
                }
            }
        }
    }

    fn reclaim(&mut self, node: usize, file: usize) {
        self.clients[node].caches[file].forget_recalls();
        for HeldGrant { seq, range, access, eof, .. } in self.clients[node].caches[file].held() {
            if let Some(right) = eof {
                let state = &mut self.files[file];
                assert!(state.eof_holder.is_none(), "two nodes claim the end of file {file}");
                state.eof_holder = Some((node, seq));
                state.size = right.size;
            }
            let (node, file) = (node_id(node), file_id(file));
            self.step(Input::Reclaim { node, file, range, access, seq });
        }
    }

    pub(super) fn advance(&mut self, ms: u64) {
        self.now += ms;
        if self.table.next_deadline().is_some_and(|at| at <= self.now) {
            self.step(Input::Tick);
        }
        let next = self.table.next_deadline();
        assert!(next.is_none_or(|at| at > self.now), "deadline {next:?} not met at {}", self.now);
    }
}
