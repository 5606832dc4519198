//! A volume's LUN: blocks with a volatile cache before them, the file system's metadata as one record, the label, and
//! SCSI-3 reservations of the type Write Exclusive - Registrants Only. A request **arrives** (reservations are checked) and
//! **lands** (it takes effect) at two different times; in between it can be aborted.

use crate::rng::Rng;
use csv_types::{Epoch, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Number of a block.
pub type Block = u32;
/// Number of a file.
pub type FileNo = usize;
/// Number of a request.
pub type IoId = u64;

/// What a block holds: written as which block of which file, by which write. Write 0 are zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Content {
    /// File.
    pub file: FileNo,
    /// Block in the file.
    pub fblock: u32,
    /// Number of the write.
    pub write: u64,
}

/// The file system's metadata as its journal has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Under which ownership it was written.
    pub epoch: Epoch,
    /// Transactions so far.
    pub txn: u64,
    /// For each file, for each of its blocks, where it is.
    pub files: Vec<Vec<Option<Block>>>,
    /// Nodes that had sessions.
    pub roster: BTreeSet<NodeId>,
}

impl Meta {
    /// Every block that belongs to a file.
    #[must_use]
    pub fn used(&self) -> BTreeSet<Block> {
        self.files.iter().flatten().flatten().copied().collect()
    }

    /// Where a block of a file is.
    #[must_use]
    pub fn place(&self, file: FileNo, fblock: u32) -> Option<Block> {
        self.files.get(file)?.get(usize::try_from(fblock).ok()?).copied().flatten()
    }
}

/// A request.
#[derive(Debug, Clone)]
pub enum Request {
    /// Read blocks.
    Read(Vec<Block>),
    /// Write blocks. `zeroing`: by the coordinator, of blocks that no file has, forced to the medium.
    Write { blocks: Vec<(Block, Content)>, zeroing: bool },
    /// Commit metadata, forced to the medium.
    Commit(Rc<Meta>),
    /// Make what has landed durable.
    Flush,
    /// Read label and metadata.
    ReadHead,
    /// Begin an ownership: write the label.
    BeginEpoch { epoch: Epoch, owner: NodeId },
    /// REGISTER AND IGNORE EXISTING KEY, read back, and RESERVE if nobody has.
    Register { key: u64 },
    /// REGISTER of no key, if this one is registered.
    Unregister { key: u64 },
    /// READ KEYS.
    ReadKeys,
    /// PREEMPT AND ABORT of these keys; without `abort` only PREEMPT.
    Preempt { own: u64, victims: Vec<u64>, abort: bool },
}

/// What came of a request.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Done.
    Done,
    /// Blocks read, and whether the reader was registered when they were.
    Blocks(Vec<Content>, bool),
    /// Label and metadata.
    Head { label: Epoch, meta: Rc<Meta> },
    /// Registered keys.
    Keys(Vec<u64>),
    /// Reservation conflict.
    Conflict,
    /// Path or storage failed; a write may have landed.
    Failed,
}

/// A request inside the storage.
#[derive(Debug)]
struct Queued {
    node: NodeId,
    key: u64,
    request: Request,
}

/// What arriving did.
#[derive(Debug)]
pub enum Arrival {
    /// Answered at once.
    Answered(Answer),
    /// It lands later.
    Queued,
}

/// A write that took effect.
#[derive(Debug)]
pub struct Landed {
    /// By whom.
    pub node: NodeId,
    /// Under which key; 0 for none.
    pub key: u64,
    /// What.
    pub request: Request,
}

/// See the module.
#[derive(Debug)]
pub struct Lun {
    /// Epoch in the label.
    pub label: Epoch,
    /// Metadata.
    pub meta: Rc<Meta>,
    cached: Vec<Content>,
    durable: Vec<Content>,
    /// Keys by node (I_T nexus).
    pub registered: BTreeMap<NodeId, u64>,
    /// Key of the holder of the reservation.
    pub reserved: Option<u64>,
    queue: BTreeMap<IoId, Queued>,
    /// Nodes whose next flush fails, because the storage has restarted (unit attention).
    attention: BTreeSet<NodeId>,
    /// Does the storage lose what was not flushed when it restarts?
    pub loses_cache: bool,
    /// Do registrations survive its restart?
    pub aptpl: bool,
}

impl Lun {
    /// An empty volume of so many blocks, and files of so many each.
    #[must_use]
    pub fn new(blocks: usize, files: usize, fblocks: usize, loses_cache: bool, aptpl: bool) -> Lun {
        let meta = Meta {
            epoch: Epoch(0),
            txn: 0,
            files: vec![vec![None; fblocks]; files],
            roster: BTreeSet::new(),
        };
        Lun {
            label: Epoch(0),
            meta: Rc::new(meta),
            cached: vec![Content::default(); blocks],
            durable: vec![Content::default(); blocks],
            registered: BTreeMap::new(),
            reserved: None,
            queue: BTreeMap::new(),
            attention: BTreeSet::new(),
            loses_cache,
            aptpl,
        }
    }

    /// Could the node write now?
    #[must_use]
    pub fn can_write(&self, node: NodeId) -> bool {
        self.reserved.is_none() || self.registered.contains_key(&node)
    }

    fn at(&self, block: Block) -> Content {
        usize::try_from(block).ok().and_then(|at| self.cached.get(at)).copied().unwrap_or_default()
    }

    /// A request arrives. Aborted requests of victims are returned too, with what of them landed before.
    pub fn arrive(&mut self, id: IoId, node: NodeId, request: Request, rng: &mut Rng) -> Arrival {
        match request {
            Request::Read(blocks) => {
                let contents = blocks.into_iter().map(|block| self.at(block)).collect();
                Arrival::Answered(Answer::Blocks(contents, self.can_write(node)))
            }
            Request::ReadHead => {
                Arrival::Answered(Answer::Head { label: self.label, meta: self.meta.clone() })
            }
            Request::ReadKeys => Arrival::Answered(Answer::Keys(self.registered.values().copied().collect())),
            Request::Register { key } => {
                self.registered.insert(node, key);
                self.reserved.get_or_insert(key);
                Arrival::Answered(Answer::Done)
            }
            Request::Unregister { key } => {
                if self.registered.get(&node) == Some(&key) {
                    self.registered.remove(&node);
                    self.reserved = self.registered.values().next().copied();
                }
                Arrival::Answered(Answer::Done)
            }
            Request::Preempt { own, victims, abort } => {
                Arrival::Answered(self.preempt(node, own, &victims, abort, rng))
            }
            Request::Write { .. } | Request::Commit(_) | Request::BeginEpoch { .. } | Request::Flush => {
                if matches!(request, Request::Flush) && self.attention.remove(&node) {
                    return Arrival::Answered(Answer::Failed);
                }
                if !self.can_write(node) {
                    return Arrival::Answered(Answer::Conflict);
                }
                let key = self.registered.get(&node).copied().unwrap_or(0);
                self.queue.insert(id, Queued { node, key, request });
                Arrival::Queued
            }
        }
    }

    fn preempt(&mut self, node: NodeId, own: u64, victims: &[u64], abort: bool, rng: &mut Rng) -> Answer {
        if self.registered.get(&node) != Some(&own) {
            return Answer::Conflict;
        }
        let gone: Vec<NodeId> =
            self.registered.iter().filter(|(_, key)| victims.contains(key)).map(|(node, _)| *node).collect();
        for node in &gone {
            self.registered.remove(node);
        }
        if self.reserved.is_none_or(|holder| !self.registered.values().any(|key| *key == holder)) {
            self.reserved = Some(own);
        }
        if abort {
            for node in gone {
                self.abort(node, rng);
            }
        }
        Answer::Done
    }

    /// Ends what of a node is queued; some of it lands before, in part.
    pub fn abort(&mut self, node: NodeId, rng: &mut Rng) {
        let queued: Vec<IoId> =
            self.queue.iter().filter(|(_, queued)| queued.node == node).map(|(id, _)| *id).collect();
        for id in queued {
            let Some(Queued { request, .. }) = self.queue.remove(&id) else { continue };
            if let Request::Write { mut blocks, .. } = request {
                blocks.truncate(rng.below(blocks.len() + 1));
                self.put(&blocks);
            }
        }
    }

    fn put(&mut self, blocks: &[(Block, Content)]) {
        for (block, content) in blocks {
            if let Some(cell) = usize::try_from(*block).ok().and_then(|at| self.cached.get_mut(at)) {
                *cell = *content;
            }
        }
    }

    /// A request that is queued, and under which key.
    #[must_use]
    pub fn queued(&self, id: IoId) -> Option<(u64, &Request)> {
        self.queue.get(&id).map(|queued| (queued.key, &queued.request))
    }

    /// A queued request takes effect. `None`: it was aborted.
    pub fn land(&mut self, id: IoId) -> Option<Landed> {
        let Queued { node, key, request } = self.queue.remove(&id)?;
        match &request {
            Request::Write { blocks, zeroing } => {
                self.put(blocks);
                if *zeroing {
                    for (block, content) in blocks {
                        let cell = usize::try_from(*block).ok().and_then(|at| self.durable.get_mut(at));
                        if let Some(cell) = cell {
                            *cell = *content;
                        }
                    }
                }
            }
            Request::Commit(meta) => self.meta = meta.clone(),
            Request::BeginEpoch { epoch, .. } => self.label = *epoch,
            Request::Flush => self.durable.clone_from(&self.cached),
            Request::Read(_)
            | Request::ReadHead
            | Request::ReadKeys
            | Request::Register { .. }
            | Request::Unregister { .. }
            | Request::Preempt { .. } => {}
        }
        Some(Landed { node, key, request })
    }

    /// The storage restarts: what is queued is lost or lands in part, the cache may be lost, registrations too.
    pub fn restart(&mut self, everybody: impl Iterator<Item = NodeId>, rng: &mut Rng) {
        self.attention.extend(everybody);
        let nodes: BTreeSet<NodeId> = self.queue.values().map(|queued| queued.node).collect();
        for node in nodes {
            self.abort(node, rng);
        }
        if self.loses_cache {
            self.cached.clone_from(&self.durable);
        }
        if !self.aptpl {
            self.registered.clear();
            self.reserved = None;
        }
    }
}
