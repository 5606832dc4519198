//! What follows from how everything is: which resources stay, which have to go, and what the next step of each is.

use super::unit::{Call, Doing, Presence, Trouble, Unit, due};
use super::{LocalGroup, Mode};
use std::collections::BTreeSet;

/// Resources that stay online (or that are left alone).
pub(super) type Kept = BTreeSet<String>;

/// The next step of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Todo {
    Wait,
    Call(Doing),
    /// Cancel the call that runs, and terminate.
    Abort,
    /// The call that runs has had its time.
    TimeOut,
    /// The wait after a failure is over; `fresh`: its failures are forgotten.
    Again {
        fresh: bool,
    },
    Polls(bool),
    /// Closed, and not the group's any more.
    Drop,
    /// Closed; what comes now is another resource of that name.
    Replaced,
}

impl LocalGroup {
    /// Should the resource be online, as far as it alone is concerned?
    pub(super) fn wanted(&self, unit: &Unit) -> bool {
        self.mode == Mode::Run && unit.spec.want_online && !unit.removed && !unit.replaced
    }

    /// Nothing but a note speaks against it.
    fn fit(&self, unit: &Unit) -> bool {
        self.wanted(unit) && matches!(unit.trouble, None | Some(Trouble::Noted { .. }))
    }

    /// Resources that are there, are to be, and have what they depend on. What nobody has looked at yet is taken to be there; what
    /// failed during maintenance too.
    pub(super) fn kept(&self) -> Kept {
        let stays = |unit: &Unit| {
            let noted = matches!(unit.trouble, Some(Trouble::Noted { .. }));
            let there = match unit.presence {
                Presence::Asked { .. } => true,
                Presence::Here => !matches!(unit.doing(), Some(Doing::Offline | Doing::Terminate)),
                Presence::Dirty => noted,
                Presence::Gone => false,
            };
            there && self.fit(unit)
        };
        let mut kept: Kept =
            self.units.iter().filter(|(_, unit)| stays(unit)).map(|(name, _)| name.clone()).collect();
        loop {
            let falls = |name: &&String| {
                self.units.get(*name).is_some_and(|unit| !unit.expr.holds(&|on: &str| kept.contains(on)))
            };
            let fallen: Vec<String> = kept.iter().filter(falls).cloned().collect();
            if fallen.is_empty() {
                return kept;
            }
            for name in &fallen {
                kept.remove(name);
            }
        }
    }

    /// Is it on its way up, and may go on?
    fn rises(&self, unit: &Unit, kept: &Kept) -> bool {
        unit.doing() == Some(Doing::Online)
            && unit.trouble.is_none()
            && self.wanted(unit)
            && unit.expr.holds(&|on: &str| kept.contains(on))
    }

    /// Resources that need this one, are not gone, and have to go.
    pub(super) fn leaving<'a>(&'a self, name: &'a str, kept: &'a Kept) -> impl Iterator<Item = &'a Unit> {
        self.units.iter().filter_map(move |(other, unit)| {
            let needs = !unit.is_gone() && unit.needs.contains(name);
            (needs && !kept.contains(other) && !self.rises(unit, kept)).then_some(unit)
        })
    }

    /// Does one that stays, or comes up, have nothing but this one to stand on, until it is known whether its alternatives are there?
    fn stands_on(&self, name: &str, kept: &Kept) -> bool {
        let known = |on: &str| {
            let asked = |unit: &Unit| matches!(unit.presence, Presence::Asked { .. });
            on != name && kept.contains(on) && !self.units.get(on).is_some_and(asked)
        };
        // One whose start is under way may be online already, and its host's word on the way.
        let stands = |other: &str, unit: &Unit| kept.contains(other) || self.rises(unit, kept);
        let mut others = self.units.iter().filter(|(other, unit)| stands(other, unit));
        others.any(|(_, other)| other.needs.contains(name) && !other.expr.holds(&known))
    }

    /// Is it online for certain, and stays so?
    pub(super) fn firm(&self, name: &str, kept: &Kept) -> bool {
        kept.contains(name)
            && self.units.get(name).is_some_and(|unit| {
                unit.presence == Presence::Here && !matches!(unit.trouble, Some(Trouble::Noted { .. }))
            })
    }

    /// The next step of this resource.
    pub(super) fn todo(&self, name: &str, unit: &Unit, kept: &Kept) -> Todo {
        if let Some(call) = &unit.call {
            return self.todo_under_way(unit, call, kept);
        }
        if unit.open.is_some() && unit.polls == self.maintenance() && self.mode == Mode::Run {
            return Todo::Polls(!unit.polls);
        }
        match unit.presence {
            // Whatever is there has to go. Nobody asks first: without a lease a host takes nothing over, and ends it all the same.
            Presence::Asked { .. } if matches!(self.mode, Mode::Stop(_)) => self.todo_dirty(name, unit, kept),
            Presence::Asked { .. } => self.todo_if_due(unit.opening.as_ref(), Doing::Adopt),
            Presence::Dirty => self.todo_dirty(name, unit, kept),
            Presence::Here => self.todo_here(name, unit, kept),
            Presence::Gone => self.todo_gone(name, unit, kept),
        }
    }

    fn todo_if_due(&self, backoff: Option<&super::unit::Backoff>, doing: Doing) -> Todo {
        if due(backoff, self.now.now_ms) { Todo::Call(doing) } else { Todo::Wait }
    }

    fn todo_under_way(&self, unit: &Unit, call: &Call, kept: &Kept) -> Todo {
        let late = call.deadline_ms.is_some_and(|deadline_ms| deadline_ms <= self.now.now_ms);
        let stopped = matches!(self.mode, Mode::Stop(_));
        match call.doing {
            Doing::Online if !self.rises(unit, kept) => Todo::Abort,
            Doing::Online if late && !self.maintenance() => Todo::TimeOut,
            Doing::Offline if stopped => Todo::Abort,
            Doing::Offline if late => Todo::TimeOut,
            Doing::Adopt | Doing::Open | Doing::Online | Doing::Offline | Doing::Terminate | Doing::Close => {
                Todo::Wait
            }
        }
    }

    fn todo_dirty(&self, name: &str, unit: &Unit, kept: &Kept) -> Todo {
        if kept.contains(name) || !due(unit.ending.as_ref(), self.now.now_ms) {
            return Todo::Wait;
        }
        // What cannot be ended although it was tried may need that this one, which has failed, is out of its way.
        let stopped = matches!(self.mode, Mode::Stop(_));
        let blocked = self.leaving(name, kept).any(|other| other.ending.is_none() && other.opening.is_none());
        if blocked && !stopped {
            Todo::Wait
        } else if unit.open.is_none() {
            let doing = if stopped { Doing::Open } else { Doing::Adopt };
            self.todo_if_due(unit.opening.as_ref(), doing)
        } else {
            Todo::Call(Doing::Terminate)
        }
    }

    fn todo_here(&self, name: &str, unit: &Unit, kept: &Kept) -> Todo {
        if kept.contains(name) {
            if unit.stale { Todo::Call(Doing::Open) } else { Todo::Wait }
        } else if matches!(self.mode, Mode::Stop(_)) {
            Todo::Call(Doing::Terminate)
        } else if self.leaving(name, kept).next().is_some() || self.stands_on(name, kept) {
            Todo::Wait
        } else {
            Todo::Call(Doing::Offline)
        }
    }

    fn todo_gone(&self, name: &str, unit: &Unit, kept: &Kept) -> Todo {
        if self.mode != Mode::Run || unit.removed || unit.replaced {
            return match unit.open {
                Some(_) => Todo::Call(Doing::Close),
                None if unit.removed => Todo::Drop,
                None if unit.replaced => Todo::Replaced,
                None => Todo::Wait,
            };
        }
        if !self.starts() || !self.wanted(unit) || self.leaving(name, kept).next().is_some() {
            return Todo::Wait;
        }
        let now_ms = self.now.now_ms;
        match &unit.trouble {
            Some(Trouble::Restart { at_ms, .. }) if *at_ms <= now_ms && !self.maintenance() => {
                Todo::Again { fresh: false }
            }
            Some(Trouble::Final { retry_at_ms: Some(at_ms), .. })
                if *at_ms <= now_ms && !self.maintenance() =>
            {
                Todo::Again { fresh: true }
            }
            Some(_) => Todo::Wait,
            None if !unit.expr.holds(&|on: &str| self.firm(on, kept)) => Todo::Wait,
            None => match unit.open {
                Some(own_host) if own_host != unit.wants_own_host() => Todo::Call(Doing::Close),
                Some(_) if !unit.stale => Todo::Call(Doing::Online),
                Some(_) | None => Todo::Call(Doing::Open),
            },
        }
    }

    /// When the resource's next step is due, if that is later than now. What was due by now and was not done waits for
    /// something else.
    pub(super) fn deadline(&self, unit: &Unit) -> Option<u64> {
        let call = unit.call.as_ref().filter(|call| call.doing != Doing::Online || !self.maintenance());
        let trouble = match &unit.trouble {
            Some(Trouble::Restart { at_ms, .. }) => Some(*at_ms),
            Some(Trouble::Final { retry_at_ms, .. }) => *retry_at_ms,
            Some(Trouble::Noted { .. }) | None => None,
        };
        let trouble = trouble.filter(|_| self.starts() && self.wanted(unit) && !self.maintenance());
        let again = [&unit.ending, &unit.opening].map(|backoff| {
            let open = !unit.is_gone() && unit.call.is_none();
            backoff.as_ref().filter(|_| open).map(|backoff| backoff.again_at_ms)
        });
        let all = [call.and_then(|call| call.deadline_ms), trouble, again[0], again[1]];
        all.into_iter().flatten().filter(|at_ms| *at_ms > self.now.now_ms).min()
    }
}
