//! A node with resource hosts, as far as a group can tell. Checks with every effect what must never happen.

use super::super::unit::Doing;
use super::super::{Config, Effect, Input, LocalGroup, Now, Outcome};
use crate::db::{
    EventKind, Group, GroupPolicy, GroupState, MoveCause, MoveKind, Resource, ResourcePolicy, ResourceState,
};
use crate::groups::expr::Expr;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Alive {
    No,
    Partly,
    Yes,
}

/// What there really is of a resource, and what its host was asked.
#[derive(Debug)]
pub(super) struct Thing {
    pub(super) alive: Alive,
    pub(super) open: bool,
    pub(super) host: String,
    pub(super) queue: VecDeque<(u64, Doing)>,
    /// The host has said that it is online, and nothing else since.
    pub(super) told: bool,
    cancelled: BTreeSet<u64>,
    restarts: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) group: LocalGroup,
    pub(super) config: Config,
    pub(super) now_ms: u64,
    pub(super) things: BTreeMap<String, Thing>,
    /// Effects, as short words.
    pub(super) log: Vec<String>,
    pub(super) events: Vec<String>,
    /// Answered only by hand.
    pub(super) held: BTreeSet<String>,
    pub(super) mail: VecDeque<Input>,
    calls: BTreeSet<u64>,
}

/// A resource that depends on that, and is wanted.
pub(super) fn resource(name: &str, depends: &str) -> Resource {
    let policy = ResourcePolicy { pending_timeout_ms: 10_000, ..ResourcePolicy::default() };
    Resource {
        name: name.into(),
        kind: "Test".into(),
        group: "g".into(),
        depends: depends.into(),
        want_online: true,
        policy,
        ..Resource::default()
    }
}

impl World {
    /// A group with these resources; `(name, depends)`.
    pub(super) fn new(resources: &[(&str, &str)]) -> World {
        let mut group = Group::new("g", GroupPolicy::default(), 0);
        (group.want_online, group.generation, group.state) = (true, 7, GroupState::Pending);
        let resources =
            resources.iter().map(|(name, depends)| ((*name).into(), resource(name, depends))).collect();
        let mut world = World {
            group: LocalGroup::new(7),
            config: Config { group, resources },
            now_ms: 1_000,
            things: BTreeMap::new(),
            log: Vec::new(),
            events: Vec::new(),
            held: BTreeSet::new(),
            mail: VecDeque::new(),
            calls: BTreeSet::new(),
        };
        for resource in world.config.resources.values_mut() {
            resource.status.state = ResourceState::Unknown;
        }
        world
    }

    /// The same, brought online.
    pub(super) fn online(resources: &[(&str, &str)]) -> World {
        let mut world = World::new(resources);
        world.configure();
        world.obey();
        assert_eq!(world.group.state(), GroupState::Online);
        world.log.clear();
        world
    }

    pub(super) fn thing(&mut self, name: &str) -> &mut Thing {
        self.things.entry(name.into()).or_insert_with(|| Thing {
            alive: Alive::No,
            open: false,
            host: "shared".into(),
            queue: VecDeque::new(),
            told: false,
            cancelled: BTreeSet::new(),
            restarts: Vec::new(),
        })
    }

    pub(super) fn resource(&mut self, name: &str) -> &mut Resource {
        self.config.resources.get_mut(name).unwrap()
    }

    /// Hands in the configuration as it is now.
    pub(super) fn configure(&mut self) {
        self.feed(Input::Config(Box::new(self.config.clone())));
    }

    /// An administrator takes away whatever bars restarts.
    pub(super) fn forgive(&mut self) {
        self.config.group.given_up = Some("it failed too often".into());
        self.configure();
        self.config.group.given_up = None;
        self.things.values_mut().for_each(|thing| thing.restarts.clear());
        self.configure();
    }

    pub(super) fn release(&mut self) {
        let (how, cause) = (MoveKind::Live, MoveCause::Order);
        self.config.group.state = GroupState::Releasing { to: None, how, reason: "test".into(), cause };
        self.configure();
        self.feed(Input::Release);
    }

    pub(super) fn feed(&mut self, input: Input) {
        let mut out = Vec::new();
        let now = Now { now_ms: self.now_ms, at_unix_ms: 1_000_000 + self.now_ms };
        self.group.step(now, input, &mut out);
        assert!(out.len() <= 8 + 8 * self.things.len().max(self.config.resources.len()), "{out:?}");
        for effect in out {
            self.carry(effect);
        }
        assert!(self.group.next_deadline().is_none_or(|at_ms| at_ms > self.now_ms));
        if self.group.is_quiet() {
            let left = self.things.iter().find(|(_, thing)| thing.alive != Alive::No);
            assert!(left.is_none(), "quiet, but {left:?} is there: {:?}", self.log);
        }
        if self.group.release_done() {
            assert!(self.things.values().all(|thing| !thing.open && thing.queue.is_empty()));
        }
    }

    fn carry(&mut self, effect: Effect) {
        let (resource, call, doing, word) = match effect {
            Effect::Open { resource, call, adopt, own_host } => {
                let thing = self.thing(&resource);
                if !thing.open {
                    thing.host = if own_host { resource.clone() } else { "shared".into() };
                }
                let (doing, word) = if adopt { (Doing::Adopt, "adopt") } else { (Doing::Open, "open") };
                (resource, call, doing, word)
            }
            Effect::Online { resource, call } => (resource, call, Doing::Online, "online"),
            Effect::Offline { resource, call } => (resource, call, Doing::Offline, "offline"),
            Effect::Terminate { resource, call } => (resource, call, Doing::Terminate, "terminate"),
            Effect::Close { resource, call } => (resource, call, Doing::Close, "close"),
            Effect::Cancel { resource, call } => {
                self.log.push(format!("cancel {resource}"));
                self.thing(&resource).cancelled.insert(call);
                return;
            }
            Effect::Polls { resource, on } => {
                self.log.push(format!("polls {resource} {}", if on { "on" } else { "off" }));
                return;
            }
            Effect::Event { kind, resource, text } => {
                self.events.push(text);
                if kind == EventKind::ResourceRestarted {
                    self.check_restart(&resource);
                }
                return;
            }
        };
        self.log.push(format!("{word} {resource}"));
        assert!(self.calls.insert(call), "call {call} stands twice");
        self.check_call(&resource, doing);
        let thing = self.thing(&resource);
        if matches!(doing, Doing::Offline | Doing::Terminate | Doing::Adopt) {
            thing.told = false;
        }
        thing.queue.push_back((call, doing));
    }

    fn check_restart(&mut self, name: &str) {
        let now_ms = self.now_ms;
        let Some(policy) = self.config.resources.get(name).map(|resource| resource.policy.clone()) else {
            return;
        };
        let restarts = &mut self.thing(name).restarts;
        restarts.push(now_ms);
        let recent = restarts.iter().filter(|at| **at + policy.restart_period_ms > now_ms).count();
        assert!(recent <= policy.restart_threshold as usize, "{name}: {recent} restarts");
    }

    fn check_call(&mut self, name: &str, doing: Doing) {
        let told = |on: &str| self.things.get(on).is_some_and(|thing| thing.told);
        let depends = |resource: &Resource| Expr::parse(&resource.depends).unwrap();
        let thing = &self.things[name];
        let free = match doing {
            // Behind what was cancelled.
            Doing::Terminate => thing.queue.iter().all(|(call, _)| thing.cancelled.contains(call)),
            Doing::Adopt | Doing::Open | Doing::Online | Doing::Offline | Doing::Close => {
                thing.queue.is_empty()
            }
        };
        assert!(free, "{doing:?} {name} while {:?}: {:?}", thing.queue, self.log);
        if !matches!(doing, Doing::Adopt | Doing::Open) {
            assert!(thing.open, "{doing:?} {name}, which is not open: {:?}", self.log);
        }
        if matches!(doing, Doing::Online | Doing::Close) {
            assert_eq!(thing.alive, Alive::No, "{doing:?} {name}: {:?}", self.log);
        }
        if doing == Doing::Online {
            let expr = depends(&self.config.resources[name]);
            assert!(expr.holds(&told), "{name} is started before {expr}: {:?}", self.log);
        }
        // In maintenance what has failed is left alone, and what stands on it too.
        if doing == Doing::Offline && !self.config.group.maintenance {
            let without = |on: &str| on != name && told(on);
            let cut = self.config.resources.values().find(|other| {
                told(&other.name) && depends(other).names().contains(name) && !depends(other).holds(&without)
            });
            assert!(cut.is_none(), "{name} goes offline under {cut:?}: {:?}", self.log);
        }
    }

    /// The host carries out the first call that it has of the resource; the answer is in the mail.
    pub(super) fn execute(&mut self, name: &str, good: bool, retry: bool) {
        let Some(thing) = self.things.get_mut(name) else { return };
        let Some((call, doing)) = thing.queue.pop_front() else { return };
        let resource = name.to_owned();
        let failed = |why: &str| Outcome::Failed { why: why.into(), retry, elsewhere: true };
        let mut outcome = if good { Outcome::Done } else { failed(&format!("{doing:?} failed")) };
        match doing {
            Doing::Adopt if good => {
                thing.open = true;
                thing.told = thing.alive == Alive::Yes;
                let (online, why) = (thing.told, "it is gone".into());
                self.mail.push_back(Input::Found { resource, call, online, why });
                return;
            }
            Doing::Open => thing.open |= good,
            Doing::Online => thing.alive = if good { Alive::Yes } else { Alive::Partly },
            Doing::Offline if good => thing.alive = Alive::No,
            Doing::Offline => thing.alive = Alive::Partly,
            Doing::Terminate if good => thing.alive = Alive::No,
            Doing::Close => {
                thing.open = false;
                outcome = Outcome::Done;
            }
            Doing::Adopt | Doing::Terminate => {}
        }
        // A cancelled call's word counts for nothing.
        thing.told |= doing == Doing::Online && good && !thing.cancelled.contains(&call);
        self.mail.push_back(Input::Answer { resource, call, outcome });
    }

    pub(super) fn deliver(&mut self) -> bool {
        let Some(input) = self.mail.pop_front() else { return false };
        self.feed(input);
        true
    }

    /// Answers the call that the resource has, and hands it in.
    pub(super) fn done(&mut self, name: &str) {
        self.execute(name, true, true);
        while self.deliver() {}
    }

    pub(super) fn fails(&mut self, name: &str) {
        self.execute(name, false, true);
        while self.deliver() {}
    }

    /// It fails by itself.
    pub(super) fn breaks(&mut self, name: &str, left: Alive) {
        let thing = self.thing(name);
        (thing.alive, thing.told) = (left, false);
        self.feed(Input::Failed { resource: name.into(), why: "it broke".into() });
    }

    /// Its host ends.
    pub(super) fn host_ends(&mut self, host: &str, culprit: Option<&str>, hung: bool) {
        let mut of_host = Vec::new();
        for (name, thing) in self.things.iter_mut().filter(|(_, thing)| thing.host == host) {
            if !thing.open && thing.queue.is_empty() {
                continue;
            }
            if thing.queue.front().is_some_and(|(_, doing)| *doing == Doing::Online) {
                thing.alive = Alive::Partly;
            }
            thing.queue.clear();
            (thing.open, thing.told) = (false, false);
            of_host.push(name.clone());
        }
        let lost = |input: &Input| match input {
            Input::Answer { resource, .. }
            | Input::Found { resource, .. }
            | Input::Progress { resource, .. }
            | Input::Failed { resource, .. } => of_host.contains(resource),
            Input::Config(_)
            | Input::HostGone { .. }
            | Input::Hung { .. }
            | Input::Release
            | Input::Stop(_)
            | Input::Tick => false,
        };
        self.mail.retain(|input| !lost(input));
        let why = "the host ended".to_owned();
        match culprit.filter(|culprit| of_host.iter().any(|name| name == culprit)) {
            Some(culprit) if hung => {
                self.feed(Input::Hung { resource: culprit.into(), resources: of_host, why });
            }
            culprit => {
                let culprit = culprit.map(str::to_owned);
                self.feed(Input::HostGone { resources: of_host, why, culprit });
            }
        }
    }

    /// Obedient hosts, at this moment.
    pub(super) fn obey(&mut self) {
        for _ in 0..1_000 {
            let mut busy = self.deliver();
            let names: Vec<String> = self.things.keys().cloned().collect();
            for name in names.iter().filter(|name| !self.held.contains(*name)).cloned().collect::<Vec<_>>() {
                busy |= !self.things[&name].queue.is_empty();
                self.execute(&name, true, true);
            }
            if !busy {
                return;
            }
        }
        panic!("it does not end: {:?}", &self.log[self.log.len() - 20..]);
    }

    /// Time goes by with obedient hosts.
    pub(super) fn pass(&mut self, ms: u64) {
        let end_ms = self.now_ms + ms;
        self.obey();
        while let Some(at_ms) = self.group.next_deadline().filter(|at_ms| *at_ms <= end_ms) {
            self.now_ms = at_ms;
            self.feed(Input::Tick);
            self.obey();
        }
        self.now_ms = end_ms;
        self.feed(Input::Tick);
        self.obey();
    }

    /// What was done since the last time, in one line.
    pub(super) fn did(&mut self) -> String {
        std::mem::take(&mut self.log).join(", ")
    }

    pub(super) fn shown(&self, name: &str) -> (ResourceState, String) {
        let status = &self.group.statuses()[name];
        (status.state, status.why.clone())
    }
}
