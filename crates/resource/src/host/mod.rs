//! A resource host: the process in which entry points of resources run.
//!
//! ```text
//! reader of the connection ──calls──> queue of each resource ──> its thread ──> entry points
//!          └─ lease, beat, cancel                                  │  polls by its own timer
//! writer <── answers, failures, events ────────────────────────────┘
//! watcher of the lease ──terminate──> every resource that is not offline
//! ```
//!
//! Invariants
//! * Nothing goes online, and nothing is taken over, without a lease; when it is over everything that is not offline
//!   is terminated, all at the same time, whether or not somebody is connected.
//! * Reader, writer and watcher never call an entry point and never wait for a resource; so beats are answered even when every
//!   resource hangs.
//! * An answer goes to the connection that asked, or nowhere.
//!
//! Failure: a panic in an entry point is a failure of its resource. A crash (a library that writes where it must not)
//! ends the host; what is online goes on, and the next host takes it over. Order of locks: list of resources,
//! a resource, outbox; lease: alone, or before the outbox.

mod connection;
mod lease;
mod outbox;
mod queue;
mod services;
mod worker;

use crate::api::NodeInfo;
use crate::protocol::{RESOURCES_MAX, Snapshot, Stuck};
use anyhow::Context;
use lease::Lease;
use outbox::Outbox;
use parking_lot::Mutex;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use worker::Worker;

pub(crate) use services::file_name;
pub use services::state_file;

/// For telling what is still to be said before the host ends.
const END_LIMIT: Duration = Duration::from_secs(1);

/// What all threads of the host share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    outbox: Outbox,
    lease: Lease,
    workers: Mutex<BTreeMap<String, Arc<Worker>>>,
    node: Mutex<Option<Arc<NodeInfo>>>,
}

/// Runs a resource host until it is told to end. Standard input is the listening socket.
///
/// # Errors
/// Standard input is no listening socket, or threads cannot be started.
pub fn run(name: &str) -> anyhow::Result<()> {
    // Fails when it leads a session already, which is as good.
    let _ = nix::unistd::setsid();
    let listener = std::io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
    let listener = UnixListener::from(listener);
    listener
        .local_addr()
        .context("standard input is no listening Unix socket; csv-rhs is started by csvd")?;
    let null = File::open("/dev/null").context("/dev/null")?;
    // Programs of resources must not get hold of the socket.
    rustix::stdio::dup2_stdin(&null).context("standard input")?;

    // By a handler and not by a mask, which programs of resources would inherit: none of them would end by SIGTERM.
    let mut ends = Signals::new([SIGTERM, SIGINT]).context("signals")?;
    let shared = Arc::new(Shared::default());
    spawn("signals", &shared, move |shared| {
        // Waits until one is there. If it ended without, the host would end, and what is online would go on.
        ends.forever().next();
        shared.end()
    })?;
    spawn("writer", &shared, |shared| shared.outbox.write_forever())?;
    spawn("lease", &shared, |shared| shared.lease.watch_forever(&shared))?;
    tracing::info!(host = name, "resource host is there");
    connection::accept_forever(&listener, &shared)
}

fn spawn(
    name: &str,
    shared: &Arc<Shared>,
    run: impl FnOnce(Arc<Shared>) + Send + 'static,
) -> anyhow::Result<()> {
    let shared = Arc::clone(shared);
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || run(shared))
        .context("cannot start a thread")?;
    Ok(())
}

impl Shared {
    /// Ends the host. Whatever is online goes on.
    fn end(&self) -> ! {
        self.outbox.flush(END_LIMIT);
        tracing::info!("resource host ends, what is online goes on");
        std::process::exit(0)
    }

    /// All resources.
    fn all(&self) -> Vec<Arc<Worker>> {
        self.workers.lock().values().cloned().collect()
    }

    fn snapshots(&self) -> Vec<Snapshot> {
        self.all().iter().map(|worker| worker.snapshot()).collect()
    }

    fn stuck(&self) -> Vec<Stuck> {
        self.all().iter().filter_map(|worker| worker.stuck()).collect()
    }

    fn is_full(&self) -> bool {
        self.workers.lock().len() >= RESOURCES_MAX
    }

    /// What has to be terminated now that the lease is over.
    fn names_to_end(&self) -> Vec<String> {
        let all = self.all();
        all.iter().filter(|worker| worker.must_end()).map(|worker| worker.name.clone()).collect()
    }

    /// False when the resource was closed meanwhile.
    fn end_for_lease(&self, name: &str) -> bool {
        let workers = self.workers.lock();
        workers.get(name).is_some_and(|worker| worker.end_for_lease(self))
    }

    /// Where a resource's thread is now.
    fn running_entry(&self, name: &str) -> Option<String> {
        self.workers.lock().get(name).and_then(|worker| worker.running_entry())
    }
}
