//! Arbitration for the disk witness, as in MSCS: which node holds the small LUN and runs the Raft voter on it.
//!
//! ```text
//!              Challenge                 take-over read back
//!     Idle ──────────────> Challenger ────────────────────────> Defender
//!      ^                      │ holder moved, conflict, error,     │ renewal failed or late, verify failed,
//!      └──────────────────────┴─ too slow (Lost)       (StopVoter) ┴─ Yield
//! ```
//!
//! On the LUN there are the reservation, exclusive for writing, and a **slot** with a counter that the defender moves every
//! `renew_ms`.
//! * **Defender.** Its standing is good until `deadline_ms` after the *start* of its last renewal that succeeded. When that time
//!   comes, or anything fails, it stops the voter at once, before it looks at whatever woke it. It answers a request only
//!   after a verify of the reservation that was started after the request arrived.
//! * **Challenger.** Reads the slot; waits `challenge_ms`; reads it again. Only if neither counter nor holder moved it preempts and
//!   aborts the holder it saw (or reserves, if there was none), reads the reservation back, moves the counter, re-reads the
//!   voter's state from the LUN, and then starts the voter.
//!
//! Why no two answer on different states. `deadline_ms` lies between `renew_ms` and `challenge_ms`. The holder's last renewal was on
//! the LUN before the challenger's first look, so the holder has stopped by `deadline_ms` after that; the challenger preempts not
//! before `challenge_ms` after it. That is the first line, and needs clocks that run. The second needs none: a holder that was frozen,
//! or is preempted by a challenger that was, fails its next verify; and an answer that passed its verify before the preemption
//! was given on a state that the challenger reads after it. Of two challengers the second preempts a key that holds nothing any
//! more, which is a conflict. A challenger that took too long over its second look does not act on it. A node's own
//! key from before a restart is challenged like any other.
//!
//! What a crash leaves: the reservation and a counter that stands still; the next challenger takes `challenge_ms` longer, nothing else.
//! Effects carry numbers (`op`); completions of operations that are no longer waited for are passed over.

use crate::db::Settings;
use std::collections::VecDeque;

mod challenge;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

/// Requests that wait for a verify; more are denied.
pub const REQUESTS_MAX: usize = 1024;

/// Number of an operation on the LUN.
pub type Op = u64;

/// Times, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between two renewals of a defender.
    pub renew_ms: u64,
    /// A defender's standing, from the start of a renewal; between the other two.
    pub deadline_ms: u64,
    /// Between a challenger's two looks.
    pub challenge_ms: u64,
}

impl Timing {
    /// From the cluster's settings.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        let (renew_ms, challenge_ms) = (settings.witness_renew_ms, settings.witness_challenge_ms);
        Timing { renew_ms, deadline_ms: renew_ms.midpoint(challenge_ms), challenge_ms }
    }
}

/// What a look at the LUN shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Counter in the heartbeat slot.
    pub counter: u64,
    /// Key that holds the reservation.
    pub holder: Option<u64>,
}

/// What came of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Of `ReadSlot` and `ReadKeys`.
    Slot(Slot),
    /// Done: the reservation is ours (`TakeOver`, `Verify`), the counter is durable (`Renew`), the state was read (`ReadState`).
    Ok,
    /// Reservation conflict, or the reservation is not ours.
    Conflict,
    /// An I/O error or a time-out.
    Failed(String),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The voter should run, and nobody is known to run it: try to take it. No effect unless `Idle`.
    Challenge,
    /// Give it up in good order.
    Yield,
    /// A Raft request for the voter was processed and wants its answer out.
    Request { id: u64 },
    /// An operation ended.
    Done { op: Op, outcome: Outcome },
    /// Time passed; at least ten times per `renew_ms`.
    Tick,
}

/// What the driver must do. Operations go to the LUN at once and may run side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Read counter and reservation.
    ReadSlot { op: Op },
    /// Register our key; then preempt and abort `victim`, or reserve if there is none. If `victim` is our own key, only
    /// see that it holds the reservation.
    TakeOver { op: Op, victim: Option<u64> },
    /// Read the reservation (and the counter) back.
    ReadKeys { op: Op },
    /// Write the counter, forced to the medium, under our reservation, after a look that it is still ours.
    Renew { op: Op, counter: u64 },
    /// Read header, vote, log and snapshot anew.
    ReadState { op: Op },
    /// Is the reservation still ours?
    Verify { op: Op },
    /// Run the voter on the state just read.
    StartVoter,
    /// Stop the voter: no answer may go out any more.
    StopVoter { reason: String },
    /// Give the answer to this request out.
    Answer { id: u64 },
    /// Drop the answer to this request.
    Deny { id: u64 },
    /// Give the reservation back; nobody waits for it.
    Release,
    /// The challenge came to nothing, or the take-over was not completed.
    Lost { reason: String },
}

/// The role, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoleKind {
    /// Neither.
    Idle,
    /// Trying to take it.
    Challenger,
    /// Has it; the voter runs, or is about to.
    Defender,
}

#[derive(Debug)]
enum Role {
    Idle,
    Challenger(challenge::Challenge),
    Defender(Defence),
}

/// A defender's book.
#[derive(Debug)]
struct Defence {
    /// Does the voter run?
    serving: bool,
    counter: u64,
    valid_until_ms: u64,
    renew_at_ms: u64,
    /// The renewal under way: number, start.
    renewing: Option<(Op, u64)>,
    /// The reading of the state under way.
    reading: Option<Op>,
    /// The verify under way, and the requests that it answers.
    verifying: Option<(Op, Vec<u64>)>,
    /// Requests that came after it was started.
    waiting: VecDeque<u64>,
}

/// One node's arbiter.
#[derive(Debug)]
pub struct Witness {
    key: u64,
    timing: Timing,
    role: Role,
    now_ms: u64,
    next_op: Op,
}

impl Witness {
    /// Idle. `key` is this node's reservation key on the witness LUN.
    #[must_use]
    pub fn new(key: u64, timing: Timing) -> Self {
        Witness { key, timing, role: Role::Idle, now_ms: 0, next_op: 1 }
    }

    /// Takes changed settings over; for challenges and renewals that begin after this.
    pub fn set_timing(&mut self, timing: Timing) {
        self.timing = timing;
    }

    /// The role now.
    #[must_use]
    pub fn role(&self) -> RoleKind {
        match self.role {
            Role::Idle => RoleKind::Idle,
            Role::Challenger(_) => RoleKind::Challenger,
            Role::Defender(_) => RoleKind::Defender,
        }
    }

    /// Does the voter run here, as of the last step?
    #[must_use]
    pub fn serving(&self) -> bool {
        matches!(&self.role, Role::Defender(defence) if defence.serving)
    }

    /// Takes an input. `now_ms`: local monotonic clock that counts suspended time (`CLOCK_BOOTTIME`).
    pub fn step(&mut self, now_ms: u64, input: Input, effects: &mut Vec<Effect>) {
        self.now_ms = self.now_ms.max(now_ms);
        // First of all: whoever was away too long has nothing to say any more, whatever woke it.
        if let Role::Defender(defence) = &self.role
            && self.now_ms >= defence.valid_until_ms
        {
            self.stop("the reservation was not renewed in time", effects);
        }
        match input {
            Input::Challenge => self.begin_challenge(effects),
            Input::Yield => {
                let held = matches!(self.role, Role::Defender(_));
                self.stop("it was given up in good order", effects);
                if held {
                    effects.push(Effect::Release);
                }
            }
            Input::Request { id } => self.request(id, effects),
            Input::Done { op, outcome } => self.done(op, outcome, effects),
            Input::Tick => {}
        }
        self.run(effects);
    }

    fn op(&mut self) -> Op {
        let op = self.next_op;
        self.next_op += 1;
        op
    }

    /// Back to `Idle` from wherever.
    fn stop(&mut self, reason: &str, effects: &mut Vec<Effect>) {
        match std::mem::replace(&mut self.role, Role::Idle) {
            Role::Idle => {}
            Role::Challenger(_) => effects.push(Effect::Lost { reason: reason.into() }),
            Role::Defender(defence) => {
                if defence.serving {
                    effects.push(Effect::StopVoter { reason: reason.into() });
                } else {
                    effects.push(Effect::Lost { reason: reason.into() });
                }
                let verifying = defence.verifying.map(|(_, ids)| ids).unwrap_or_default();
                effects.extend(verifying.into_iter().chain(defence.waiting).map(|id| Effect::Deny { id }));
            }
        }
    }

    fn request(&mut self, id: u64, effects: &mut Vec<Effect>) {
        match &mut self.role {
            Role::Defender(defence) if defence.serving && defence.waiting.len() < REQUESTS_MAX => {
                defence.waiting.push_back(id);
            }
            Role::Defender(_) | Role::Idle | Role::Challenger(_) => effects.push(Effect::Deny { id }),
        }
    }

    fn done(&mut self, op: Op, outcome: Outcome, effects: &mut Vec<Effect>) {
        match &mut self.role {
            Role::Idle => {}
            Role::Challenger(challenge) if challenge.waits_for(op) => self.challenge_done(outcome, effects),
            Role::Challenger(_) => {}
            Role::Defender(defence) => {
                let renewal = defence.renewing.filter(|(renewing, _)| *renewing == op);
                let verify = defence.verifying.as_ref().is_some_and(|(verifying, _)| *verifying == op);
                let reading = defence.reading == Some(op);
                if renewal.is_none() && !verify && !reading {
                    return;
                }
                let failed = match outcome {
                    Outcome::Ok => None,
                    Outcome::Conflict => Some("another node has taken the reservation".to_owned()),
                    Outcome::Failed(why) => Some(format!("the witness LUN cannot be reached: {why}")),
                    Outcome::Slot(_) => Some("the driver answered another question".to_owned()),
                };
                if let Some(reason) = failed {
                    self.stop(&reason, effects);
                } else if let Some((_, started_ms)) = renewal {
                    self.renewed(started_ms, effects);
                } else if reading {
                    defence.reading = None;
                    defence.serving = true;
                    effects.push(Effect::StartVoter);
                } else if let Some((_, ids)) = defence.verifying.take() {
                    effects.extend(ids.into_iter().map(|id| Effect::Answer { id }));
                }
            }
        }
    }

    fn renewed(&mut self, started_ms: u64, effects: &mut Vec<Effect>) {
        let (op, timing) = (self.next_op, self.timing);
        let Role::Defender(defence) = &mut self.role else { return };
        defence.renewing = None;
        defence.valid_until_ms = started_ms + timing.deadline_ms;
        defence.renew_at_ms = started_ms + timing.renew_ms;
        if !defence.serving && defence.reading.is_none() {
            defence.reading = Some(op);
            self.next_op += 1;
            effects.push(Effect::ReadState { op });
        }
    }

    /// Begins what is due.
    fn run(&mut self, effects: &mut Vec<Effect>) {
        let now_ms = self.now_ms;
        match &mut self.role {
            Role::Idle => {}
            Role::Challenger(_) => self.run_challenge(effects),
            Role::Defender(defence) => {
                if defence.renewing.is_none() && now_ms >= defence.renew_at_ms {
                    let op = self.next_op;
                    self.next_op += 1;
                    defence.counter = defence.counter.wrapping_add(1);
                    defence.renewing = Some((op, now_ms));
                    effects.push(Effect::Renew { op, counter: defence.counter });
                }
                if defence.verifying.is_none() && !defence.waiting.is_empty() {
                    let op = self.next_op;
                    self.next_op += 1;
                    defence.verifying = Some((op, defence.waiting.drain(..).collect()));
                    effects.push(Effect::Verify { op });
                }
            }
        }
    }

    /// The reservation is ours: the first renewal makes it known.
    fn defend(&mut self, counter: u64) {
        self.role = Role::Defender(Defence {
            serving: false,
            counter,
            valid_until_ms: self.now_ms + self.timing.deadline_ms,
            renew_at_ms: self.now_ms,
            renewing: None,
            reading: None,
            verifying: None,
            waiting: VecDeque::new(),
        });
    }
}
