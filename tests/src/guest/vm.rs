//! One guest: a QEMU process, its channel, what can happen to it.

use super::channel::{Channel, Running};
use super::net::Network;
use crate::wait;
use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A guest alone is up in 6 s, three on a busy machine in half a minute.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
const EXIT_LIMIT: Duration = Duration::from_secs(20);
/// For scripts that only look or switch.
const SCRIPT_LIMIT: Duration = Duration::from_secs(120);
/// So much of each log is printed after a failure, in lines.
const LOG_TAIL: usize = 60;

/// What a guest is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A node of the cluster.
    Node,
    /// The iSCSI target.
    Storage,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Role::Node => "node",
            Role::Storage => "storage",
        }
    }

    /// First program of the guest's own root.
    fn init(self) -> &'static str {
        match self {
            Role::Node => include_str!("node-init.sh"),
            Role::Storage => include_str!("storage-init.sh"),
        }
    }
}

/// What all guests of a rig share.
#[derive(Debug)]
pub struct Common {
    /// Directory of the rig.
    pub dir: PathBuf,
    /// Directory with `vmlinux` and `initrd.gz`.
    pub kernel: PathBuf,
    /// The product's programs.
    pub bin: PathBuf,
    /// The agent that serves the channel.
    pub agent: PathBuf,
    /// Name of the network namespace.
    pub namespace: String,
}

/// See the module.
#[derive(Debug)]
pub struct Vm {
    /// Also the name of its tap device.
    pub name: String,
    number: u8,
    role: Role,
    dir: PathBuf,
    /// Arguments of QEMU for the guest's disks.
    disks: Vec<String>,
    running: Option<(Child, Channel)>,
}

impl Vm {
    /// A guest that is not started yet. Its number is the last byte of its address.
    ///
    /// # Errors
    /// Its directory cannot be made.
    pub fn new(
        common: &Common,
        name: &str,
        number: u8,
        role: Role,
        disks: Vec<String>,
    ) -> anyhow::Result<Vm> {
        let dir = common.dir.join(name);
        let own = dir.join("own");
        fs::create_dir_all(own.join("log")).with_context(|| format!("making {}", own.display()))?;
        fs::copy(&common.agent, own.join("agent")).context("copying the agent")?;
        fs::write(own.join("init"), role.init())?;
        fs::set_permissions(own.join("init"), fs::Permissions::from_mode(0o755))?;
        fs::write(own.join("env"), format!("NAME={name}\nADDR={}\n", Network::addr(number)))?;
        Ok(Vm { name: name.to_owned(), number, role, dir, disks, running: None })
    }

    /// Is it switched on?
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.running.is_some()
    }

    /// A directory that the guest sees as `/csv/own`, for files that must survive it.
    #[must_use]
    pub fn own(&self) -> PathBuf {
        self.dir.join("own")
    }

    /// Its address.
    #[must_use]
    pub fn addr(&self) -> String {
        Network::addr(self.number)
    }

    /// Switches the guest on, without waiting for it.
    ///
    /// # Errors
    /// QEMU does not start.
    pub fn power_on(&mut self, common: &Common) -> anyhow::Result<()> {
        let socket = self.dir.join("channel");
        fs::remove_file(&socket).ok();
        let log = File::options().create(true).append(true).open(self.dir.join("qemu.log"))?;
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &common.namespace, "setpriv", "--pdeathsig", "KILL", "--"]);
        command.args(self.qemu(common, &socket));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = command.spawn().context("starting QEMU")?;
        match Channel::connect(&self.name, &socket) {
            Ok(channel) => self.running = Some((child, channel)),
            Err(error) => {
                child.kill().ok();
                child.wait().ok();
                let log = fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default();
                return Err(error.context(format!("QEMU of {} says: {log}", self.name)));
            }
        }
        Ok(())
    }

    fn qemu(&self, common: &Common, socket: &Path) -> Vec<String> {
        let memory = if self.role == Role::Storage { "384" } else { "512" };
        let share = |tag: &str, path: &Path, options: &str| {
            let path = path.display();
            format!("local,path={path},mount_tag={tag},security_model=none,multidevs=remap{options}")
        };
        let append = format!("console=ttyS0 loglevel=5 panic=-1 net.ifnames=0 csv.role={}", self.role.word());
        let mut args: Vec<String> = ["qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=128"]
            .into_iter()
            .chain([
                "-cpu",
                "max",
                "-smp",
                "1",
                "-m",
                memory,
                "-nodefaults",
                "-no-reboot",
                "-display",
                "none",
            ])
            .map(str::to_owned)
            .collect();
        let mut add = |key: &str, value: String| args.extend([key.to_owned(), value]);
        add("-serial", format!("file:{}", self.dir.join("console.log").display()));
        add("-kernel", common.kernel.join("vmlinux").display().to_string());
        add("-initrd", common.kernel.join("initrd.gz").display().to_string());
        add("-append", append);
        add("-virtfs", share("host", Path::new("/"), ",readonly=on"));
        add("-virtfs", share("bin", &common.bin, ",readonly=on"));
        add("-virtfs", share("own", &self.own(), ""));
        add("-device", "virtio-rng-pci".into());
        add("-netdev", format!("tap,id=net,ifname={},script=no,downscript=no", self.name));
        add("-device", format!("virtio-net-pci,netdev=net,mac=52:54:00:c5:f5:{:02x}", self.number));
        add("-device", "virtio-serial-pci".into());
        add("-chardev", format!("socket,id=ctl,path={},server=on,wait=off", socket.display()));
        add("-device", "virtserialport,chardev=ctl,name=csv".into());
        args.extend(self.disks.iter().cloned());
        args
    }

    /// Waits until the guest answers.
    ///
    /// # Errors
    /// It does not; its console is printed.
    pub fn wait_up(&self) -> anyhow::Result<()> {
        self.channel()?.wait_ready(BOOT_LIMIT).inspect_err(|_| self.print_logs())
    }

    /// Prints the ends of its logs: QEMU's, its console, and what programs left in `/csv/own/log`.
    pub fn print_logs(&self) {
        let mut logs = vec![self.dir.join("qemu.log"), self.dir.join("console.log")];
        let own = fs::read_dir(self.own().join("log")).into_iter().flatten().filter_map(Result::ok);
        logs.extend(own.map(|entry| entry.path()));
        for path in logs {
            let text = fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            println!("--- {}: end of {}", self.name, path.display());
            lines[lines.len().saturating_sub(LOG_TAIL)..].iter().for_each(|line| println!("{line}"));
        }
    }

    fn channel(&self) -> anyhow::Result<&Channel> {
        let (_, channel) = self.running.as_ref().with_context(|| format!("{} is off", self.name))?;
        Ok(channel)
    }

    /// Runs a shell script in the guest and gives what it printed.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn sh(&self, script: &str) -> anyhow::Result<String> {
        self.start(script, SCRIPT_LIMIT)?.ok()
    }

    /// Starts a shell script in the guest.
    ///
    /// # Errors
    /// The guest is off.
    pub fn start(&self, script: &str, limit: Duration) -> anyhow::Result<Running> {
        self.channel()?.start(script, limit)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let (child, _) = self.running.as_ref().with_context(|| format!("{} is off", self.name))?;
        kill(Pid::from_raw(i32::try_from(child.id())?), signal).context("signalling QEMU")
    }

    /// Power cut: what the guest had not given to its disks is lost.
    ///
    /// # Errors
    /// QEMU cannot be killed.
    pub fn power_cut(&mut self) -> anyhow::Result<()> {
        let Some((mut child, channel)) = self.running.take() else { bail!("{} is off", self.name) };
        child.kill().context("killing QEMU")?;
        wait::exit_within(&mut child, EXIT_LIMIT)?;
        drop(channel);
        Ok(())
    }

    /// The guest stands still, and its clock jumps when it goes on.
    ///
    /// # Errors
    /// It is off.
    pub fn freeze(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Goes on after [`Vm::freeze`].
    ///
    /// # Errors
    /// It is off.
    pub fn thaw(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGCONT)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.running.is_some()
            && let Err(error) = self.power_cut()
        {
            println!("guests: {}: {error:#}", self.name);
        }
    }
}
