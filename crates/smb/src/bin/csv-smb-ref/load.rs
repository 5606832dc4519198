//! What one process does: connect, say so, wait for the start, work, print its times.

use super::Args;
use super::result::Part;
use anyhow::{Context as _, ensure};
use csv_types::config::Config;
use pavao::{SmbClient, SmbCredentials, SmbDialect, SmbEncryptionLevel, SmbFile, SmbOpenOptions, SmbOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::time::{Duration, Instant};

/// What a process prints when it is connected.
pub(super) const READY: &str = "ready";
/// A call that takes longer than this fails.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kind {
    /// Random reads.
    Randread,
    /// Random overwrites.
    Randwrite,
    /// Sequential reads.
    Read,
    /// Sequential overwrites.
    Write,
    /// Create and close empty files that must not exist.
    Create,
    /// stat of existing files.
    Stat,
    /// Unlink of existing files.
    Unlink,
}

impl Kind {
    pub(super) fn is_metadata(self) -> bool {
        matches!(self, Kind::Create | Kind::Stat | Kind::Unlink)
    }

    fn is_random(self) -> bool {
        matches!(self, Kind::Randread | Kind::Randwrite)
    }

    fn writes(self) -> bool {
        matches!(self, Kind::Randwrite | Kind::Write)
    }
}

/// The whole life of a process.
pub(super) fn run(args: &Args, config: &Config, process: u64) -> anyhow::Result<()> {
    let client = connect(args, config)?;
    let path = format!("/{}", args.path.trim_matches('/'));
    let part = if args.op.is_metadata() {
        wait_for_start()?;
        metadata(args, &client, &path)?
    } else {
        let options = SmbOpenOptions::default().read(true).write(args.op.writes());
        let mut file =
            client.open_with(&path, options).with_context(|| format!("opening {path} on the share"))?;
        wait_for_start()?;
        data(args, &mut file, process).with_context(|| format!("{:?} of {path} on the share", args.op))?
    };
    writeln!(std::io::stdout(), "{}", part.print()).context("printing the times")
}

fn connect(args: &Args, config: &Config) -> anyhow::Result<SmbClient> {
    let volume =
        config.volume(&args.volume).with_context(|| format!("csv.toml has no volume {}", args.volume))?;
    let node = config.node(&args.coordinator).context("the coordinator is no node")?;
    let secret = config.local.secrets_dir.join("smb.password");
    let password =
        std::fs::read_to_string(&secret).with_context(|| format!("cannot read {}", secret.display()))?;
    let server = config.smb_addr(node, volume);
    let credentials = SmbCredentials::default()
        .server(format!("smb://{server}"))
        .share(format!("/{}", volume.name))
        .username("csvnode")
        .password(password.trim())
        .workgroup("CSVFS");
    let level =
        if config.cluster.smb_encrypt { SmbEncryptionLevel::Require } else { SmbEncryptionLevel::None };
    let options = SmbOptions::default()
        .min_protocol(SmbDialect::Smb311)
        .max_protocol(SmbDialect::Smb311)
        .encryption_level(level)
        .case_sensitive(true)
        .no_auto_anonymous_login(true)
        .one_share_per_server(true);
    let client = SmbClient::new(credentials, options)?;
    client.set_timeout(CALL_TIMEOUT)?;
    // libsmbclient connects at the first use, which must not be part of what is timed.
    client.stat("/").with_context(|| format!("connecting to the share {} at {server}", volume.name))?;
    Ok(client)
}

fn wait_for_start() -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{READY}")?;
    out.flush()?;
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).context("waiting for the start")?;
    Ok(())
}

/// Sequential processes take turns with the blocks, so that together they go through the file once from its
/// beginning to its end, and start over.
fn data(args: &Args, file: &mut SmbFile<'_>, process: u64) -> anyhow::Result<Part> {
    let blocks = args.len / args.block_bytes;
    let mut buffer = vec![0x5a_u8; usize::try_from(args.block_bytes)?];
    let mut random = Random::new(process);
    let mut next = process;
    let (runtime, begun) = (Duration::from_secs(args.runtime_s), Instant::now());
    let mut times_ns = Vec::new();
    while begun.elapsed() < runtime || times_ns.is_empty() {
        let block = if args.op.is_random() { random.below(blocks) } else { next % blocks };
        next += args.depth;
        let at = Instant::now();
        // Seeking is local to libsmbclient.
        file.seek(SeekFrom::Start(args.offset + block * args.block_bytes))?;
        if args.op.writes() {
            file.write_all(&buffer)?;
        } else {
            file.read_exact(&mut buffer)?;
        }
        times_ns.push(nanos(at));
    }
    Ok(Part { seconds: begun.elapsed().as_secs_f64(), times_ns })
}

fn metadata(args: &Args, client: &SmbClient, dir: &str) -> anyhow::Result<Part> {
    ensure!(args.files > 0, "--files must be at least 1");
    let begun = Instant::now();
    let mut times_ns = Vec::new();
    for number in 0..args.files {
        let path = format!("{dir}/f{number:07}");
        let at = Instant::now();
        match args.op {
            Kind::Create => {
                let options = SmbOpenOptions::default().write(true).create(true).exclusive(true).mode(0o644);
                client.open_with(&path, options).map(drop)
            }
            Kind::Stat => client.stat(&path).map(drop),
            Kind::Unlink => client.unlink(&path),
            Kind::Randread | Kind::Randwrite | Kind::Read | Kind::Write => Ok(()),
        }
        .with_context(|| format!("{:?} of {path} on the share", args.op))?;
        times_ns.push(nanos(at));
    }
    Ok(Part { seconds: begun.elapsed().as_secs_f64(), times_ns })
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// xorshift64*: places only have to be spread evenly, and cost nothing.
struct Random(u64);

impl Random {
    fn new(process: u64) -> Random {
        Random(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(process * 2 + 1))
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_places_reach_every_block_and_differ_between_processes() {
        let places = |process| {
            let mut random = Random::new(process);
            (0..400).map(|_| random.below(16)).collect::<Vec<_>>()
        };
        for block in 0..16 {
            assert!(places(0).contains(&block), "{block}");
        }
        assert!(places(0).iter().all(|place| *place < 16));
        assert_ne!(places(0), places(1));
    }
}
