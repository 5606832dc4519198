//! Resource hosts of this node: which there are, which resource is open in which, which calls are under way.
//!
//! Nothing here waits: a host is started in a thread of its own, and each has a thread that writes to it. What is said to a
//! host that is being started is kept and said when it is there. A call for a resource that is open nowhere fails at once.
//!
//! A host that does not read, or whose connection ends, is killed; what its resources manage goes on, and the next host
//! is started only when the former's process is gone, so that two never look after the same thing.

use super::{Asker, News};
use csv_resource::api::{NodeInfo, Spec};
use csv_resource::client::{ClientError, Host, HostEvent};
use csv_resource::protocol::{Entry, HostState, Outcome, ToHost};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Messages on their way to one host. A host that has not read so many is as good as gone.
const QUEUE: usize = 8192;
/// A host that has not answered for so long hangs as a whole.
const SILENT_LIMIT: Duration = Duration::from_secs(30);
/// Hosts that end within this time without a reason end for the same one.
const DEATHS_PERIOD: Duration = Duration::from_secs(600);
/// For the process of a former host to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(5);

/// Number of a host in this csvd.
pub(super) type HostId = u64;

/// A host.
#[derive(Debug)]
struct Link {
    name: String,
    /// For one resource alone.
    own: bool,
    state: State,
    /// When it said something last, or was asked first since.
    heard: Instant,
}

#[derive(Debug)]
enum State {
    /// What is to be said when it is there.
    Starting(Vec<ToHost>),
    Up {
        host: Arc<Host>,
        to: SyncSender<ToHost>,
    },
}

/// A call under way.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) host: HostId,
    pub(super) resource: String,
    pub(super) asker: Asker,
    opens: bool,
}

/// A call that failed at once.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) resource: String,
    pub(super) asker: Asker,
    pub(super) why: String,
}

/// What went with a host.
#[derive(Debug)]
pub(super) struct Lost {
    pub(super) name: String,
    /// For one resource alone.
    own: bool,
    pub(super) resources: BTreeSet<String>,
    pub(super) calls: Vec<Call>,
    /// It was the only resource with something under way: the host ended because of it.
    pub(super) culprit: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Hosts {
    program: PathBuf,
    run_dir: PathBuf,
    news: SyncSender<News>,
    links: BTreeMap<HostId, Link>,
    /// Where a resource is open, or about to be.
    places: BTreeMap<String, HostId>,
    /// Those of `places` that are known to be open.
    opened: BTreeSet<String>,
    calls: BTreeMap<u64, Call>,
    last_id: HostId,
    last_call: u64,
    /// The last number in a host's name.
    last_number: u64,
    /// Hosts that ended for no reason that is known, by their resource; without a name, those for all.
    deaths: BTreeMap<String, Instant>,
    /// Since when every resource gets a host of its own.
    scatter: Option<Instant>,
    /// Processes of former hosts that may not be gone yet.
    ended: Vec<Arc<Host>>,
    /// Calls that failed at once, for the driver to answer.
    pub(super) failed: VecDeque<Failed>,
}

impl Hosts {
    pub(super) fn new(program: PathBuf, run_dir: PathBuf, news: SyncSender<News>) -> Hosts {
        Hosts {
            program,
            run_dir,
            news,
            links: BTreeMap::new(),
            places: BTreeMap::new(),
            opened: BTreeSet::new(),
            calls: BTreeMap::new(),
            last_id: 0,
            last_call: 0,
            last_number: 0,
            deaths: BTreeMap::new(),
            scatter: None,
            ended: Vec::new(),
            failed: VecDeque::new(),
        }
    }

    /// Finds the hosts of an earlier csvd. Returns what went wrong, for people.
    pub(super) fn adopt_all(&mut self, node: &NodeInfo) -> Vec<String> {
        let mut wrong = Vec::new();
        for name in Host::list(&self.run_dir) {
            let number = name.rsplit('-').next().and_then(|number| number.parse().ok()).unwrap_or(0);
            self.last_number = self.last_number.max(number);
            let id = self.next_id();
            match Host::adopt(&self.run_dir, &name, node.clone(), self.hears(id)) {
                Ok(None) => {}
                Ok(Some(host)) => self.take_over(id, &name, host),
                // Its lease ends, and with it what it has; nothing else can be done without knowing its process.
                Err(
                    error @ (ClientError::NoWelcome { .. } | ClientError::Io { .. } | ClientError::Gone(_)),
                ) => {
                    wrong.push(format!("resource host {name} is of no use any more: {error}"));
                }
                Err(error @ (ClientError::Version { .. } | ClientError::Exists(_))) => {
                    wrong.push(format!("resource host {name} cannot be taken over: {error}"));
                }
            }
        }
        wrong
    }

    fn take_over(&mut self, id: HostId, name: &str, host: Host) {
        for snapshot in host.welcome() {
            // Of two that have it open, the one where it is not offline counts; the other is of an earlier time.
            if snapshot.state != HostState::Offline || !self.places.contains_key(&snapshot.name) {
                self.places.insert(snapshot.name.clone(), id);
                self.opened.insert(snapshot.name.clone());
            }
        }
        let link = Link {
            name: name.to_owned(),
            own: name.starts_with("own-"),
            state: State::Starting(Vec::new()),
            heard: Instant::now(),
        };
        self.links.insert(id, link);
        self.came_up(id, Ok(Arc::new(host)));
    }

    fn next_id(&mut self) -> HostId {
        self.last_id += 1;
        self.last_id
    }

    fn hears(&self, id: HostId) -> csv_resource::client::OnEvent {
        let news = self.news.clone();
        // Waits while the driver has much to do: the host then waits too.
        Box::new(move |event: HostEvent| drop(news.send(News::Host { id, event })))
    }

    /// A host was started, or could not be.
    pub(super) fn came_up(&mut self, id: HostId, result: Result<Arc<Host>, String>) {
        let Some(link) = self.links.get_mut(&id) else {
            // It ended before it was known to be there.
            if let Ok(host) = result {
                host.kill();
                self.ended.push(host);
            }
            return;
        };
        match result {
            Ok(host) => {
                let (to, from) = sync_channel::<ToHost>(QUEUE);
                let writes = Arc::clone(&host);
                let started =
                    std::thread::Builder::new().name(format!("to-{}", link.name)).spawn(move || {
                        while let Ok(said) = from.recv() {
                            if writes.say(&said).is_err() {
                                return;
                            }
                        }
                    });
                link.heard = Instant::now();
                let before = std::mem::replace(&mut link.state, State::Up { host, to });
                if let Err(error) = started {
                    self.fail_calls(id, &format!("cannot start a thread: {error}"));
                    return;
                }
                if let State::Starting(said) = before {
                    said.into_iter().for_each(|said| self.say(id, said));
                }
            }
            Err(why) => self.fail_calls(id, &why),
        }
    }

    /// The host will not come up: what was asked of it failed.
    fn fail_calls(&mut self, id: HostId, why: &str) {
        let Some(lost) = self.remove(id) else { return };
        for call in lost.calls {
            let why = format!("its resource host could not be started: {why}");
            self.failed.push_back(Failed { resource: call.resource, asker: call.asker, why });
        }
    }

    fn start(&mut self, own: bool, node: &NodeInfo) -> HostId {
        let id = self.next_id();
        self.last_number += 1;
        let name = format!("{}-{}", if own { "own" } else { "shared" }, self.last_number);
        let link =
            Link { name: name.clone(), own, state: State::Starting(Vec::new()), heard: Instant::now() };
        self.links.insert(id, link);
        let ended = std::mem::take(&mut self.ended);
        let (program, run_dir, node) = (self.program.clone(), self.run_dir.clone(), node.clone());
        let (hears, news) = (self.hears(id), self.news.clone());
        let start = move || {
            for host in &ended {
                host.kill();
                if !host.wait_for_end(GONE_LIMIT) {
                    tracing::warn!(host = host.name(), "a killed resource host is still there");
                }
            }
            let started = Host::start(&program, &run_dir, &name, node, hears);
            let result = started.map(Arc::new).map_err(|error| error.to_string());
            drop(news.send(News::HostUp { id, result }));
        };
        if let Err(error) = std::thread::Builder::new().name("rhs-start".to_owned()).spawn(start) {
            tracing::error!(%error, "cannot start a thread");
            self.fail_calls(id, &error.to_string());
        }
        id
    }

    /// Puts a message into a host's queue.
    fn say(&mut self, id: HostId, said: ToHost) {
        match self.links.get_mut(&id).map(|link| &mut link.state) {
            Some(State::Starting(queue)) => queue.push(said),
            // `Gone` follows, with everything that was asked of it.
            Some(State::Up { host, to }) if to.try_send(said).is_err() => host.kill(),
            Some(State::Up { .. }) | None => {}
        }
    }

    /// To everybody who is there.
    fn say_all(&mut self, said: &ToHost) {
        let up = |link: &Link| matches!(link.state, State::Up { .. });
        let ids: Vec<HostId> = self.links.iter().filter(|(_, link)| up(link)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.say(id, said.clone()));
    }

    /// Everything may stay online for so long from now on.
    pub(super) fn lease(&mut self, for_ms: u64) {
        self.say_all(&ToHost::Lease { for_ms, at_boot_ms: Some(crate::engine::boot_ms()) });
    }

    /// Is everybody there?
    pub(super) fn ping(&mut self) {
        self.say_all(&ToHost::Ping);
    }

    /// Hosts that have not answered for too long.
    pub(super) fn silent(&self) -> Vec<HostId> {
        let silent =
            |link: &Link| matches!(link.state, State::Up { .. }) && link.heard.elapsed() > SILENT_LIMIT;
        self.links.iter().filter(|(_, link)| silent(link)).map(|(id, _)| *id).collect()
    }

    pub(super) fn heard(&mut self, id: HostId) {
        if let Some(link) = self.links.get_mut(&id) {
            link.heard = Instant::now();
        }
    }

    /// Is that host one of those that count?
    pub(super) fn knows(&self, id: HostId) -> bool {
        self.links.contains_key(&id)
    }

    fn number_call(&mut self, host: HostId, resource: &str, asker: Asker, opens: bool) -> u64 {
        self.last_call += 1;
        self.calls.insert(self.last_call, Call { host, resource: resource.to_owned(), asker, opens });
        self.last_call
    }

    /// Opens a resource where it is, or in a host of its own, or in the one for all.
    pub(super) fn open(
        &mut self,
        spec: Spec,
        adopt: bool,
        own: bool,
        lease_ms: u64,
        node: &NodeInfo,
        asker: Asker,
    ) {
        let own = own || self.scatters();
        let place = self.places.get(&spec.name).copied().filter(|id| self.links.contains_key(id));
        let shared = || self.links.iter().find(|(_, link)| !link.own).map(|(id, _)| *id);
        let id = match place.or_else(|| if own { None } else { shared() }) {
            Some(id) => id,
            None => {
                let id = self.start(own, node);
                // Whatever is said next needs it.
                self.say(id, ToHost::Lease { for_ms: lease_ms, at_boot_ms: Some(crate::engine::boot_ms()) });
                id
            }
        };
        self.places.insert(spec.name.clone(), id);
        let call = self.number_call(id, &spec.name, asker, true);
        self.say(id, ToHost::Open { call, spec: Box::new(spec), adopt });
    }

    /// Calls an entry point.
    pub(super) fn call(&mut self, resource: &str, entry: Entry, asker: Asker) {
        let Some(id) = self.places.get(resource).copied() else {
            let why = format!("resource {resource} is open in no resource host of this node");
            self.failed.push_back(Failed { resource: resource.to_owned(), asker, why });
            return;
        };
        let call = self.number_call(id, resource, asker, false);
        self.say(id, ToHost::Call { call, name: resource.to_owned(), entry });
    }

    /// Forgets a resource.
    pub(super) fn close(&mut self, resource: &str, asker: Asker) {
        let Some(id) = self.places.get(resource).copied() else {
            let why = "it is not open".to_owned();
            self.failed.push_back(Failed { resource: resource.to_owned(), asker, why });
            return;
        };
        let call = self.number_call(id, resource, asker, false);
        self.say(id, ToHost::Close { call, name: resource.to_owned() });
    }

    /// Nobody waits any more for the call of that asker.
    pub(super) fn cancel(&mut self, is_it: impl Fn(&Asker) -> bool) {
        let found = self.calls.iter().find(|(_, call)| is_it(&call.asker)).map(|(call, of)| (*call, of.host));
        if let Some((call, host)) = found {
            self.say(host, ToHost::Cancel { call });
        }
    }

    /// Whoever asked from outside and does not wait any more: the resource need not go on.
    pub(super) fn cancel_abandoned(&mut self) {
        let abandoned = |call: &Call| matches!(&call.asker, Asker::Outside(reply) if reply.is_closed());
        let found: Vec<(u64, HostId)> = self
            .calls
            .iter()
            .filter(|(_, call)| abandoned(call))
            .map(|(number, call)| (*number, call.host))
            .collect();
        for (number, host) in found {
            if let Some(call) = self.calls.get_mut(&number) {
                call.asker = Asker::Nobody;
            }
            self.say(host, ToHost::Cancel { call: number });
        }
    }

    pub(super) fn polls(&mut self, resource: &str, on: bool) {
        if let Some(id) = self.places.get(resource).copied() {
            self.say(id, ToHost::Polls { name: resource.to_owned(), on });
        }
    }

    /// An answer: whose it is.
    pub(super) fn answered(&mut self, call: u64, outcome: &Outcome) -> Option<Call> {
        let call = self.calls.remove(&call)?;
        match outcome {
            Outcome::Done(_) if call.opens => {
                self.opened.insert(call.resource.clone());
            }
            Outcome::Failed { .. } if call.opens && !self.opened.contains(&call.resource) => {
                self.left(&call.resource);
            }
            Outcome::Done(_) | Outcome::Failed { .. } => {}
        }
        Some(call)
    }

    /// Who waits for that call?
    pub(super) fn asker(&self, call: u64) -> Option<&Call> {
        self.calls.get(&call)
    }

    /// It is open no more, unless somebody opens it again already.
    pub(super) fn left(&mut self, resource: &str) {
        if self.calls.values().any(|call| call.opens && call.resource == resource) {
            return;
        }
        self.opened.remove(resource);
        let Some(id) = self.places.remove(resource) else { return };
        let own = self.links.get(&id).is_some_and(|link| link.own);
        if own && !self.places.values().any(|place| *place == id) {
            self.say(id, ToHost::End);
        }
    }

    /// The host is not there any more, or of no use: it is killed, and forgotten with everything that it had.
    pub(super) fn remove(&mut self, id: HostId) -> Option<Lost> {
        let link = self.links.remove(&id)?;
        if let State::Up { host, .. } = link.state {
            host.kill();
            self.ended.retain(|host| host.is_running());
            self.ended.push(host);
        }
        let resources = self.resources_of(id);
        self.places.retain(|_, place| *place != id);
        self.opened.retain(|resource| !resources.contains(resource));
        let numbers: Vec<u64> =
            self.calls.iter().filter(|(_, call)| call.host == id).map(|(number, _)| *number).collect();
        let calls: Vec<Call> = numbers.iter().filter_map(|number| self.calls.remove(number)).collect();
        let busy: BTreeSet<&String> = calls.iter().map(|call| &call.resource).collect();
        let culprit = if busy.len() == 1 { busy.first().map(|name| (*name).clone()) } else { None };
        Some(Lost { name: link.name, own: link.own, culprit, resources, calls })
    }

    /// A host ended while nothing was asked of it. Once is chance; a host of its own that does so again has its only resource to
    /// blame, and where it is the one for all, each gets a host of its own, so that the one at fault shows itself.
    pub(super) fn died_again(&mut self, lost: &Lost) -> Option<String> {
        let Lost { own, resources, .. } = lost;
        let now = Instant::now();
        self.deaths.retain(|_, at| now.duration_since(*at) < DEATHS_PERIOD);
        let name = if *own { resources.first().cloned()? } else { String::new() };
        let again = !resources.is_empty() && self.deaths.insert(name.clone(), now).is_some();
        if again && !*own {
            self.scatter = Some(now);
        }
        (again && *own).then_some(name)
    }

    fn scatters(&self) -> bool {
        self.scatter.is_some_and(|at| at.elapsed() < DEATHS_PERIOD)
    }

    /// Resources that are open on this node.
    pub(super) fn open_resources(&self) -> impl Iterator<Item = &String> {
        self.places.keys()
    }

    pub(super) fn is_open(&self, resource: &str) -> bool {
        self.places.contains_key(resource)
    }

    /// What is open in a host.
    pub(super) fn resources_of(&self, id: HostId) -> BTreeSet<String> {
        self.places.iter().filter(|(_, place)| **place == id).map(|(name, _)| name.clone()).collect()
    }

    /// The host of a resource, with all that it has.
    pub(super) fn neighbours(&self, resource: &str) -> Option<(HostId, BTreeSet<String>)> {
        let id = *self.places.get(resource)?;
        Some((id, self.resources_of(id)))
    }

    /// Ends every host; what is online stays as it is.
    pub(super) fn end_all(&mut self) {
        self.say_all(&ToHost::End);
    }
}

/// A failure of a call, in the protocol's words.
pub(super) fn failed(why: String) -> Outcome {
    Outcome::Failed { why, retry: true, elsewhere: true }
}
