//! Processes: who they are for good ([`Identity`]), held by pidfds so that a number can never mean another process,
//! found again by a mark in their environment and by their parents, and run as a step of an entry point ([`run`]).

use crate::api::{Failure, Services};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// Between two looks whether an entry point is given up.
const LOOK: Duration = Duration::from_millis(100);
/// Bytes of each output that are kept.
const OUTPUT_BYTES_MAX: usize = 256 << 10;
/// For a killed process to be gone; one that takes longer hangs in the kernel.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Looks for what a resource has started since the last one, before what was found is killed.
const STOP_ROUNDS: u32 = 10;

/// A process for good: its number, and when it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: i32,
    /// Clock ticks after boot.
    pub(crate) start: u64,
}

impl Identity {
    /// Of a process that is there, and no zombie.
    pub(crate) fn of(pid: i32) -> Option<Identity> {
        Stat::of(pid).map(|stat| stat.identity)
    }

    /// Is it still there?
    pub(crate) fn is_there(self) -> bool {
        Identity::of(self.pid) == Some(self)
    }

    /// Takes hold of it, if it is still there.
    pub(crate) fn hold(self) -> Option<OwnedFd> {
        let pidfd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Looked at after it is held: the number cannot have changed its meaning since.
        self.is_there().then_some(pidfd)
    }

    /// A signal for its process group, which it leads; for itself when it has only just been started, and does not lead one
    /// yet. Nothing happens when it is gone.
    pub(crate) fn signal_group(self, signal: Signal) {
        let Some(pidfd) = self.hold() else { return };
        if let Some(pid) = Pid::from_raw(self.pid)
            && kill_process_group(pid, signal).is_err()
        {
            // It may end at this moment, which is as good.
            let _ = pidfd_send_signal(&pidfd, signal);
        }
    }
}

/// What `/proc` says of a process that is there, and no zombie, at one moment.
#[derive(Debug, Clone, Copy)]
struct Stat {
    identity: Identity,
    parent: i32,
    session: i32,
}

impl Stat {
    fn of(pid: i32) -> Option<Stat> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may contain anything. Fields 3, 4, 6 and 22 of proc_pid_stat(5).
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        let start = fields.nth(15)?.parse().ok()?;
        let identity = Identity { pid, start };
        (!matches!(state, "Z" | "X")).then_some(Stat { identity, parent, session })
    }

    /// Of every process.
    fn all() -> Vec<Stat> {
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
        numbers.filter_map(Stat::of).collect()
    }
}

/// Those of `roots` that are there, with everything that they have started and that is theirs still, whatever session and
/// environment it has given itself.
pub(crate) fn family(roots: impl IntoIterator<Item = Identity>) -> Vec<Identity> {
    let mut found: Vec<Identity> = Vec::new();
    let mut seen = HashSet::new();
    found.extend(roots.into_iter().filter(|root| root.is_there() && seen.insert(*root)));
    let mut children: HashMap<i32, Vec<Identity>> = HashMap::new();
    for stat in Stat::all() {
        children.entry(stat.parent).or_default().push(stat.identity);
    }
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        at += 1;
        // Looked at after its children were: their parent's number meant this process.
        if let Some(born) = children.get(&parent.pid).filter(|_| parent.is_there()) {
            found.extend(born.iter().copied().filter(|child| seen.insert(*child)));
        }
    }
    found
}

/// The same, at the cost of a few reads for each of them instead of a look at every process of the machine. The kernel's list
/// (`/proc/PID/task/TID/children`, proc_pid_task(5)) may leave one out while others end: good enough to remember by.
pub(crate) fn family_by_lists(roots: impl IntoIterator<Item = Identity>) -> Vec<Identity> {
    let roots: Vec<Identity> = roots.into_iter().collect();
    let (mut found, mut seen): (Vec<Identity>, HashSet<Identity>) = (Vec::new(), HashSet::new());
    found.extend(roots.iter().copied().filter(|root| root.is_there() && seen.insert(*root)));
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        at += 1;
        let children = match children(parent.pid) {
            Ok(children) => children,
            // A kernel without lists.
            Err(_) if parent.is_there() => return family(roots),
            Err(_) => continue,
        };
        let born: Vec<Identity> = children.into_iter().filter_map(Identity::of).collect();
        if parent.is_there() {
            found.extend(born.into_iter().filter(|child| seen.insert(*child)));
        }
    }
    found
}

fn children(pid: i32) -> io::Result<Vec<i32>> {
    let mut children = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        match fs::read_to_string(task.join("children")) {
            Ok(list) => children.extend(list.split(' ').filter_map(|pid| pid.parse::<i32>().ok())),
            // The thread has ended.
            Err(_) if !task.exists() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(children)
}

/// Waits until a held process ends. False when the time is over or `give_up` says so.
pub(crate) fn wait_for_end(pidfd: &OwnedFd, limit: Option<Duration>, give_up: impl Fn() -> bool) -> bool {
    let until = limit.map(|limit| Instant::now() + limit);
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if poll_one(pidfd, left.map_or(LOOK, |left| left.min(LOOK))) {
            return true;
        }
        if give_up() || left.is_some_and(|left| left.is_zero()) {
            return false;
        }
    }
}

/// Waits for ever.
pub(crate) fn wait_for_end_for_ever(pidfd: &OwnedFd) {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    while let Err(rustix::io::Errno::INTR) | Ok(0) = poll(&mut fds, None) {}
}

/// Is it readable (a pidfd: has it ended) within that time?
pub(crate) fn poll_one(fd: impl AsFd, limit: Duration) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    let limit = Timespec::try_from(limit).ok();
    poll(&mut fds, limit.as_ref()).is_ok_and(|ready| ready > 0)
}

/// How a process ended, in words.
pub(crate) fn ended_how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// Every process of that session, or with `mark` (`NAME=VALUE`) in the environment that it was started with.
fn of_resource(session: Option<Identity>, mark: &str) -> Vec<Identity> {
    let me = std::process::id();
    Stat::all()
        .into_iter()
        .filter(|stat| u32::try_from(stat.identity.pid) != Ok(me))
        .filter(|stat| {
            has_mark(stat.identity.pid, mark) || session.is_some_and(|session| is_in_session(*stat, session))
        })
        .map(|stat| stat.identity)
        .collect()
}

fn has_mark(pid: i32, mark: &str) -> bool {
    let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environ.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
}

/// A session's number is not given out again while one of its processes is there; a process that leads it
/// must be the one that was started.
fn is_in_session(member: Stat, session: Identity) -> bool {
    if member.session != session.pid {
        return false;
    }
    match Identity::of(session.pid) {
        Some(leader) => leader == session,
        // Without its leader, what is left was started after it.
        None => member.identity.start >= session.start,
    }
}

/// Everything of a resource that is there: of its session, with its mark, or `known` from before, and what those have started.
fn all_of(session: Option<Identity>, mark: &str, known: &[Identity]) -> Vec<Identity> {
    family(of_resource(session, mark).into_iter().chain(known.iter().copied()))
}

/// Kills everything that belongs to a resource, until nothing of it is left. `known` is what was seen of it before: a process
/// whose parent has ended is found by nothing else when it has left the session and changed its environment.
///
/// # Errors
/// Something does not go, with its numbers.
pub(crate) fn kill_all(session: Option<Identity>, mark: &str, known: &[Identity]) -> Result<(), Failure> {
    let until = Instant::now() + KILL_LIMIT;
    let mut left = known.to_vec();
    loop {
        let held = stop_all(session, mark, &mut left);
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            let numbers: Vec<String> = left.iter().map(|process| process.pid.to_string()).collect();
            return Err(Failure::new(format!(
                "process {} was killed and does not end; it hangs in the kernel, probably on storage",
                numbers.join(", ")
            )));
        }
        for pidfd in &held {
            // It may have ended, which is as good.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
        for pidfd in &held {
            wait_for_end(pidfd, Some(until.saturating_duration_since(Instant::now())), || false);
        }
    }
}

/// Stops everything of a resource, so that nothing is started while it is looked for; `left` is what is there then.
fn stop_all(session: Option<Identity>, mark: &str, left: &mut Vec<Identity>) -> Vec<OwnedFd> {
    let (mut held, mut stopped) = (Vec::new(), HashSet::new());
    for _ in 0..STOP_ROUNDS {
        *left = all_of(session, mark, left);
        let before = stopped.len();
        for process in left.iter().filter(|process| stopped.insert(**process)) {
            if let Some(pidfd) = process.hold() {
                // It may have ended, which is as good.
                let _ = pidfd_send_signal(&pidfd, Signal::STOP);
                held.push(pidfd);
            }
        }
        if stopped.len() == before {
            break;
        }
    }
    held
}

/// What a program said.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// What it said last, for people.
    pub(crate) fn last_words(&self) -> String {
        let said = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(3)..].join("; ")
    }
}

/// Runs a program in a process group of its own as a step of an entry point. Killed with its group when
/// nobody waits any more, or the time is over. `started` hears who it is, and may have it killed. Unlike
/// [`crate::types`]' other programs these may leave processes behind that go on (a script starts a server), which may
/// keep the outputs open: nobody waits for those. One that does leave some needs `log` for its outputs, at the end of which
/// stands what it says: a pipe to this host would end with the host, and what was left behind with the pipe.
///
/// # Errors
/// It cannot be started, was given up (`Cancelled`), or took too long; or `started`'s own.
pub(crate) fn run(
    mut command: Command,
    context: Option<&dyn Services>,
    limit: Option<Duration>,
    log: Option<&File>,
    started: impl FnOnce(Identity) -> Result<(), Failure>,
) -> Result<Ran, Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut log_from = 0;
    if let Some(log) = log {
        log_from = log.metadata().map_err(Failure::new)?.len();
        command.stdout(log.try_clone().map_err(Failure::new)?);
        command.stderr(log.try_clone().map_err(Failure::new)?);
    }
    let mut child = command.spawn().map_err(|e| cannot_start(&program, &e))?;
    let pid = Pid::from_child(&child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(Failure::new)?;
    // Not waited for yet, so the number is still its own.
    let kill = || {
        let _ = kill_process_group(pid, Signal::KILL);
        wait_for_end(&pidfd, Some(KILL_LIMIT), || false);
    };
    if let Some(identity) = Identity::of(pid.as_raw_nonzero().get())
        && let Err(failure) = started(identity)
    {
        kill();
        reap(child);
        return Err(failure);
    }
    let out = Output::collect(child.stdout.take());
    let err = Output::collect(child.stderr.take());
    let cancelled = || context.is_some_and(Services::cancelled);
    if !wait_for_end(&pidfd, limit, cancelled) {
        let failure = match limit {
            Some(limit) if !cancelled() => {
                Failure::new(format!("{program} took longer than {} s and was killed", limit.as_secs_f32()))
            }
            Some(_) | None => Failure::Cancelled,
        };
        kill();
        reap(child);
        return Err(failure);
    }
    let status = child.wait().map_err(Failure::new)?;
    if let Some(log) = log {
        return Ok(Ran { status, stdout: written_since(log, log_from), stderr: String::new() });
    }
    Ok(Ran { status, stdout: out.take(), stderr: err.take() })
}

/// What was written to a log since it was that long; the last of it when that is much.
fn written_since(log: &File, from: u64) -> String {
    let length = log.metadata().map_or(from, |meta| meta.len());
    let most = OUTPUT_BYTES_MAX as u64;
    let from = from.max(length.saturating_sub(most));
    let mut bytes = vec![0; usize::try_from(length.saturating_sub(from)).unwrap_or_default()];
    // Its end is only for a message.
    let read = log.read_at(&mut bytes, from).unwrap_or_default();
    bytes.truncate(read);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Why a program cannot be started, as a failure.
pub(crate) fn cannot_start(program: &str, e: &io::Error) -> Failure {
    let why = format!("cannot run {program}: {e}");
    if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) {
        Failure::NotHere(why)
    } else {
        Failure::Failed(why)
    }
}

/// Sees to it that a killed child leaves no zombie, even when it takes long to end.
fn reap(mut child: Child) {
    if !matches!(child.try_wait(), Ok(None)) {
        return;
    }
    // Without the thread a zombie stays until the host ends.
    let _ = thread::Builder::new().name("reaper".to_owned()).spawn(move || child.wait());
}

/// Output of a program, read by a thread of its own.
#[derive(Debug)]
struct Output {
    read: Arc<Mutex<Vec<u8>>>,
    done: mpsc::Receiver<()>,
}

impl Output {
    fn collect(pipe: Option<impl Read + Send + 'static>) -> Output {
        let read = Arc::new(Mutex::new(Vec::new()));
        let (tell, done) = mpsc::channel();
        let into = Arc::clone(&read);
        let reading = move || {
            let Some(mut pipe) = pipe else { return };
            let mut buffer = [0; 4096];
            // What is beyond the bound is read and thrown away, so that the program goes on.
            while let Ok(bytes @ 1..) = pipe.read(&mut buffer) {
                let mut kept = into.lock();
                let room = OUTPUT_BYTES_MAX.saturating_sub(kept.len()).min(bytes);
                kept.extend_from_slice(&buffer[..room]);
            }
            // Nobody may be interested any more.
            let _ = tell.send(());
        };
        // Without the thread the program gets a closed pipe, and its output is lost.
        let _ = thread::Builder::new().name("output".to_owned()).spawn(reading);
        Output { read, done }
    }

    /// Everything, or what came so far when somebody else keeps the pipe open.
    fn take(self) -> String {
        // Ended, or a bounded wait; what is there is taken either way.
        let _ = self.done.recv_timeout(LOOK);
        String::from_utf8_lossy(&self.read.lock()).into_owned()
    }
}
