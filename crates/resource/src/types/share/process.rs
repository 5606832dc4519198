//! Processes by number and start, who has files open, and whether somebody listens.

use rustix::io::Errno;
use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::net::SocketAddr;
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

/// Does somebody listen there? Found out by binding a socket beside it, which the kernel refuses exactly then: both have
/// `SO_REUSEADDR`, and this one never listens. A connection would say no more, and make smbd start a process each time;
/// `/proc/net/tcp` takes milliseconds to read.
pub(super) fn is_listening(addr: SocketAddr) -> bool {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let bound = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).and_then(|socket| {
        set_socket_reuseaddr(&socket, true)?;
        bind(&socket, &addr)
    });
    bound == Err(Errno::ADDRINUSE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn listening_is_seen_without_connecting() {
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(addr) else { continue };
            let addr = listener.local_addr().unwrap();
            assert!(is_listening(addr), "{addr}");
            // An open connection is not somebody who listens.
            let client = TcpStream::connect(addr).unwrap();
            let accepted = listener.accept().unwrap();
            drop(listener);
            assert!(!is_listening(addr), "{addr}");
            drop((client, accepted));
        }
    }
}
