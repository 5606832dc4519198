//! fsx: one process, one file, random operations with mapped reads and writes, every read verified; in every mode,
//! and while the mode changes under it.

use anyhow::{Context as _, bail};
use csv_tests::lab::{Lab, MOUNT};
use csv_tests::{rng, tools, wait};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const VERSION: &str = "0.3.2";
const DEADLINE: Duration = Duration::from_secs(1800);
/// Between two changes of the mode.
const CHANGE_EVERY: Duration = Duration::from_secs(1);
/// On the coordinator this one, more often than not, has a block of a tree of extents become one of data while ext4
/// still holds its page (decision 020).
const SEED_OF_REUSED_BLOCKS: u64 = 419_080_233;

/// Odd sizes and offsets, mapped I/O, holes, preallocation.
const CONFIG: &str = "
flen = 524288
[opsize]
max = 65536
min = 0
align = 1
[weights]
close_open = 1
invalidate = 1
mapread = 5
mapwrite = 5
read = 10
write = 10
truncate = 3
fsync = 1
fdatasync = 1
posix_fallocate = 1
punch_hole = 1
";

fn operations() -> u64 {
    if csv_tests::full() { 100_000 } else { 20_000 }
}

fn arguments(config: &str, seed: u64, operations: u64, artifacts: &str, file: &str) -> Vec<String> {
    let (seed, operations) = (seed.to_string(), operations.to_string());
    ["-f", config, "-S", &seed, "-N", &operations, "-P", artifacts, file].map(str::to_owned).to_vec()
}

/// fsx must find a fault, else its silence means nothing: a second writer scribbles into the file.
#[test]
fn a_scribbler_is_noticed() -> anyhow::Result<()> {
    let program = tools::installed("fsx", VERSION)?;
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let (config, file) = (dir.path().join("fsx.toml"), dir.path().join("file"));
    std::fs::write(&config, CONFIG)?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let args = |operations| arguments(&text(&config), 7, operations, &text(dir.path()), &text(&file));
    wait::run(Command::new(&program).args(args(3000)), DEADLINE)?.ok("fsx on a local file")?;

    let mut child = Command::new(&program)
        .args(args(100_000_000))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting fsx")?;
    let end = Instant::now() + Duration::from_secs(60);
    while child.try_wait()?.is_none() {
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            bail!("fsx did not notice foreign writes within 60 s");
        }
        // At the start of the file, without changing its size.
        if let Ok(file) = std::fs::OpenOptions::new().write(true).open(&file)
            && file.metadata()?.len() > 4096
        {
            std::os::unix::fs::FileExt::write_at(&file, b"scribble", 1000)?;
        }
    }
    Ok(())
}

#[test]
fn every_mode() -> anyhow::Result<()> {
    let program = tools::installed("fsx", VERSION)?;
    let seed = rng::seed("fsx");
    let lab = Lab::up("fsx")?;
    let run = |node: &str, mode: &str, seed: u64| -> anyhow::Result<()> {
        let file = format!("{MOUNT}/fsx-{node}-{mode}-{seed}");
        let mut command = prepared(&lab, node, &program, seed, &file)?;
        let ended = wait::run(&mut command, DEADLINE)?;
        ended.ok(&format!("fsx {node} {mode} seed {seed}"))?;
        println!("fsx {node} {mode}: {} operations", operations());
        Ok(())
    };
    // Each has a file of its own; at once on all nodes they wait less, and disturb one another as users do.
    at_once(&[&|| run("n1", "direct", seed), &|| run("n2", "coordinator", seed), &|| {
        run("n3", "block-redirected", seed)
    }])?;
    // Alone: it depends on where ext4 puts things.
    run("n2", "coordinator", SEED_OF_REUSED_BLOCKS)?;
    lab.redirect("n1", true)?;
    run("n1", "fs-redirected", seed)?;
    lab.redirect("n1", false)?;
    changing_modes(&lab, &program, seed)?;
    lab.finish()
}

type Run<'a> = &'a (dyn Fn() -> anyhow::Result<()> + Sync);

/// All of them, to their end; the first error.
fn at_once(runs: &[Run<'_>]) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let started: Vec<_> = runs.iter().map(|run| scope.spawn(run)).collect();
        let ended = started.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("it panicked")));
        ended.collect::<Vec<_>>().into_iter().collect()
    })
}

/// `lab exec NODE -- fsx ...` with its configuration in place.
fn prepared(lab: &Lab, node: &str, program: &Path, seed: u64, file: &str) -> anyhow::Result<Command> {
    let config = "/run/csv/fsx.toml";
    lab.sh(node, &format!("cat > {config} <<'END'{CONFIG}END"))?;
    let mut command = lab.command(node);
    command.arg(program).args(arguments(config, seed, operations(), "/run/csv", file));
    Ok(command)
}

/// The mode changes every second until fsx is done; it must have changed several times, or nothing was tested.
fn changing_modes(lab: &Lab, program: &Path, seed: u64) -> anyhow::Result<()> {
    let mut command = prepared(lab, "n1", program, seed, &format!("{MOUNT}/fsx-changing"))?;
    let log = tempfile::NamedTempFile::new()?;
    command.stdin(Stdio::null()).stdout(log.reopen()?).stderr(log.reopen()?);
    let mut child = command.spawn().context("starting fsx")?;
    let end = Instant::now() + DEADLINE;
    let mut changes = 0u32;
    let status = loop {
        if let Some(status) = wait_for_exit(&mut child, CHANGE_EVERY)? {
            break status;
        }
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            bail!("fsx under changing modes: not done within {} s, seed {seed}", DEADLINE.as_secs());
        }
        match changes % 4 {
            0 => lab.redirect("n1", true)?,
            1 => lab.redirect("n1", false)?,
            2 => drop(lab.lab("fail-path", &["n1"])?),
            _ => drop(lab.lab("heal-path", &["n1"])?),
        }
        changes += 1;
    };
    lab.redirect("n1", false)?;
    lab.lab("heal-path", &["n1"])?;
    lab.wait_mode("n1", "direct")?;
    println!("fsx under changing modes: {} operations, {changes} changes, seed {seed}", operations());
    if !status.success() {
        bail!("fsx under changing modes: {status}, seed {seed}\n{}", std::fs::read_to_string(log.path())?);
    }
    if changes < 3 {
        bail!("only {changes} changes of mode happened; raise the number of operations");
    }
    Ok(())
}

fn wait_for_exit(
    child: &mut std::process::Child,
    limit: Duration,
) -> anyhow::Result<Option<std::process::ExitStatus>> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
