//! The one smbd of a group: started with its first share, told of others, stopped with its last.
//!
//! ```text
//! <run_dir>/fileserver/<group>/    smb.conf, shares/<resource> (one each), server.json, sockets, pids
//! <state_dir>/fileserver/<group>/  private/passdb.tdb, private/secrets.tdb (checkpoints of the group), log, cache
//! ```
//!
//! Everything is changed under flock(2) on `<run>/guard`, since several hosts may have shares of one group. smbd is a daemon
//! in a session of its own and outlives every host. It counts as ours by process number and start time; its sessions, which
//! would go on serving when it is killed, are found by the files of the lock directory that they have open.

use super::conf::{self, Layout, Settings};
use super::process::{Process, is_listening, signal, users_of};
use crate::api::{Context, Failure};
use crate::types::run::{Program, pause};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest path of a Unix socket that the kernel takes, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// For one of Samba's tools.
pub(super) const TOOL_LIMIT: Duration = Duration::from_secs(20);
/// How long smbd may take until it listens.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long another share's change may take.
const GUARD_LIMIT: Duration = Duration::from_secs(60);
/// How long SIGTERM may take.
const STOP_LIMIT: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(20);
/// Lines of the log in a message.
const LOG_LINES: usize = 4;

/// The server of a group.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) layout: Layout,
    pub(super) settings: Settings,
    group: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Running {
    process: Process,
    settings: Settings,
}

/// A name as file name.
pub(super) fn escape(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    name.chars().map(|c| if plain(c) { c.to_string() } else { format!("+{:x}", u32::from(c)) }).collect()
}

impl Server {
    pub(super) fn new(layout: Layout, settings: Settings, group: &str) -> Self {
        Server { layout, settings, group: group.to_owned() }
    }

    fn io(what: &Path, error: impl std::fmt::Display) -> Failure {
        Failure::new(format!("{} cannot be written: {error}", what.display()))
    }

    fn share_file(&self, resource: &str) -> PathBuf {
        self.layout.shares().join(escape(resource))
    }

    fn prepare(&self) -> Result<(), Failure> {
        let socket = self.layout.lock().join("msg.sock/4194304");
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(Failure::Config(format!(
                "the directory {} is too long for sockets in it; give the group a shorter name",
                self.layout.run.display()
            )));
        }
        for dir in self.layout.dirs() {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
            made.map_err(|error| Self::io(&dir, error))?;
        }
        Ok(())
    }

    /// Waits for its turn; it ends when the file is dropped.
    fn guard(&self, context: &Context) -> Result<File, Failure> {
        let path = self.layout.run.join("guard");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.map_err(|error| Self::io(&path, error))?;
        let deadline = Instant::now() + GUARD_LIMIT;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => pause(context, TICK)?,
                Err(errno) => {
                    let text = format!("another share of the group {} keeps {}", self.group, path.display());
                    return Err(Failure::new(format!("{text}: {errno}")));
                }
            }
        }
    }

    fn share_files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.layout.shares()).into_iter().flatten().flatten();
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        files.retain(|file| file.extension().is_none());
        files.sort();
        files
    }

    fn write_conf(&self, files: &[PathBuf]) -> Result<(), Failure> {
        let guests = files.iter().any(|file| {
            fs::read_to_string(file).is_ok_and(|text| text.lines().any(|line| line == "guest ok = yes"))
        });
        write(&self.layout.conf(), &conf::main(&self.settings, &self.layout, files, guests))
    }

    fn record(&self) -> PathBuf {
        self.layout.run.join("server.json")
    }

    fn running(&self) -> Option<Running> {
        let text = fs::read_to_string(self.record()).ok()?;
        let running: Running = serde_json::from_str(&text).ok()?;
        running.process.is_alive().then_some(running)
    }

    /// Adds a share, starting the server if it does not run.
    ///
    /// # Errors
    /// The share is not served.
    pub(super) fn add(
        &self,
        context: &Context,
        resource: &str,
        name: &str,
        text: &str,
    ) -> Result<(), Failure> {
        self.prepare()?;
        let _guard = self.guard(context)?;
        let file = self.share_file(resource);
        let head = format!("[{}]", name.to_lowercase());
        for other in self.share_files().iter().filter(|other| **other != file) {
            let other_text = fs::read_to_string(other).unwrap_or_default();
            if other_text.lines().next().is_some_and(|line| line.to_lowercase() == head) {
                return Err(Failure::Config(format!(
                    "the group {} has a share \"{name}\" already; choose another name",
                    self.group
                )));
            }
        }
        let running = self.running();
        if let Some(running) = running.as_ref().filter(|running| running.settings != self.settings) {
            return Err(Failure::Config(format!(
                "the file server of the group {} runs as {} on {} port {} with passwords in {}; all its shares must have the \
                 same addresses, name, port, workgroup and passdb_dir, and changes need all of them offline once",
                self.group,
                running.settings.server,
                running.settings.addresses.join(" "),
                running.settings.port,
                running.settings.private.display()
            )));
        }
        write(&file, text)?;
        self.write_conf(&self.share_files())?;
        if running.is_some() {
            return self.smbcontrol(context, &["reload-config"]);
        }
        self.start(context)
    }

    /// Takes a share away, stopping the server with the last one.
    ///
    /// # Errors
    /// Something is still served.
    pub(super) fn remove(&self, context: &Context, resource: &str, name: &str) -> Result<(), Failure> {
        if !self.layout.run.is_dir() {
            return Ok(());
        }
        let _guard = self.guard(context)?;
        let file = self.share_file(resource);
        match fs::remove_file(&file) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Self::io(&file, error)),
            _ => {}
        }
        let left = self.share_files();
        if left.is_empty() {
            return self.stop(context);
        }
        self.write_conf(&left)?;
        if self.running().is_some() {
            self.smbcontrol(context, &["reload-config"])?;
            // Who has it open still would keep it.
            self.smbcontrol(context, &["close-share", name])?;
        }
        Ok(())
    }

    fn smbcontrol(&self, context: &Context, args: &[&str]) -> Result<(), Failure> {
        let conf = format!("--configfile={}", self.layout.conf().display());
        let what = format!("the file server of the group {} could not be told", self.group);
        let program = Program::new("smbcontrol", "samba-common-bin", TOOL_LIMIT);
        program.args([&conf, "smbd"]).args(args.iter().copied()).succeed(context, &what).map(drop)
    }

    /// The addresses that it listens on.
    pub(super) fn sockets(&self) -> Vec<SocketAddr> {
        let addresses = self.settings.addresses.iter();
        let parsed = addresses.filter_map(|text| text.split('/').next()?.parse::<IpAddr>().ok());
        parsed.map(|addr| SocketAddr::new(addr, self.settings.port)).collect()
    }

    fn start(&self, context: &Context) -> Result<(), Failure> {
        self.end_sessions(context)?;
        for addr in self.sockets() {
            // smbd would only write it to its log.
            if let Err(error) = TcpListener::bind(addr) {
                return Err(cannot_listen(addr, &error));
            }
        }
        let _ = fs::remove_file(self.layout.pid_file());
        context.progress(&format!("starting smbd for the group {}", self.group));
        let log_dir = self.layout.state.join("log");
        Program::new("smbd", "samba", READY_LIMIT)
            .args(["--daemon".to_owned()])
            .args([format!("--configfile={}", self.layout.conf().display())])
            .args([format!("--log-basename={}", log_dir.display())])
            .succeed(context, "smbd could not be started")?;
        self.await_ready(context)
    }

    fn await_ready(&self, context: &Context) -> Result<(), Failure> {
        let deadline = Instant::now() + READY_LIMIT;
        let mut seen = None;
        loop {
            let pid =
                fs::read_to_string(self.layout.pid_file()).ok().and_then(|text| text.trim().parse().ok());
            let process = pid.and_then(Process::find);
            if let Some(process) = process.filter(|_| self.sockets().into_iter().all(is_listening)) {
                let running = Running { process, settings: self.settings.clone() };
                let text = serde_json::to_string(&running).map_err(Failure::new)?;
                return write(&self.record(), &text);
            }
            let ended = seen.is_some() && process.is_none();
            if ended || Instant::now() >= deadline {
                let how = if ended { "ended at once" } else { "does not listen" };
                return Err(Failure::new(format!(
                    "smbd of the group {} {how}; the end of its log {}: {}",
                    self.group,
                    self.layout.log().display(),
                    self.last_lines()
                )));
            }
            seen = seen.or(process);
            pause(context, TICK)?;
        }
    }

    fn last_lines(&self) -> String {
        let text = fs::read(self.layout.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join(" | ")
    }

    fn stop(&self, context: &Context) -> Result<(), Failure> {
        if let Some(running) = self.running() {
            signal(running.process, Signal::TERM);
            let deadline = Instant::now() + STOP_LIMIT;
            while running.process.is_alive() && Instant::now() < deadline {
                pause(context, TICK)?;
            }
        }
        self.end_sessions(context)?;
        let _ = fs::remove_file(self.record());
        Ok(())
    }

    /// Kills every process of the server and waits until they are gone.
    fn end_sessions(&self, context: &Context) -> Result<(), Failure> {
        let lock = self.layout.lock();
        let deadline = Instant::now() + STOP_LIMIT;
        loop {
            let left = users_of(&lock);
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let pids: Vec<String> = left.iter().map(|process| process.pid.to_string()).collect();
                let pids = pids.join(", ");
                let text =
                    format!("processes of the file server of the group {} do not end: {pids}", self.group);
                return Err(Failure::new(format!("{text}; they hang in the kernel, perhaps on a disk")));
            }
            for process in left {
                signal(process, Signal::KILL);
            }
            pause(context, TICK)?;
        }
    }

    /// Does it run and listen, and does it have this share?
    ///
    /// # Errors
    /// What is missing.
    pub(super) fn looks_alive(&self, resource: &str) -> Result<(), Failure> {
        if !self.share_file(resource).is_file() {
            return Err(Failure::new("the share is not online"));
        }
        let Some(running) = self.running() else {
            return Err(Failure::new(format!(
                "smbd of the group {} has ended; its log: {}",
                self.group,
                self.last_lines()
            )));
        };
        match self.sockets().into_iter().find(|addr| !is_listening(*addr)) {
            None => Ok(()),
            Some(addr) => {
                let pid = running.process.pid;
                Err(Failure::new(format!(
                    "smbd of the group {} (pid {pid}) does not listen on {addr}",
                    self.group
                )))
            }
        }
    }
}

fn cannot_listen(addr: SocketAddr, error: &std::io::Error) -> Failure {
    Failure::new(if error.kind() == ErrorKind::AddrInUse {
        format!(
            "{addr} is in use by another program (the machine's own smbd?); stop it, bind it to other addresses \
             (interfaces, bind interfaces only), or choose another port"
        )
    } else if error.kind() == ErrorKind::AddrNotAvailable {
        format!("{addr} is no address of this node; is its IPAddress online?")
    } else {
        format!("nothing can listen on {addr}: {error}")
    })
}

/// Replaces a file as a whole.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let new = path.with_extension("new");
    let written = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
    written
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&new, path))
        .map_err(|error| Server::io(path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_file_names() {
        assert_eq!(escape("web-1_a"), "web-1_a");
        assert_eq!(escape("../a b.c"), "+2e+2e+2fa+20b+2ec");
    }
}
