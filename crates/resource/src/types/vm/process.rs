//! QEMU's process: started in a session of its own, found again by number and start time, ended for certain.
//!
//! A pidfd stands for it, so that its number can never mean another process. A host that dies between the start and
//! [`super::machine::Saved`] leaves a QEMU that nothing is known of; its command line, which names this machine's run
//! directory, leads to it ([`leftovers`]).

use crate::api::Failure;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use std::fs;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// For a killed QEMU to be gone; it takes longer only when it hangs in the kernel.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// Most of QEMU's log that is looked at.
const LOG_TAIL_BYTES: u64 = 8 << 10;
/// Lines of it in a message.
const LOG_TAIL_LINES: usize = 6;

/// A process that runs, or has ended and is not forgotten yet.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    start_ticks: u64,
}

impl Process {
    /// Starts QEMU. Its complaints go to `log`, which begins anew; the last one is kept beside it.
    pub(crate) fn spawn(program: &str, args: &[String], log: &Path) -> Result<Process, Failure> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Failure::new(format!("QEMU could not be started: {what}: {error}"))
        };
        let _ = fs::rename(log, log.with_extension("log.1"));
        let file = fs::File::options().create(true).append(true).open(log);
        let file = file.map_err(|error| failed(&log.display().to_string(), &error))?;
        let again = file.try_clone().map_err(|error| failed("its log", &error))?;
        if !is_installed(program) {
            return Err(Failure::NotHere(format!(
                "{program} is not on this node; install the package qemu-system-x86"
            )));
        }
        // setsid(1) execs without a fork here, so the child's number is QEMU's.
        let child = Command::new("setsid")
            .arg(program)
            .args(args)
            .current_dir("/")
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::from(file))
            .stderr(Stdio::from(again))
            .spawn();
        let child = child.map_err(|error| {
            if error.kind() == ErrorKind::NotFound {
                return Failure::NotHere("setsid is not on this node; install the package util-linux".into());
            }
            failed("setsid", &error)
        })?;
        let pid = i32::try_from(child.id()).unwrap_or_default();
        Process::of(pid).map_err(|error| failed("its process", &error))
    }

    fn of(pid: i32) -> std::io::Result<Process> {
        let pid = Pid::from_raw(pid).ok_or(ErrorKind::InvalidInput)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let (_, start_ticks) = stat(pid.as_raw_nonzero().get()).ok_or(ErrorKind::NotFound)?;
        Ok(Process { pid, pidfd, start_ticks })
    }

    /// The process of that number, if it is the one that started then and has not ended.
    pub(crate) fn find(pid: i32, start_ticks: u64) -> Option<Process> {
        let process = Process::of(pid).ok()?;
        (process.start_ticks == start_ticks && !process.has_ended()).then_some(process)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub(crate) fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.pidfd
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits for its end; has it ended?
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&left)) {
                Ok(count) => return count > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Ends it and waits until it is gone.
    pub(crate) fn kill(&self) -> Result<(), Failure> {
        // It can only fail because the process has ended already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        if self.wait(KILL_LIMIT) {
            let _ = self.outcome();
            return Ok(());
        }
        Err(Failure::new(format!(
            "QEMU (process {}) was killed but does not end: it hangs in the kernel, as with storage that does not answer; \
             the virtual machine must not be started elsewhere before this node is off",
            self.pid()
        )))
    }

    /// How it ended, in words. Takes note of the end, so that nothing stays in the table of processes; only the first call
    /// can tell.
    pub(crate) fn outcome(&self) -> String {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        // An adopted process is another's child: init's, which tells nobody.
        let status = waitid(WaitId::PidFd(rustix::fd::AsFd::as_fd(&self.pidfd)), options).ok().flatten();
        match status.map(|status| (status.exit_status(), status.terminating_signal())) {
            Some((_, Some(signal))) => format!("it was killed by signal {signal}"),
            Some((Some(code), None)) => format!("it ended with exit status {code}"),
            Some((None, None)) | None => "it ended".to_owned(),
        }
    }
}

/// State and start time of a process.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 22 of proc(5), the state being field 3.
    Some((state, fields.nth(18)?.parse().ok()?))
}

fn is_installed(program: &str) -> bool {
    if program.contains('/') {
        return Path::new(program).is_file();
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// QEMU processes that have `marker` in an argument, without that of number `except`.
pub(crate) fn leftovers(marker: &str, except: Option<i32>) -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| Some(*pid) != except)
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| {
                let word = String::from_utf8_lossy(word);
                word.contains(marker) && word.starts_with("socket,id=qmp,")
            })
        })
        .filter_map(|pid| Process::of(pid).ok())
        .collect()
}

/// The last lines that QEMU wrote.
pub(crate) fn log_tail(log: &Path) -> Vec<String> {
    let read = || -> std::io::Result<String> {
        let mut file = fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.trim().trim_start_matches("qemu-system-x86_64: ").to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_and_its_end_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let process = Process::spawn("sleep", &["1000".into()], &dir.path().join("log")).unwrap();
        let (pid, start) = (process.pid(), process.start_ticks());
        assert!(Process::find(pid, start).is_some());
        assert!(Process::find(pid, start + 1).is_none(), "another process");
        assert!(!process.has_ended());
        process.kill().unwrap();
        assert!(process.has_ended());
        assert!(Process::find(pid, start).is_none());
    }

    #[test]
    fn what_is_not_installed_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let error = Process::spawn("no-such-qemu", &[], &dir.path().join("log")).unwrap_err();
        assert!(matches!(&error, Failure::NotHere(text) if text.contains("qemu-system-x86")), "{error}");
    }

    #[test]
    fn the_log_ends_with_what_matters() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let text: String = (0..2000).map(|line| format!("qemu-system-x86_64: line {line}\n\n")).collect();
        std::fs::write(&log, text).unwrap();
        assert_eq!(log_tail(&log).len(), LOG_TAIL_LINES);
        assert_eq!(log_tail(&log).last().unwrap(), "line 1999");
        assert!(log_tail(&dir.path().join("none")).is_empty());
    }
}
