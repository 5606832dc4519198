//! csvfs of one volume on one node: what it is (as csvfs/src/role.rs), with its [`client`] and, where it owns the volume, its
//! [`coordinator`]. Orders are carried out one at a time; one of an earlier epoch than the last is refused.

pub mod client;
pub mod coordinator;
pub mod message;

use crate::event::{Action, Ctx, Input, Process, Reply, VolumeNo};
use crate::world::lun::{Answer, Request};
use client::Client;
use coordinator::Coordinator;
use csv_cluster::agent;
use csv_types::{Epoch, NodeId};
use message::{Body, Order};
use std::collections::VecDeque;

/// Between two looks of a process, in milliseconds.
pub const TICK_MS: u64 = 50;

/// What it is.
#[derive(Debug)]
pub enum Role {
    /// Neither.
    Nobody,
    /// The coordinator.
    Owner(Box<Coordinator>),
    /// A data server.
    Follower(Epoch, NodeId),
}

/// How far a take-over is.
#[derive(Debug, Clone, Copy)]
enum Take {
    Label,
    BeginEpoch,
    Mount,
}

/// See the module.
#[derive(Debug)]
pub struct Csvfs {
    volume: VolumeNo,
    /// Which life of it this is.
    pub life: u64,
    /// It was killed, and the kernel waits for its I/O.
    pub dead: bool,
    /// Its client.
    pub client: Client,
    /// What it is.
    pub role: Role,
    /// A coordinator that was told to end and has I/O under way.
    leaving: Option<Box<Coordinator>>,
    last_epoch: Epoch,
    running: Option<(u64, Order)>,
    queue: VecDeque<(u64, Order)>,
    take: Option<(Take, u64)>,
}

impl Csvfs {
    /// A new process.
    #[must_use]
    pub fn new(volume: VolumeNo, life: u64) -> Csvfs {
        Csvfs {
            volume,
            life,
            dead: false,
            client: Client::new(volume, life),
            role: Role::Nobody,
            leaving: None,
            last_epoch: Epoch(0),
            running: None,
            queue: VecDeque::new(),
            take: None,
        }
    }

    /// What it tells csvd; nothing while an order is carried out.
    #[must_use]
    pub fn role(&self) -> agent::Role {
        match &self.role {
            _ if self.running.is_some() || self.dead => agent::Role::Silent,
            Role::Nobody => agent::Role::Nobody,
            Role::Owner(coordinator) => agent::Role::Owner(coordinator.epoch),
            Role::Follower(epoch, owner) => agent::Role::Follower(*epoch, *owner),
        }
    }

    /// Does it have the file system mounted, or is it about to, or not yet rid of it?
    #[must_use]
    pub fn mounted(&self) -> Option<Epoch> {
        let taking = || match (&self.running, &self.take) {
            (Some((_, Order::Take { epoch, .. })), Some((Take::Mount, _))) => Some(*epoch),
            _ => None,
        };
        if self.dead {
            return None;
        }
        match (&self.role, &self.leaving) {
            (Role::Owner(coordinator), _) | (_, Some(coordinator)) => Some(coordinator.epoch),
            (Role::Nobody | Role::Follower(..), None) => taking(),
        }
    }

    /// An input of this process.
    pub fn input(&mut self, ctx: &mut Ctx<'_>, input: Input) {
        match input {
            Input::Tick => {
                self.client.tick(ctx);
                let own_quiet = self.client.is_quiet() && !self.client.may_begin(ctx.mono_ms());
                if let Role::Owner(coordinator) = &mut self.role {
                    coordinator.tick(ctx, own_quiet);
                }
                self.go_on(ctx);
                ctx.after(TICK_MS, Process::Csvfs(self.volume), Input::Tick);
            }
            Input::Order(id, order) => {
                self.queue.push_back((id, order));
                self.go_on(ctx);
            }
            Input::Submit(number) => self.client.submit(ctx, number),
            Input::ClientIo(number, answer) => {
                self.client.io_ended(ctx, number, &answer);
                self.go_on(ctx);
            }
            Input::OwnerIo(io, answer) => {
                self.owner_io(ctx, io, &answer);
                self.go_on(ctx);
            }
            Input::Message(..)
            | Input::Synced
            | Input::Lun(..)
            | Input::Ordered(..)
            | Input::FenceWanted(..)
            | Input::Witness { .. }
            | Input::WitnessState(..)
            | Input::WitnessSynced(..) => {}
        }
    }

    /// A message of another csvfs, or of this one.
    pub fn receive(&mut self, ctx: &mut Ctx<'_>, from: NodeId, body: Body) {
        use message::What;
        match body.what {
            What::Hello { .. }
            | What::Reclaim { .. }
            | What::Ping { .. }
            | What::Get { .. }
            | What::Return { .. }
            | What::Punch { .. } => {
                if let Role::Owner(coordinator) = &mut self.role {
                    coordinator.receive(ctx, from, body);
                    coordinator.next_job(ctx);
                }
            }
            What::Welcome { .. }
            | What::Reclaimed
            | What::Pong { .. }
            | What::Grant { .. }
            | What::NoGrant { .. }
            | What::Recall { .. }
            | What::Revoked => self.client.receive(ctx, from, body),
        }
    }

    fn owner_io(&mut self, ctx: &mut Ctx<'_>, io: u64, answer: &Answer) {
        match answer {
            Answer::Conflict => {
                self.client.refused = true;
                self.client.lease_until_ms = 0;
            }
            Answer::Failed => self.client.path_failed = true,
            Answer::Done | Answer::Blocks(..) | Answer::Head { .. } | Answer::Keys(_) => {}
        }
        if let Some((stage, _)) = self.take.take_if(|(_, waiting)| *waiting == io) {
            self.take_step(ctx, stage, answer);
            return;
        }
        if let Some(leaving) = &mut self.leaving {
            leaving.io_ended(ctx, io, answer);
        }
        if let Role::Owner(coordinator) = &mut self.role
            && !coordinator.io_ended(ctx, io, answer)
        {
            // The file system is shut down: as after a power cut.
            ctx.note(format!("{} coordinator of volume {} is broken", ctx.me, self.volume));
            self.leave();
        }
    }

    /// Ends what it is now.
    fn leave(&mut self) {
        match std::mem::replace(&mut self.role, Role::Nobody) {
            Role::Nobody => {}
            Role::Follower(..) => self.client.detach(),
            Role::Owner(mut coordinator) => {
                coordinator.stop();
                self.client.detach();
                self.leaving = Some(coordinator);
            }
        }
    }

    fn left(&mut self) -> bool {
        self.leaving.take_if(|leaving| leaving.is_quiet());
        self.leaving.is_none()
    }

    fn answer(&mut self, ctx: &mut Ctx<'_>, result: Result<(), String>) {
        if let Some((id, order)) = self.running.take() {
            if let Err(why) = &result {
                ctx.note(format!("{} volume {}: {order:?} failed: {why}", ctx.me, self.volume));
            }
            ctx.after(1, Process::Csvd, Input::Ordered(self.volume, id, result));
        }
    }

    /// Takes the next order up, or goes on with the one under way.
    fn go_on(&mut self, ctx: &mut Ctx<'_>) {
        let _quiet = self.left();
        loop {
            if self.running.is_none() {
                let Some((id, order)) = self.queue.pop_front() else { return };
                self.running = Some((id, order));
                if let Err(refused) = self.begin(ctx) {
                    self.answer(ctx, refused);
                    continue;
                }
            }
            let Some((_, order)) = &self.running else { return };
            let order = order.clone();
            if !self.left() || self.take.is_some() {
                return;
            }
            match order {
                Order::Suspend if !self.client.is_quiet() => return,
                Order::Suspend | Order::HandOver { .. } | Order::Gone { .. } => self.answer(ctx, Ok(())),
                Order::Follow { epoch, owner } => {
                    self.seen(epoch);
                    self.client.resume();
                    self.client.attach(owner, epoch);
                    self.role = Role::Follower(epoch, owner);
                    self.answer(ctx, Ok(()));
                }
                Order::Take { .. } => {
                    self.read_head(ctx, Take::Label);
                    return;
                }
            }
        }
    }

    /// The beginning of an order; `Err`: it is answered so at once.
    fn begin(&mut self, ctx: &mut Ctx<'_>) -> Result<(), Result<(), String>> {
        let Some((_, order)) = &self.running else { return Ok(()) };
        let order = order.clone();
        match (order, &mut self.role) {
            (Order::Suspend, _) => {
                self.client.suspend();
                self.leave();
            }
            (Order::Gone { epoch, nodes }, Role::Owner(coordinator)) if coordinator.epoch == epoch => {
                coordinator.gone(ctx, &nodes);
                return Err(Ok(()));
            }
            (Order::Gone { .. }, _) => return Err(Err("not the coordinator in that epoch".into())),
            (Order::Take { epoch, gone }, Role::Owner(coordinator)) if coordinator.epoch == epoch => {
                coordinator.gone(ctx, &gone);
                return Err(Ok(()));
            }
            (Order::Follow { epoch, owner }, Role::Follower(now, whom))
                if (*now, *whom) == (epoch, owner) =>
            {
                self.client.resume();
                return Err(Ok(()));
            }
            (Order::Take { epoch, .. } | Order::Follow { epoch, .. }, _) => {
                if epoch < self.last_epoch && !ctx.bugs.epoch_not_checked {
                    return Err(Err(format!("too late, the volume is in epoch {}", self.last_epoch)));
                }
                self.leave();
            }
            (Order::HandOver { epoch }, Role::Owner(coordinator)) => {
                if coordinator.epoch != epoch {
                    return Err(Err("coordinated here in another epoch".into()));
                }
                self.leave();
            }
            (Order::HandOver { .. }, Role::Nobody | Role::Follower(..)) => {}
        }
        Ok(())
    }

    fn seen(&mut self, epoch: Epoch) {
        self.last_epoch = epoch;
    }

    fn request(&mut self, ctx: &mut Ctx<'_>, stage: Take, request: Request) {
        let io = ctx.number();
        self.take = Some((stage, io));
        ctx.out.push(Action::Lun(self.volume, request, Reply::Owner(io)));
    }

    fn read_head(&mut self, ctx: &mut Ctx<'_>, stage: Take) {
        self.request(ctx, stage, Request::ReadHead);
    }

    fn take_step(&mut self, ctx: &mut Ctx<'_>, stage: Take, answer: &Answer) {
        let Some((_, Order::Take { epoch, gone })) = &self.running else { return };
        let (epoch, gone) = (*epoch, gone.clone());
        match (stage, answer) {
            (Take::Label, Answer::Head { label, .. }) => {
                if *label >= epoch && !ctx.bugs.epoch_not_checked {
                    self.answer(ctx, Err(format!("the label is at epoch {label} already")));
                } else {
                    let owner = ctx.me;
                    self.request(ctx, Take::BeginEpoch, Request::BeginEpoch { epoch, owner });
                }
            }
            (Take::BeginEpoch, Answer::Done) => self.read_head(ctx, Take::Mount),
            (Take::Mount, Answer::Head { meta, .. }) => {
                self.seen(epoch);
                let coordinator = Coordinator::start(ctx, self.volume, epoch, meta.clone(), &gone);
                self.client.resume();
                self.client.attach(ctx.me, epoch);
                self.role = Role::Owner(Box::new(coordinator));
                ctx.note(format!("{} coordinates volume {} in epoch {epoch}", ctx.me, self.volume));
                self.answer(ctx, Ok(()));
            }
            (_, other) => {
                let why = format!("the LUN answered {other:?}");
                self.answer(ctx, Err(why));
            }
        }
    }
}
