//! The driver: one thread that has everything of the groups of this node in its hands.

use super::hosts::Hosts;
use super::incoming::Incoming;
use super::leftovers::Leftovers;
use super::spec::{node_info, resources_of, spec_of};
use super::{Asker, Doing, Local, News, Told, What, checkpoints};
use crate::engine::{Engine, unix_ms};
use csv_cluster::db::{EventKind, Group};
use csv_cluster::groups::local::{Config, Effect, Input, LocalGroup, Now, Outcome};
use csv_resource::api::NodeInfo;
use csv_resource::client::HostEvent;
use csv_resource::protocol::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Between two extensions of the lease.
const LEASE_EVERY: Duration = Duration::from_millis(500);
/// Messages that are taken before it is looked at the rest again.
const NEWS_AT_ONCE: usize = 256;
/// Between two tries to catch up.
const CATCH_UP_EVERY: Duration = Duration::from_secs(1);

/// A group that this node owns, or did.
#[derive(Debug)]
pub(super) struct Driven {
    pub(super) local: LocalGroup,
    /// What it was given last.
    pub(super) config: Option<Config>,
    /// It is ended here, whatever happens.
    pub(super) stopped: bool,
    /// When the order to give it away was given (Unix ms), once what it takes has begun.
    pub(super) leaving: Option<u64>,
}

/// How this node stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    /// Not known yet: nothing is begun and nothing ended.
    Starting,
    /// In, by the database as it is here.
    In,
    /// It must have nothing online; with the reason.
    Out(String),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) engine: Arc<Engine>,
    heard: Receiver<News>,
    changes: watch::Receiver<u64>,
    pub(super) hosts: Hosts,
    pub(super) node: NodeInfo,
    pub(super) driven: BTreeMap<String, Driven>,
    pub(super) incoming: BTreeMap<String, Incoming>,
    pub(super) leftovers: Leftovers,
    /// For groups, in order; fed one after the other.
    pending: VecDeque<(Local, Input)>,
    /// Going online that waits for files to be put in place.
    restoring: Vec<(Local, String)>,
    standing: Standing,
    /// The database here has all that was decided before this node was back in contact.
    caught_up: bool,
    catching_up: Option<Instant>,
    /// Everything is looked at again.
    stale: bool,
    /// csvd stops: nothing is started any more.
    finishing: bool,
    leased: Option<Instant>,
    /// Moves of running groups that failed lately.
    pub(super) moves_failed: BTreeMap<String, Instant>,
}

impl Driver {
    pub(super) fn new(engine: Arc<Engine>, heard: Receiver<News>) -> Driver {
        let program = std::env::current_exe().unwrap_or_default().with_file_name("csv-rhs");
        let hosts = Hosts::new(program, engine.config.run_dir.clone(), engine.groups.news.clone());
        Driver {
            changes: engine.db.changes(),
            node: node_info(&engine),
            hosts,
            heard,
            driven: BTreeMap::new(),
            incoming: BTreeMap::new(),
            leftovers: Leftovers::default(),
            pending: VecDeque::new(),
            restoring: Vec::new(),
            standing: Standing::Starting,
            caught_up: false,
            catching_up: None,
            stale: true,
            finishing: false,
            leased: None,
            moves_failed: BTreeMap::new(),
            engine,
        }
    }

    /// Until the engine ends. Hosts outlive it.
    pub(super) fn run(mut self) {
        for wrong in self.hosts.adopt_all(&self.node) {
            self.event("", EventKind::ResourceHostEnded, wrong);
        }
        while !self.engine.is_stopping() {
            match self.heard.recv_timeout(self.wait()) {
                Ok(news) => self.take(news),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            for _ in 0..NEWS_AT_ONCE {
                let Ok(news) = self.heard.try_recv() else { break };
                self.take(news);
            }
            self.look();
        }
    }

    fn now() -> Now {
        Now { now_ms: crate::engine::boot_ms(), at_unix_ms: unix_ms() }
    }

    fn wait(&self) -> Duration {
        let now_ms = Self::now().now_ms;
        let deadlines = self.driven.values().filter_map(|driven| driven.local.next_deadline());
        let next_ms = deadlines.min().map(|at| at.saturating_sub(now_ms).max(1));
        let lease = LEASE_EVERY.saturating_sub(self.leased.map_or(LEASE_EVERY, |at| at.elapsed()));
        next_ms.map_or(lease, |ms| lease.min(Duration::from_millis(ms)))
    }

    fn look(&mut self) {
        let standing = self.see_standing();
        if self.changes.has_changed().unwrap_or(false) || standing != self.standing {
            self.changes.mark_unchanged();
            self.stale = true;
        }
        if self.leased.is_none_or(|at| at.elapsed() >= LEASE_EVERY) || standing != self.standing {
            self.extend_leases(&standing);
        }
        self.standing = standing;
        self.feed_pending();
        if self.stale {
            self.stale = false;
            self.reconcile();
        }
        self.tick();
        self.hosts.cancel_abandoned();
        self.drop_ended();
        self.end_leftovers();
        self.feed_pending();
        self.publish();
    }

    fn see_standing(&self) -> Standing {
        if self.engine.is_starting() {
            return Standing::Starting;
        }
        if let Some(why) = self.engine.cut_off() {
            return Standing::Out(why);
        }
        if self.engine.is_up() {
            Standing::In
        } else {
            Standing::Out("the cluster has given this node up".into())
        }
    }

    /// Until the moment at which this node stops if it hears nothing more.
    pub(super) fn lease_ms(&self) -> u64 {
        let limit_ms = u64::try_from(self.engine.contact_limit().as_millis()).unwrap_or(0);
        let last = self.engine.last_contact();
        last.map_or(0, |at_ms| (at_ms + limit_ms).saturating_sub(self.engine.now_ms()))
    }

    fn extend_leases(&mut self, standing: &Standing) {
        self.leased = Some(Instant::now());
        match standing {
            Standing::In => self.hosts.lease(self.lease_ms()),
            Standing::Starting | Standing::Out(_) => self.hosts.ping(),
        }
        for id in self.hosts.silent() {
            self.lose(id, "it does not answer");
        }
    }

    fn take(&mut self, news: News) {
        match news {
            News::Wake => {}
            News::Host { id, event } if self.hosts.knows(id) => match event {
                HostEvent::Said(said) => self.hear(id, said),
                HostEvent::Gone { why } => self.lose(id, &why),
            },
            News::Host { .. } => {}
            News::HostUp { id, result } => self.hosts.came_up(id, result),
            News::Ask { what, reply } => self.ask(what, reply),
            News::Expect { group, generation, paused, reply } => {
                self.expect(group, generation, paused, reply);
            }
            News::Unexpect { group, generation } => self.unexpect(&group, generation),
            News::CaughtUp(done) => {
                self.caught_up = done && self.standing == Standing::In;
                self.stale = true;
            }
            News::Restored { group, generation, call, result } => {
                self.restored(&Local { group, generation, call }, result);
            }
            News::Saved { group, generation, input } => {
                self.pending.push_back((Local { group, generation, call: 0 }, *input));
            }
            News::MoveEnded { group, generation, failed } => self.move_ended(&group, generation, failed),
            News::Finish => {
                self.finishing = true;
                self.stale = true;
            }
            News::Stop(why) => self.stop_all(&why),
        }
        self.answer_failed();
    }

    fn ask(&mut self, what: What, reply: super::Reply) {
        if self.standing != Standing::In {
            let _gone = reply.send(Err("this node is not in the cluster at the moment".to_owned()));
            return;
        }
        match what {
            What::Open { spec, own_host } => {
                let lease_ms = self.lease_ms();
                self.hosts.open(*spec, false, own_host, lease_ms, &self.node, Asker::Outside(reply));
            }
            What::Call { resource, entry } => self.hosts.call(&resource, entry, Asker::Outside(reply)),
        }
    }

    /// Takes what the database says over.
    fn reconcile(&mut self) {
        match self.standing.clone() {
            Standing::Starting => {}
            Standing::Out(why) => {
                self.caught_up = false;
                self.incoming.clear();
                self.stop_all(&why);
            }
            Standing::In if !self.caught_up => self.catch_up(),
            Standing::In => self.follow_database(),
        }
    }

    fn catch_up(&mut self) {
        self.stale = true;
        if self.catching_up.is_some_and(|at| at.elapsed() < CATCH_UP_EVERY) {
            return;
        }
        self.catching_up = Some(Instant::now());
        let engine = self.engine.clone();
        self.engine.runtime.spawn(async move {
            let done = engine.catch_up().await;
            let _full = engine.groups.news.try_send(News::CaughtUp(done));
        });
    }

    pub(super) fn stop_all(&mut self, why: &str) {
        let names: Vec<String> = self.driven.keys().cloned().collect();
        for name in names {
            self.stop(&name, why);
        }
    }

    fn stop(&mut self, name: &str, why: &str) {
        let Some(driven) = self.driven.get_mut(name).filter(|driven| !driven.stopped) else { return };
        driven.stopped = true;
        self.feed(name, Input::Stop(why.to_owned()));
    }

    fn follow_database(&mut self) {
        let mine = self.mine();
        let gone: Vec<String> = self
            .driven
            .iter()
            .filter(|(name, driven)| {
                mine.get(*name).is_none_or(|of| of.group.generation != driven.local.generation())
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.stop(&name, "this node does not have the group any more");
        }
        self.check_incoming();
        self.find_incoming();
        if self.finishing {
            let names: Vec<String> = self.driven.keys().cloned().collect();
            names.iter().for_each(|name| self.feed(name, Input::Release));
            return;
        }
        for (name, config) in mine {
            let generation = config.group.generation;
            let driven = self.driven.entry(name.clone()).or_insert_with(|| Driven {
                local: LocalGroup::new(generation),
                config: None,
                stopped: false,
                leaving: None,
            });
            // One of an earlier ownership first ends.
            if driven.stopped || driven.local.generation() != generation {
                continue;
            }
            if driven.config.as_ref() != Some(&config) {
                driven.config = Some(config.clone());
                self.feed(&name, Input::Config(Box::new(config)));
            }
            self.give_away(&name);
        }
    }

    /// Groups that this node owns, by the database.
    fn mine(&self) -> BTreeMap<String, Config> {
        let (me, incarnation) = (self.engine.me(), self.engine.incarnation.get());
        let db = self.engine.db.read();
        let own = |group: &&Group| {
            group.owner == Some(me) && group.incarnation == incarnation && group.state.owned()
        };
        let config =
            |group: &Group| Config { group: group.clone(), resources: resources_of(&db, &group.name) };
        db.groups.values().filter(own).map(|group| (group.name.clone(), config(group))).collect()
    }

    fn tick(&mut self) {
        let now_ms = Self::now().now_ms;
        let due = |driven: &Driven| driven.local.next_deadline().is_some_and(|at_ms| at_ms <= now_ms);
        let names: Vec<String> =
            self.driven.iter().filter(|(_, driven)| due(driven)).map(|(name, _)| name.clone()).collect();
        for name in names {
            self.feed(&name, Input::Tick);
        }
        if self.waits_to_move() {
            self.stale = true;
        }
    }

    /// Groups that have nothing here any more, as it should be.
    fn drop_ended(&mut self) {
        let finishing = self.finishing;
        let ended = |driven: &Driven| {
            let asked = driven.stopped && driven.local.is_quiet();
            // One that was stopped before it was told of its resources has begun nothing.
            asked || (driven.stopped && driven.config.is_none()) || (finishing && driven.local.release_done())
        };
        let before = self.driven.len();
        self.driven.retain(|_, driven| !ended(driven));
        self.stale |= before != self.driven.len();
    }

    /// Hands something in to a group, and carries out what it wants.
    pub(super) fn feed(&mut self, name: &str, input: Input) {
        let Some(driven) = self.driven.get_mut(name) else { return };
        let mut effects = Vec::new();
        driven.local.step(Self::now(), input, &mut effects);
        let generation = driven.local.generation();
        for effect in effects {
            self.carry_out(name, generation, effect);
        }
        self.answer_failed();
    }

    /// Inputs that came about while others were carried out. A group's failures make it wait, so that comes to an end.
    pub(super) fn feed_pending(&mut self) {
        while let Some((to, input)) = self.pending.pop_front() {
            if self.driven.get(&to.group).is_some_and(|driven| driven.local.generation() == to.generation) {
                self.feed(&to.group, input);
            }
        }
    }

    pub(super) fn later(&mut self, to: &Local, input: Input) {
        self.pending.push_back((to.clone(), input));
    }

    fn carry_out(&mut self, name: &str, generation: u64, effect: Effect) {
        let local = |call| Local { group: name.to_owned(), generation, call };
        let entry = |entry: Entry, doing: Doing, call| (entry, Asker::Local(local(call), doing));
        match effect {
            Effect::Open { resource, call, adopt, own_host } => {
                self.open(&local(call), &resource, adopt, own_host);
            }
            Effect::Online { resource, call } => self.bring_online(local(call), resource),
            Effect::Offline { resource, call } => {
                let (entry, asker) = entry(Entry::Offline, Doing::Offline, call);
                self.hosts.call(&resource, entry, asker);
            }
            Effect::Terminate { resource, call } => {
                self.restoring.retain(|(waits, of)| !(waits.group == name && *of == resource));
                let (entry, asker) = entry(Entry::Terminate, Doing::Terminate, call);
                self.hosts.call(&resource, entry, asker);
            }
            Effect::Close { resource, call } => {
                self.hosts.close(&resource, Asker::Local(local(call), Doing::Close));
            }
            Effect::Cancel { call, .. } => {
                let of = local(call);
                self.restoring.retain(|(waits, _)| *waits != of);
                self.hosts.cancel(|asker| {
                    matches!(asker, Asker::Local(local, _) | Asker::Arrival(local, _) if *local == of)
                });
            }
            Effect::Polls { resource, on } => self.hosts.polls(&resource, on),
            Effect::Event { kind, resource, text } => self.event(&resource, kind, text),
        }
    }

    fn open(&mut self, local: &Local, resource: &str, adopt: bool, own_host: bool) {
        let spec = {
            let db = self.engine.db.read();
            let config = self.driven.get(&local.group).and_then(|driven| driven.config.as_ref());
            config.and_then(|config| {
                let of = config.resources.get(resource)?;
                Some(spec_of(&config.group, local.generation, &config.resources, &db.types, of))
            })
        };
        let Some(spec) = spec else {
            let outcome = Outcome::Failed {
                why: "it is not in the database any more".into(),
                retry: true,
                elsewhere: false,
            };
            let (resource, call) = (resource.to_owned(), local.call);
            return self.later(local, Input::Answer { resource, call, outcome });
        };
        self.leftovers.spare(resource);
        let lease_ms = self.lease_ms();
        let arrives = if adopt { self.arrives(&local.group, resource) } else { None };
        let adopt = adopt && arrives.is_none();
        let asker = match arrives {
            Some(step) => Asker::Arrival(local.clone(), step),
            None if adopt => Asker::Local(local.clone(), Doing::Adopt),
            None => Asker::Local(local.clone(), Doing::Open),
        };
        self.hosts.open(spec, adopt, own_host, lease_ms, &self.node, asker);
    }

    /// Files that follow the resource come first.
    fn bring_online(&mut self, local: Local, resource: String) {
        let config = self.driven.get(&local.group).and_then(|driven| driven.config.as_ref());
        let files =
            config.and_then(|config| config.resources.get(&resource)).map(|of| of.checkpoints.clone());
        match files.filter(|files| !files.is_empty()) {
            None => self.hosts.call(&resource, Entry::Online, Asker::Local(local, Doing::Online)),
            Some(files) => {
                checkpoints::restore(&self.engine, &local, &resource, files);
                self.restoring.push((local, resource));
            }
        }
    }

    fn restored(&mut self, local: &Local, result: Result<(), String>) {
        let Some(at) = self.restoring.iter().position(|(waits, _)| waits == local) else { return };
        let (local, resource) = self.restoring.remove(at);
        match result {
            Ok(()) => self.hosts.call(&resource, Entry::Online, Asker::Local(local, Doing::Online)),
            Err(why) => {
                let outcome = Outcome::Failed { why, retry: true, elsewhere: true };
                let call = local.call;
                self.later(&local, Input::Answer { resource, call, outcome });
            }
        }
    }

    pub(super) fn event(&self, subject: &str, kind: EventKind, text: String) {
        self.engine.event(subject, crate::engine::forward::local_kind(kind), text);
    }

    fn publish(&mut self) {
        let told: BTreeMap<String, Told> = self
            .driven
            .iter()
            .filter(|(_, driven)| !driven.stopped && driven.config.is_some())
            .map(|(name, driven)| {
                let local = &driven.local;
                let told = Told {
                    generation: local.generation(),
                    state: local.state(),
                    resources: local.statuses(),
                    released: local.release_done(),
                };
                (name.clone(), told)
            })
            .collect();
        let groups = &self.engine.groups;
        let news = {
            let mut before = groups.told.lock();
            let news = *before != told;
            *before = told;
            news
        };
        if news {
            groups.tell.notify_one();
        }
        let looked = self.standing != Standing::Starting && self.leftovers.all_found();
        let quiet = looked && self.driven.is_empty() && self.incoming.is_empty() && !self.anything_left();
        if quiet && self.finishing {
            self.hosts.end_all();
        }
        groups.quiet.send_if_modified(|was| std::mem::replace(was, quiet) != quiet);
    }

    /// May what nobody drives be ended: is it known what is driven?
    pub(super) fn knows_what_is_driven(&self) -> bool {
        match self.standing {
            Standing::Starting => false,
            Standing::In => self.caught_up && !self.stale,
            Standing::Out(_) => true,
        }
    }
}
