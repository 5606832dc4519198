//! Running the few system programs that the lab is made of (`ip`, `losetup`, `nsenter`, `unshare`).
//!
//! A failure tells the whole command and what it wrote on standard error.

use anyhow::{Context, bail};
use std::ffi::OsStr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often a condition is looked at that the kernel gives no event for.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Runs a program to its end and returns what it wrote on standard output.
pub(super) fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    run_command(&mut command)
}

/// As `run`, for a command that is put together already.
pub(super) fn run_command(command: &mut Command) -> anyhow::Result<String> {
    let shown = show(command);
    let output = command.output().with_context(|| {
        format!("cannot run {shown}; is the package that holds it installed? (scripts/deps.sh)")
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{shown}: {}: {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs `ip` with the words of `line`.
pub(super) fn ip(line: &str) -> anyhow::Result<String> {
    run("ip", &line.split(' ').collect::<Vec<_>>())
}

/// Looks until `done` says so; false when the time is over.
pub(super) fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_tell_the_command_and_its_words() {
        let error = run("sh", &["-c", "echo broken >&2; exit 4"]).unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains("sh -c") && error.contains('4'), "{error}");
        let error = run("no-such-program", &["x"]).unwrap_err().to_string();
        assert!(error.contains("no-such-program x"), "{error}");
        assert_eq!(run("echo", &["a"]).unwrap(), "a\n");
    }
}
