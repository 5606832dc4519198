//! Tests on real file systems: ext4 and XFS on loop devices. They need root and say so when they cannot run.

mod data;
mod journal;
mod mount;
mod namespace;
mod ownership;
mod rig;
mod space;

use rig::{Rig, cred, id, on_each_fs};
