//! What goes to csvd, in order, written by one thread: whoever has something to say never waits for the socket.
//!
//! Without a connection, failures and events are kept for the next one, the oldest thrown away beyond a bound (states are in its
//! `Welcome` anyway). With one, a csvd that does not read loses events first; then its connection, and asks anew.
//!
//! Lock order: a resource's lock may be held while something is put in here, never the other way round.

use crate::protocol::{FromHost, LINE_BYTES_MAX, Outcome};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Kept without a connection.
const KEPT_MAX: usize = 1024;
/// Lines that wait, beyond which events are dropped.
const WAITING_EVENTS_MAX: usize = 8192;
/// Lines that wait, beyond which the connection is.
const WAITING_MAX: usize = 65536;
/// For csvd to take what is written.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Number of a connection; 0 is none.
pub(crate) type Connection = u64;

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    inner: Mutex<Inner>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    current: Connection,
    stream: Option<Arc<UnixStream>>,
    /// `Welcome` is in front of what waits.
    welcomed: bool,
    waiting: VecDeque<FromHost>,
    kept: VecDeque<FromHost>,
    writing: bool,
    dropped: u64,
}

impl Outbox {
    /// An answer counts only for the connection that asked.
    pub(crate) fn answer(&self, to: Connection, said: FromHost) {
        let mut inner = self.inner.lock();
        if to != 0 && to == inner.current {
            inner.push(said);
            self.wake.notify_all();
        }
    }

    /// A failure or an event; kept when there is no connection.
    pub(crate) fn tell(&self, said: FromHost) {
        let mut inner = self.inner.lock();
        if inner.current == 0 {
            inner.keep(said);
        } else {
            inner.push(said);
            self.wake.notify_all();
        }
    }

    /// A connection takes over. From now on everything said waits for [`Outbox::welcome`].
    pub(crate) fn connect(&self, connection: Connection, stream: Arc<UnixStream>) {
        // Refused by a socket that is closed already; its reader ends then too.
        let _ = stream.set_write_timeout(Some(WRITE_LIMIT));
        let mut inner = self.inner.lock();
        if let Some(former) = inner.stream.take() {
            let _ = former.shutdown(Shutdown::Both);
        }
        let unsaid = std::mem::take(&mut inner.waiting);
        unsaid.into_iter().for_each(|said| inner.keep(said));
        inner.current = connection;
        inner.stream = Some(stream);
        inner.welcomed = false;
    }

    /// What a new connection hears first; then what was kept, then `after`.
    pub(crate) fn welcome(&self, connection: Connection, welcome: FromHost, after: Option<FromHost>) {
        let mut inner = self.inner.lock();
        if inner.current != connection {
            return;
        }
        let since = std::mem::take(&mut inner.waiting);
        let kept = std::mem::take(&mut inner.kept);
        inner.waiting.push_back(welcome);
        inner.waiting.extend(kept);
        inner.waiting.extend(after);
        inner.waiting.extend(since);
        inner.welcomed = true;
        self.wake.notify_all();
    }

    /// The connection is lost, if it still is the current one.
    pub(crate) fn disconnect(&self, connection: Connection) {
        let mut inner = self.inner.lock();
        if inner.current == connection {
            inner.lose();
        }
    }

    /// Is that the connection that counts?
    pub(crate) fn is_current(&self, connection: Connection) -> bool {
        self.inner.lock().current == connection
    }

    /// Waits until everything is written, for a bounded time: the host ends.
    pub(crate) fn flush(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut inner = self.inner.lock();
        while inner.current != 0 && (inner.writing || !inner.waiting.is_empty()) {
            if self.wake.wait_until(&mut inner, until).timed_out() {
                return;
            }
        }
    }

    /// The writing thread.
    pub(crate) fn write_forever(&self) -> ! {
        loop {
            let (connection, stream, batch) = self.next_batch();
            let written = write_batch(&stream, &batch);
            let mut inner = self.inner.lock();
            inner.writing = false;
            if let Err(e) = written {
                tracing::warn!("the connection to csvd is lost: {e}");
                // Told twice does no harm, not at all might.
                batch.into_iter().for_each(|said| inner.keep(said));
                if inner.current == connection {
                    inner.lose();
                }
            }
            self.wake.notify_all();
        }
    }

    fn next_batch(&self) -> (Connection, Arc<UnixStream>, Vec<FromHost>) {
        let mut inner = self.inner.lock();
        loop {
            let ready = inner.welcomed && !inner.waiting.is_empty();
            if let Some(stream) = inner.stream.clone().filter(|_| ready) {
                inner.writing = true;
                return (inner.current, stream, inner.waiting.drain(..).collect());
            }
            self.wake.wait(&mut inner);
        }
    }
}

impl Inner {
    fn push(&mut self, said: FromHost) {
        if matches!(said, FromHost::Event { .. } | FromHost::Progress { .. })
            && self.waiting.len() >= WAITING_EVENTS_MAX
        {
            self.dropped += 1;
            return;
        }
        self.waiting.push_back(said);
        if self.waiting.len() > WAITING_MAX {
            let dropped = self.dropped;
            tracing::warn!(dropped, "csvd does not read what the host says, its connection is closed");
            self.lose();
        }
    }

    fn keep(&mut self, said: FromHost) {
        if !matches!(said, FromHost::Event { .. } | FromHost::Failed { .. }) {
            return;
        }
        if self.kept.len() >= KEPT_MAX {
            self.kept.pop_front();
            self.dropped += 1;
        }
        self.kept.push_back(said);
    }

    fn lose(&mut self) {
        if let Some(stream) = self.stream.take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.current = 0;
        self.welcomed = false;
        let unsaid = std::mem::take(&mut self.waiting);
        unsaid.into_iter().for_each(|said| self.keep(said));
    }
}

fn write_batch(mut stream: &UnixStream, batch: &[FromHost]) -> std::io::Result<()> {
    for said in batch {
        let mut line = serde_json::to_vec(said)?;
        if line.len() >= LINE_BYTES_MAX {
            let FromHost::Answer { call, name, .. } = said else { continue };
            line = serde_json::to_vec(&FromHost::Answer {
                call: *call,
                name: name.clone(),
                outcome: Outcome::Failed {
                    why: format!("the answer is too long: {} bytes", line.len()),
                    retry: false,
                    elsewhere: false,
                },
            })?;
        }
        line.push(b'\n');
        stream.write_all(&line)?;
    }
    Ok(())
}
