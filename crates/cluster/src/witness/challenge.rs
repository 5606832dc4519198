//! The challenger's way to the reservation.

use super::{Effect, Op, Outcome, Role, Slot, Witness};

/// A challenge under way.
#[derive(Debug)]
pub(super) struct Challenge {
    phase: Phase,
    /// The operation under way, and when it is given up.
    op: Option<(Op, u64)>,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    /// First look.
    Looking,
    /// The holder has until then to move.
    Waiting { seen: Slot, until_ms: u64 },
    /// Second look, and when it was begun.
    LookingAgain { seen: Slot, begun_ms: u64 },
    /// Preempting.
    Taking,
    /// Reading back.
    ReadingBack,
}

impl Challenge {
    pub(super) fn waits_for(&self, op: Op) -> bool {
        self.op.is_some_and(|(waiting, _)| waiting == op)
    }
}

impl Witness {
    pub(super) fn begin_challenge(&mut self, effects: &mut Vec<Effect>) {
        if matches!(self.role, Role::Idle) {
            self.enter(Phase::Looking, |op| Effect::ReadSlot { op }, effects);
        }
    }

    /// Goes on to a phase that waits for an operation.
    fn enter(&mut self, phase: Phase, effect: impl FnOnce(Op) -> Effect, effects: &mut Vec<Effect>) {
        let op = self.op();
        let give_up_ms = self.now_ms + self.timing.challenge_ms;
        self.role = Role::Challenger(Challenge { phase, op: Some((op, give_up_ms)) });
        effects.push(effect(op));
    }

    pub(super) fn run_challenge(&mut self, effects: &mut Vec<Effect>) {
        let Role::Challenger(challenge) = &self.role else { return };
        if challenge.op.is_some_and(|(_, give_up_ms)| self.now_ms >= give_up_ms) {
            self.stop("the witness LUN does not answer", effects);
            return;
        }
        if let Phase::Waiting { seen, until_ms } = challenge.phase
            && self.now_ms >= until_ms
        {
            let begun_ms = self.now_ms;
            self.enter(Phase::LookingAgain { seen, begun_ms }, |op| Effect::ReadSlot { op }, effects);
        }
    }

    /// The operation that the challenge waits for has ended.
    pub(super) fn challenge_done(&mut self, outcome: Outcome, effects: &mut Vec<Effect>) {
        let Role::Challenger(Challenge { phase, .. }) = self.role else { return };
        match (phase, outcome) {
            (_, Outcome::Failed(why)) => {
                self.stop(&format!("the witness LUN cannot be reached: {why}"), effects);
            }
            (Phase::Looking, Outcome::Slot(seen)) => {
                let until_ms = self.now_ms + self.timing.challenge_ms;
                self.role =
                    Role::Challenger(Challenge { phase: Phase::Waiting { seen, until_ms }, op: None });
            }
            (Phase::LookingAgain { seen, .. }, Outcome::Slot(now)) if seen != now => {
                self.stop("another node holds it and is alive", effects);
            }
            (Phase::LookingAgain { begun_ms, .. }, Outcome::Slot(_))
                if self.now_ms - begun_ms
                    > self.timing.challenge_ms.saturating_sub(self.timing.deadline_ms) =>
            {
                // Somebody else may have taken it meanwhile.
                self.stop("the last look at the holder is too long ago", effects);
            }
            (Phase::LookingAgain { seen, .. }, Outcome::Slot(_)) => {
                let victim = seen.holder;
                self.enter(Phase::Taking, |op| Effect::TakeOver { op, victim }, effects);
            }
            (Phase::Taking, Outcome::Conflict) => {
                self.stop("another node was faster", effects);
            }
            (Phase::Taking, Outcome::Ok) => {
                self.enter(Phase::ReadingBack, |op| Effect::ReadKeys { op }, effects);
            }
            (Phase::ReadingBack, Outcome::Slot(now)) if now.holder == Some(self.key) => {
                self.defend(now.counter);
            }
            (Phase::ReadingBack, Outcome::Slot(_)) => {
                self.stop("the reservation is another node's after all", effects);
            }
            (
                Phase::Looking
                | Phase::Waiting { .. }
                | Phase::LookingAgain { .. }
                | Phase::Taking
                | Phase::ReadingBack,
                Outcome::Ok | Outcome::Conflict | Outcome::Slot(_),
            ) => self.stop("the driver answered another question", effects),
        }
    }
}
