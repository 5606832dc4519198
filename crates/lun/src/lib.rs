//! The shared LUN of a volume as one node sees it, and the few system calls that need `unsafe`.
//!
//! * [`Lun`]: a block device (or a file, in the lab) with whole-block direct I/O, bounds, flush and faults;
//! * [`AlignedBuf`], [`BufPool`]: memory that direct I/O accepts;
//! * [`label`], [`mod@probe`], [`in_use`]: what is on it and who uses it;
//! * [`mod@format`]: making a volume;
//! * [`witness`]: making and reading a disk witness;
//! * [`reservation`]: persistent reservations and fencing, on real storage and on the lab's file LUN;
//! * [`sys`]: file handles, FIEMAP, shutdown, page-cache counts; raw system calls behind safe functions.
//!
//! Invariants: nothing here reads or writes a partial block, nothing reaches behind the capacity that the LUN
//! had when it was opened, and no error is retried: whoever asked decides between redirecting the I/O (the path
//! failed) and stopping (the node was fenced).

mod buf;
mod device;
mod error;
mod fault;
pub mod format;
mod geometry;
pub mod in_use;
pub mod label;
pub mod probe;
pub mod reservation;
mod ring;
pub mod sys;
#[cfg(test)]
mod testutil;
pub mod witness;

pub use buf::{ALIGN_BYTES, AlignedBuf, BufPool, PooledBuf};
pub use device::{Lun, LunOptions};
pub use error::{IoOp, LunError};
pub use format::{CreateError, CreateRequest, create_volume};
pub use in_use::is_mounted;
pub use label::{LabelIoError, bump_epoch, read_label, write_label};
pub use probe::{Probe, probe};
pub use ring::{Refused, Ring, RingIo};
