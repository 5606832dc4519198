//! `csvctl bench`: how close each way to the data comes to the raw LUN.
//!
//! The same fio jobs run on the raw LUN, on the coordinator and on the other nodes in each of their modes, all on
//! the same stretch of the same LUN. Rounds are interleaved (raw first, then every mode, then the next round), so
//! that drift of the machine hits all alike; the ratio of a row is the median of its rounds' own ratios.
//!
//! The raw job writes to the LUN under a mounted file system. That is safe because it stays inside the extents of
//! a file that was written completely before and belongs to the benchmark (see [`region`]).
//!
//! On failure the run stops with the job and mode that failed; the bench directory on the volume is removed, a
//! redirection that was switched on is switched off, and a lab that was brought up here is taken down.

mod cpu;
mod fio;
mod html;
mod jobs;
mod lab;
mod memory;
mod meta;
mod region;
mod report;
mod rounds;

use anyhow::Context as _;
use std::io::Write as _;
use std::path::PathBuf;

pub(crate) use jobs::{Job, ModeName};

/// Arguments of `csvctl bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Lab to measure; the running one when only one runs, else a lab "bench" is brought up and taken down.
    #[arg(long)]
    lab: Option<String>,
    /// One round of one second instead of three rounds of three.
    #[arg(long)]
    quick: bool,
    /// Seconds per job, mode and round.
    #[arg(long, value_name = "SECS", value_parser = clap::value_parser!(u32).range(1..=600))]
    runtime: Option<u32>,
    /// Rounds per job and mode.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: Option<u32>,
    /// Only these modes; the raw LUN is always measured.
    #[arg(long, value_enum, value_delimiter = ',')]
    modes: Vec<ModeName>,
    /// Only these jobs.
    #[arg(long, value_enum, value_delimiter = ',')]
    jobs: Vec<Job>,
    /// Write a report in one HTML file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the rows as JSON to a file, besides what is printed.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(subcommand)]
    helper: Option<Helper>,
}

/// Parts of the benchmark that run inside a node.
#[derive(Debug, clap::Subcommand)]
enum Helper {
    /// Creates, stats or unlinks numbered files in a directory and prints the rate as JSON.
    #[command(hide = true)]
    Meta(meta::MetaArgs),
    /// Opens files and prints how much the node's csvfs grew, as JSON.
    #[command(hide = true)]
    Memory(memory::MemoryArgs),
}

/// How much to measure.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) rounds: u32,
    pub(super) runtime_s: u32,
    pub(super) file_bytes: u64,
    pub(super) alloc_bytes: u64,
    pub(super) meta_files: u32,
    pub(super) modes: Vec<ModeName>,
    pub(super) jobs: Vec<Job>,
}

impl Plan {
    fn new(args: &Args) -> Plan {
        let all_modes = [
            ModeName::Coordinator,
            ModeName::Direct,
            ModeName::BlockRedirected,
            ModeName::FsRedirected,
            ModeName::SmbLibrary,
        ];
        let picked = |mode: &ModeName| args.modes.is_empty() || args.modes.contains(mode);
        Plan {
            rounds: args.rounds.unwrap_or(if args.quick { 1 } else { 3 }),
            runtime_s: args.runtime.unwrap_or(if args.quick { 1 } else { 3 }),
            file_bytes: if args.quick { 512 << 20 } else { 1 << 30 },
            alloc_bytes: if args.quick { 128 << 20 } else { 256 << 20 },
            meta_files: if args.quick { 200 } else { 1000 },
            modes: all_modes.into_iter().filter(picked).collect(),
            jobs: if args.jobs.is_empty() { Job::ALL.to_vec() } else { args.jobs.clone() },
        }
    }
}

/// Runs the benchmark and prints its table, or JSON.
///
/// # Errors
/// No lab and none can be brought up; fio missing; a job that failed, with fio's own words.
pub(crate) fn run(args: Args, json: bool) -> anyhow::Result<()> {
    match &args.helper {
        Some(Helper::Meta(meta)) => return meta::run(meta),
        Some(Helper::Memory(memory)) => return memory::run(memory),
        None => {}
    }
    let plan = Plan::new(&args);
    fio::check_installed()?;
    let lab = lab::BenchLab::open(args.lab.as_deref())?;
    let result = rounds::measure(&lab, &plan);
    let down = lab.close();
    let outcome = result?;
    let text = serde_json::to_string_pretty(&outcome.rows)?;
    if let Some(path) = &args.out {
        std::fs::write(path, format!("{text}\n")).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &args.html {
        let page = html::page(&outcome);
        std::fs::write(path, page).with_context(|| format!("writing {}", path.display()))?;
    }
    let printed = if json { text } else { report::table(&outcome) };
    writeln!(std::io::stdout(), "{printed}").context("printing the result")?;
    down
}
