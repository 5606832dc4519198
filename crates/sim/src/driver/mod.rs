//! The world and its queue of events.

mod act;
mod begin;
mod heal;
mod trouble;

use crate::bugs::Bugs;
use crate::event::{Ctx, Input, Message, Process, Reply};
use crate::faults::{Fault, Plan};
use crate::invariants::Oracle;
use crate::node::Node;
use crate::raft_model::{DiskOp, Voter};
use crate::rng::Rng;
use crate::world::lun::{IoId, Lun, Request};
use crate::world::network::Network;
use crate::world::witness_lun::WitnessLun;
use csv_cluster::witness::Effect;
use csv_types::NodeId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

/// Notes that a failure shows.
const NOTES_MAX: usize = 400;
/// Time for everything to come back, in milliseconds.
const CONVERGE_MS: u64 = 90_000;

/// What happens.
#[derive(Debug)]
enum Event {
    Input(NodeId, Process, u64, Input),
    Deliver(NodeId, NodeId, Message),
    Wake(NodeId),
    LunArrive(IoId, Request),
    LunLand(IoId),
    Witness(NodeId, u64, Effect),
    WitnessWrite(NodeId, u64, u64, Vec<DiskOp>),
    Fault(Fault),
    /// The end of a fault, by its number.
    Mend(Mend),
    /// Everything is mended now.
    Quiet,
    /// Has it come back yet?
    Look,
}

/// The end of a fault.
#[derive(Debug, Clone)]
enum Mend {
    Cut(Vec<(NodeId, NodeId)>),
    Boot(NodeId),
    Csvd(NodeId),
    Path(NodeId, usize),
    Late(usize),
    Network,
    Resume(NodeId),
    Witness,
}

/// What clients got done, by volume and node.
type Progress = BTreeMap<(usize, NodeId), u64>;

/// A request to a LUN under way.
#[derive(Debug)]
struct Io {
    node: NodeId,
    volume: usize,
    boots: u64,
    process: Process,
    life: u64,
    reply: Reply,
    /// Its node has given it up for failed; it may take effect all the same.
    given_up: bool,
}

/// A broken invariant.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Seed of the run.
    pub seed: u64,
    /// When, in milliseconds.
    pub at_ms: u64,
    /// What.
    pub what: String,
    /// What went before.
    pub notes: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for note in &self.notes {
            writeln!(f, "  {note}")?;
        }
        writeln!(f, "seed {} at {} ms: {}", self.seed, self.at_ms, self.what)?;
        write!(f, "again: CSV_SIM_SEED={} cargo test -p csv-sim one_seed -- --nocapture", self.seed)
    }
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Hash of everything that happened.
    pub hash: u64,
    /// Events.
    pub events: u64,
    /// Simulated time.
    pub took_ms: u64,
    /// Time from the end of the faults until all was well.
    pub converged_ms: u64,
    /// Things that clients got done.
    pub progress: u64,
    /// Changes of owner.
    pub takeovers: u64,
    /// Reads of nodes without registration.
    pub reads_while_fenced: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Sim {
    seed: u64,
    now_ms: u64,
    rng: Rng,
    bugs: Bugs,
    plan: Plan,
    next: u64,
    queue: BTreeMap<(u64, u64), Event>,
    network: Network,
    nodes: BTreeMap<NodeId, Node>,
    members: BTreeSet<Voter>,
    luns: Vec<Lun>,
    /// Writes of a volume take up to that long.
    late_ms: Vec<u64>,
    witness: WitnessLun,
    ios: BTreeMap<IoId, Io>,
    oracle: Oracle,
    broken: Option<String>,
    notes: VecDeque<String>,
    print: bool,
    hash: u64,
    events: u64,
    /// When everything was mended, and what clients had done by then.
    quiet: Option<(u64, Progress)>,
    converged: bool,
}

/// Runs a seed.
///
/// # Errors
/// What does not hold.
pub fn run(seed: u64, bugs: Bugs) -> Result<Outcome, Box<Failure>> {
    Sim::new(seed, bugs).run()
}

impl Sim {
    /// Prints every note as it comes.
    #[must_use]
    pub fn printing(mut self) -> Sim {
        self.print = true;
        println!("{:#?}", self.plan);
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// What does not hold.
    pub fn run(mut self) -> Result<Outcome, Box<Failure>> {
        while !self.converged {
            let Some(((at_ms, _), event)) = self.queue.pop_first() else {
                return Err(self.failure("nothing happens any more".into()));
            };
            self.now_ms = at_ms;
            self.events += 1;
            self.happen(event);
            self.check();
            if let Some(what) = self.broken.take() {
                return Err(self.failure(what));
            }
        }
        let quiet_ms = self.quiet.as_ref().map_or(0, |(at, _)| *at);
        Ok(Outcome {
            hash: self.hash,
            events: self.events,
            took_ms: self.now_ms,
            converged_ms: self.now_ms - quiet_ms,
            progress: self.oracle.progress.values().sum(),
            takeovers: self.oracle.db.volumes.values().map(|volume| volume.epoch.0).sum(),
            reads_while_fenced: self.oracle.reads_while_fenced,
        })
    }

    fn failure(&mut self, what: String) -> Box<Failure> {
        let notes = std::mem::take(&mut self.notes).into();
        Box::new(Failure { seed: self.seed, at_ms: self.now_ms, what, notes })
    }

    fn schedule(&mut self, in_ms: u64, event: Event) {
        self.next += 1;
        self.queue.insert((self.now_ms + in_ms, self.next), event);
    }

    fn mix(&mut self, number: u64) {
        self.hash = (self.hash ^ number).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
    }

    fn note(&mut self, text: &str) {
        for byte in text.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        let line = format!("{:>6} {text}", self.now_ms);
        if self.print {
            println!("{line}");
        }
        if self.notes.len() >= NOTES_MAX {
            self.notes.pop_front();
        }
        self.notes.push_back(line);
    }

    fn break_with(&mut self, result: Result<(), String>) {
        if let Err(what) = result
            && self.broken.is_none()
        {
            self.broken = Some(what);
        }
    }

    /// Calls a node with all that it sees, and carries out what it wants.
    fn with_node<T>(&mut self, id: NodeId, call: impl FnOnce(&mut Node, &mut Ctx<'_>) -> T) -> Option<T> {
        let node = self.nodes.get_mut(&id)?;
        let mut ctx = Ctx {
            now_ms: self.now_ms,
            me: id,
            clock: node.clock,
            rng: &mut self.rng,
            bugs: self.bugs,
            out: Vec::new(),
            next: &mut self.next,
        };
        let result = call(node, &mut ctx);
        let actions = ctx.out;
        for action in actions {
            self.act(id, action);
        }
        Some(result)
    }

    fn happen(&mut self, event: Event) {
        let now_ms = self.now_ms;
        match event {
            Event::Input(node, process, life, input) => self.input(node, process, life, input),
            Event::Deliver(from, to, message) => {
                let process = Node::reader(&message);
                if let Some(life) = self.nodes.get(&to).and_then(|node| node.life(process)) {
                    self.input(to, process, life, Input::Message(from, message));
                }
            }
            Event::Wake(id) => {
                let Some(node) = self.nodes.get_mut(&id) else { return };
                if node.frozen_until_ms > now_ms {
                    return;
                }
                for (process, life, input) in std::mem::take(&mut node.deferred) {
                    self.input(id, process, life, input);
                }
            }
            Event::LunArrive(io, request) => self.lun_arrive(io, request),
            Event::LunLand(io) => self.lun_land(io),
            Event::Witness(node, boots, effect) => self.witness_act(node, boots, &effect),
            Event::WitnessWrite(node, boots, sync, ops) => {
                let same = self.nodes.get(&node).is_some_and(|node| node.boots == boots);
                let ok = same && self.witness.write(node.0.into(), ops);
                self.after(node, 1, Process::Csvd, Input::WitnessSynced(sync, ok));
            }
            Event::Fault(fault) => self.fault(fault),
            Event::Mend(mend) => self.mend(mend),
            Event::Quiet => self.go_quiet(),
            Event::Look => self.look(),
        }
    }

    /// An input for a process of a node; waits while the node is frozen.
    fn input(&mut self, id: NodeId, process: Process, life: u64, input: Input) {
        let now_ms = self.now_ms;
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.life(process) == Some(life)) else {
            return;
        };
        if node.frozen_until_ms > now_ms {
            node.deferred.push_back((process, life, input));
            return;
        }
        self.mix(now_ms ^ (u64::from(id.0) << 40) ^ life << 44);
        self.with_node(id, |node, ctx| node.input(ctx, process, input));
        if process == Process::Csvd
            && let Some(node) = self.nodes.get(&id)
        {
            let compared = self.oracle.compare(node);
            self.break_with(compared);
        }
    }

    fn after(&mut self, id: NodeId, in_ms: u64, process: Process, input: Input) {
        if let Some(life) = self.nodes.get(&id).and_then(|node| node.life(process)) {
            self.schedule(in_ms, Event::Input(id, process, life, input));
        }
    }

    fn check(&mut self) {
        for (volume, lun) in self.luns.iter().enumerate() {
            if let Err(what) = self.oracle.one_coordinator(volume, lun, &self.nodes) {
                self.broken.get_or_insert(what);
            }
        }
    }
}
