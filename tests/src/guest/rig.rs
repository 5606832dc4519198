//! Making and removing a rig.

use super::net::{self, Network};
use super::storage::Storage;
use super::vm::{Common, Role, Vm};
use crate::{tools, wait};
use anyhow::{Context as _, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Names of the nodes.
pub const NODES: [&str; 3] = ["g1", "g2", "g3"];
/// The LUN of 1 GiB takes no room on this machine until it is written.
const LUN_BYTES: u64 = 1 << 30;
const STATE_BYTES: u64 = 256 << 20;
/// Fetching and unpacking a kernel.
const KERNEL_LIMIT: Duration = Duration::from_secs(600);
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Exit status of `guest-kernel.sh` for "cannot be had here".
const UNAVAILABLE: i32 = 3;
/// Namespaces and directories of rigs are called so, with the number of the process behind.
const PREFIX: &str = "csv-guests-";

/// Outcome of [`Rig::start`].
#[derive(Debug)]
pub enum Start {
    /// All guests are up.
    Up(Box<Rig>),
    /// Why this machine cannot run guests.
    Skipped(String),
}

/// Three nodes and a storage.
#[derive(Debug)]
pub struct Rig {
    /// The nodes, in the order of [`NODES`].
    pub nodes: Vec<Vm>,
    /// The storage.
    pub storage: Storage,
    /// The network between the guests.
    pub network: Network,
    /// What they share.
    pub common: Common,
    finished: bool,
}

impl Rig {
    /// Makes a rig and waits until its guests are up.
    ///
    /// # Errors
    /// Something fails that could work here.
    pub fn start() -> anyhow::Result<Start> {
        if let Some(why) = missing()? {
            return Ok(Start::Skipped(why));
        }
        let bin = tools::csvctl()?.parent().context("csvctl is in no directory")?.to_owned();
        let kernel = bin.parent().unwrap_or(&bin).join("guests");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/guest-kernel.sh");
        let made = wait::run(Command::new(script).arg(&kernel), KERNEL_LIMIT)?;
        if made.status.code() == Some(UNAVAILABLE) {
            return Ok(Start::Skipped(made.stderr.trim().to_owned()));
        }
        made.ok("scripts/guest-kernel.sh")?;
        remove_stale();
        // A machine that still writes back what a build left keeps its guests waiting for seconds, and QEMU's initiators give up
        // their sessions then.
        nix::unistd::sync();
        let name = format!("{PREFIX}{}", std::process::id());
        let dir = PathBuf::from("/var/tmp").join(&name);
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        let network = Network::create(&name)?;
        let common = Common { dir, kernel, bin, agent: tools::agent()?, namespace: name };
        let storage = Storage::new(&common, LUN_BYTES)?;
        let mut rig = Rig { nodes: Vec::new(), storage, network, common, finished: false };
        rig.network.plug(&rig.storage.vm.name)?;
        rig.storage.vm.power_on(&rig.common)?;
        rig.storage.vm.wait_up()?;
        for (number, name) in (1..).zip(NODES) {
            let vm = rig.new_node(name, number)?;
            rig.nodes.push(vm);
        }
        for node in &mut rig.nodes {
            node.power_on(&rig.common)?;
        }
        rig.nodes.iter().try_for_each(Vm::wait_up)?;
        Ok(Start::Up(Box::new(rig)))
    }

    fn new_node(&self, name: &str, number: u8) -> anyhow::Result<Vm> {
        self.network.plug(name)?;
        let state = self.common.dir.join(format!("{name}.state"));
        fs::File::create(&state)?.set_len(STATE_BYTES)?;
        let mut mkfs = Command::new("mkfs.ext4");
        wait::run(mkfs.args(["-q", "-F"]).arg(&state), COMMAND_LIMIT)?.ok("mkfs.ext4")?;
        let mut disks = Storage::disk_of(name);
        let drive = format!("file={},if=virtio,format=raw,cache=none", state.display());
        disks.extend(["-drive".to_owned(), drive]);
        Vm::new(&self.common, name, number, Role::Node, disks)
    }

    /// A node by its name.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn node(&self, name: &str) -> anyhow::Result<&Vm> {
        self.nodes.iter().find(|node| node.name == name).with_context(|| format!("no node {name}"))
    }

    /// Power cut of a node.
    ///
    /// # Errors
    /// It is off.
    pub fn power_cut(&mut self, name: &str) -> anyhow::Result<()> {
        let node = self.nodes.iter_mut().find(|node| node.name == name);
        node.with_context(|| format!("no node {name}"))?.power_cut()
    }

    /// Switches a node on and waits until it is up.
    ///
    /// # Errors
    /// It does not come up.
    pub fn power_on(&mut self, name: &str) -> anyhow::Result<()> {
        let node = self.nodes.iter_mut().find(|node| node.name == name);
        let node = node.with_context(|| format!("no node {name}"))?;
        node.power_on(&self.common)?;
        node.wait_up()
    }

    /// The good end: power cut of all guests, check of a file system on the LUN, everything removed. Who mounted it has
    /// unmounted it before.
    ///
    /// # Errors
    /// The file system is not clean.
    pub fn finish(mut self, fs: Option<&str>) -> anyhow::Result<()> {
        for node in self.nodes.iter_mut().filter(|node| node.is_on()) {
            node.power_cut()?;
        }
        self.storage.vm.power_cut()?;
        if let Some(fs) = fs {
            self.storage.check(fs)?;
        }
        self.finished = true;
        Ok(())
    }

    /// Prints the ends of the guests' logs.
    pub fn print_logs(&self) {
        for vm in self.nodes.iter().chain([&self.storage.vm]) {
            vm.print_logs();
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.nodes.clear();
        if self.storage.vm.is_on()
            && let Err(error) = self.storage.vm.power_cut()
        {
            println!("guests: {error:#}");
        }
        let dir = &self.common.dir;
        if !self.finished && std::env::var_os("CSV_TEST_KEEP").is_some() {
            println!("guests: logs are kept in {}", dir.display());
        } else if let Err(error) = fs::remove_dir_all(dir) {
            println!("guests: removing {}: {error}", dir.display());
        }
    }
}

/// Why guests cannot run here.
fn missing() -> anyhow::Result<Option<String>> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the guests need root: they make a network namespace and tap devices");
    }
    if !Path::new("/dev/net/tun").exists() {
        return Ok(Some("there is no /dev/net/tun".into()));
    }
    // Refused either way; without its module QEMU does not even know the word.
    let mut probe = Command::new("qemu-img");
    probe.args(["info", "iscsi://127.0.0.1:1/iqn.2024-01.org.csvfs:none/1"]);
    let Ok(probed) = wait::run(&mut probe, COMMAND_LIMIT) else {
        return Ok(Some("qemu-img cannot be run; install qemu-utils".into()));
    };
    if probed.stderr.contains("Unknown protocol") {
        return Ok(Some("QEMU has no iSCSI initiator; install qemu-block-extra".into()));
    }
    if wait::run(Command::new("qemu-system-x86_64").arg("-version"), COMMAND_LIMIT).is_err() {
        return Ok(Some("qemu-system-x86_64 cannot be run; install qemu-system-x86".into()));
    }
    Ok(None)
}

/// Removes what rigs left whose processes are gone.
fn remove_stale() {
    let gone = |name: &str| {
        name.strip_prefix(PREFIX).is_some_and(|pid| !Path::new("/proc").join(pid).join("exe").exists())
    };
    let names = |dir: &str| -> Vec<String> {
        let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
        let names = entries.filter_map(Result::ok).map(|entry| entry.file_name().to_string_lossy().into());
        names.filter(|name: &String| gone(name)).collect()
    };
    for name in names("/run/netns") {
        net::remove(&name).ok();
    }
    if std::env::var_os("CSV_TEST_KEEP").is_none() {
        for name in names("/var/tmp") {
            fs::remove_dir_all(Path::new("/var/tmp").join(name)).ok();
        }
    }
}
