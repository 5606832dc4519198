//! `VirtualMachine`: a QEMU that starts, ends, saves, moves and is watched by its monitor (QMP).
//!
//! | module | is |
//! | --- | --- |
//! | `properties`, `config`, `disk`, `nic`, `firmware` | properties |
//! | `command`, `preflight`, `process`, `monitor` | QEMU's command line, what is looked at before, its process, its monitor |
//! | `watch`, `agent` | what is heard of it: events, its end, the guest's agent |
//! | `machine`, `control` | entry points and verbs |
//! | `transfer`, `save`, `migrate` | sending the guest to a file or another node |
//!
//! # What is promised
//!
//! * **QEMU outlives the resource host.** Number and start time of its process are saved before it is waited for; a next host
//!   finds it, takes the monitor over, and the guest notices nothing. One that was started by a host that died before it
//!   could save is found by its command line and ended before the next start.
//! * **Nothing runs before all is well.** QEMU starts stopped; its guest runs once the images are open and locked, cards are on
//!   their bridges and the monitor answers. What goes wrong before is an error of `online` with QEMU's last words.
//! * **Images** are used past the page cache, with QEMU's locks on (byte-range locks, which csvfs has between all nodes):
//!   two QEMUs never write one image, whatever the cluster believes. That is not so for a block device, where the lock is on the
//!   node's own file in /dev: one that can be written is refused unless `allow_block_devices` accepts that only the cluster keeps
//!   two nodes from writing it. An image's format is never guessed.
//! * **An end of QEMU, or a panic of the guest, is reported at once**, not at the next look.
//! * **A guest that shuts itself down** has failed, with the text "the guest shut itself down", so that the restart policy starts
//!   it again; with `on_guest_shutdown=stay` it stays off, the resource being online, until `offline` or the verb `start`. A
//!   guest that reboots goes on.
//! * **A paused guest is online.** So is one stopped at a failed request (`werror=stop`): it is told when storage is lost,
//!   the request is tried again at every thorough look at which its images answer, and it is told when the guest goes on.
//! * **Saved states** are used once; see `save`.
//!
//! # Live migration
//!
//! Both ends have the resource open. Every step is a verb of one end; the group's owner changes between 3 and 4.
//!
//! ```text
//!    source (owner)                              target
//! 1  status -> hardware
//! 2                                              incoming {listen, hardware} -> uri         phase incoming
//! 3  migrate {uri, tls_hostname: target's name}
//!      memory goes over while the guest runs; then it stops, its images are given up, the rest goes over,
//!      and the target says that it has everything -> downtime_ms, was_paused                 phase migrated
//!    -- the owner is changed in the database --
//! 4                                              arrived {paused: was_paused}  (or online)   phase running
//! 5  migrated  (or offline, terminate)
//! ```
//!
//! The guest stands still from the end of 3 to 4: the change of the owner is part of the downtime. At every moment at most one end
//! can run the guest: the target does nothing before 4, when it takes the images' locks, which the source gave up in 3.
//! What happens when somebody dies:
//!
//! | who dies | during 2, 3 | between 3 and 4 | after 4 |
//! | --- | --- | --- | --- |
//! | target's QEMU or node | `migrate` fails; the guest runs on at the source, which stays owner | `arrived` fails; the owner is not changed or changed back; `take-back` (or `online`) at the source | an ordinary failure of the new owner |
//! | source's QEMU or node | `arrived` fails, or `online` ends what waits and starts from the disks | nothing is lost: the target has everything; `arrived` | nothing |
//! | a resource host | `adopt` of its next finds the source's QEMU; a migration under way goes on in QEMU: `status` tells `postmigrate` if it is over, and `qmp migrate_cancel` ends it; the target's `adopt` fails with "has not arrived", and `arrived`, `online` or `cancel-incoming` work | same | `adopt` |
//! | the leader, csvd | the next one asks both ends for `status`. `running` at the source: `cancel-incoming` at the target, try again. Phase `migrated` at the source and `paused` (not `inmigrate`) at the target: go on with 4. No target: `take-back` at the source | same | `migrated` at the source |
//!
//! `online` at either end does the right thing by itself: at a target that has everything it lets the guest go on, at a
//! target that has not it ends what waits and starts from the disks, at a source whose guest was sent away it takes it
//! back. Where that would be wrong, since the other end runs the guest, the images' locks refuse it. A guest that was sent away and
//! goes on nowhere counts as failed at the source a minute after it was sent, or after the last `hold`.
//!
//! Both ends use TLS with the nodes' own certificates; each end's must be of the cluster's authority, the target's must
//! have the name `tls_hostname`. `hardware` carries chipset version, accelerator and processor model, so that the target makes the
//! same machine, whatever its own QEMU or its `auto` would choose.

mod agent;
mod command;
mod config;
mod control;
mod disk;
mod firmware;
mod machine;
mod migrate;
mod monitor;
mod nic;
mod preflight;
mod process;
mod properties;
mod running;
mod save;
mod stable;
mod transfer;
mod watch;

use crate::api::{Context, Failure, Resource, ResourceType, Spec, TypeInfo};
use config::Config;
use std::collections::BTreeMap;

/// The type.
#[derive(Debug, Clone, Copy, Default)]
pub struct VirtualMachine;

impl ResourceType for VirtualMachine {
    fn info(&self) -> TypeInfo {
        properties::info()
    }

    fn check(&self, properties: &BTreeMap<String, String>) -> Result<(), String> {
        Config::read(properties).map(drop)
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        let config = Config::read(&spec.properties).map_err(Failure::Config)?;
        Ok(Box::new(machine::Machine::open(spec, context, config)?))
    }
}
