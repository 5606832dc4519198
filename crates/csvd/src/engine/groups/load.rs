//! How busy this machine is, for its report: placement and balancing go by it.

use crate::engine::Engine;
use parking_lot::Mutex;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

/// Between two looks. A machine that is busy for a moment is not busy.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// What the node itself keeps at least, in MiB: a tenth of its memory, but not less than this.
const RESERVED_MIB_MIN: u64 = 512;

/// What was seen last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Processors.
    pub(crate) cpus: u32,
    /// Memory of the machine, in MiB.
    pub(crate) total_mib: u64,
    /// Memory in use, in MiB.
    pub(crate) used_mib: u64,
    /// Processors' time in use, in thousandths of all.
    pub(crate) cpu_permille: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Load(Mutex<Seen>);

impl Load {
    pub(crate) fn get(&self) -> Seen {
        *self.0.lock()
    }
}

impl Seen {
    /// What virtual machines may have altogether, in MiB, unless the administrator says.
    pub(crate) fn for_machines_mib(&self) -> u64 {
        self.total_mib.saturating_sub((self.total_mib / 10).max(RESERVED_MIB_MIN))
    }
}

impl Engine {
    /// The loop.
    pub(super) async fn watch_load(self: Arc<Self>) {
        let mut before = None;
        while !self.is_stopping() {
            let now = cpu_times(&fs::read_to_string("/proc/stat").unwrap_or_default());
            let (total_mib, used_mib) = memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
            let cpus =
                std::thread::available_parallelism().map_or(0, |cpus| u32::try_from(cpus.get()).unwrap_or(0));
            let cpu_permille = match (before, now) {
                (Some(before), Some(now)) => busy_permille(before, now),
                _ => 0,
            };
            before = now;
            *self.groups.load.0.lock() = Seen { cpus, total_mib, used_mib, cpu_permille };
            self.report_changed();
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// All and idle time of all processors together, from `/proc/stat` (proc_stat(5)), in ticks.
fn cpu_times(stat: &str) -> Option<(u64, u64)> {
    let line = stat.lines().find(|line| line.starts_with("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|tick| tick.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; what guests use is in user already.
    let all = ticks.iter().take(8).sum();
    Some((all, ticks.get(3)? + ticks.get(4)?))
}

fn busy_permille((all_before, idle_before): (u64, u64), (all, idle): (u64, u64)) -> u32 {
    let whole = all.saturating_sub(all_before);
    let busy = whole.saturating_sub(idle.saturating_sub(idle_before));
    (busy * 1000).checked_div(whole).and_then(|permille| u32::try_from(permille).ok()).unwrap_or(0)
}

/// All memory and that in use, from `/proc/meminfo` (proc_meminfo(5)), in MiB.
fn memory(meminfo: &str) -> (u64, u64) {
    let mib = |name: &str| {
        let line = meminfo.lines().find(|line| line.split(':').next() == Some(name));
        let kib =
            line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kib| kib.parse::<u64>().ok());
        kib.unwrap_or(0) / 1024
    };
    let total = mib("MemTotal");
    (total, total.saturating_sub(mib("MemAvailable")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_and_memory_are_read_as_the_kernel_writes_them() {
        let before = cpu_times("cpu  100 0 100 700 100 0 0 0 50 0\ncpu0 1 1 1 1\n").unwrap();
        let after = cpu_times("cpu  200 0 200 1400 200 0 0 0 90 0\n").unwrap();
        assert_eq!((before, busy_permille(before, after)), ((1000, 800), 200));
        assert_eq!(busy_permille(after, after), 0);
        let text = "MemTotal:       24576000 kB\nMemFree: 1 kB\nMemAvailable:   12288000 kB\n";
        assert_eq!(memory(text), (24_000, 12_000));
        assert!(cpu_times("").is_none());
    }

    #[test]
    fn the_node_keeps_something_for_itself() {
        let seen = |total_mib| Seen { total_mib, ..Seen::default() }.for_machines_mib();
        assert_eq!((seen(100_000), seen(2_000), seen(100)), (90_000, 1_488, 0));
    }
}
