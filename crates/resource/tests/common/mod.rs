//! A node with resource hosts, as csvd has them: the real csv-rhs, real processes, a run directory of its own.

#![allow(dead_code, reason = "each suite uses its part")]

use csv_resource::api::{NodeInfo, Spec};
use csv_resource::client::{Host, HostEvent};
use csv_resource::protocol::{Entry, Found, FromHost, HostState, Outcome, ToHost};
use serde_json::Value;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Far longer than anything takes; only a test that fails waits for it.
pub const LONG: Duration = Duration::from_secs(60);
/// Of a lease that does not matter.
pub const LEASE_MS: u64 = 600_000;

pub struct Node {
    pub dir: tempfile::TempDir,
}

impl Node {
    pub fn new() -> Node {
        let node = Node { dir: tempfile::tempdir().unwrap() };
        node.environment(&[]);
        node
    }

    /// The program by which hosts are started from now on sets its environment first: a test must not change its own.
    pub fn environment(&self, variables: &[(&str, &str)]) {
        let set: String =
            variables.iter().map(|(name, value)| format!("export {name}='{value}'\n")).collect();
        let program = env!("CARGO_BIN_EXE_csv-rhs");
        let text = format!(
            "#!/bin/sh\nexport CSV_RHS_TEST_TYPES=1 RUST_BACKTRACE=0 CSV_LOG=${{CSV_LOG:-off}}\n{set}exec '{program}' \"$@\"\n"
        );
        self.script("csv-rhs", &text);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    pub fn info(&self) -> NodeInfo {
        NodeInfo {
            cluster: "test".to_owned(),
            cluster_id: self.dir.path().display().to_string(),
            node: "n1".to_owned(),
            node_id: 1,
            addr: "127.0.0.1".to_owned(),
            run_dir: self.run_dir(),
            state_dir: self.path("state"),
            mount_dir: self.path("mount"),
            secrets_dir: self.path("secrets"),
            luns: Default::default(),
        }
    }

    /// A host of that name, with a lease.
    pub fn start(&self, name: &str) -> Rhs {
        let rhs = self.start_without_lease(name);
        rhs.lease(LEASE_MS);
        rhs
    }

    pub fn start_without_lease(&self, name: &str) -> Rhs {
        self.try_start(name).unwrap()
    }

    pub fn try_start(&self, name: &str) -> Result<Rhs, csv_resource::client::ClientError> {
        let (tell, events) = channel();
        let on_event = Box::new(move |event| drop(tell.send(event)));
        let host = Host::start(&self.path("csv-rhs"), &self.run_dir(), name, self.info(), on_event)?;
        Ok(Rhs::new(host, events, true))
    }

    pub fn adopt(&self, name: &str) -> Option<Rhs> {
        let (tell, events) = channel();
        let on_event = Box::new(move |event| drop(tell.send(event)));
        let host = Host::adopt(&self.run_dir(), name, self.info(), on_event).unwrap()?;
        Some(Rhs::new(host, events, true))
    }

    /// A script that can be run.
    pub fn script(&self, name: &str, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

pub fn spec(name: &str, kind: &str, properties: &[(&str, &str)]) -> Spec {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    Spec {
        name: name.to_owned(),
        kind: kind.to_owned(),
        group: "group".to_owned(),
        properties: properties.iter().map(owned).collect(),
        depends_on: Vec::new(),
        looks_alive_ms: Some(5_000),
        is_alive_ms: Some(60_000),
        deadlock_timeout_ms: 300_000,
        pending_timeout_ms: 180_000,
        generation: 1,
        library: None,
    }
}

/// A host, and what it said that nobody has waited for yet.
pub struct Rhs {
    pub host: Host,
    events: Receiver<HostEvent>,
    seen: RefCell<VecDeque<HostEvent>>,
    calls: Cell<u64>,
    kill: bool,
}

impl Rhs {
    fn new(host: Host, events: Receiver<HostEvent>, kill: bool) -> Rhs {
        Rhs { host, events, seen: RefCell::default(), calls: Cell::new(0), kill }
    }

    /// The host goes on when this connection ends.
    pub fn leave(mut self) {
        self.kill = false;
    }

    pub fn say(&self, said: ToHost) {
        self.host.say(&said).unwrap();
    }

    pub fn lease(&self, for_ms: u64) -> Vec<csv_resource::protocol::Stuck> {
        self.say(ToHost::Lease { for_ms, at_boot_ms: None });
        self.wait("a beat", |said| match said {
            FromHost::Beat { stuck } => Some(stuck.clone()),
            _ => None,
        })
    }

    fn number(&self) -> u64 {
        self.calls.set(self.calls.get() + 1);
        self.calls.get()
    }

    pub fn open_begin(&self, spec: &Spec, adopt: bool) -> u64 {
        let call = self.number();
        self.say(ToHost::Open { call, spec: Box::new(spec.clone()), adopt });
        call
    }

    pub fn open(&self, spec: &Spec) {
        let call = self.open_begin(spec, false);
        self.done(call);
    }

    pub fn begin(&self, name: &str, entry: Entry) -> u64 {
        let call = self.number();
        self.say(ToHost::Call { call, name: name.to_owned(), entry });
        call
    }

    pub fn outcome(&self, call: u64) -> Outcome {
        self.wait("an answer", |said| match said {
            FromHost::Answer { call: answered, outcome, .. } if *answered == call => Some(outcome.clone()),
            _ => None,
        })
    }

    pub fn done(&self, call: u64) -> Value {
        match self.outcome(call) {
            Outcome::Done(value) => value,
            Outcome::Failed { why, .. } => panic!("call {call} failed: {why}"),
        }
    }

    /// Opens to take over; why it is not online, if not.
    pub fn adopt(&self, spec: &Spec) -> Result<(), String> {
        let call = self.open_begin(spec, true);
        let found: Found = serde_json::from_value(self.done(call)).unwrap();
        if found.online { Ok(()) } else { Err(found.why) }
    }

    pub fn why_not(&self, call: u64) -> String {
        match self.outcome(call) {
            Outcome::Done(value) => panic!("call {call} succeeded: {value}"),
            Outcome::Failed { why, .. } => why,
        }
    }

    pub fn call(&self, name: &str, entry: Entry) -> Value {
        self.done(self.begin(name, entry))
    }

    pub fn control(&self, name: &str, verb: &str) -> Value {
        self.call(name, Entry::Control { verb: verb.to_owned(), arguments: Value::Null })
    }

    pub fn close(&self, name: &str) {
        let call = self.number();
        self.say(ToHost::Close { call, name: name.to_owned() });
        self.done(call);
    }

    pub fn failed(&self, name: &str) -> String {
        self.wait("a failure", |said| match said {
            FromHost::Failed { name: failed, why } if failed == name => Some(why.clone()),
            _ => None,
        })
    }

    pub fn event(&self, has: &str) -> String {
        self.wait(has, |said| match said {
            FromHost::Event { text, .. } if text.contains(has) => Some(text.clone()),
            _ => None,
        })
    }

    pub fn lease_over(&self) -> Vec<(String, String)> {
        self.wait("the end of the lease", |said| match said {
            FromHost::LeaseOver { left } => Some(left.clone()),
            _ => None,
        })
    }

    pub fn gone(&self) -> String {
        self.wait_event("the end", |event| match event {
            HostEvent::Gone { why } => Some(why.clone()),
            HostEvent::Said(_) => None,
        })
    }

    /// Has it said that already? Does not wait.
    pub fn has_said(&self, is: impl Fn(&FromHost) -> bool) -> bool {
        self.seen.borrow_mut().extend(self.events.try_iter());
        let said = |event: &HostEvent| matches!(event, HostEvent::Said(said) if is(said));
        self.seen.borrow().iter().any(said)
    }

    pub fn wait<T>(&self, what: &str, pick: impl Fn(&FromHost) -> Option<T>) -> T {
        self.wait_event(what, |event| match event {
            HostEvent::Said(said) => pick(said),
            HostEvent::Gone { .. } => None,
        })
    }

    fn wait_event<T>(&self, what: &str, pick: impl Fn(&HostEvent) -> Option<T>) -> T {
        let until = Instant::now() + LONG;
        loop {
            let mut seen = self.seen.borrow_mut();
            let found = seen.iter().enumerate().find_map(|(at, event)| Some((at, pick(event)?)));
            if let Some((at, found)) = found {
                seen.remove(at);
                return found;
            }
            match self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(event) => seen.push_back(event),
                Err(e) => panic!("waited for {what}: {e}; heard {seen:?}"),
            }
        }
    }

    pub fn state(&self, name: &str) -> Option<HostState> {
        self.host.welcome().iter().find(|resource| resource.name == name).map(|resource| resource.state)
    }
}

impl Drop for Rhs {
    fn drop(&mut self) {
        if self.kill {
            self.host.kill();
            let _ = self.host.wait_for_end(LONG);
        }
    }
}

/// Waits until something is so that sends no event.
pub fn until(what: &str, is: impl Fn() -> bool) {
    let limit = Instant::now() + LONG;
    while !is() {
        assert!(Instant::now() < limit, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn is_there(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

pub fn kill(pid: u64) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}
