//! Supervision of a private smbd.
//!
//! ```text
//! start ──> starting ──port answers──> serving ──exit──> waiting (backoff) ──> starting ...
//!              └─exit before it served: error with the last log lines      └─ RESTARTS_MAX in a row: given up
//! stop, drop: SIGTERM, after STOP_PATIENCE SIGKILL, and SIGKILL for its session processes in any case
//! ```
//!
//! One thread owns the child. smbd forks a process per connection; all are in a process group of their own, and
//! when the parent is gone the rest of the group is killed before anything else happens, because such a process
//! would go on serving old connections. What a killed supervisor leaves behind is ended at the next start.

use crate::smbd_conf::Layout;
pub use crate::smbd_config::{SmbdConfig, SmbdError};
use crate::smbd_setup;
use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io::{ErrorKind, PipeReader, PipeWriter};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Exits in a row, without a long run between them, after which smbd is given up.
const RESTARTS_MAX: u32 = 10;
/// A run this long sets the count of exits back.
const LONG_RUN: Duration = Duration::from_secs(60);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// How long SIGTERM may take.
const STOP_PATIENCE: Duration = Duration::from_secs(3);
/// How long smbd may take until its port answers.
const READY_PATIENCE: Duration = Duration::from_secs(20);
const LOG_LINES: usize = 6;

/// Told about exits and restarts, in words for the event log.
pub type OnEvent = Box<dyn Fn(String) + Send + Sync>;

#[derive(Debug, Clone, Default)]
struct Life {
    pid: Option<u32>,
    /// Of the last process that ended.
    exited: Option<String>,
    stopped: bool,
}

#[derive(Debug, Default)]
struct Shared {
    life: Mutex<Life>,
    changed: Condvar,
}

/// A running, supervised smbd. Dropping it stops it.
#[derive(Debug)]
pub struct Smbd {
    addr: SocketAddr,
    log: PathBuf,
    shared: Arc<Shared>,
    /// Closing it tells the thread to stop.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Smbd {
    /// Prepares and starts an instance and waits until it answers.
    ///
    /// # Errors
    /// Everything that keeps it from serving; nothing is left running then.
    pub fn start(config: SmbdConfig, on_event: OnEvent) -> Result<Self, SmbdError> {
        let layout = Layout::new(&config.base_dir, &config.run_dir);
        smbd_setup::prepare(&config, &layout)?;
        let log = layout.log.clone();
        let shared = Arc::new(Shared::default());
        let failed = |source| SmbdError::Start { program: "smbd", source };
        let (wake, stop) = std::io::pipe().map_err(failed)?;
        let child = spawn(&layout)?;
        shared.life.lock().pid = Some(child.id());
        let mut keeper = Keeper { layout, shared: shared.clone(), wake, on_event, exits: 0 };
        let thread = std::thread::Builder::new()
            .name("smbd-keeper".into())
            .spawn(move || keeper.run(child))
            .map_err(failed)?;
        let addr = SocketAddr::new(config.addr, config.port);
        let smbd = Smbd { addr, log, shared, stop: Some(stop), thread: Some(thread) };
        smbd.wait_ready(READY_PATIENCE)?;
        Ok(smbd)
    }

    /// Waits until the port answers.
    ///
    /// # Errors
    /// `Exited` as soon as smbd ends, `NotReady` when the time is over.
    pub fn wait_ready(&self, patience: Duration) -> Result<(), SmbdError> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(5);
        loop {
            if TcpStream::connect_timeout(&self.addr, Duration::from_millis(500)).is_ok() {
                return Ok(());
            }
            let mut life = self.shared.life.lock();
            // Returns early when the process ends or is started again.
            if life.exited.is_none() {
                self.shared.changed.wait_for(&mut life, pause);
            }
            if let Some(status) = life.exited.clone() {
                let lines = last_lines(&self.log);
                return Err(SmbdError::Exited { status, log: self.log.clone(), lines });
            }
            drop(life);
            pause = (pause * 2).min(Duration::from_millis(200));
            if start.elapsed() > patience {
                return Err(SmbdError::NotReady {
                    addr: self.addr,
                    waited: start.elapsed(),
                    log: self.log.clone(),
                });
            }
        }
    }

    /// Process id of smbd; `None` while it is not running.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.shared.life.lock().pid
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Was it stopped, or given up after too many exits?
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.shared.life.lock().stopped
    }

    /// Stops smbd with all its connections; returns when it is gone.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed already, and there is nothing else to do about it.
            let _ = thread.join();
        }
    }
}

impl Drop for Smbd {
    fn drop(&mut self) {
        self.end();
    }
}

fn spawn(layout: &Layout) -> Result<Child, SmbdError> {
    Command::new("smbd")
        .args(["--foreground", "--no-process-group"])
        .arg("--configfile")
        .arg(&layout.conf)
        // Before it has read the configuration it would write to the machine's log directory.
        .arg("--log-basename")
        .arg(&layout.log_dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|source| {
            if source.kind() == ErrorKind::NotFound {
                SmbdError::Missing { program: "smbd", package: "samba" }
            } else {
                SmbdError::Start { program: "smbd", source }
            }
        })
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    Stop,
    Exit,
    Time,
}

/// The thread that owns the child.
struct Keeper {
    layout: Layout,
    shared: Arc<Shared>,
    wake: PipeReader,
    on_event: OnEvent,
    /// Exits in a row.
    exits: u32,
}

impl Keeper {
    fn run(&mut self, child: Child) {
        let mut next = Some(child);
        while let Some(child) = next.take() {
            let started = Instant::now();
            let Some(status) = self.attend(child) else { break };
            if started.elapsed() > LONG_RUN {
                self.exits = 0;
            }
            next = self.start_again(&status);
        }
        let mut life = self.shared.life.lock();
        life.pid = None;
        life.stopped = true;
        self.shared.changed.notify_all();
    }

    /// Waits for the child's end; `None` when it was stopped on purpose.
    fn attend(&self, mut child: Child) -> Option<String> {
        let pidfd = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let Some(pidfd) = pidfd else {
            end_group(&mut child);
            return Some("it cannot be watched: the kernel gave no pidfd".to_owned());
        };
        let woken = self.wait(Some(&pidfd), None);
        if woken == Woken::Stop {
            let _ = pidfd_send_signal(&pidfd, Signal::TERM);
            wait_gone(&pidfd, STOP_PATIENCE);
        }
        let status = end_group(&mut child);
        let text = status.map_or_else(|| "status unknown".to_owned(), |status| status.to_string());
        let mut life = self.shared.life.lock();
        life.pid = None;
        life.exited = Some(text.clone());
        self.shared.changed.notify_all();
        (woken == Woken::Exit).then_some(text)
    }

    /// A new child after a pause; `None` when it is stopped or given up.
    fn start_again(&mut self, status: &str) -> Option<Child> {
        let mut why = format!("smbd ended ({status}): {}", last_lines(&self.layout.log));
        loop {
            self.exits += 1;
            if self.exits > RESTARTS_MAX {
                (self.on_event)(format!(
                    "{why}; given up after {RESTARTS_MAX} restarts, redirected I/O by SMB stops"
                ));
                return None;
            }
            let pause = (BACKOFF_MIN * 2u32.saturating_pow(self.exits - 1)).min(BACKOFF_MAX);
            (self.on_event)(format!("{why}; starting it again in {pause:?}"));
            if self.wait(None, Some(pause)) == Woken::Stop {
                return None;
            }
            match spawn(&self.layout) {
                Ok(child) => {
                    let mut life = self.shared.life.lock();
                    life.pid = Some(child.id());
                    life.exited = None;
                    self.shared.changed.notify_all();
                    return Some(child);
                }
                Err(error) => why = error.to_string(),
            }
        }
    }

    fn wait(&self, pidfd: Option<&OwnedFd>, pause: Option<Duration>) -> Woken {
        let deadline = pause.map(|pause| Instant::now() + pause);
        loop {
            let left = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
            let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
            fds.extend(pidfd.map(|pidfd| PollFd::new(pidfd, PollFlags::IN)));
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Woken::Time,
                Ok(_) if !fds[0].revents().is_empty() => return Woken::Stop,
                Ok(_) => return Woken::Exit,
                Err(rustix::io::Errno::INTR) => {}
                // Out of memory, at worst: stop rather than spin.
                Err(_) => return Woken::Stop,
            }
        }
    }
}

/// Kills what is left of the child's process group, then reaps the child. In this order, because the group's
/// number cannot be used again as long as the child is not reaped.
fn end_group(child: &mut Child) -> Option<ExitStatus> {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
    child.wait().ok()
}

/// Waits until the process has ended. True when it has.
pub(crate) fn wait_gone<Fd: AsFd>(pidfd: &Fd, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let left = timespec(deadline.saturating_duration_since(Instant::now()));
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec::try_from(duration).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 })
}

fn last_lines(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let from = lines.len().saturating_sub(LOG_LINES);
    if lines.is_empty() { "its log is empty".to_owned() } else { lines[from..].join(" | ") }
}
