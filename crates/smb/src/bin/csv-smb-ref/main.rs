//! Reference for the benchmark: what libsmbclient alone reaches on a volume's share, without csvfs on this side.
//!
//! Files are reached by name on the same share and the same smbd that the redirected modes use, with the client
//! configuration of this node's SMB workers (signing, dialect, encryption). A call of libsmbclient blocks its whole
//! process, so a queue depth of N is N processes, each with a connection and one request on its way.
//!
//! The first process starts the others, waits until each is connected, lets all go at once and adds up what they
//! measured. It prints one line of JSON. Any process that fails ends the run with that process's own words.

mod load;
mod result;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use csv_types::config::Config;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

/// Measures libsmbclient against a volume's share.
#[derive(Debug, Clone, Parser)]
#[command(version)]
struct Args {
    /// Configuration file of the node; not the coordinator.
    #[arg(long, default_value = "/run/csv/csv.toml")]
    config: PathBuf,
    /// Volume.
    #[arg(long)]
    volume: String,
    /// Name of the node that coordinates it.
    #[arg(long)]
    coordinator: String,
    /// File to read or write, or directory of files to create, stat or unlink; from the volume's root.
    #[arg(long)]
    path: String,
    /// What to do.
    #[arg(long, value_enum)]
    op: load::Kind,
    /// Bytes per read or write.
    #[arg(long, default_value_t = 4096)]
    block_bytes: u64,
    /// Requests on their way at one time; each is a process.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    depth: u64,
    /// Where the stretch of the file begins, in bytes.
    #[arg(long, default_value_t = 0)]
    offset: u64,
    /// Length of the stretch, in bytes.
    #[arg(long, default_value_t = 0)]
    len: u64,
    /// How long to read or write, in seconds.
    #[arg(long, default_value_t = 3)]
    runtime_s: u64,
    /// How many files to create, stat or unlink.
    #[arg(long, default_value_t = 1000)]
    files: u64,
    /// This is one of the processes; its number.
    #[arg(long, hide = true)]
    process: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    ensure!(
        args.op.is_metadata() || (args.block_bytes > 0 && args.len / args.block_bytes >= args.depth),
        "the stretch of {} bytes has fewer than {} blocks of {} bytes; give a longer --len",
        args.len,
        args.depth,
        args.block_bytes
    );
    ensure!(
        !args.op.is_metadata() || args.depth == 1,
        "files are created, statted and unlinked at depth 1 only"
    );
    let config = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read {}", args.config.display()))?;
    let config = Config::parse(&config).with_context(|| format!("in {}", args.config.display()))?;
    match args.process {
        Some(process) => load::run(&args, &config, process),
        None => lead(&args, &config),
    }
}

/// One of the processes, as the first one sees it. Dropping it ends it.
struct Process {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has finished is only reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lead(args: &Args, config: &Config) -> anyhow::Result<()> {
    let home = config.local.run_dir.join(format!("{}.smbc", args.volume));
    ensure!(
        home.join(".smb/smb.conf").is_file(),
        "{} has no client configuration: csvfs of volume {} does not run here, or this node coordinates it",
        home.display(),
        args.volume
    );
    let program = std::env::current_exe().context("cannot find own program")?;
    let mut processes = Vec::new();
    for number in 0..args.depth {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).args(["--process", &number.to_string()]);
        // libsmbclient reads $HOME/.smb/smb.conf.
        command.env("HOME", &home).env("SMB_CONF_PATH", home.join(".smb/smb.conf"));
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start itself")?;
        let stdout = child.stdout.take().context("no pipe to a process")?;
        processes.push(Process { child, stdout: BufReader::new(stdout) });
    }
    for process in &mut processes {
        let mut line = String::new();
        process.stdout.read_line(&mut line)?;
        if line.trim() != load::READY {
            bail!("a process did not get ready; its message stands above");
        }
    }
    let before = result::busy_us()?;
    for process in &mut processes {
        // The end of its standard input is the sign to start.
        drop(process.child.stdin.take());
    }
    let mut parts = Vec::new();
    for process in &mut processes {
        let mut text = String::new();
        process.stdout.read_to_string(&mut text)?;
        parts.push(result::Part::parse(&text).context("a process failed; its message stands above")?);
    }
    let busy_us = result::busy_us()?.saturating_sub(before);
    let line = result::whole(&parts, busy_us)?;
    writeln!(std::io::stdout(), "{line}").context("printing the result")
}
