//! The guest's console as the host sees it: a file that QEMU appends to on whichever node it runs, each line with the moment at
//! which it was there.
//!
//! The guest's clock stands still while the machine does, the host's does not: between two lines the difference of the two is
//! how long the machine stood still ([`standstill`]).

use super::line::{Line, What};
use crate::wait;
use anyhow::{Context as _, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a watcher waits before it looks whether it is still wanted.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Lines shown of a console that is not as it should be.
const TAIL: usize = 30;

/// A line of the journal that the guest said to be durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// When it was there on the host.
    pub at: Instant,
    /// The line.
    pub line: Line,
}

#[derive(Debug, Default)]
struct Log {
    seen: Vec<Seen>,
    /// What the guest complained of.
    failures: Vec<String>,
    /// Times at which the disk was unmounted.
    unmounted: usize,
}

/// A watched console.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    log: Arc<Mutex<Log>>,
    over: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
}

impl Console {
    /// Makes the file and watches it.
    ///
    /// # Errors
    /// The file cannot be made or watched.
    pub fn watch(path: &Path) -> anyhow::Result<Console> {
        let file = File::options().read(true).append(true).create(true).open(path);
        let file = file.with_context(|| format!("making {}", path.display()))?;
        let notify = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        add_watch(&notify, path, WatchFlags::MODIFY).context("watching the console")?;
        let (log, over) = (Arc::<Mutex<Log>>::default(), Arc::<AtomicBool>::default());
        let (to, ends) = (Arc::clone(&log), Arc::clone(&over));
        let watcher = std::thread::spawn(move || follow(file, File::from(notify), &to, &ends));
        Ok(Console { path: path.to_owned(), log, over, watcher: Some(watcher) })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.log().seen.clone()
    }

    /// The last line so far.
    #[must_use]
    pub fn last(&self) -> Option<Seen> {
        self.log().seen.last().copied()
    }

    /// How often the guest has unmounted its disk.
    #[must_use]
    pub fn unmounted(&self) -> usize {
        self.log().unmounted
    }

    /// Waits until the guest has written that many lines more.
    ///
    /// # Errors
    /// Not in time.
    pub fn wait_more(&self, lines: usize, deadline: Duration) -> anyhow::Result<()> {
        let before = self.log().seen.len();
        wait::until(&format!("{lines} more lines of {}", self.path.display()), deadline, || {
            Ok((self.log().seen.len() >= before + lines).then_some(()))
        })
    }

    /// Waits until the guest counts in its boot of that number.
    ///
    /// # Errors
    /// Not in time.
    pub fn wait_boot(&self, boot: u64, deadline: Duration) -> anyhow::Result<Seen> {
        wait::until(&format!("boot {boot} of {}", self.path.display()), deadline, || {
            Ok(self.last().filter(|seen| seen.line.boot == boot && seen.line.what == What::Tick))
        })
    }

    /// The last lines, each with the time since the one before on the host.
    fn tail(&self) -> String {
        let seen = self.seen();
        let from = seen.len().saturating_sub(TAIL);
        let line =
            |two: &[Seen]| format!("\n  {} after {} ms", two[1].line, (two[1].at - two[0].at).as_millis());
        seen[from..].windows(2).map(line).collect()
    }

    /// The guest had nothing to complain of, and its lines follow each other, with that many boots.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, boots: u64) -> anyhow::Result<()> {
        let log = self.log();
        ensure!(log.failures.is_empty(), "{}: the guest says: {:?}", self.path.display(), log.failures);
        let lines: Vec<Line> = log.seen.iter().map(|seen| seen.line).collect();
        drop(log);
        follows(&lines)
            .with_context(|| format!("{}, whose last lines are{}", self.path.display(), self.tail()))?;
        let last = lines.last().map_or(0, |line| line.boot);
        ensure!(last == boots, "{}: the guest was started {last} times, not {boots}", self.path.display());
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(watcher) = self.watcher.take() {
            watcher.join().ok();
        }
    }
}

fn follow(mut file: File, mut notify: File, log: &Mutex<Log>, over: &AtomicBool) {
    let (mut text, mut events) = (Vec::new(), [0; 4096]);
    while !over.load(Ordering::Relaxed) {
        let ready = poll(&mut [PollFd::new(&notify, PollFlags::IN)], Some(&LOOK));
        if ready.is_ok_and(|ready| ready > 0) {
            // What they say is known; the file has it all.
            while notify.read(&mut events).is_ok_and(|read| read > 0) {}
        }
        let at = Instant::now();
        if file.read_to_end(&mut text).is_err() {
            return;
        }
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            log.lock().unwrap_or_else(PoisonError::into_inner).take(at, &String::from_utf8_lossy(&line));
        }
    }
}

impl Log {
    fn take(&mut self, at: Instant, line: &str) {
        // The kernel may have said something on the same line before.
        let Some((_, said)) = line.trim_end().split_once("csv-counter: ") else { return };
        let Some(said) = said.strip_suffix(" ok") else { return };
        if let Some(line) = Line::parse(said) {
            self.seen.push(Seen { at, line });
        } else if said == "unmounted" {
            self.unmounted += 1;
        } else {
            self.failures.push(said.to_owned());
        }
    }
}

/// Numbers without a gap, boots one after the other, each begun by a line of its own.
///
/// # Errors
/// The first line that does not follow.
pub fn follows(lines: &[Line]) -> anyhow::Result<()> {
    let mut before: Option<Line> = None;
    for line in lines {
        let (number, boot) = before.map_or((0, 0), |line| (line.number, line.boot));
        let starts = u64::from(line.what == What::Boot);
        if line.number != number + 1 || line.boot != boot + starts {
            bail!("\"{line}\" comes after {before:?}");
        }
        before = Some(*line);
    }
    ensure!(before.is_some(), "there is not a line");
    Ok(())
}

/// How long the machine stood still between two moments of its life: the least delay of the lines after against the least
/// before, since a line may be late and never early. One that ended less than `SAMPLES` lines ago counts again, so moves
/// are kept that far apart.
///
/// # Errors
/// There are no lines of one boot on both sides.
pub fn standstill(seen: &[Seen], from: Instant, until: Instant) -> anyhow::Result<Duration> {
    let first = seen.first().context("no lines")?.at;
    let boot = seen.iter().rev().find(|seen| seen.at <= from).context("no line before")?.line.boot;
    let delay_ns = |seen: &Seen| {
        i128::try_from((seen.at - first).as_nanos()).unwrap_or(0) - i128::from(seen.line.mono_ns)
    };
    let of_boot = || seen.iter().filter(|seen| seen.line.boot == boot);
    let before = of_boot().filter(|seen| seen.at <= from).rev().take(SAMPLES).map(delay_ns).min();
    let after = of_boot().filter(|seen| seen.at > until).take(SAMPLES).map(delay_ns).min();
    let (before, after) = (before.context("no line before")?, after.context("no line after")?);
    Ok(Duration::from_nanos(u64::try_from(after - before).unwrap_or(0)))
}

/// Lines looked at on each side.
const SAMPLES: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn line(what: What, number: u64, boot: u64, mono_ms: u64) -> Line {
        Line { what, number, boot, mono_ns: mono_ms * 1_000_000, wall_ns: 0 }
    }

    #[test]
    fn a_console_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::watch(&dir.path().join("console")).unwrap();
        let mut file = File::options().append(true).open(console.path()).unwrap();
        file.write_all(b"noise\r\n[1.0] x csv-counter: boot 1 1 5 6 ok\r\ncsv-counter: tick 2 1 7").unwrap();
        wait::until("a line", Duration::from_secs(10), || Ok(console.last())).unwrap();
        assert_eq!(console.seen().len(), 1, "a line that is cut off does not count");
        file.write_all(b" 8 ok\r\ncsv-counter: unmounted ok\r\n").unwrap();
        wait::until("the end", Duration::from_secs(10), || Ok((console.unmounted() == 1).then_some(())))
            .unwrap();
        console.check(1).unwrap();
        assert!(console.check(2).is_err());
        file.write_all(b"csv-counter: failed no disk ok\r\n").unwrap();
        wait::until("the failure", Duration::from_secs(10), || Ok(console.check(1).err())).unwrap();
    }

    #[test]
    fn gaps_are_found() {
        let good = [line(What::Boot, 1, 1, 0), line(What::Tick, 2, 1, 500), line(What::Boot, 3, 2, 0)];
        follows(&good).unwrap();
        assert!(follows(&[]).is_err());
        assert!(follows(&good[1..]).is_err());
        assert!(follows(&[good[0], line(What::Tick, 3, 1, 500)]).is_err());
        assert!(follows(&[good[0], line(What::Tick, 2, 2, 500)]).is_err());
    }

    #[test]
    fn a_standstill_is_what_the_guest_does_not_know_of() {
        let begin = Instant::now();
        // Late by 30 ms now and then; 200 ms of stand-still before the fourth.
        let late = [
            (0, 0),
            (500, 530),
            (1000, 1000),
            (1500, 1700),
            (2000, 2230),
            (2500, 2700),
            (3000, 3200),
            (3500, 3740),
            (4000, 4200),
        ];
        let seen: Vec<Seen> = late
            .iter()
            .map(|(mono, at)| Seen {
                at: begin + Duration::from_millis(*at),
                line: line(What::Tick, 1, 1, *mono),
            })
            .collect();
        let at = |ms| begin + Duration::from_millis(ms);
        assert_eq!(standstill(&seen, at(1100), at(1600)).unwrap(), Duration::from_millis(200));
        assert_eq!(standstill(&seen, at(3300), at(3400)).unwrap(), Duration::ZERO);
        assert!(standstill(&seen, at(1100), at(5000)).is_err());
    }
}
