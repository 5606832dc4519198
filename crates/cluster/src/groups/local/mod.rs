//! One group on the node that owns it: brings its resources online in the order of their dependencies, restarts what fails,
//! takes everything offline when the group leaves. Pure: [`LocalGroup::step`] takes what happened and says what to do.
//!
//! A resource on this node, by what is known of it:
//!
//! ```text
//!             found online                         Offline                       Close
//!   Asked ------------------> Here <--------+  ----------------> Gone ---------------------> (not open)
//!     |    ^  its host died  / |            | Online done         | ^
//!     |    +----------------+  | it failed  |                     | |
//!     | not online             v            |       Online        | | Terminate done
//!     +---------------------> Dirty <-------+---------------------+ |
//!                               +-----------------------------------+
//! ```
//!
//! Invariants
//! * `Online` is called only when nothing of the resource is left here (Gone), its dependencies are online, and everything
//!   that needs it is down. Whatever failed, and whatever a new owner does not find online, is terminated first.
//! * At most one call of a resource is under way, besides `Terminate` behind one that was cancelled. Answers to other calls are ignored.
//! * Restarts of a resource: at most `restart_threshold` within `restart_period_ms`. Every other repetition has a growing wait.
//! * [`LocalGroup::is_quiet`] and [`LocalGroup::release_done`] are true only when every resource is known to be Gone.
//!
//! What the driver owes: every call is answered (a host that cannot be started counts as `Failed`), or the end of its host
//! is told; what a host said before it ended is not handed in after that.
//!
//! What a crash of csvd leaves behind: hosts and resources go on. The next csvd begins with a new `LocalGroup`, asks with
//! `Open { adopt: true }` what is there, and until then shows what the database has.

mod advance;
mod input;
mod plan;
mod show;
#[cfg(test)]
mod tests;
mod unit;

use crate::db::EventKind;
use crate::db::{Group, GroupState, Resource, ResourceStatus};
use std::collections::BTreeMap;
use unit::Unit;

/// First wait before a failed `Terminate` or `Open` is repeated; doubles up to [`BACKOFF_MS_MAX`].
pub const BACKOFF_MS_MIN: u64 = 1_000;
/// Longest wait before a failed `Terminate` or `Open` is repeated.
pub const BACKOFF_MS_MAX: u64 = 60_000;
/// The text of a pending resource changes at most so often, in milliseconds.
pub const PROGRESS_SHOWN_MS: u64 = 5_000;

/// The time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Now {
    /// By a clock that only goes forward, in milliseconds.
    pub now_ms: u64,
    /// By the clock on the wall (Unix ms), for statuses.
    pub at_unix_ms: u64,
}

/// The group as the database has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The group.
    pub group: Group,
    /// Its resources, by name.
    pub resources: BTreeMap<String, Resource>,
}

/// How a call went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// It did not work.
    Failed {
        /// For people.
        why: String,
        /// Another try on this node may help.
        retry: bool,
        /// Another node may help.
        elsewhere: bool,
    },
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The database's word, first or changed. Of another generation: ignored.
    Config(Box<Config>),
    /// Answer to `Open { adopt: true }`: the resource can be opened, and is online or not. (`Answer` with `Done` counts as online,
    /// as the entry point `adopt` has it; with `Failed`: it cannot be opened.)
    Found {
        /// Resource.
        resource: String,
        /// The call.
        call: u64,
        /// Is it online, and looked after from now on?
        online: bool,
        /// If not, why; may be empty.
        why: String,
    },
    /// A call is over.
    Answer {
        /// Resource.
        resource: String,
        /// The call.
        call: u64,
        /// How it went.
        outcome: Outcome,
    },
    /// A call gets on; extends its time.
    Progress {
        /// Resource.
        resource: String,
        /// The call.
        call: u64,
        /// What it does.
        text: String,
    },
    /// An online resource failed by itself.
    Failed {
        /// Resource.
        resource: String,
        /// Why.
        why: String,
    },
    /// A host ended. What its resources manage may still be there. All of them that are of this group, in one word: what is told to
    /// one of them must not be told to a host that is gone.
    HostGone {
        /// Its resources.
        resources: Vec<String>,
        /// Why.
        why: String,
        /// The host ended because of this one: counts as its failure, and it gets a host of its own from now on.
        culprit: Option<String>,
    },
    /// A resource is stuck in an entry point, and its host is or will be killed: as `HostGone` with a `culprit` (which need not be
    /// told as well), and an event.
    Hung {
        /// The one that is stuck.
        resource: String,
        /// All of the host, as in `HostGone`.
        resources: Vec<String>,
        /// In what, for how long.
        why: String,
    },
    /// Everything goes offline in good order: the database says `Releasing`, and it is no live migration (any more). A `Config` in
    /// another state cancels it.
    Release,
    /// Everything is terminated at once, and nothing starts under this generation any more.
    Stop(String),
    /// Time went by.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Open the resource, or with `adopt: false` give an open one its present specification.
    Open {
        /// Resource.
        resource: String,
        /// Number of the call.
        call: u64,
        /// Take over what is there, and say whether it is online.
        adopt: bool,
        /// In a host of its own. (No matter when it is open already.)
        own_host: bool,
    },
    /// Bring it online.
    Online {
        /// Resource.
        resource: String,
        /// Number of the call.
        call: u64,
    },
    /// Take it offline in good order.
    Offline {
        /// Resource.
        resource: String,
        /// Number of the call.
        call: u64,
    },
    /// End it. Stands behind the call that runs, if one does.
    Terminate {
        /// Resource.
        resource: String,
        /// Number of the call.
        call: u64,
    },
    /// Forget it.
    Close {
        /// Resource.
        resource: String,
        /// Number of the call.
        call: u64,
    },
    /// Nobody waits for that call any more.
    Cancel {
        /// Resource.
        resource: String,
        /// The call.
        call: u64,
    },
    /// Polls stop or go on.
    Polls {
        /// Resource.
        resource: String,
        /// Go on?
        on: bool,
    },
    /// For the cluster's log.
    Event {
        /// Kind.
        kind: EventKind,
        /// Resource that it is about.
        resource: String,
        /// What happened, and why.
        text: String,
    },
}

/// What the group is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Mode {
    /// Online.
    Run,
    /// Offline, in good order.
    Release,
    /// Gone, at once; with the reason.
    Stop(String),
}

/// One group on its owner. See the module.
#[derive(Debug)]
pub struct LocalGroup {
    generation: u64,
    now: Now,
    mode: Mode,
    group: Option<Group>,
    units: BTreeMap<String, Unit>,
    last_call: u64,
    state: GroupState,
    /// It was online since the database has failures of it: when they are forgotten, that may be why.
    said_online: bool,
}

impl LocalGroup {
    /// The group under this ownership. Nothing is known of hosts yet, nor of resources before the first `Config`.
    #[must_use]
    pub fn new(generation: u64) -> LocalGroup {
        LocalGroup {
            generation,
            now: Now::default(),
            mode: Mode::Run,
            group: None,
            units: BTreeMap::new(),
            last_call: 0,
            state: GroupState::Pending,
            said_online: false,
        }
    }

    /// Number of the ownership.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Takes in what happened and appends what to do. Effects belong in this order to the hosts.
    pub fn step(&mut self, now: Now, input: Input, out: &mut Vec<Effect>) {
        self.now = Now { now_ms: now.now_ms.max(self.now.now_ms), at_unix_ms: now.at_unix_ms };
        self.take(input, out);
        self.settle(out);
        self.refresh();
    }

    /// When (by [`Now::now_ms`]) to call with `Tick`, if nothing else happens before; always later than the last step.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        self.units.values().filter_map(|unit| self.deadline(unit)).min()
    }

    /// What should be in the database of the resources.
    #[must_use]
    pub fn statuses(&self) -> BTreeMap<String, ResourceStatus> {
        let there = self.units.iter().filter(|(_, unit)| !unit.removed);
        there.map(|(name, unit)| (name.clone(), unit.shown.clone())).collect()
    }

    /// What should be in the database of the group: `Pending`, `Online`, `Partial` or `Failed`.
    #[must_use]
    pub fn state(&self) -> GroupState {
        self.state.clone()
    }

    /// Does it look after a resource of that name? Also one that is in the group no more, until it is closed.
    #[must_use]
    pub fn has(&self, resource: &str) -> bool {
        self.units.contains_key(resource)
    }

    /// Nothing of the group runs or may run on this node. Not before the first `Config`.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.group.is_some() && self.units.values().all(Unit::is_gone)
    }

    /// After `Release`: everything is offline and closed. Not before the first `Config`.
    #[must_use]
    pub fn release_done(&self) -> bool {
        let closed = |unit: &Unit| unit.open.is_none() && unit.call.is_none();
        self.mode == Mode::Release && self.is_quiet() && self.units.values().all(closed)
    }

    fn maintenance(&self) -> bool {
        self.mode == Mode::Run && self.group.as_ref().is_some_and(|group| group.maintenance)
    }

    /// May resources be started?
    fn starts(&self) -> bool {
        self.mode == Mode::Run && self.group.as_ref().is_some_and(|group| group.want_online)
    }
}
