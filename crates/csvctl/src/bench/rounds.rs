//! The measurement itself: prepares the bench file, runs the interleaved rounds, clears up.

use super::cpu::Busy;
use super::fio::{self, Extent, Sample, Target};
use super::jobs::{Job, ModeName};
use super::lab::BenchLab;
use super::meta::MetaResult;
use super::region::{self, Region};
use super::report::{Facts, Measured, Outcome};
use super::{Plan, memory, report};
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

/// Directory of the benchmark on the volume.
const DIR: &str = "csv-bench";
/// The cost of starting fio is the least of so many starts.
const START_PROBES: usize = 3;
/// The bench file may be made this many times larger to find room in one piece.
const GROW_MAX: u32 = 2;

/// Everything that stays the same during the run.
struct Stage<'a> {
    lab: &'a BenchLab,
    plan: &'a Plan,
    /// Node that runs the raw jobs, and its device.
    raw_node: String,
    device: String,
    region: Region,
    /// Processor time of starting fio as on a node, which is not the job's and is taken off.
    start_us: u64,
    /// Modes that this lab can show, with their nodes.
    ways: Vec<(ModeName, String)>,
    /// The program that drives libsmbclient alone, when it is installed beside csvctl.
    smb_reference: Option<PathBuf>,
}

/// Runs the plan and gives the rows.
pub(super) fn measure(lab: &BenchLab, plan: &Plan) -> anyhow::Result<Outcome> {
    let dir = format!("{}/{DIR}", lab.mount_point());
    let result = measure_in(lab, plan, &dir);
    // Also after a failure, and then only the first error matters.
    let cleared = lab.exec(&lab.coordinator, &["rm", "-rf", &dir]).with_context(|| format!("removing {dir}"));
    let outcome = result?;
    cleared?;
    Ok(outcome)
}

fn measure_in(lab: &BenchLab, plan: &Plan, dir: &str) -> anyhow::Result<Outcome> {
    lab.exec(&lab.coordinator, &["rm", "-rf", dir])?;
    lab.exec(&lab.coordinator, &["mkdir", dir])?;
    // First of all: later, memory freed after a load would hide what open files take.
    let memory =
        if plan.jobs.contains(&Job::Create) { memory::of_nodes(lab, plan, dir)? } else { Vec::new() };
    let raw_node = lab.direct.clone().unwrap_or_else(|| lab.coordinator.clone());
    let smb_reference = smb_reference_program();
    let mut stage = Stage {
        lab,
        plan,
        device: lab.lun(&raw_node)?,
        raw_node,
        region: lay_out(lab, plan, dir)?,
        start_us: 0,
        ways: ways(lab, plan, smb_reference.is_some()),
        smb_reference,
    };
    stage.start_us = stage.start_cost_us()?;
    let mut measured = Vec::new();
    let bar = progress_bar(&stage);
    for job in plan.jobs.iter().copied().filter(|job| job.shape().is_some()) {
        for round in 0..plan.rounds {
            stage.data_round(job, round, &bar, &mut measured)?;
        }
    }
    if plan.jobs.iter().any(|job| job.shape().is_none()) {
        for round in 0..plan.rounds {
            stage.meta_round(round, &bar, &mut measured)?;
        }
    }
    bar.finish_and_clear();
    let facts = Facts::collect(&stage.device, stage.region.len, plan)?;
    Ok(Outcome { rows: report::rows(&measured, &memory, plan.rounds), facts })
}

impl Stage<'_> {
    /// One round of one fio job: the raw LUN, then every mode.
    fn data_round(
        &self,
        job: Job,
        round: u32,
        bar: &ProgressBar,
        measured: &mut Vec<Measured>,
    ) -> anyhow::Result<()> {
        let raw = (ModeName::Raw, self.raw_node.clone());
        for (mode, node) in std::iter::once(&raw).chain(&self.ways) {
            bar.set_message(format!("{job} {mode} on {node}"));
            let run = || match mode {
                ModeName::SmbLibrary => self.smb_library(job, node),
                ModeName::Raw
                | ModeName::Coordinator
                | ModeName::Direct
                | ModeName::BlockRedirected
                | ModeName::FsRedirected => self.fio(job, *mode, node).map(Some),
            };
            let sample = self.in_mode(*mode, node, run).with_context(|| format!("{job} {mode} on {node}"))?;
            bar.inc(1);
            if let Some((sample, cpu_us_per_io)) = sample {
                measured.push(Measured {
                    job,
                    mode: *mode,
                    node: node.clone(),
                    round,
                    sample,
                    cpu_us_per_io,
                });
            }
        }
        Ok(())
    }

    /// Runs something while the node is in the mode; the redirection ends also when it fails.
    fn in_mode<T>(
        &self,
        mode: ModeName,
        node: &str,
        run: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        if mode != ModeName::FsRedirected {
            return run();
        }
        self.lab.redirect(node, true)?;
        let result = run();
        let off = self.lab.redirect(node, false);
        let value = result?;
        off?;
        Ok(value)
    }

    fn fio(&self, job: Job, mode: ModeName, node: &str) -> anyhow::Result<(Sample, f64)> {
        let shape = job.shape().context("not a fio job")?;
        let alloc = job == Job::AllocSeqwrite1m;
        let alloc_len = self.plan.alloc_bytes.min(self.region.len);
        let dir = format!("{}/{DIR}", self.lab.mount_point());
        let (target, extent) = match (mode == ModeName::Raw, alloc) {
            (true, false) => (self.raw_target(self.region.len), Extent::Seconds(self.plan.runtime_s)),
            (true, true) => (self.raw_target(alloc_len), Extent::Once),
            (false, false) => {
                let path = format!("{dir}/data");
                let target =
                    Target { path, device: false, offset: self.region.file_offset, len: self.region.len };
                (target, Extent::Seconds(self.plan.runtime_s))
            }
            (false, true) => {
                let target = Target { path: format!("{dir}/new"), device: false, offset: 0, len: alloc_len };
                (target, Extent::OnceNew)
            }
        };
        let before = Busy::now()?;
        let text = self.lab.exec(node, &fio::argv(shape, &target, extent))?;
        let busy_us = Busy::now()?.since_us(before);
        if extent == Extent::OnceNew {
            self.lab.exec(node, &["rm", &target.path])?;
        }
        let sample = fio::parse(&text, shape.write)?;
        Ok((sample, per_io(busy_us.saturating_sub(self.start_us), sample.ios)))
    }

    fn start_cost_us(&self) -> anyhow::Result<u64> {
        let shape = Job::RandreadQd1.shape().context("not a fio job")?;
        let argv = fio::argv(shape, &self.raw_target(shape.block_bytes), Extent::Once);
        let mut least = u64::MAX;
        for _ in 0..START_PROBES {
            let before = Busy::now()?;
            self.lab.exec(&self.raw_node, &argv).context("starting fio on the raw LUN")?;
            least = least.min(Busy::now()?.since_us(before));
        }
        Ok(least)
    }

    fn raw_target(&self, len: u64) -> Target {
        Target { path: self.device.clone(), device: true, offset: self.region.lun_offset, len }
    }

    /// libsmbclient alone on the same stretch of the same file, by its name on the share; `None` for jobs without a
    /// counterpart.
    fn smb_library(&self, job: Job, node: &str) -> anyhow::Result<Option<(Sample, f64)>> {
        let Some(shape) = job.shape().filter(|_| job != Job::AllocSeqwrite1m) else { return Ok(None) };
        let words = [
            ("--path", format!("{DIR}/data")),
            ("--op", shape.rw.to_owned()),
            ("--block-bytes", shape.block_bytes.to_string()),
            ("--depth", shape.depth.to_string()),
            ("--offset", self.region.file_offset.to_string()),
            ("--len", self.region.len.to_string()),
            ("--runtime-s", self.plan.runtime_s.to_string()),
        ];
        self.smb_reference(node, &words, shape.block_bytes)
    }

    /// The metadata jobs by libsmbclient alone; `dir` is below the volume's root.
    fn smb_library_meta(&self, job: Job, node: &str, dir: &str) -> anyhow::Result<Option<(Sample, f64)>> {
        let files = self.plan.meta_files.to_string();
        let words = [("--path", dir.to_owned()), ("--op", job.to_string()), ("--files", files)];
        self.smb_reference(node, &words, 0)
    }

    fn smb_reference(
        &self,
        node: &str,
        words: &[(&str, String)],
        block_bytes: u64,
    ) -> anyhow::Result<Option<(Sample, f64)>> {
        let Some(program) = &self.smb_reference else { return Ok(None) };
        let mut argv =
            vec![program.to_string_lossy().into_owned(), "--volume".into(), self.lab.volume.clone()];
        argv.extend(["--coordinator".into(), self.lab.coordinator.clone()]);
        argv.extend(words.iter().flat_map(|(name, value)| [(*name).to_owned(), value.clone()]));
        let text = self.lab.exec(node, &argv)?;
        let result = parse_result(&text)?;
        let busy_us =
            result.busy_us.context("csv-smb-ref says no processor time; install the same version")?;
        Ok(Some((sample_of(&result, block_bytes), per_io(busy_us, result.ops))))
    }

    /// One round of the metadata jobs. They need each other's files, so all run; those asked for are kept.
    fn meta_round(&self, round: u32, bar: &ProgressBar, measured: &mut Vec<Measured>) -> anyhow::Result<()> {
        let dir = format!("{}/{DIR}/files", self.lab.mount_point());
        self.lab.exec(&self.lab.coordinator, &["mkdir", "-p", &dir])?;
        for (mode, node) in &self.ways {
            self.in_mode(*mode, node, || {
                for job in [Job::Create, Job::Stat, Job::Unlink] {
                    bar.set_message(format!("{job} {mode} on {node}"));
                    let sample =
                        self.meta(job, *mode, node).with_context(|| format!("{job} {mode} on {node}"))?;
                    bar.inc(1);
                    let Some((sample, cpu_us_per_io)) = sample.filter(|_| self.plan.jobs.contains(&job))
                    else {
                        continue;
                    };
                    let node = node.clone();
                    let mode = *mode;
                    measured.push(Measured { job, mode, node, round, sample, cpu_us_per_io });
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn meta(&self, job: Job, mode: ModeName, node: &str) -> anyhow::Result<Option<(Sample, f64)>> {
        if mode == ModeName::SmbLibrary {
            return self.smb_library_meta(job, node, &format!("{DIR}/files"));
        }
        let dir = format!("{}/{DIR}/files", self.lab.mount_point());
        let files = self.plan.meta_files.to_string();
        let before = Busy::now()?;
        let text = self.lab.ctl(node, &["bench", "meta", &dir, &job.to_string(), &files])?;
        let busy_us = Busy::now()?.since_us(before);
        let sample = sample_of(&parse_result(&text)?, 0);
        Ok(Some((sample, per_io(busy_us, sample.ios))))
    }
}

/// Writes the bench file from end to end and finds its largest piece; a larger file gets a second chance.
fn lay_out(lab: &BenchLab, plan: &Plan, dir: &str) -> anyhow::Result<Region> {
    let path = format!("{dir}/data");
    let mut best: Option<Region> = None;
    for grow in 1..=u64::from(GROW_MAX) {
        let mib = (plan.file_bytes * grow) >> 20;
        let (of, count) = (format!("of={path}"), format!("count={mib}"));
        let dd = ["dd", "if=/dev/zero", &of, "bs=1M", &count, "oflag=direct", "conv=fsync", "status=none"];
        lab.exec(&lab.coordinator, &dd).context("writing the bench file")?;
        let region = region::largest(&lab.map(&format!("{DIR}/data"))?)?;
        if best.is_none_or(|best| region.len > best.len) {
            best = Some(region);
        }
        if region.len >= region::LEN_BYTES_MIN {
            return Ok(region);
        }
    }
    // The last file is the one that lies there, so measure there, with what it has.
    let region = region::largest(&lab.map(&format!("{DIR}/data"))?)?;
    eprintln!("note: the bench file has only {} MiB in one piece; measuring on that", region.len >> 20);
    Ok(region)
}

/// The modes asked for that this lab can show.
fn ways(lab: &BenchLab, plan: &Plan, smb_reference: bool) -> Vec<(ModeName, String)> {
    let node = |mode: ModeName| match mode {
        ModeName::Raw => None,
        ModeName::Coordinator => Some(lab.coordinator.clone()),
        ModeName::Direct | ModeName::FsRedirected => lab.direct.clone(),
        ModeName::BlockRedirected => lab.block_redirected.clone(),
        ModeName::SmbLibrary => lab.direct.clone().filter(|_| smb_reference),
    };
    let mut ways = Vec::new();
    for mode in &plan.modes {
        match node(*mode) {
            Some(node) => ways.push((*mode, node)),
            None => eprintln!("note: no {mode} rows: this lab has no node or program for it"),
        }
    }
    ways
}

/// `csv-smb-ref` beside csvctl.
fn smb_reference_program() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?.with_file_name("csv-smb-ref");
    program.is_file().then_some(program)
}

fn parse_result(text: &str) -> anyhow::Result<MetaResult> {
    serde_json::from_str(text.trim()).with_context(|| format!("reading {text:?}"))
}

fn sample_of(result: &MetaResult, block_bytes: u64) -> Sample {
    #[expect(clippy::cast_precision_loss, reason = "block sizes are small")]
    let block_bytes = block_bytes as f64;
    Sample {
        ios: result.ops,
        iops: result.ops_per_s,
        bw_bytes_per_s: result.ops_per_s * block_bytes,
        p50_us: result.p50_us,
        p99_us: result.p99_us,
        seconds: result.seconds,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a quotient for people")]
fn per_io(busy_us: u64, ios: u64) -> f64 {
    busy_us as f64 / ios.max(1) as f64
}

fn progress_bar(stage: &Stage<'_>) -> ProgressBar {
    let data = stage.plan.jobs.iter().filter(|job| job.shape().is_some()).count() * (stage.ways.len() + 1);
    let with_meta = stage.plan.jobs.iter().any(|job| job.shape().is_none());
    let meta = if with_meta { 3 * stage.ways.len() } else { 0 };
    let bar = ProgressBar::new((data + meta) as u64 * u64::from(stage.plan.rounds));
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed_precise} eta {eta} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}
