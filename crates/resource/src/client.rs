//! csvd's side of resource hosts: starting one, finding those of an earlier csvd, talking.
//!
//! Threads: one per host reads and hands every message to `on_event`; one per started host waits for its end, so that no
//! zombie is left. Nobody who says something waits for the host for longer than [`SAY_LIMIT`]: one that does not read is
//! as good as gone, and treated so. A host is ended by [`Host::kill`] or by [`ToHost::End`] only; dropping a
//! [`Host`] ends the connection, and the host goes on under its lease.

use crate::api::NodeInfo;
use crate::processes;
use crate::protocol::{FromHost, LINE_BYTES_MAX, Snapshot, ToHost, VERSION};
use parking_lot::Mutex;
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// For a host to take a message.
pub const SAY_LIMIT: Duration = Duration::from_secs(5);
/// For a host to answer `Hello`.
const WELCOME_LIMIT: Duration = Duration::from_secs(10);
/// For a process whose connection ended to be gone, when it is said why.
const GONE_LIMIT: Duration = Duration::from_secs(1);

/// Why there is no connection to a host.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A host of that name is there already.
    #[error("a resource host {0} is there already")]
    Exists(String),
    /// It said something else than `Welcome`, or ended.
    #[error("resource host {name} does not answer: {why}")]
    NoWelcome {
        /// Host.
        name: String,
        /// What it did.
        why: String,
    },
    /// It speaks another version of the protocol.
    #[error(
        "resource host {name} (process {pid}) speaks version {version} of the protocol, this is {VERSION}"
    )]
    Version {
        /// Host.
        name: String,
        /// Its process.
        pid: u32,
        /// Its version.
        version: u32,
    },
    /// The connection is lost.
    #[error("the connection to resource host {0} is lost")]
    Gone(String),
}

/// What a host says, or that it does no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostEvent {
    /// A message.
    Said(FromHost),
    /// The connection is lost, nothing more comes. Whether the process is there still says [`Host::is_running`].
    Gone {
        /// Why.
        why: String,
    },
}

/// Hears events, in the order of their arrival, on a thread of the host's own.
pub type OnEvent = Box<dyn Fn(HostEvent) + Send>;

/// A connection to a resource host.
pub struct Host {
    name: String,
    pid: u32,
    pidfd: Arc<OwnedFd>,
    stream: Mutex<UnixStream>,
    welcome: Vec<Snapshot>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("name", &self.name).field("pid", &self.pid).finish_non_exhaustive()
    }
}

impl Host {
    /// Starts `program` (csv-rhs) as a host of that name and connects. It leads a session of its own, and outlives csvd.
    ///
    /// # Errors
    /// One of that name is there; it cannot be started; it does not answer in time (it is killed then).
    pub fn start(
        program: &Path,
        run_dir: &Path,
        host_name: &str,
        node: NodeInfo,
        on_event: OnEvent,
    ) -> Result<Host, ClientError> {
        let path = socket_path(run_dir, host_name);
        if let Some(directory) = path.parent() {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
            made.map_err(|e| failed(format!("making {}", directory.display()), e))?;
        }
        if UnixStream::connect(&path).is_ok() {
            return Err(ClientError::Exists(host_name.to_owned()));
        }
        remove_socket(&path)?;
        let listener =
            UnixListener::bind(&path).map_err(|e| failed(format!("binding {}", path.display()), e))?;
        let child = Command::new(program)
            .arg(host_name)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .current_dir("/")
            .spawn();
        let mut child = child.map_err(|e| {
            // Nobody listens there.
            let _ = fs::remove_file(&path);
            failed(format!("starting {}", program.display()), e)
        })?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let reaped = thread::Builder::new().name("rhs-reaper".to_owned()).spawn(move || child.wait());
        let pidfd = Arc::new(pidfd.map_err(|e| failed("pidfd_open".to_owned(), e.into()))?);
        let host = reaped
            .map_err(|e| failed("starting a thread".to_owned(), e))
            .and_then(|_| UnixStream::connect(&path).map_err(|e| no_welcome(host_name, &e)))
            .and_then(|stream| Host::greet(host_name, stream, Some(Arc::clone(&pidfd)), node, on_event));
        if host.is_err() {
            // It may have ended by itself.
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
            let _ = fs::remove_file(&path);
        }
        host
    }

    /// Connects to a host that an earlier csvd has started. `None` when there is none of that name; what it left of its
    /// socket is removed.
    ///
    /// # Errors
    /// It is there and does not answer in time.
    pub fn adopt(
        run_dir: &Path,
        host_name: &str,
        node: NodeInfo,
        on_event: OnEvent,
    ) -> Result<Option<Host>, ClientError> {
        let path = socket_path(run_dir, host_name);
        match UnixStream::connect(&path) {
            Ok(stream) => Host::greet(host_name, stream, None, node, on_event).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                remove_socket(&path)?;
                Ok(None)
            }
            Err(e) => Err(failed(format!("connecting to {}", path.display()), e)),
        }
    }

    /// Names of hosts that are there, in order.
    #[must_use]
    pub fn list(run_dir: &Path) -> Vec<String> {
        let Ok(entries) = fs::read_dir(run_dir.join("rhs")) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|end| end == "sock"))
            .filter(|path| UnixStream::connect(path).is_ok())
            .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
            .collect();
        names.sort();
        names
    }

    /// Says something. On failure the connection is ended, `Gone` follows.
    ///
    /// # Errors
    /// It is lost, or the host does not read.
    pub fn say(&self, said: &ToHost) -> Result<(), ClientError> {
        let stream = self.stream.lock();
        write_line(&stream, said).map_err(|e| {
            tracing::warn!(host = self.name, "cannot tell the resource host anything: {e}");
            // Half a line may be on its way: nothing can follow it.
            let _ = stream.shutdown(Shutdown::Both);
            ClientError::Gone(self.name.clone())
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Is its process there?
    #[must_use]
    pub fn is_running(&self) -> bool {
        !processes::poll_one(&*self.pidfd, Duration::ZERO)
    }

    /// Waits for the end of its process. False when the time is over.
    #[must_use]
    pub fn wait_for_end(&self, limit: Duration) -> bool {
        processes::poll_one(&*self.pidfd, limit)
    }

    /// Kills it with SIGKILL; what is online goes on. Nothing happens when it has ended.
    pub fn kill(&self) {
        // It may have ended, which is as good.
        let _ = pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }

    /// What was open when the connection was made.
    #[must_use]
    pub fn welcome(&self) -> &[Snapshot] {
        &self.welcome
    }

    fn greet(
        name: &str,
        stream: UnixStream,
        pidfd: Option<Arc<OwnedFd>>,
        node: NodeInfo,
        on_event: OnEvent,
    ) -> Result<Host, ClientError> {
        let no_welcome = |why: String| ClientError::NoWelcome { name: name.to_owned(), why };
        let prepare = || -> io::Result<UnixStream> {
            stream.set_write_timeout(Some(SAY_LIMIT))?;
            stream.set_read_timeout(Some(WELCOME_LIMIT))?;
            write_line(&stream, &ToHost::Hello { version: VERSION, node })?;
            stream.try_clone()
        };
        let mut lines = Lines::new(prepare().map_err(|e| no_welcome(e.to_string()))?);
        let first = lines.next_line().map_err(|e| no_welcome(e.to_string()))?;
        let (version, pid, welcome) = match first {
            Some(FromHost::Welcome { version, pid, resources }) => (version, pid, resources),
            Some(other) => return Err(no_welcome(format!("it says {other:?}"))),
            None => return Err(no_welcome("it has ended".to_owned())),
        };
        if version != VERSION {
            return Err(ClientError::Version { name: name.to_owned(), pid, version });
        }
        stream.set_read_timeout(None).map_err(|e| no_welcome(e.to_string()))?;
        let pidfd = match pidfd {
            Some(pidfd) => pidfd,
            None => Arc::new(hold(pid).map_err(|e| failed(format!("holding process {pid}"), e))?),
        };
        let held = Arc::clone(&pidfd);
        thread::Builder::new()
            .name(format!("rhs-{name}"))
            .spawn(move || {
                let why = read_all(&mut lines, &on_event);
                let ended = processes::poll_one(&*held, GONE_LIMIT);
                let why = if ended { "its process has ended".to_owned() } else { why };
                on_event(HostEvent::Gone { why });
            })
            .map_err(|e| failed("starting a thread".to_owned(), e))?;
        Ok(Host { name: name.to_owned(), pid, pidfd, stream: Mutex::new(stream), welcome })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Ends the reading thread.
        let _ = self.stream.get_mut().shutdown(Shutdown::Both);
    }
}

/// Path of a host's socket.
#[must_use]
pub fn socket_path(run_dir: &Path, host_name: &str) -> PathBuf {
    run_dir.join("rhs").join(format!("{host_name}.sock"))
}

/// One that ended at once refuses the connection or breaks it, as it happens.
fn no_welcome(name: &str, why: &dyn fmt::Display) -> ClientError {
    ClientError::NoWelcome { name: name.to_owned(), why: why.to_string() }
}

fn failed(what: String, source: io::Error) -> ClientError {
    ClientError::Io { what, source }
}

fn hold(pid: u32) -> io::Result<OwnedFd> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let number = number.ok_or_else(|| io::Error::other("no process number"))?;
    Ok(pidfd_open(number, PidfdFlags::empty())?)
}

fn remove_socket(path: &Path) -> Result<(), ClientError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(failed(format!("removing {}", path.display()), e))
        }
        _ => Ok(()),
    }
}

fn write_line(mut stream: &UnixStream, said: &ToHost) -> io::Result<()> {
    let mut line = serde_json::to_vec(said)?;
    line.push(b'\n');
    if line.len() > LINE_BYTES_MAX {
        return Err(io::Error::other(format!("a message of {} bytes is too long", line.len())));
    }
    stream.write_all(&line)
}

fn read_all(lines: &mut Lines, on_event: &OnEvent) -> String {
    loop {
        match lines.next_line() {
            Ok(Some(said)) => on_event(HostEvent::Said(said)),
            Ok(None) => return "the connection was closed".to_owned(),
            Err(e) => return e.to_string(),
        }
    }
}

/// Messages of a host.
struct Lines {
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl Lines {
    fn new(stream: UnixStream) -> Lines {
        Lines { stream: BufReader::new(stream), line: Vec::new() }
    }

    /// `None` at the end.
    fn next_line(&mut self) -> io::Result<Option<FromHost>> {
        self.line.clear();
        let limit = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
        self.stream.by_ref().take(limit).read_until(b'\n', &mut self.line)?;
        match self.line.last() {
            Some(b'\n') => Ok(serde_json::from_slice(&self.line).map(Some)?),
            Some(_) if self.line.len() == LINE_BYTES_MAX => Err(io::Error::other("a line is too long")),
            // A host that was killed in the middle of a line.
            Some(_) | None => Ok(None),
        }
    }
}
