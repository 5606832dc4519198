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
/// How many tests of this version there are to pass; fewer would mean that the runner did not do its work. Not among
/// them are those that remount, and `link::link_count_max`: glibc knows no LINK_MAX of FUSE and the suite skips it.
const PASSED_MIN: usize = 384;
/// Those that remount the file system read-only. They have a run of their own, because some other tests leave removed
/// files open, with which no file system can be remounted.
const REMOUNTING: &str = "erofs";
const REMOUNTING_MIN: usize = 13;

/// The suite's `mount`, first in the PATH. mount(8) would give a remount of a FUSE file system to a helper that can
/// only mount. The kernel is busy until it has passed on that a removed file was closed, which takes a moment.
const MOUNT_SCRIPT: &str = r#"#!/bin/sh
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  /bin/mount -i "$@" && exit 0
  sleep 0.05
done
exit 32
"#;

/// Users and features for Linux, `REMOUNT` to be filled in. The naptime is far above the time-stamp granularity of ext4 and XFS.
const CONFIG: &str = r#"
[features]
[features.posix_fallocate]
[features.rename_ctime]
[features.utimensat]
[features.utime_now]
[settings]
naptime = 0.02
allow_remount = REMOUNT
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
    skipped: usize,
    failed: BTreeSet<String>,
}

fn config(remount: bool) -> String {
    CONFIG.replace("REMOUNT", &remount.to_string())
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
    let mut summary = Summary { passed: 0, skipped: 0, failed: BTreeSet::new() };
    for line in text.lines().filter(|line| line.contains("::") && !line.starts_with(char::is_whitespace)) {
        let mut words = line.split_ascii_whitespace();
        let name = words.next().unwrap_or_default();
        match words.next() {
            Some("ok" | "success") => summary.passed += 1,
            Some("FAILED" | "failed") => {
                summary.failed.insert(name.to_owned());
            }
            Some("skipped") => summary.skipped += 1,
            _ => {}
        }
    }
    if !text.contains("Summary:") {
        bail!("pjdfstest did not come to its end:\n{text}");
    }
    Ok(summary)
}

/// Judges one run.
fn judge(place: &str, text: &str, passed_min: usize) -> anyhow::Result<()> {
    let summary = parse(text)?;
    let excluded = exclusions()?;
    let Summary { passed, skipped, .. } = summary;
    println!("pjdfstest {place}: {passed} passed, {} failed, {skipped} skipped", summary.failed.len());
    let new: Vec<_> = summary.failed.difference(&excluded).collect();
    let healed: Vec<_> = excluded.difference(&summary.failed).filter(|name| text.contains(*name)).collect();
    if !new.is_empty() || !healed.is_empty() {
        bail!("{place}: failed: {new:?}; excluded but passed: {healed:?}\n{text}");
    }
    if passed < passed_min {
        bail!("{place}: only {passed} tests passed, expected at least {passed_min}\n{text}");
    }
    Ok(())
}

/// The measure itself: all of it passes on a plain ext4, so what fails on a volume is the volume's fault.
#[test]
fn plain_ext4() -> anyhow::Result<()> {
    let program = tools::installed("pjdfstest", VERSION)?;
    let dir = tempfile::tempdir()?;
    let config = dir.path().join("pjdfstest.toml");
    std::fs::write(&config, self::config(false))?;
    let script = format!(
        "set -e; truncate -s 512M {d}/ext4.img; mkfs.ext4 -q {d}/ext4.img; mkdir {d}/mnt; mount -o loop {d}/ext4.img {d}/mnt; \
         {p} -c {c} -s /dev/shm -p {d}/mnt || true; umount {d}/mnt",
        d = dir.path().display(),
        p = program.display(),
        c = config.display()
    );
    // In a mount namespace of its own, so that nothing stays mounted whatever happens.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    let ended = wait::run(&mut command, DEADLINE)?;
    judge("plain ext4", &ended.ok("pjdfstest on ext4")?, PASSED_MIN)
}

#[test]
fn every_node_and_mode() -> anyhow::Result<()> {
    let program = tools::installed("pjdfstest", VERSION)?;
    let lab = Lab::up("posix")?;
    let run = |node: &str, mode: &str| -> anyhow::Result<()> {
        lab.wait_mode(node, mode)?;
        // Short: the suite makes sockets below, whose path may have 107 bytes.
        let dir = format!("{MOUNT}/{node}{}", mode.get(..1).unwrap_or_default());
        // Tests run as other users below that directory.
        lab.sh(node, &format!("mkdir -m 0755 {dir}"))?;
        judge(&format!("{node} {mode}"), &suite(&lab, node, &program, &dir, false)?, PASSED_MIN)?;
        // smbd has the hidden files of the coordinator's mount open for writing: it cannot be made read-only.
        if node != "n2" {
            let text = suite(&lab, node, &program, &dir, true)?;
            judge(&format!("{node} {mode}, read-only"), &text, REMOUNTING_MIN)?;
        }
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

/// Runs the suite on a node, or only the tests that remount, and gives what it printed.
fn suite(lab: &Lab, node: &str, program: &Path, dir: &str, remount: bool) -> anyhow::Result<String> {
    let run = "/run/csv/pjdfstest";
    let script = format!(
        "mkdir -p {run}/bin; cat > {run}/config.toml <<'END'{}END\n\
         cat > {run}/bin/mount <<'END'\n{MOUNT_SCRIPT}END\nchmod 0755 {run}/bin/mount",
        config(remount)
    );
    lab.sh(node, &script)?;
    let only = if remount { REMOUNTING } else { "" };
    let program = program.display();
    let script =
        format!("PATH={run}/bin:$PATH; exec {program} -c {run}/config.toml -s {run} -p {dir} {only}");
    let ended = lab.exec(node, &["sh", "-c", &script], DEADLINE)?;
    Ok(format!("{}\n{}", ended.stdout, ended.stderr))
}

#[test]
fn results_are_read() -> anyhow::Result<()> {
    let text = "a::b     ok\nc::d    FAILED\n\tassertion c::x ok\ne::f   skipped\n\nSummary: 1 failed\n";
    let summary = parse(text)?;
    assert_eq!(
        (summary.passed, summary.skipped, summary.failed.into_iter().collect::<Vec<_>>()),
        (1, 1, vec!["c::d".to_owned()])
    );
    assert!(parse("a::b ok\n").is_err());
    Ok(())
}
