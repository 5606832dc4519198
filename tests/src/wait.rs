//! Waiting with deadlines: for a condition, for a process to end. Nothing here waits for ever.

use anyhow::{Context as _, bail};
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Between two looks at a condition that has no event to wait for.
const POLL: Duration = Duration::from_millis(50);

/// Looks until `probe` gives a value; an error that lasts is part of the message at the deadline.
///
/// # Errors
/// The deadline passed.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = Instant::now() + deadline;
    loop {
        let last = match probe() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() >= end {
            let seen = last.map_or(String::new(), |error| format!("; last error: {error:#}"));
            bail!("{what}: not within {} ms{seen}", deadline.as_millis());
        }
        std::thread::sleep(POLL);
    }
}

/// What a process printed and how it ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ended {
    /// Standard output of a process that succeeded.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn ok(self, what: &str) -> anyhow::Result<String> {
        if !self.status.success() {
            bail!("{what}: {}\n{}\n{}", self.status, self.stderr.trim(), self.stdout.trim());
        }
        Ok(self.stdout)
    }

    /// Both outputs of a process that failed.
    ///
    /// # Errors
    /// It succeeded.
    pub fn failed(self, what: &str) -> anyhow::Result<String> {
        if self.status.success() {
            bail!("{what} succeeded but must not\n{}\n{}", self.stdout.trim(), self.stderr.trim());
        }
        Ok(format!("{}\n{}", self.stdout, self.stderr))
    }
}

/// Runs a process to its end.
///
/// # Errors
/// It cannot be started, or did not end by the deadline and was killed.
pub fn run(command: &mut Command, deadline: Duration) -> anyhow::Result<Ended> {
    let what = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {what}"))?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = exit_within(&mut child, deadline);
    let take = |receiver: mpsc::Receiver<String>| {
        // A grandchild may hold the pipe open after the process has ended.
        receiver.recv_timeout(Duration::from_secs(5)).unwrap_or_default()
    };
    match status? {
        Some(status) => Ok(Ended { status, stdout: take(stdout), stderr: take(stderr) }),
        None => bail!("{what}: not done within {} s\n{}\n{}", deadline.as_secs(), take(stderr), take(stdout)),
    }
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            pipe.read_to_end(&mut bytes).ok();
        }
        sender.send(String::from_utf8_lossy(&bytes).into_owned()).ok();
    });
    receiver
}

/// Waits for a child; kills it at the deadline and then gives `None`.
///
/// # Errors
/// The child cannot be waited for.
pub fn exit_within(child: &mut Child, deadline: Duration) -> anyhow::Result<Option<ExitStatus>> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(status) = child.try_wait().context("waiting for a process")? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            child.kill().context("killing a process that is late")?;
            child.wait().context("waiting for a killed process")?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_process_is_killed_and_told() {
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(50)).unwrap_err().to_string();
        assert!(error.contains("sleep"), "{error}");
        let ended =
            run(Command::new("sh").args(["-c", "echo a; echo b >&2; exit 3"]), Duration::from_secs(10));
        let ended = ended.unwrap();
        assert_eq!(
            (ended.status.code(), ended.stdout.as_str(), ended.stderr.as_str()),
            (Some(3), "a\n", "b\n")
        );
        assert!(ended.ok("sh").is_err());
    }

    #[test]
    fn until_tells_the_last_error() {
        let error = until::<()>("x", Duration::from_millis(1), || bail!("not yet")).unwrap_err().to_string();
        assert!(error.contains("not yet"), "{error}");
        let mut left = 2;
        let value = until("y", Duration::from_secs(10), || {
            left -= 1;
            Ok((left == 0).then_some(5))
        });
        assert_eq!(value.unwrap(), 5);
    }
}
