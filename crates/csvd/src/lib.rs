//! The part of the node daemon that others use: the client side of the admin protocol, and what csvd tells of the
//! cluster.
//!
//! The daemon itself is the binary `csvd`.

pub mod check;
pub mod client;
pub mod groups;
pub mod status;
