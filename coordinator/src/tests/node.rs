//! A node that speaks the protocol in this process, and short forms of what it says.

use super::rig::WAIT;
use crate::{Coordinator, Outbox, SessionRef};
use csv_proto::{
    Attr, Call, ClientMessage, CommitAnswer, Cred, Hello, Invalidate, InvalidateAck, LayoutExtent, LayoutGet,
    LayoutGrant, LayoutReturn, Recall, Reply, ServerMessage, StatusReport, Welcome, call::Op, client_message,
    reply, server_message,
};
use csv_types::{FileId, NodeId};
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

#[derive(Default)]
struct Seen {
    replies: HashMap<u64, Reply>,
    welcome: Option<Welcome>,
    recalls: Vec<Recall>,
    invalidated: Vec<Invalidate>,
    queries: usize,
    revoked: Option<String>,
    closed: bool,
    sizes: BTreeMap<FileId, u64>,
}

/// A node. Unless told otherwise it answers whatever it is asked, at once.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    coordinator: Arc<Coordinator>,
    pub(crate) session: Mutex<Option<SessionRef>>,
    epoch: u64,
    next: AtomicU64,
    seen: Mutex<Seen>,
    changed: Condvar,
    /// Does it answer recalls, queries and invalidations?
    pub(crate) answers: AtomicBool,
    /// Does it answer recalls, if it answers at all?
    pub(crate) returns: AtomicBool,
}

struct Line(Mutex<mpsc::Sender<Option<ServerMessage>>>);

impl Outbox for Line {
    fn send(&self, message: ServerMessage) {
        let _sent = self.0.lock().send(Some(message));
    }
    fn close(&self, _why: &str) {
        let _sent = self.0.lock().send(None);
    }
}

impl Node {
    pub(crate) fn connect(
        coordinator: &Arc<Coordinator>,
        id: NodeId,
        session: [u8; 16],
        last_epoch: u64,
    ) -> Arc<Node> {
        let node = Arc::new(Node {
            id,
            coordinator: Arc::clone(coordinator),
            session: Mutex::new(None),
            epoch: coordinator.options().epoch.0,
            next: AtomicU64::new(0),
            seen: Mutex::default(),
            changed: Condvar::new(),
            answers: AtomicBool::new(true),
            returns: AtomicBool::new(true),
        });
        node.plug(session, last_epoch);
        node
    }

    /// Connects (again).
    pub(crate) fn plug(self: &Arc<Self>, session: [u8; 16], last_epoch: u64) {
        let (tx, rx) = mpsc::channel();
        let hello = Hello {
            protocol_version: csv_proto::PROTOCOL_VERSION,
            node: self.id.0,
            volume: "vol".to_owned(),
            session: session.to_vec().into(),
            last_epoch,
        };
        self.seen.lock().welcome = None;
        let found = self.coordinator.connect(self.id, &hello, Arc::new(Line(Mutex::new(tx)))).unwrap();
        *self.session.lock() = Some(found);
        let me = Arc::downgrade(self);
        std::thread::spawn(move || {
            for message in rx {
                let Some(me) = me.upgrade() else { return };
                match message.and_then(|message| message.body) {
                    Some(body) => me.take(body),
                    None => me.see(|seen| seen.closed = true),
                }
            }
        });
        self.wait("Welcome", |seen| seen.welcome.clone());
    }

    fn see(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock());
        self.changed.notify_all();
    }

    fn take(&self, body: server_message::Body) {
        let answers = self.answers.load(Ordering::SeqCst);
        match body {
            server_message::Body::Welcome(welcome) => self.see(|seen| seen.welcome = Some(welcome)),
            server_message::Body::Reply(reply) => self.see(|seen| {
                seen.replies.insert(reply.id, reply);
            }),
            server_message::Body::Recall(recall) => {
                self.see(|seen| seen.recalls.push(recall));
                if answers && self.returns.load(Ordering::SeqCst) {
                    self.give_back(&recall);
                }
            }
            server_message::Body::CommitQuery(query) => {
                let file = csv_proto::file_id(query.file).unwrap();
                self.see(|seen| seen.queries += 1);
                let size = self.seen.lock().sizes.get(&file).copied();
                if answers {
                    self.send(client_message::Body::CommitAnswer(CommitAnswer {
                        query_id: query.query_id,
                        file: query.file,
                        size,
                        mtime: None,
                    }));
                }
            }
            server_message::Body::Invalidate(invalidate) => {
                self.see(|seen| seen.invalidated.push(invalidate));
                if answers {
                    self.send(client_message::Body::InvalidateAck(InvalidateAck { id: invalidate.id }));
                }
            }
            server_message::Body::Revoked(revoked) => self.see(|seen| {
                seen.revoked.get_or_insert(revoked.reason);
            }),
            server_message::Body::Pong(_) | server_message::Body::ModeOrder(_) => {}
        }
    }

    pub(crate) fn give_back(&self, recall: &Recall) {
        let file = csv_proto::file_id(recall.file).unwrap();
        let size = self.seen.lock().sizes.get(&file).copied();
        self.send(client_message::Body::LayoutReturn(LayoutReturn {
            file: recall.file,
            offset: recall.offset,
            end: recall.end,
            up_to_seq: recall.up_to_seq,
            recall_id: recall.recall_id,
            size,
            mtime: None,
        }));
    }

    /// From now on the node says that it moved the file's end here.
    pub(crate) fn grew(&self, file: FileId, size: u64) {
        self.seen.lock().sizes.insert(file, size);
    }

    pub(crate) fn send(&self, body: client_message::Body) {
        let session = self.session.lock().clone().unwrap();
        self.coordinator.message(&session, ClientMessage { epoch: self.epoch, body: Some(body) });
    }

    /// Waits until `look` finds something.
    fn wait<T>(&self, what: &str, look: impl Fn(&mut Seen) -> Option<T>) -> T {
        let deadline = Instant::now() + WAIT;
        let mut seen = self.seen.lock();
        loop {
            if let Some(found) = look(&mut seen) {
                return found;
            }
            assert!(!self.changed.wait_until(&mut seen, deadline).timed_out(), "{}: no {what}", self.id);
        }
    }

    pub(crate) fn new_id(&self) -> u64 {
        self.next.fetch_add(1, Ordering::SeqCst) + 1
    }

    pub(crate) fn start(&self, op: Op) -> u64 {
        let id = self.new_id();
        self.start_as(Call { id, cred: Some(root()), op: Some(op), ..Call::default() })
    }

    pub(crate) fn start_as(&self, call: Call) -> u64 {
        let id = call.id;
        self.next.fetch_max(id, Ordering::SeqCst);
        self.send(client_message::Body::Call(call));
        id
    }

    pub(crate) fn finish(&self, id: u64) -> Reply {
        self.wait("reply", |seen| seen.replies.remove(&id))
    }

    pub(crate) fn answered(&self, id: u64) -> bool {
        self.seen.lock().replies.contains_key(&id)
    }

    pub(crate) fn call(&self, op: Op) -> Reply {
        let id = self.start(op);
        self.finish(id)
    }

    /// A call that must succeed.
    pub(crate) fn ok(&self, op: Op) -> Reply {
        let text = format!("{op:?}");
        let reply = self.call(op);
        assert_eq!(reply.errno, 0, "{text}: {}", reply.reason);
        reply
    }

    pub(crate) fn ping(&self) {
        self.send(client_message::Body::Status(StatusReport { ping: 1, state_json: String::new() }));
    }

    pub(crate) fn welcome(&self) -> Welcome {
        self.seen.lock().welcome.clone().unwrap()
    }

    pub(crate) fn recalls(&self) -> Vec<Recall> {
        self.seen.lock().recalls.clone()
    }

    pub(crate) fn wait_recall(&self) -> Recall {
        self.wait("recall", |seen| seen.recalls.first().copied())
    }

    pub(crate) fn wait_revoked(&self) -> String {
        self.wait("Revoked", |seen| seen.revoked.clone())
    }

    pub(crate) fn was_revoked(&self) -> bool {
        self.seen.lock().revoked.is_some()
    }

    pub(crate) fn wait_closed(&self) {
        self.wait("close", |seen| seen.closed.then_some(()));
    }

    pub(crate) fn queries(&self) -> usize {
        self.seen.lock().queries
    }

    pub(crate) fn wait_invalidated(&self, file: FileId) -> Invalidate {
        self.wait("Invalidate", |seen| seen.invalidated.iter().find(|i| i.file == Some(file.into())).copied())
    }

    pub(crate) fn was_invalidated(&self, file: FileId) -> bool {
        self.seen.lock().invalidated.iter().any(|i| i.file == Some(file.into()))
    }

    pub(crate) fn root(&self) -> Option<csv_proto::FileId> {
        self.welcome().root
    }

    pub(crate) fn create(&self, name: &str, handle: u64) -> FileId {
        let op = csv_proto::Create {
            parent: self.root(),
            name: name.to_owned().into(),
            mode: 0o644,
            flags: 0,
            handle,
        };
        id(&attr(&self.ok(Op::Create(op))))
    }

    pub(crate) fn write(&self, file: FileId, offset: u64, data: Vec<u8>) -> Reply {
        let op =
            csv_proto::Write { file: Some(file.into()), offset, data: data.into(), ..Default::default() };
        self.ok(Op::Write(op))
    }

    pub(crate) fn read(&self, file: FileId, offset: u64, len: u32) -> Vec<u8> {
        let op = csv_proto::Read { file: Some(file.into()), offset, len };
        match self.ok(Op::Read(op)).body {
            Some(reply::Body::Data(data)) => data.data.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn size(&self, file: FileId) -> u64 {
        attr(&self.ok(Op::Getattr(csv_proto::GetAttr { file: Some(file.into()) }))).size
    }

    pub(crate) fn get(&self, file: FileId, offset: u64, len: u64, access: csv_proto::Access) -> Op {
        let _ = self;
        let file = Some(file.into());
        Op::LayoutGet(LayoutGet { file, offset, len, access: access.into(), ..LayoutGet::default() })
    }

    pub(crate) fn granted(
        &self,
        file: FileId,
        offset: u64,
        len: u64,
        access: csv_proto::Access,
    ) -> LayoutGrant {
        grant(self.ok(self.get(file, offset, len, access)))
    }

    pub(crate) fn extend(&self, file: FileId, offset: u64, len: u64) -> LayoutGrant {
        let file = Some(file.into());
        grant(self.ok(Op::LayoutGet(LayoutGet { file, offset, len, extend: true, ..LayoutGet::default() })))
    }

    pub(crate) fn truncate(&self, file: FileId, size: u64) -> Op {
        let _ = self;
        Op::Setattr(csv_proto::SetAttr { file: Some(file.into()), size: Some(size), ..Default::default() })
    }

    pub(crate) fn lookup(&self, name: &str) -> Op {
        Op::Lookup(csv_proto::Lookup { parent: self.root(), name: name.to_owned().into() })
    }

    pub(crate) fn unlink(&self, name: &str) -> Op {
        Op::Unlink(csv_proto::Unlink { parent: self.root(), name: name.to_owned().into() })
    }
}

pub(crate) fn root() -> Cred {
    Cred { uid: 0, gid: 0, pid: 1, umask: 0o022 }
}

pub(crate) fn attr(reply: &Reply) -> Attr {
    match &reply.body {
        Some(reply::Body::Attr(attr)) => *attr,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn id(attr: &Attr) -> FileId {
    csv_proto::file_id(attr.file).unwrap()
}

pub(crate) fn grant(reply: Reply) -> LayoutGrant {
    match reply.body {
        Some(reply::Body::Grant(grant)) => grant,
        other => panic!("{other:?}"),
    }
}

/// Where a file offset lies, by a grant.
pub(crate) fn place(grant: &LayoutGrant, offset: u64) -> u64 {
    let holds = |e: &&LayoutExtent| e.file_offset <= offset && offset < e.file_offset + e.len;
    let extent = grant.extents.iter().find(holds).unwrap();
    assert!(!extent.zeros, "{offset} is not written: {grant:?}");
    extent.lun_offset + (offset - extent.file_offset)
}
