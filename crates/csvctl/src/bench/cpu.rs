//! Processor time of the whole machine, from `/proc/stat`. In a lab every node, csvfs and smbd is on this machine,
//! so the difference over a job holds everything that the job cost, wherever it was spent.

use anyhow::Context as _;

/// `/proc/stat` counts in USER_HZ, which Linux fixes at 100 for user space.
const TICK_US: u64 = 10_000;

/// Busy time of all processors since boot, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Busy(u64);

impl Busy {
    /// Reads the counter.
    pub(super) fn now() -> anyhow::Result<Busy> {
        let text = std::fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        parse(&text).context("/proc/stat has no line \"cpu\" of at least eight numbers")
    }

    /// Microseconds between `earlier` and `self`.
    pub(super) fn since_us(self, earlier: Busy) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// user + nice + system + irq + softirq. Idle and iowait are not work, steal is somebody else's, and guest time
/// stands in user already.
fn parse(text: &str) -> Option<Busy> {
    let line = text.lines().find(|line| line.starts_with("cpu "))?;
    let ticks: Vec<u64> = line.split_ascii_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, _steal, ..] = ticks[..] else { return None };
    Some(Busy((user + nice + system + irq + softirq) * TICK_US))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_iowait_and_steal_do_not_count() {
        let busy = parse("cpu  100 2 30 4000 500 6 7 80 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n").unwrap();
        assert_eq!(busy, Busy(145 * TICK_US));
        assert_eq!(parse("cpu  1 2 3\n"), None);
        assert_eq!(Busy(30).since_us(Busy(10)), 20);
    }

    #[test]
    fn this_machine_has_the_line() {
        assert!(Busy::now().unwrap().0 > 0);
    }
}
