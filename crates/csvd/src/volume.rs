//! Supervision of one volume's csvfs.
//!
//! ```text
//!            adopt                     process ends
//!   (start) ---------------> Running ---------------> Backoff --(time)--> (start)
//!      └── nobody there: wait for permit() ── spawn ──^
//!      any state --order Stop--> SIGTERM, 20 s, SIGKILL --> Ended
//!      any state --order StayDead (power cut)--> when the process ends: wait for Stop
//! ```
//!
//! One thread runs `supervise`; others give orders and ask. A csvfs outlives csvd: a new csvd finds it by its socket
//! (whose peer credentials name the process) and adopts it. If csvd dies between spawning and writing the pid
//! file, the socket still leads to the process. One that does not answer while this node must do no I/O is killed
//! ([`crate::silence`]).

use crate::events::EventLog;
use crate::process::{Process, Woken, is_csvfs};
use crate::silence::{LOOK_EVERY, MustStop, SILENT_LIMIT, Silence};
use csv_types::admin::{Answer, Request};
use csvd::client::{self, ClientError};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Wait before the first restart; doubles from there.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest wait before a restart.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A csvfs that ran this long starts again with the shortest wait.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);
/// Time for a clean stop before SIGKILL.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Time for a csvfs found by its pid file to open its socket.
const ADOPT_LIMIT: Duration = Duration::from_secs(10);
/// csvfs tells its role at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Time for csvfs to tell its events.
const EVENTS_LIMIT: Duration = Duration::from_secs(2);

/// What the supervisor has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Keep csvfs running.
    Run,
    /// Do not start it again (power cut).
    StayDead,
    /// End it cleanly, then end.
    Stop,
}

#[derive(Debug)]
struct Status {
    order: Order,
    pid: Option<i32>,
    /// It was looked whether an earlier csvd's csvfs runs.
    looked: bool,
    /// csvfs may be started, once.
    permit: bool,
    ended: bool,
}

/// How far csvfs's events have been fetched.
#[derive(Debug, Default)]
struct Cursor {
    pid: Option<i32>,
    after: u64,
}

/// Where a volume's things are.
#[derive(Debug)]
pub(crate) struct VolumePaths {
    pub(crate) program: PathBuf,
    pub(crate) config: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) mount_point: PathBuf,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) name: String,
    paths: VolumePaths,
    wake: OwnedFd,
    status: Mutex<Status>,
    changed: Condvar,
    cursor: Mutex<Cursor>,
    listener: Mutex<Option<Listener>>,
    must_stop: MustStop,
}

/// Told when the process comes or goes.
pub(crate) struct Listener(Box<dyn Fn() + Send>);

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volume {
    pub(crate) fn new(name: String, paths: VolumePaths, must_stop: MustStop) -> std::io::Result<Volume> {
        Ok(Volume {
            name,
            paths,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            status: Mutex::new(Status {
                order: Order::Run,
                pid: None,
                looked: false,
                permit: false,
                ended: false,
            }),
            changed: Condvar::new(),
            cursor: Mutex::default(),
            listener: Mutex::default(),
            must_stop,
        })
    }

    fn socket(&self) -> PathBuf {
        self.paths.run_dir.join(format!("{}.sock", self.name))
    }

    fn pid_file(&self) -> PathBuf {
        self.paths.run_dir.join(format!("{}.pid", self.name))
    }

    /// Gives an order; the supervisor acts on it at once.
    pub(crate) fn order(&self, order: Order) {
        lock(&self.status).order = order;
        self.changed.notify_all();
        // Fails only when the counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Waits until the supervisor has ended csvfs after `Order::Stop`.
    pub(crate) fn wait_ended(&self) {
        let mut status = lock(&self.status);
        while !status.ended {
            status = self.changed.wait(status).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Process number of csvfs, if it runs.
    pub(crate) fn pid(&self) -> Option<i32> {
        lock(&self.status).pid
    }

    /// Who is told when the process comes or goes.
    pub(crate) fn on_change(&self, listener: Box<dyn Fn() + Send>) {
        *lock(&self.listener) = Some(Listener(listener));
    }

    fn set_pid(&self, pid: Option<i32>) {
        {
            let mut status = lock(&self.status);
            status.pid = pid;
            status.permit = false;
            status.looked |= pid.is_some();
        }
        self.changed.notify_all();
        self.tell();
    }

    /// Passes a request on to csvfs.
    pub(crate) fn ask(&self, request: &Request, limit: Duration) -> Result<Answer, ClientError> {
        client::call(&self.socket(), request, limit)
    }

    /// Fetches csvfs's new events into the log.
    pub(crate) fn collect_events(&self, log: &Mutex<EventLog>) {
        let mut cursor = lock(&self.cursor);
        let pid = self.pid();
        if pid.is_none() {
            return;
        }
        let new_process = cursor.pid != pid;
        if new_process {
            *cursor = Cursor { pid, after: 0 };
        }
        if let Ok(Answer::Events { events }) =
            self.ask(&Request::Events { after: cursor.after }, EVENTS_LIMIT)
        {
            cursor.after = events.last().map_or(cursor.after, |event| event.seq);
            lock(log).import(events, new_process);
        }
    }

    /// The supervisor; returns after `Order::Stop`.
    pub(crate) fn supervise(&self, log: &Mutex<EventLog>) {
        let mut backoff = BACKOFF_MIN;
        loop {
            match self.wait_for_order(None) {
                Order::Run => {}
                Order::StayDead => {
                    self.wait_for_order(Some(Order::StayDead));
                    continue;
                }
                Order::Stop => break,
            }
            let started = Instant::now();
            let adopted = self.adopt(log);
            if adopted.is_none() && !self.wait_permitted() {
                continue;
            }
            let why = match adopted.map_or_else(|| self.spawn(log), Ok) {
                Ok(process) => self.watch(process, log),
                Err(e) => format!("could not be started: {e:#}"),
            };
            backoff = if started.elapsed() >= HEALTHY_AFTER { BACKOFF_MIN } else { backoff };
            let next = match lock(&self.status).order {
                Order::Run => format!("next start in {} ms", backoff.as_millis()),
                Order::StayDead => "it stays down".to_owned(),
                Order::Stop => break,
            };
            lock(log).add(&self.name, "csvfs-ended", format!("csvfs of {} {why}; {next}", self.name));
            self.pause(backoff);
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
        let _ = fs::remove_file(self.pid_file());
        lock(&self.status).ended = true;
        self.changed.notify_all();
    }

    /// The present order; with `unlike`, waits until it is another one.
    fn wait_for_order(&self, unlike: Option<Order>) -> Order {
        let mut status = lock(&self.status);
        while Some(status.order) == unlike {
            status = self.changed.wait(status).unwrap_or_else(PoisonError::into_inner);
        }
        status.order
    }

    /// csvfs is not there: waits until it may be started. False when there is another order now.
    fn wait_permitted(&self) -> bool {
        let mut status = lock(&self.status);
        status.looked = true;
        drop(status);
        self.tell();
        status = lock(&self.status);
        while status.order == Order::Run && !status.permit {
            status = self.changed.wait(status).unwrap_or_else(PoisonError::into_inner);
        }
        status.order == Order::Run && std::mem::take(&mut status.permit)
    }

    /// csvfs may be started now, if it does not run. Holds for one start.
    pub(crate) fn permit(&self) {
        let mut status = lock(&self.status);
        if status.looked && status.pid.is_none() {
            status.permit = true;
            self.changed.notify_all();
        }
    }

    /// Is it certain that csvfs does not run?
    pub(crate) fn is_absent(&self) -> bool {
        let status = lock(&self.status);
        status.looked && status.pid.is_none()
    }

    fn tell(&self) {
        if let Some(Listener(tell)) = &*lock(&self.listener) {
            tell();
        }
    }

    /// Waits out the back-off; ends early at an order.
    fn pause(&self, time: Duration) {
        let status = lock(&self.status);
        let unchanged = |status: &mut Status| status.order == Order::Run;
        drop(self.changed.wait_timeout_while(status, time, unchanged));
    }

    /// Stays with the process until it ends, by itself or by order. Returns how it ended.
    fn watch(&self, mut process: Process, log: &Mutex<EventLog>) -> String {
        self.set_pid(Some(process.pid()));
        if let Err(e) = self.write_pid_file(process.pid()) {
            tracing::warn!(volume = self.name, error = %e, "cannot write the pid file");
        }
        let mut silence = Silence::default();
        loop {
            match process.wait(Some(&self.wake), Some(LOOK_EVERY)) {
                Ok(Woken::Order) => {
                    let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
                    if lock(&self.status).order == Order::Stop {
                        self.end(&process);
                        break;
                    }
                }
                Ok(Woken::Timeout) => self.end_silent(&process, &mut silence, log),
                Ok(Woken::Exited) => break,
                Err(e) => {
                    tracing::error!(volume = self.name, error = %e, "cannot wait for csvfs; killing it");
                    process.signal(Signal::KILL);
                    break;
                }
            }
        }
        // Before the process is reaped: so long its number cannot be given to another group.
        process.kill_group();
        let outcome = process.outcome();
        self.set_pid(None);
        outcome
    }

    /// What follows is as after any end: it is seen that nothing stays mounted.
    fn end_silent(&self, process: &Process, silence: &mut Silence, log: &Mutex<EventLog>) {
        let why = self.must_stop.why();
        let request = Request::RoleStatus { volume: self.name.clone() };
        let answers = || self.ask(&request, ANSWER_LIMIT).is_ok();
        if !silence.look(Instant::now(), SILENT_LIMIT, why.is_some(), answers) {
            return;
        }
        let text = format!(
            "csvfs of {} does not answer, and I/O has to stop here ({}); it is killed",
            self.name,
            why.unwrap_or_default()
        );
        lock(log).add(&self.name, "csvfs-silent", text);
        process.signal(Signal::KILL);
    }

    fn end(&self, process: &Process) {
        process.signal(Signal::TERM);
        if !matches!(process.wait(None, Some(STOP_LIMIT)), Ok(Woken::Exited)) {
            tracing::warn!(volume = self.name, "csvfs did not end within 20 s of SIGTERM; killing it");
            process.signal(Signal::KILL);
            if !matches!(process.wait(None, Some(STOP_LIMIT)), Ok(Woken::Exited)) {
                tracing::error!(volume = self.name, "csvfs cannot be killed; it hangs in the kernel");
            }
        }
    }

    fn write_pid_file(&self, pid: i32) -> std::io::Result<()> {
        let new = self.pid_file().with_extension("pid.new");
        fs::write(&new, format!("{pid}\n"))?;
        fs::rename(new, self.pid_file())
    }

    fn spawn(&self, log: &Mutex<EventLog>) -> anyhow::Result<Process> {
        detach_dead_mount(&self.paths.mount_point);
        fs::create_dir_all(&self.paths.mount_point)?;
        let config = self.paths.config.to_string_lossy();
        let process = Process::spawn(&self.paths.program, &["--config", &config, "--volume", &self.name])?;
        let text = format!("csvfs of {} started as process {}", self.name, process.pid());
        lock(log).add(&self.name, "csvfs-started", text);
        Ok(process)
    }

    /// A csvfs that an earlier csvd started. One that lives but does not listen is killed.
    fn adopt(&self, log: &Mutex<EventLog>) -> Option<Process> {
        if let Some(process) = self.listener() {
            let text = format!("csvfs of {} runs already as process {}", self.name, process.pid());
            lock(log).add(&self.name, "csvfs-adopted", text);
            return Some(process);
        }
        let number = fs::read_to_string(self.pid_file()).ok()?.trim().parse().ok()?;
        let pid = Pid::from_raw(number).filter(|&pid| is_csvfs(pid, &self.name))?;
        let process = Process::adopt(pid).ok()?;
        let deadline = Instant::now() + ADOPT_LIMIT;
        while Instant::now() < deadline {
            // A socket that is not there yet cannot be waited for; the process's end can.
            match process.wait(None, Some(Duration::from_millis(100))) {
                Ok(Woken::Timeout) => {}
                Ok(Woken::Exited | Woken::Order) | Err(_) => return None,
            }
            if let Some(process) = self.listener() {
                return Some(process);
            }
        }
        let text = format!("csvfs of {} (process {number}) does not listen; killed", self.name);
        lock(log).add(&self.name, "csvfs-stuck", text);
        process.signal(Signal::KILL);
        let _ = process.wait(None, Some(STOP_LIMIT));
        None
    }

    fn listener(&self) -> Option<Process> {
        let stream = UnixStream::connect(self.socket()).ok()?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
        Process::adopt(peer.pid).ok()
    }
}

/// Takes away the FUSE mount that a dead csvfs left, so that the next one can mount. Nothing to do is no error.
fn detach_dead_mount(mount_point: &Path) {
    let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else { return };
    let wanted = mount_point.to_string_lossy().replace(' ', "\\040");
    let fuse_mounts = mounts
        .lines()
        .filter(|line| line.split(' ').nth(4) == Some(&wanted) && line.contains(" - fuse"))
        .count();
    for _ in 0..fuse_mounts {
        if let Err(e) = unmount(mount_point, UnmountFlags::DETACH) {
            tracing::warn!(path = %mount_point.display(), error = %e, "cannot detach the dead mount");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use csv_types::NodeId;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    const LIMIT: Duration = Duration::from_secs(30);

    /// A csvfs that never listens: enough to be supervised.
    fn volume(dir: &Path) -> Arc<Volume> {
        volume_that(dir, MustStop::new(|| None))
    }

    fn volume_that(dir: &Path, must_stop: MustStop) -> Arc<Volume> {
        let program = dir.join("csvfs");
        fs::write(&program, "#!/bin/sh\nexec sleep 600\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let paths = VolumePaths {
            program,
            config: dir.join("csv.toml"),
            run_dir: dir.to_owned(),
            mount_point: dir.join("mount"),
        };
        let volume = Arc::new(Volume::new("Volume1".into(), paths, must_stop).unwrap());
        // As an agent whose node may use the LUN.
        let agent = Arc::downgrade(&volume);
        volume.on_change(Box::new(move || {
            if let Some(volume) = agent.upgrade() {
                volume.permit();
            }
        }));
        volume
    }

    fn wait_pid(volume: &Volume, wanted: impl Fn(Option<i32>) -> bool) -> Option<i32> {
        let status = lock(&volume.status);
        let (status, result) =
            volume.changed.wait_timeout_while(status, LIMIT, |status| !wanted(status.pid)).unwrap();
        assert!(!result.timed_out(), "pid stays {:?}", status.pid);
        status.pid
    }

    fn kill(pid: Option<i32>) {
        Process::adopt(pid.and_then(Pid::from_raw).unwrap()).unwrap().signal(Signal::KILL);
    }

    #[test]
    fn a_dead_csvfs_is_started_again_until_told_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let log = Arc::new(Mutex::new(EventLog::open(dir.path(), NodeId(1))));
        let (supervisor, its_log) = (Arc::clone(&volume), Arc::clone(&log));
        let thread = std::thread::spawn(move || supervisor.supervise(&its_log));

        let first = wait_pid(&volume, |pid| pid.is_some());
        kill(first);
        let second = wait_pid(&volume, |pid| pid.is_some() && pid != first);
        volume.order(Order::StayDead);
        kill(second);
        let stays_down = || lock(&log).after(0).iter().any(|event| event.message.ends_with("stays down"));
        let deadline = Instant::now() + LIMIT;
        while !stays_down() {
            assert!(Instant::now() < deadline, "no event of the power cut");
            std::thread::yield_now();
        }
        volume.order(Order::Stop);
        volume.wait_ended();
        thread.join().unwrap();

        let kinds: Vec<String> = lock(&log).after(0).into_iter().map(|event| event.kind).collect();
        assert_eq!(kinds, ["csvfs-started", "csvfs-ended", "csvfs-started", "csvfs-ended"]);
        assert!(!volume.pid_file().exists());
    }

    #[test]
    fn a_csvfs_that_does_not_answer_is_killed_while_the_node_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let cut_off = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let is_cut_off = Arc::clone(&cut_off);
        let why =
            move || is_cut_off.load(std::sync::atomic::Ordering::SeqCst).then(|| "no quorum".to_owned());
        let volume = volume_that(dir.path(), MustStop::new(why));
        let log = Arc::new(Mutex::new(EventLog::open(dir.path(), NodeId(1))));
        let (supervisor, its_log) = (Arc::clone(&volume), Arc::clone(&log));
        let thread = std::thread::spawn(move || supervisor.supervise(&its_log));
        let first = wait_pid(&volume, |pid| pid.is_some());
        cut_off.store(true, std::sync::atomic::Ordering::SeqCst);
        wait_pid(&volume, |pid| pid.is_some() && pid != first);
        volume.order(Order::Stop);
        volume.wait_ended();
        thread.join().unwrap();
        let events = lock(&log).after(0);
        let silent = events.iter().find(|event| event.kind == "csvfs-silent").unwrap();
        assert!(silent.message.contains("no quorum"), "{}", silent.message);
        assert!(events.iter().any(|event| event.message.contains("signal 9")));
    }

    #[test]
    fn stop_ends_a_running_csvfs() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let log = Arc::new(Mutex::new(EventLog::open(dir.path(), NodeId(1))));
        let supervisor = Arc::clone(&volume);
        let thread = std::thread::spawn(move || supervisor.supervise(&log));
        let pid = wait_pid(&volume, |pid| pid.is_some());
        let process = Process::adopt(pid.and_then(Pid::from_raw).unwrap()).unwrap();
        volume.order(Order::Stop);
        volume.wait_ended();
        thread.join().unwrap();
        assert_eq!(process.wait(None, Some(Duration::ZERO)).unwrap(), Woken::Exited);
    }
}
