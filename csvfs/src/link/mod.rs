//! Ways to the coordinator: in this process, or over gRPC with mutual TLS.

pub(crate) mod local;
pub(crate) mod remote;
