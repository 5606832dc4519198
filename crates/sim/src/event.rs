//! What goes between the parts: inputs of a node's processes, and what they want done.

use crate::bugs::Bugs;
use crate::csvfs::message::{Body, Order};
use crate::raft_model::{self, Disk, DiskOp, Entry, Proposal, Voter};
use crate::rng::Rng;
use crate::world::clock::Clock;
use crate::world::lun::{Answer, FileNo, Request};
use csv_cluster::db::{self, Envelope};
use csv_cluster::failover::NodeReport;
use csv_cluster::witness;
use csv_types::NodeId;
use std::rc::Rc;

/// Number of a volume.
pub type VolumeNo = usize;

/// A process of a node. What is on its way to one that has ended meanwhile is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Process {
    /// The daemon.
    Csvd,
    /// The file system process of a volume.
    Csvfs(VolumeNo),
}

/// How a proposal went.
#[derive(Debug, Clone)]
pub enum Proposed {
    /// Applied.
    Answer(db::Answer),
    /// Not taken: this one does not lead.
    NotLeader,
}

/// A message between nodes.
#[derive(Debug, Clone)]
pub enum Message {
    /// Consensus.
    Raft { from: Voter, to: Voter, message: raft_model::Message },
    /// Heartbeat of csvd.
    Beat { incarnation: u64, report: NodeReport },
    /// A command for the leader.
    Propose { proposal: Proposal, envelope: Rc<Envelope> },
    /// Its answer.
    Proposed { proposal: Proposal, outcome: Proposed },
    /// Between csvfs processes of a volume.
    Csvfs { volume: VolumeNo, body: Body },
}

/// What happens to a process.
#[derive(Debug)]
pub enum Input {
    /// A message arrives.
    Message(NodeId, Message),
    /// Time passes.
    Tick,
    /// csvd: the Raft log's sync ended.
    Synced,
    /// csvd: a request to a volume's LUN ended.
    Lun(VolumeNo, Answer),
    /// csvd: csvfs has carried an order out, or not.
    Ordered(VolumeNo, u64, Result<(), String>),
    /// csvd: csvfs wants a node fenced.
    FenceWanted(VolumeNo, NodeId),
    /// csvd: an operation on the witness LUN ended.
    Witness { op: witness::Op, outcome: witness::Outcome, verified_ms: Option<u64> },
    /// csvd: the witness's state was read.
    WitnessState(witness::Op, Disk),
    /// csvd: a write of the voter on the witness LUN ended: well, or not.
    WitnessSynced(u64, bool),
    /// csvfs: an order of csvd.
    Order(u64, Order),
    /// csvfs: a client's I/O goes out now.
    Submit(u64),
    /// csvfs: a client's I/O ended.
    ClientIo(u64, Answer),
    /// csvfs: a request of the coordinator (or of a take-over) ended.
    OwnerIo(u64, Answer),
}

/// What a process wants done.
#[derive(Debug)]
pub enum Action {
    /// Send a message.
    Send(NodeId, Message),
    /// Input to a process of this node after that much time of its clock.
    After(u64, Process, Input),
    /// A request to a volume's LUN. The answer comes as the input that `done` makes.
    Lun(VolumeNo, Request, Reply),
    /// An operation on the witness LUN.
    Witness(witness::Effect),
    /// A write of the voter on the witness LUN.
    WitnessSync(u64, Vec<DiskOp>),
    /// Start csvfs of a volume.
    StartCsvfs(VolumeNo),
    /// Send to every node, this one too.
    Broadcast(Message),
    /// Something for the checks.
    Observe(Observation),
    /// For the trace.
    Note(String),
}

/// Which input the answer to a LUN request becomes.
#[derive(Debug, Clone, Copy)]
pub enum Reply {
    /// [`Input::Lun`].
    Csvd,
    /// [`Input::ClientIo`].
    Client(u64),
    /// [`Input::OwnerIo`].
    Owner(u64),
}

/// Something that is checked.
#[derive(Debug)]
pub enum Observation {
    /// A voter leads.
    Leads(Voter, u64),
    /// A node applied the entry at this index, with this answer.
    Applied { index: usize, entry: Rc<Entry>, answer: Option<db::Answer> },
    /// A proposal was acknowledged.
    Acknowledged(usize, Proposal),
    /// A fence was carried out: these keys are gone, and nothing of them lands any more.
    Fenced(VolumeNo, Vec<u64>),
    /// A read returned these for blocks of a file; it began then.
    Read { volume: VolumeNo, file: FileNo, fblock: u32, contents: Vec<u64>, began_ms: u64 },
    /// A read of a node without registration, which the LUN answers all the same.
    ReadWhileFenced,
    /// A write of one block began.
    WriteBegun { volume: VolumeNo, file: FileNo, fblock: u32, write: u64 },
    /// It ended well.
    WriteEnded { volume: VolumeNo, file: FileNo, fblock: u32, write: u64 },
    /// These writes were acknowledged by an fsync.
    Synced { volume: VolumeNo, writes: Vec<(FileNo, u32, u64)> },
    /// A client got something done.
    Progress(VolumeNo),
    /// The witness's voter answers a request; verified then.
    WitnessAnswers { arrived_ms: u64, verified_ms: Option<u64> },
}

/// What a process sees of the world while it handles an input.
#[derive(Debug)]
pub struct Ctx<'a> {
    /// True time.
    pub now_ms: u64,
    /// This node.
    pub me: NodeId,
    /// Its clock.
    pub clock: Clock,
    /// Random numbers.
    pub rng: &'a mut Rng,
    /// Bugs put back.
    pub bugs: Bugs,
    /// What is wanted.
    pub out: Vec<Action>,
    /// The next number; unique in the whole world.
    pub next: &'a mut u64,
}

impl Ctx<'_> {
    /// This node's monotonic clock.
    #[must_use]
    pub fn mono_ms(&self) -> u64 {
        self.clock.mono_ms(self.now_ms)
    }

    /// A new number.
    pub fn number(&mut self) -> u64 {
        *self.next += 1;
        *self.next
    }

    pub(crate) fn send(&mut self, to: NodeId, message: Message) {
        self.out.push(Action::Send(to, message));
    }

    pub(crate) fn after(&mut self, local_ms: u64, process: Process, input: Input) {
        self.out.push(Action::After(local_ms, process, input));
    }

    pub(crate) fn observe(&mut self, observation: Observation) {
        self.out.push(Action::Observe(observation));
    }

    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.out.push(Action::Note(text.into()));
    }
}
