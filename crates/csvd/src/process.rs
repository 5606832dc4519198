//! A running csvfs, child or adopted, held by a pidfd so that its number can never mean another process.

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// For a csvfs without csvd to end.
const LEFTOVER_LIMIT: Duration = Duration::from_secs(5);

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Woken {
    /// The process ended.
    Exited,
    /// The other file descriptor became readable.
    Order,
    /// Time is over.
    Timeout,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    /// Absent for an adopted process; the machine's init reaps that one.
    child: Option<Child>,
}

impl Process {
    /// Starts `program` in a session of its own, so that neither a signal to csvd's session nor csvd's end
    /// reaches it.
    pub(crate) fn spawn(program: &Path, args: &[&str]) -> anyhow::Result<Process> {
        anyhow::ensure!(program.is_file(), "{} is not there; install csvfs beside csvd", program.display());
        let child = Command::new("setsid")
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            // glibc raises its threshold for mapping to the size of the largest block ever freed; from then on each
            // thread's 16 MiB FUSE buffer would be heap memory, touched and kept.
            .env("MALLOC_MMAP_THRESHOLD_", "1048576")
            .spawn()
            .with_context(|| format!("cannot run setsid {}", program.display()))?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?;
        Ok(Process { pid, pidfd, child: Some(child) })
    }

    /// Takes over a process that is already there.
    pub(crate) fn adopt(pid: Pid) -> io::Result<Process> {
        Ok(Process { pid, pidfd: pidfd_open(pid, PidfdFlags::empty())?, child: None })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // It can only fail because the process has ended already, which is what the signal is for.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Ends what the process left behind in its process group: workers of a dead csvfs serve nobody.
    pub(crate) fn kill_group(&self) {
        // No such group is the usual case.
        let _ = kill_process_group(self.pid, Signal::KILL);
    }

    /// Waits until the process ends, `order` is readable or the time is over.
    pub(crate) fn wait(&self, order: Option<&OwnedFd>, limit: Option<Duration>) -> io::Result<Woken> {
        let mut fds = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
        if let Some(order) = order {
            fds.push(PollFd::from_borrowed_fd(order.as_fd(), PollFlags::IN));
        }
        let limit = limit.and_then(|d| Timespec::try_from(d).ok());
        loop {
            match poll(&mut fds, limit.as_ref()) {
                Ok(0) => return Ok(Woken::Timeout),
                Ok(_) if !fds[0].revents().is_empty() => return Ok(Woken::Exited),
                Ok(_) => return Ok(Woken::Order),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// How it ended, in words. Call after `Woken::Exited`.
    pub(crate) fn outcome(&mut self) -> String {
        match self.child.as_mut().map(Child::try_wait) {
            None => "ended".to_owned(),
            Some(Err(e)) => format!("ended (status unknown: {e})"),
            Some(Ok(None)) => "does not end, it hangs in the kernel".to_owned(),
            Some(Ok(Some(status))) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("ended with exit status {code}"),
                (None, Some(signal)) => format!("was killed by signal {signal}"),
                (None, None) => "ended".to_owned(),
            },
        }
    }
}

/// Ends every csvfs that an earlier csvd of this run directory started. Waits until they are gone.
pub(crate) fn end_leftovers(run_dir: &Path) {
    let Ok(entries) = fs::read_dir(run_dir) else { return };
    let mut ended = Vec::new();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let Some(volume) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".pid")) else {
            continue;
        };
        let number = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        let pid = number.and_then(Pid::from_raw).filter(|pid| is_csvfs(*pid, volume));
        if let Some(process) = pid.and_then(|pid| Process::adopt(pid).ok()) {
            tracing::warn!(
                volume,
                pid = process.pid(),
                "csvfs is ended: this node takes no part in its cluster"
            );
            process.signal(Signal::TERM);
            ended.push(process);
        }
    }
    for process in ended {
        if !matches!(process.wait(None, Some(LEFTOVER_LIMIT)), Ok(Woken::Exited)) {
            process.signal(Signal::KILL);
            // One that hangs in the kernel cannot be waited for; its node is fenced.
            let _ended = process.wait(None, Some(LEFTOVER_LIMIT));
        }
        process.kill_group();
    }
}

/// Is this process the csvfs of that volume? Guards against a number that was given out again.
pub(crate) fn is_csvfs(pid: Pid, volume: &str) -> bool {
    let Ok(cmdline) = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())) else { return false };
    let args: Vec<&[u8]> = cmdline.split(|&b| b == 0).collect();
    args.iter().any(|arg| arg.ends_with(b"csvfs"))
        && args.windows(2).any(|pair| pair[0] == b"--volume" && pair[1] == volume.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_status_and_signals_are_told() {
        let mut process = Process::spawn(Path::new("/bin/sh"), &["-c", "exit 3"]).unwrap();
        assert_eq!(process.wait(None, Some(Duration::from_secs(10))).unwrap(), Woken::Exited);
        assert!(process.outcome().contains("status 3"));
        let mut process = Process::spawn(Path::new("/bin/sleep"), &["60"]).unwrap();
        assert_eq!(process.wait(None, Some(Duration::ZERO)).unwrap(), Woken::Timeout);
        process.signal(Signal::KILL);
        assert_eq!(process.wait(None, Some(Duration::from_secs(10))).unwrap(), Woken::Exited);
        assert!(process.outcome().contains("signal 9"));
    }

    #[test]
    fn missing_program_is_named() {
        let error = Process::spawn(Path::new("/nonexistent/csvfs"), &[]).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/csvfs"));
    }
}
