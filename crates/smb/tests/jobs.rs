//! Jobs that nobody waits for, against a real smbd.

#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{pattern, serve};
use csv_smb::jobs::{Job, NotDone, Receiver, Transfer};
use csv_smb::pool::{PoolConfig, SmbPool};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process_group};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Ends, Sender, channel};
use std::time::{Duration, Instant};

const LEN: usize = 64 << 10;

/// How a job ended: its number, what was moved, and the data.
type End = (usize, Result<usize, NotDone>, Vec<u8>);

struct Piece {
    number: usize,
    write: bool,
    data: Vec<u8>,
    ends: Sender<End>,
}

impl Transfer for Piece {
    fn source(&self) -> &[u8] {
        if self.write { &self.data } else { &[] }
    }

    fn sink(&mut self) -> &mut [u8] {
        if self.write { &mut [] } else { &mut self.data }
    }

    fn done(self: Box<Self>, outcome: Result<usize, NotDone>) {
        self.ends.send((self.number, outcome, self.data)).unwrap();
    }
}

struct Bed {
    receiver: Receiver,
    ends: Ends<End>,
    sender: Sender<End>,
}

impl Bed {
    fn new(pool: SmbPool) -> Bed {
        let (sender, ends) = channel();
        Bed { receiver: Receiver::new(Arc::new(pool)).unwrap(), ends, sender }
    }

    fn submit(&self, path: &str, number: usize, write: bool, data: Vec<u8>) -> Result<(), Job> {
        let transfer = Box::new(Piece { number, write, data, ends: self.sender.clone() });
        let offset = (number * LEN) as u64;
        self.receiver.pool().submit(Job { path: path.into(), offset, write, transfer })
    }

    /// Receives until so many jobs have ended, and nothing more comes.
    fn ended(&mut self, count: usize) -> Vec<End> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut ends = Vec::new();
        while ends.len() < count {
            assert!(Instant::now() < deadline, "only {} of {count} jobs ended", ends.len());
            let look = rustix::time::Timespec { tv_sec: 1, tv_nsec: 0 };
            poll(&mut [PollFd::from_borrowed_fd(self.receiver.as_fd(), PollFlags::IN)], Some(&look)).unwrap();
            self.receiver.receive();
            ends.extend(self.ends.try_iter());
        }
        assert!(!self.receiver.is_needed());
        ends.extend(self.ends.try_iter());
        assert_eq!(ends.len(), count, "each job ends once");
        ends.sort_by_key(|(number, ..)| *number);
        assert!(ends.iter().enumerate().all(|(at, (number, ..))| at == *number));
        ends
    }
}

/// All workers of the pool have the file open for writing.
fn open_everywhere(pool: &SmbPool, path: &str, workers: usize) {
    let together = std::sync::Barrier::new(workers);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let together = &together;
            scope.spawn(move || {
                together.wait();
                for _ in 0..20 {
                    pool.write_at(path, 0, b"x").unwrap();
                }
            });
        }
    });
}

#[test]
fn more_jobs_than_workers_each_end_once_with_their_data() {
    let server = serve();
    std::fs::write(server.file("data"), b"").unwrap();
    let mut bed = Bed::new(server.pool());
    open_everywhere(bed.receiver.pool(), "/data", 4);
    let spawned = bed.receiver.pool().counters().spawns;
    let mut taken = 0;
    // Until every worker has the file open the pool may give a job back; none is lost.
    for number in 0..40 {
        let data = pattern(number as u64, LEN);
        match bed.submit("/data", number, true, data) {
            Ok(()) => taken += 1,
            Err(job) => job.transfer.done(Err(NotDone)),
        }
    }
    let ends = bed.ended(40);
    assert!(taken >= 4, "{taken}");
    for (number, outcome, data) in ends {
        match outcome {
            Ok(moved) => assert_eq!(moved, LEN),
            Err(NotDone) => bed.receiver.pool().write_at("/data", (number * LEN) as u64, &data).unwrap(),
        }
    }
    for number in 0..40 {
        if let Err(job) = bed.submit("/data", number, false, vec![0; LEN]) {
            job.transfer.done(Err(NotDone));
        }
    }
    let mut read = 0;
    for (number, outcome, data) in bed.ended(40) {
        if outcome == Ok(LEN) {
            assert!(data == pattern(number as u64, LEN), "job {number}");
            read += 1;
        }
    }
    assert!(read >= 4, "{read}");
    let counters = bed.receiver.pool().counters();
    assert_eq!((counters.kills, counters.spawns), (0, spawned), "{counters:?}");

    // The file ends inside the read.
    let file = std::fs::File::options().write(true).open(server.file("data")).unwrap();
    file.set_len(100).unwrap();
    bed.submit("/data", 0, false, vec![0; LEN]).unwrap();
    assert_eq!(bed.ended(1)[0].1, Ok(100));
}

#[test]
fn a_file_that_is_not_open_is_for_the_blocking_way() {
    let server = serve();
    std::fs::write(server.file("data"), b"0123").unwrap();
    let mut bed = Bed::new(server.pool());
    assert!(bed.submit("/data", 0, false, vec![0; 4]).is_err(), "no worker yet");
    bed.receiver.pool().read_at("/data", 0, &mut [0; 4]).unwrap();
    assert!(bed.submit("/data", 0, true, vec![0; 4]).is_err(), "open for reading only");
    bed.submit("/data", 0, false, vec![0; 4]).unwrap();
    assert_eq!(bed.ended(1)[0].2, b"0123");
    std::fs::File::options().write(true).open(server.file("data")).unwrap().write_all_at(b"z", 0).unwrap();
    bed.receiver.pool().read_at("/data", 0, &mut [0; 4]).unwrap();
}

#[test]
fn a_server_that_hangs_ends_jobs_in_time_and_a_dead_one_at_once() {
    let server = serve();
    std::fs::write(server.file("data"), b"").unwrap();
    let pool =
        SmbPool::new(PoolConfig { op_timeout: Duration::from_secs(2), ..server.pool_config() }).unwrap();
    let mut bed = Bed::new(pool);
    open_everywhere(bed.receiver.pool(), "/data", 4);
    let smbd = Pid::from_raw(i32::try_from(server.smbd.pid().unwrap()).unwrap()).unwrap();
    for signal in [Signal::STOP, Signal::KILL] {
        if signal == Signal::STOP {
            kill_process_group(smbd, signal).unwrap();
        }
        let start = Instant::now();
        for number in 0..12 {
            if let Err(job) = bed.submit("/data", number, true, vec![7; LEN]) {
                job.transfer.done(Err(NotDone));
            }
        }
        if signal == Signal::KILL {
            kill_process_group(smbd, signal).unwrap();
        }
        let ends = bed.ended(12);
        let failed = ends.iter().filter(|(_, outcome, _)| outcome.is_err()).count();
        if signal == Signal::STOP {
            assert_eq!(failed, 12, "nothing can succeed");
            assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
            kill_process_group(smbd, Signal::CONT).unwrap();
            open_everywhere(bed.receiver.pool(), "/data", 4);
        }
    }
    let event = server.events.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(event.contains("smbd ended"), "{event}");
}

#[test]
fn a_job_behind_waiting_callers_ends() {
    let server = serve();
    std::fs::write(server.file("data"), b"").unwrap();
    let op_timeout = Duration::from_secs(2);
    let pool = SmbPool::new(PoolConfig { op_timeout, workers: 1, ..server.pool_config() }).unwrap();
    let mut bed = Bed::new(pool);
    open_everywhere(bed.receiver.pool(), "/data", 1);
    let smbd = Pid::from_raw(i32::try_from(server.smbd.pid().unwrap()).unwrap()).unwrap();
    kill_process_group(smbd, Signal::STOP).unwrap();
    bed.submit("/data", 0, true, vec![7; LEN]).unwrap();
    bed.submit("/data", 1, true, vec![8; LEN]).unwrap();
    assert!(bed.receiver.is_needed());
    let pool = bed.receiver.pool().clone();
    std::thread::scope(|scope| {
        // It gets the worker, or its place, before the second job.
        let caller = scope.spawn(|| pool.ping());
        let ends = bed.ended(2);
        assert!(ends.iter().all(|(_, outcome, _)| outcome.is_err()), "{:?}", ends[1].1);
        assert!(caller.join().unwrap().is_err());
    });
    kill_process_group(smbd, Signal::CONT).unwrap();
}
