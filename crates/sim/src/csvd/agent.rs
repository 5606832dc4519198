//! The agent of one volume on a node: carries out what [`csv_cluster::agent::next_step`] says, one step at a time. As csvd's
//! `agent.rs`.
//!
//! One rule is the driver's: a key that the LUN does not know any more, although others are registered there, was thrown out
//! and is never registered again; the node asks for a new generation.

use super::{Csvd, Machine, volume_name};
use crate::csvfs::Csvfs;
use crate::csvfs::message::Order;
use crate::event::{Action, Ctx, Input, Observation, Process, Reply, VolumeNo};
use crate::world::lun::{Answer, Request};
use csv_cluster::agent::{Local, Role, Step, may_start, next_step};
use csv_cluster::db::{Command, MemberState, NodeState, reservation_key};
use csv_cluster::failover::{PathState, VolumeReport};
use csv_types::{Epoch, NodeId};
use std::collections::BTreeSet;

const LOOK_EVERY_MS: u64 = 250;
/// A storage that cannot abort is given this time for what it had taken.
const NO_ABORT_WAIT_MS: u64 = 5_000;
const RETRY_MS: (u64, u64) = (100, 5_000);

type Members = Vec<(NodeId, u32)>;

/// What a fence is for.
#[derive(Debug, Clone, Copy)]
enum For {
    Take(Epoch),
    Online(Epoch),
}

/// What comes after an order.
#[derive(Debug, Clone)]
enum After {
    Nothing,
    Taken(Epoch),
    Fenced(Epoch, Members),
    Released(Epoch),
    ToldGone,
}

/// The step under way.
#[derive(Debug)]
enum Doing {
    Idle,
    Proposing,
    Ordering {
        id: u64,
        life: u64,
        after: After,
    },
    CheckingKey {
        generation: u32,
    },
    Registering {
        generation: u32,
    },
    Unregistering {
        generation: u32,
    },
    /// Until this proposal of its own is applied here.
    Confirming {
        generation: u32,
        number: u64,
    },
    ReadingKeys {
        fence: Members,
        what: For,
    },
    Preempting {
        fence: Members,
        what: For,
        keys: Vec<u64>,
        unseen: bool,
    },
    Waiting {
        fence: Members,
        what: For,
        keys: Vec<u64>,
        until_ms: u64,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Agent {
    /// Its volume.
    pub volume: VolumeNo,
    doing: Doing,
    look_ms: u64,
    seen: usize,
    registered: Option<u32>,
    /// The generation whose key the LUN has thrown out.
    void: Option<u32>,
    fenced_others: (Epoch, Members),
    told_gone: BTreeSet<(NodeId, u64)>,
    down: BTreeSet<(NodeId, u64)>,
    retry_ms: u64,
    /// What is told to the others.
    pub report: VolumeReport,
}

impl Agent {
    pub(super) fn new(volume: VolumeNo, now_ms: u64) -> Agent {
        Agent {
            volume,
            doing: Doing::Idle,
            look_ms: now_ms,
            seen: 0,
            registered: None,
            void: None,
            fenced_others: (Epoch(0), Vec::new()),
            told_gone: BTreeSet::new(),
            down: BTreeSet::new(),
            retry_ms: RETRY_MS.0,
            report: VolumeReport::default(),
        }
    }

    fn done(&mut self) {
        self.doing = Doing::Idle;
        self.retry_ms = RETRY_MS.0;
        self.look_ms = 0;
    }

    fn failed(&mut self, ctx: &mut Ctx<'_>, why: &str) {
        ctx.note(format!("{} agent {}: {:?}: {why}", ctx.me, self.volume, self.doing));
        self.doing = Doing::Idle;
        self.look_ms = ctx.mono_ms() + self.retry_ms;
        self.seen = usize::MAX;
        self.retry_ms = (self.retry_ms * 2).min(RETRY_MS.1);
    }

    fn lun(&mut self, ctx: &mut Ctx<'_>, doing: Doing, request: Request) {
        self.doing = doing;
        ctx.out.push(Action::Lun(self.volume, request, Reply::Csvd));
    }

    fn order(&mut self, ctx: &mut Ctx<'_>, csvfs: Option<&Csvfs>, order: Order, after: After) {
        let Some(csvfs) = csvfs else { return };
        let id = ctx.number();
        self.doing = Doing::Ordering { id, life: csvfs.life, after };
        ctx.after(1, Process::Csvfs(self.volume), Input::Order(id, order));
    }
}

/// May a write of csvfs that was answered with an error still take effect? Then it has to be fenced, which the manager sees to
/// since the path is bad; or the path comes back, and with the login anew what was left there is over.
fn unknown(ctx: &Ctx<'_>, csvfs: Option<&Csvfs>) -> bool {
    csvfs.is_some_and(|csvfs| csvfs.client.path_failed) && !ctx.bugs.closed_with_io_unknown
}

impl Csvd {
    /// Looks what is to be done about a volume, if its agent is idle.
    pub(super) fn look(
        &mut self,
        ctx: &mut Ctx<'_>,
        machine: &mut Machine,
        csvfs: &[Option<Csvfs>],
        volume: VolumeNo,
    ) {
        let now = ctx.mono_ms();
        let csvfs = csvfs.get(volume).and_then(Option::as_ref);
        let agent = &mut self.agents[volume];
        if let Doing::Ordering { life, .. } = &agent.doing
            && csvfs.is_none_or(|csvfs| csvfs.life != *life)
        {
            self.ordered(ctx, csvfs, volume, Err("csvfs has ended".into()));
            return;
        }
        let news = agent.seen != self.applied && agent.seen != usize::MAX;
        if !matches!(agent.doing, Doing::Idle) || !self.contacted || (now < agent.look_ms && !news) {
            return;
        }
        (agent.seen, agent.look_ms) = (self.applied, now + LOOK_EVERY_MS);
        let role = csvfs.map_or(Role::Gone, Csvfs::role);
        let answers = !matches!(role, Role::Gone | Role::Silent);
        let failed = csvfs.is_some_and(|csvfs| csvfs.client.path_failed);
        agent.report = VolumeReport {
            path: if failed { PathState::Failed } else { PathState::Good },
            csvfs: answers,
            role_epoch: if let Role::Owner(epoch) = role { epoch.0 } else { 0 },
            problem: None,
        };
        let Some((step, start)) = self.decide(machine, csvfs, role, volume) else { return };
        if start {
            ctx.out.push(Action::StartCsvfs(volume));
        }
        self.act(ctx, machine, csvfs, volume, step);
    }

    fn decide(
        &self,
        machine: &Machine,
        csvfs: Option<&Csvfs>,
        role: Role,
        volume: VolumeNo,
    ) -> Option<(Step, bool)> {
        let agent = &self.agents[volume];
        let record = self.db.volumes.get(&volume_name(volume))?;
        let fenced_others = match &agent.fenced_others {
            (epoch, fenced) if *epoch == record.epoch => fenced.clone(),
            _ => Vec::new(),
        };
        let local = Local {
            me: self.me,
            incarnation: machine.incarnation.unwrap_or(0),
            cut_off: self.cut_off.clone(),
            path: true,
            role,
            suspended: csvfs.is_some_and(|csvfs| csvfs.client.suspended),
            fenced: csvfs.is_some_and(|csvfs| csvfs.client.refused),
            registered: agent.registered,
            fenced_others,
        };
        let start = role == Role::Gone && may_start(&self.db, record, &local);
        Some((next_step(&self.db, record, &local), start))
    }

    fn act(
        &mut self,
        ctx: &mut Ctx<'_>,
        machine: &mut Machine,
        csvfs: Option<&Csvfs>,
        volume: VolumeNo,
        step: Step,
    ) {
        if step != Step::Wait {
            ctx.note(format!("{} volume {volume}: {step:?}", self.me));
        }
        let incarnation = machine.incarnation.unwrap_or(0);
        let agent = &mut self.agents[volume];
        match step {
            Step::Wait => self.tell_gone(ctx, csvfs, volume),
            Step::Suspend { .. } => {
                if csvfs.is_some_and(|csvfs| csvfs.client.refused) {
                    agent.void = agent.registered.or(agent.void);
                }
                agent.registered = None;
                agent.order(ctx, csvfs, Order::Suspend, After::Nothing);
            }
            Step::Admit { from_generation } => {
                self.admit(ctx, volume, incarnation, from_generation);
            }
            Step::Register { generation } => {
                if agent.void == Some(generation) && !ctx.bugs.key_revived {
                    self.admit(ctx, volume, incarnation, generation);
                } else if machine.registered[volume] == Some((incarnation, generation))
                    && !ctx.bugs.key_revived
                {
                    agent.lun(ctx, Doing::CheckingKey { generation }, Request::ReadKeys);
                } else {
                    machine.registered[volume] = Some((incarnation, generation));
                    self.register(ctx, volume, generation);
                }
            }
            Step::Withdraw { .. } if unknown(ctx, csvfs) => {
                agent.failed(ctx, "what was written is not known")
            }
            Step::Withdraw { generation } => {
                let key = reservation_key(self.db.id, self.me, generation);
                agent.lun(ctx, Doing::Unregistering { generation }, Request::Unregister { key });
            }
            Step::Take { epoch, fence } => {
                let what = For::Take(epoch);
                agent.lun(ctx, Doing::ReadingKeys { fence, what }, Request::ReadKeys);
            }
            Step::Fence { epoch, fence } => {
                let what = For::Online(epoch);
                agent.lun(ctx, Doing::ReadingKeys { fence, what }, Request::ReadKeys);
            }
            Step::Close { .. } if unknown(ctx, csvfs) => agent.failed(ctx, "what was written is not known"),
            Step::Close { epoch } => {
                let (node, why) = (self.me, "csvfs ended".to_owned());
                self.say(ctx, volume, Command::VolumeClosed { name: volume_name(volume), epoch, node, why });
            }
            Step::TellOnline { epoch } => self.tell_online(ctx, volume, epoch),
            Step::HandOver { epoch } => {
                agent.order(ctx, csvfs, Order::HandOver { epoch }, After::Released(epoch));
            }
            Step::Follow { epoch, owner } => {
                agent.order(ctx, csvfs, Order::Follow { epoch, owner }, After::Nothing);
            }
        }
    }

    fn say(&mut self, ctx: &mut Ctx<'_>, volume: VolumeNo, command: Command) {
        self.agents[volume].doing = Doing::Proposing;
        self.propose(ctx, volume, command);
    }

    fn admit(&mut self, ctx: &mut Ctx<'_>, volume: VolumeNo, incarnation: u64, from_generation: u32) {
        let (name, node) = (volume_name(volume), self.me);
        self.say(ctx, volume, Command::VolumeAdmit { name, node, incarnation, from_generation });
    }

    fn register(&mut self, ctx: &mut Ctx<'_>, volume: VolumeNo, generation: u32) {
        let key = reservation_key(self.db.id, self.me, generation);
        self.agents[volume].lun(ctx, Doing::Registering { generation }, Request::Register { key });
    }

    fn tell_online(&mut self, ctx: &mut Ctx<'_>, volume: VolumeNo, epoch: Epoch) {
        let (name, node) = (volume_name(volume), self.me);
        let fenced = self.agents[volume].fenced_others.1.clone();
        self.say(ctx, volume, Command::VolumeOnline { name, epoch, node, fenced });
    }

    fn down_nodes(&self, also_joining: bool) -> BTreeSet<(NodeId, u64)> {
        let down = self.db.nodes.values().filter(|node| {
            node.state == NodeState::Down || (also_joining && node.state == NodeState::Joining)
        });
        down.map(|node| (node.id, node.incarnation)).collect()
    }

    fn tell_gone(&mut self, ctx: &mut Ctx<'_>, csvfs: Option<&Csvfs>, volume: VolumeNo) {
        let Some(Role::Owner(epoch)) = csvfs.map(Csvfs::role) else { return };
        let down = self.down_nodes(false);
        let agent = &mut self.agents[volume];
        let nodes: Vec<NodeId> = down.difference(&agent.told_gone).map(|(node, _)| *node).collect();
        if nodes.is_empty() {
            agent.told_gone = down;
        } else {
            agent.down = down;
            agent.order(ctx, csvfs, Order::Gone { epoch, nodes }, After::ToldGone);
        }
    }

    /// csvfs cannot get back what it lent to a node.
    pub(super) fn fence_wanted(&mut self, ctx: &mut Ctx<'_>, volume: VolumeNo, node: NodeId) {
        let name = volume_name(volume);
        let Some(record) = self.db.volumes.get(&name) else { return };
        let epoch = record.epoch;
        let reason = "it did not give back what it was lent".to_owned();
        match record.members.get(&node) {
            Some(member) if member.state == MemberState::Admitted => {
                let generation = member.generation;
                let command = Command::VolumeFence { name, epoch, node, generation, reason };
                self.propose(ctx, usize::MAX, command);
            }
            // The agent is at it.
            Some(member) if member.state == MemberState::FencePending => {}
            Some(_) | None => {
                let id = ctx.number();
                let order = Order::Gone { epoch, nodes: vec![node] };
                ctx.after(1, Process::Csvfs(volume), Input::Order(id, order));
            }
        }
    }

    // ---- what came of it -------------------------------------------------------------------------------------

    pub(super) fn agent_proposed(&mut self, ctx: &mut Ctx<'_>, volume: VolumeNo, result: Result<(), String>) {
        let Some(agent) = self.agents.get_mut(volume) else { return };
        match result {
            Ok(()) => agent.done(),
            Err(why) => agent.failed(ctx, &why),
        }
    }

    pub(super) fn agent_ordered(
        &mut self,
        ctx: &mut Ctx<'_>,
        csvfs: &[Option<Csvfs>],
        volume: VolumeNo,
        id: u64,
        result: Result<(), String>,
    ) {
        if matches!(&self.agents[volume].doing, Doing::Ordering { id: waiting, .. } if *waiting == id) {
            let csvfs = csvfs.get(volume).and_then(Option::as_ref);
            self.ordered(ctx, csvfs, volume, result);
        }
    }

    fn ordered(
        &mut self,
        ctx: &mut Ctx<'_>,
        csvfs: Option<&Csvfs>,
        volume: VolumeNo,
        result: Result<(), String>,
    ) {
        let (name, node) = (volume_name(volume), self.me);
        let agent = &mut self.agents[volume];
        let Doing::Ordering { after, .. } = &agent.doing else { return };
        match (after.clone(), result) {
            (After::Taken(_), Err(why)) if unknown(ctx, csvfs) => agent.failed(ctx, &why),
            (After::Taken(epoch), Err(why)) => {
                self.say(ctx, volume, Command::VolumeStartFailed { name, epoch, node, why });
            }
            (After::Nothing | After::Fenced(..) | After::Released(_) | After::ToldGone, Err(why)) => {
                agent.failed(ctx, &why);
            }
            (After::Nothing, Ok(())) => agent.done(),
            (After::ToldGone, Ok(())) => {
                agent.told_gone = agent.down.clone();
                agent.done();
            }
            (After::Taken(epoch), Ok(())) => {
                agent.told_gone = agent.down.clone();
                self.tell_online(ctx, volume, epoch);
            }
            (After::Fenced(epoch, fenced), Ok(())) => {
                self.say(ctx, volume, Command::VolumeFenced { name, epoch, fenced });
            }
            (After::Released(epoch), Ok(())) => {
                self.say(ctx, volume, Command::VolumeReleased { name, epoch, node });
            }
        }
    }

    pub(super) fn agent_lun(
        &mut self,
        ctx: &mut Ctx<'_>,
        csvfs: &[Option<Csvfs>],
        machine: &Machine,
        volume: VolumeNo,
        answer: &Answer,
    ) {
        let (aptpl, incarnation) = (machine.aptpl, machine.incarnation.unwrap_or(0));
        let id = self.db.id;
        let me = self.me;
        let agent = &mut self.agents[volume];
        match (std::mem::replace(&mut agent.doing, Doing::Idle), answer) {
            (Doing::CheckingKey { generation }, Answer::Keys(keys)) => {
                if keys.contains(&reservation_key(id, me, generation)) {
                    agent.registered = Some(generation);
                    agent.done();
                } else if keys.is_empty() {
                    // The storage has forgotten all of them.
                    self.register(ctx, volume, generation);
                } else {
                    agent.void = Some(generation);
                    agent.done();
                }
            }
            (Doing::Registering { generation }, Answer::Done) if ctx.bugs.registration_not_confirmed => {
                agent.registered = Some(generation);
                agent.done();
            }
            (Doing::Registering { generation }, Answer::Done) => {
                // Whoever fenced this node before the key was there has seen nothing to take away. What was decided by
                // now is known when a command given now is applied; this one changes nothing.
                let number = self.propose(ctx, volume, Command::NodeUp { node: me, incarnation });
                self.agents[volume].doing = Doing::Confirming { generation, number };
            }
            (Doing::Unregistering { generation }, Answer::Done) => {
                let name = volume_name(volume);
                self.say(ctx, volume, Command::VolumeWithdraw { name, node: me, incarnation, generation });
            }
            (Doing::ReadingKeys { fence, what }, Answer::Keys(keys)) => {
                self.preempt(ctx, csvfs, aptpl, volume, (fence, what), keys);
            }
            (Doing::Preempting { fence, what, keys, unseen: true }, Answer::Done) => {
                let until_ms = ctx.mono_ms() + NO_ABORT_WAIT_MS;
                agent.doing = Doing::Waiting { fence, what, keys, until_ms };
            }
            (Doing::Preempting { fence, what, keys, unseen: false }, Answer::Done) => {
                ctx.observe(Observation::Fenced(volume, keys));
                self.fenced(ctx, csvfs, volume, fence, what);
            }
            (doing @ Doing::Preempting { .. }, Answer::Conflict) => {
                agent.doing = doing;
                agent.registered = None;
                agent.failed(ctx, "this node is not registered");
            }
            (doing, answer) => {
                agent.doing = doing;
                agent.failed(ctx, &format!("the LUN answered {answer:?}"));
            }
        }
    }

    fn preempt(
        &mut self,
        ctx: &mut Ctx<'_>,
        csvfs: &[Option<Csvfs>],
        aptpl: bool,
        volume: VolumeNo,
        (fence, what): (Members, For),
        keys: &[u64],
    ) {
        let Some(record) = self.db.volumes.get(&volume_name(volume)) else { return };
        let mut victims: Vec<u64> =
            fence.iter().map(|(node, generation)| reservation_key(self.db.id, *node, *generation)).collect();
        // A storage that forgot the key aborts nothing, and may have taken writes without it.
        let unseen = !aptpl && victims.iter().any(|victim| !keys.contains(victim));
        victims.extend(self.db.stale_keys(record, keys));
        victims.sort_unstable();
        victims.dedup();
        let own = self.db.key_of(record, self.me);
        let agent = &mut self.agents[volume];
        let Some(own) = own.filter(|own| !victims.contains(own)) else {
            agent.registered = None;
            agent.failed(ctx, "this node is to be fenced itself");
            return;
        };
        if victims.is_empty() || (ctx.bugs.take_without_fence && matches!(what, For::Take(_))) {
            self.fenced(ctx, csvfs, volume, fence, what);
            return;
        }
        let abort = !ctx.bugs.fence_without_abort;
        let request = Request::Preempt { own, victims: victims.clone(), abort };
        agent.lun(ctx, Doing::Preempting { fence, what, keys: victims, unseen }, request);
    }

    /// Is this proposal's effect here waited for, rather than its answer?
    pub(super) fn confirming(&self, proposal: u64) -> bool {
        let waits =
            |agent: &Agent| matches!(agent.doing, Doing::Confirming { number, .. } if number == proposal);
        self.agents.iter().any(waits)
    }

    /// A proposal of this node is applied: whoever waits for that knows now whether it is still admitted.
    pub(super) fn confirmed(&mut self, ctx: &mut Ctx<'_>, number: u64) {
        for agent in &mut self.agents {
            let Doing::Confirming { generation, number: waiting } = agent.doing else { continue };
            if waiting != number {
                continue;
            }
            self.pending.remove(&number);
            let record = self.db.volumes.get(&volume_name(agent.volume));
            let member = record.and_then(|record| record.admitted(ctx.me));
            if member.is_some_and(|member| member.generation == generation) {
                agent.registered = Some(generation);
            } else {
                agent.void = Some(generation);
            }
            agent.done();
        }
    }

    /// Has the time come for what the storage may have taken of somebody it forgot?
    pub(super) fn waited(&mut self, ctx: &mut Ctx<'_>, csvfs: &[Option<Csvfs>], volume: VolumeNo) {
        let now = ctx.mono_ms();
        let agent = &mut self.agents[volume];
        match std::mem::replace(&mut agent.doing, Doing::Idle) {
            Doing::Waiting { fence, what, keys, until_ms } if now >= until_ms => {
                ctx.observe(Observation::Fenced(volume, keys));
                self.fenced(ctx, csvfs, volume, fence, what);
            }
            other @ (Doing::Idle
            | Doing::Proposing
            | Doing::Ordering { .. }
            | Doing::CheckingKey { .. }
            | Doing::Registering { .. }
            | Doing::Unregistering { .. }
            | Doing::Confirming { .. }
            | Doing::ReadingKeys { .. }
            | Doing::Preempting { .. }
            | Doing::Waiting { .. }) => agent.doing = other,
        }
    }

    /// These can write no more.
    fn fenced(
        &mut self,
        ctx: &mut Ctx<'_>,
        csvfs: &[Option<Csvfs>],
        volume: VolumeNo,
        fence: Members,
        what: For,
    ) {
        let down = self.down_nodes(true);
        let csvfs = csvfs.get(volume).and_then(Option::as_ref);
        // Whoever has come back under a new generation meanwhile is not gone.
        let pending =
            self.db.volumes.get(&volume_name(volume)).map(|record| record.to_fence()).unwrap_or_default();
        let fenced: Vec<NodeId> =
            fence.iter().filter(|one| pending.contains(one)).map(|(node, _)| *node).collect();
        let agent = &mut self.agents[volume];
        match what {
            For::Take(epoch) => {
                let gone: BTreeSet<NodeId> = down.iter().map(|(node, _)| *node).chain(fenced).collect();
                agent.fenced_others = (epoch, fence);
                agent.down = down;
                let order = Order::Take { epoch, gone: gone.into_iter().collect() };
                agent.order(ctx, csvfs, order, After::Taken(epoch));
            }
            For::Online(epoch) => {
                let after = After::Fenced(epoch, fence);
                agent.order(ctx, csvfs, Order::Gone { epoch, nodes: fenced }, after);
            }
        }
    }
}
