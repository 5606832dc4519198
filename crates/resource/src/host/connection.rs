//! Connections of csvd: accepting, reading, handing out. The first `Hello` of a new connection ends the former one; what
//! connects and says nothing (somebody looks whether the host is there) disturbs nobody.

use super::Shared;
use super::outbox::Connection;
use super::queue::{Asked, Job, Kind};
use super::worker::Worker;
use crate::api::{EventLevel, NodeInfo, Spec};
use crate::protocol::{Entry, FromHost, LINE_BYTES_MAX, Outcome, ToHost, VERSION};
use std::collections::btree_map;
use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Connections at once; csvd needs one, and for a moment two.
const CONNECTIONS_MAX: usize = 16;
/// For the first line of a connection.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// After an accept that failed for want of something.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts for ever.
pub(crate) fn accept_forever(listener: &UnixListener, shared: &Arc<Shared>) -> ! {
    let open = Arc::new(AtomicUsize::new(0));
    let mut number: Connection = 0;
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::warn!("accept: {e}");
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        number += 1;
        let reader = Reader { number, stream: Arc::new(stream), shared: Arc::clone(shared), greeted: false };
        let counted = Arc::clone(&open);
        let started = thread::Builder::new().name("reader".to_owned()).spawn(move || {
            reader.run();
            counted.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(e) = started {
            tracing::warn!("cannot start a thread for a connection: {e}");
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Reads one connection.
#[derive(Debug)]
struct Reader {
    number: Connection,
    stream: Arc<UnixStream>,
    shared: Arc<Shared>,
    greeted: bool,
}

impl Reader {
    fn run(mut self) {
        if let Err(e) = self.read_all() {
            tracing::warn!("connection of csvd: {e}");
        }
        let _ = self.stream.shutdown(Shutdown::Both);
        self.shared.outbox.disconnect(self.number);
    }

    fn read_all(&mut self) -> std::io::Result<()> {
        let stream = Arc::clone(&self.stream);
        stream.set_read_timeout(Some(HELLO_LIMIT))?;
        let mut lines = BufReader::new(&*stream);
        let mut line = Vec::new();
        loop {
            line.clear();
            let limit = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
            lines.by_ref().take(limit).read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                return if line.len() == LINE_BYTES_MAX {
                    Err(std::io::Error::other("a line is too long"))
                } else {
                    Ok(())
                };
            }
            match serde_json::from_slice(&line) {
                Ok(ToHost::Hello { version, node }) => {
                    stream.set_read_timeout(None)?;
                    self.hello(version, node);
                }
                Ok(_) if !self.greeted => return Err(std::io::Error::other("no hello")),
                // A newer connection has taken over between two lines.
                Ok(_) if !self.shared.outbox.is_current(self.number) => return Ok(()),
                Ok(said) => self.handle(said),
                Err(e) => self.not_understood(&e),
            }
        }
    }

    fn not_understood(&self, e: &serde_json::Error) {
        self.shared.outbox.tell(FromHost::Event {
            name: String::new(),
            level: EventLevel::Error,
            text: format!("the resource host does not understand what csvd says: {e}"),
        });
    }

    fn hello(&mut self, version: u32, node: NodeInfo) {
        self.greeted = true;
        if version != VERSION {
            tracing::warn!(version, "csvd speaks another version of the protocol");
        }
        *self.shared.node.lock() = Some(Arc::new(node));
        self.shared.outbox.connect(self.number, Arc::clone(&self.stream));
        for worker in self.shared.all() {
            worker.forget_calls_before(self.number);
        }
        let resources = self.shared.snapshots();
        let welcome = FromHost::Welcome { version: VERSION, pid: std::process::id(), resources };
        self.shared.outbox.welcome(self.number, welcome, self.shared.lease.over());
    }

    fn handle(&self, said: ToHost) {
        match said {
            // Handled before.
            ToHost::Hello { .. } => {}
            ToHost::Lease { for_ms, at_boot_ms } => {
                self.shared.lease.grant(Duration::from_millis(for_ms), at_boot_ms.map(Duration::from_millis));
                self.shared.outbox.answer(self.number, FromHost::Beat { stuck: self.shared.stuck() });
            }
            ToHost::Ping => {
                self.shared.outbox.answer(self.number, FromHost::Beat { stuck: self.shared.stuck() });
            }
            ToHost::Open { call, spec, adopt } => self.open(call, *spec, adopt),
            ToHost::Call { call, name, entry } => {
                let kind = match entry {
                    Entry::Online => Kind::Online,
                    Entry::Offline => Kind::Offline,
                    Entry::Terminate => Kind::Terminate,
                    Entry::IsAlive => Kind::IsAlive,
                    Entry::Control { verb, arguments } => Kind::Control { verb, arguments },
                };
                self.submit(call, &name, kind);
            }
            ToHost::Cancel { call } => {
                let asked = self.asked(call);
                for worker in self.shared.all() {
                    if worker.cancel(asked, &self.shared) {
                        break;
                    }
                }
            }
            ToHost::Polls { name, on } => {
                if let Some(worker) = self.shared.workers.lock().get(&name) {
                    worker.set_polls(on);
                }
            }
            ToHost::Close { call, name } => self.submit(call, &name, Kind::Close),
            ToHost::End => self.shared.end(),
        }
    }

    fn asked(&self, call: u64) -> Asked {
        Asked { connection: self.number, call }
    }

    fn submit(&self, call: u64, name: &str, kind: Kind) {
        let job = Job { asked: Some(self.asked(call)), kind };
        let workers = self.shared.workers.lock();
        match workers.get(name) {
            Some(worker) => worker.submit(job, &self.shared),
            None => self.refuse(call, name, format!("resource {name} is not open in this host"), true),
        }
    }

    fn open(&self, call: u64, spec: Spec, adopt: bool) {
        let name = spec.name.clone();
        if adopt && !self.shared.lease.holds() {
            return self.refuse(
                call,
                &name,
                "the host has no lease, so it takes nothing over".to_owned(),
                true,
            );
        }
        let Some(node) = self.shared.node.lock().clone() else { return };
        if self.shared.is_full() && !self.shared.workers.lock().contains_key(&name) {
            return self.refuse(call, &name, "the host has as many resources as it can".to_owned(), false);
        }
        let asked = self.asked(call);
        let mut workers = self.shared.workers.lock();
        match workers.entry(name.clone()) {
            btree_map::Entry::Occupied(open) => open.get().respecify(spec, asked, adopt, &self.shared),
            btree_map::Entry::Vacant(place) => match Worker::start(&self.shared, node, spec, asked, adopt) {
                Ok(worker) => {
                    place.insert(worker);
                }
                Err(e) => self.refuse(call, &name, format!("cannot start a thread: {e}"), true),
            },
        }
    }

    fn refuse(&self, call: u64, name: &str, why: String, retry: bool) {
        let outcome = Outcome::Failed { why, retry, elsewhere: retry };
        self.shared.outbox.answer(self.number, FromHost::Answer { call, name: name.to_owned(), outcome });
    }
}
