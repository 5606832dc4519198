//! The pool's end of one `csv-smbc` process: starting it, one call at a time, the files it has open, its end.
//!
//! A worker belongs to one thread at a time. After an error other than a refusal it must not be used again;
//! dropping it kills the process, which is also how a stuck call ends.

use crate::error::SmbError;
use crate::pool::PoolConfig;
use crate::wire::{Connect, FLAG_BROKEN, FLAG_WRITE, HEADER_BYTES, Op, Reply, Request};
use rustix::event::epoll;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Files one worker keeps open; the least recently used one makes room.
const OPEN_FILES_MAX: usize = 64;
/// Room for a whole request or reply, so that each takes one system call on either side.
const SOCKET_BUFFER_BYTES: usize = 3 << 20;

/// Why a call did not succeed.
#[derive(Debug)]
pub(crate) enum CallError {
    /// The server said no; the worker is in order.
    Refused(i32),
    /// The worker or its connection is gone.
    Broken(String),
    /// No answer in time.
    TimedOut(Duration),
    /// The file could not be opened because the worker broke or did not answer; the operation was not sent.
    NotSent(String),
}

#[derive(Debug)]
struct OpenFile {
    path: Arc<str>,
    write: bool,
    slot: u32,
}

/// One process.
#[derive(Debug)]
pub(crate) struct Worker {
    /// Its number in the pool.
    pub(crate) key: u64,
    child: Child,
    /// Shared with the pool's receiver, which must not hold the pool's lock while it reads.
    socket: Arc<UnixStream>,
    timeout: Duration,
    next_id: u64,
    /// Most recently used first.
    files: Vec<OpenFile>,
    /// The pool's generation for which it was started.
    pub(crate) generation: u64,
    /// The last closing (see the pool) that this worker has seen.
    pub(crate) closings_seen: u64,
    /// The receiver hears of what comes from it.
    watched: bool,
}

impl Worker {
    /// Starts a process and connects it to `server`. `known` is told its socket before: shutting that ends whatever is
    /// waited for.
    ///
    /// # Errors
    /// `Program`, `Auth` or `Unavailable`.
    pub(crate) fn start(
        config: &PoolConfig,
        server: SocketAddr,
        key: u64,
        known: impl FnOnce(&Arc<UnixStream>),
    ) -> Result<Self, SmbError> {
        let program = |source| SmbError::Program { program: config.program.clone(), source };
        let (ours, theirs) = UnixStream::pair().map_err(program)?;
        for socket in [&ours, &theirs] {
            // Needs a privilege that tests may not have; smaller buffers only cost system calls.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER_BYTES);
        }
        ours.set_read_timeout(Some(config.op_timeout)).map_err(program)?;
        ours.set_write_timeout(Some(config.op_timeout)).map_err(program)?;
        let child = Command::new(&config.program)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // libsmbclient reads $HOME/.smb/smb.conf, and without one the machine's.
            .env("HOME", &config.state_dir)
            .env("SMB_CONF_PATH", config.state_dir.join(".smb/smb.conf"))
            .spawn()
            .map_err(program)?;
        let mut worker = Worker {
            key,
            child,
            socket: Arc::new(ours),
            timeout: config.op_timeout,
            next_id: 0,
            files: Vec::new(),
            generation: 0,
            closings_seen: 0,
            watched: false,
        };
        known(&worker.socket);
        worker.connect(config, server)?;
        Ok(worker)
    }

    fn connect(&mut self, config: &PoolConfig, server: SocketAddr) -> Result<(), SmbError> {
        let server = server.to_string();
        // Longer than our own patience, so that a stuck server always ends the same way: by killing the worker.
        let timeout_ms =
            u32::try_from(config.op_timeout.as_millis()).unwrap_or(u32::MAX / 4).saturating_mul(2);
        let connect = Connect {
            server: server.clone(),
            share: config.share.clone(),
            user: config.user.clone(),
            password: config.password.clone(),
            encrypt: config.encrypt,
            timeout_ms,
        };
        let request = self.request(Op::Connect);
        match self.call(request, &connect.encode(), &mut []) {
            Ok(_) => Ok(()),
            Err(CallError::Refused(libc::EACCES | libc::EPERM)) => {
                Err(SmbError::Auth { server, user: config.user.clone(), share: config.share.clone() })
            }
            Err(CallError::Refused(errno)) => {
                Err(SmbError::Unavailable { server, reason: io::Error::from_raw_os_error(errno).to_string() })
            }
            Err(CallError::Broken(reason) | CallError::NotSent(reason)) => {
                Err(SmbError::Unavailable { server, reason })
            }
            Err(CallError::TimedOut(after)) => {
                Err(SmbError::Unavailable { server, reason: format!("no answer within {after:?}") })
            }
        }
    }

    /// A request without data.
    pub(crate) fn request(&mut self, op: Op) -> Request {
        self.next_id += 1;
        Request { id: self.next_id, offset: 0, op, flags: 0, slot: 0, len: 0, payload: 0 }
    }

    /// Sends a request and waits for the reply; its payload goes to `out`, the result is how much that was.
    pub(crate) fn call(
        &mut self,
        request: Request,
        payload: &[u8],
        out: &mut [u8],
    ) -> Result<(Reply, usize), CallError> {
        let payload_len = u32::try_from(payload.len())
            .map_err(|_| CallError::Broken("request larger than 4 GiB".to_owned()))?;
        let request = Request { payload: payload_len, ..request };
        let deadline = Instant::now() + self.timeout;
        let (reply, got) = self
            .send(&request.encode(), payload, deadline)
            .and_then(|()| self.receive(out, deadline))
            .map_err(|error| self.lost(&error))?;
        if reply.id != request.id {
            return Err(CallError::Broken("reply to another request".to_owned()));
        }
        if reply.errno == 0 {
            return Ok((reply, got));
        }
        // A connect never leaves a usable worker, but its errno tells a wrong password from the rest.
        if reply.flags & FLAG_BROKEN != 0 && request.op != Op::Connect {
            return Err(CallError::Broken(io::Error::from_raw_os_error(reply.errno).to_string()));
        }
        Err(CallError::Refused(reply.errno))
    }

    fn send(&mut self, header: &[u8; HEADER_BYTES], payload: &[u8], deadline: Instant) -> io::Result<()> {
        let mut sent = 0;
        while sent < HEADER_BYTES + payload.len() {
            let head = &header[sent.min(HEADER_BYTES)..];
            let tail = &payload[sent.saturating_sub(HEADER_BYTES)..];
            match (&*self.socket).write_vectored(&[IoSlice::new(head), IoSlice::new(tail)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(part) => sent += part,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            in_time(deadline)?;
        }
        Ok(())
    }

    fn receive(&mut self, out: &mut [u8], deadline: Instant) -> io::Result<(Reply, usize)> {
        let mut header = [0; HEADER_BYTES];
        let mut got = 0;
        let mut wanted = HEADER_BYTES;
        let mut reply = None;
        while got < wanted {
            let filled = got.saturating_sub(HEADER_BYTES);
            let parts = &mut [
                IoSliceMut::new(&mut header[got.min(HEADER_BYTES)..]),
                IoSliceMut::new(&mut out[filled..]),
            ];
            match (&*self.socket).read_vectored(parts) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(part) => got += part,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if reply.is_none() && got >= HEADER_BYTES {
                let decoded = Reply::decode(&header)?;
                wanted = HEADER_BYTES + decoded.payload as usize;
                if decoded.payload as usize > out.len() {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "reply larger than asked for"));
                }
                reply = Some(decoded);
            }
            in_time(deadline)?;
        }
        let reply = reply.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok((reply, got - HEADER_BYTES))
    }

    fn lost(&mut self, error: &io::Error) -> CallError {
        if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
            return CallError::TimedOut(self.timeout);
        }
        match self.child.try_wait() {
            Ok(Some(status)) => CallError::Broken(format!("worker process ended: {status}")),
            Ok(None) | Err(_) => CallError::Broken(format!("worker process does not answer: {error}")),
        }
    }

    /// Has this worker the file open in a way that serves?
    pub(crate) fn has_open(&self, path: &str, write: bool) -> bool {
        self.place_of(path, write).is_some()
    }

    fn place_of(&self, path: &str, write: bool) -> Option<usize> {
        self.files.iter().position(|file| &*file.path == path && (file.write || !write))
    }

    /// Slot of the file, if it is open in a way that serves.
    pub(crate) fn open_slot(&mut self, path: &str, write: bool) -> Option<u32> {
        let at = self.place_of(path, write)?;
        self.files[..=at].rotate_right(1);
        self.files.first().map(|file| file.slot)
    }

    /// Sends a request whose reply the pool's receiver takes, in one piece and without waiting. False when it did not go:
    /// the worker can be used no more.
    pub(crate) fn send_now(&self, request: &Request, payload: &[u8]) -> bool {
        let header = request.encode();
        let parts = [IoSlice::new(&header), IoSlice::new(payload)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = sendmsg(&*self.socket, &parts, &mut SendAncillaryBuffer::default(), flags);
        sent == Ok(HEADER_BYTES + payload.len())
    }

    pub(crate) fn socket(&self) -> Arc<UnixStream> {
        self.socket.clone()
    }

    /// From now on the receiver hears of what comes from this worker. False when that cannot be.
    pub(crate) fn watch(&mut self, poll: &OwnedFd) -> bool {
        if self.watched {
            return true;
        }
        let data = epoll::EventData::new_u64(self.key);
        // Edge-triggered: what a blocking call reads is of no interest there.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        match epoll::add(poll, &*self.socket, data, flags) {
            Ok(()) => self.watched = true,
            Err(error) => tracing::error!(%error, "an SMB worker cannot be watched"),
        }
        self.watched
    }

    /// Slot of the file, opened when needed.
    pub(crate) fn slot(&mut self, path: &str, write: bool) -> Result<u32, CallError> {
        if let Some(slot) = self.open_slot(path, write) {
            return Ok(slot);
        }
        let slot = if self.files.len() < OPEN_FILES_MAX {
            let used = |slot: u32| self.files.iter().any(|file| file.slot == slot);
            (0..).find(|slot| !used(*slot)).unwrap_or(0)
        } else {
            // The worker closes what is in a slot when another file is opened there.
            self.files.pop().map_or(0, |file| file.slot)
        };
        let flags = if write { FLAG_WRITE } else { 0 };
        let request = Request { slot, flags, ..self.request(Op::Open) };
        self.call(request, path.as_bytes(), &mut []).map_err(|error| match error {
            CallError::Broken(reason) => CallError::NotSent(reason),
            CallError::TimedOut(after) => CallError::NotSent(format!("no answer within {after:?}")),
            CallError::Refused(_) | CallError::NotSent(_) => error,
        })?;
        self.files.insert(0, OpenFile { path: path.into(), write, slot });
        Ok(slot)
    }

    /// Closes the file in every way it is open.
    pub(crate) fn close(&mut self, path: &str) -> Result<(), CallError> {
        while let Some(at) = self.files.iter().position(|file| &*file.path == path) {
            let slot = self.files.remove(at).slot;
            let request = Request { slot, ..self.request(Op::Close) };
            self.call(request, &[], &mut [])?;
        }
        Ok(())
    }

    /// Closes all files.
    pub(crate) fn close_all(&mut self) -> Result<(), CallError> {
        while let Some(file) = self.files.pop() {
            let request = Request { slot: file.slot, ..self.request(Op::Close) };
            self.call(request, &[], &mut [])?;
        }
        Ok(())
    }
}

fn in_time(deadline: Instant) -> io::Result<()> {
    if Instant::now() > deadline { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // SIGKILL reaches a process that waits for the network at once, so this wait is short.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
