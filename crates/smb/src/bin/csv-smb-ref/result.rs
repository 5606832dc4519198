//! Times of the processes, how they are handed over, and the figures made of them.

use anyhow::Context as _;

/// `/proc/stat` counts in USER_HZ, which Linux fixes at 100 for user space.
const TICK_US: u64 = 10_000;

/// What one process measured.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Part {
    /// From its start to its end.
    pub(super) seconds: f64,
    /// One per operation.
    pub(super) times_ns: Vec<u64>,
}

impl Part {
    /// As one line.
    pub(super) fn print(&self) -> String {
        let times: Vec<String> = self.times_ns.iter().map(u64::to_string).collect();
        format!("{} {}", self.seconds, times.join(" "))
    }

    /// Reads the line back.
    pub(super) fn parse(line: &str) -> anyhow::Result<Part> {
        let mut words = line.split_ascii_whitespace();
        let seconds = words.next().context("the process printed no times")?.parse()?;
        let times_ns = words.map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        Ok(Part { seconds, times_ns })
    }
}

/// Busy time of all processors since boot, in microseconds: user, nice, system, irq, softirq.
pub(super) fn busy_us() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    let line =
        text.lines().find(|line| line.starts_with("cpu ")).context("/proc/stat has no line \"cpu\"")?;
    let ticks: Vec<u64> = line.split_ascii_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else {
        anyhow::bail!("the line \"cpu\" of /proc/stat is too short")
    };
    Ok((user + nice + system + irq + softirq) * TICK_US)
}

/// The line of JSON: operations, rate, percentiles, the longest process's time, processor time of the machine.
pub(super) fn whole(parts: &[Part], busy_us: u64) -> anyhow::Result<String> {
    let mut times: Vec<u64> = parts.iter().flat_map(|part| part.times_ns.iter().copied()).collect();
    times.sort_unstable();
    let seconds = parts.iter().map(|part| part.seconds).fold(0.0, f64::max);
    anyhow::ensure!(!times.is_empty() && seconds > 0.0, "no operation was completed");
    let percentile_us = |percent: usize| -> f64 {
        let rank = (times.len() * percent).div_ceil(100).max(1);
        us(times[rank - 1])
    };
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let ops_per_s = times.len() as f64 / seconds;
    Ok(format!(
        "{{\"ops\":{},\"ops_per_s\":{ops_per_s:.3},\"p50_us\":{:.3},\"p99_us\":{:.3},\"seconds\":{seconds:.6},\
         \"busy_us\":{busy_us}}}",
        times.len(),
        percentile_us(50),
        percentile_us(99),
    ))
}

#[expect(clippy::cast_precision_loss, reason = "2^53 ns are a hundred days")]
fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_handed_over_and_added_up() {
        let one = Part { seconds: 1.0, times_ns: (1..=50).map(|n| n * 1000).collect() };
        let two = Part { seconds: 2.0, times_ns: (51..=100).map(|n| n * 1000).collect() };
        assert_eq!(Part::parse(&one.print()).unwrap(), one);
        let line = whole(&[one, two], 7).unwrap();
        assert_eq!(
            line,
            "{\"ops\":100,\"ops_per_s\":50.000,\"p50_us\":50.000,\"p99_us\":99.000,\"seconds\":2.000000,\"busy_us\":7}"
        );
    }

    #[test]
    fn a_process_that_failed_is_no_result() {
        assert!(Part::parse("").is_err());
        assert!(Part::parse("1.0 x").is_err());
        assert!(whole(&[Part { seconds: 1.0, times_ns: vec![] }], 0).is_err());
    }

    #[test]
    fn this_machine_has_processor_time() {
        assert!(busy_us().unwrap() > 0);
    }
}
