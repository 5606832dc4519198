//! The connection to QEMU's monitor (QMP): commands with a limit of time, and a thread that hears events and QEMU's end.
//!
//! Invariants: every command is answered, refused, or ends with an error of its own; a command that took too long may have been done
//! ([`QmpError::Late`]), its answer is dropped when it comes. When QEMU ends, the thread tells [`Happening::Exited`]
//! once, as the last thing. A monitor serves one connection at a time: it is closed when this is dropped, so that a next host
//! can have it.

use super::process::Process;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest line of QMP that is taken.
const LINE_BYTES_MAX: usize = 16 << 20;
/// How often a monitor that is not there yet is tried.
const TRY_AGAIN: Duration = Duration::from_millis(20);
/// For a command to be written: QEMU reads at once, unless it hangs.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Why a command did not work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QmpError {
    /// QEMU said no; nothing was done.
    #[error("{0}")]
    Refused(String),
    /// QEMU did not answer; it may have been done.
    #[error("QEMU did not answer \"{command}\" within {seconds} s")]
    Late {
        /// Which.
        command: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The connection is gone: QEMU has ended or closed it; it may have been done.
    #[error("QEMU's monitor is closed")]
    Closed,
}

/// What QEMU tells by itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Happening {
    /// An event of QMP.
    Event {
        /// Name.
        name: String,
        /// Its data.
        data: Value,
    },
    /// The process has ended: how.
    Exited(String),
}

type Reply = Result<Value, String>;

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    replies: BTreeMap<u64, SyncSender<Reply>>,
    closed: bool,
}

/// See the module.
pub(crate) struct Monitor {
    writer: UnixStream,
    waiting: Arc<Mutex<Waiting>>,
    thread: Option<JoinHandle<()>>,
    /// Closing it ends the thread.
    wake: Option<UnixStream>,
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}

impl Monitor {
    /// Connects, as soon as QEMU has its monitor.
    ///
    /// # Errors
    /// It did not become ready within `limit`, or has ended before; then it is for `process` to say how.
    pub(crate) fn connect(
        path: &Path,
        process: &Arc<Process>,
        limit: Duration,
        tell: impl Fn(Happening) + Send + 'static,
    ) -> Result<Monitor, String> {
        let deadline = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if process.wait(TRY_AGAIN) => return Err("QEMU has ended".into()),
                Err(error) if Instant::now() > deadline => {
                    return Err(format!("QEMU's monitor {} cannot be reached: {error}", path.display()));
                }
                Err(_) => {}
            }
        };
        let setup = || -> std::io::Result<_> {
            stream.set_write_timeout(Some(WRITE_LIMIT))?;
            let (wake, woken) = UnixStream::pair()?;
            Ok((stream.try_clone()?, wake, woken))
        };
        let (reader, wake, woken) = setup().map_err(|error| error.to_string())?;
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let hear =
            Hear { stream: reader, process: Arc::clone(process), waiting: Arc::clone(&waiting), woken };
        let thread = std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || hear.run(&tell))
            .map_err(|error| format!("no thread for QEMU's monitor: {error}"))?;
        let monitor = Monitor { writer: stream, waiting, thread: Some(thread), wake: Some(wake) };
        // The greeting needs no answer of its own: this is answered after it.
        let left = deadline.saturating_duration_since(Instant::now());
        monitor.call("qmp_capabilities", json!({}), left).map_err(|error| error.to_string())?;
        Ok(monitor)
    }

    /// Runs a command.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub(crate) fn call(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        self.send(command, arguments, None::<&UnixStream>, limit)
    }

    /// Gives QEMU an open file under a name.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub(crate) fn give(&self, name: &str, file: &impl AsFd, limit: Duration) -> Result<(), QmpError> {
        self.send("getfd", json!({ "fdname": name }), Some(file), limit).map(drop)
    }

    fn send(
        &self,
        command: &str,
        arguments: Value,
        file: Option<&impl AsFd>,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let (reply, answered) = sync_channel(1);
        let id = {
            let mut waiting = self.waiting.lock();
            if waiting.closed {
                return Err(QmpError::Closed);
            }
            waiting.next += 1;
            let id = waiting.next;
            waiting.replies.insert(id, reply);
            id
        };
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": id }));
        let result = match self.write(line.as_bytes(), file) {
            Err(_) => Err(QmpError::Closed),
            Ok(()) => match answered.recv_timeout(limit) {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(refused)) => Err(QmpError::Refused(refused)),
                Err(RecvTimeoutError::Disconnected) => Err(QmpError::Closed),
                Err(RecvTimeoutError::Timeout) => {
                    Err(QmpError::Late { command: command.to_owned(), seconds: limit.as_secs() })
                }
            },
        };
        self.waiting.lock().replies.remove(&id);
        result
    }

    fn write(&self, line: &[u8], file: Option<&impl AsFd>) -> std::io::Result<()> {
        let mut writer = &self.writer;
        let Some(file) = file else { return writer.write_all(line) };
        let fds = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = sendmsg(&self.writer, &[IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL)?;
        writer.write_all(line.get(sent..).unwrap_or_default())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        drop(self.wake.take());
        let _ = self.writer.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread.
struct Hear {
    stream: UnixStream,
    process: Arc<Process>,
    waiting: Arc<Mutex<Waiting>>,
    woken: UnixStream,
}

impl Hear {
    fn run(mut self, tell: &impl Fn(Happening)) {
        let mut buffer = Vec::new();
        let mut open = true;
        loop {
            let (readable, ended, dropped) = self.poll(open);
            if dropped {
                return;
            }
            // What QEMU said before its end is read first: it tells why it ended.
            if open && (readable || ended) {
                open = self.read(&mut buffer, ended, tell);
                if !open {
                    self.close();
                }
            }
            if ended {
                self.close();
                tell(Happening::Exited(self.process.outcome()));
                return;
            }
        }
    }

    fn close(&self) {
        let mut waiting = self.waiting.lock();
        waiting.closed = true;
        waiting.replies.clear();
    }

    fn poll(&self, open: bool) -> (bool, bool, bool) {
        let mut fds =
            vec![PollFd::new(self.process.fd(), PollFlags::IN), PollFd::new(&self.woken, PollFlags::IN)];
        if open {
            fds.push(PollFd::new(&self.stream, PollFlags::IN));
        }
        loop {
            match poll(&mut fds, None::<&Timespec>) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                // Nothing else is left to do than to end; callers see the monitor closed.
                Err(_) => return (false, false, true),
            }
        }
        let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        (ready(2), ready(0), ready(1))
    }

    /// Reads what is there, to the end if QEMU has ended; is the connection still open?
    fn read(&mut self, buffer: &mut Vec<u8>, to_the_end: bool, tell: &impl Fn(Happening)) -> bool {
        let mut chunk = [0; 16 << 10];
        loop {
            let count = match self.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return false,
            };
            buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                if let Ok(message) = serde_json::from_slice(&line) {
                    self.take(message, tell);
                }
            }
            if buffer.len() > LINE_BYTES_MAX {
                return false;
            }
            if !to_the_end {
                return true;
            }
        }
    }

    fn take(&self, mut message: Value, tell: &impl Fn(Happening)) {
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            tell(Happening::Event { name: name.to_owned(), data: message["data"].clone() });
            return;
        }
        let Some(id) = message.get("id").and_then(Value::as_u64) else { return };
        let reply = match message.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(message["error"]["desc"].as_str().unwrap_or("no reason given").to_owned()),
        };
        if let Some(waiter) = self.waiting.lock().replies.remove(&id) {
            // Nobody waits any more: too late.
            let _ = waiter.try_send(reply);
        }
    }
}

#[cfg(test)]
mod tests;
