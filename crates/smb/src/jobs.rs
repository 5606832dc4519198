//! Reads and writes that nobody waits for: started on an idle worker and ended by the thread that has the
//! [`Receiver`], which can be the same one. A round trip costs up to three changes of thread less than with a thread that
//! waits for it, and those are most of what a small I/O costs (docs/decisions/007).
//!
//! Only the good case goes this way: a worker has the file open, the request fits its socket, the server does what it is
//! asked. Everything else ends in [`Transfer::done`] with a reason, and the caller does it again in the blocking way, which
//! opens files, starts workers, and repeats. Jobs that find all such workers busy wait in a queue of `JOBS_MAX`.
//!
//! Who owns what: a flying worker and its job belong to the pool's state; while the receiver takes in a reply, the
//! job is its own. A job not answered within `op_timeout` takes its worker with it, as everywhere in the pool.

use crate::pool::{SmbPool, State, Turn};
use crate::wire::{HEADER_BYTES, Op, Reply, Request};
use crate::worker::Worker;
use parking_lot::MutexGuard;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::collections::HashMap;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Jobs that wait for a worker, at most.
const JOBS_MAX: usize = 1024;
/// How often it is looked whether a worker is too late.
const SWEEP: Duration = Duration::from_secs(1);
/// Replies looked at in one go.
const EVENTS: usize = 64;

/// The data of a job and what is to be done at its end. Its methods are called from the thread that starts the job and
/// from that of the receiver, and must not block.
pub trait Transfer: Send {
    /// What is to be written; empty for a read.
    fn source(&self) -> &[u8];
    /// Where to read to; empty for a write.
    fn sink(&mut self) -> &mut [u8];
    /// The end: so many bytes were read (fewer than the sink takes at the end of the file) or written; an error means
    /// that the outcome is not known or that nothing was done.
    fn done(self: Box<Self>, outcome: Result<usize, NotDone>);
}

/// The job did not succeed this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotDone;

/// A read or write of a file.
pub struct Job {
    /// Path on the share.
    pub path: Arc<str>,
    /// Offset in bytes.
    pub offset: u64,
    /// A write of all of `source`, else a read of all of `sink`.
    pub write: bool,
    /// See there.
    pub transfer: Box<dyn Transfer>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("path", &self.path).field("offset", &self.offset).finish_non_exhaustive()
    }
}

/// A worker with a job.
#[derive(Debug)]
pub(crate) struct Flight {
    worker: Worker,
    /// Taken while its reply is received.
    job: Option<Job>,
    request: u64,
    deadline: Instant,
}

/// A reply that is coming in.
struct Receiving {
    job: Job,
    request: u64,
    socket: Arc<UnixStream>,
    header: [u8; HEADER_BYTES],
    got: usize,
}

/// Takes the replies to a pool's jobs in. It belongs to a thread that has other things to wait for too.
pub struct Receiver {
    pool: Arc<SmbPool>,
    poll: Arc<OwnedFd>,
    receiving: HashMap<u64, Receiving>,
    swept: Instant,
}

/// What a look at a socket came to.
enum Came {
    NotYet,
    All(Reply, usize),
    Broken,
}

impl SmbPool {
    /// Starts a job, or gives it back: no worker has the file open, somebody waits for a worker already, or the queue is
    /// full. Never blocks.
    ///
    /// # Errors
    /// The job.
    pub fn submit(&self, job: Job) -> Result<(), Job> {
        let mut state = self.state.lock();
        if !state.queue.is_empty() || state.receiver.is_none() {
            return Err(job);
        }
        let open = state.idle.iter().rposition(|worker| worker.has_open(&job.path, job.write));
        let Some(at) = open else {
            let flying = state.flights.values().any(|flight| flight.worker.has_open(&job.path, job.write));
            // Other workers are to have the file open too, which is for the blocking way to do.
            let all_fly = state.idle.is_empty() && state.places >= self.config.workers;
            if !flying || !all_fly || state.jobs.len() >= JOBS_MAX {
                return Err(job);
            }
            state.jobs.push_back((job, Instant::now() + self.config.op_timeout));
            self.count_jobs(&state);
            return Ok(());
        };
        let worker = state.idle.remove(at);
        let deadline = Instant::now() + self.config.op_timeout;
        let lost = self.fly(&mut state, worker, job, deadline);
        drop(state);
        match lost {
            None => Ok(()),
            Some((worker, job)) => {
                self.lose(worker);
                Err(job)
            }
        }
    }

    /// Sends a job to a worker that has its file open. Gives both back when that did not work.
    fn fly(
        &self,
        state: &mut State,
        mut worker: Worker,
        mut job: Job,
        deadline: Instant,
    ) -> Option<(Worker, Job)> {
        let watched = state.receiver.as_ref().is_some_and(|poll| worker.watch(poll));
        let Some(slot) = worker.open_slot(&job.path, job.write).filter(|_| watched) else {
            return Some((worker, job));
        };
        let op = if job.write { Op::WriteAt } else { Op::ReadAt };
        let (payload, len) = (job.transfer.source().len(), job.transfer.sink().len());
        let (Ok(payload), Ok(len)) = (u32::try_from(payload), u32::try_from(len)) else {
            return Some((worker, job));
        };
        let request = Request { slot, offset: job.offset, len, payload, ..worker.request(op) };
        if !worker.send_now(&request, job.transfer.source()) {
            return Some((worker, job));
        }
        let key = worker.key;
        state.flights.insert(key, Flight { worker, job: Some(job), request: request.id, deadline });
        self.count_jobs(state);
        None
    }

    /// A worker that failed, outside of the lock.
    fn lose(&self, worker: Worker) {
        self.counts.kills.fetch_add(1, Ordering::Relaxed);
        drop(worker);
        self.hand_on(Turn::Place);
    }

    fn take_flight(&self, key: u64) -> Option<Flight> {
        let mut state = self.state.lock();
        let flight = state.flights.remove(&key);
        self.count_jobs(&state);
        flight
    }

    /// After each change of flights or jobs. Jobs that wait count too: a thread that is done with a worker starts them,
    /// and the receiver has to be there then.
    fn count_jobs(&self, state: &State) {
        self.under_way.store(state.flights.len() + state.jobs.len(), Ordering::Release);
    }

    /// Jobs that wait while no worker flies may wait for ever.
    pub(crate) fn drop_stranded(&self, state: MutexGuard<'_, State>) {
        let stranded = !state.jobs.is_empty() && state.flights.is_empty();
        drop(state);
        if stranded {
            self.drop_waiting();
        }
    }

    /// A reply is in: the worker is free.
    fn landed(&self, key: u64) {
        let flight = self.take_flight(key);
        if let Some(flight) = flight {
            self.hand_on(Turn::Worker(flight.worker));
        }
    }

    /// A free worker that no thread waits for: it gets the next job that it can do, or is idle.
    pub(crate) fn next_job(&self, mut state: MutexGuard<'_, State>, worker: Worker) {
        let next = state.jobs.iter().position(|(job, _)| worker.has_open(&job.path, job.write));
        let Some((job, deadline)) = next.and_then(|at| state.jobs.remove(at)) else {
            state.idle.push(worker);
            return self.drop_stranded(state);
        };
        let lost = self.fly(&mut state, worker, job, deadline);
        drop(state);
        if let Some((worker, job)) = lost {
            self.lose(worker);
            job.transfer.done(Err(NotDone));
            self.drop_waiting();
        }
    }

    /// A worker broke or is too late. Those who wait for one like it may wait for ever.
    fn crashed(&self, key: u64) {
        let flight = self.take_flight(key);
        if let Some(flight) = flight {
            self.lose(flight.worker);
            if let Some(job) = flight.job {
                job.transfer.done(Err(NotDone));
            }
        }
        self.drop_waiting();
    }

    fn drop_waiting(&self) {
        let waiting = {
            let mut state = self.state.lock();
            let waiting = std::mem::take(&mut state.jobs);
            self.count_jobs(&state);
            waiting
        };
        for (job, _) in waiting {
            job.transfer.done(Err(NotDone));
        }
    }

    /// Ends what is too late.
    fn sweep(&self, receiving: &mut HashMap<u64, Receiving>) {
        let now = Instant::now();
        let (late, queue_late) = {
            let state = self.state.lock();
            let late = state.flights.iter().filter(|(_, flight)| flight.deadline <= now);
            let late: Vec<u64> = late.map(|(key, _)| *key).collect();
            (late, state.jobs.front().is_some_and(|(_, deadline)| *deadline <= now))
        };
        for key in late {
            self.crashed(key);
            if let Some(half) = receiving.remove(&key) {
                half.job.transfer.done(Err(NotDone));
            }
        }
        if queue_late {
            self.drop_waiting();
        }
    }

    /// Something came from a worker.
    fn readable(&self, key: u64, receiving: &mut HashMap<u64, Receiving>) {
        let begun = receiving.remove(&key).or_else(|| {
            // Of a worker that does not fly a thread takes the reply itself.
            let mut state = self.state.lock();
            let flight = state.flights.get_mut(&key)?;
            let (request, socket) = (flight.request, flight.worker.socket());
            flight.job.take().map(|job| Receiving { job, request, socket, header: [0; HEADER_BYTES], got: 0 })
        });
        let Some(mut coming) = begun else { return };
        match coming.take_in() {
            Came::NotYet if coming.got > 0 => drop(receiving.insert(key, coming)),
            Came::NotYet => {
                if let Some(flight) = self.state.lock().flights.get_mut(&key) {
                    flight.job = Some(coming.job);
                }
            }
            Came::Broken => {
                self.crashed(key);
                coming.job.transfer.done(Err(NotDone));
            }
            Came::All(reply, got) => {
                let (write, broken) = (coming.job.write, reply.id != coming.request || reply.is_broken());
                let moved = if write { coming.job.transfer.source().len() } else { got };
                // First the worker, so that it does not wait for what `done` does.
                if broken {
                    self.crashed(key);
                } else {
                    self.landed(key);
                }
                if broken || reply.errno != 0 {
                    return coming.job.transfer.done(Err(NotDone));
                }
                let bytes = if write { &self.counts.written_bytes } else { &self.counts.read_bytes };
                bytes.fetch_add(moved as u64, Ordering::Relaxed);
                self.counts.ops.fetch_add(1, Ordering::Relaxed);
                coming.job.transfer.done(Ok(moved));
            }
        }
    }
}

impl Receiving {
    fn take_in(&mut self) -> Came {
        loop {
            let mut wanted = HEADER_BYTES;
            let mut reply = None;
            let sink = self.job.transfer.sink();
            if self.got >= HEADER_BYTES {
                let Ok(decoded) = Reply::decode(&self.header) else { return Came::Broken };
                wanted += decoded.payload as usize;
                if decoded.payload as usize > sink.len() {
                    return Came::Broken;
                }
                reply = Some(decoded);
            }
            if let Some(reply) = reply.filter(|_| self.got >= wanted) {
                return Came::All(reply, self.got - HEADER_BYTES);
            }
            let parts = &mut [
                IoSliceMut::new(&mut self.header[self.got.min(HEADER_BYTES)..]),
                IoSliceMut::new(&mut sink[self.got.saturating_sub(HEADER_BYTES)..]),
            ];
            let control = &mut rustix::net::RecvAncillaryBuffer::default();
            match rustix::net::recvmsg(&*self.socket, parts, control, RecvFlags::DONTWAIT) {
                Ok(message) if message.bytes == 0 => return Came::Broken,
                Ok(message) => self.got += message.bytes,
                Err(Errno::AGAIN) => return Came::NotYet,
                Err(Errno::INTR) => {}
                Err(_) => return Came::Broken,
            }
        }
    }
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("pool", &self.pool.server()).finish_non_exhaustive()
    }
}

impl Receiver {
    /// The receiver of a pool's jobs; there is one at a time.
    ///
    /// # Errors
    /// Those of epoll_create(2).
    pub fn new(pool: Arc<SmbPool>) -> std::io::Result<Receiver> {
        let poll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        pool.state.lock().receiver = Some(poll.clone());
        Ok(Receiver { pool, poll, receiving: HashMap::new(), swept: Instant::now() })
    }

    /// The pool whose jobs it ends.
    #[must_use]
    pub fn pool(&self) -> &Arc<SmbPool> {
        &self.pool
    }

    /// Is any job under way? Then [`Receiver::receive`] is to be called when the descriptor is readable, and once in a
    /// second at least.
    #[must_use]
    pub fn is_needed(&self) -> bool {
        self.pool.under_way.load(Ordering::Acquire) > 0
    }

    /// Ends the jobs whose replies are there, and those that are too late. Does not wait. True when there were any.
    pub fn receive(&mut self) -> bool {
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut room = [const { std::mem::MaybeUninit::uninit() }; EVENTS];
        let came = match epoll::wait(&self.poll, &mut room, Some(&now)) {
            Ok((events, _)) => &*events,
            Err(error) => {
                if error != Errno::INTR {
                    tracing::error!(%error, "looking for SMB replies");
                }
                &[]
            }
        };
        for event in came {
            self.pool.readable(event.data.u64(), &mut self.receiving);
        }
        if self.swept.elapsed() >= SWEEP {
            self.pool.sweep(&mut self.receiving);
            self.swept = Instant::now();
        }
        !came.is_empty()
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }
}

impl Drop for Receiver {
    /// Nobody takes replies any more: no further jobs.
    fn drop(&mut self) {
        self.pool.state.lock().receiver = None;
    }
}
