//! fio: its command line for a job, and what its JSON says. Latencies are total ones (submission and completion),
//! because on some of the ways measured here a submission may itself wait for the I/O.

use super::jobs::Shape;
use anyhow::{Context as _, bail};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Where a job reads and writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) path: String,
    /// A block device, possibly one with a mounted file system; the range is known to be ours.
    pub(super) device: bool,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// How long a job runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// This many seconds, starting over at the end of the target.
    Seconds(u32),
    /// Once over the target.
    Once,
    /// Once, and the file does not exist before: every write extends it.
    OnceNew,
}

/// What one run of a job gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    pub(super) ios: u64,
    pub(super) iops: f64,
    pub(super) bw_bytes_per_s: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) seconds: f64,
}

/// Fails with the package's name when fio is not there.
pub(super) fn check_installed() -> anyhow::Result<()> {
    match std::process::Command::new("fio").arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => bail!("fio --version failed: {}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => bail!("cannot run fio ({error}); install the package fio"),
    }
}

/// The command line.
pub(super) fn argv(shape: Shape, target: &Target, extent: Extent) -> Vec<String> {
    let mut argv: Vec<String> = [
        "fio",
        "--name=bench",
        "--ioengine=libaio",
        "--direct=1",
        "--numjobs=1",
        "--thread",
        "--fallocate=none",
        "--randrepeat=0",
        "--norandommap",
        "--clat_percentiles=0",
        "--lat_percentiles=1",
        "--percentile_list=50:99",
        "--output-format=json",
    ]
    .map(str::to_owned)
    .to_vec();
    argv.push(format!("--filename={}", target.path));
    if target.device {
        argv.push("--allow_mounted_write=1".into());
    }
    argv.push(format!("--rw={}", shape.rw));
    argv.push(format!("--bs={}", shape.block_bytes));
    argv.push(format!("--iodepth={}", shape.depth));
    argv.push(format!("--offset={}", target.offset));
    argv.push(format!("--size={}", target.len));
    match extent {
        Extent::Seconds(seconds) => {
            argv.push("--time_based".into());
            argv.push(format!("--runtime={seconds}"));
        }
        Extent::Once => {}
        // Without this fio sets the size first, and the writes would fill a hole instead of extending the file.
        Extent::OnceNew => argv.push("--create_on_open=1".into()),
    }
    if matches!(extent, Extent::Seconds(_) | Extent::Once) {
        // A target of the wrong size is a mistake of ours and must not be "repaired" by laying out a new file.
        argv.push("--allow_file_create=0".into());
    }
    argv
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<JobOutput>,
}

#[derive(Deserialize)]
struct JobOutput {
    error: i64,
    read: Side,
    write: Side,
}

#[derive(Deserialize)]
struct Side {
    total_ios: u64,
    iops: f64,
    bw_bytes: f64,
    /// Milliseconds.
    runtime: f64,
    lat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    #[serde(default)]
    percentile: BTreeMap<String, f64>,
}

/// Reads fio's output; what it prints before the JSON (notes, warnings) is skipped.
pub(super) fn parse(text: &str, write: bool) -> anyhow::Result<Sample> {
    let start = text.find("\n{").map(|at| at + 1).or_else(|| text.starts_with('{').then_some(0));
    let json = &text[start.context("fio printed no JSON")?..];
    let output: Output = serde_json::Deserializer::from_str(json)
        .into_iter()
        .next()
        .context("fio printed no JSON")?
        .context("reading fio's JSON")?;
    let job = output.jobs.first().context("fio reports no job")?;
    if job.error != 0 {
        bail!("fio reports error {} of the job", job.error);
    }
    let side = if write { &job.write } else { &job.read };
    if side.total_ios == 0 {
        bail!("fio completed no I/O");
    }
    let percentile = |name: &str| -> anyhow::Result<f64> {
        let ns = side.lat_ns.percentile.get(name);
        Ok(ns.with_context(|| format!("fio reports no latency percentile {name}"))? / 1000.0)
    };
    Ok(Sample {
        ios: side.total_ios,
        iops: side.iops,
        bw_bytes_per_s: side.bw_bytes,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
        seconds: side.runtime / 1000.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded from fio 3.33 with the arguments that [`argv`] gives, on a temporary file.
    const RECORDED: &str = include_str!("fio-sample.json");

    const SHAPE: Shape = Shape { rw: "randread", block_bytes: 4096, depth: 1, write: false };

    #[test]
    fn recorded_output_is_read() {
        let sample = parse(RECORDED, false).unwrap();
        assert_eq!(sample.ios, 20_696);
        assert!((sample.iops - 20_675.324_675).abs() < 1e-6);
        assert!(sample.p50_us > 1.0 && sample.p50_us < sample.p99_us);
        assert!((sample.bw_bytes_per_s / sample.iops - 4096.0).abs() < 1.0);
        // Nothing was written in that run.
        assert!(parse(RECORDED, true).unwrap_err().to_string().contains("no I/O"));
    }

    #[test]
    fn notes_before_the_json_are_skipped_and_errors_are_not() {
        let noted = format!("note: both iodepth >= 1 and synchronous I/O engine\n{RECORDED}\ntrailing");
        assert_eq!(parse(&noted, false).unwrap(), parse(RECORDED, false).unwrap());
        let failed = RECORDED.replacen("\"error\" : 0", "\"error\" : 5", 1);
        assert!(parse(&failed, false).unwrap_err().to_string().contains("error 5"));
        assert!(parse("fio: no such file", false).is_err());
        assert!(parse(&RECORDED[..RECORDED.len() / 2], false).is_err());
    }

    #[test]
    fn a_job_on_existing_data_never_creates_files() {
        let target = Target { path: "/file".into(), device: false, offset: 4096, len: 8192 };
        let timed = argv(SHAPE, &target, Extent::Seconds(3));
        for want in ["--allow_file_create=0", "--offset=4096", "--size=8192", "--runtime=3", "--time_based"] {
            assert!(timed.iter().any(|arg| arg == want), "{want} in {timed:?}");
        }
        let new = argv(SHAPE, &target, Extent::OnceNew);
        assert!(new.iter().any(|arg| arg == "--create_on_open=1"));
        assert!(!new.iter().any(|arg| arg.starts_with("--allow")));
        let raw = argv(SHAPE, &Target { device: true, ..target }, Extent::Once);
        assert!(raw.iter().any(|arg| arg == "--allow_mounted_write=1"));
    }
}
