//! Two arbiters and a model of the witness LUN: reservations, delays, frozen nodes, errors. Time is virtual.

use super::*;
use std::collections::BTreeMap;

/// The LUN.
#[derive(Debug, Default)]
pub(super) struct Lun {
    pub(super) holder: Option<u64>,
    pub(super) counter: u64,
    pub(super) broken: bool,
}

impl Lun {
    /// What an operation does when it reaches the LUN. `victim` is what a take-over preempts.
    pub(super) fn act(&mut self, key: u64, effect: &Effect) -> Outcome {
        if self.broken {
            return Outcome::Failed("path".into());
        }
        let mine = if self.holder == Some(key) { Outcome::Ok } else { Outcome::Conflict };
        match effect {
            Effect::ReadSlot { .. } | Effect::ReadKeys { .. } => {
                Outcome::Slot(Slot { counter: self.counter, holder: self.holder })
            }
            Effect::TakeOver { victim, .. } => {
                if self.holder == *victim || self.holder == Some(key) {
                    self.holder = Some(key);
                    Outcome::Ok
                } else {
                    Outcome::Conflict
                }
            }
            Effect::Renew { counter, .. } => {
                if mine == Outcome::Ok {
                    self.counter = *counter;
                }
                mine
            }
            Effect::Verify { .. } => mine,
            Effect::ReadState { .. } => Outcome::Ok,
            Effect::StartVoter
            | Effect::StopVoter { .. }
            | Effect::Answer { .. }
            | Effect::Deny { .. }
            | Effect::Release
            | Effect::Lost { .. } => Outcome::Failed("no operation".into()),
        }
    }
}

pub(super) fn op_of(effect: &Effect) -> Option<Op> {
    match effect {
        Effect::ReadSlot { op }
        | Effect::TakeOver { op, .. }
        | Effect::ReadKeys { op }
        | Effect::Renew { op, .. }
        | Effect::ReadState { op }
        | Effect::Verify { op } => Some(*op),
        Effect::StartVoter
        | Effect::StopVoter { .. }
        | Effect::Answer { .. }
        | Effect::Deny { .. }
        | Effect::Release
        | Effect::Lost { .. } => None,
    }
}

/// An arbiter and what is on its way to it.
#[derive(Debug)]
struct Node {
    key: u64,
    witness: Witness,
    frozen_until_ms: u64,
    inbox: Vec<Input>,
    /// On the way to the LUN: when it gets there, when the answer is back.
    going: Vec<(u64, u64, Effect)>,
    coming: Vec<(u64, Input)>,
    /// Request -> when it arrived. Verify -> when it took effect as the holder.
    arrived: BTreeMap<u64, u64>,
    verified_ms: Option<u64>,
    voter: bool,
    next_request: u64,
    /// Awake for that long with a voter and without the reservation.
    without_ms: u64,
}

/// A fault of the model, at a time.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    Freeze { node: usize, ms: u64 },
    Break { ms: u64 },
    ForgetReservation,
    Yield { node: usize },
}

/// The whole.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) lun: Lun,
    nodes: Vec<Node>,
    now_ms: u64,
    mended_ms: u64,
    pub(super) answers: u64,
    pub(super) takeovers: u64,
}

pub(super) const TIMING: Timing = Timing { renew_ms: 3_000, deadline_ms: 4_500, challenge_ms: 6_000 };
const STEP_MS: u64 = 50;
/// One verify that is under way, and one that fails; each a step and a way there and back.
const STOP_MS_MAX: u64 = 2 * (STEP_MS + 2 * DELAY_MS_MAX) + 2 * STEP_MS;
/// Longest way to the LUN, and back.
pub(super) const DELAY_MS_MAX: u64 = 400;

impl Model {
    pub(super) fn new(nodes: u64) -> Self {
        let node = |key| Node {
            key,
            witness: Witness::new(key, TIMING),
            frozen_until_ms: 0,
            inbox: Vec::new(),
            going: Vec::new(),
            coming: Vec::new(),
            arrived: BTreeMap::new(),
            verified_ms: None,
            voter: false,
            next_request: 1,
            without_ms: 0,
        };
        let nodes = (1..=nodes).map(node).collect();
        Model { lun: Lun::default(), nodes, now_ms: 0, mended_ms: 0, answers: 0, takeovers: 0 }
    }

    pub(super) fn fault(&mut self, fault: &Fault) {
        match fault {
            Fault::Freeze { node, ms } => self.nodes[*node].frozen_until_ms = self.now_ms + ms,
            Fault::Break { ms } => self.mended_ms = self.now_ms + ms,
            Fault::ForgetReservation => self.lun.holder = None,
            Fault::Yield { node } => self.nodes[*node].inbox.push(Input::Yield),
        }
    }

    /// One step of time. `delay` gives the way to the LUN and back, in milliseconds.
    pub(super) fn step(&mut self, delay: &mut dyn FnMut() -> (u64, u64)) {
        self.now_ms += STEP_MS;
        self.lun.broken = self.now_ms < self.mended_ms;
        for i in 0..self.nodes.len() {
            self.reach_lun(i);
        }
        for i in 0..self.nodes.len() {
            self.run_node(i, delay);
        }
        for i in 0..self.nodes.len() {
            self.check_voter(i);
        }
    }

    /// A voter without the reservation finds out by its next verify, and stops.
    fn check_voter(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        if !node.voter || self.lun.holder == Some(node.key) {
            node.without_ms = 0;
        } else if node.frozen_until_ms <= self.now_ms {
            node.without_ms += STEP_MS;
            assert!(
                node.without_ms <= STOP_MS_MAX,
                "voter without reservation at {}: {self:#?}",
                self.now_ms
            );
        }
    }

    /// Operations that get to the LUN now. Nothing holds them up, not even that their node is frozen.
    fn reach_lun(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        let (there, going) =
            std::mem::take(&mut node.going).into_iter().partition(|(at, _, _)| *at <= self.now_ms);
        node.going = going;
        let there: Vec<(u64, u64, Effect)> = there;
        for (_, back_ms, effect) in there {
            let before = self.lun.holder;
            let outcome = self.lun.act(node.key, &effect);
            if self.lun.holder != before {
                self.takeovers += 1;
            }
            if matches!(effect, Effect::Verify { .. }) && outcome == Outcome::Ok {
                node.verified_ms = Some(self.now_ms);
            }
            if let Some(op) = op_of(&effect) {
                node.coming.push((back_ms, Input::Done { op, outcome }));
            }
        }
    }

    fn run_node(&mut self, i: usize, delay: &mut dyn FnMut() -> (u64, u64)) {
        let now_ms = self.now_ms;
        let node = &mut self.nodes[i];
        let (back, coming) = std::mem::take(&mut node.coming).into_iter().partition(|(at, _)| *at <= now_ms);
        node.coming = coming;
        let back: Vec<(u64, Input)> = back;
        node.inbox.extend(back.into_iter().map(|(_, input)| input));
        if now_ms < node.frozen_until_ms {
            return;
        }
        if node.witness.role() == RoleKind::Idle {
            node.inbox.push(Input::Challenge);
        }
        if node.voter {
            let id = node.next_request;
            node.next_request += 1;
            node.arrived.insert(id, now_ms);
            node.inbox.push(Input::Request { id });
        }
        node.inbox.push(Input::Tick);
        let mut effects = Vec::new();
        for input in std::mem::take(&mut node.inbox) {
            node.witness.step(now_ms, input, &mut effects);
        }
        for effect in effects {
            self.carry_out(i, effect, delay);
        }
    }

    fn carry_out(&mut self, i: usize, effect: Effect, delay: &mut dyn FnMut() -> (u64, u64)) {
        let node = &mut self.nodes[i];
        match &effect {
            Effect::StartVoter => node.voter = true,
            Effect::StopVoter { .. } => node.voter = false,
            Effect::Release => {
                if self.lun.holder == Some(node.key) {
                    self.lun.holder = None;
                }
            }
            Effect::Answer { id } => {
                let arrived_ms = node.arrived.remove(id).expect("answered twice");
                let verified_ms = node.verified_ms.expect("answered without a verify");
                assert!(verified_ms > arrived_ms, "the verify is older than the request");
                // On its way while another one took over: harmless, it was verified before, and the other reads the state
                // after. But never long after, as a holder that was frozen would.
                let age_ms = self.now_ms - verified_ms;
                let holds = self.lun.holder == Some(node.key);
                assert!(holds || age_ms < TIMING.deadline_ms, "verified {age_ms} ms before");
                self.answers += 1;
            }
            Effect::Deny { id } => {
                node.arrived.remove(id);
            }
            Effect::Lost { .. } => {}
            Effect::ReadSlot { .. }
            | Effect::TakeOver { .. }
            | Effect::ReadKeys { .. }
            | Effect::Renew { .. }
            | Effect::ReadState { .. }
            | Effect::Verify { .. } => {
                let (there_ms, back_ms) = delay();
                let there_ms = self.now_ms + STEP_MS + there_ms;
                node.going.push((there_ms, there_ms + back_ms, effect));
            }
        }
    }
}
