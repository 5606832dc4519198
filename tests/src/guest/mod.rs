//! Guests: a rig of virtual machines under QEMU with a real kernel SCSI disk between them, for what one kernel cannot
//! show: reservations by SCSI commands, a power cut, a frozen node that wakes up, a target that restarts.
//!
//! Three guests are nodes, one is the storage: the kernel's iSCSI target on a file. QEMU's own initiator brings the LUN
//! into each node (`scsi-block` passes every command through), so each has `/dev/sda` by an I_T nexus of its own.
//! Everything is emulated; no guest needs KVM. The guests' root is this machine's, read-only, with a layer in memory
//! above it; `/etc/csv` and `/var/lib/csv` lie on a disk of the guest's own and survive a power cut.
//!
//! What a rig makes (processes, a network namespace, a directory) is gone when its handle is dropped. If the test itself
//! is killed, the kernel ends the QEMUs, and the next rig removes the rest.
//!
//! Environment: `CSV_TEST_KEEP=1` keeps the directory with the guests' logs after a failure.

pub mod channel;
pub mod net;
pub mod rig;
pub mod serve;
pub mod stamps;
pub mod storage;
pub mod vm;

pub use rig::{Rig, Start};
pub use vm::Vm;
