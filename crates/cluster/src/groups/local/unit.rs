//! One resource of a [`super::LocalGroup`].

use super::{BACKOFF_MS_MAX, BACKOFF_MS_MIN};
use crate::db::{Resource, ResourceState, ResourceStatus};
use crate::groups::expr::Expr;
use std::collections::{BTreeSet, VecDeque};

/// What is known of a resource on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// Nothing: its host is to be asked. `expected`: it was there when last heard of.
    Asked { expected: bool },
    /// Nothing of it is there.
    Gone,
    /// Something of it may be there; it is not online.
    Dirty,
    /// Online.
    Here,
}

/// A call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    /// `Open { adopt: true }`.
    Adopt,
    /// `Open { adopt: false }`.
    Open,
    Online,
    Offline,
    Terminate,
    Close,
}

/// A call that is under way.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) id: u64,
    pub(super) doing: Doing,
    /// Only of Online and Offline; the driver finds out about a host that hangs in others.
    pub(super) deadline_ms: Option<u64>,
    /// Progress as it is shown, and since when.
    pub(super) text: String,
    pub(super) text_ms: Option<u64>,
}

/// It failed, and this is what comes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It is started again here at that time, or later, as the `number`th time of late.
    Restart { why: String, at_ms: u64, number: usize },
    /// It is not started again here before `retry_at_ms`.
    Final { why: String, elsewhere: bool, retry_at_ms: Option<u64> },
    /// In maintenance: nothing, for now.
    Noted { why: String },
}

/// A call that failed and is repeated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backoff {
    pub(super) why: String,
    pub(super) again_at_ms: u64,
    wait_ms: u64,
}

#[derive(Debug)]
pub(super) struct Unit {
    pub(super) spec: Resource,
    pub(super) expr: Expr,
    /// Names in `expr`.
    pub(super) needs: BTreeSet<String>,
    pub(super) presence: Presence,
    /// Open in a host; `true`: one of its own.
    pub(super) open: Option<bool>,
    pub(super) call: Option<Call>,
    pub(super) trouble: Option<Trouble>,
    /// Restarts within the period (ms), oldest first; at most `restart_threshold` matter.
    pub(super) restarts: VecDeque<u64>,
    /// `Terminate` failed.
    pub(super) ending: Option<Backoff>,
    /// `Open` failed, or its host died in it, while something of it may be there.
    pub(super) opening: Option<Backoff>,
    /// It has ended a host.
    pub(super) own_host: bool,
    /// Does its host poll?
    pub(super) polls: bool,
    /// Its host has an older specification.
    pub(super) stale: bool,
    /// Not in the group any more.
    pub(super) removed: bool,
    /// Another resource of the same name: is closed first.
    pub(super) replaced: bool,
    /// Nothing was heard of it but that it is not online: a new owner's first `Terminate`.
    pub(super) initial: bool,
    /// What is started for what reason; for people.
    pub(super) because: String,
    pub(super) shown: ResourceStatus,
}

impl Unit {
    pub(super) fn new(spec: &Resource) -> Unit {
        let mut unit = Unit {
            spec: spec.clone(),
            expr: Expr::Nothing,
            needs: BTreeSet::new(),
            presence: Presence::Asked { expected: was_there(spec.status.state) },
            open: None,
            call: None,
            trouble: None,
            restarts: VecDeque::new(),
            ending: None,
            opening: None,
            own_host: false,
            polls: true,
            stale: false,
            removed: false,
            replaced: false,
            initial: true,
            because: String::new(),
            shown: spec.status.clone(),
        };
        unit.set_spec(spec);
        unit
    }

    /// Another specification. One that cannot be read (the database lets none in) depends on what nobody is.
    pub(super) fn set_spec(&mut self, spec: &Resource) {
        self.spec = spec.clone();
        self.expr = Expr::parse(&spec.depends).unwrap_or_else(|_| Expr::Resource(spec.depends.clone()));
        self.needs = self.expr.names().into_iter().map(str::to_owned).collect();
    }

    pub(super) fn is_gone(&self) -> bool {
        self.presence == Presence::Gone
    }

    /// Nothing of it is left.
    pub(super) fn set_gone(&mut self) {
        self.presence = Presence::Gone;
        self.initial = false;
        self.ending = None;
        self.opening = None;
    }

    pub(super) fn doing(&self) -> Option<Doing> {
        self.call.as_ref().map(|call| call.doing)
    }

    pub(super) fn wants_own_host(&self) -> bool {
        self.own_host || self.spec.policy.separate_monitor
    }

    /// As if it had never failed.
    pub(super) fn forgive(&mut self) {
        self.trouble = None;
        self.restarts.clear();
        self.because.clear();
    }

    /// Its host has no trace of it any more.
    pub(super) fn not_open(&mut self) {
        self.open = None;
        self.polls = true;
        self.stale = false;
    }

    /// Restarts that still count.
    pub(super) fn recent_restarts(&mut self, now_ms: u64) -> usize {
        let period_ms = self.spec.policy.restart_period_ms;
        while self.restarts.front().is_some_and(|at| at.saturating_add(period_ms) <= now_ms) {
            self.restarts.pop_front();
        }
        self.restarts.len()
    }
}

fn was_there(state: ResourceState) -> bool {
    match state {
        ResourceState::Online | ResourceState::OfflinePending => true,
        // Also OnlinePending: a host that knows nothing of it has not begun, and one that has begun can still open it.
        ResourceState::Offline
        | ResourceState::OnlinePending
        | ResourceState::Failed
        | ResourceState::Unknown => false,
    }
}

/// The next wait after one more failure.
pub(super) fn back_off(before: Option<Backoff>, why: String, now_ms: u64) -> Backoff {
    let wait_ms = before.map_or(BACKOFF_MS_MIN, |before| (before.wait_ms * 2).min(BACKOFF_MS_MAX));
    Backoff { why, again_at_ms: now_ms.saturating_add(wait_ms), wait_ms }
}

impl Backoff {
    /// Has it failed more than once? Before that it may be over before anybody has read of it.
    pub(super) fn lasts(&self) -> bool {
        self.wait_ms > BACKOFF_MS_MIN
    }
}

/// May the call be repeated?
pub(super) fn due(backoff: Option<&Backoff>, now_ms: u64) -> bool {
    backoff.is_none_or(|backoff| backoff.again_at_ms <= now_ms)
}
