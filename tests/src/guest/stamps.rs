//! Numbered records, each written, made durable, and only then acknowledged in a second file, which lies where no fault of
//! the test reaches. Whoever reads the records later knows which must be there: every one that was acknowledged, and
//! perhaps the next.
//!
//! Record `n` fills slot `n % SLOTS`, so the file is written over and over, in place, past the first round.

use anyhow::{Context as _, bail, ensure};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

/// Bytes of a record: its number, repeated.
const RECORD_BYTES: usize = 4096;
const SLOTS: u64 = 64;
/// A pause between records leaves the emulated machine some time for others.
const PAUSE: Duration = Duration::from_millis(20);

fn record(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(RECORD_BYTES / 8)
}

fn offset(slot: u64) -> u64 {
    slot * RECORD_BYTES as u64
}

/// Writes records from number `first` on until an error ends it. With `first` 1 the file is made.
///
/// # Errors
/// What the file system answered, with the number of the record.
pub fn write(path: &Path, acknowledged: &Path, first: u64) -> anyhow::Result<()> {
    ensure!(first > 0, "numbers start at 1");
    let file = OpenOptions::new().write(true).create(true).truncate(first == 1).open(path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    let told = OpenOptions::new().write(true).create(true).truncate(first == 1).open(acknowledged);
    let told = told.with_context(|| format!("opening {}", acknowledged.display()))?;
    for number in first.. {
        let at = offset(number % SLOTS);
        let written = file.write_all_at(&record(number), at).and_then(|()| file.sync_data());
        written.with_context(|| format!("record {number}"))?;
        told.write_all_at(&number.to_le_bytes(), 0).context("acknowledging")?;
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Writes records for ever, as a program does that takes an error of fsync for what it is: the record is not durable, and is
/// written again.
///
/// # Errors
/// None but those of the first record: nothing has been acknowledged.
pub fn write_again(path: &Path, acknowledged: &Path) -> anyhow::Result<()> {
    let mut first = 1;
    loop {
        let Err(error) = write(path, acknowledged, first) else { return Ok(()) };
        eprintln!("{error:#}");
        first = last(acknowledged)? + 1;
        std::thread::sleep(PAUSE);
    }
}

/// Number of the last record that was acknowledged.
///
/// # Errors
/// None was.
pub fn last(acknowledged: &Path) -> anyhow::Result<u64> {
    let bytes = std::fs::read(acknowledged).with_context(|| format!("reading {}", acknowledged.display()))?;
    let bytes = bytes.try_into().ok().context("no record was acknowledged")?;
    Ok(u64::from_le_bytes(bytes))
}

/// Checks that every record up to `last` is there, or its successor in the same slot.
///
/// # Errors
/// The first slot that has something else.
pub fn check(path: &Path, last: u64) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    for slot in 0..SLOTS {
        // The largest number up to `last` that falls into this slot.
        let Some(wanted) = last.checked_sub((last % SLOTS + SLOTS - slot) % SLOTS).filter(|n| *n > 0) else {
            continue;
        };
        let mut found = vec![0; RECORD_BYTES];
        file.read_exact_at(&mut found, offset(slot)).with_context(|| format!("slot {slot}"))?;
        // The one after the last may have been written without a word about it.
        let next = last + 1;
        if found != record(wanted) && (next % SLOTS != slot || found != record(next)) {
            let number = found.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            bail!(
                "{}: slot {slot} must have record {wanted} and has {number} (last acknowledged: {last})",
                path.display()
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(dir: &Path, last: u64) -> (std::path::PathBuf, File) {
        let path = dir.join("stamps");
        let file = File::create(&path).unwrap();
        for number in 1..=last {
            file.write_all_at(&record(number), offset(number % SLOTS)).unwrap();
        }
        (path, file)
    }

    #[test]
    fn a_lost_record_is_found_and_one_too_many_is_allowed() {
        let dir = tempfile::tempdir().unwrap();
        for last in [1, 2, SLOTS - 1, SLOTS, SLOTS + 7, 3 * SLOTS] {
            let (path, file) = written(dir.path(), last);
            check(&path, last).unwrap();
            // Record 0 never was: slot 0 lies before all that are written, so the file is long enough.
            let next = last + 1;
            file.write_all_at(&record(next), offset(next % SLOTS)).unwrap();
            check(&path, last).unwrap();
            file.write_all_at(&record(next + SLOTS), offset(next % SLOTS)).unwrap();
            if next > SLOTS {
                check(&path, last).unwrap_err();
            }
            written(dir.path(), last - 1);
            check(&path, last).unwrap_err();
        }
    }

    #[test]
    fn the_writer_stops_at_an_error_and_has_told_what_is_durable() {
        let dir = tempfile::tempdir().unwrap();
        let acknowledged = dir.path().join("acknowledged");
        // A device that takes nothing.
        let error = write(Path::new("/dev/full"), &acknowledged, 5).unwrap_err();
        assert!(error.to_string().contains("record 5"), "{error}");
        last(&acknowledged).unwrap_err();
    }
}
