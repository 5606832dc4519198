//! Properties of a virtual machine, read.

use super::disk::Disk;
use super::nic::Nic;
use crate::types::settings::{Properties, flag, number, path, text};
use std::path::PathBuf;
use std::time::Duration;

/// Disks and cards of one machine.
const NUMBERED_MAX: usize = 16;
/// Default of `migration_ports`: QEMU's and libvirt's usual range.
const PORTS: (u16, u16) = (49_152, 49_215);

/// How the guest's processors are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// KVM where the node has it.
    Auto,
    Kvm,
    Tcg,
}

/// What starts the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Firmware {
    Bios,
    /// OVMF from where the distribution has it.
    Uefi,
    /// This image.
    Image(PathBuf),
}

/// What the guest's first serial port is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Serial {
    Socket,
    File(PathBuf),
    None,
}

/// How going offline ends the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OfflineAction {
    Shutdown,
    Save,
    Kill,
}

/// A virtual machine as its properties have it.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) disks: Vec<Disk>,
    pub(crate) allow_block_devices: bool,
    pub(crate) memory_mib: u64,
    pub(crate) cpus: u64,
    pub(crate) machine: String,
    pub(crate) accelerator: Accelerator,
    pub(crate) cpu: Option<String>,
    pub(crate) firmware: Firmware,
    pub(crate) nvram: Option<PathBuf>,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cmdline: Option<String>,
    pub(crate) nics: Vec<Nic>,
    pub(crate) serial: Serial,
    pub(crate) vnc: Option<String>,
    pub(crate) guest_agent: bool,
    pub(crate) agent_timeout: Duration,
    pub(crate) shutdown_timeout: Duration,
    pub(crate) offline_action: OfflineAction,
    pub(crate) stays_shut_down: bool,
    pub(crate) save_dir: Option<PathBuf>,
    pub(crate) bandwidth_mib: u64,
    pub(crate) downtime_ms: u64,
    pub(crate) ports: (u16, u16),
    pub(crate) qemu: String,
    pub(crate) extra_args: Vec<String>,
}

impl Config {
    /// Reads properties.
    ///
    /// # Errors
    /// What is wrong, in words that name the property.
    pub(crate) fn read(properties: &Properties) -> Result<Config, String> {
        let mut disks = Vec::new();
        for (name, value) in numbered(properties, "disk")? {
            disks.push(Disk::parse(name, value)?);
        }
        let mut nics = Vec::new();
        for (name, value) in numbered(properties, "nic")? {
            nics.extend(Nic::parse(name, value)?);
        }
        let config = Config {
            disks,
            allow_block_devices: flag(properties, "allow_block_devices", false),
            nics,
            memory_mib: number(properties, "memory_mib", 1024),
            cpus: number(properties, "cpus", 1),
            machine: text(properties, "machine").unwrap_or("q35").to_owned(),
            accelerator: match text(properties, "accelerator") {
                Some("kvm") => Accelerator::Kvm,
                Some("tcg") => Accelerator::Tcg,
                _ => Accelerator::Auto,
            },
            cpu: text(properties, "cpu").map(str::to_owned),
            firmware: firmware(properties)?,
            nvram: path(properties, "nvram"),
            kernel: path(properties, "kernel"),
            initrd: path(properties, "initrd"),
            cmdline: text(properties, "cmdline").map(str::to_owned),
            serial: serial(properties)?,
            vnc: text(properties, "vnc").filter(|value| *value != "none").map(str::to_owned),
            guest_agent: flag(properties, "guest_agent", false),
            agent_timeout: Duration::from_secs(number(properties, "agent_timeout_s", 60)),
            shutdown_timeout: Duration::from_secs(number(properties, "shutdown_timeout_s", 120)),
            offline_action: match text(properties, "offline_action") {
                Some("save") => OfflineAction::Save,
                Some("kill") => OfflineAction::Kill,
                _ => OfflineAction::Shutdown,
            },
            stays_shut_down: text(properties, "on_guest_shutdown") == Some("stay"),
            save_dir: path(properties, "save_dir"),
            bandwidth_mib: number(properties, "migration_bandwidth_mib", 0),
            downtime_ms: number(properties, "migration_downtime_ms", 300),
            ports: ports(properties)?,
            qemu: text(properties, "qemu").unwrap_or("qemu-system-x86_64").to_owned(),
            extra_args: split_arguments(text(properties, "extra_args").unwrap_or_default())?,
        };
        config.fits_together()?;
        Ok(config)
    }

    fn fits_together(&self) -> Result<(), String> {
        if self.kernel.is_none() && (self.initrd.is_some() || self.cmdline.is_some()) {
            return Err(
                "initrd and cmdline are for a kernel that is started directly: give kernel too".into()
            );
        }
        if self.kernel.is_none() && self.disks.is_empty() {
            return Err("a virtual machine needs a disk or a kernel to start from".into());
        }
        for (index, disk) in self.disks.iter().enumerate() {
            if self.disks.iter().skip(index + 1).any(|other| other.path == disk.path) {
                return Err(format!("{} is named twice as a disk", disk.path.display()));
            }
        }
        if self.offline_action == OfflineAction::Save && self.save_dir.is_none() && self.disks.is_empty() {
            return Err("offline_action=save needs save_dir, since there is no disk to save beside".into());
        }
        if self.firmware != Firmware::Bios && self.nvram.is_none() && self.disks.is_empty() {
            return Err("firmware needs nvram, since there is no disk to keep the variables beside".into());
        }
        if self.vnc.as_deref().is_some_and(|vnc| !vnc.contains(':')) {
            return Err("vnc takes ADDRESS:DISPLAY, such as 127.0.0.1:1, or unix:PATH".into());
        }
        Ok(())
    }
}

/// Values of a numbered property in the order of their numbers; the one without a number comes first.
fn numbered<'a>(properties: &'a Properties, prefix: &str) -> Result<Vec<(&'a str, &'a str)>, String> {
    let mut found: Vec<(u64, &str, &str)> = properties
        .iter()
        .filter_map(|(name, value)| {
            let number = name.strip_prefix(prefix)?;
            let number = if number.is_empty() { 0 } else { number.parse().ok()? };
            Some((number, name.as_str(), value.as_str()))
        })
        .collect();
    found.sort_unstable();
    if found.len() > NUMBERED_MAX {
        return Err(format!("{prefix} is there {} times; {NUMBERED_MAX} are possible", found.len()));
    }
    Ok(found.into_iter().map(|(_, name, value)| (name, value)).collect())
}

fn firmware(properties: &Properties) -> Result<Firmware, String> {
    Ok(match text(properties, "firmware") {
        None | Some("bios") => Firmware::Bios,
        Some("uefi") => Firmware::Uefi,
        Some(path) if path.starts_with('/') => Firmware::Image(path.into()),
        Some(other) => {
            return Err(format!("firmware takes bios, uefi or the path of an image, not \"{other}\""));
        }
    })
}

fn serial(properties: &Properties) -> Result<Serial, String> {
    Ok(match text(properties, "serial") {
        None | Some("socket") => Serial::Socket,
        Some("none") => Serial::None,
        Some(other) => match other.strip_prefix("file:") {
            Some(path) if path.starts_with('/') => Serial::File(path.into()),
            _ => return Err(format!("serial takes socket, none or file:/PATH, not \"{other}\"")),
        },
    })
}

fn ports(properties: &Properties) -> Result<(u16, u16), String> {
    let Some(value) = text(properties, "migration_ports") else { return Ok(PORTS) };
    value
        .split_once('-')
        .and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)))
        .filter(|(first, last)| 0 < *first && first <= last)
        .ok_or_else(|| format!("migration_ports takes FIRST-LAST, such as 49152-49215, not \"{value}\""))
}

/// Words apart by blanks; quotes, single or double, keep blanks.
fn split_arguments(text: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for char in text.chars() {
        match (quote, char) {
            (Some(open), _) if char == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(char);
                word.get_or_insert_default();
            }
            (None, _) if char.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(char),
        }
    }
    words.extend(word);
    if quote.is_some() { Err("extra_args has a quote that is not closed".into()) } else { Ok(words) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Config, String> {
        Config::read(&crate::types::testbed::properties(pairs))
    }

    #[test]
    fn defaults_are_those_that_are_told() {
        let config = read(&[("disk", "/a")]).unwrap();
        assert_eq!((config.memory_mib, config.cpus, config.downtime_ms), (1024, 1, 300));
        assert_eq!((config.ports, config.machine.as_str()), (PORTS, "q35"));
        assert_eq!(
            (config.shutdown_timeout, config.offline_action),
            (Duration::from_secs(120), OfflineAction::Shutdown)
        );
    }

    #[test]
    fn disks_come_in_the_order_of_their_numbers() {
        let config = read(&[("disk10", "/k"), ("disk2", "/c"), ("disk", "/a"), ("nic", "none")]).unwrap();
        let paths: Vec<_> = config.disks.iter().map(|disk| disk.path.to_str().unwrap()).collect();
        assert_eq!((paths, config.nics.len()), (vec!["/a", "/c", "/k"], 0));
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        for bad in [
            &[("memory_mib", "64")][..],
            &[("disk", "/a"), ("disk1", "/a")],
            &[("disk", "/a"), ("initrd", "/i")],
            &[("kernel", "/k"), ("offline_action", "save")],
            &[("disk", "/a"), ("firmware", "coreboot")],
            &[("disk", "/a"), ("serial", "file:x")],
            &[("disk", "/a"), ("migration_ports", "5-4")],
            &[("disk", "/a"), ("vnc", "1")],
            &[("disk", "/a"), ("extra_args", "-device 'x")],
        ] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn arguments_keep_what_is_quoted() {
        assert_eq!(split_arguments(" -a 'b c'\"d\"  -e '' ").unwrap(), ["-a", "b cd", "-e", ""]);
    }
}
