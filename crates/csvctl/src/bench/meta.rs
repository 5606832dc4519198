//! The metadata load: create, stat or unlink numbered files in one directory, one after the other, and time each.
//! It runs inside a node (`csvctl bench meta DIR OP N`), so that starting a program is not part of what is timed.

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Arguments of the helper.
#[derive(Debug, clap::Args)]
pub(crate) struct MetaArgs {
    /// Directory; made when it is missing.
    dir: PathBuf,
    /// What to do with each file.
    #[arg(value_enum)]
    op: MetaOp,
    /// How many files.
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    files: u32,
}

/// A metadata operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum MetaOp {
    /// Create and close an empty file that must not exist.
    Create,
    /// stat an existing file.
    Stat,
    /// Remove an existing file.
    Unlink,
}

/// What the helper prints.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct MetaResult {
    pub(super) ops: u64,
    pub(super) ops_per_s: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) seconds: f64,
    /// Processor time of the machine during the work, where the program measures it itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) busy_us: Option<u64>,
}

/// Runs the helper and prints its result.
///
/// # Errors
/// The first operation that failed, with the file's name.
pub(super) fn run(args: &MetaArgs) -> anyhow::Result<()> {
    std::fs::create_dir_all(&args.dir).with_context(|| format!("making {}", args.dir.display()))?;
    let result = measure(&args.dir, args.op, args.files)?;
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&result)?).context("printing the result")
}

fn measure(dir: &Path, op: MetaOp, files: u32) -> anyhow::Result<MetaResult> {
    let mut times_us = Vec::with_capacity(files as usize);
    let begun = Instant::now();
    for number in 0..files {
        let path = dir.join(format!("f{number:07}"));
        let at = Instant::now();
        match op {
            MetaOp::Create => std::fs::File::create_new(&path).map(drop),
            MetaOp::Stat => std::fs::symlink_metadata(&path).map(drop),
            MetaOp::Unlink => std::fs::remove_file(&path),
        }
        .with_context(|| format!("{op:?} of {}", path.display()))?;
        times_us.push(at.elapsed().as_secs_f64() * 1e6);
    }
    let seconds = begun.elapsed().as_secs_f64();
    times_us.sort_by(f64::total_cmp);
    Ok(MetaResult {
        ops: u64::from(files),
        ops_per_s: f64::from(files) / seconds,
        p50_us: percentile(&times_us, 50),
        p99_us: percentile(&times_us, 99),
        seconds,
        busy_us: None,
    })
}

/// Nearest rank of sorted values.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn create_stat_unlink_in_turn() {
        let dir = tempfile::tempdir().unwrap();
        assert!(measure(dir.path(), MetaOp::Stat, 1).is_err());
        assert_eq!(measure(dir.path(), MetaOp::Create, 20).unwrap().ops, 20);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 20);
        assert!(measure(dir.path(), MetaOp::Create, 1).is_err(), "created a file twice");
        let stat = measure(dir.path(), MetaOp::Stat, 20).unwrap();
        assert!(stat.ops_per_s > 0.0 && stat.p50_us <= stat.p99_us);
        measure(dir.path(), MetaOp::Unlink, 20).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert!((percentile(&values, 50) - 100.0).abs() < f64::EPSILON);
        assert!((percentile(&values, 99) - 198.0).abs() < f64::EPSILON);
        assert!((percentile(&values[..1], 99) - 1.0).abs() < f64::EPSILON);
    }
}
