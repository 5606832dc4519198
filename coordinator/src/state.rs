//! What the coordinator knows in memory, behind one lock that is never held during I/O. Messages to sessions are
//! sent while it is held, so that they leave in the order of the decisions.

use crate::block::Pieces;
use crate::options::Outbox;
use crate::replies::ReplyCache;
use bytes::Bytes;
use csv_layout::table::{LayoutTable, RequestId};
use csv_layout::{Access, Extent};
use csv_locks::LockTable;
use csv_proto::{ModeOrder, ServerMessage, Time, server_message};
use csv_types::{ByteRange, Epoch, FileId, NodeId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{RwLock, oneshot};

/// A call, as long as it is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct CallRef {
    pub(crate) node: NodeId,
    pub(crate) session: u64,
    pub(crate) id: u64,
}

/// What a `Cancel` of a call would have to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waits {
    /// Nothing that can be ended.
    Nothing,
    /// A lock.
    Lock(u64),
    /// A layout.
    Get(RequestId),
    /// The caller was interrupted: a wait ends, or does not begin.
    Cancelled,
}

/// One node's session.
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) bytes: Bytes,
    pub(crate) connection: u64,
    pub(crate) outbox: Option<Arc<dyn Outbox>>,
    pub(crate) heard: Instant,
    /// It failed to answer: it is renewed no more and ends when it is fenced or its lease is over.
    pub(crate) doomed: bool,
    pub(crate) token: String,
    pub(crate) running: HashMap<u64, Waits>,
    /// Those of `running` that wait for a lock.
    pub(crate) lock_waits: usize,
    pub(crate) replies: ReplyCache,
    pub(crate) opens: HashMap<u64, FileId>,
    pub(crate) state_json: String,
    pub(crate) pieces: Pieces,
}

impl Session {
    /// Calls under way. A lock may be waited for as long as somebody likes, so those do not count: the lock table has a
    /// bound of its own.
    pub(crate) fn calls(&self) -> usize {
        self.running.len().saturating_sub(self.lock_waits)
    }

    /// A call is answered.
    pub(crate) fn ended(&mut self, id: u64) {
        if let Some(Waits::Lock(_)) = self.running.remove(&id) {
            self.lock_waits = self.lock_waits.saturating_sub(1);
        }
    }
}

/// Something that a node must answer.
pub(crate) struct Push {
    pub(crate) node: NodeId,
    pub(crate) body: server_message::Body,
    pub(crate) since: Instant,
    /// Dropped or used when it is answered or the session is over.
    pub(crate) answered: Option<oneshot::Sender<()>>,
}

/// The end-of-file right of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Eof {
    pub(crate) node: NodeId,
    /// Where the exclusive grant begins that it stands on.
    pub(crate) start: u64,
    pub(crate) alloc_end: u64,
}

/// What a holder told about a file and what is not yet in the file system.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Pending {
    pub(crate) size: Option<u64>,
    pub(crate) mtime: Option<Time>,
}

impl Pending {
    pub(crate) fn is_empty(&self) -> bool {
        self.size.is_none() && self.mtime.is_none()
    }
}

/// A node that may cache something, and a number that changes whenever what it may cache changes.
pub(crate) type Lease = (NodeId, u64);

/// What is known about one file; forgotten when there is nothing to remember.
#[derive(Debug, Default)]
pub(crate) struct FileState {
    /// Exclusive for changes of size, allocation or names; shared for buffered I/O and opens.
    pub(crate) lock: Arc<RwLock<()>>,
    pub(crate) opens: usize,
    pub(crate) attr_leases: Vec<Lease>,
    pub(crate) names_leases: Vec<Lease>,
    pub(crate) eof: Option<Eof>,
    pub(crate) pending: Pending,
    /// The end-of-file right came back: the file has to be cut to its logical size.
    pub(crate) settle: bool,
    /// Proven: no page of the file is in this node's page cache.
    pub(crate) cache_clean: bool,
    /// Gets that are being mapped.
    pub(crate) mapping: usize,
    /// Nodes that are being given the right to write: others may not lease the attributes meanwhile.
    pub(crate) write_gets: Vec<NodeId>,
    /// I/O of the block service under way.
    pub(crate) block_io: Vec<(u64, NodeId, ByteRange)>,
    /// Its last name is gone; it lives in the orphans directory until nobody needs it.
    pub(crate) unlinked: bool,
    /// It is being deleted.
    pub(crate) freeing: bool,
}

impl FileState {
    fn is_idle(&self) -> bool {
        self.opens == 0
            && self.attr_leases.is_empty()
            && self.names_leases.is_empty()
            && self.eof.is_none()
            && self.pending.is_empty()
            && !self.settle
            && self.mapping == 0
            && self.write_gets.is_empty()
            && self.block_io.is_empty()
            && !self.unlinked
            && Arc::strong_count(&self.lock) == 1
    }
}

/// How a get will be answered once the table grants it.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) extents: Vec<Extent>,
    pub(crate) size: u64,
    pub(crate) eof: Option<Eof>,
}

/// A get that the table has not granted yet.
#[derive(Debug)]
pub(crate) struct PendingGet {
    pub(crate) call: CallRef,
    pub(crate) map: Option<oneshot::Sender<ByteRange>>,
    pub(crate) plan: Option<Plan>,
}

/// Nodes that held something when the former coordinator ended.
#[derive(Debug)]
pub(crate) struct Grace {
    /// From then on only nodes that are reclaiming are waited for.
    pub(crate) until: Instant,
    /// And no longer than this.
    pub(crate) until_max: Instant,
    /// Those who may reclaim.
    pub(crate) members: BTreeSet<NodeId>,
    /// Those who have not reclaimed everything.
    pub(crate) waiting: BTreeSet<NodeId>,
    /// Given up while they reclaimed, with the session that has to end before anything of theirs is free.
    pub(crate) ending: BTreeMap<NodeId, u64>,
    /// When a node in `waiting` was last seen to reclaim, and over which connection.
    pub(crate) progress: BTreeMap<NodeId, (u64, Instant)>,
}

/// All of it.
pub(crate) struct Core {
    pub(crate) epoch: Epoch,
    pub(crate) sessions: BTreeMap<NodeId, Session>,
    pub(crate) files: HashMap<FileId, FileState>,
    pub(crate) table: LayoutTable,
    pub(crate) gets: HashMap<RequestId, PendingGet>,
    pub(crate) guards: HashMap<RequestId, oneshot::Sender<()>>,
    pub(crate) locks: LockTable,
    pub(crate) lock_calls: HashMap<u64, CallRef>,
    pub(crate) pushes: BTreeMap<u64, Push>,
    pub(crate) block_waits: Vec<(FileId, ByteRange, NodeId, oneshot::Sender<()>)>,
    pub(crate) grace: Option<Grace>,
    pub(crate) redirect_all: bool,
    pub(crate) redirect_nodes: BTreeSet<NodeId>,
    pub(crate) maintenance: bool,
    /// The volume is being handed over: no call is begun, and one that waits ends.
    pub(crate) moving: bool,
    /// No more calls are taken.
    pub(crate) stopping: bool,
    pub(crate) stopped: bool,
    /// Counts what was told to be changed, for readers of many files at once.
    pub(crate) changes: u64,
    /// Leases are being taken back to make room.
    pub(crate) making_room: bool,
    next: u64,
}

impl Core {
    pub(crate) fn new(epoch: Epoch, table: LayoutTable) -> Core {
        Core {
            epoch,
            sessions: BTreeMap::new(),
            files: HashMap::new(),
            table,
            gets: HashMap::new(),
            guards: HashMap::new(),
            locks: LockTable::new(csv_locks::Limits::default()),
            lock_calls: HashMap::new(),
            pushes: BTreeMap::new(),
            block_waits: Vec::new(),
            grace: None,
            redirect_all: false,
            redirect_nodes: BTreeSet::new(),
            maintenance: false,
            moving: false,
            stopping: false,
            stopped: false,
            changes: 0,
            making_room: false,
            next: 0,
        }
    }

    /// A number never given out before by this coordinator.
    pub(crate) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(crate) fn file(&mut self, file: FileId) -> &mut FileState {
        self.files.entry(file).or_default()
    }

    /// Forgets the file's state when there is nothing in it.
    pub(crate) fn tidy(&mut self, file: FileId) {
        if self.files.get(&file).is_some_and(FileState::is_idle) && !self.table.has_grants(file) {
            self.files.remove(&file);
        }
    }

    /// The session, if it is still the one that is meant.
    pub(crate) fn session(&mut self, node: NodeId, id: u64) -> Option<&mut Session> {
        self.sessions.get_mut(&node).filter(|session| session.id == id)
    }

    /// Notes what a call is going to wait for; false when it was cancelled already.
    pub(crate) fn waits_for(&mut self, at: CallRef, what: Waits) -> bool {
        let Some(session) = self.session(at.node, at.session) else {
            // Its session is over; whatever it waits for is ended with that.
            return true;
        };
        let Some(waits) = session.running.get_mut(&at.id) else { return true };
        if *waits == Waits::Cancelled {
            return false;
        }
        *waits = what;
        session.lock_waits += usize::from(matches!(what, Waits::Lock(_)));
        true
    }

    /// Sends to a node. A node that is not connected misses it; what it must not miss is sent again on resume.
    pub(crate) fn send(&self, node: NodeId, body: server_message::Body) {
        if let Some(outbox) = self.sessions.get(&node).and_then(|session| session.outbox.as_ref()) {
            outbox.send(ServerMessage { epoch: self.epoch.0, body: Some(body) });
        }
    }

    /// The order that stands for a node.
    pub(crate) fn mode_order(&self, node: NodeId) -> ModeOrder {
        ModeOrder {
            fs_redirected: self.redirect_all || self.redirect_nodes.contains(&node),
            maintenance: self.maintenance,
        }
    }

    /// Does a node other than `node` have the right to write the file or to move its end?
    pub(crate) fn written_by_others(&self, file: FileId, node: NodeId) -> bool {
        let state = self.files.get(&file);
        state.is_some_and(|state| state.eof.is_some_and(|eof| eof.node != node))
            || state.is_some_and(|state| state.write_gets.iter().any(|other| *other != node))
            || self.table.grants(file).any(|(holder, _, access, _)| holder != node && access != Access::Read)
    }
}
