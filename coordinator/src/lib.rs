//! The coordinator of a volume: the one node that has the file system mounted.
//!
//! A `Coordinator` owns the hidden mount and everything that is known only here: sessions and their reply
//! caches, opens, locks, what is lent ([`csv_layout::table::LayoutTable`]), who holds the end-of-file right, who
//! may cache metadata, and which files are orphans. Every change of the volume goes through it.
//!
//! ```text
//! Coordinator::start(Options) -> Result<Arc<Coordinator>, StartError>
//! coordinator.connect(node, Hello, Arc<dyn Outbox>) -> Result<SessionRef, Refusal>   sends Welcome itself
//! coordinator.message(&SessionRef, ClientMessage)                                    never blocks
//! coordinator.disconnected(&SessionRef)
//! coordinator.token_node(token: &str) -> Option<NodeId>
//! coordinator.block_begin(token: &str, lun_offset: u64, len: u64, write: bool) -> Result<BlockGuard, Errno>
//! coordinator.block_check(token: &str, lun_offset: u64, len: u64, write: bool) -> Result<(), Errno>
//! coordinator.states() -> Vec<String>                    latest state_json of each node
//! coordinator.order(Order)                               redirect, maintenance
//! coordinator.map_path(&[u8]) -> Result<Vec<csv_layout::Extent>, Errno>   blocking
//! coordinator.fs() -> &HiddenFs
//! coordinator.crash()                                    as a power cut
//! coordinator.stop()?                                    blocking: recalls, settles, syncs
//! coordinator.hand_over(limit) -> HandedOver             blocking: ends the calls, syncs, recalls nothing
//! coordinator.nodes_gone(&[NodeId])                      they are fenced
//! grpc::serve(grpc::Place, std::net::TcpListener, grpc::TlsFiles{ca,cert,key}, shutdown: watch::Receiver<bool>)
//!     -> Result<(), ServeError>                          async; node names come from Options.nodes
//! ```
//!
//! What is not plain from the protocol file:
//! * A `LayoutGet` that starts at or past the end of file, and does not ask to extend, is answered with ENXIO and the
//!   file's attributes. A Read or Write grant ends at the exact logical size, an Exclusive one without the
//!   end-of-file right at the size rounded up to the file system's block (or page, if that is larger).
//! * lookup, getattr, setattr, open, create, mknod, mkdir, symlink, link, fallocate and `LayoutCommit` are answered
//!   with attributes; read, readlink, getxattr and listxattr (names, each with a NUL behind it) with data; write,
//!   copy_range and seek with a count, the first two with attributes in it.
//!   A reclaimed open is answered with nothing: its size may be known only after grace.
//! * `lease` stands for everything in a reply: the name and the attributes of a lookup or create (ENOENT of a lookup:
//!   the absence), all entries of a readdirplus page.
//! * A node that changes something keeps its lease on attributes that the reply tells. What the reply does not tell
//!   (times of a directory, a removed or renamed file) is invalidated at the changing node too, ahead of the reply.
//!   Every `Invalidate` must be acknowledged, whether somebody waits for it or not.
//! * An append that is sent again after a change of coordinator is answered with EIO, unless the file was not
//!   written since it was first sent: nobody can know whether it was done.
//! * A node whose session bytes are new is taken for one whose former csvfs process has ended: its supervisor must
//!   not start a second one before.

mod block;
mod calls;
mod coordinator;
mod dispatch;
mod durable;
mod eof;
mod exec;
mod gets;
mod grace;
pub mod grpc;
mod handover;
pub mod hidden;
mod layouts;
mod leases;
mod locks;
mod ops_attr;
mod ops_data;
mod ops_ns;
mod ops_remove;
mod options;
mod orphans;
mod pushes;
mod replies;
mod session;
mod state;
#[cfg(test)]
mod tests;

pub use block::BlockGuard;
pub use coordinator::{Coordinator, StartError};
pub use handover::HandedOver;
pub use options::{Confirm, EventSink, Fence, FsKind, Limits, Options, Order, Outbox, Refusal, SessionRef};
