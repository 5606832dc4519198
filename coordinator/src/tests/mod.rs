//! The coordinator against nodes in this process, on real file systems on loop devices.

mod grace;
mod grants;
mod handover;
mod names;
mod node;
pub(crate) mod rig;
mod sessions;
mod stress;
mod torture;
