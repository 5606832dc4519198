//! csvd of one node: consensus, its copy of the database, heartbeats, proposals; [`manager`] on the leader, an [`agent`] for
//! each volume, the [`witness`]. As crates/csvd/src/engine, with the pure state machines of csv-cluster.

pub mod agent;
pub mod manager;
pub mod witness;

use crate::csvfs::Csvfs;
use crate::event::{Action, Ctx, Input, Message, Observation, Process, Proposed};
use crate::raft_model::{self, Disk, Entry, Payload, Proposal, Raft, Voter};
use agent::Agent;
use csv_cluster::db::{self, ClusterDb, Command, Envelope, Node, NodeState};
use csv_cluster::failover::NodeReport;
use csv_cluster::membership::{self, Heartbeats};
use csv_cluster::quorum::VoterId;
use csv_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use witness::Host;

/// Between two looks, in milliseconds.
pub const TICK_MS: u64 = 50;
const WATCH_MS: u64 = 200;
const MANAGE_MS: u64 = 200;
const ELECTION_MS: u64 = 1_500;
const PROPOSE_LIMIT_MS: u64 = 5_000;
const PROPOSE_AGAIN_MS: u64 = 50;
const TRY_MS: u64 = 3_000;

/// What outlives csvd.
#[derive(Debug)]
pub struct Machine {
    /// Disk of the Raft log; outlives a power cut.
    pub disk: Disk,
    /// Incarnation, in the run directory: lost at boot.
    pub incarnation: Option<u64>,
    /// For each volume the incarnation and generation whose key was registered last; beside the incarnation.
    pub registered: Vec<Option<(u64, u32)>>,
    /// Do the LUNs keep registrations? The node knows it from its own.
    pub aptpl: bool,
}

/// A proposal under way.
#[derive(Debug)]
struct Pending {
    envelope: Rc<Envelope>,
    deadline_ms: u64,
    again_ms: u64,
    volume: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Csvd {
    me: NodeId,
    life: u64,
    /// Its voter.
    pub raft: Raft,
    /// Its copy of the database.
    pub db: ClusterDb,
    /// Entries applied.
    pub applied: usize,
    heartbeats: Heartbeats,
    reports: BTreeMap<NodeId, NodeReport>,
    /// Why it must do no I/O.
    pub cut_off: Option<String>,
    /// It was in contact once since its start.
    contacted: bool,
    agents: Vec<Agent>,
    pending: BTreeMap<u64, Pending>,
    /// Entries of this leader whose answers somebody waits for.
    serving: BTreeMap<usize, (u64, Proposal)>,
    /// The manager's proposals under way, and until when it waits for them.
    managing: (Vec<usize>, u64),
    beat_ms: u64,
    watch_ms: u64,
    manage_ms: u64,
    /// The witness's arbiter, where there is a disk witness.
    pub witness: Option<Host>,
}

impl Csvd {
    /// A new process.
    pub fn start(
        ctx: &mut Ctx<'_>,
        machine: &mut Machine,
        life: u64,
        members: &BTreeSet<Voter>,
        volumes: usize,
        witness: bool,
    ) -> Csvd {
        let now = ctx.mono_ms();
        let wall = ctx.clock.unix_ms(ctx.now_ms);
        machine.incarnation.get_or_insert(wall);
        let me = ctx.me;
        let raft = Raft::start(me.0.into(), members.clone(), &machine.disk, now, ctx.rng);
        Csvd {
            me,
            life,
            raft,
            db: ClusterDb::default(),
            applied: 0,
            heartbeats: Heartbeats::new(&db::Settings::default(), now),
            reports: BTreeMap::new(),
            cut_off: Some("this node has just started".into()),
            contacted: false,
            agents: (0..volumes).map(|volume| Agent::new(volume, now)).collect(),
            pending: BTreeMap::new(),
            serving: BTreeMap::new(),
            managing: (Vec::new(), 0),
            beat_ms: 0,
            watch_ms: 0,
            manage_ms: 0,
            witness: witness.then(|| Host::new(me, members.clone())),
        }
    }

    /// An input of this process.
    pub fn input(&mut self, ctx: &mut Ctx<'_>, machine: &mut Machine, csvfs: &[Option<Csvfs>], input: Input) {
        match input {
            Input::Tick => {
                self.tick(ctx, machine, csvfs);
                ctx.after(TICK_MS, Process::Csvd, Input::Tick);
            }
            Input::Message(from, message) => self.message(ctx, from, message),
            Input::Synced => self.raft.end_sync(&mut machine.disk),
            Input::Lun(volume, answer) => self.agent_lun(ctx, csvfs, machine, volume, &answer),
            Input::Ordered(volume, id, result) => self.agent_ordered(ctx, csvfs, volume, id, result),
            Input::FenceWanted(volume, node) => self.fence_wanted(ctx, volume, node),
            Input::Witness { .. } | Input::WitnessState(..) | Input::WitnessSynced(..) => {
                if let Some(host) = &mut self.witness {
                    host.input(ctx, input);
                }
            }
            Input::Order(..) | Input::Submit(_) | Input::ClientIo(..) | Input::OwnerIo(..) => {}
        }
        self.settle(ctx);
        for volume in 0..self.agents.len() {
            self.waited(ctx, csvfs, volume);
        }
        // What was applied may need something done.
        for volume in 0..self.agents.len() {
            self.look(ctx, machine, csvfs, volume);
        }
        self.settle(ctx);
    }

    /// Carries out what consensus wants, and applies what is committed.
    fn settle(&mut self, ctx: &mut Ctx<'_>) {
        if self.raft.begin_sync() {
            let slow = if ctx.rng.chance(10) { 80 } else { 5 };
            let took = ctx.rng.range(1, slow);
            ctx.after(took, Process::Csvd, Input::Synced);
        }
        for (to, message) in self.raft.outbox() {
            send_raft(ctx, self.raft.id, to, message);
        }
        if self.raft.leads() {
            ctx.observe(Observation::Leads(self.raft.id, self.raft.term));
        }
        self.apply(ctx);
    }

    fn apply(&mut self, ctx: &mut Ctx<'_>) {
        while self.applied < self.raft.commit {
            self.applied += 1;
            let index = self.applied;
            let entry = self.raft.log[index - 1].clone();
            let answer = match &entry.payload {
                Payload::Command(envelope, _) => Some(self.db.apply(envelope)),
                Payload::Noop | Payload::Voters(_) => None,
            };
            if let Payload::Command(_, Some((by, number))) = &entry.payload
                && *by == self.me
            {
                self.confirmed(ctx, *number);
            }
            let (seen, told) = (entry.clone(), answer.clone());
            ctx.observe(Observation::Applied { index, entry: seen, answer: told });
            self.acknowledge(ctx, index, &entry, answer.as_ref());
        }
    }

    /// Whoever waits for the entry is told.
    fn acknowledge(&mut self, ctx: &mut Ctx<'_>, index: usize, entry: &Entry, answer: Option<&db::Answer>) {
        let Some((term, proposal)) = self.serving.remove(&index) else { return };
        let same =
            term == entry.term && matches!(&entry.payload, Payload::Command(_, Some(p)) if *p == proposal);
        let Some(answer) = answer.filter(|_| same) else { return };
        ctx.observe(Observation::Acknowledged(index, proposal));
        let outcome = Proposed::Answer(answer.clone());
        ctx.send(proposal.0, Message::Proposed { proposal, outcome });
    }

    fn tick(&mut self, ctx: &mut Ctx<'_>, machine: &mut Machine, csvfs: &[Option<Csvfs>]) {
        let now = ctx.mono_ms();
        self.raft.tick(now, ctx.rng);
        if now >= self.beat_ms {
            self.beat_ms = now + self.db.settings.heartbeat_ms;
            self.beat(ctx, machine);
        }
        if now >= self.watch_ms {
            self.watch_ms = now + WATCH_MS;
            self.watch(ctx, machine, csvfs);
        }
        if now >= self.manage_ms {
            self.manage_ms = now + MANAGE_MS;
            self.manage(ctx, machine);
        }
        self.repeat_proposals(ctx);
        if let Some(host) = &mut self.witness {
            host.tick(ctx);
        }
    }

    // ---- membership ------------------------------------------------------------------------------------------

    fn own_report(&self, machine: &Machine) -> NodeReport {
        let volumes = self.agents.iter().map(|agent| (volume_name(agent.volume), agent.report.clone()));
        let incarnation = machine.incarnation.unwrap_or(0);
        NodeReport { incarnation, volumes: volumes.collect(), ..NodeReport::default() }
    }

    fn beat(&mut self, ctx: &mut Ctx<'_>, machine: &Machine) {
        let report = self.own_report(machine);
        for node in self.db.nodes.keys().copied().filter(|node| *node != self.me).collect::<Vec<_>>() {
            let (incarnation, report) = (report.incarnation, report.clone());
            ctx.send(node, Message::Beat { incarnation, report });
        }
    }

    fn heartbeat(&mut self, ctx: &mut Ctx<'_>, input: &membership::Input) {
        let mut out = Vec::new();
        self.heartbeats.step(input, &mut out);
        for output in out {
            match output {
                membership::Output::Missed { node, .. } => {
                    ctx.note(format!("{} misses {node}", self.me));
                    self.reports.remove(&node);
                }
                membership::Output::Heard { .. } | membership::Output::Slept { .. } => {}
            }
        }
    }

    fn watch(&mut self, ctx: &mut Ctx<'_>, machine: &mut Machine, csvfs: &[Option<Csvfs>]) {
        let now = ctx.mono_ms();
        let others = self.db.nodes.keys().copied().filter(|node| *node != self.me).collect();
        self.heartbeats.set_peers(&others);
        self.heartbeats.set_thresholds(&self.db.settings);
        self.heartbeat(ctx, &membership::Input::Tick { at_ms: now });
        let limit_ms = self.db.settings.silence_ms() * 2 + ELECTION_MS;
        let age_ms = self.raft.contact_age_ms(now);
        let cut_off = !self.db.initialised() || age_ms.is_none_or(|age| age > limit_ms);
        if cut_off != self.cut_off.is_some() {
            ctx.note(format!("{} cut off: {cut_off}", self.me));
            self.cut_off = cut_off.then(|| "no contact with the majority".into());
        }
        self.contacted |= !cut_off;
        self.renew_incarnation(ctx, machine, csvfs);
    }

    /// A node that the cluster has given up begins a new life, once nothing of the former one is left.
    fn renew_incarnation(&mut self, ctx: &mut Ctx<'_>, machine: &mut Machine, csvfs: &[Option<Csvfs>]) {
        let now = machine.incarnation.unwrap_or(0);
        let Some(known) =
            self.db.nodes.get(&self.me).filter(|node| is_given_up(node, now)).map(|node| node.incarnation)
        else {
            return;
        };
        let quiet = |csvfs: &Option<Csvfs>| {
            csvfs.as_ref().is_none_or(|csvfs| {
                csvfs.role() == csv_cluster::agent::Role::Nobody && csvfs.client.suspended
            })
        };
        if self.cut_off.is_some() || !csvfs.iter().all(quiet) {
            return;
        }
        let next = ctx.clock.unix_ms(ctx.now_ms).max(known + 1).max(now + 1);
        machine.incarnation = Some(next);
        ctx.note(format!("{} begins incarnation {next}", self.me));
    }

    // ---- messages --------------------------------------------------------------------------------------------

    fn message(&mut self, ctx: &mut Ctx<'_>, from: NodeId, message: Message) {
        match message {
            Message::Raft { from, to, message } => {
                if to == self.raft.id {
                    self.raft.receive(ctx.mono_ms(), from, message, ctx.rng);
                } else if let Some(host) = &mut self.witness {
                    host.receive(ctx, from, message);
                }
            }
            Message::Beat { incarnation, report } => {
                let at_ms = ctx.mono_ms();
                self.heartbeat(ctx, &membership::Input::Beat { from, incarnation, at_ms });
                self.reports.insert(from, report);
            }
            Message::Propose { proposal, envelope } => {
                let Some((index, term)) = self.raft.propose(Payload::Command(envelope, Some(proposal)))
                else {
                    let outcome = Proposed::NotLeader;
                    ctx.send(from, Message::Proposed { proposal, outcome });
                    return;
                };
                self.raft.tick(ctx.mono_ms(), ctx.rng);
                self.serving.insert(index, (term, proposal));
            }
            Message::Proposed { proposal, outcome } => match outcome {
                Proposed::NotLeader => {
                    if let Some(pending) = self.pending.get_mut(&proposal.1) {
                        pending.again_ms = ctx.mono_ms() + PROPOSE_AGAIN_MS;
                    }
                }
                Proposed::Answer(answer) => {
                    if !self.confirming(proposal.1)
                        && let Some(pending) = self.pending.remove(&proposal.1)
                    {
                        let result = answer.map(drop).map_err(|refused| refused.to_string());
                        self.agent_proposed(ctx, pending.volume, result);
                    }
                }
            },
            Message::Csvfs { .. } => {}
        }
    }

    fn propose(&mut self, ctx: &mut Ctx<'_>, volume: usize, command: Command) -> u64 {
        let number = ctx.number();
        let envelope = Rc::new(command.by(self.me, ctx.clock.unix_ms(ctx.now_ms)));
        let deadline_ms = ctx.mono_ms() + PROPOSE_LIMIT_MS;
        self.pending.insert(number, Pending { envelope, deadline_ms, again_ms: 0, volume });
        self.repeat_proposals(ctx);
        number
    }

    fn repeat_proposals(&mut self, ctx: &mut Ctx<'_>) {
        let now = ctx.mono_ms();
        let over: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, pending)| now >= pending.deadline_ms)
            .map(|(id, _)| *id)
            .collect();
        for number in over {
            if let Some(pending) = self.pending.remove(&number) {
                self.agent_proposed(ctx, pending.volume, Err("outcome not known".into()));
            }
        }
        let Some(leader) = self.raft.leader.and_then(|leader| VoterId(leader).node()) else { return };
        for (number, pending) in &mut self.pending {
            if now >= pending.again_ms {
                // An unanswered try may have been carried out: commands may be repeated.
                pending.again_ms = now + TRY_MS;
                let proposal = (self.me, *number);
                ctx.send(leader, Message::Propose { proposal, envelope: pending.envelope.clone() });
            }
        }
    }

    /// For the checks and faults: its life.
    #[must_use]
    pub fn life(&self) -> u64 {
        self.life
    }
}

/// See csvd's `local.rs`.
fn is_given_up(node: &Node, incarnation: u64) -> bool {
    match node.state {
        // Greater: the clock was set back before the last boot.
        NodeState::Down => node.incarnation >= incarnation,
        NodeState::Up | NodeState::Isolated => node.incarnation > incarnation,
        NodeState::Joining => false,
    }
}

/// Name of a volume in the database.
#[must_use]
pub fn volume_name(volume: usize) -> String {
    format!("Volume{}", volume + 1)
}

/// Who has the witness is not known: every node is asked.
fn send_raft(ctx: &mut Ctx<'_>, from: Voter, to: Voter, message: raft_model::Message) {
    if let Some(node) = VoterId(to).node() {
        ctx.send(node, Message::Raft { from, to, message });
    } else {
        ctx.out.push(Action::Broadcast(Message::Raft { from, to, message }));
    }
}
