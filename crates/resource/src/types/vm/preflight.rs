//! What is looked at before QEMU is started, and QEMU's own complaints in words that say what to do.

use super::command::Hardware;
use super::config::Config;
use super::disk::holders;
use super::firmware;
use crate::api::{Context, Failure};
use crate::types::run::Bounded;
use std::path::Path;

/// Can this machine be started on this node? Its images may be on storage that hangs; `hanging` sees to that.
pub(crate) fn check(
    config: &Config,
    hardware: &Hardware,
    context: &Context,
    hanging: &mut Bounded,
) -> Result<(), Failure> {
    for path in [&config.kernel, &config.initrd].into_iter().flatten() {
        if !path.is_file() {
            return Err(Failure::NotHere(format!("{} is not on this node", path.display())));
        }
    }
    if hardware.accelerator == "kvm" {
        let device = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        device.map_err(|error| {
            Failure::NotHere(format!(
                "this node has no KVM (/dev/kvm: {error}); switch virtualization on in its firmware, or give accelerator=tcg"
            ))
        })?;
    }
    memory(config.memory_mib, available_mib(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()))?;
    let (disks, files) = (config.disks.clone(), firmware::find(config)?);
    let allow_block_devices = config.allow_block_devices;
    hanging.long(context, "looking at the machine's images", move || {
        let look = || {
            disks.iter().try_for_each(|disk| disk.probe(allow_block_devices))?;
            files.map_or(Ok(()), |files| files.prepare())
        };
        Ok(look())
    })?
}

fn memory(wanted_mib: u64, available_mib: Option<u64>) -> Result<(), Failure> {
    match available_mib {
        Some(available) if available < wanted_mib => Err(Failure::NotHere(format!(
            "the virtual machine needs {wanted_mib} MiB of memory, and this node has {available} MiB left; give it less \
             (memory_mib), or move another machine away"
        ))),
        Some(_) | None => Ok(()),
    }
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10)
}

/// The end of a QEMU that did not start, by the last lines that it wrote.
pub(crate) fn explain(said: &[String], how: &str) -> Failure {
    let text = said.join(" | ");
    let has = |parts: &[&str]| parts.iter().any(|part| text.contains(part));
    if has(&["\"write\" lock", "Is another process using the image"]) {
        return in_use(&text);
    }
    if has(&["Cannot allocate memory", "cannot set up guest memory"]) {
        return Failure::NotHere(format!(
            "this node cannot give the virtual machine its memory; give it less (memory_mib) or move another away: {text}"
        ));
    }
    if has(&["O_DIRECT"]) {
        return Failure::NotHere(format!(
            "an image lies on a file system that cannot be used past the page cache (O_DIRECT); put it on a cluster volume: {text}"
        ));
    }
    if has(&["KVM", "kvm"]) {
        return Failure::NotHere(format!(
            "KVM does not work on this node; accelerator=tcg does without: {text}"
        ));
    }
    if has(&["unsupported machine type"]) {
        return Failure::NotHere(format!(
            "this node's QEMU is older than the one that the machine was started with: {text}"
        ));
    }
    if has(&["Could not open", "/dev/net/tun", "could not load", "Address already in use"]) {
        return Failure::NotHere(format!("QEMU did not start on this node: {text}"));
    }
    if has(&[
        "nvalid option",
        "nvalid parameter",
        "not a valid device",
        "unable to find CPU model",
        "not found",
    ]) {
        return Failure::Config(format!(
            "QEMU does not take the machine as it is configured (cpu, extra_args): {text}"
        ));
    }
    if text.is_empty() {
        return Failure::new(format!("QEMU did not start: {how}"));
    }
    Failure::new(format!("QEMU did not start: {how}; it said: {text}"))
}

/// An image that another process has locked. On another node it would be locked as well.
fn in_use(text: &str) -> Failure {
    let image = text.split_once("using the image [").and_then(|(_, rest)| rest.split_once(']'));
    let Some((image, _)) = image else {
        return Failure::new(format!("an image of the virtual machine is in use by another process: {text}"));
    };
    let here = holders(Path::new(image));
    let who = if here.is_empty() {
        "by a process on another node, or one that runs elsewhere; fuser on each node shows it".to_owned()
    } else {
        format!("on this node by {}", here.join(", "))
    };
    Failure::new(format!(
        "the image {image} is in use {who}; end what uses it, or give this machine an image of its own"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_not_there_is_said() {
        assert_eq!(available_mib("MemTotal: 9 kB\nMemAvailable:   2097152 kB\n"), Some(2048));
        assert_eq!(available_mib("nothing"), None);
        assert_eq!(memory(2048, Some(2048)), Ok(()));
        let error = memory(4096, Some(100)).unwrap_err();
        assert!(matches!(&error, Failure::NotHere(text) if text.contains("100 MiB left")), "{error}");
    }

    #[test]
    fn complaints_of_qemu_say_what_to_do() {
        let explain = |text: &str| super::explain(&[text.to_owned()], "it ended with exit status 1");
        let lock = explain(
            "-blockdev x: Failed to get \"write\" lock | Is another process using the image [/no/such]?",
        );
        assert!(matches!(&lock, Failure::Failed(text) if text.contains("/no/such is in use")), "{lock}");
        let memory = explain("cannot set up guest memory 'pc.ram': Cannot allocate memory");
        assert!(matches!(memory, Failure::NotHere(_)));
        assert!(matches!(explain("unable to find CPU model 'x'"), Failure::Config(_)));
        assert!(matches!(explain("unsupported machine type"), Failure::NotHere(_)));
        assert!(matches!(explain("something else"), Failure::Failed(_)));
    }
}
