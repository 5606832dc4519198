//! The host's end of the channel to a guest: a socket of QEMU's, behind which the guest's [`serve`](super::serve) runs
//! scripts. A frozen or dead guest answers nothing; every question has a deadline.

use super::serve::{Ask, Told};
use crate::wait::{self, Ended};
use anyhow::{Context as _, bail};
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// QEMU makes its socket at once.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// What a guest has more than the script that it runs, which ends itself.
const ANSWER_MARGIN: Duration = Duration::from_secs(20);

type Waiting = Arc<Mutex<BTreeMap<u64, Sender<Told>>>>;

/// See the module.
#[derive(Debug)]
pub struct Channel {
    name: String,
    stream: Mutex<UnixStream>,
    waiting: Waiting,
    next: AtomicU64,
    ready: Mutex<Receiver<Told>>,
}

/// A script that runs in a guest.
#[derive(Debug)]
pub struct Running {
    what: String,
    limit: Duration,
    answer: Receiver<Told>,
}

impl Channel {
    /// Connects to QEMU's socket, before the guest is up.
    ///
    /// # Errors
    /// The socket does not appear.
    pub fn connect(name: &str, socket: &Path) -> anyhow::Result<Channel> {
        let stream = wait::until("the guest's channel", CONNECT_LIMIT, || {
            Ok(Some(UnixStream::connect(socket).with_context(|| socket.display().to_string())?))
        })?;
        let waiting = Waiting::default();
        let (sender, ready) = channel();
        if let Ok(mut waiting) = waiting.lock() {
            waiting.insert(0, sender);
        }
        let (input, to) = (stream.try_clone()?, waiting.clone());
        std::thread::spawn(move || receive(input, &to));
        let (stream, ready) = (Mutex::new(stream), Mutex::new(ready));
        Ok(Channel { name: name.to_owned(), stream, waiting, next: AtomicU64::new(1), ready })
    }

    /// Waits until the guest is up.
    ///
    /// # Errors
    /// It is not within the limit, or its QEMU has ended.
    pub fn wait_ready(&self, limit: Duration) -> anyhow::Result<()> {
        let Ok(ready) = self.ready.lock() else { bail!("another thread waits and broke off") };
        match ready.recv_timeout(limit) {
            Ok(_) => Ok(()),
            Err(RecvTimeoutError::Timeout) => bail!("{} is not up within {} s", self.name, limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("{}: QEMU has ended", self.name),
        }
    }

    /// Starts a shell script in the guest.
    ///
    /// # Errors
    /// QEMU has ended.
    pub fn start(&self, script: &str, limit: Duration) -> anyhow::Result<Running> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let limit_ms = u64::try_from(limit.as_millis())?;
        let mut line = serde_json::to_string(&Ask { id, script: script.to_owned(), limit_ms })?;
        line.push('\n');
        let (sender, answer) = channel();
        let Ok(mut waiting) = self.waiting.lock() else { bail!("{}: the channel is broken", self.name) };
        waiting.insert(id, sender);
        drop(waiting);
        let Ok(mut stream) = self.stream.lock() else { bail!("{}: the channel is broken", self.name) };
        stream.write_all(line.as_bytes()).with_context(|| format!("asking {}", self.name))?;
        Ok(Running { what: format!("{}: {script}", self.name), limit: limit + ANSWER_MARGIN, answer })
    }
}

impl Running {
    /// Waits for its end.
    ///
    /// # Errors
    /// It did not end in time, or the guest is gone.
    pub fn wait(self) -> anyhow::Result<Ended> {
        let told = match self.answer.recv_timeout(self.limit) {
            Ok(told) => told,
            Err(RecvTimeoutError::Timeout) => {
                bail!("{}: no answer within {} s", self.what, self.limit.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("{}: QEMU has ended", self.what),
        };
        let Some(status) = told.status else { bail!("{}: {}", self.what, told.stderr) };
        Ok(Ended { status: ExitStatus::from_raw(status), stdout: told.stdout, stderr: told.stderr })
    }

    /// What it printed, if it has ended. Told once; there is nothing to wait for afterwards.
    #[must_use]
    pub fn ended(&self) -> Option<String> {
        self.answer.try_recv().ok().map(|told| format!("{}{}", told.stdout, told.stderr))
    }

    /// Waits for its good end and gives what it printed.
    ///
    /// # Errors
    /// It failed, did not end in time, or the guest is gone.
    pub fn ok(self) -> anyhow::Result<String> {
        let what = self.what.clone();
        self.wait()?.ok(&what)
    }
}

/// Gives answers to who waits for them; at the end, nobody gets one any more.
fn receive(stream: UnixStream, waiting: &Waiting) {
    let lines = BufReader::new(stream).lines();
    for told in lines.map_while(Result::ok).filter_map(|line| serde_json::from_str::<Told>(&line).ok()) {
        let to = waiting.lock().ok().and_then(|mut waiting| waiting.remove(&told.id));
        if let Some(to) = to {
            // Nobody waits any more for what came too late.
            to.send(told).ok();
        }
    }
    if let Ok(mut waiting) = waiting.lock() {
        waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn answers_find_their_questions_and_a_dead_guest_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("guest");
        let listener = UnixListener::bind(&socket).unwrap();
        let channel = Channel::connect("g", &socket).unwrap();
        let (mut guest, _) = listener.accept().unwrap();
        let told = |id: u64, text: &str| {
            let told = Told { id, status: Some(0), stdout: text.to_owned(), stderr: String::new() };
            serde_json::to_string(&told).unwrap() + "\n"
        };
        let limit = Duration::from_secs(10);
        guest.write_all(told(0, "").as_bytes()).unwrap();
        channel.wait_ready(limit).unwrap();
        let (first, second) = (channel.start("a", limit).unwrap(), channel.start("b", limit).unwrap());
        let third = channel.start("c", limit).unwrap();
        guest.write_all((told(2, "two") + &told(1, "one")).as_bytes()).unwrap();
        assert_eq!((first.ok().unwrap(), second.ok().unwrap()), ("one".to_owned(), "two".to_owned()));
        drop((guest, listener));
        let error = third.ok().unwrap_err().to_string();
        assert!(error.contains("QEMU has ended"), "{error}");
    }
}
