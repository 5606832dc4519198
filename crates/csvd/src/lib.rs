//! The part of the node daemon that others use: the client side of the admin protocol.
//!
//! The daemon itself is the binary `csvd`.

pub mod client;
