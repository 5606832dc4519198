//! `csvctl cluster validate`: can this machine be a node, can these LUNs carry volumes, and does the cluster, if there is
//! one, hold together?
//!
//! It changes nothing but on a LUN that nobody uses, where reservations are tried with keys that are gone afterwards. Each
//! result says in plain words what was found and what to do next. Exit status 1 when a check failed.

mod cluster;
mod host;
mod html;
mod report;
mod storage;

use crate::admin::{self, Target};
use crate::output::rfc3339;
use anyhow::{Context, bail};
use csv_cluster::db::{ClusterDb, Settings};
use csv_types::admin::ClusterRequest;
use csv_types::config::{LocalConfig, NodeFile};
use csvd::check::ClusterFacts;
use report::{Run, any_failed, failed, passed, warning};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

/// Arguments of `csvctl cluster validate`.
#[derive(Debug, clap::Args)]
pub(crate) struct ValidateArgs {
    /// Check this LUN too; may be given several times. In a cluster the LUNs of its volumes are checked anyhow.
    #[arg(long = "lun", value_name = "DEVICE")]
    luns: Vec<PathBuf>,
    /// Write the report into this file as well.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// The node's configuration, or what stands in for it.
#[derive(Debug)]
pub(crate) struct Configuration {
    path: PathBuf,
    local: LocalConfig,
    problem: Option<String>,
    missing: bool,
}

impl Configuration {
    fn load(path: &Path) -> Configuration {
        let read = fs::read_to_string(path);
        let missing = read.is_err();
        let parsed = read
            .with_context(|| format!("cannot read {}", path.display()))
            .and_then(|text| NodeFile::parse(&text).with_context(|| format!("in {}", path.display())));
        match parsed {
            Ok(file) => Configuration { path: path.into(), local: file.local, problem: None, missing },
            Err(error) => {
                let problem = Some(format!("{error:#}"));
                Configuration { path: path.into(), local: default_config(), problem, missing }
            }
        }
    }
}

fn default_config() -> LocalConfig {
    let node = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let text = format!("[local]\nnode = {:?}\n", node.trim());
    match NodeFile::parse(&text) {
        Ok(file) => file.local,
        Err(error) => unreachable!("a configuration of defaults: {error}"),
    }
}

/// Runs the checks, prints the report.
pub(crate) fn run(args: &ValidateArgs, target: &Target, json: bool) -> anyhow::Result<ExitCode> {
    if !rustix::process::geteuid().is_root() {
        bail!("validation opens devices and asks csvd; run it as root (sudo csvctl cluster validate ...)");
    }
    target.enter_named()?;
    let configuration = Configuration::load(&target.config);
    let mut run = Run::new(host::COUNT);
    host::run(&mut run, &configuration);
    let database = || admin::database(&configuration.local).ok();
    let db = join_in(&mut run, &configuration);
    let mut luns: BTreeSet<PathBuf> = args.luns.iter().cloned().collect();
    if let Some(db) = &db {
        check_cluster(&mut run, &configuration, db, &mut luns);
    }
    run.more(storage::COUNT * u64::try_from(luns.len()).unwrap_or(0));
    for device in &luns {
        storage::run(&mut run, device, &database);
    }
    let checks = run.finish();
    if let Some(path) = &args.html {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs()) * 1000;
        let cluster = db.map_or_else(|| "none".to_owned(), |db| db.name);
        let facts =
            [("Node", configuration.local.node.clone()), ("Cluster", cluster), ("Checked", rfc3339(now))];
        fs::write(path, html::page(&facts, &checks))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&checks)?);
    } else {
        print!("{}", report::text(&checks));
    }
    Ok(if any_failed(&checks) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Is this machine in a cluster? Its database, if so; else its ports must be free.
fn join_in(run: &mut Run, configuration: &Configuration) -> Option<ClusterDb> {
    const AREA: &str = "cluster";
    let defaults = Settings::default();
    let ports = [
        (configuration.local.cluster_port, "the cluster service"),
        (defaults.control_port, "the control protocol"),
        (defaults.smb_port, "SMB"),
    ];
    run.begin("cluster");
    match admin::database(&configuration.local) {
        Ok(db) => {
            run.add(AREA, "membership", passed(format!("this node is in cluster {}", db.name)));
            return Some(db);
        }
        Err(error) => {
            let text = format!("{error:#}");
            let damaged = text.contains("does not take part");
            let verdict = if damaged {
                failed(
                    text,
                    "mend it as it says, or run `csvctl cluster rejoin` with a token from another node",
                )
            } else {
                warning(
                    text,
                    "nothing, if this machine is checked before it joins; LUNs are checked with --lun",
                )
            };
            run.add(AREA, "membership", verdict);
        }
    }
    run.more(3);
    host::ports_free(run, configuration, &ports);
    None
}

fn check_cluster(run: &mut Run, configuration: &Configuration, db: &ClusterDb, luns: &mut BTreeSet<PathBuf>) {
    let nodes = u64::try_from(db.nodes.len()).unwrap_or(0);
    run.more(nodes * (nodes + 4));
    run.begin("asking every node");
    let facts = admin::ask_cluster(&configuration.local, ClusterRequest::Check).and_then(|data| {
        serde_json::from_value::<ClusterFacts>(data).context("csvd's answer is not understood")
    });
    match facts {
        Ok(facts) => {
            cluster::run(run, db, &facts);
            luns.extend(
                facts.asked.volumes.iter().filter_map(|volume| volume.device.clone()).map(PathBuf::from),
            );
        }
        Err(error) => {
            let next = "csvctl and csvd must be of one version";
            run.add("nodes", "all", failed(format!("they cannot be asked: {error:#}"), next));
        }
    }
    run.begin("ports");
    cluster::ports(run, db, configuration.local.cluster_port);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_configuration_can_be_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csv.toml");
        let configuration = Configuration::load(&path);
        assert!(configuration.missing && configuration.problem.is_some());
        assert_eq!(configuration.local.cluster_port, 7440);
        fs::write(&path, "[local]\nnode = \"n1\"\nwhat = 1\n").unwrap();
        let configuration = Configuration::load(&path);
        assert!(!configuration.missing && configuration.problem.unwrap().contains("what"));
    }
}
