//! Processes by number and start, and who listens and has files open, by `/proc`.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// A process, told from a later one with its number by its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// In clock ticks since boot (proc_pid_stat(5), field 22).
    start: u64,
}

impl Process {
    pub(super) fn find(pid: i32) -> Option<Process> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold anything; the fields follow its last parenthesis.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        let start = fields.nth(18)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(Process { pid, start })
    }

    pub(super) fn is_alive(self) -> bool {
        Process::find(self.pid) == Some(self)
    }
}

/// Sends a signal, if it is still that process.
pub(super) fn signal(process: Process, signal: Signal) {
    let Some(pid) = Pid::from_raw(process.pid) else { return };
    // The descriptor first: then what is looked at and what gets the signal are the same process.
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    if process.is_alive() {
        let _ = pidfd_send_signal(&pidfd, signal);
    }
}

/// Processes with files below a directory open.
pub(super) fn users_of(dir: &Path) -> Vec<Process> {
    let Ok(dir) = dir.canonicalize() else { return Vec::new() };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(Process::find)
        .filter(|process| {
            let open = fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten().flatten();
            open.into_iter().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target.starts_with(&dir)))
        })
        .collect()
}

/// Does somebody listen there? By `/proc/net/tcp`: a connection would say no more, and make smbd start a process each time.
pub(super) fn is_listening(addr: SocketAddr) -> bool {
    const LISTEN: &str = "0A";
    let (file, ip) = match addr.ip() {
        // Words in the byte order of the machine.
        IpAddr::V4(ip) => ("tcp", format!("{:08X}", u32::from_ne_bytes(ip.octets()))),
        IpAddr::V6(ip) => {
            let octets = ip.octets();
            let words =
                octets.chunks_exact(4).filter_map(|word| word.try_into().ok()).map(u32::from_ne_bytes);
            ("tcp6", words.map(|word| format!("{word:08X}")).collect())
        }
    };
    let wanted = format!("{ip}:{:04X}", addr.port());
    // Of the thread, whose network namespace may be another than the process's.
    let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
    text.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next() == Some(wanted.as_str()) && fields.nth(1) == Some(LISTEN)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn listening_is_seen_without_connecting() {
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(addr) else { continue };
            let addr = listener.local_addr().unwrap();
            assert!(is_listening(addr), "{addr}");
            drop(listener);
            assert!(!is_listening(addr), "{addr}");
        }
    }
}
