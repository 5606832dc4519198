//! Properties of a virtual machine, described.

use crate::api::{Form, Property, TypeInfo};
use crate::types::settings::{optional, words};
use std::time::Duration;

/// What the type says of itself.
pub(crate) fn info() -> TypeInfo {
    let verbs = super::control::VERBS;
    let mut properties = hardware();
    properties.extend(devices());
    properties.extend(behaviour());
    TypeInfo {
        name: "VirtualMachine".into(),
        help: "A virtual machine (QEMU) that fails over and moves while it runs".into(),
        properties,
        verbs: verbs.iter().map(|(verb, help)| ((*verb).to_owned(), (*help).to_owned())).collect(),
        looks_alive: Duration::from_secs(5),
        is_alive: Duration::from_secs(5),
        shared: false,
    }
}

fn several(name: &str, default: Option<&str>, help: &str) -> Property {
    Property { numbered: true, ..optional(name, Form::Text, default, help) }
}

fn hardware() -> Vec<Property> {
    let number = |min, max| Form::Number { min, max };
    vec![
        several(
            "disk",
            None,
            "disk, disk1, ..: PATH[,format=raw|qcow2][,bus=virtio|scsi|sata][,readonly=on]; PATH is an image (on a cluster \
             volume, where its lock counts on all nodes) or a block device (see allow_block_devices), a comma in it is written twice; read-only on sata it is a CD; format by default qcow2 for a name that ends so, else raw",
        ),
        optional(
            "allow_block_devices",
            Form::Bool,
            Some("false"),
            "lets a disk that can be written be a block device: QEMU's locks on it count on one node only, so nothing but the \
             cluster keeps two machines, or a node that was frozen and goes on, from writing it at the same time",
        ),
        optional("memory_mib", number(16, 16 << 20), Some("1024"), "memory, in MiB; 64 KiB less without KVM"),
        optional("cpus", number(1, 512), Some("1"), "virtual processors"),
        optional(
            "machine",
            words(&["q35", "pc"]),
            Some("q35"),
            "the chipset; its version is that of the QEMU that starts it",
        ),
        optional(
            "accelerator",
            words(&["auto", "kvm", "tcg"]),
            Some("auto"),
            "auto: KVM where the node has it, else emulation (tcg); a machine that moves keeps what it has",
        ),
        optional(
            "cpu",
            Form::Text,
            Some("max (tcg), Westmere (kvm)"),
            "processor model; the default for KVM is one that every x86-64 server of the last decade has, so that the machine can \
             move between unlike nodes; \"host\" gives all the node has and moves only between like ones",
        ),
    ]
}

fn devices() -> Vec<Property> {
    vec![
        optional(
            "firmware",
            Form::Text,
            Some("bios"),
            "bios, uefi (OVMF of the distribution) or the path of a UEFI image",
        ),
        optional(
            "nvram",
            Form::Path,
            Some("<disk>.nvram"),
            "where UEFI keeps its variables; made at the first start",
        ),
        optional("kernel", Form::Path, None, "a kernel to start directly, without a boot loader"),
        optional("initrd", Form::Path, None, "its initial RAM disk"),
        optional("cmdline", Form::Text, None, "its command line"),
        several(
            "nic",
            Some("none"),
            "nic, nic1, ..: tap,bridge=NAME[,mac=..], user[,mac=..] (out only) or none; mac is made from the names of cluster \
             and machine by default, so it is always the same",
        ),
        optional(
            "serial",
            Form::Text,
            Some("socket"),
            "first serial port: socket (in the run directory), file:/PATH or none",
        ),
        optional(
            "vnc",
            Form::Text,
            Some("none"),
            "screen by VNC, without a password: ADDRESS:DISPLAY or unix:PATH; gives the guest a VGA card",
        ),
        optional(
            "guest_agent",
            Form::Bool,
            Some("false"),
            "a channel for QEMU's guest agent, and its heartbeat watched",
        ),
        optional("qemu", Form::Text, Some("qemu-system-x86_64"), "QEMU's program, by name or path"),
        optional("extra_args", Form::Text, None, "more arguments for QEMU, as given; quotes keep blanks"),
    ]
}

fn behaviour() -> Vec<Property> {
    let number = |min, max| Form::Number { min, max };
    vec![
        optional(
            "agent_timeout_s",
            number(5, 86_400),
            Some("60"),
            "silence of a guest agent that has answered before, after which the machine has failed, in seconds",
        ),
        optional(
            "shutdown_timeout_s",
            number(0, 86_400),
            Some("120"),
            "how long the guest may take to shut down before it is killed, in seconds",
        ),
        optional(
            "offline_action",
            words(&["shutdown", "save", "kill"]),
            Some("shutdown"),
            "how going offline ends the guest: by its power button, saved to a file to go on from there, or at once",
        ),
        optional(
            "on_guest_shutdown",
            words(&["restart", "stay"]),
            Some("restart"),
            "a guest that shuts itself down: restart counts it as failed, so that it is started again; stay leaves it off, with the \
             resource online until it is taken offline",
        ),
        optional(
            "save_dir",
            Form::Path,
            Some("beside the first disk"),
            "directory of the saved state; on storage that all nodes have",
        ),
        optional(
            "migration_bandwidth_mib",
            number(0, 1 << 20),
            Some("0"),
            "most that a live migration may send, in MiB/s; 0 is no limit",
        ),
        optional(
            "migration_downtime_ms",
            number(1, 60_000),
            Some("300"),
            "pause of the guest that a live migration aims at, in ms",
        ),
        optional(
            "migration_ports",
            Form::Text,
            Some("49152-49215"),
            "TCP ports on which a migration is awaited",
        ),
    ]
}
