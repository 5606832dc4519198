//! Rows from samples (medians over rounds, ratios within rounds), the table for people, and facts of the machine.

use super::Plan;
use super::fio::Sample;
use super::jobs::{Job, ModeName};
use serde::Serialize;
use std::fmt::Write as _;

/// One run of one job in one mode.
#[derive(Debug, Clone)]
pub(super) struct Measured {
    pub(super) job: Job,
    pub(super) mode: ModeName,
    pub(super) node: String,
    pub(super) round: u32,
    pub(super) sample: Sample,
    pub(super) cpu_us_per_io: f64,
}

/// A row of the result; medians over the rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) mode: ModeName,
    pub(super) job: Job,
    pub(super) node: String,
    pub(super) iops: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    /// I/O rate by that of the raw LUN in the same round; `null` where the raw LUN has no such job.
    pub(super) ratio_to_raw: Option<f64>,
    /// The same, by the coordinator's rate.
    pub(super) ratio_to_coordinator: Option<f64>,
    /// Only for the redirected modes: the same, by the rate of libsmbclient alone on the same share.
    pub(super) ratio_to_smb_library: Option<f64>,
    pub(super) cpu_us_per_io: f64,
    /// `null` for metadata jobs.
    pub(super) bw_bytes_per_s: Option<f64>,
    /// Growth of the node's csvfs when many files are opened and read, by file; in the rows of the create job.
    pub(super) rss_bytes_per_open_file: Option<u64>,
    pub(super) seconds: f64,
    pub(super) rounds: u32,
    /// Slowest and fastest round, to see how steady the machine was.
    pub(super) iops_min: f64,
    pub(super) iops_max: f64,
}

/// What was measured on.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Facts {
    pub(super) kernel: String,
    pub(super) cpus: usize,
    pub(super) cpu_model: String,
    pub(super) lun: String,
    pub(super) region_bytes: u64,
    pub(super) rounds: u32,
    pub(super) runtime_s: u32,
}

/// Everything that a run gives.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub(super) rows: Vec<Row>,
    pub(super) facts: Facts,
}

impl Facts {
    pub(super) fn collect(lun: &str, region_bytes: u64, plan: &Plan) -> anyhow::Result<Facts> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Ok(Facts {
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
            cpu_model: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            lun: lun.to_owned(),
            region_bytes,
            rounds: plan.rounds,
            runtime_s: plan.runtime_s,
        })
    }
}

/// One row per job and mode, jobs in their fixed order, modes in theirs.
pub(super) fn rows(measured: &[Measured], memory: &[(ModeName, u64)], rounds: u32) -> Vec<Row> {
    let mut keys: Vec<(Job, ModeName)> = measured.iter().map(|m| (m.job, m.mode)).collect();
    keys.sort_unstable();
    keys.dedup();
    let mut rows: Vec<Row> =
        keys.into_iter().filter_map(|(job, mode)| row(measured, job, mode, rounds)).collect();
    for row in rows.iter_mut().filter(|row| row.job == Job::Create) {
        row.rss_bytes_per_open_file =
            memory.iter().find(|(mode, _)| *mode == row.mode).map(|(_, bytes)| *bytes);
    }
    rows
}

fn row(measured: &[Measured], job: Job, mode: ModeName, rounds: u32) -> Option<Row> {
    let own: Vec<&Measured> = measured.iter().filter(|m| m.job == job && m.mode == mode).collect();
    let field = |pick: fn(&Measured) -> f64| median(own.iter().map(|m| pick(m)).collect());
    let iops = || own.iter().map(|m| m.sample.iops);
    Some(Row {
        mode,
        job,
        node: own.first()?.node.clone(),
        iops: field(|m| m.sample.iops)?,
        p50_us: field(|m| m.sample.p50_us)?,
        p99_us: field(|m| m.sample.p99_us)?,
        ratio_to_raw: ratio(measured, &own, ModeName::Raw),
        ratio_to_coordinator: ratio(measured, &own, ModeName::Coordinator),
        ratio_to_smb_library: if matches!(mode, ModeName::BlockRedirected | ModeName::FsRedirected) {
            ratio(measured, &own, ModeName::SmbLibrary)
        } else {
            None
        },
        cpu_us_per_io: field(|m| m.cpu_us_per_io)?,
        bw_bytes_per_s: job.shape().and_then(|_| field(|m| m.sample.bw_bytes_per_s)),
        rss_bytes_per_open_file: None,
        seconds: own.iter().map(|m| m.sample.seconds).sum(),
        rounds,
        iops_min: iops().fold(f64::INFINITY, f64::min),
        iops_max: iops().fold(0.0, f64::max),
    })
}

/// Median of the rounds' own ratios: what slows a whole round down drops out.
fn ratio(measured: &[Measured], own: &[&Measured], base: ModeName) -> Option<f64> {
    let per_round = |m: &&Measured| {
        let same = |b: &&Measured| b.mode == base && b.job == m.job && b.round == m.round;
        measured.iter().find(same).map(|b| m.sample.iops / b.sample.iops)
    };
    median(own.iter().filter_map(per_round).collect())
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// The table for people.
pub(super) fn table(outcome: &Outcome) -> String {
    let mut text = String::new();
    let facts = &outcome.facts;
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "kernel {}, {} CPUs ({}), LUN {}, {} MiB measured, {} x {} s",
        facts.kernel,
        facts.cpus,
        facts.cpu_model,
        facts.lun,
        facts.region_bytes >> 20,
        facts.rounds,
        facts.runtime_s
    );
    let _ = writeln!(
        text,
        "{:<18} {:<17} {:<5} {:>10} {:>10} {:>9} {:>9} {:>7} {:>8} {:>7} {:>9}",
        "JOB", "MODE", "NODE", "IOPS", "MiB/s", "P50 us", "P99 us", "/RAW", "/COORD", "/SMB", "CPU us/IO"
    );
    for row in &outcome.rows {
        let _ = writeln!(
            text,
            "{:<18} {:<17} {:<5} {:>10.0} {:>10} {:>9.0} {:>9.0} {:>7} {:>8} {:>7} {:>9.1}",
            row.job,
            row.mode,
            row.node,
            row.iops,
            row.bw_bytes_per_s.map_or("-".into(), |bw| format!("{:.1}", bw / 1_048_576.0)),
            row.p50_us,
            row.p99_us,
            number(row.ratio_to_raw),
            number(row.ratio_to_coordinator),
            number(row.ratio_to_smb_library),
            row.cpu_us_per_io
        );
    }
    for (row, bytes) in memory(outcome) {
        let _ = writeln!(
            text,
            "memory: csvfs on {} ({}) grows by {bytes} bytes per open file",
            row.node, row.mode
        );
    }
    text.truncate(text.trim_end().len());
    text
}

/// Rows that say what an open file costs.
pub(super) fn memory(outcome: &Outcome) -> impl Iterator<Item = (&Row, u64)> {
    outcome.rows.iter().filter_map(|row| Some((row, row.rss_bytes_per_open_file?)))
}

/// A ratio for people.
pub(super) fn number(value: Option<f64>) -> String {
    value.map_or("-".into(), |value| format!("{value:.3}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn measured(job: Job, mode: ModeName, round: u32, iops: f64) -> Measured {
        let sample = Sample {
            ios: 1000,
            iops,
            bw_bytes_per_s: iops * 4096.0,
            p50_us: 1e6 / iops,
            p99_us: 3e6 / iops,
            seconds: 1.0,
        };
        Measured { job, mode, node: "n1".into(), round, sample, cpu_us_per_io: 7.0 }
    }

    pub(in super::super) fn outcome() -> Outcome {
        let samples = [
            measured(Job::Create, ModeName::Direct, 0, 500.0),
            measured(Job::RandreadQd1, ModeName::Raw, 0, 1000.0),
            measured(Job::RandreadQd1, ModeName::Direct, 0, 900.0),
            // A slow round of the whole machine.
            measured(Job::RandreadQd1, ModeName::Raw, 1, 100.0),
            measured(Job::RandreadQd1, ModeName::Direct, 1, 91.0),
            measured(Job::RandreadQd1, ModeName::Raw, 2, 1000.0),
            measured(Job::RandreadQd1, ModeName::Direct, 2, 990.0),
            measured(Job::RandreadQd1, ModeName::BlockRedirected, 2, 300.0),
            measured(Job::RandreadQd1, ModeName::SmbLibrary, 2, 400.0),
        ];
        let facts = Facts {
            kernel: "6.18".into(),
            cpus: 2,
            cpu_model: "<model>".into(),
            lun: "/dev/loop7".into(),
            region_bytes: 256 << 20,
            rounds: 3,
            runtime_s: 3,
        };
        Outcome { rows: rows(&samples, &[(ModeName::Direct, 1500)], 3), facts }
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        let rows = outcome().rows;
        assert_eq!(rows.len(), 5);
        assert_eq!((rows[0].job, rows[0].mode), (Job::RandreadQd1, ModeName::Raw));
        let direct = &rows[1];
        assert!((direct.ratio_to_raw.unwrap() - 0.91).abs() < 1e-9, "{direct:?}");
        assert!((direct.iops - 900.0).abs() < 1e-9);
        assert!((direct.iops_min - 91.0).abs() < 1e-9);
        assert_eq!((direct.ratio_to_coordinator, direct.ratio_to_smb_library), (None, None));
        assert!((rows[2].ratio_to_smb_library.unwrap() - 0.75).abs() < 1e-9, "{:?}", rows[2]);
        assert_eq!(rows[3].ratio_to_smb_library, None, "the reference has no ratio to itself");
    }

    #[test]
    fn json_has_the_agreed_fields_and_null_where_raw_has_no_job() {
        let rows = serde_json::to_value(outcome().rows).unwrap();
        let create = &rows[4];
        assert_eq!(create["rss_bytes_per_open_file"], 1500);
        assert_eq!(create["job"], "create");
        assert!(create["ratio_to_raw"].is_null() && create["bw_bytes_per_s"].is_null());
        for name in ["mode", "job", "node", "iops", "p50_us", "p99_us", "ratio_to_raw", "cpu_us_per_io"] {
            assert!(create.get(name).is_some(), "{name}");
        }
    }

    #[test]
    fn median_of_even_counts_is_the_mean_of_the_middle() {
        assert_eq!(median(vec![]), None);
        assert!((median(vec![4.0, 1.0, 3.0, 2.0]).unwrap() - 2.5).abs() < 1e-9);
    }

    #[test]
    fn table_has_a_line_per_row() {
        let text = table(&outcome());
        assert_eq!(text.lines().count(), 2 + 5 + 1);
        assert!(text.contains("0.910") && text.contains("1500 bytes per open file"), "{text}");
    }
}
