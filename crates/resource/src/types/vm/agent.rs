//! The guest's agent (qemu-ga): its heartbeat, and its help at shutting down.
//!
//! A guest without an agent, or one that boots, never answers; so only silence after an answer counts, and a reset of the guest
//! begins anew. One connection per question: QEMU's channel serves one at a time, and what an earlier question left in it
//! is passed over by `guest-sync-delimited`, whose answer begins with the byte 0xFF.

use crate::api::Failure;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// For an answer. Emulated guests are slow; a silent one costs this much of every thorough look.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Most that is read of an answer.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// Before the answer to `guest-sync-delimited`.
const SENTINEL: u8 = 0xff;

/// What is known of the agent.
#[derive(Debug, Default)]
pub(crate) struct Heartbeat {
    last: Option<Instant>,
    resets: u64,
}

impl Heartbeat {
    /// Has it answered since the guest was started?
    pub(crate) fn has_answered(&self) -> bool {
        self.last.is_some()
    }

    /// A guest that has just been started, or was asleep.
    pub(crate) fn begin_anew(&mut self) {
        self.last = None;
    }

    /// Asks for a sign of life.
    ///
    /// # Errors
    /// It has answered before, and has been silent for `timeout`.
    pub(crate) fn check(&mut self, socket: &Path, timeout: Duration, resets: u64) -> Result<(), Failure> {
        if resets != self.resets {
            (self.resets, self.last) = (resets, None);
        }
        match ask(socket, &json!({ "execute": "guest-ping" })) {
            Ok(()) => self.last = Some(Instant::now()),
            Err(why) => {
                if let Some(silent) = self.last.map(|last| last.elapsed()).filter(|time| *time >= timeout) {
                    return Err(Failure::new(format!(
                        "the guest's agent has been silent for {} s ({why}): the guest hangs",
                        silent.as_secs()
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Asks the guest to shut itself down; there is no answer.
pub(crate) fn shut_down(socket: &Path) -> Result<(), String> {
    ask(socket, &json!({ "execute": "guest-shutdown", "arguments": { "mode": "powerdown" } }))
        .or_else(|error| if error == NO_ANSWER { Ok(()) } else { Err(error) })
}

const NO_ANSWER: &str = "it does not answer";

fn ask(socket: &Path, command: &Value) -> Result<(), String> {
    let said = |error: std::io::Error| {
        if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) {
            return NO_ANSWER.to_owned();
        }
        error.to_string()
    };
    let mut stream = UnixStream::connect(socket).map_err(said)?;
    let deadline = Instant::now() + ANSWER_LIMIT;
    stream.set_write_timeout(Some(ANSWER_LIMIT)).map_err(said)?;
    let id = u64::from(std::process::id());
    let mut sync = vec![SENTINEL];
    let line = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
    sync.extend_from_slice(format!("{line}\n").as_bytes());
    stream.write_all(&sync).map_err(said)?;
    let answer = read_line(&mut stream, deadline, true).map_err(said)?;
    if answer["return"].as_u64() != Some(id) {
        return Err("it answers out of order".into());
    }
    stream.write_all(format!("{command}\n").as_bytes()).map_err(said)?;
    let answer = read_line(&mut stream, deadline, false).map_err(said)?;
    if let Some(error) = answer.get("error") {
        return Err(error["desc"].as_str().unwrap_or("it refused").to_owned());
    }
    Ok(())
}

/// The next object; with `sentinel`, everything up to 0xFF is passed over.
fn read_line(stream: &mut UnixStream, deadline: Instant, sentinel: bool) -> std::io::Result<Value> {
    let (mut line, mut begun) = (Vec::new(), !sentinel);
    let mut byte = [0];
    for _ in 0..ANSWER_BYTES_MAX {
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        if stream.read(&mut byte)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        match byte[0] {
            SENTINEL => {
                begun = true;
                line.clear();
            }
            b'\n' if begun && !line.trim_ascii().is_empty() => {
                return serde_json::from_slice(&line).map_err(Into::into);
            }
            other if begun => line.push(other),
            _ => {}
        }
    }
    Err(std::io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    /// An agent that has something left from an earlier question in its channel.
    fn agent(listener: UnixListener) -> std::thread::JoinHandle<()> {
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"return\": \"of an earlier que").unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).unwrap() > 0 {
                let text: Vec<u8> = line.drain(..).filter(|byte| *byte != SENTINEL).collect();
                let command: Value = serde_json::from_slice(&text).unwrap();
                let answer = if command["execute"] == "guest-ping" {
                    "{\"return\": {}}\n".into()
                } else {
                    format!("\u{0}{{\"return\": {}}}\n", command["arguments"]["id"])
                };
                let mut bytes = answer.into_bytes();
                if bytes[0] == 0 {
                    bytes[0] = SENTINEL;
                }
                stream.write_all(&bytes).unwrap();
            }
        })
    }

    #[test]
    fn silence_counts_only_after_an_answer_and_until_a_reset() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let mut heartbeat = Heartbeat::default();
        assert_eq!(heartbeat.check(&path, Duration::ZERO, 0), Ok(()), "nobody has ever answered");
        let server = agent(UnixListener::bind(&path).unwrap());
        assert_eq!(heartbeat.check(&path, Duration::ZERO, 0), Ok(()));
        assert!(heartbeat.has_answered());
        server.join().unwrap();
        assert_eq!(heartbeat.check(&path, Duration::from_secs(3600), 0), Ok(()));
        let error = heartbeat.check(&path, Duration::ZERO, 0).unwrap_err();
        assert!(error.to_string().contains("silent"), "{error}");
        assert_eq!(heartbeat.check(&path, Duration::ZERO, 1), Ok(()), "the guest was reset");
    }
}
