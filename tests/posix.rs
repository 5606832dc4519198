//! POSIX conformance: pjdfstest on every node, in every mode. Exclusions stand in `pjdfstest-exclusions.toml`, each
//! with its reason; an exclusion that passes is an error too, so that the list cannot rot.

use anyhow::{Context as _, bail};
use csv_tests::lab::{Lab, MOUNT};
use csv_tests::{tools, wait};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const VERSION: &str = "0.2.2";
const DEADLINE: Duration = Duration::from_secs(900);
/// How many tests of this version pass on a plain ext4; fewer would mean that the runner did not do its work.
const PASSED_MIN: usize = 370;

/// Users and features for Linux. The naptime is far above the time-stamp granularity of ext4 and XFS.
const CONFIG: &str = r#"
[features]
[features.posix_fallocate]
[features.rename_ctime]
[features.utimensat]
[features.utime_now]
[settings]
naptime = 0.02
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

#[derive(Debug, Deserialize)]
struct Exclusions {
    #[serde(default)]
    exclusion: Vec<Exclusion>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exclusion {
    name: String,
    reason: String,
}

#[derive(Debug)]
struct Summary {
    passed: usize,
    failed: BTreeSet<String>,
}

fn exclusions() -> anyhow::Result<BTreeSet<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("pjdfstest-exclusions.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let list: Exclusions = toml::from_str(&text)?;
    if let Some(bare) = list.exclusion.iter().find(|exclusion| exclusion.reason.len() < 20) {
        bail!("exclusion {} has no reason worth the name", bare.name);
    }
    Ok(list.exclusion.into_iter().map(|exclusion| exclusion.name).collect())
}

/// Reads the runner's lines `name   ok|FAILED|skipped`.
fn parse(text: &str) -> anyhow::Result<Summary> {
    let mut summary = Summary { passed: 0, failed: BTreeSet::new() };
    for line in text.lines().filter(|line| line.contains("::") && !line.starts_with(char::is_whitespace)) {
        let mut words = line.split_ascii_whitespace();
        let name = words.next().unwrap_or_default();
        match words.next() {
            Some("ok" | "success") => summary.passed += 1,
            Some("FAILED" | "failed") => {
                summary.failed.insert(name.to_owned());
            }
            _ => {}
        }
    }
    if !text.contains("Summary:") {
        bail!("pjdfstest did not come to its end:\n{text}");
    }
    Ok(summary)
}

/// Judges one run.
fn judge(place: &str, text: &str) -> anyhow::Result<()> {
    let summary = parse(text)?;
    let excluded = exclusions()?;
    println!("pjdfstest {place}: {} passed, {} failed", summary.passed, summary.failed.len());
    let new: Vec<_> = summary.failed.difference(&excluded).collect();
    let healed: Vec<_> = excluded.difference(&summary.failed).collect();
    if !new.is_empty() || !healed.is_empty() {
        bail!("{place}: failed: {new:?}; excluded but passed: {healed:?}\n{text}");
    }
    if summary.passed < PASSED_MIN {
        bail!("{place}: only {} tests passed, expected at least {PASSED_MIN}\n{text}", summary.passed);
    }
    Ok(())
}

/// The measure itself: all of it passes on a plain ext4, so what fails on a volume is the volume's fault.
#[test]
fn plain_ext4() -> anyhow::Result<()> {
    let program = tools::installed("pjdfstest", VERSION)?;
    let dir = tempfile::tempdir()?;
    let config = dir.path().join("pjdfstest.toml");
    std::fs::write(&config, CONFIG)?;
    let script = format!(
        "set -e; truncate -s 512M {d}/ext4.img; mkfs.ext4 -q {d}/ext4.img; mkdir {d}/mnt; mount -o loop {d}/ext4.img {d}/mnt; \
         {p} -c {c} -p {d}/mnt || true; umount {d}/mnt",
        d = dir.path().display(),
        p = program.display(),
        c = config.display()
    );
    // In a mount namespace of its own, so that nothing stays mounted whatever happens.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    let ended = wait::run(&mut command, DEADLINE)?;
    judge("plain ext4", &ended.ok("pjdfstest on ext4")?)
}

#[test]
fn every_node_and_mode() -> anyhow::Result<()> {
    let program = tools::installed("pjdfstest", VERSION)?;
    let lab = Lab::up("posix")?;
    let run = |node: &str, mode: &str| -> anyhow::Result<()> {
        lab.wait_mode(node, mode)?;
        let dir = format!("{MOUNT}/posix-{node}-{mode}");
        let config = format!("/run/csv/pjdfstest-{mode}.toml");
        // Tests run as other users below that directory.
        lab.sh(node, &format!("mkdir -m 0755 {dir}; cat > {config} <<'END'{CONFIG}END"))?;
        let argv = [program.as_os_str(), "-c".as_ref(), config.as_ref(), "-p".as_ref(), dir.as_ref()];
        let ended = lab.exec(node, &argv, DEADLINE)?;
        judge(&format!("{node} {mode}"), &format!("{}\n{}", ended.stdout, ended.stderr))?;
        lab.sh(node, &format!("rm -rf {dir}")).map(drop)
    };
    let coordinator_mode = lab.state("n2")?.mode;
    run("n1", "direct")?;
    run("n2", &coordinator_mode)?;
    run("n3", "block-redirected")?;
    lab.redirect("n1", true)?;
    run("n1", "fs-redirected")?;
    lab.redirect("n1", false)?;
    lab.finish()
}

#[test]
fn results_are_read() -> anyhow::Result<()> {
    let text = "a::b     ok\nc::d    FAILED\n\tassertion c::x ok\ne::f   skipped\n\nSummary: 1 failed\n";
    let summary = parse(text)?;
    assert_eq!(
        (summary.passed, summary.failed.into_iter().collect::<Vec<_>>()),
        (1, vec!["c::d".to_owned()])
    );
    assert!(parse("a::b ok\n").is_err());
    Ok(())
}
