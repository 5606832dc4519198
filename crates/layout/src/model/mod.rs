//! A whole small world in memory: one table with its driver, three clients with a cache for each of two files, a
//! network that delays, reorders, doubles and (recalls only, as they are sent again) loses messages, I/O in
//! flight, fences and lost leases, coordinators that die and have their successor told what is held, and guards
//! under which blocks move to another place on the LUN.
//!
//! `check` states what must hold after every step, `heal` what must come to an end; `tests` drives both, with the
//! code as it is and with deliberate defects.

mod check;
mod driver;
mod tests;

use crate::Access;
use crate::Extent;
use crate::cache::{EofRight, IoToken, LayoutCache, Outcome, Return};
use crate::mutation::{Mutant, Mutation};
use crate::table::{Effect, Input, LayoutTable, RequestId, TableConfig, Tick};
use csv_types::{ByteRange, FileId, LunOffset, NodeId};
use std::collections::{BTreeMap, BTreeSet};

const NODES: usize = 3;
const FILES: usize = 2;
/// The file whose end is moved. What its clients send stays in order; all else is delivered in any order.
const GROWING: usize = 1;
/// Blocks that a file can get.
const BLOCKS: u64 = 8;
const BLOCK: u64 = 4096;
const RECALL_MS: u64 = 1000;
const RESEND_MS: u64 = 100;

#[derive(Debug)]
struct World {
    table: LayoutTable,
    now: Tick,
    files: Vec<File>,
    clients: Vec<Client>,
    net: Vec<Message>,
    gets: BTreeMap<RequestId, Get>,
    guards: BTreeMap<RequestId, Guard>,
    /// Nodes that the table wants fenced.
    fences: BTreeSet<usize>,
    next_request: u64,
    next_lun_block: u64,
    epoch: u64,
}

/// A file as the coordinator sees it, and the truth.
#[derive(Debug)]
struct File {
    lun_blocks: Vec<u64>,
    size: u64,
    eof_holder: Option<(usize, u64)>,
    /// Recalls of the end-of-file right not answered yet.
    eof_recalls: BTreeSet<u64>,
    /// Size that the file must have when all rights are back.
    true_size: u64,
}

#[derive(Debug)]
struct Client {
    caches: Vec<LayoutCache>,
    io: Vec<InFlight>,
    /// The LUN refuses its I/O; its session is over.
    fenced: bool,
    /// Number of its session; messages of other sessions are thrown away.
    session: u32,
}

#[derive(Debug)]
struct InFlight {
    file: usize,
    token: IoToken,
    range: ByteRange,
    access: Access,
}

#[derive(Debug, Clone)]
struct Message {
    node: usize,
    session: u32,
    body: Body,
}

#[derive(Debug, Clone)]
enum Body {
    Get {
        file: usize,
        range: ByteRange,
        access: Access,
        extend: bool,
    },
    Grant {
        file: usize,
        seq: u64,
        range: ByteRange,
        access: Access,
        extents: Vec<Extent>,
        eof: Option<EofRight>,
    },
    Recall {
        file: usize,
        recall_id: u64,
        range: ByteRange,
        up_to_seq: u64,
        keep_read: bool,
    },
    Return {
        file: usize,
        answer: Return,
    },
}

#[derive(Debug)]
struct Get {
    file: usize,
    range: ByteRange,
    extend: bool,
    /// Told to map, within this.
    limit: Option<ByteRange>,
}

#[derive(Debug)]
struct Guard {
    file: usize,
    range: ByteRange,
    except: Option<usize>,
    keep_read: bool,
    held: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Rmw,
}

impl Message {
    /// Must stay behind earlier ones of the same node.
    fn ordered(&self) -> bool {
        match self.body {
            Body::Get { file, .. } | Body::Return { file, .. } => file == GROWING,
            Body::Grant { .. } | Body::Recall { .. } => false,
        }
    }
}

impl InFlight {
    /// Bytes that are read, blocks that are written.
    fn blocks(&self) -> ByteRange {
        if self.access == Access::Read { self.range } else { self.range.align_out(BLOCK) }
    }
}

fn file_id(file: usize) -> FileId {
    FileId { ino: file as u64 + 1, generation: 7 }
}

fn file_of(id: FileId) -> usize {
    usize::try_from(id.ino - 1).unwrap()
}

fn node_id(node: usize) -> NodeId {
    NodeId(u32::try_from(node).unwrap() + 1)
}

fn node_of(id: NodeId) -> usize {
    id.0 as usize - 1
}

fn new_table(epoch: u64, mutant: Option<Mutant>) -> LayoutTable {
    let mut table = LayoutTable::new(TableConfig {
        recall_ms: RECALL_MS,
        resend_ms: RESEND_MS,
        gets_per_file_max: 6,
        pieces_per_node_max: 4,
        seq_first: (epoch << 32) + 1,
    });
    table.mutation = Mutation { on: mutant };
    table
}

fn floor(bytes: u64) -> u64 {
    bytes / BLOCK * BLOCK
}

impl World {
    fn new(mutant: Option<Mutant>) -> Self {
        let table = new_table(1, mutant);
        let cache = || {
            let mut cache = LayoutCache::new();
            cache.mutation = Mutation { on: mutant };
            cache
        };
        let client = |_| Client {
            caches: (0..FILES).map(|_| cache()).collect(),
            io: Vec::new(),
            fenced: false,
            session: 1,
        };
        let size = 4 * BLOCK + 100;
        let file = |file: usize| File {
            lun_blocks: (0..BLOCKS).map(|block| file as u64 * BLOCKS + block).collect(),
            size,
            eof_holder: None,
            eof_recalls: BTreeSet::new(),
            true_size: size,
        };
        World {
            table,
            now: 0,
            files: (0..FILES).map(file).collect(),
            clients: (0..NODES).map(client).collect(),
            net: Vec::new(),
            gets: BTreeMap::new(),
            guards: BTreeMap::new(),
            fences: BTreeSet::new(),
            next_request: 0,
            next_lun_block: FILES as u64 * BLOCKS,
            epoch: 1,
        }
    }

    fn request(&mut self) -> RequestId {
        self.next_request += 1;
        RequestId(self.next_request)
    }

    fn send(&mut self, node: usize, body: Body) {
        let session = self.clients[node].session;
        self.net.push(Message { node, session, body });
    }

    // ---- clients ---------------------------------------------------------------------------------------------

    /// A program on the node reads or writes; a miss asks the coordinator.
    fn begin_io(&mut self, node: usize, file: usize, kind: Kind, blocks: ByteRange) -> Result<(), String> {
        let client = &mut self.clients[node];
        if client.fenced {
            return Ok(());
        }
        let range = ByteRange::new(blocks.start * BLOCK, blocks.end * BLOCK);
        let rmw = ByteRange::new(range.start + 100, range.end - 100);
        let mut segments = Vec::new();
        let (outcome, access) = match kind {
            Kind::Read => (client.caches[file].begin_read(rmw, &mut segments), Access::Read),
            Kind::Write => (client.caches[file].begin_write(range, BLOCK, &mut segments), Access::Write),
            Kind::Rmw => (client.caches[file].begin_write(rmw, BLOCK, &mut segments), Access::Exclusive),
        };
        let bytes = match kind {
            Kind::Read => ByteRange::at(rmw.start, client.caches[file].readable_len(rmw)),
            Kind::Write => range,
            Kind::Rmw => rmw,
        };
        match outcome {
            Outcome::Hit(token) | Outcome::HitRmw(token) => {
                client.io.push(InFlight { file, token, range: bytes, access });
                return self.check_hit(node, file, &segments);
            }
            Outcome::Busy => {
                let write = |io: &InFlight| io.file == file && io.access != Access::Read;
                if !client.io.iter().any(|io| write(io) && io.blocks().overlaps(&range)) {
                    return Err(format!("busy without cause: n{node} file {file} {range}"));
                }
            }
            Outcome::Miss => {
                let extend =
                    file == GROWING && kind != Kind::Read && range.end > floor(self.files[file].size);
                self.send(node, Body::Get { file, range, access, extend });
            }
        }
        Ok(())
    }

    fn end_io(&mut self, node: usize, which: usize, ok: bool) -> Result<(), String> {
        let client = &mut self.clients[node];
        let io = client.io.swap_remove(which);
        let wrote = ok && !client.fenced && io.access != Access::Read;
        let mut answers = Vec::new();
        client.caches[io.file].end(io.token, wrote, &mut answers);
        let file = &mut self.files[io.file];
        if wrote && io.range.end > file.true_size {
            file.true_size = io.range.end;
            if file.eof_holder.is_none_or(|(holder, _)| holder != node) {
                return Err(format!("n{node} moved the end of file {} without the right", io.file));
            }
        }
        self.answer(node, io.file, answers);
        Ok(())
    }

    fn answer(&mut self, node: usize, file: usize, answers: Vec<Return>) {
        if !self.clients[node].fenced {
            for answer in answers {
                self.send(node, Body::Return { file, answer });
            }
        }
    }

    /// Gives up a range in front of the end of file.
    fn give_back(&mut self, node: usize, file: usize, range: ByteRange) {
        let client = &mut self.clients[node];
        let size = client.caches[file].eof().map_or(u64::MAX, |eof| floor(eof.size));
        let range = ByteRange::new(range.start, range.end.min(size));
        if !client.fenced && !range.is_empty() {
            let mut answers = Vec::new();
            client.caches[file].give_back(range, &mut answers);
            self.answer(node, file, answers);
        }
    }

    /// The node comes back with a new session and nothing held.
    fn rejoin(&mut self, node: usize) {
        if !self.clients[node].fenced {
            return;
        }
        while !self.clients[node].io.is_empty() {
            self.end_io(node, 0, false).unwrap();
        }
        let client = &mut self.clients[node];
        for cache in &mut client.caches {
            cache.invalidate_all(&mut Vec::new());
            cache.take_wrote();
            assert!(cache.is_empty(), "drained and revoked, yet not empty: {cache:?}");
        }
        client.fenced = false;
        client.session += 1;
    }

    // ---- network ---------------------------------------------------------------------------------------------

    /// Delivers a message; in its place an earlier one that it must not overtake.
    fn deliver_any(&mut self, which: usize) {
        let picked = &self.net[which];
        let first = |m: &Message| m.ordered() && m.node == picked.node;
        let which = if picked.ordered() { self.net.iter().position(first).unwrap_or(which) } else { which };
        let message = self.net.remove(which);
        self.deliver(message);
    }

    fn deliver(&mut self, message: Message) {
        let Message { node, session, body } = message;
        if self.clients[node].fenced || self.clients[node].session != session {
            return;
        }
        let mut answers = Vec::new();
        match body {
            Body::Get { file, range, access, extend } => self.take_get(node, file, range, access, extend),
            Body::Return { file, answer } => self.take_return(node, file, answer),
            Body::Grant { file, seq, range, access, extents, eof } => {
                self.clients[node].caches[file].granted(seq, range, access, &extents, eof);
            }
            Body::Recall { file, recall_id, range, up_to_seq, keep_read } => {
                let cache = &mut self.clients[node].caches[file];
                cache.recalled(recall_id, range, up_to_seq, keep_read, &mut answers);
                self.answer(node, file, answers);
            }
        }
    }
}
