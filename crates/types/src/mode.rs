//! I/O modes of a node on a volume and the reasons for them (design section 7).

use serde::{Deserialize, Serialize};
use std::fmt;

/// The way file data goes, without the reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModeKind {
    /// Node to LUN.
    Direct,
    /// Node to SMB to coordinator to LUN, by LUN offset.
    BlockRedirected,
    /// Node to SMB to the coordinator's file system, by file offset.
    FsRedirected,
    /// Requests wait.
    Paused,
    /// Requests fail.
    Unavailable,
}

/// Why a node is not in direct mode.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Direct mode needs no reason.
    None,
    /// The node never had a path to the LUN.
    NoDiskConnectivity,
    /// The node had a path and lost it; the text is the device error.
    PathFailed(String),
    /// An administrator asked for it.
    UserRequest,
    /// The file cannot be lent block by block (compressed, encrypted, inline, shared extents).
    IncompatibleFile,
    /// The volume is in maintenance.
    Maintenance,
    /// The coordinator cannot be reached.
    CoordinatorUnreachable(String),
    /// The node's lease ran out or it was fenced.
    Fenced(String),
    /// The file system or the device reported an error that was latched.
    DeviceError(String),
}

/// Mode and reason of one node on one volume.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mode {
    /// The way.
    pub kind: ModeKind,
    /// Why; `Reason::None` in direct mode.
    pub reason: Reason,
}

impl Mode {
    /// Direct mode.
    pub const DIRECT: Mode = Mode { kind: ModeKind::Direct, reason: Reason::None };
}

impl fmt::Display for ModeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ModeKind::Direct => "direct",
            ModeKind::BlockRedirected => "block-redirected",
            ModeKind::FsRedirected => "fs-redirected",
            ModeKind::Paused => "paused",
            ModeKind::Unavailable => "unavailable",
        })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::None => Ok(()),
            Reason::NoDiskConnectivity => f.write_str("NoDiskConnectivity"),
            Reason::PathFailed(why) => write!(f, "PathFailed: {why}"),
            Reason::UserRequest => f.write_str("UserRequest"),
            Reason::IncompatibleFile => f.write_str("IncompatibleFile"),
            Reason::Maintenance => f.write_str("Maintenance"),
            Reason::CoordinatorUnreachable(why) => write!(f, "CoordinatorUnreachable: {why}"),
            Reason::Fenced(why) => write!(f, "Fenced: {why}"),
            Reason::DeviceError(why) => write!(f, "DeviceError: {why}"),
        }
    }
}
