//! The lease: until when this host may have anything online, and what happens when that is over.
//!
//! Time is that of CLOCK_BOOTTIME: a machine that slept has lost its lease. Lock order: the lease's lock is held for
//! moments only, never while a resource is asked.

use super::Shared;
use crate::protocol::FromHost;
use parking_lot::{Condvar, Mutex};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// For terminating everything, before csvd hears what is left; one that ends later is told anew.
const ENDING_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at the clock, at most: sleep of the machine does not count for timers.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// Of [`now`].
    until: Option<Duration>,
    /// Resources that are being terminated because the lease was over; with the reason when that failed.
    ending: BTreeMap<String, Option<String>>,
    /// What was told; kept for the next connection until something is brought online again.
    over: Option<Vec<(String, String)>>,
}

fn now() -> Duration {
    // The clock is always there, and never before boot.
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

impl Lease {
    /// From csvd: this long from when it was said.
    pub(crate) fn grant(&self, length: Duration, said_at: Option<Duration>) {
        let from = said_at.map_or_else(now, |said_at| said_at.min(now()));
        self.inner.lock().until = Some(from.saturating_add(length));
        self.changed.notify_all();
    }

    /// May something be online?
    pub(crate) fn holds(&self) -> bool {
        self.inner.lock().until.is_some_and(|until| now() < until)
    }

    /// Something goes online under a new lease: the end of the former one is history.
    pub(crate) fn used(&self) {
        let mut inner = self.inner.lock();
        if inner.over.as_ref().is_some_and(Vec::is_empty) {
            inner.over = None;
        }
    }

    /// For a new connection.
    pub(crate) fn over(&self) -> Option<FromHost> {
        self.inner.lock().over.clone().map(|left| FromHost::LeaseOver { left })
    }

    /// A resource was terminated, or could not be after the lease was over.
    pub(crate) fn ended(&self, shared: &Shared, name: &str, left: Option<String>) {
        let mut inner = self.inner.lock();
        match &left {
            None => inner.ending.remove(name),
            Some(why) => inner.ending.insert(name.to_owned(), Some(why.clone())),
        };
        // Ended late, after csvd was told that it is left.
        if let Some(over) = &mut inner.over
            && over.iter().any(|(told, _)| told == name)
        {
            over.retain(|(told, _)| told != name);
            over.extend(left.map(|why| (name.to_owned(), why)));
            shared.outbox.tell(FromHost::LeaseOver { left: over.clone() });
        }
        self.changed.notify_all();
    }

    /// The thread that watches.
    pub(crate) fn watch_forever(&self, shared: &Shared) -> ! {
        loop {
            self.wait_until_over();
            tracing::warn!("the lease is over, everything is terminated");
            let names = shared.names_to_end();
            {
                let mut inner = self.inner.lock();
                inner.over = None;
                inner.ending = names.iter().map(|name| (name.clone(), None)).collect();
            }
            for name in &names {
                if !shared.end_for_lease(name) {
                    self.ended(shared, name, None);
                }
            }
            let reasons = self.wait_until_ended(shared);
            let mut inner = self.inner.lock();
            let reason = |name: &String| reasons.get(name).cloned().unwrap_or_default();
            let ending = inner.ending.iter();
            let left: Vec<(String, String)> = ending
                .map(|(name, why)| (name.clone(), why.clone().unwrap_or_else(|| reason(name))))
                .collect();
            tracing::warn!(?left, "the lease is over, everything was terminated");
            inner.over = Some(left.clone());
            shared.outbox.tell(FromHost::LeaseOver { left });
        }
    }

    fn wait_until_over(&self) {
        let mut inner = self.inner.lock();
        loop {
            let Some(until) = inner.until else {
                self.changed.wait(&mut inner);
                continue;
            };
            let Some(remaining) = until.checked_sub(now()).filter(|remaining| !remaining.is_zero()) else {
                inner.until = None;
                return;
            };
            self.changed.wait_for(&mut inner, remaining.min(LOOK_MAX));
        }
    }

    /// Waits for a bounded time; says of those that are not ended then, why.
    fn wait_until_ended(&self, shared: &Shared) -> BTreeMap<String, String> {
        let limit = Instant::now() + ENDING_LIMIT;
        let mut inner = self.inner.lock();
        while inner.ending.values().any(Option::is_none) {
            if self.changed.wait_until(&mut inner, limit).timed_out() {
                break;
            }
        }
        let late: Vec<String> =
            inner.ending.iter().filter(|(_, why)| why.is_none()).map(|(name, _)| name.clone()).collect();
        drop(inner);
        let reason = |name: &str| {
            let entry = shared.running_entry(name);
            entry.map_or_else(|| "it is not ended yet".to_owned(), |entry| format!("it is still in {entry}"))
        };
        late.into_iter().map(|name| (name.clone(), reason(&name))).collect()
    }
}
