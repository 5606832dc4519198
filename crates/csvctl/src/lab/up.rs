//! `csvctl lab up`: makes a cluster and waits until every node serves the volume.
//!
//! Whatever step fails, what was made so far is removed again (unless `--keep`), in the same way as by `lab down`.

use super::spec::{self, Lab, LabNode, NODE_DIRS, RegistryLock, WITNESS};
use super::sys::run_command;
use super::{cluster, down, lun, net, node, ready};
use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Size of the witness LUN.
const WITNESS_BYTES: u64 = 64 << 20;

/// Arguments of `csvctl lab up`.
#[derive(Debug, clap::Args)]
pub(crate) struct UpArgs {
    /// Name of the lab.
    #[arg(long, default_value = "lab")]
    name: String,
    /// Number of nodes; they are called n1, n2, ...
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=16))]
    nodes: u32,
    /// Size of the LUN.
    #[arg(long, default_value = "8G", value_parser = lun::parse_size)]
    size: u64,
    /// File system of the volume.
    #[arg(long, default_value = "ext4", value_parser = ["ext4", "xfs"])]
    fs: String,
    /// Node that coordinates the volume [default: n2, or n1 when there is only one].
    #[arg(long)]
    coordinator: Option<String>,
    /// Nodes without a path to the LUN [default: n3, when there are three or more].
    #[arg(long, value_delimiter = ',', conflicts_with = "all_paths")]
    no_path: Vec<String>,
    /// Every node has a path to the LUN.
    #[arg(long)]
    all_paths: bool,
    /// Directory of the lab [default: /var/tmp/csv-lab/NAME]. Must not exist.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Name of the volume.
    #[arg(long, default_value = "Volume1")]
    volume: String,
    /// Lease of the layouts in milliseconds; the recall time is half of it.
    #[arg(long, value_parser = clap::value_parser!(u64).range(500..=600_000))]
    lease_ms: Option<u64>,
    /// How long an operation waits for an unreachable coordinator, in milliseconds.
    #[arg(long)]
    op_timeout_ms: Option<u64>,
    /// Encrypt SMB besides signing it.
    #[arg(long)]
    smb_encrypt: bool,
    /// A setting of the cluster.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = crate::args::key_value)]
    settings: Vec<(String, String)>,
    /// With a disk witness: a second small LUN, to which every node has a path.
    #[arg(long)]
    witness: bool,
    /// A shared disk besides, such as 1G or 1G:data, to which every node has a path; nodes know it by its name [default: disk1,
    /// disk2, ...].
    #[arg(long = "disk", value_name = "SIZE[:NAME]", value_parser = lun::parse_disk)]
    disks: Vec<(u64, Option<String>)>,
    /// Write the whole LUN once, so that benchmarks see no first writes of the host's file system.
    #[arg(long)]
    prealloc: bool,
    /// Leave everything there when it fails, to look at.
    #[arg(long)]
    keep: bool,
    /// How long to wait for each node, in seconds.
    #[arg(long, default_value_t = 60)]
    timeout_s: u64,
}

/// Makes the lab.
pub(crate) fn run(args: &UpArgs) -> anyhow::Result<Lab> {
    let lab = plan(args)?;
    let progress = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
        progress.set_style(style);
    }
    progress.enable_steady_tick(Duration::from_millis(100));
    let name = lab.name.clone();
    let made = {
        let lock = RegistryLock::take()?;
        let mut lab = lab;
        lab.subnet = spec::pick_subnet(&lab.name, &taken_subnets()?);
        if lab.dir.exists() {
            bail!("{} exists already; remove it or choose another --dir", lab.dir.display());
        }
        if !net::namespaces(&lab.name).is_empty() {
            bail!("there are remains of a lab {name}; `csvctl lab down --name {name}` removes them");
        }
        lock.register(&lab.name, &lab.dir)?;
        prepare(&lock, lab, args, &progress)
    };
    let result = made.and_then(|mut lab| {
        start(&mut lab, args, &progress)?;
        Ok(lab)
    });
    progress.finish_and_clear();
    result.map_err(|error| clean_up(&name, args.keep, error))
}

fn clean_up(name: &str, keep: bool, error: anyhow::Error) -> anyhow::Error {
    if keep {
        return error
            .context(format!("lab {name} is left as it is; `csvctl lab down --name {name}` removes it"));
    }
    match down::run(name) {
        Ok(()) => {
            error.context(format!("lab {name} could not be made and was removed again (--keep leaves it)"))
        }
        Err(e) => error.context(format!("lab {name} could not be made, and not wholly removed: {e:#}")),
    }
}

fn plan(args: &UpArgs) -> anyhow::Result<Lab> {
    spec::check_name(&args.name)?;
    let names: Vec<String> = (1..=args.nodes).map(|id| format!("n{id}")).collect();
    let default = if args.nodes == 1 { "n1" } else { "n2" };
    let coordinator = args.coordinator.clone().unwrap_or_else(|| default.to_owned());
    let mut no_path = args.no_path.clone();
    if no_path.is_empty() && !args.all_paths && args.nodes >= 3 && coordinator != "n3" {
        no_path.push("n3".to_owned());
    }
    for name in no_path.iter().chain([&coordinator]) {
        if !names.contains(name) {
            bail!("there will be no node \"{name}\"; nodes are {}", names.join(", "));
        }
    }
    if no_path.contains(&coordinator) {
        bail!(
            "the coordinator {coordinator} needs a path to the LUN; choose another --coordinator or --no-path"
        );
    }
    let dir = args.dir.clone().unwrap_or_else(|| spec::default_dir(&args.name));
    let dir = std::path::absolute(&dir)?;
    if NODE_DIRS.iter().any(|private| dir.starts_with(private)) {
        bail!("{} would be hidden inside the nodes; choose another --dir", dir.display());
    }
    let nodes = (1..=args.nodes).zip(&names);
    Ok(Lab {
        name: args.name.clone(),
        dir,
        subnet: [10, 0, 0],
        volume: args.volume.clone(),
        coordinator,
        cluster_id: uuid::Uuid::new_v4(),
        lease_ms: args.lease_ms,
        op_timeout_ms: args.op_timeout_ms,
        smb_encrypt: args.smb_encrypt,
        settings: args.settings.clone(),
        witness: args.witness,
        disks: disk_names(args)?,
        nodes: nodes
            .map(|(id, name)| LabNode {
                name: name.clone(),
                id,
                path: !no_path.contains(name),
                lun: None,
                witness_lun: None,
                disk_luns: BTreeMap::new(),
                holder_pid: None,
            })
            .collect(),
    })
}

/// Names of the disks, in order. Nodes know volume and witness by name, too.
fn disk_names(args: &UpArgs) -> anyhow::Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    for (number, (_, name)) in args.disks.iter().enumerate() {
        let name = name.clone().unwrap_or_else(|| format!("disk{}", number + 1));
        if names.contains(&name) || name == args.volume || name == WITNESS {
            bail!("there is a LUN named \"{name}\" already; choose another name for the disk");
        }
        names.push(name);
    }
    Ok(names)
}

fn taken_subnets() -> anyhow::Result<Vec<[u8; 3]>> {
    Ok(spec::names()?.iter().filter_map(|name| Lab::load(name).ok()).map(|lab| lab.subnet).collect())
}

/// Everything up to the first process.
fn prepare(lock: &RegistryLock, mut lab: Lab, args: &UpArgs, progress: &ProgressBar) -> anyhow::Result<Lab> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&lab.dir)
        .with_context(|| format!("cannot create {}", lab.dir.display()))?;
    lab.dir = fs::canonicalize(&lab.dir)?;
    lab.save()?;
    lock.make_mount_points()?;
    progress.set_message("network");
    net::create(&lab)?;
    progress.set_message("LUN");
    lun::create_image(&lab.lun_image(), args.size, args.prealloc)?;
    if lab.witness {
        lun::create_image(&lab.witness_image(), WITNESS_BYTES, false)?;
    }
    for (name, (bytes, _)) in lab.disks.iter().zip(&args.disks) {
        lun::create_image(&lab.disk_image(name), *bytes, args.prealloc)?;
    }
    progress.set_message(format!("{} on the LUN", args.fs));
    // Through a device of its own, so that no node's device has seen the LUN before the volume was on it.
    let device = lun::attach(&lab.lun_image())?;
    let created = create_volume(&lab, &device, &args.fs);
    lun::detach(&device)?;
    created.map(|()| lab)
}

/// By the same command that an administrator uses, in a process of its own.
fn create_volume(lab: &Lab, device: &Path, fs: &str) -> anyhow::Result<()> {
    let mut command = Command::new(std::env::current_exe().context("cannot find csvctl's own path")?);
    command
        .args(["volume", "create", "--name", &lab.volume, "--fs", fs])
        .args(["--cluster-id", &lab.cluster_id.to_string(), "--lun"])
        .arg(device);
    run_command(&mut command).context("cannot create the volume").map(drop)
}

/// Starts the nodes, makes the cluster and waits for each.
fn start(lab: &mut Lab, args: &UpArgs, progress: &ProgressBar) -> anyhow::Result<()> {
    let names: Vec<String> = lab.nodes.iter().map(|node| node.name.clone()).collect();
    for name in &names {
        progress.set_message(format!("starting {name}"));
        node::start(lab, name)?;
    }
    cluster::create(lab, &|step| progress.set_message(step))?;
    if lab.witness {
        progress.set_message("disk witness");
        cluster::add_witness(lab, Duration::from_secs(args.timeout_s))?;
    }
    progress.set_message(format!("{} on {}", lab.volume, lab.coordinator));
    cluster::add_volume(lab, Duration::from_secs(args.timeout_s))?;
    for name in &names {
        progress.set_message(format!("waiting for {name} to serve {}", lab.volume));
        ready::wait(lab, name, Duration::from_secs(args.timeout_s))?;
    }
    ready::wait_all(lab, Duration::from_secs(args.timeout_s))
}
