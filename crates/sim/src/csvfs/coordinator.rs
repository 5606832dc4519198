//! The coordinator of a volume: the real layout table with its driver, sessions with leases, grace and reclaim, and a file
//! system that is a table of blocks committed as one record. As coordinator/src.
//!
//! Metadata operations are carried out one at a time: zeros are written, forced to the medium, then the new table is committed, and only
//! then it counts: nothing is lent before its allocation is durable, nothing reused before its freeing is.

use super::message::{Body, What};
use crate::event::{Action, Ctx, Input as Event, Message, Observation, Process, Reply, VolumeNo};
use crate::world::lun::{Answer, Block, Content, FileNo, Meta, Request};
use crate::{BLOCK_BYTES, FILES, LEASE_MARGIN_MS, LEASE_MS, LUN_BLOCKS, RECALL_MS};
use csv_layout::cache::HeldGrant;
use csv_layout::table::{Effect, Input, LayoutTable, RequestId, TableConfig};
use csv_layout::{Access, Extent};
use csv_types::{ByteRange, Epoch, FileId, LunOffset, NodeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

/// Metadata operations that may wait.
const JOBS_MAX: usize = 64;
const FENCE_AGAIN_MS: u64 = 2_000;

/// What a node has here.
#[derive(Debug)]
struct Session {
    id: u64,
    client: u64,
    heard_ms: u64,
    /// It is to be fenced; csvd was asked then.
    doomed: Option<u64>,
    reclaimed: bool,
}

/// Who is waited for.
#[derive(Debug)]
struct Grace {
    until_ms: u64,
    members: BTreeSet<NodeId>,
    waiting: BTreeSet<NodeId>,
}

#[derive(Debug, Clone, Copy)]
struct Get {
    node: NodeId,
    session: u64,
    request: u64,
    file: FileNo,
    range: ByteRange,
    access: Access,
}

/// What a guard is for.
#[derive(Debug, Clone, Copy)]
enum Guarded {
    /// Space for this get.
    Fill(Get),
    /// A hole.
    Punch { file: FileNo, range: ByteRange },
}

/// A metadata operation.
#[derive(Debug)]
enum Job {
    Enlist { node: NodeId, client: u64, hello: u64 },
    Delist(NodeId),
    Guarded(RequestId, Guarded),
}

/// How far the metadata operation under way is.
#[derive(Debug)]
enum Stage {
    Zeroing,
    Committing,
}

#[derive(Debug)]
struct Running {
    io: u64,
    stage: Stage,
    job: Job,
    next: Meta,
    /// Writes of zeros that count when it is done.
    zeros: Vec<(FileNo, u32, u64)>,
}

/// See the module.
#[derive(Debug)]
pub struct Coordinator {
    volume: VolumeNo,
    me: NodeId,
    /// Its ownership.
    pub epoch: Epoch,
    table: LayoutTable,
    meta: Rc<Meta>,
    sessions: BTreeMap<NodeId, Session>,
    grace: Option<Grace>,
    gets: BTreeMap<RequestId, Get>,
    guards: BTreeMap<RequestId, Guarded>,
    jobs: VecDeque<Job>,
    running: Option<Running>,
    /// No more operations are begun.
    stopping: bool,
    /// An I/O failed: the file system is shut down.
    pub broken: bool,
    seq_seen: u64,
}

fn file_id(file: FileNo) -> FileId {
    FileId { ino: file as u64 + 1, generation: 1 }
}

fn file_no(id: FileId) -> FileNo {
    usize::try_from(id.ino - 1).unwrap_or(0)
}

fn fblocks(range: ByteRange) -> std::ops::Range<u32> {
    let at = |bytes: u64| u32::try_from(bytes / BLOCK_BYTES).unwrap_or(0);
    at(range.start)..at(range.end)
}

impl Coordinator {
    pub(super) fn start(
        ctx: &mut Ctx<'_>,
        volume: VolumeNo,
        epoch: Epoch,
        meta: Rc<Meta>,
        gone: &[NodeId],
    ) -> Coordinator {
        let mut waiting = meta.roster.clone();
        waiting.retain(|node| !gone.contains(node));
        let until_ms = ctx.mono_ms() + LEASE_MS + LEASE_MARGIN_MS;
        let grace = Grace { until_ms, members: waiting.clone(), waiting };
        let delist = meta.roster.iter().filter(|node| gone.contains(node)).map(|node| Job::Delist(*node));
        Coordinator {
            volume,
            me: ctx.me,
            epoch,
            table: LayoutTable::new(TableConfig::for_epoch(epoch, RECALL_MS)),
            jobs: delist.collect(),
            meta,
            sessions: BTreeMap::new(),
            grace: Some(grace).filter(|grace| !grace.waiting.is_empty()),
            gets: BTreeMap::new(),
            guards: BTreeMap::new(),
            running: None,
            stopping: false,
            broken: false,
            seq_seen: 0,
        }
    }

    pub(super) fn stop(&mut self) {
        self.stopping = true;
    }

    /// Nothing of it is under way on the LUN?
    pub(super) fn is_quiet(&self) -> bool {
        self.running.is_none()
    }

    fn tell(&self, ctx: &mut Ctx<'_>, node: NodeId, session: u64, what: What) {
        let body = Body { epoch: self.epoch, session, what };
        ctx.send(node, Message::Csvfs { volume: self.volume, body });
    }

    fn session_of(&self, node: NodeId) -> u64 {
        self.sessions.get(&node).map_or(0, |session| session.id)
    }

    // ---- clock -----------------------------------------------------------------------------------------------

    /// `own_quiet`: the client in this process has nothing under way, and its lease is over.
    pub(super) fn tick(&mut self, ctx: &mut Ctx<'_>, own_quiet: bool) {
        if self.stopping || self.broken {
            return;
        }
        self.step(ctx, Input::Tick);
        let now = ctx.mono_ms();
        let over = |session: &Session| match session.doomed {
            None => now > session.heard_ms + LEASE_MS + LEASE_MARGIN_MS,
            Some(asked_ms) => now > asked_ms + FENCE_AGAIN_MS,
        };
        let over: Vec<NodeId> =
            self.sessions.iter().filter(|(_, session)| over(session)).map(|(node, _)| *node).collect();
        for node in over {
            let own = node == self.me && own_quiet;
            if node == self.me && !own {
                continue;
            }
            if own || ctx.bugs.lease_instead_of_fence {
                self.end_session(ctx, node);
            } else {
                self.give_up(ctx, node);
            }
        }
        self.grace_tick(ctx, now);
        self.next_job(ctx);
    }

    fn grace_tick(&mut self, ctx: &mut Ctx<'_>, now: u64) {
        let Some(grace) = &mut self.grace else { return };
        if now >= grace.until_ms {
            let silent: Vec<NodeId> = grace.waiting.iter().copied().collect();
            if ctx.bugs.lease_instead_of_fence {
                grace.waiting.clear();
            } else {
                grace.until_ms = now + LEASE_MARGIN_MS;
                for node in silent {
                    self.give_up(ctx, node);
                }
            }
        }
        if self.grace.as_ref().is_some_and(|grace| grace.waiting.is_empty()) {
            self.grace = None;
            ctx.note(format!("{} grace ends on volume {}", ctx.me, self.volume));
        }
    }

    /// A node does not do what it must: the majority has it fenced; [`Coordinator::gone`] comes back.
    fn give_up(&mut self, ctx: &mut Ctx<'_>, node: NodeId) {
        if let Some(session) = self.sessions.get_mut(&node) {
            session.doomed = Some(ctx.mono_ms());
            let session = session.id;
            self.tell(ctx, node, session, What::Revoked);
        }
        if node == self.me {
            // Its own client ends with its I/O; see `tick`.
            return;
        }
        ctx.note(format!("{} wants {node} fenced", ctx.me));
        ctx.after(1, Process::Csvd, Event::FenceWanted(self.volume, node));
    }

    fn end_session(&mut self, ctx: &mut Ctx<'_>, node: NodeId) {
        if let Some(session) = self.sessions.remove(&node) {
            ctx.note(format!("{} ends session {} of {node}", ctx.me, session.id));
            self.tell(ctx, node, session.id, What::Revoked);
            self.step(ctx, Input::NodeGone { node });
            self.push_job(Job::Delist(node));
        }
    }

    /// These can write the LUN no more.
    pub(super) fn gone(&mut self, ctx: &mut Ctx<'_>, nodes: &[NodeId]) {
        ctx.note(format!("{} is told that {nodes:?} are gone from volume {}", ctx.me, self.volume));
        for &node in nodes {
            self.end_session(ctx, node);
            if let Some(grace) = &mut self.grace {
                grace.members.remove(&node);
                grace.waiting.remove(&node);
                self.push_job(Job::Delist(node));
            }
        }
    }

    // ---- messages --------------------------------------------------------------------------------------------

    pub(super) fn receive(&mut self, ctx: &mut Ctx<'_>, from: NodeId, body: Body) {
        let Body { epoch, session, what } = body;
        if self.stopping || self.broken || (epoch != self.epoch && !ctx.bugs.epoch_not_checked) {
            return;
        }
        if let What::Hello { client, hello } = what {
            self.hello(ctx, from, client, hello);
            return;
        }
        let now = ctx.mono_ms();
        let Some(known) = self.sessions.get_mut(&from) else { return };
        if (known.id != session && !ctx.bugs.epoch_not_checked) || known.doomed.is_some() {
            return;
        }
        known.heard_ms = now;
        let (id, reclaimed) = (known.id, known.reclaimed);
        match what {
            What::Ping { sent_ms } => self.tell(ctx, from, id, What::Pong { sent_ms }),
            What::Reclaim { files } => self.reclaim(ctx, from, files),
            What::Return { file, range, up_to_seq, recall_id } => {
                let file = file_id(file);
                self.step(ctx, Input::Returned { node: from, file, range, up_to_seq, recall_id });
            }
            What::Get { request, file, range, access } if reclaimed && self.grace.is_none() => {
                self.get(ctx, Get { node: from, session: id, request, file, range, access });
            }
            What::Punch { file, range } if reclaimed && self.grace.is_none() => {
                if self.guards.len() < JOBS_MAX {
                    self.guard(ctx, file, range, None, Guarded::Punch { file, range });
                }
            }
            What::Get { request, .. } => self.tell(ctx, from, id, What::NoGrant { request }),
            What::Punch { .. }
            | What::Hello { .. }
            | What::Welcome { .. }
            | What::Reclaimed
            | What::Pong { .. }
            | What::Grant { .. }
            | What::NoGrant { .. }
            | What::Recall { .. }
            | What::Revoked => {}
        }
    }

    fn hello(&mut self, ctx: &mut Ctx<'_>, node: NodeId, client: u64, hello: u64) {
        if let Some(session) = self.sessions.get_mut(&node) {
            if session.doomed.is_some() && node != self.me {
                return;
            }
            if session.client == client && session.doomed.is_none() {
                session.heard_ms = ctx.mono_ms();
                // A Welcome may have been lost: who has not reclaimed yet has to begin with that.
                let resumed = session.reclaimed || ctx.bugs.resumed_too_early;
                self.welcome(ctx, node, hello, resumed);
                return;
            }
            // A Hello of a life that has ended can come late.
            if session.client >= client {
                return;
            }
            // Another life of csvfs: the process of the last one ended with its I/O.
            self.end_session(ctx, node);
        }
        if self.meta.roster.contains(&node) && !self.delisting(node) {
            self.open_session(ctx, node, client, hello);
        } else if !self
            .jobs
            .iter()
            .any(|job| matches!(job, Job::Enlist { node: other, .. } if *other == node))
        {
            self.push_job(Job::Enlist { node, client, hello });
        }
    }

    /// Is the node about to be taken off the list?
    fn delisting(&self, node: NodeId) -> bool {
        let of = |job: &Job| matches!(job, Job::Delist(other) if *other == node);
        self.jobs.iter().any(of) || self.running.as_ref().is_some_and(|running| of(&running.job))
    }

    fn open_session(&mut self, ctx: &mut Ctx<'_>, node: NodeId, client: u64, hello: u64) {
        let id = ctx.number();
        let heard_ms = ctx.mono_ms();
        self.sessions.insert(node, Session { id, client, heard_ms, doomed: None, reclaimed: false });
        self.welcome(ctx, node, hello, false);
    }

    fn welcome(&mut self, ctx: &mut Ctx<'_>, node: NodeId, hello: u64, resumed: bool) {
        let grace = self.grace.as_ref().is_some_and(|grace| grace.members.contains(&node));
        self.tell(ctx, node, self.session_of(node), What::Welcome { hello, resumed, grace });
    }

    fn reclaim(&mut self, ctx: &mut Ctx<'_>, node: NodeId, files: Vec<(FileNo, Vec<HeldGrant>)>) {
        let Some(session) = self.sessions.get_mut(&node) else { return };
        let id = session.id;
        let first = !std::mem::replace(&mut session.reclaimed, true);
        let member = self.grace.as_ref().is_some_and(|grace| grace.members.contains(&node));
        if first && member {
            for (file, grants) in files {
                for HeldGrant { seq, range, access, .. } in grants {
                    let file = file_id(file);
                    self.step(ctx, Input::Reclaim { node, file, range, access, seq });
                }
            }
        } else if first && files.iter().any(|(_, grants)| !grants.is_empty()) {
            // It may not reclaim, and has to give everything up first.
            self.give_up(ctx, node);
            return;
        }
        if let Some(grace) = &mut self.grace {
            grace.waiting.remove(&node);
        }
        self.tell(ctx, node, id, What::Reclaimed);
    }

    // ---- layouts ---------------------------------------------------------------------------------------------

    fn get(&mut self, ctx: &mut Ctx<'_>, get: Get) {
        if ctx.bugs.grant_during_recall && self.guards.values().any(|guarded| guarded.file() == get.file) {
            let seq = self.seq_seen + 1;
            self.grant(ctx, get, get.range, seq);
            return;
        }
        let hole = fblocks(get.range).any(|fblock| self.meta.place(get.file, fblock).is_none());
        if hole && get.access != Access::Read {
            if self.guards.len() < JOBS_MAX {
                // Of the getter too: its own read right over the hole would show zeros for ever.
                let except = ctx.bugs.getter_keeps_hole.then_some(get.node);
                self.guard(ctx, get.file, get.range, except, Guarded::Fill(get));
            }
        } else {
            self.put_in(ctx, get);
        }
    }

    fn put_in(&mut self, ctx: &mut Ctx<'_>, get: Get) {
        if self.session_of(get.node) != get.session {
            return;
        }
        let request = RequestId(ctx.number());
        self.gets.insert(request, get);
        let Get { node, file, range, access, .. } = get;
        self.step(ctx, Input::Get { request, node, file: file_id(file), range, access });
    }

    fn guard(
        &mut self,
        ctx: &mut Ctx<'_>,
        file: FileNo,
        range: ByteRange,
        except: Option<NodeId>,
        what: Guarded,
    ) {
        let request = RequestId(ctx.number());
        self.guards.insert(request, what);
        self.step(ctx, Input::Guard { request, file: file_id(file), range, except, keep_read: false });
    }

    fn step(&mut self, ctx: &mut Ctx<'_>, input: Input) {
        let mut effects = Vec::new();
        self.table.step(ctx.mono_ms(), input, &mut effects);
        for effect in effects {
            self.carry_out(ctx, effect);
        }
    }

    fn carry_out(&mut self, ctx: &mut Ctx<'_>, effect: Effect) {
        match effect {
            Effect::Map { request, .. } => {
                let Some(get) = self.gets.get(&request) else { return };
                let range = get.range;
                let allocated = fblocks(range).all(|fblock| self.meta.place(get.file, fblock).is_some());
                let input = if allocated || get.access == Access::Read {
                    Input::Mapped { request, range }
                } else {
                    Input::MapFailed { request }
                };
                self.step(ctx, input);
            }
            Effect::Granted { request, range, seq, .. } => {
                self.seq_seen = seq;
                if let Some(get) = self.gets.remove(&request) {
                    self.grant(ctx, get, range, seq);
                }
            }
            Effect::GetEnded { request } => {
                if let Some(Get { node, session, request, .. }) = self.gets.remove(&request) {
                    self.tell(ctx, node, session, What::NoGrant { request });
                }
            }
            Effect::Held { request } => {
                if let Some(what) = self.guards.get(&request).copied() {
                    self.push_job(Job::Guarded(request, what));
                }
            }
            Effect::Recall { node, file, range, up_to_seq, recall_id, keep_read } => {
                let file = file_no(file);
                let what = What::Recall { file, recall_id, range, up_to_seq, keep_read };
                self.tell(ctx, node, self.session_of(node), what);
            }
            Effect::Fence { node, .. } | Effect::ReclaimRefused { node, .. } => self.give_up(ctx, node),
        }
    }

    fn grant(&mut self, ctx: &mut Ctx<'_>, get: Get, range: ByteRange, seq: u64) {
        let Get { node, session, request, file, access, .. } = get;
        let extent = |fblock: u32| Extent {
            file_offset: u64::from(fblock) * BLOCK_BYTES,
            len: BLOCK_BYTES,
            lun_offset: self.meta.place(file, fblock).map(|block| LunOffset(u64::from(block) * BLOCK_BYTES)),
        };
        let extents = fblocks(range).map(extent).collect();
        self.tell(ctx, node, session, What::Grant { request, file, seq, range, access, extents });
    }

    // ---- metadata --------------------------------------------------------------------------------------------

    fn push_job(&mut self, job: Job) {
        // Guards and sessions bound them.
        self.jobs.push_back(job);
    }

    pub(super) fn next_job(&mut self, ctx: &mut Ctx<'_>) {
        while self.running.is_none() && !self.stopping && !self.broken {
            let Some(job) = self.jobs.pop_front() else { return };
            self.begin(ctx, job);
        }
    }

    fn begin(&mut self, ctx: &mut Ctx<'_>, job: Job) {
        let mut next = (*self.meta).clone();
        (next.epoch, next.txn) = (self.epoch, next.txn + 1);
        let mut fresh = Vec::new();
        let mut zeros = Vec::new();
        let changed = match &job {
            Job::Enlist { node, .. } => next.roster.insert(*node),
            Job::Delist(node) => !self.sessions.contains_key(node) && next.roster.remove(node),
            Job::Guarded(_, Guarded::Fill(get)) => {
                fresh = self.allocate(ctx, &mut next, get);
                zeros = fresh.iter().map(|(_, content)| (get.file, content.fblock)).collect();
                !fresh.is_empty()
            }
            Job::Guarded(_, Guarded::Punch { file, range }) => {
                zeros = fblocks(*range).map(|fblock| (*file, fblock)).collect();
                let mut any = false;
                for fblock in fblocks(*range) {
                    let at = usize::try_from(fblock).unwrap_or(0);
                    any |= next.files[*file][at].take().is_some();
                }
                any
            }
        };
        if !changed {
            self.finish(ctx, job);
            return;
        }
        let volume = self.volume;
        let zeros = zeros.into_iter().map(|(file, fblock)| (file, fblock, ctx.number())).collect::<Vec<_>>();
        for &(file, fblock, write) in &zeros {
            ctx.observe(Observation::WriteBegun { volume, file, fblock, write: zero(write) });
        }
        let (stage, request) = if fresh.is_empty() {
            (Stage::Committing, Request::Commit(Rc::new(next.clone())))
        } else {
            (Stage::Zeroing, Request::Write { blocks: fresh, zeroing: true })
        };
        let io = self.request(ctx, request);
        self.running = Some(Running { io, stage, job, next, zeros });
    }

    fn request(&self, ctx: &mut Ctx<'_>, request: Request) -> u64 {
        let io = ctx.number();
        ctx.out.push(Action::Lun(self.volume, request, Reply::Owner(io)));
        io
    }

    fn allocate(&self, ctx: &mut Ctx<'_>, next: &mut Meta, get: &Get) -> Vec<(Block, Content)> {
        let used = self.meta.used();
        let mut free: Vec<Block> =
            (0..u32::try_from(LUN_BLOCKS).unwrap_or(0)).filter(|block| !used.contains(block)).collect();
        let mut fresh = Vec::new();
        for fblock in fblocks(get.range) {
            let at = usize::try_from(fblock).unwrap_or(0);
            if next.files[get.file][at].is_none() && !free.is_empty() {
                let block = free.swap_remove(ctx.rng.below(free.len()));
                next.files[get.file][at] = Some(block);
                fresh.push((block, Content { file: get.file, fblock, write: 0 }));
            }
        }
        fresh
    }

    /// A request of the metadata operation under way has ended.
    pub(super) fn io_ended(&mut self, ctx: &mut Ctx<'_>, io: u64, answer: &Answer) -> bool {
        let Some(mut running) = self.running.take_if(|running| running.io == io) else { return true };
        if !matches!(answer, Answer::Done) {
            self.broken = true;
            return false;
        }
        let last = matches!(running.stage, Stage::Committing);
        if last {
            self.meta = Rc::new(running.next);
            let writes: Vec<_> =
                running.zeros.iter().map(|&(file, fblock, write)| (file, fblock, zero(write))).collect();
            let volume = self.volume;
            for &(file, fblock, write) in &writes {
                ctx.observe(Observation::WriteEnded { volume, file, fblock, write });
            }
            ctx.observe(Observation::Synced { volume, writes });
            self.finish(ctx, running.job);
        } else if !self.stopping {
            running.stage = Stage::Committing;
            running.io = self.request(ctx, Request::Commit(Rc::new(running.next.clone())));
            self.running = Some(running);
        }
        self.next_job(ctx);
        true
    }

    fn finish(&mut self, ctx: &mut Ctx<'_>, job: Job) {
        match job {
            Job::Enlist { node, client, hello } => {
                if !self.sessions.contains_key(&node) && !self.stopping {
                    self.open_session(ctx, node, client, hello);
                }
            }
            Job::Delist(_) => {}
            Job::Guarded(request, what) => {
                self.guards.remove(&request);
                self.step(ctx, Input::Release { request });
                if let Guarded::Fill(get) = what
                    && !self.stopping
                {
                    self.put_in(ctx, get);
                }
            }
        }
    }

    /// Files of which something is lent; for the checks.
    #[must_use]
    pub fn lends(&self, file: FileNo) -> bool {
        file < FILES && self.table.has_grants(file_id(file))
    }
}

impl Guarded {
    fn file(self) -> FileNo {
        match self {
            Guarded::Fill(get) => get.file,
            Guarded::Punch { file, .. } => file,
        }
    }
}

/// The number under which a write of zeros is known to the checks.
fn zero(write: u64) -> u64 {
    write | crate::invariants::data::ZERO
}
