//! A line of the guest's journal, as guest and host have it.

use std::fmt;

/// Kind of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// The guest began to count.
    Boot,
    /// Half a second is over.
    Tick,
    /// The power button was pressed.
    Off,
}

/// See the module's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// Kind.
    pub what: What,
    /// From 1 on, through all boots.
    pub number: u64,
    /// From 1 on.
    pub boot: u64,
    /// Since the guest began to count in this boot, by its monotonic clock.
    pub mono_ns: u64,
    /// The guest's clock, since 1970.
    pub wall_ns: u64,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.what {
            What::Boot => "boot",
            What::Tick => "tick",
            What::Off => "off",
        };
        write!(f, "{what} {} {} {} {}", self.number, self.boot, self.mono_ns, self.wall_ns)
    }
}

impl Line {
    /// A whole line, or nothing.
    #[must_use]
    pub fn parse(text: &str) -> Option<Line> {
        let mut words = text.split(' ');
        let what = match words.next()? {
            "boot" => What::Boot,
            "tick" => What::Tick,
            "off" => What::Off,
            _ => return None,
        };
        let mut number = || words.next()?.parse().ok();
        let line = Line { what, number: number()?, boot: number()?, mono_ns: number()?, wall_ns: number()? };
        words.next().is_none().then_some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_are_written() {
        let line = Line { what: What::Tick, number: 7, boot: 2, mono_ns: 3, wall_ns: 4 };
        assert_eq!(Line::parse(&line.to_string()), Some(line));
        for bad in ["", "tick 1 1 1", "tick 1 1 1 1 1", "tock 1 1 1 1", "tick 1 1 1 x"] {
            assert_eq!(Line::parse(bad), None, "{bad}");
        }
    }
}
