//! Threads for requests that may block. Grows when nobody is free, up to a bound; idle threads end after a while.
//! Work beyond the bound waits in a queue as long as the kernel allows requests in flight.

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    idle: usize,
    threads: usize,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Pool {
    shared: Arc<(Mutex<State>, Condvar)>,
    threads_max: usize,
    name: &'static str,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Pool {
    pub(crate) fn new(name: &'static str, threads_max: usize) -> Pool {
        Pool { shared: Arc::default(), threads_max, name }
    }

    /// Runs `job` in some thread of the pool.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let (lock, changed) = &*self.shared;
        let mut state = lock.lock();
        state.queue.push_back(Box::new(job));
        if state.idle >= state.queue.len() {
            changed.notify_one();
        } else if state.threads < self.threads_max {
            state.threads += 1;
            drop(state);
            self.spawn();
        } else {
            changed.notify_one();
        }
    }

    fn spawn(&self) {
        let shared = self.shared.clone();
        let started = std::thread::Builder::new().name(self.name.into()).spawn(move || work(&shared));
        if let Err(error) = started {
            // The job stays queued for the threads there are; with none, the next `run` tries again.
            self.shared.0.lock().threads -= 1;
            tracing::error!(%error, "cannot start a thread");
        }
    }
}

fn work(shared: &(Mutex<State>, Condvar)) {
    let (lock, changed) = shared;
    let mut state = lock.lock();
    loop {
        if let Some(job) = state.queue.pop_front() {
            drop(state);
            job();
            state = lock.lock();
            continue;
        }
        state.idle += 1;
        let timed_out = changed.wait_for(&mut state, IDLE).timed_out();
        state.idle -= 1;
        if timed_out && state.queue.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}
