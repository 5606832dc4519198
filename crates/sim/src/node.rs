//! A node: a machine with its clock, one csvd, and a csvfs for each volume. It can be off, frozen, or lose single processes.

use crate::csvd::{Csvd, Machine};
use crate::csvfs::Csvfs;
use crate::event::{Ctx, Input, Message, Process};
use crate::raft_model::{Disk, Voter};
use crate::world::clock::Clock;
use csv_types::NodeId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// See the module.
#[derive(Debug)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Its clock.
    pub clock: Clock,
    /// What outlives processes.
    pub machine: Machine,
    /// Is it on?
    pub on: bool,
    /// Grows whenever it is switched on or off.
    pub boots: u64,
    /// It does nothing before then.
    pub frozen_until_ms: u64,
    /// What came while it was frozen.
    pub deferred: VecDeque<(Process, u64, Input)>,
    /// Its daemon.
    pub csvd: Option<Csvd>,
    /// Its file system processes.
    pub csvfs: Vec<Option<Csvfs>>,
    /// Volumes whose LUN it cannot reach.
    pub no_path: BTreeSet<usize>,
    /// Requests under way, by life of csvfs.
    pub io_under_way: BTreeMap<u64, u32>,
}

impl Node {
    /// A machine that is off.
    #[must_use]
    pub fn new(id: NodeId, clock: Clock, disk: Disk, volumes: usize, aptpl: bool) -> Node {
        Node {
            id,
            clock,
            machine: Machine { disk, incarnation: None, registered: vec![None; volumes], aptpl },
            on: false,
            boots: 0,
            frozen_until_ms: 0,
            deferred: VecDeque::new(),
            csvd: None,
            csvfs: (0..volumes).map(|_| None).collect(),
            no_path: BTreeSet::new(),
            io_under_way: BTreeMap::new(),
        }
    }

    /// The life of a process; `None` when it does not run.
    #[must_use]
    pub fn life(&self, process: Process) -> Option<u64> {
        match process {
            Process::Csvd => self.csvd.as_ref().map(Csvd::life),
            Process::Csvfs(volume) => {
                self.csvfs.get(volume)?.as_ref().filter(|csvfs| !csvfs.dead).map(|csvfs| csvfs.life)
            }
        }
    }

    /// Whose message is this?
    #[must_use]
    pub fn reader(message: &Message) -> Process {
        match message {
            Message::Csvfs { volume, .. } => Process::Csvfs(*volume),
            Message::Raft { .. }
            | Message::Beat { .. }
            | Message::Propose { .. }
            | Message::Proposed { .. } => Process::Csvd,
        }
    }

    /// Starts csvd.
    pub fn start_csvd(&mut self, ctx: &mut Ctx<'_>, members: &BTreeSet<Voter>, witness: bool) {
        let life = ctx.number();
        let volumes = self.csvfs.len();
        self.csvd = Some(Csvd::start(ctx, &mut self.machine, life, members, volumes, witness));
    }

    /// csvd dies.
    pub fn end_csvd(&mut self, ctx: &mut Ctx<'_>) {
        if let Some(mut csvd) = self.csvd.take() {
            csvd.raft.crash(&mut self.machine.disk, ctx.rng);
        }
    }

    /// Power cut.
    pub fn power_off(&mut self, ctx: &mut Ctx<'_>) {
        self.end_csvd(ctx);
        self.csvfs.iter_mut().for_each(|csvfs| *csvfs = None);
        self.deferred.clear();
        self.io_under_way.clear();
        (self.on, self.frozen_until_ms) = (false, 0);
        self.boots += 1;
        self.machine.incarnation = None;
        self.machine.registered.iter_mut().for_each(|registered| *registered = None);
    }

    /// An input of a process that runs.
    pub fn input(&mut self, ctx: &mut Ctx<'_>, process: Process, input: Input) {
        match process {
            Process::Csvd => {
                if let Some(csvd) = &mut self.csvd {
                    csvd.input(ctx, &mut self.machine, &self.csvfs, input);
                }
            }
            Process::Csvfs(volume) => {
                let Some(csvfs) = self.csvfs.get_mut(volume).and_then(Option::as_mut) else { return };
                if let Input::Message(from, Message::Csvfs { body, .. }) = input {
                    csvfs.receive(ctx, from, body);
                } else {
                    csvfs.input(ctx, input);
                }
            }
        }
    }
}
