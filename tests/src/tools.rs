//! Programs that the suites run: csvctl, our own agent, and two test suites of others, which are built once into
//! `target/tools`.

use crate::wait;
use anyhow::{Context as _, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Building a tool on a slow machine.
const BUILD_DEADLINE: Duration = Duration::from_secs(1800);

/// The target directory of this build: the test binaries lie in `<target>/<profile>/deps`.
pub(crate) fn target_dir() -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe().context("finding the test's own path")?;
    let dir = exe.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists());
    dir.map(Path::to_owned).with_context(|| format!("no target directory above {}", exe.display()))
}

/// csvctl: `CSVCTL`, else the release build.
///
/// # Errors
/// It is not there.
pub fn csvctl() -> anyhow::Result<PathBuf> {
    let path = match std::env::var_os("CSVCTL") {
        Some(path) => PathBuf::from(path),
        None => target_dir()?.join("release/csvctl"),
    };
    if !path.is_file() {
        bail!("{} is not there; run `make build` first or set CSVCTL", path.display());
    }
    path.canonicalize().with_context(|| format!("resolving {}", path.display()))
}

/// The agent, which cargo builds along with the suites.
///
/// # Errors
/// It is not there.
pub fn agent() -> anyhow::Result<PathBuf> {
    beside("csv-test-agent")
}

/// A program of this package, which cargo builds along with the suites.
///
/// # Errors
/// It is not there.
pub fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe().context("finding the test's own path")?;
    let beside = exe.ancestors().skip(1).take(2).map(|dir| dir.join(name));
    let found = beside.into_iter().find(|path| path.is_file());
    found.with_context(|| format!("{name} is not beside the test; build with `cargo test -p csv-tests`"))
}

/// A program from crates.io, installed at a fixed version into `target/tools`.
///
/// # Errors
/// It cannot be built; the message has cargo's last words.
pub fn installed(name: &str, version: &str) -> anyhow::Result<PathBuf> {
    let root = target_dir()?.join("tools");
    let program = root.join("bin").join(name);
    if program.is_file() {
        return Ok(program);
    }
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["install", "--quiet", "--locked", name, "--version", version, "--root"]).arg(&root);
    wait::run(&mut command, BUILD_DEADLINE)?.ok(&format!("cargo install {name}"))?;
    Ok(program)
}
