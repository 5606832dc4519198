//! The admin protocol between csvctl, csvd and csvfs on one node: one JSON object per line over a Unix stream
//! socket, one answer line per request. `csvd` listens on `<run_dir>/csvd.sock` and passes volume requests on
//! to the volume's csvfs, which listens on `<run_dir>/<volume>.sock`.

use crate::config::NodeConfig;
use crate::ids::{Epoch, NodeId};
use crate::mode::Mode;
use serde::{Deserialize, Serialize};

/// Longest request, and longest answer of csvfs, in bytes.
pub const LINE_BYTES_MAX: usize = 4 << 20;
/// Longest answer of csvd, in bytes: the whole database, which is as long as a snapshot may be.
pub const ANSWER_BYTES_MAX: usize = 256 << 20;

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// State of a volume (or of all) on every node.
    State {
        /// Only this volume.
        volume: Option<String>,
    },
    /// File-system redirection on request, for the whole volume.
    Redirect {
        /// Volume name.
        volume: String,
        /// On or off.
        on: bool,
        /// Only this node; all nodes when absent.
        node: Option<String>,
    },
    /// Maintenance: data operations wait, metadata stays readable.
    Maintenance {
        /// Volume name.
        volume: String,
        /// On or off.
        on: bool,
    },
    /// Inject a fault into this node's path to the LUN (lab and tests).
    Fault {
        /// Volume name.
        volume: String,
        /// What to do to the path.
        fault: PathFault,
    },
    /// As a power cut: shut the file system down without flushing its log, then end at once.
    Crash {
        /// Volume name.
        volume: String,
    },
    /// Where a file lies on the LUN (tests, support).
    Map {
        /// Volume name.
        volume: String,
        /// Path below the volume's mount point.
        path: String,
    },
    /// Recent events of this node, oldest first.
    Events {
        /// Only events with a greater number.
        after: u64,
    },
    /// Who coordinates the volume: an order of csvd to csvfs.
    Role {
        /// Volume name.
        volume: String,
        /// What to be.
        order: RoleOrder,
    },
    /// What csvfs is for the volume.
    RoleStatus {
        /// Volume name.
        volume: String,
    },
    /// A node does not give back what it was lent: csvfs asks csvd to have it fenced. Answered when the node can write the
    /// LUN no more, or with an error.
    Fence {
        /// Volume name.
        volume: String,
        /// Epoch of the coordinator that asks.
        epoch: Epoch,
        /// Who.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// About the cluster; csvd's own.
    Cluster {
        /// What.
        what: ClusterRequest,
    },
    /// Clean stop.
    Stop,
}

/// A request about the cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "cluster", rename_all = "kebab-case")]
pub enum ClusterRequest {
    /// Make a cluster with this node as its first.
    Create {
        /// Name, 1 to 15 characters.
        name: String,
        /// Identity; a random one when absent.
        id: Option<uuid::Uuid>,
        /// Settings that differ from their defaults.
        settings: Vec<(String, String)>,
    },
    /// Become a node of the token's cluster.
    Join {
        /// From `csvctl cluster token`.
        token: String,
    },
    /// Leave the cluster for good.
    Leave,
    /// End a cluster of one node.
    Destroy,
    /// Put a damaged database aside and join again.
    Rejoin {
        /// From `csvctl cluster token`.
        token: String,
        /// Also when this node's database is in order: what it has is given up.
        #[serde(default)]
        discard: bool,
    },
    /// Make a token with which machines join.
    Token {
        /// How long it is valid, in seconds.
        valid_s: u64,
        /// How many machines may use it.
        uses: u32,
    },
    /// How the cluster is.
    Status,
    /// The database, without secrets.
    Db,
    /// A command for the database.
    Command {
        /// As csv-cluster writes it.
        command: serde_json::Value,
    },
    /// Add the volume whose label this node finds under that name.
    AddVolume {
        /// Its name.
        name: String,
        /// Names of the nodes that should own it, best first.
        preferred: Vec<String>,
    },
    /// Make a disk witness of a device of this node.
    MakeDiskWitness {
        /// The device.
        device: std::path::PathBuf,
        /// Name for people, and key of its device in a node's configuration.
        name: String,
        /// Overwrite what is on it.
        force: bool,
    },
    /// Make a witness node known, which then joins with the token that is answered.
    SetWitnessNode {
        /// Its name.
        name: String,
        /// Its address.
        addr: std::net::IpAddr,
        /// For how long the token is valid, in seconds.
        valid_s: u64,
    },
    /// Start this node alone, without quorum. What the others may have decided is given up.
    ForceStart {
        /// The cluster's name, as a sign that it is meant.
        name: String,
    },
    /// Write a copy of the whole database, secrets included.
    Backup {
        /// File to write.
        path: std::path::PathBuf,
    },
    /// Make a cluster of this node alone from a backup.
    Restore {
        /// File to read.
        path: std::path::PathBuf,
        /// The administrator knows that every other node of that cluster is down and stays so.
        others_are_down: bool,
    },
    /// What every node sees of the others and of its LUNs.
    Check,
    /// Resource types with their properties: all that come with csvfs and those of the cluster's libraries, or one.
    ResourceTypes {
        /// Name, such as `VirtualMachine`, `systemd:nginx` or `ocf:heartbeat:Dummy`.
        kind: Option<String>,
    },
    /// What the manager of groups has to say beside the database: what starts wait for.
    GroupsWaiting,
    /// Which nodes could have a group, and which rule stops the others.
    Candidates {
        /// The group.
        group: String,
    },
    /// What balancing would do now.
    BalanceDryRun,
    /// The entry point `control` of a resource, on the node that has it.
    Control {
        /// The resource.
        resource: String,
        /// What to do; the type says which verbs there are.
        verb: String,
        /// With what.
        arguments: serde_json::Value,
    },
    /// How far a group's move has come, by the word of its owner.
    MoveProgress {
        /// The group.
        group: String,
    },
}

/// What csvfs is to be for its volume. Orders may be repeated: one that is carried out already is answered with `Ok`.
/// An order of an earlier epoch than the last one is refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "kebab-case")]
pub enum RoleOrder {
    /// Coordinate the volume. The former coordinator is known to be unable to write. Answered when others can connect.
    Take(TakeOrder),
    /// Hand the volume over: finish, write, unmount. Nothing is lost to anybody. Answered when it is unmounted.
    HandOver {
        /// Epoch of the ownership that ends.
        epoch: Epoch,
    },
    /// Another node coordinates the volume. A coordinator of an earlier epoch stops at once, without writing.
    Follow {
        /// Epoch of the coordinator.
        epoch: Epoch,
        /// The coordinator.
        owner: NodeConfig,
        /// All nodes of the cluster.
        nodes: Vec<NodeConfig>,
        /// This node's key on the LUN, if it has one.
        #[serde(default)]
        key: Option<u64>,
        /// The LUN could not be registered on: data goes through the coordinator until another order says otherwise.
        #[serde(default)]
        unregistered: bool,
    },
    /// These nodes can write the LUN no more (coordinator).
    Gone {
        /// Epoch of the coordinator.
        epoch: Epoch,
        /// Who.
        nodes: Vec<NodeId>,
    },
    /// Nodes have joined or left the cluster.
    Nodes {
        /// All of them now.
        nodes: Vec<NodeConfig>,
    },
    /// This node may be presumed dead: no direct I/O from now on, and a coordinator stops at once, without writing. Ends with
    /// `Take` or `Follow`.
    Suspend {
        /// Why.
        reason: String,
    },
}

/// See [`RoleOrder::Take`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TakeOrder {
    /// Number of the ownership: greater than any before.
    pub epoch: Epoch,
    /// This node's key on the LUN, if there are reservations.
    #[serde(default)]
    pub key: Option<u64>,
    /// All nodes of the cluster.
    pub nodes: Vec<NodeConfig>,
    /// Nodes that can write the LUN no more: nobody waits for what they held.
    pub gone: Vec<NodeId>,
    /// Everybody who is not `nodes` less `gone` is known to be fenced, so the guards against another node that has the
    /// file system mounted need not wait. Else they do.
    pub certain: bool,
    /// Orders that stand.
    #[serde(default)]
    pub redirect_all: bool,
    /// Nodes for which file-system redirection is on.
    #[serde(default)]
    pub redirect_nodes: Vec<NodeId>,
    /// Data operations wait.
    #[serde(default)]
    pub maintenance: bool,
}

/// A fault of this node's path to the LUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathFault {
    /// No fault.
    Heal,
    /// Every I/O fails.
    Fail,
    /// Every I/O takes this much longer, in milliseconds.
    DelayMs(u64),
    /// This many more I/Os succeed, then every I/O fails.
    ErrorAfter(u64),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Ok,
    /// Rows of `csvctl volume state`.
    State {
        /// One per node and volume.
        rows: Vec<VolumeState>,
    },
    /// Extents of a file.
    Map {
        /// In file order; holes and unwritten ranges are missing.
        extents: Vec<MapExtent>,
    },
    /// Events.
    Events {
        /// Oldest first.
        events: Vec<Event>,
    },
    /// What csvfs is for a volume.
    Role {
        /// The state.
        status: RoleStatus,
    },
    /// Answer to a request about the cluster.
    Cluster {
        /// The answer; see `csvd::status`.
        data: serde_json::Value,
    },
    /// Refused; the text says why and what to do next.
    Error {
        /// For people.
        message: String,
    },
}

/// What csvfs is for its volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoleStatus {
    /// Its role.
    pub role: RoleKind,
    /// No direct I/O by order of csvd, and none under way.
    pub suspended: bool,
    /// The LUN has refused this node (reservation conflict) since it was suspended last.
    pub refused_by_lun: bool,
    /// It does without the LUN, since csvd could not register on it.
    #[serde(default)]
    pub unregistered: bool,
    /// How data goes.
    pub mode: Mode,
}

/// See [`RoleStatus`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum RoleKind {
    /// Not yet, or no more, anything.
    Nobody,
    /// The coordinator.
    Owner {
        /// Epoch of the ownership.
        epoch: Epoch,
    },
    /// A data server.
    Follower {
        /// Epoch of the ownership.
        epoch: Epoch,
        /// The coordinator.
        owner: NodeId,
    },
}

/// A piece of a file on the LUN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapExtent {
    /// Byte offset in the file.
    pub file_offset: u64,
    /// Byte offset on the LUN.
    pub lun_offset: u64,
    /// Bytes.
    pub len: u64,
}

/// State of one volume on one node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeState {
    /// Node name.
    pub node: String,
    /// Volume name.
    pub volume: String,
    /// `coordinator` or `data-server`.
    pub role: String,
    /// How data goes, and why.
    #[serde(flatten)]
    pub mode: Mode,
    /// Since when, seconds since the Unix epoch.
    pub since_unix_s: u64,
    /// Epoch of the ownership that the node knows.
    pub epoch: Epoch,
    /// I/O counts.
    pub io: IoCounts,
}

/// I/O counts of one node on one volume since csvfs started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoCounts {
    /// Reads and writes that went straight to the LUN.
    pub direct_reads: u64,
    /// See `direct_reads`.
    pub direct_writes: u64,
    /// Bytes of `direct_reads`.
    pub direct_read_bytes: u64,
    /// Bytes of `direct_writes`.
    pub direct_write_bytes: u64,
    /// By LUN offset through the coordinator.
    pub block_reads: u64,
    /// See `block_reads`.
    pub block_writes: u64,
    /// By file offset over SMB through the coordinator's file system.
    pub fs_reads: u64,
    /// See `fs_reads`.
    pub fs_writes: u64,
    /// Small reads and writes carried by the control protocol.
    pub control_reads: u64,
    /// See `control_reads`.
    pub control_writes: u64,
    /// Bytes sent and received by the control protocol.
    pub control_bytes: u64,
    /// Bytes of data sent and received over SMB.
    pub smb_bytes: u64,
    /// Control-protocol calls.
    pub control_calls: u64,
    /// Layouts granted to this node.
    pub layouts_granted: u64,
    /// Layouts recalled from this node.
    pub layouts_recalled: u64,
    /// Files open on this node.
    pub open_files: u64,
}

/// Something that a node decided or saw in the background.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Number of the event on its node, from 1.
    pub seq: u64,
    /// Milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// Where.
    pub node: NodeId,
    /// Volume name, or empty.
    pub volume: String,
    /// Stable kind, for example `mode-change`, `fence`, `coordinator-lost`.
    pub kind: String,
    /// What happened, to what, and why.
    pub message: String,
}
