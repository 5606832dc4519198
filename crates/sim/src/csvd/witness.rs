//! The disk witness on one node: the real arbiter ([`csv_cluster::witness`]) and the voter that it lets run. Every answer of the
//! voter waits for its sync on the witness LUN and for a verify of the reservation that was made after that.

use super::{TICK_MS, send_raft};
use crate::event::{Action, Ctx, Input, Observation};
use crate::raft_model::{self, Disk, Raft, Voter};
use csv_cluster::db::Settings;
use csv_cluster::quorum::VoterId;
use csv_cluster::witness::{self, Effect, Op, Outcome, RoleKind, Timing, Witness};
use csv_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};

const CHALLENGE_MS: u64 = 2_000;
/// A witness that led stands back for this long, so that a node leads.
const STAND_BACK_MS: u64 = 4_000;

/// Times of the witness in the simulation.
#[must_use]
pub fn timing() -> Timing {
    let mut settings = Settings::default();
    for (key, value) in crate::SETTINGS {
        // Only keys that exist; `Sim::new` would refuse the others too.
        let _known = settings.set(key, value);
    }
    Timing::new(&settings)
}

/// See the module.
#[derive(Debug)]
pub struct Host {
    members: BTreeSet<Voter>,
    arbiter: Witness,
    voter: Option<Raft>,
    /// The state that the voter has on the LUN, as far as this node knows.
    disk: Disk,
    syncing: Option<u64>,
    requests: BTreeMap<u64, (u64, Vec<(Voter, raft_model::Message)>)>,
    verifying: Option<Op>,
    verified_ms: Option<u64>,
    challenge_ms: u64,
}

impl Host {
    pub(super) fn new(me: NodeId, members: BTreeSet<Voter>) -> Host {
        Host {
            members,
            arbiter: Witness::new(me.0.into(), timing()),
            voter: None,
            disk: Disk::default(),
            syncing: None,
            requests: BTreeMap::new(),
            verifying: None,
            verified_ms: None,
            challenge_ms: 0,
        }
    }

    /// Does the voter run here?
    #[must_use]
    pub fn serving(&self) -> bool {
        self.voter.is_some()
    }

    pub(super) fn tick(&mut self, ctx: &mut Ctx<'_>) {
        let now = ctx.mono_ms();
        if self.arbiter.role() == RoleKind::Idle && now >= self.challenge_ms {
            self.challenge_ms = now + CHALLENGE_MS + ctx.rng.range(0, TICK_MS * 10);
            self.step(ctx, witness::Input::Challenge);
        }
        self.step(ctx, witness::Input::Tick);
        if let Some(voter) = &mut self.voter {
            voter.tick(now, ctx.rng);
            if voter.leads() && !voter.answering(now, 1_000, 0).is_empty() && voter.commit == voter.log.len()
            {
                voter.resign(now + STAND_BACK_MS);
            }
        }
        self.settle(ctx);
    }

    pub(super) fn receive(&mut self, ctx: &mut Ctx<'_>, from: Voter, message: raft_model::Message) {
        if let Some(voter) = &mut self.voter {
            voter.receive(ctx.mono_ms(), from, message, ctx.rng);
        }
        self.settle(ctx);
    }

    pub(super) fn input(&mut self, ctx: &mut Ctx<'_>, input: Input) {
        match input {
            Input::Witness { op, outcome, verified_ms } => {
                if self.verifying == Some(op) {
                    self.verified_ms = verified_ms;
                }
                self.step(ctx, witness::Input::Done { op, outcome });
            }
            Input::WitnessState(op, disk) => {
                self.disk = disk;
                self.step(ctx, witness::Input::Done { op, outcome: Outcome::Ok });
            }
            Input::WitnessSynced(sync, ok) if self.syncing == Some(sync) => {
                self.syncing = None;
                match &mut self.voter {
                    Some(voter) if ok => voter.end_sync(&mut self.disk),
                    // The voter's state is not what it thinks: as good as lost.
                    _ => self.step(ctx, witness::Input::Yield),
                }
            }
            Input::WitnessSynced(..)
            | Input::Message(..)
            | Input::Tick
            | Input::Synced
            | Input::Lun(..)
            | Input::Ordered(..)
            | Input::FenceWanted(..)
            | Input::Order(..)
            | Input::Submit(_)
            | Input::ClientIo(..)
            | Input::OwnerIo(..) => {}
        }
        self.settle(ctx);
    }

    /// Begins a sync, and asks for leave to send what is ready.
    fn settle(&mut self, ctx: &mut Ctx<'_>) {
        let Some(voter) = &mut self.voter else { return };
        if voter.leads() {
            ctx.observe(Observation::Leads(voter.id, voter.term));
        }
        if voter.begin_sync() {
            let sync = ctx.number();
            self.syncing = Some(sync);
            ctx.out.push(Action::WitnessSync(sync, voter.sync_ops()));
        }
        let messages = voter.outbox();
        if !messages.is_empty() {
            let id = ctx.number();
            self.requests.insert(id, (ctx.now_ms, messages));
            self.step(ctx, witness::Input::Request { id });
        }
    }

    fn step(&mut self, ctx: &mut Ctx<'_>, input: witness::Input) {
        let mut effects = Vec::new();
        self.arbiter.step(ctx.mono_ms(), input, &mut effects);
        for effect in effects {
            self.carry_out(ctx, effect);
        }
    }

    fn carry_out(&mut self, ctx: &mut Ctx<'_>, effect: Effect) {
        match effect {
            Effect::StartVoter => {
                let (id, now) = (VoterId::WITNESS.0, ctx.mono_ms());
                ctx.note(format!("{} runs the witness", ctx.me));
                self.voter = Some(Raft::start(id, self.members.clone(), &self.disk, now, ctx.rng));
                self.syncing = None;
            }
            Effect::StopVoter { reason } => {
                ctx.note(format!("{} stops the witness: {reason}", ctx.me));
                self.voter = None;
                self.syncing = None;
            }
            Effect::Answer { id } => {
                if let Some((arrived_ms, messages)) = self.requests.remove(&id) {
                    let verified_ms = self.verified_ms;
                    ctx.observe(Observation::WitnessAnswers { arrived_ms, verified_ms });
                    for (to, message) in messages {
                        send_raft(ctx, VoterId::WITNESS.0, to, message);
                    }
                }
            }
            Effect::Deny { id } => drop(self.requests.remove(&id)),
            Effect::Lost { .. } => {}
            Effect::Verify { op } => {
                self.verifying = Some(op);
                ctx.out.push(Action::Witness(Effect::Verify { op }));
            }
            Effect::ReadSlot { .. }
            | Effect::TakeOver { .. }
            | Effect::ReadKeys { .. }
            | Effect::Renew { .. }
            | Effect::ReadState { .. }
            | Effect::Release => ctx.out.push(Action::Witness(effect)),
        }
    }
}
