//! Where calls run: a pool of threads that poll futures. A future blocks its thread while it is inside the file
//! system (that is what the threads are for), and gives the thread back while it waits for a client, a lock or a
//! timer, so that a thousand waiting calls hold no thread.
//!
//! Elastic: threads are started while work waits and none is idle, up to a bound, and end after a while without work.
//! Tasks are bounded by their makers (calls per session). A task that panics is dropped; whoever waited for it sees
//! the other end of its channel close.

use crate::hidden;
use parking_lot::{Condvar, Mutex};
use std::collections::{BinaryHeap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Threads that stay even without work.
const THREADS_MIN: usize = 4;
/// How long a thread above the minimum waits for work.
const IDLE: Duration = Duration::from_secs(10);

/// A pool. Dropping it lets the threads end once the queue is empty.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    threads_max: usize,
    queue: Mutex<Queue>,
    work: Condvar,
    timers: Mutex<Timers>,
    timer_changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    ready: VecDeque<Arc<Task>>,
    threads: usize,
    idle: usize,
    stopped: bool,
}

#[derive(Debug, Default)]
struct Timers {
    heap: BinaryHeap<Timer>,
    stopped: bool,
}

#[derive(Debug)]
struct Timer {
    at: Instant,
    waker: Waker,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    /// Reversed: the earliest is the greatest of the heap.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.at.cmp(&self.at)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Run {
    Idle,
    Queued,
    Running,
    /// Woken while it ran: runs once more.
    RunningWoken,
    Done,
}

struct Task {
    shared: Arc<Shared>,
    state: Mutex<Run>,
    work: Mutex<Option<Work>>,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task").field("state", &*self.state.lock()).finish_non_exhaustive()
    }
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        let queue = {
            let mut state = self.state.lock();
            match *state {
                Run::Idle => {
                    *state = Run::Queued;
                    true
                }
                Run::Running => {
                    *state = Run::RunningWoken;
                    false
                }
                Run::Queued | Run::RunningWoken | Run::Done => false,
            }
        };
        if queue {
            let shared = Arc::clone(&self.shared);
            shared.push(self);
        }
    }
}

impl Task {
    fn run(self: Arc<Self>) {
        *self.state.lock() = Run::Running;
        let waker = Waker::from(Arc::clone(&self));
        let mut slot = self.work.lock();
        let Some(work) = slot.as_mut() else { return };
        let polled = catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(&mut Context::from_waker(&waker))));
        let done = match polled {
            Ok(Poll::Pending) => false,
            Ok(Poll::Ready(())) => true,
            Err(_) => {
                tracing::error!("a coordinator task panicked; its call is answered with EIO");
                true
            }
        };
        if done {
            let finished = slot.take();
            drop(slot);
            *self.state.lock() = Run::Done;
            // Dropping can take locks of the coordinator and must not be able to end the thread either.
            if catch_unwind(AssertUnwindSafe(|| drop(finished))).is_err() {
                tracing::error!("a coordinator task panicked while it was dropped");
            }
            return;
        }
        drop(slot);
        let again = {
            let mut state = self.state.lock();
            let again = *state == Run::RunningWoken;
            *state = if again { Run::Queued } else { Run::Idle };
            again
        };
        if again {
            let shared = Arc::clone(&self.shared);
            shared.push(self);
        }
    }
}

impl Shared {
    fn push(self: &Arc<Self>, task: Arc<Task>) {
        let start = {
            let mut queue = self.queue.lock();
            if queue.stopped {
                drop(queue);
                // Dropping the task takes locks that whoever woke it may hold.
                thread::spawn(move || drop(task));
                return;
            }
            queue.ready.push_back(task);
            let start = queue.idle < queue.ready.len() && queue.threads < self.threads_max;
            if start {
                queue.threads += 1;
            }
            start
        };
        self.work.notify_one();
        if start {
            let shared = Arc::clone(self);
            let spawned = thread::Builder::new().name(self.name.clone()).spawn(move || shared.thread());
            if let Err(error) = spawned {
                tracing::warn!(%error, "cannot start another coordinator thread; the others go on");
                self.queue.lock().threads -= 1;
            }
        }
    }

    fn thread(&self) {
        if let Err(errno) = hidden::prepare_thread() {
            // Creating calls prepare again and report the error to their caller.
            tracing::warn!(%errno, "cannot give a coordinator thread its own umask and capabilities");
        }
        while let Some(task) = self.next() {
            task.run();
        }
    }

    fn next(&self) -> Option<Arc<Task>> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(task) = queue.ready.pop_front() {
                return Some(task);
            }
            if queue.stopped {
                queue.threads -= 1;
                return None;
            }
            queue.idle += 1;
            let timed_out = self.work.wait_for(&mut queue, IDLE).timed_out();
            queue.idle -= 1;
            if timed_out && queue.ready.is_empty() && queue.threads > THREADS_MIN {
                queue.threads -= 1;
                return None;
            }
        }
    }

    fn timer_thread(&self) {
        let mut timers = self.timers.lock();
        loop {
            let now = Instant::now();
            let mut due = Vec::new();
            while timers.heap.peek().is_some_and(|timer| timer.at <= now) {
                due.extend(timers.heap.pop());
            }
            if timers.stopped {
                return;
            }
            if due.is_empty() {
                match timers.heap.peek().map(|timer| timer.at) {
                    Some(at) => {
                        self.timer_changed.wait_until(&mut timers, at);
                    }
                    None => self.timer_changed.wait(&mut timers),
                }
                continue;
            }
            parking_lot::MutexGuard::unlocked(&mut timers, || {
                due.into_iter().for_each(|timer| timer.waker.wake())
            });
        }
    }
}

impl Pool {
    /// A pool of at most `threads_max` threads.
    ///
    /// # Errors
    /// When not even the timer's thread can be started.
    pub(crate) fn new(name: &str, threads_max: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            threads_max: threads_max.max(THREADS_MIN),
            queue: Mutex::default(),
            work: Condvar::new(),
            timers: Mutex::default(),
            timer_changed: Condvar::new(),
        });
        let timer = Arc::clone(&shared);
        thread::Builder::new().name(format!("{name}-timer")).spawn(move || timer.timer_thread())?;
        Ok(Pool { shared })
    }

    /// Runs `work` on some thread. After `stop` it is dropped instead.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let task = Arc::new(Task {
            shared: Arc::clone(&self.shared),
            state: Mutex::new(Run::Queued),
            work: Mutex::new(Some(Box::pin(work))),
        });
        self.shared.push(task);
    }

    /// Runs nothing more.
    pub(crate) fn stop(&self) {
        let dropped = {
            let mut queue = self.shared.queue.lock();
            queue.stopped = true;
            std::mem::take(&mut queue.ready)
        };
        self.shared.work.notify_all();
        let timers = {
            let mut timers = self.shared.timers.lock();
            timers.stopped = true;
            std::mem::take(&mut timers.heap)
        };
        self.shared.timer_changed.notify_all();
        drop(timers);
        drop(dropped);
    }

    /// Waits until `at`.
    pub(crate) fn sleep_until(&self, at: Instant) -> Sleep {
        Sleep { shared: Arc::clone(&self.shared), at, registered: false }
    }

    /// `work`, or `None` when it takes longer than `limit`.
    pub(crate) async fn timeout<T>(&self, limit: Duration, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        let mut sleep = self.sleep_until(Instant::now() + limit);
        std::future::poll_fn(move |cx| {
            if let Poll::Ready(value) = work.as_mut().poll(cx) {
                return Poll::Ready(Some(value));
            }
            Pin::new(&mut sleep).poll(cx).map(|()| None)
        })
        .await
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop();
    }
}

/// See [`Pool::sleep_until`]. Only for tasks of the pool, whose waker never changes.
#[derive(Debug)]
pub(crate) struct Sleep {
    shared: Arc<Shared>,
    at: Instant,
    registered: bool,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        if !self.registered {
            self.registered = true;
            let mut timers = self.shared.timers.lock();
            if timers.stopped {
                return Poll::Ready(());
            }
            timers.heap.push(Timer { at: self.at, waker: cx.waker().clone() });
            drop(timers);
            self.shared.timer_changed.notify_one();
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use tokio::sync::oneshot;

    #[test]
    fn waiting_tasks_hold_no_thread() {
        let pool = Pool::new("test", 4).unwrap();
        let (done, all) = mpsc::channel();
        let mut senders = Vec::new();
        for _ in 0..500 {
            let (tx, rx) = oneshot::channel::<()>();
            senders.push(tx);
            let done = done.clone();
            pool.spawn(async move {
                rx.await.unwrap();
                done.send(()).unwrap();
            });
        }
        let (tx, rx) = mpsc::channel();
        pool.spawn(async move { tx.send(()).unwrap() });
        rx.recv_timeout(Duration::from_secs(10)).unwrap();
        senders.into_iter().for_each(|tx| tx.send(()).unwrap());
        for _ in 0..500 {
            all.recv_timeout(Duration::from_secs(10)).unwrap();
        }
    }

    #[test]
    fn a_timeout_ends_a_wait_and_a_panic_ends_only_its_task() {
        let pool = Arc::new(Pool::new("test", 4).unwrap());
        pool.spawn(async { panic!("wanted by the test") });
        let (tx, rx) = mpsc::channel();
        let inner = Arc::clone(&pool);
        let (never, waits) = oneshot::channel::<()>();
        pool.spawn(async move {
            tx.send(inner.timeout(Duration::from_millis(10), waits).await.is_none()).unwrap();
        });
        assert!(rx.recv_timeout(Duration::from_secs(10)).unwrap());
        drop(never);
    }
}
