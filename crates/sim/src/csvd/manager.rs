//! What the leader does for all: verdicts on nodes, the plan for volumes, who votes. As csvd's `manager.rs`.

use super::{Csvd, Machine};
use crate::event::Ctx;
use crate::raft_model::Payload;
use csv_cluster::db::Command;
use csv_cluster::failover::{View, plan};
use csv_cluster::membership::{Observer, verdicts};
use csv_cluster::quorum::{VoterId, target_voters};
use csv_types::NodeId;
use std::collections::BTreeSet;
use std::rc::Rc;

const WAIT_MS: u64 = 3_000;
const ACK_AGE_MS_MAX: u64 = 2_000;
const LAG_MAX: usize = 500;
/// A leader that has not reached a majority for longer does not act.
const QUORUM_AGE_MS_MAX: u64 = 1_500;

impl Csvd {
    pub(super) fn manage(&mut self, ctx: &mut Ctx<'_>, machine: &Machine) {
        let now = ctx.mono_ms();
        let quorum = self.raft.contact_age_ms(now).is_some_and(|age| age <= QUORUM_AGE_MS_MAX);
        if !self.raft.leads() || !quorum || !self.db.initialised() {
            self.managing.0.clear();
            return;
        }
        let applied = self.applied;
        self.managing.0.retain(|index| *index > applied);
        if !self.managing.0.is_empty() && now < self.managing.1 {
            return;
        }
        let now_unix_ms = ctx.clock.unix_ms(ctx.now_ms);
        let incarnation = machine.incarnation.unwrap_or(0);
        let observer = Observer { me: self.me, incarnation, now_unix_ms };
        let mut commands = verdicts(&self.db, &self.heartbeats, observer);
        if commands.is_empty() {
            let mut reports = self.reports.clone();
            reports.insert(self.me, self.own_report(machine));
            commands = plan(&self.db, &View { now_unix_ms, me: self.me, reports });
        }
        self.lead(ctx, commands);
        self.keep_voters(ctx);
        self.managing.1 = now + WAIT_MS;
    }

    fn lead(&mut self, ctx: &mut Ctx<'_>, commands: Vec<Command>) {
        for command in commands {
            ctx.note(format!("leader {}: {command:?}", self.me));
            let envelope = Rc::new(command.by(self.me, ctx.clock.unix_ms(ctx.now_ms)));
            let index = self.raft.propose(Payload::Command(envelope, None)).map(|(index, _)| index);
            self.managing.0.extend(index);
        }
        self.raft.tick(ctx.mono_ms(), ctx.rng);
    }

    /// An administrator's command, given on this node; only a leader takes it.
    pub fn admin(&mut self, ctx: &mut Ctx<'_>, command: Command) -> bool {
        let leads = self.raft.leads();
        if leads {
            self.lead(ctx, vec![command]);
        }
        leads
    }

    fn keep_voters(&mut self, ctx: &mut Ctx<'_>) {
        let now = ctx.mono_ms();
        let answering = self.raft.answering(now, ACK_AGE_MS_MAX, LAG_MAX);
        let heard = self.heartbeats.heard();
        let mut able: BTreeSet<NodeId> =
            heard.into_iter().filter(|node| answering.contains(&u64::from(node.0))).collect();
        able.insert(self.me);
        let current: BTreeSet<VoterId> = self.raft.voters().0.into_iter().map(VoterId).collect();
        let witness = answering.contains(&VoterId::WITNESS.0);
        let decision = target_voters(&self.db, &able, &current, witness);
        if decision.voters != current {
            let voters = decision.voters.iter().map(|voter| voter.0).collect();
            if self.raft.change_voters(voters) {
                ctx.note(format!("leader {}: voters {:?}: {}", self.me, decision.voters, decision.reason));
            }
        }
    }
}
