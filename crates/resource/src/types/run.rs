//! Programs that are run to their end, and calls that may hang, with a limit of time and cancellation.
//!
//! A program is in a process group of its own and is killed with it when its time is over or nobody waits for it any
//! more; its output is bounded. A call into the kernel cannot be killed: [`Bounded`] leaves it behind in its thread, and
//! starts no second one before the first has returned, so that a disk that hangs costs one thread.

use crate::api::{Context, Failure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often cancellation is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How long a killed program may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(3);
/// How often somebody is told that a long call gets on.
const TELL: Duration = Duration::from_secs(10);
/// Most that is kept of each output of a program.
const OUTPUT_BYTES_MAX: u64 = 1 << 20;

/// A program to be run.
#[derive(Debug)]
pub(crate) struct Program<'a> {
    name: &'a str,
    package: &'a str,
    args: Vec<String>,
    env: Vec<(&'a str, String)>,
    input: Option<String>,
    limit: Duration,
}

/// What a program left.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    /// Exit code; `None` when a signal ended it.
    pub(crate) code: Option<i32>,
    /// What it wrote.
    pub(crate) stdout: String,
    /// What it complained about.
    pub(crate) stderr: String,
}

impl Output {
    pub(crate) fn success(&self) -> bool {
        self.code == Some(0)
    }

    /// What it said, for a message: its complaint, else its output.
    pub(crate) fn said(&self) -> String {
        let text = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let from = lines.len().saturating_sub(6);
        match (lines.is_empty(), self.code) {
            (false, _) => lines[from..].join(" | "),
            (true, Some(code)) => format!("it ended with code {code} and said nothing"),
            (true, None) => "a signal ended it".to_owned(),
        }
    }
}

impl<'a> Program<'a> {
    /// A program by name, with the Debian package that it comes in.
    pub(crate) fn new(name: &'a str, package: &'a str, limit: Duration) -> Self {
        Program { name, package, args: Vec::new(), env: Vec::new(), input: None, limit }
    }

    pub(crate) fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    pub(crate) fn env(mut self, name: &'a str, value: impl Into<String>) -> Self {
        self.env.push((name, value.into()));
        self
    }

    pub(crate) fn input(mut self, text: impl Into<String>) -> Self {
        self.input = Some(text.into());
        self
    }

    /// Runs it to its end, whatever its exit code.
    ///
    /// # Errors
    /// `NotHere` when it is not installed, `Cancelled`, `Failed` when it does not start or takes too long; then it has
    /// been killed.
    pub(crate) fn run(self, context: &Context) -> Result<Output, Failure> {
        let mut child = self.spawn()?;
        let writer = self.input.clone().zip(child.stdin.take()).map(|(text, mut stdin)| {
            // A program that has ended already tells more by its exit code than by the broken pipe.
            std::thread::spawn(move || drop(stdin.write_all(text.as_bytes())))
        });
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        let waited = self.wait(&mut child, self.limit, Some(context));
        if let Err(error) = waited {
            if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            if self.wait(&mut child, KILL_LIMIT, None).is_err() {
                // It hangs in the kernel, as on a disk that does not answer. A thread takes note of its end.
                std::thread::spawn(move || drop(child.wait()));
                return Err(Failure::new(format!("{error}; it hangs in the kernel and cannot be ended",)));
            }
            let _ = child.wait();
            return Err(error);
        }
        let status = child.wait().map_err(|error| Failure::new(format!("{}: {error}", self.name)))?;
        if let Some(writer) = writer {
            let _ = writer.join();
        }
        let text = |reader: Option<JoinHandle<String>>| {
            reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
        };
        let (stdout, stderr) = (text(stdout), text(stderr));
        Ok(Output { code: status.code(), stdout, stderr })
    }

    /// As [`Program::run`]; another exit code than 0 is an error, which begins with `what`.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn succeed(self, context: &Context, what: &str) -> Result<Output, Failure> {
        let name = self.name.to_owned();
        let output = self.run(context)?;
        if output.success() {
            return Ok(output);
        }
        Err(Failure::new(format!("{what}: {name}: {}", output.said())))
    }

    fn spawn(&self) -> Result<Child, Failure> {
        let spawned = Command::new(self.name)
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("LC_ALL", "C")
            .stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn();
        spawned.map_err(|error| {
            if error.kind() == ErrorKind::NotFound {
                return Failure::NotHere(format!(
                    "the program {} is not on this node; install the package {}",
                    self.name, self.package
                ));
            }
            Failure::new(format!("{} could not be started: {error}", self.name))
        })
    }

    fn wait(&self, child: &mut Child, limit: Duration, context: Option<&Context>) -> Result<(), Failure> {
        let failed =
            |error: std::io::Error| Failure::new(format!("{} cannot be watched: {error}", self.name));
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| Failure::new(format!("{} has no process number", self.name)))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| failed(errno.into()))?;
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let tick = Timespec::try_from(left.min(TICK)).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&tick)) {
                Ok(1..) => return Ok(()),
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
            if context.is_some_and(|context| context.cancelled()) {
                return Err(Failure::Cancelled);
            }
            if left.is_zero() {
                return Err(Failure::new(format!(
                    "{} did not end within {} s and was killed",
                    self.name,
                    limit.as_secs_f32()
                )));
            }
        }
    }
}

fn collect(pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let mut bounded = pipe.take(OUTPUT_BYTES_MAX);
        let _ = bounded.read_to_end(&mut bytes);
        // What is behind the bound is read and dropped, so that the program does not stop at a full pipe.
        let _ = std::io::copy(&mut bounded.into_inner(), &mut std::io::sink());
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Waits until `deadline` or until nobody waits any more.
///
/// # Errors
/// `Cancelled`.
pub(crate) fn pause(context: &Context, time: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + time;
    loop {
        if context.cancelled() {
            return Err(Failure::Cancelled);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(TICK));
    }
}

/// One call at a time that may hang.
#[derive(Debug, Default)]
pub(crate) struct Bounded {
    /// The call that has not returned yet, and when it began.
    left: Option<(Receiver<()>, Instant)>,
}

impl Bounded {
    /// Calls `call` in a thread of its own and waits for it.
    ///
    /// # Errors
    /// `call`'s own; `Failed` when it takes longer than `limit` or an earlier one still hangs.
    pub(crate) fn call<T: Send + 'static>(
        &mut self,
        limit: Duration,
        what: &str,
        call: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, Failure> {
        let began = Instant::now();
        let late = || began.elapsed() >= limit;
        self.watch(limit.min(TICK), what, call, || {
            late().then(|| Failure::new(format!("{what} did not return within {} s", limit.as_secs_f32())))
        })
    }

    /// As [`Bounded::call`], for as long as somebody waits for it.
    ///
    /// # Errors
    /// As there, and `Cancelled`.
    pub(crate) fn long<T: Send + 'static>(
        &mut self,
        context: &Context,
        what: &str,
        call: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, Failure> {
        let mut told = Instant::now();
        self.watch(TICK, what, call, || {
            if told.elapsed() >= TELL {
                context.progress(what);
                told = Instant::now();
            }
            context.cancelled().then_some(Failure::Cancelled)
        })
    }

    /// Waits until `give_up` says why not to.
    fn watch<T: Send + 'static>(
        &mut self,
        tick: Duration,
        what: &str,
        call: impl FnOnce() -> Result<T, String> + Send + 'static,
        mut give_up: impl FnMut() -> Option<Failure>,
    ) -> Result<T, Failure> {
        if let Some((done, since)) = &self.left {
            while matches!(done.recv_timeout(tick), Err(RecvTimeoutError::Timeout)) {
                if give_up().is_some() {
                    return Err(Failure::new(format!("{what} hangs since {} s", since.elapsed().as_secs())));
                }
            }
            self.left = None;
        }
        let (answer, answered) = channel();
        let (finish, finished) = channel();
        let began = Instant::now();
        let spawned = std::thread::Builder::new().name("bounded".into()).spawn(move || {
            let _ = answer.send(call());
            drop(finish);
        });
        spawned.map_err(|error| Failure::new(format!("{what}: no thread for it: {error}")))?;
        loop {
            match answered.recv_timeout(tick) {
                Ok(result) => return result.map_err(Failure::Failed),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::new(format!("{what}: it panicked")));
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(failure) = give_up() {
                        self.left = Some((finished, began));
                        return Err(failure);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::testbed::Bed;

    #[test]
    fn a_program_gets_its_input_and_gives_code_and_output() {
        let bed = Bed::new();
        let program = Program::new("sh", "dash", Duration::from_secs(20));
        let output =
            program.args(["-c", "cat; echo bad >&2; exit 3"]).input("hello").run(&bed.context()).unwrap();
        assert_eq!((output.code, output.stdout.as_str()), (Some(3), "hello"));
        assert_eq!(output.said(), "bad");
    }

    #[test]
    fn a_program_that_takes_too_long_or_that_nobody_waits_for_is_killed() {
        let bed = Bed::new();
        let sleep =
            || Program::new("sh", "dash", Duration::from_millis(200)).args(["-c", "sleep 1000; true"]);
        let error = sleep().run(&bed.context()).unwrap_err();
        assert!(matches!(&error, Failure::Failed(text) if text.contains("was killed")), "{error}");
        bed.cancel();
        assert_eq!(sleep().run(&bed.context()).unwrap_err(), Failure::Cancelled);
    }

    #[test]
    fn a_program_that_is_not_there_names_its_package() {
        let program = Program::new("no-such-program-here", "its-package", Duration::from_secs(1));
        let error = program.run(&Bed::new().context()).unwrap_err();
        assert!(matches!(&error, Failure::NotHere(text) if text.contains("its-package")), "{error}");
    }

    #[test]
    fn a_call_that_hangs_is_left_behind_and_no_second_one_starts() {
        let mut bounded = Bounded::default();
        let (release, held) = channel::<()>();
        let limit = Duration::from_millis(50);
        let hang = bounded.call(limit, "the disk", move || {
            let _ = held.recv();
            Ok(())
        });
        assert!(hang.is_err());
        let second = bounded.call(limit, "the disk", || -> Result<(), String> { panic!("must not run") });
        assert!(matches!(&second, Err(Failure::Failed(text)) if text.contains("hangs since")), "{second:?}");
        drop(release);
        assert_eq!(bounded.call(Duration::from_secs(30), "the disk", || Ok(7)), Ok(7));
    }
}
