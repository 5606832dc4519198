//! Carries out what processes want: messages, timers, requests to LUNs.

use super::{Event, Io, Sim};
use crate::csvfs::Csvfs;
use crate::event::{Action, Input, Message, Process, Reply};
use crate::node::Node;
use crate::world::lun::{Answer, Arrival, IoId, Request};
use csv_cluster::witness::{Effect, Outcome};
use csv_types::NodeId;
use std::rc::Rc;

/// Between a request and its arrival, in milliseconds; and its landing.
const ARRIVE_MS_MAX: u64 = 3;
const LAND_MS_MAX: u64 = 4;
/// Requests of a thousand that a node gives up when its path goes, and how long that takes.
const GIVEN_UP_PER_MILLE: u32 = 500;
const GIVE_UP_MS: u64 = 20;
/// Requests of a thousand that are late while some are.
const LATE_PER_MILLE: u32 = 250;

impl Sim {
    pub(super) fn act(&mut self, id: NodeId, action: Action) {
        match action {
            Action::Send(to, message) => self.send(id, to, message),
            Action::Broadcast(message) => {
                for to in self.nodes.keys().copied().collect::<Vec<_>>() {
                    self.send(id, to, message.clone());
                }
            }
            Action::After(local_ms, process, input) => {
                let in_ms = self.nodes.get(&id).map_or(0, |node| node.clock.true_ms(local_ms));
                self.after(id, in_ms.max(u64::from(local_ms > 0)), process, input);
            }
            Action::Lun(volume, request, reply) => self.lun_submit(id, volume, request, reply),
            Action::Witness(effect) => {
                let boots = self.nodes.get(&id).map_or(0, |node| node.boots);
                let in_ms = self.rng.range(1, ARRIVE_MS_MAX);
                self.schedule(in_ms, Event::Witness(id, boots, effect));
            }
            Action::WitnessSync(sync, ops) => {
                let boots = self.nodes.get(&id).map_or(0, |node| node.boots);
                let in_ms = self.rng.range(1, ARRIVE_MS_MAX);
                self.schedule(in_ms, Event::WitnessWrite(id, boots, sync, ops));
            }
            Action::StartCsvfs(volume) => self.start_csvfs(id, volume),
            Action::Observe(observation) => {
                let Some(node) = self.nodes.get(&id) else { return };
                let seen = self.oracle.observe(self.now_ms, node, observation);
                self.break_with(seen);
            }
            Action::Note(text) => self.note(&text),
        }
    }

    fn send(&mut self, from: NodeId, to: NodeId, message: Message) {
        for in_ms in self.network.route(&mut self.rng, from, to) {
            self.schedule(in_ms, Event::Deliver(from, to, message.clone()));
        }
    }

    fn start_csvfs(&mut self, id: NodeId, volume: usize) {
        self.next += 1;
        let life = self.next;
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.on) else { return };
        let slot = &mut node.csvfs[volume];
        if slot.is_none() {
            *slot = Some(Csvfs::new(volume, life));
            self.after(id, 20, Process::Csvfs(volume), Input::Tick);
        }
    }

    // ---- LUNs ------------------------------------------------------------------------------------------------

    fn lun_submit(&mut self, id: NodeId, volume: usize, request: Request, reply: Reply) {
        let process = match reply {
            Reply::Csvd => Process::Csvd,
            Reply::Client(_) | Reply::Owner(_) => Process::Csvfs(volume),
        };
        self.next += 1;
        let number = self.next;
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(life) = node.life(process) else { return };
        let no_path = node.no_path.contains(&volume);
        *node.io_under_way.entry(life).or_insert(0) += 1;
        let io = Io { node: id, volume, boots: node.boots, process, life, reply, given_up: false };
        self.ios.insert(number, io);
        if no_path {
            self.answer(number, Answer::Failed, 20);
            return;
        }
        let in_ms = self.rng.range(1, ARRIVE_MS_MAX);
        self.schedule(in_ms, Event::LunArrive(number, request));
    }

    pub(super) fn lun_arrive(&mut self, number: IoId, request: Request) {
        let Some(io) = self.ios.get(&number) else { return };
        let (id, volume) = (io.node, io.volume);
        let since = self.nodes.get(&id).map_or(u64::MAX, |node| node.boots - io.boots);
        // What a machine left behind arrives or not; when it boots it logs in anew, and nothing does any more.
        if since > 1 || (since == 1 && self.rng.chance(500)) {
            self.ios.remove(&number);
            return;
        }
        match self.luns[volume].arrive(number, id, request, &mut self.rng) {
            Arrival::Answered(answer) => self.answer(number, answer, 1),
            Arrival::Queued => {
                let late_ms = self.late_ms[volume];
                let late = late_ms > 0 && self.rng.chance(LATE_PER_MILLE);
                let in_ms = self.rng.range(0, if late { late_ms } else { LAND_MS_MAX });
                self.schedule(in_ms, Event::LunLand(number));
            }
        }
    }

    pub(super) fn lun_land(&mut self, number: IoId) {
        let Some(io) = self.ios.get(&number) else { return };
        let volume = io.volume;
        if let Some((key, Request::Commit(meta))) = self.luns[volume].queued(number)
            && !self.oracle.is_fenced(volume, key)
        {
            let meta = Rc::clone(meta);
            let freed = self.oracle.frees(volume, &self.luns[volume], &meta, &self.nodes, self.now_ms);
            self.break_with(freed);
        }
        let Some(landed) = self.luns[volume].land(number) else {
            // Aborted: its node hears that it failed.
            self.answer(number, Answer::Failed, 1);
            return;
        };
        let good = self.oracle.landed(volume, &self.luns[volume], self.oracle.db.id, &landed);
        self.break_with(good);
        self.answer(number, Answer::Done, 1);
    }

    fn answer(&mut self, number: IoId, answer: Answer, in_ms: u64) {
        let Some(io) = self.ios.remove(&number) else { return };
        let Some(node) = self.nodes.get_mut(&io.node).filter(|node| node.boots == io.boots) else { return };
        let lost = node.no_path.contains(&io.volume) && !matches!(answer, Answer::Conflict);
        let answer = if lost { Answer::Failed } else { answer };
        reap(node, io.life);
        if !io.given_up {
            self.reply(&io, answer, in_ms);
        }
    }

    /// The path is gone: the node's kernel gives up what is under way, which the storage may carry out all the same.
    pub(super) fn give_up_io(&mut self, id: NodeId, volume: usize) {
        for (number, mut io) in std::mem::take(&mut self.ios) {
            if (io.node, io.volume, io.given_up) == (id, volume, false) && self.rng.chance(GIVEN_UP_PER_MILLE)
            {
                io.given_up = true;
                self.reply(&io, Answer::Failed, GIVE_UP_MS);
            }
            self.ios.insert(number, io);
        }
    }

    fn reply(&mut self, io: &Io, answer: Answer, in_ms: u64) {
        let input = match io.reply {
            Reply::Csvd => Input::Lun(io.volume, answer),
            Reply::Client(number) => Input::ClientIo(number, answer),
            Reply::Owner(number) => Input::OwnerIo(number, answer),
        };
        self.schedule(in_ms, Event::Input(io.node, io.process, io.life, input));
    }

    pub(super) fn witness_act(&mut self, id: NodeId, boots: u64, effect: &Effect) {
        let Some(node) = self.nodes.get(&id).filter(|node| node.boots == boots) else { return };
        let outcome = self.witness.act(node.id.0.into(), effect);
        let (op, input) = match effect {
            Effect::ReadState { op } if outcome == Outcome::Ok => {
                (*op, Input::WitnessState(*op, self.witness.disk.clone()))
            }
            Effect::ReadSlot { op }
            | Effect::TakeOver { op, .. }
            | Effect::ReadKeys { op }
            | Effect::Renew { op, .. }
            | Effect::ReadState { op }
            | Effect::Verify { op } => {
                let verified = matches!(effect, Effect::Verify { .. }) && outcome == Outcome::Ok;
                let verified_ms = verified.then_some(self.now_ms);
                (*op, Input::Witness { op: *op, outcome, verified_ms })
            }
            Effect::StartVoter
            | Effect::StopVoter { .. }
            | Effect::Answer { .. }
            | Effect::Deny { .. }
            | Effect::Release
            | Effect::Lost { .. } => return,
        };
        self.mix(op);
        self.after(id, 1, Process::Csvd, input);
    }
}

/// A request of a process has ended: one that was killed is gone with its last.
pub(super) fn reap(node: &mut Node, life: u64) {
    if let Some(count) = node.io_under_way.get_mut(&life) {
        *count = count.saturating_sub(1);
        if *count > 0 {
            return;
        }
        node.io_under_way.remove(&life);
    }
    for slot in &mut node.csvfs {
        if slot.as_ref().is_some_and(|csvfs| csvfs.dead && csvfs.life == life) {
            *slot = None;
        }
    }
}
