//! What people and programs read: plain tables, times, progress.

use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

/// Lets a progress bar move by itself, where that is possible: after csvctl has entered a node of a lab, its children
/// are in another PID namespace, and the kernel gives it no thread any more.
pub(crate) fn tick(bar: &ProgressBar) {
    let namespace = |name: &str| std::fs::read_link(format!("/proc/self/ns/{name}")).ok();
    if namespace("pid").is_some_and(|own| namespace("pid_for_children") == Some(own)) {
        bar.enable_steady_tick(Duration::from_millis(100));
    } else {
        bar.tick();
    }
}

/// A spinner with text, which has a bar while there is something to measure. Whoever waits shows it at every look, since nothing
/// else moves it inside a node of a lab.
#[derive(Debug)]
pub(crate) struct Bar(ProgressBar);

impl Bar {
    pub(crate) fn new() -> Bar {
        let bar = ProgressBar::new_spinner();
        tick(&bar);
        Bar(bar)
    }

    pub(crate) fn show(&self, text: String, percent: Option<u8>) {
        let template = match percent {
            Some(percent) => {
                self.0.set_length(100);
                self.0.set_position(u64::from(percent.min(100)));
                // As wide as the terminal: a line that is broken cannot be drawn anew.
                "{spinner} [{bar:24}] {wide_msg}"
            }
            None => "{spinner} {wide_msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
        self.0.set_message(text);
        self.0.tick();
    }

    /// Nothing of it stays on the screen.
    pub(crate) fn clear(&self) {
        self.0.finish_and_clear();
    }
}

/// Columns as wide as their widest cell; the first row is the head.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell_chars = |row: &Vec<String>, i: usize| row.get(i).map_or(0, |cell| cell.chars().count());
    let widths: Vec<usize> =
        (0..columns).map(|i| rows.iter().map(|row| cell_chars(row, i)).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line += &format!("{cell:width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// RFC 3339 in UTC, from milliseconds since the Unix epoch; with milliseconds only where they are not zero.
pub(crate) fn rfc3339(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000, unix_ms % 1000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let fraction = if ms == 0 { String::new() } else { format!(".{ms:03}") };
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}{fraction}Z")
}

/// Gregorian date of a day since 1970-01-01 (Hinnant's algorithm: years begin in March, so that the leap day is
/// the last).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_agree_with_known_ones() {
        for (unix_ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
            (4_102_444_800_000, "2100-01-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(unix_ms), text);
        }
    }

    #[test]
    fn table_lines_up() {
        let rows = [vec!["A".into(), "B".into()], vec!["long".into(), "x".into()]];
        assert_eq!(table(&rows), "A     B\nlong  x\n");
    }
}
