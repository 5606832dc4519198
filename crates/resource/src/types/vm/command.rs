//! QEMU's command line.
//!
//! It depends on nothing but the machine's name, its properties and [`Hardware`], and devices come in a fixed order, since both
//! ends of a migration must have made the same machine.

use super::config::{Config, Serial};
use super::disk::{Bus, Disk};
use super::nic::{Link, tap_name};
use super::{firmware, stable};
use crate::api::{Failure, NodeInfo};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Longest path of a Unix socket (`sun_path` of unix(7), without the zero at its end).
const SOCKET_PATH_MAX: usize = 107;
/// An emulated guest has so much less memory, in KiB. Where memory is a multiple of 64 pages, QEMU before 8.2.2 (Debian 12's, too)
/// takes a shorter way when it collects what was written during a migration, on which it forgets to have the emulation tell
/// of later writes; the guest arrives with old pages among its memory, and dies of that sooner or later. With KVM all is well.
const ODD_KIB: u64 = 64;
/// Disks on one AHCI controller.
const SATA_PORTS: usize = 6;

/// What must be the same wherever the machine goes on: at the other end of a migration, or out of a saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hardware {
    /// Chipset with its version, such as `pc-q35-7.2`.
    pub(crate) machine: String,
    /// `kvm` or `tcg`.
    pub(crate) accelerator: String,
    /// Model of the processors.
    pub(crate) cpu: String,
}

/// Files of a running machine, in the run directory.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
}

impl Place {
    /// The place of the machine `name`.
    pub(crate) fn of(node: &NodeInfo, name: &str) -> Result<Place, Failure> {
        let place = Place { dir: node.run_dir.join("vm").join(stable::directory(name)) };
        let longest = place.serial().as_os_str().len().max(place.admin().as_os_str().len());
        if longest > SOCKET_PATH_MAX {
            return Err(Failure::NotHere(format!(
                "the run directory {} of this node is too long for sockets: {longest} bytes with a socket's name, {SOCKET_PATH_MAX} \
                 are possible",
                node.run_dir.display()
            )));
        }
        Ok(place)
    }

    /// The monitor that belongs to this resource.
    pub(crate) fn qmp(&self) -> PathBuf {
        self.dir.join("qmp")
    }

    /// The monitor for administrators.
    pub(crate) fn admin(&self) -> PathBuf {
        self.dir.join("admin")
    }

    pub(crate) fn serial(&self) -> PathBuf {
        self.dir.join("serial")
    }

    pub(crate) fn agent(&self) -> PathBuf {
        self.dir.join("agent")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.dir.join("qemu.log")
    }

    pub(crate) fn tls(&self) -> PathBuf {
        self.dir.join("tls")
    }

    /// What QEMU's command line has, and no other process's.
    pub(crate) fn marker(&self) -> String {
        format!("path={},", comma(self.qmp()))
    }
}

/// What a QEMU is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// From its disks.
    Cold,
    /// From what is sent to it.
    Incoming,
}

/// A command line in the making.
struct Args<'a> {
    config: &'a Config,
    node: &'a NodeInfo,
    name: &'a str,
    words: Vec<String>,
}

/// Arguments of QEMU.
pub(crate) fn arguments(
    config: &Config,
    node: &NodeInfo,
    name: &str,
    place: &Place,
    hardware: &Hardware,
    start: Start,
) -> Result<Vec<String>, Failure> {
    let mut args = Args { config, node, name, words: Vec::new() };
    args.machine(hardware)?;
    args.monitors(place);
    args.disks();
    args.cards();
    args.ports(place);
    if start == Start::Incoming {
        args.add(["-incoming", "defer"]);
    }
    args.words.extend(config.extra_args.iter().cloned());
    Ok(args.words)
}

impl Args<'_> {
    fn add<const N: usize>(&mut self, words: [&str; N]) {
        self.words.extend(words.map(str::to_owned));
    }

    fn machine(&mut self, hardware: &Hardware) -> Result<(), Failure> {
        let (config, cluster) = (self.config, self.node.cluster_id.as_str());
        let short: String = self.name.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        self.add(["-name", &format!("guest={},process=vm-{short},debug-threads=on", comma(self.name))]);
        // -S: nothing runs before everything has been found well.
        self.add(["-no-user-config", "-nodefaults", "-S", "-msg", "timestamp=off"]);
        self.add(["-uuid", &stable::uuid(cluster, self.name)]);
        let mut machine = hardware.machine.clone();
        if let Some(found) = firmware::find(config)? {
            for (index, (path, readonly)) in
                [(&found.code, true), (&found.variables, false)].iter().enumerate()
            {
                let node = format!("pflash{index}");
                machine.push_str(&format!(",{node}={node}"));
                let blockdev = json!({
                    "driver": "raw", "node-name": node, "read-only": readonly,
                    "cache": { "direct": !readonly, "no-flush": false },
                    "file": {
                        "driver": "file", "filename": path, "read-only": readonly, "locking": "on",
                        "cache": { "direct": !readonly, "no-flush": false },
                    },
                });
                self.add(["-blockdev", &blockdev.to_string()]);
            }
        }
        self.add(["-machine", &machine, "-cpu", &hardware.cpu]);
        let accelerator = if hardware.accelerator == "tcg" { "tcg,thread=multi" } else { "kvm" };
        self.add(["-accel", accelerator]);
        let memory_kib = config.memory_mib * 1024 - if hardware.accelerator == "tcg" { ODD_KIB } else { 0 };
        self.add(["-smp", &config.cpus.to_string(), "-m", &format!("{memory_kib}K")]);
        for (option, path) in [("-kernel", &config.kernel), ("-initrd", &config.initrd)] {
            if let Some(path) = path {
                self.add([option, &path.to_string_lossy()]);
            }
        }
        if let Some(cmdline) = &config.cmdline {
            self.add(["-append", cmdline]);
        }
        // A panic is told by pvpanic, and the guest is left as it is, to be looked at until it is ended.
        self.add(["-action", "panic=pause", "-device", "pvpanic"]);
        self.add(["-object", "rng-random,id=rng0,filename=/dev/urandom"]);
        self.add(["-device", "virtio-rng-pci,rng=rng0"]);
        Ok(())
    }

    fn monitors(&mut self, place: &Place) {
        for (id, path) in [("qmp", place.qmp()), ("admin", place.admin())] {
            self.socket(id, &path);
            self.add(["-mon", &format!("chardev={id},mode=control")]);
        }
    }

    fn socket(&mut self, id: &str, path: &Path) {
        self.add(["-chardev", &format!("socket,id={id},path={},server=on,wait=off", comma(path))]);
    }

    fn disks(&mut self) {
        let disks = &self.config.disks;
        if disks.iter().any(|disk| disk.bus == Bus::Scsi) {
            self.add(["-device", "virtio-scsi-pci,id=scsi"]);
        }
        let (mut scsi, mut sata) = (0, 0);
        for (index, disk) in disks.iter().enumerate() {
            let node = format!("disk{index}");
            self.add(["-blockdev", &blockdev(disk, &node).to_string()]);
            // A request that fails stops the guest, which goes on with the same request once its storage is back.
            let common =
                format!("drive={node},id={node}-device,bootindex={},werror=stop,rerror=stop", index + 1);
            let device = match disk.bus {
                Bus::Virtio => format!("virtio-blk-pci,{common}"),
                Bus::Scsi => {
                    scsi += 1;
                    format!("scsi-hd,bus=scsi.0,scsi-id={scsi},{common}")
                }
                Bus::Sata => {
                    let (controller, port) = (sata / SATA_PORTS, sata % SATA_PORTS);
                    if port == 0 {
                        self.add(["-device", &format!("ich9-ahci,id=ahci{controller}")]);
                    }
                    sata += 1;
                    // ATA has no read-only disks.
                    let kind = if disk.readonly { "ide-cd" } else { "ide-hd" };
                    format!("{kind},bus=ahci{controller}.{port},{common}")
                }
            };
            self.add(["-device", &device]);
        }
    }

    fn cards(&mut self) {
        for (index, nic) in self.config.nics.iter().enumerate() {
            let netdev = match &nic.link {
                Link::User => format!("user,id=nic{index}"),
                Link::Bridge(_) => {
                    let run_dir = self.node.run_dir.to_string_lossy();
                    let tap = tap_name(&self.node.cluster_id, self.name, &run_dir, index);
                    format!("tap,id=nic{index},ifname={tap},script=no,downscript=no")
                }
            };
            let mac = nic.mac(&self.node.cluster_id, self.name, index);
            self.add(["-netdev", &netdev]);
            // No boot from the network, whose program would have to be of one size on all nodes.
            self.add([
                "-device",
                &format!("virtio-net-pci,id=nic{index}-device,netdev=nic{index},mac={mac},romfile="),
            ]);
        }
    }

    fn ports(&mut self, place: &Place) {
        match &self.config.serial {
            Serial::None => {}
            Serial::Socket => {
                self.socket("serial0", &place.serial());
                self.add(["-serial", "chardev:serial0"]);
            }
            Serial::File(path) => {
                self.add(["-chardev", &format!("file,id=serial0,path={},append=on", comma(path))]);
                self.add(["-serial", "chardev:serial0"]);
            }
        }
        match &self.config.vnc {
            Some(vnc) => self.add(["-vnc", vnc, "-device", "VGA"]),
            None => self.add(["-display", "none"]),
        }
        if self.config.guest_agent {
            self.socket("agent0", &place.agent());
            self.add(["-device", "virtio-serial-pci"]);
            self.add(["-device", "virtserialport,chardev=agent0,name=org.qemu.guest_agent.0"]);
        }
    }
}

/// An image, past the node's page cache: another node must see at once what was written, and a power cut must lose nothing
/// that the guest was told is written.
fn blockdev(disk: &Disk, node: &str) -> Value {
    let cache = json!({ "direct": true, "no-flush": false });
    let driver = if disk.is_block_device() { "host_device" } else { "file" };
    json!({
        "driver": disk.format.name(), "node-name": node, "read-only": disk.readonly, "discard": "unmap", "cache": cache,
        "file": {
            "driver": driver, "filename": disk.path, "read-only": disk.readonly, "locking": "on", "aio": "threads",
            "discard": "unmap", "cache": cache,
        },
    })
}

/// What a cold start gives the machine: as its properties say and this node has it.
pub(crate) fn hardware(config: &Config) -> Hardware {
    use super::config::Accelerator;
    let kvm = match config.accelerator {
        Accelerator::Kvm => true,
        Accelerator::Tcg => false,
        Accelerator::Auto => std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok(),
    };
    let (accelerator, cpu) = if kvm { ("kvm", "Westmere") } else { ("tcg", "max") };
    Hardware {
        machine: config.machine.clone(),
        accelerator: accelerator.to_owned(),
        cpu: config.cpu.clone().unwrap_or_else(|| cpu.to_owned()),
    }
}

/// QEMU takes a comma in a value when it is written twice.
fn comma(text: impl AsRef<Path>) -> String {
    text.as_ref().to_string_lossy().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::testbed::{Bed, properties};

    fn line(bed: &Bed, name: &str, pairs: &[(&str, &str)], start: Start) -> Vec<String> {
        let config = Config::read(&properties(pairs)).unwrap();
        let place = Place::of(bed.node(), name).unwrap();
        let hardware =
            Hardware { machine: "pc-q35-7.2".into(), accelerator: "tcg".into(), cpu: "max".into() };
        arguments(&config, bed.node(), name, &place, &hardware, start).unwrap()
    }

    #[test]
    fn disks_go_past_the_page_cache_with_locks_and_stop_at_errors() {
        let bed = Bed::new();
        let line = line(
            &bed,
            "vm",
            &[("disk", "/a,,b"), ("disk1", "/c,bus=sata"), ("disk2", "/d,bus=scsi")],
            Start::Cold,
        );
        let blockdev: Value =
            serde_json::from_str(line.iter().find(|word| word.contains("\"disk0\"")).unwrap()).unwrap();
        assert_eq!(blockdev["cache"]["direct"], true);
        assert_eq!(
            (&blockdev["file"]["filename"], &blockdev["file"]["locking"]),
            (&json!("/a,b"), &json!("on"))
        );
        let devices: Vec<_> = line.iter().filter(|word| word.contains("werror=stop,rerror=stop")).collect();
        assert_eq!(devices.len(), 3, "{devices:?}");
        assert!(devices[1].contains("bus=ahci0.0") && devices[2].contains("bus=scsi.0"), "{devices:?}");
        assert!(!line.contains(&"-incoming".to_owned()));
    }

    #[test]
    fn both_ends_of_a_migration_make_the_same_machine() {
        let bed = Bed::new();
        let pairs = [("disk", "/a"), ("nic", "tap,bridge=br0"), ("nic1", "user"), ("guest_agent", "true")];
        let mut there = line(&bed, "vm", &pairs, Start::Incoming);
        there.retain(|word| word != "-incoming" && word != "defer");
        assert_eq!(line(&bed, "vm", &pairs, Start::Cold), there);
    }

    #[test]
    fn memory_of_an_emulated_guest_is_never_a_multiple_of_64_pages() {
        let bed = Bed::new();
        let config = Config::read(&properties(&[("disk", "/a"), ("memory_mib", "256")])).unwrap();
        let place = Place::of(bed.node(), "vm").unwrap();
        for (accelerator, memory) in [("tcg", "262080K"), ("kvm", "262144K")] {
            let (machine, cpu) = ("pc-q35-7.2".into(), "max".into());
            let hardware = Hardware { machine, accelerator: accelerator.into(), cpu };
            let line = arguments(&config, bed.node(), "vm", &place, &hardware, Start::Cold).unwrap();
            let at = line.iter().position(|word| word == "-m").unwrap();
            assert_eq!(line[at + 1], memory);
        }
    }

    #[test]
    fn a_run_directory_that_is_too_long_for_sockets_is_refused() {
        let bed = Bed::changed(1, |node| node.run_dir = PathBuf::from("/").join("x".repeat(100)));
        assert!(matches!(Place::of(bed.node(), "vm"), Err(Failure::NotHere(_))));
    }
}
