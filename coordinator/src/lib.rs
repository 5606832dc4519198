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
//! coordinator.stop()                                     blocking: recalls, settles, syncs
//! grpc::serve(Arc<Coordinator>, std::net::TcpListener, grpc::TlsFiles{ca,cert,key}, shutdown: watch::Receiver<bool>)
//!     -> Result<(), ServeError>                          async; node names come from Options.nodes
//! ```
//!
//! Replies that are not plain from the protocol file: a `LayoutGet` that starts at or past the end of file (and
//! does not ask to extend) is answered with ENXIO and the file's attributes; a Read/Write grant ends at the exact
//! logical size, an Exclusive one without the end-of-file right at the size rounded up to the file system's block.

mod block;
mod calls;
mod coordinator;
mod dispatch;
mod eof;
mod exec;
mod gets;
mod grace;
pub mod grpc;
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
pub use options::{EventSink, Fence, FsKind, Limits, Options, Order, Outbox, Refusal, SessionRef};
