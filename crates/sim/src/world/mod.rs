//! What is outside the programs: network, clocks, LUNs.

pub mod clock;
pub mod lun;
pub mod network;
pub mod witness_lun;
