//! What runs in the guest: a journal on its disk that gets a line twice a second, each durable before the console tells of it.
//!
//! A line is `WHAT NUMBER BOOT MONO_NS WALL_NS`: `boot` once for each start, `tick` for the counter, `off` when the power button
//! was pressed. Meanwhile its memory is written and compared (`Memory`). Numbers go on from boot to boot without a gap, so a
//! lost line shows, and so does one that the guest never wrote. Times are the guest's own: since it started to count, and of its clock.

use super::line::{Line, What};
use anyhow::Context as _;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

/// Between two lines.
pub const PERIOD: Duration = Duration::from_millis(500);
/// `struct input_event` of 64-bit Linux: two words of time, type, code, value.
const EVENT_SIZE: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const PAGE_WORDS: usize = 512;
const PAGES: usize = 2048;
/// No factor of [`PAGES`].
const STRIDE: usize = 577;
/// A tenth of what a migration that is held back to 4 MiB/s sends.
const PAGES_PER_TURN: usize = 10;
const TURN: Duration = Duration::from_millis(100);

struct Journal {
    file: File,
    began: Instant,
    number: u64,
    boot: u64,
}

impl Journal {
    fn open(path: &Path) -> anyhow::Result<Journal> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text).context("reading what was there")?;
        if !text.is_empty() && !text.ends_with('\n') {
            // It was never said to be there.
            file.write_all(b"\n")?;
        }
        let lines: Vec<Line> = text.lines().filter_map(Line::parse).collect();
        let (number, boot) = lines.last().map_or((0, 0), |last| (last.number, last.boot));
        Ok(Journal { file, began: Instant::now(), number, boot: boot + 1 })
    }

    fn write(&mut self, what: What) -> anyhow::Result<()> {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let line = Line {
            what,
            number: self.number + 1,
            boot: self.boot,
            mono_ns: u64::try_from(self.began.elapsed().as_nanos())?,
            wall_ns: u64::try_from(wall.as_nanos())?,
        };
        self.file.write_all(format!("{line}\n").as_bytes()).context("writing a line")?;
        self.file.sync_all().context("fsync")?;
        self.number += 1;
        say(&line.to_string());
        Ok(())
    }
}

/// Pages whose contents are known; one after the other is compared and written anew. One that is not as it was written has been
/// lost on the way to another node.
struct Memory {
    pages: Vec<[u64; PAGE_WORDS]>,
    /// How often each was written.
    written: Vec<u64>,
    next: usize,
}

impl Memory {
    fn new() -> Memory {
        Memory { pages: vec![[0; PAGE_WORDS]; PAGES], written: vec![0; PAGES], next: 0 }
    }

    /// Compares some pages and writes them anew. The first that is wrong, in words.
    fn turn(&mut self) -> Result<(), String> {
        for _ in 0..PAGES_PER_TURN {
            let (page, count) = (&mut self.pages[self.next], &mut self.written[self.next]);
            let count_now = std::hint::black_box(*count);
            if let Some(word) = page.iter().find(|word| **word != count_now) {
                return Err(format!("memory: page {} has {word}, not {count_now}", self.next));
            }
            *count += 1;
            page.fill(*count);
            std::hint::black_box(page);
            // A stride that comes to all of them, and not in their order.
            self.next = (self.next + STRIDE) % PAGES;
        }
        Ok(())
    }
}

/// For the host; what is cut off by a power cut has no "ok".
fn say(text: &str) {
    // Nobody reads when that fails.
    let _ = writeln!(std::io::stdout(), "csv-counter: {text} ok");
}

/// Counts until the button is pressed.
///
/// # Errors
/// The journal cannot be written.
pub fn run(journal: &Path, button: &Path) -> anyhow::Result<()> {
    let pressed = watch_button(button)?;
    std::thread::spawn(|| {
        let mut memory = Memory::new();
        loop {
            if let Err(wrong) = memory.turn() {
                say(&format!("failed {wrong}"));
                return;
            }
            std::thread::sleep(TURN);
        }
    });
    // Ends a line that the start of the machine may have left.
    writeln!(std::io::stdout())?;
    let mut journal = Journal::open(journal).with_context(|| journal.display().to_string())?;
    journal.write(What::Boot)?;
    let mut next = Instant::now() + PERIOD;
    loop {
        match pressed.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return journal.write(What::Off),
        }
        journal.write(What::Tick)?;
        // After a stand-still it catches up: every half second has its line.
        next += PERIOD;
    }
}

fn watch_button(path: &Path) -> anyhow::Result<Receiver<()>> {
    let mut events = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut event = [0; EVENT_SIZE];
        while events.read_exact(&mut event).is_ok() {
            let word = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
            if (word(16), word(18), word(20)) == (EV_KEY, KEY_POWER, 1) && sender.send(()).is_err() {
                break;
            }
        }
        // Whoever waits for the button waits in vain then.
        std::mem::forget(sender);
    });
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_was_lost_is_found() {
        let mut memory = Memory::new();
        for _ in 0..2 * PAGES / PAGES_PER_TURN {
            memory.turn().unwrap();
        }
        assert!(memory.written.iter().all(|count| *count >= 1), "some page is never looked at");
        let lost = memory.next;
        memory.pages[lost] = [0; PAGE_WORDS];
        assert!(memory.turn().unwrap_err().contains("memory"));
    }

    #[test]
    fn numbers_go_on_after_a_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut first = Journal::open(&path).unwrap();
        first.write(What::Boot).unwrap();
        first.write(What::Tick).unwrap();
        first.file.write_all(b"tick 3 1 99").unwrap();
        let mut second = Journal::open(&path).unwrap();
        second.write(What::Boot).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Line> = text.lines().filter_map(Line::parse).collect();
        let seen: Vec<_> = lines.iter().map(|line| (line.what, line.number, line.boot)).collect();
        assert_eq!(seen, [(What::Boot, 1, 1), (What::Tick, 2, 1), (What::Boot, 3, 2)]);
    }
}
