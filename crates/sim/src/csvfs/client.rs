//! The client of a volume on one node: programs that read, write and sync, the real layout cache of each file, session and
//! lease. As csvfs/src/client.

use super::message::{Body, What};
use crate::event::{Action, Ctx, Input, Message, Observation, Process, Reply, VolumeNo};
use crate::world::lun::{Answer, Block, Content, FileNo, Request};
use crate::{BLOCK_BYTES, FBLOCKS, FILES, LEASE_MS};
use csv_layout::cache::{IoToken, LayoutCache, Outcome, Return, Segment};
use csv_layout::{Access, Extent};
use csv_types::{ByteRange, Epoch, NodeId};
use std::collections::BTreeMap;

const HELLO_AGAIN_MS: u64 = 400;
const GET_AGAIN_MS: u64 = 1_500;
const PING_MS: u64 = LEASE_MS / 6;
/// A link that gave no sign for so long is broken.
const SILENT_MS: u64 = LEASE_MS / 2;
const PROBE_MS: u64 = 500;
const IO_MAX: usize = 6;

/// What a program does.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Read,
    /// Whole blocks.
    Write,
    /// A part of a block: read, modify, write.
    Rmw,
}

/// What a program wants done.
#[derive(Debug, Clone, Copy)]
struct Wish {
    kind: Kind,
    file: FileNo,
    first: u32,
    count: u32,
}

impl Wish {
    fn range(self) -> ByteRange {
        ByteRange::at(u64::from(self.first) * BLOCK_BYTES, u64::from(self.count) * BLOCK_BYTES)
    }

    fn access(self) -> Access {
        match self.kind {
            Kind::Read => Access::Read,
            Kind::Write => Access::Write,
            Kind::Rmw => Access::Exclusive,
        }
    }
}

/// An I/O that was begun.
#[derive(Debug)]
enum Io {
    Direct {
        wish: Wish,
        token: IoToken,
        writes: Vec<u64>,
        places: Vec<Option<Block>>,
        began_ms: u64,
    },
    Sync(Vec<(FileNo, u32, u64)>),
    /// Is the path back?
    Probe,
}

/// See the module.
#[derive(Debug)]
pub struct Client {
    volume: VolumeNo,
    /// Which life of csvfs.
    life: u64,
    /// What is held of each file.
    pub caches: Vec<LayoutCache>,
    /// By the monotonic clock.
    pub lease_until_ms: u64,
    /// No direct I/O, by order.
    pub suspended: bool,
    /// The LUN refuses this node.
    pub refused: bool,
    /// I/O failed for another reason.
    pub path_failed: bool,
    owner: Option<NodeId>,
    epoch: Epoch,
    session: Option<u64>,
    open: bool,
    heard_ms: u64,
    pinged_ms: u64,
    hello: Option<(u64, u64)>,
    reclaiming: bool,
    keep: bool,
    ios: BTreeMap<u64, Io>,
    /// Writes that failed, and may take effect as long as the path is gone: their layouts are not given back.
    unknown: Vec<(FileNo, IoToken)>,
    waiting: BTreeMap<u64, (u64, Wish)>,
    next_wish_ms: u64,
    probed_ms: u64,
    unsynced: Vec<(FileNo, u32, u64)>,
}

impl Client {
    pub(super) fn new(volume: VolumeNo, life: u64) -> Client {
        Client {
            volume,
            life,
            caches: (0..FILES).map(|_| LayoutCache::new()).collect(),
            lease_until_ms: 0,
            suspended: false,
            refused: false,
            path_failed: false,
            owner: None,
            epoch: Epoch(0),
            session: None,
            open: false,
            heard_ms: 0,
            pinged_ms: 0,
            hello: None,
            reclaiming: false,
            keep: false,
            ios: BTreeMap::new(),
            unknown: Vec::new(),
            waiting: BTreeMap::new(),
            next_wish_ms: 0,
            probed_ms: 0,
            unsynced: Vec::new(),
        }
    }

    /// May I/O begin?
    #[must_use]
    pub fn may_begin(&self, mono_ms: u64) -> bool {
        !self.suspended && !self.refused && mono_ms < self.lease_until_ms
    }

    /// Nothing under way on the LUN?
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.ios.is_empty() && self.unknown.is_empty()
    }

    fn tell(&self, ctx: &mut Ctx<'_>, what: What) {
        if let Some(owner) = self.owner {
            let body = Body { epoch: self.epoch, session: self.session.unwrap_or(0), what };
            ctx.send(owner, Message::Csvfs { volume: self.volume, body });
        }
    }

    // ---- orders ----------------------------------------------------------------------------------------------

    pub(super) fn suspend(&mut self) {
        self.suspended = true;
        self.refused = false;
        self.lease_until_ms = 0;
    }

    pub(super) fn resume(&mut self) {
        if std::mem::take(&mut self.suspended) {
            self.lease_until_ms = 0;
            self.drop_layouts();
        }
    }

    pub(super) fn attach(&mut self, owner: NodeId, epoch: Epoch) {
        self.detach();
        (self.owner, self.epoch) = (Some(owner), epoch);
    }

    pub(super) fn detach(&mut self) {
        (self.owner, self.session, self.open, self.hello) = (None, None, false, None);
        self.waiting.clear();
    }

    fn drop_layouts(&mut self) {
        for cache in &mut self.caches {
            cache.invalidate_all(&mut Vec::new());
        }
    }

    // ---- session ---------------------------------------------------------------------------------------------

    pub(super) fn tick(&mut self, ctx: &mut Ctx<'_>) {
        let now = ctx.mono_ms();
        self.waiting.retain(|_, (sent, _)| now < *sent + GET_AGAIN_MS);
        if self.path_failed && now >= self.probed_ms + PROBE_MS {
            self.probed_ms = now;
            let number = ctx.number();
            self.ios.insert(number, Io::Probe);
            ctx.out.push(Action::Lun(self.volume, Request::Read(Vec::new()), Reply::Client(number)));
        }
        if self.suspended || self.owner.is_none() {
            return;
        }
        self.keep_session(ctx, now);
        if now >= self.next_wish_ms {
            self.next_wish_ms = now + ctx.rng.range(20, 160);
            self.wish(ctx);
        }
    }

    fn keep_session(&mut self, ctx: &mut Ctx<'_>, now: u64) {
        if self.session.is_some() && now >= self.heard_ms + SILENT_MS {
            // The link counts as broken; the session may go on.
            (self.session, self.open, self.hello) = (None, false, None);
        }
        if self.session.is_none() {
            if self.hello.is_none_or(|(_, sent)| now >= sent + HELLO_AGAIN_MS) {
                let hello = ctx.number();
                self.hello = Some((hello, now));
                self.tell(ctx, What::Hello { client: self.life, hello });
            }
            return;
        }
        if now < self.pinged_ms + PING_MS {
            return;
        }
        self.pinged_ms = now;
        if self.reclaiming {
            self.reclaim(ctx);
        }
        self.tell(ctx, What::Ping { sent_ms: now });
    }

    fn reclaim(&mut self, ctx: &mut Ctx<'_>) {
        let mut files = Vec::new();
        if self.keep {
            for (file, cache) in self.caches.iter_mut().enumerate() {
                cache.forget_recalls();
                files.push((file, cache.held()));
            }
        } else if !self.is_quiet() && !ctx.bugs.reclaim_done_too_early {
            // What is under way may still write where this node holds nothing any more.
            return;
        }
        self.tell(ctx, What::Reclaim { files });
    }

    fn welcome(&mut self, ctx: &mut Ctx<'_>, session: u64, hello: u64, resumed: bool, grace: bool) {
        let Some((_, hello_ms)) = self.hello.take_if(|(sent, _)| *sent == hello) else { return };
        let now = ctx.mono_ms();
        let was_alive = now < self.lease_until_ms;
        (self.session, self.heard_ms, self.pinged_ms) = (Some(session), now, 0);
        if resumed && !self.reclaiming {
            self.renew(hello_ms);
            self.open = true;
            return;
        }
        self.keep = (grace || resumed) && was_alive;
        self.reclaiming = true;
        let (me, volume, keep, epoch) = (ctx.me, self.volume, self.keep, self.epoch);
        ctx.note(format!(
            "{me} session {session} on volume {volume} in epoch {epoch}; keeps layouts: {keep}"
        ));
        if !self.keep {
            self.drop_layouts();
        }
        self.renew(hello_ms);
        self.reclaim(ctx);
    }

    fn renew(&mut self, sent_ms: u64) {
        if !self.suspended {
            self.lease_until_ms = self.lease_until_ms.max(sent_ms + LEASE_MS);
        }
    }

    /// A message of a coordinator.
    pub(super) fn receive(&mut self, ctx: &mut Ctx<'_>, from: NodeId, body: Body) {
        let Body { epoch, session, what } = body;
        let checked = !ctx.bugs.epoch_not_checked;
        if checked && (epoch != self.epoch || Some(from) != self.owner) {
            return;
        }
        if let What::Welcome { hello, resumed, grace } = what {
            self.welcome(ctx, session, hello, resumed, grace);
            return;
        }
        if checked && self.session != Some(session) {
            return;
        }
        self.heard_ms = ctx.mono_ms();
        match what {
            What::Reclaimed => (self.open, self.reclaiming) = (true, false),
            What::Pong { sent_ms } => self.renew(sent_ms),
            What::Grant { request, file, seq, range, access, extents } => {
                self.granted(ctx, request, file, seq, range, access, &extents);
            }
            What::NoGrant { request } => drop(self.waiting.remove(&request)),
            What::Recall { file, recall_id, range, up_to_seq, keep_read } => {
                let mut returns = Vec::new();
                self.caches[file].recalled(recall_id, range, up_to_seq, keep_read, &mut returns);
                self.give_back(ctx, file, returns);
            }
            What::Revoked => {
                self.lease_until_ms = 0;
                (self.session, self.open, self.hello) = (None, false, None);
                self.drop_layouts();
            }
            What::Welcome { .. }
            | What::Hello { .. }
            | What::Reclaim { .. }
            | What::Ping { .. }
            | What::Get { .. }
            | What::Return { .. }
            | What::Punch { .. } => {}
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one message")]
    fn granted(
        &mut self,
        ctx: &mut Ctx<'_>,
        request: u64,
        file: FileNo,
        seq: u64,
        range: ByteRange,
        access: Access,
        extents: &[Extent],
    ) {
        self.caches[file].granted(seq, range, access, extents, None);
        // Under the same lock, lest two nodes take it from each other without either getting to its I/O.
        if let Some((_, wish)) = self.waiting.remove(&request) {
            self.begin(ctx, wish, false);
        }
    }

    fn give_back(&mut self, ctx: &mut Ctx<'_>, file: FileNo, returns: Vec<Return>) {
        if self.session.is_none() {
            return;
        }
        for Return { recall_id, range, up_to_seq, .. } in returns {
            self.tell(ctx, What::Return { file, range, up_to_seq, recall_id });
        }
    }

    // ---- programs --------------------------------------------------------------------------------------------

    fn wish(&mut self, ctx: &mut Ctx<'_>) {
        let file = ctx.rng.below(FILES);
        let first = u32::try_from(ctx.rng.below(FBLOCKS)).unwrap_or(0);
        let room = u32::try_from(FBLOCKS).unwrap_or(0) - first;
        let count = u32::try_from(ctx.rng.range(1, 3)).unwrap_or(1).min(room);
        let wish = |kind, count| Wish { kind, file, first, count };
        match ctx.rng.below(100) {
            0..=39 => self.begin(ctx, wish(Kind::Read, count), true),
            40..=74 => self.begin(ctx, wish(Kind::Write, count), true),
            75..=83 => self.begin(ctx, wish(Kind::Rmw, 1), true),
            84..=91 => self.sync(ctx),
            _ if self.open => {
                let range = wish(Kind::Write, count).range();
                self.tell(ctx, What::Punch { file, range });
            }
            _ => {}
        }
    }

    /// fsync: what has ended so far is to be durable.
    fn sync(&mut self, ctx: &mut Ctx<'_>) {
        if self.may_begin(ctx.mono_ms()) && self.ios.len() < IO_MAX && !self.unsynced.is_empty() {
            let number = ctx.number();
            self.ios.insert(number, Io::Sync(std::mem::take(&mut self.unsynced)));
            ctx.out.push(Action::Lun(self.volume, Request::Flush, Reply::Client(number)));
        }
    }

    fn begin(&mut self, ctx: &mut Ctx<'_>, wish: Wish, ask: bool) {
        if !self.may_begin(ctx.mono_ms()) || self.ios.len() >= IO_MAX {
            return;
        }
        let mut segments = Vec::new();
        let cache = &mut self.caches[wish.file];
        let range = wish.range();
        let outcome = match wish.kind {
            Kind::Read => cache.begin_read(range, &mut segments),
            Kind::Write => cache.begin_write(range, BLOCK_BYTES, &mut segments),
            Kind::Rmw => {
                cache.begin_write(ByteRange::new(range.start + 7, range.end - 7), BLOCK_BYTES, &mut segments)
            }
        };
        match outcome {
            Outcome::Hit(token) | Outcome::HitRmw(token) => self.begun(ctx, wish, token, &segments),
            Outcome::Busy => {}
            Outcome::Miss => {
                let asked = self.waiting.values().any(|(_, waiting)| waiting.file == wish.file);
                if ask && self.open && !asked {
                    let request = ctx.number();
                    self.waiting.insert(request, (ctx.mono_ms(), wish));
                    let (file, access) = (wish.file, wish.access());
                    self.tell(ctx, What::Get { request, file, range, access });
                }
            }
        }
    }

    fn begun(&mut self, ctx: &mut Ctx<'_>, wish: Wish, token: IoToken, segments: &[Segment]) {
        let place = |fblock: u32| {
            let at = u64::from(fblock) * BLOCK_BYTES;
            let holds =
                |s: &&Segment| s.file_offset / BLOCK_BYTES * BLOCK_BYTES <= at && at < s.file_offset + s.len;
            let segment = segments.iter().find(holds)?;
            let lun = segment.lun_offset?.0 + at.saturating_sub(segment.file_offset);
            u32::try_from(lun / BLOCK_BYTES).ok()
        };
        let fblocks: Vec<u32> = (wish.first..wish.first + wish.count).collect();
        let places = fblocks.iter().map(|fblock| place(*fblock)).collect();
        let mut writes = Vec::new();
        if !matches!(wish.kind, Kind::Read) {
            for &fblock in &fblocks {
                let write = ctx.number();
                writes.push(write);
                let (volume, file) = (self.volume, wish.file);
                ctx.observe(Observation::WriteBegun { volume, file, fblock, write });
            }
        }
        let number = ctx.number();
        self.ios.insert(number, Io::Direct { wish, token, writes, places, began_ms: ctx.now_ms });
        // Whoever is frozen here submits when it wakes up, without another look.
        let pause = ctx.rng.range(0, 2);
        ctx.after(pause, Process::Csvfs(self.volume), Input::Submit(number));
    }

    pub(super) fn submit(&mut self, ctx: &mut Ctx<'_>, number: u64) {
        let Some(Io::Direct { wish, writes, places, .. }) = self.ios.get(&number) else { return };
        let request = if let Kind::Read = wish.kind {
            Request::Read(places.iter().flatten().copied().collect())
        } else {
            let content = |at: usize| Content {
                file: wish.file,
                fblock: wish.first + u32::try_from(at).unwrap_or(0),
                write: writes[at],
            };
            let blocks = places.iter().enumerate().filter_map(|(at, place)| Some((((*place)?), content(at))));
            Request::Write { blocks: blocks.collect(), zeroing: false }
        };
        ctx.out.push(Action::Lun(self.volume, request, Reply::Client(number)));
    }

    pub(super) fn io_ended(&mut self, ctx: &mut Ctx<'_>, number: u64, answer: &Answer) {
        let Some(io) = self.ios.remove(&number) else { return };
        match answer {
            Answer::Conflict => {
                self.refused = true;
                self.lease_until_ms = 0;
            }
            Answer::Failed => self.path_failed = true,
            Answer::Done | Answer::Blocks(..) | Answer::Head { .. } | Answer::Keys(_) => {}
        }
        let volume = self.volume;
        match io {
            Io::Probe => {
                self.path_failed = matches!(answer, Answer::Failed);
                if !self.path_failed {
                    // With the login anew what was left there is over.
                    for (file, token) in std::mem::take(&mut self.unknown) {
                        self.end(ctx, file, token, false);
                    }
                }
            }
            Io::Sync(writes) => {
                if matches!(answer, Answer::Done) {
                    ctx.observe(Observation::Synced { volume, writes });
                }
            }
            Io::Direct { wish, token, writes, places, began_ms } => {
                if let Answer::Blocks(contents, registered) = answer {
                    self.was_read(ctx, wish, &places, contents, *registered, began_ms);
                }
                let done = matches!(answer, Answer::Done);
                if done {
                    self.was_written(ctx, wish, &writes);
                }
                let unknown = matches!(answer, Answer::Failed) && !writes.is_empty();
                if unknown && !ctx.bugs.returned_with_io_unknown {
                    self.unknown.push((wish.file, token));
                } else {
                    self.end(ctx, wish.file, token, done);
                }
            }
        }
    }

    fn end(&mut self, ctx: &mut Ctx<'_>, file: FileNo, token: IoToken, wrote: bool) {
        let mut returns = Vec::new();
        self.caches[file].end(token, wrote, &mut returns);
        self.give_back(ctx, file, returns);
    }

    fn was_written(&mut self, ctx: &mut Ctx<'_>, wish: Wish, writes: &[u64]) {
        let (volume, file) = (self.volume, wish.file);
        for (fblock, &write) in (wish.first..).zip(writes) {
            ctx.observe(Observation::WriteEnded { volume, file, fblock, write });
            self.unsynced.push((file, fblock, write));
        }
        ctx.observe(Observation::Progress(volume));
    }

    fn was_read(
        &mut self,
        ctx: &mut Ctx<'_>,
        wish: Wish,
        places: &[Option<Block>],
        read: &[Content],
        registered: bool,
        began_ms: u64,
    ) {
        if !registered {
            ctx.observe(Observation::ReadWhileFenced);
            return;
        }
        let mut read = read.iter();
        let mut contents = Vec::new();
        for (fblock, place) in (wish.first..).zip(places) {
            let content = place.and_then(|_| read.next()).copied().unwrap_or_default();
            let own = content.write == 0 || (content.file, content.fblock) == (wish.file, fblock);
            contents.push(if own { content.write } else { u64::MAX });
        }
        let (volume, file, fblock) = (self.volume, wish.file, wish.first);
        ctx.observe(Observation::Read { volume, file, fblock, contents, began_ms });
    }
}
