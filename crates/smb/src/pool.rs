//! A pool of SMB workers: blocking reads and writes at offsets, from many threads.
//!
//! A caller takes an idle worker (one that has the file open, if there is one), starts a new one while there
//! are fewer than allowed, or waits its turn: first come, first served, for at most `op_timeout`, and only
//! `WAITERS_MAX` callers at a time. A worker that fails or does not answer in time is killed and its place is
//! taken by a new one when somebody needs it.
//!
//! What is repeated here: an operation that was not sent, and a read whose connection broke, `TRIES_MAX` times. A
//! write whose connection broke, and anything without an answer in time, is reported as unknown.

pub use crate::error::SmbError;
use crate::jobs::{Flight, Job};
pub use crate::pool_config::PoolConfig;
use crate::pool_config::write_client_config;
use crate::wire::{DATA_BYTES_MAX, Op, Request, StatVfs};
use crate::worker::{CallError, Worker};
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Callers that wait for a worker at one time.
const WAITERS_MAX: usize = 4_096;
/// How often one operation is tried.
const TRIES_MAX: u32 = 4;
/// Pause before the second try, doubled each time.
const RETRY_PAUSE: Duration = Duration::from_millis(25);
/// Closings remembered for workers that are busy; one that missed more closes all its files.
const CLOSINGS_MAX: usize = 256;

/// What the pool has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Bytes read from the server.
    pub read_bytes: u64,
    /// Bytes written to the server.
    pub written_bytes: u64,
    /// Operations that succeeded.
    pub ops: u64,
    /// Worker processes started.
    pub spawns: u64,
    /// Worker processes killed because of an error or a time-out.
    pub kills: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) ops: AtomicU64,
    spawns: AtomicU64,
    pub(crate) kills: AtomicU64,
}

/// What a waiting caller is given.
#[derive(Debug)]
pub(crate) enum Turn {
    Worker(Worker),
    /// A place for a new worker.
    Place,
}

#[derive(Debug, Default)]
pub(crate) struct Ticket {
    turn: Mutex<Option<Turn>>,
    came: Condvar,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// Most recently used last.
    pub(crate) idle: Vec<Worker>,
    /// Places taken: workers that are idle, busy or being started.
    pub(crate) places: usize,
    pub(crate) queue: VecDeque<Arc<Ticket>>,
    /// Workers with a job, by their keys.
    pub(crate) flights: HashMap<u64, Flight>,
    /// Jobs that wait for a worker, and until when.
    pub(crate) jobs: VecDeque<(Job, Instant)>,
    /// What the receiver waits on; without one there are no jobs.
    pub(crate) receiver: Option<Arc<OwnedFd>>,
    last_key: u64,
    /// Grows whenever the pool turns to another server; workers of an earlier one are ended.
    generation: u64,
    /// Of all workers, also of those that threads have, by their keys.
    sockets: HashMap<u64, Weak<UnixStream>>,
    /// Number of the last entry of `closings`.
    closing: u64,
    closings: VecDeque<Arc<str>>,
}

/// The pool. Dropping it ends its workers.
#[derive(Debug)]
pub struct SmbPool {
    pub(crate) config: PoolConfig,
    server: Mutex<SocketAddr>,
    pub(crate) state: Mutex<State>,
    pub(crate) counts: Counts,
    /// Jobs, with a worker or waiting for one, for those who only look.
    pub(crate) under_way: AtomicUsize,
}

/// A place in the pool. When it goes without its worker, the place becomes free.
struct Seat<'a> {
    pool: &'a SmbPool,
    worker: Option<Worker>,
}

impl Seat<'_> {
    /// Gives a worker that is in order back.
    fn keep(mut self) {
        if let Some(worker) = self.worker.take() {
            self.pool.hand_on(Turn::Worker(worker));
            std::mem::forget(self);
        }
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.pool.counts.kills.fetch_add(1, Ordering::Relaxed);
            drop(worker);
        }
        self.pool.hand_on(Turn::Place);
    }
}

impl SmbPool {
    /// A pool; workers are started when they are needed.
    ///
    /// # Errors
    /// The configuration of libsmbclient cannot be written, or the worker program does not exist.
    pub fn new(config: PoolConfig) -> Result<Self, SmbError> {
        if let Err(source) = std::fs::metadata(&config.program) {
            return Err(SmbError::Program { program: config.program, source });
        }
        write_client_config(&config)?;
        let server = Mutex::new(SocketAddr::new(config.server, config.port));
        let config = PoolConfig { workers: config.workers.max(1), ..config };
        Ok(SmbPool {
            config,
            server,
            state: Mutex::default(),
            counts: Counts::default(),
            under_way: AtomicUsize::new(0),
        })
    }

    /// Reads at `offset`; fewer bytes than asked for mean the end of the file.
    ///
    /// # Errors
    /// See [`SmbError::outcome`].
    pub fn read_at(&self, path: &str, offset: u64, out: &mut [u8]) -> Result<usize, SmbError> {
        let mut done = 0;
        for part in out.chunks_mut(DATA_BYTES_MAX) {
            let at = offset.saturating_add(done as u64);
            let got = self.run(Op::ReadAt, path, true, &mut |worker| {
                let slot = worker.slot(path, false)?;
                let len = u32::try_from(part.len()).unwrap_or(u32::MAX);
                let request = Request { slot, offset: at, len, ..worker.request(Op::ReadAt) };
                worker.call(request, &[], part).map(|(_, got)| got)
            })?;
            self.counts.read_bytes.fetch_add(got as u64, Ordering::Relaxed);
            done += got;
            if got < part.len() {
                break;
            }
        }
        Ok(done)
    }

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// See [`SmbError::outcome`]; of data longer than 4 MiB a part may have been written in any case.
    pub fn write_at(&self, path: &str, offset: u64, data: &[u8]) -> Result<(), SmbError> {
        let mut done = 0;
        for part in data.chunks(DATA_BYTES_MAX) {
            let at = offset.saturating_add(done);
            self.run(Op::WriteAt, path, false, &mut |worker| {
                let slot = worker.slot(path, true)?;
                let request = Request { slot, offset: at, ..worker.request(Op::WriteAt) };
                worker.call(request, part, &mut []).map(|_| ())
            })?;
            self.counts.written_bytes.fetch_add(part.len() as u64, Ordering::Relaxed);
            done += part.len() as u64;
        }
        Ok(())
    }

    /// Size of a file in bytes.
    ///
    /// # Errors
    /// See [`SmbError::outcome`].
    pub fn size(&self, path: &str) -> Result<u64, SmbError> {
        self.run(Op::Size, path, true, &mut |worker| {
            let slot = worker.slot(path, false)?;
            let request = Request { slot, ..worker.request(Op::Size) };
            worker.call(request, &[], &mut []).map(|(reply, _)| reply.value)
        })
    }

    /// Space on the share.
    ///
    /// # Errors
    /// See [`SmbError::outcome`].
    pub fn statvfs(&self, path: &str) -> Result<StatVfs, SmbError> {
        self.run(Op::StatVfs, path, true, &mut |worker| {
            let mut encoded = [0; StatVfs::BYTES];
            let request = worker.request(Op::StatVfs);
            worker.call(request, path.as_bytes(), &mut encoded).map(|_| StatVfs::decode(&encoded))
        })
    }

    /// A round trip to the server.
    ///
    /// # Errors
    /// See [`SmbError::outcome`].
    pub fn ping(&self) -> Result<(), SmbError> {
        self.run(Op::Ping, "/", true, &mut |worker| {
            let request = worker.request(Op::Ping);
            worker.call(request, &[], &mut []).map(|_| ())
        })
    }

    /// Closes the file wherever it is open: at once in idle workers, in busy ones before their next operation.
    pub fn close_path(&self, path: &str) {
        let mut state = self.state.lock();
        state.closing += 1;
        state.closings.push_back(path.into());
        if state.closings.len() > CLOSINGS_MAX {
            state.closings.pop_front();
        }
        while let Some(at) = state.idle.iter().position(|worker| worker.has_open(path, false)) {
            let worker = state.idle.swap_remove(at);
            drop(state);
            let mut seat = Seat { pool: self, worker: Some(worker) };
            if self.catch_up(&mut seat).is_ok() {
                seat.keep();
            }
            state = self.state.lock();
        }
    }

    /// Address and port of the server.
    pub(crate) fn server(&self) -> String {
        self.server.lock().to_string()
    }

    /// From now on everything goes to this server. Operations under way at the former one end as when its connection
    /// breaks; none of their workers is used again.
    pub fn retarget(&self, server: IpAddr, port: u16) {
        let server = SocketAddr::new(server, port);
        if std::mem::replace(&mut *self.server.lock(), server) == server {
            return;
        }
        let (idle, sockets) = {
            let mut state = self.state.lock();
            state.generation += 1;
            (std::mem::take(&mut state.idle), std::mem::take(&mut state.sockets))
        };
        for worker in idle {
            drop(worker);
            self.hand_on(Turn::Place);
        }
        for socket in sockets.values().filter_map(Weak::upgrade) {
            // One that is closed already has told its end.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Counters since the pool was made.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            read_bytes: self.counts.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.counts.written_bytes.load(Ordering::Relaxed),
            ops: self.counts.ops.load(Ordering::Relaxed),
            spawns: self.counts.spawns.load(Ordering::Relaxed),
            kills: self.counts.kills.load(Ordering::Relaxed),
        }
    }

    /// Bytes read and written since the pool was made.
    #[must_use]
    pub fn bytes_moved(&self) -> u64 {
        let counters = self.counters();
        counters.read_bytes + counters.written_bytes
    }

    /// Runs one operation with a worker, again where that is harmless.
    fn run<T>(
        &self,
        op: Op,
        path: &str,
        is_read: bool,
        call: &mut dyn FnMut(&mut Worker) -> Result<T, CallError>,
    ) -> Result<T, SmbError> {
        let deadline = Instant::now() + self.config.op_timeout;
        let mut pause = RETRY_PAUSE;
        for attempt in 1.. {
            let last = attempt >= TRIES_MAX || Instant::now() >= deadline;
            let mut seat = match self.seat(path, op == Op::WriteAt, deadline) {
                Ok(seat) => seat,
                Err(error @ SmbError::Unavailable { .. }) if !last => {
                    tracing::debug!(%error, "trying again");
                    // Nothing to wait for but time: the server is not there.
                    std::thread::sleep(pause);
                    pause *= 2;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let Some(worker) = seat.worker.as_mut() else { continue };
            match call(worker) {
                Ok(value) => {
                    seat.keep();
                    self.counts.ops.fetch_add(1, Ordering::Relaxed);
                    return Ok(value);
                }
                Err(CallError::Refused(errno)) => {
                    seat.keep();
                    return Err(self.refused(op, path, errno));
                }
                Err(CallError::Broken(reason)) if is_read && !last => {
                    tracing::debug!(reason, path, "SMB connection broke, reading again");
                }
                Err(CallError::NotSent(reason)) if last => {
                    return Err(SmbError::Unavailable { server: self.server(), reason });
                }
                Err(CallError::NotSent(reason)) => tracing::debug!(reason, path, "opening again"),
                Err(CallError::Broken(reason)) => return Err(self.unknown(op, path, reason)),
                Err(CallError::TimedOut(after)) => {
                    return Err(self.unknown(op, path, format!("no answer within {after:?}")));
                }
            }
        }
        Err(self.unknown(op, path, "tried too often".to_owned()))
    }

    fn refused(&self, op: Op, path: &str, errno: i32) -> SmbError {
        let source = std::io::Error::from_raw_os_error(errno);
        SmbError::Refused { server: self.server(), op: op.name(), path: path.to_owned(), source }
    }

    fn unknown(&self, op: Op, path: &str, reason: String) -> SmbError {
        SmbError::Unknown { server: self.server(), op: op.name(), path: path.to_owned(), reason }
    }

    /// A seat with a worker that has closed what had to be closed.
    fn seat(&self, path: &str, write: bool, deadline: Instant) -> Result<Seat<'_>, SmbError> {
        // A worker that breaks here has lost nothing of the operation, so the next one is taken; each such
        // round uses up one worker that was there before.
        for _ in 0..=self.config.workers {
            let mut seat = match self.take(path, write, deadline)? {
                Turn::Worker(worker) => Seat { pool: self, worker: Some(worker) },
                Turn::Place => {
                    let mut seat = Seat { pool: self, worker: None };
                    self.counts.spawns.fetch_add(1, Ordering::Relaxed);
                    seat.worker = Some(self.start_worker()?);
                    return Ok(seat);
                }
            };
            match self.catch_up(&mut seat) {
                Ok(()) => return Ok(seat),
                Err(error) => tracing::debug!(?error, "worker broke while it closed files"),
            }
        }
        let reason = "every worker broke".to_owned();
        Err(SmbError::Unavailable { server: self.server(), reason })
    }

    fn start_worker(&self) -> Result<Worker, SmbError> {
        let (key, generation) = {
            let mut state = self.state.lock();
            state.last_key += 1;
            (state.last_key, state.generation)
        };
        // After the generation: a worker of an old one may reach the new server, but not the other way round.
        let server = *self.server.lock();
        let known = |socket: &Arc<UnixStream>| {
            let sockets = &mut self.state.lock().sockets;
            sockets.retain(|_, socket| socket.strong_count() > 0);
            sockets.insert(key, Arc::downgrade(socket));
        };
        let mut worker = Worker::start(&self.config, server, key, known)?;
        worker.generation = generation;
        worker.closings_seen = self.state.lock().closing;
        Ok(worker)
    }

    /// Closes in this worker what was closed while it was busy.
    fn catch_up(&self, seat: &mut Seat<'_>) -> Result<(), CallError> {
        let Some(worker) = seat.worker.as_mut() else { return Ok(()) };
        let (missed, closing): (Option<Vec<Arc<str>>>, u64) = {
            let state = self.state.lock();
            let behind = usize::try_from(state.closing - worker.closings_seen).unwrap_or(usize::MAX);
            if behind == 0 {
                return Ok(());
            }
            let missed = state
                .closings
                .len()
                .checked_sub(behind)
                .map(|skip| state.closings.iter().skip(skip).cloned().collect());
            (missed, state.closing)
        };
        match missed {
            Some(paths) => paths.iter().try_for_each(|path| worker.close(path))?,
            None => worker.close_all()?,
        }
        worker.closings_seen = closing;
        Ok(())
    }

    /// An idle worker, a free place, or a turn after waiting.
    fn take(&self, path: &str, write: bool, deadline: Instant) -> Result<Turn, SmbError> {
        let start = Instant::now();
        let ticket = {
            let mut state = self.state.lock();
            let open = state.idle.iter().rposition(|worker| worker.has_open(path, write));
            if let Some(worker) = open.map(|at| state.idle.remove(at)).or_else(|| state.idle.pop()) {
                return Ok(Turn::Worker(worker));
            }
            if state.places < self.config.workers {
                state.places += 1;
                return Ok(Turn::Place);
            }
            if state.queue.len() >= WAITERS_MAX {
                return Err(SmbError::Busy { server: self.server(), waited: Duration::ZERO });
            }
            let ticket = Arc::new(Ticket::default());
            state.queue.push_back(ticket.clone());
            ticket
        };
        let mut turn = ticket.turn.lock();
        while turn.is_none() {
            if ticket.came.wait_until(&mut turn, deadline).timed_out() {
                break;
            }
        }
        if let Some(turn) = turn.take() {
            return Ok(turn);
        }
        drop(turn);
        self.state.lock().queue.retain(|other| !Arc::ptr_eq(other, &ticket));
        // The turn may have come between the time-out and the removal.
        let late = ticket.turn.lock().take();
        late.ok_or_else(|| SmbError::Busy { server: self.server(), waited: start.elapsed() })
    }

    /// Gives a worker or a place to the caller who waits longest, or puts it back.
    pub(crate) fn hand_on(&self, turn: Turn) {
        let mut state = self.state.lock();
        let turn = match turn {
            Turn::Worker(worker) if worker.generation != state.generation => {
                // Of a server that the pool has left. Killed without the lock.
                drop(state);
                drop(worker);
                state = self.state.lock();
                Turn::Place
            }
            turn @ (Turn::Worker(_) | Turn::Place) => turn,
        };
        if let Some(ticket) = state.queue.pop_front() {
            *ticket.turn.lock() = Some(turn);
            ticket.came.notify_one();
            return;
        }
        match turn {
            Turn::Worker(worker) => self.next_job(state, worker),
            Turn::Place => {
                state.places -= 1;
                self.drop_stranded(state);
            }
        }
    }
}
