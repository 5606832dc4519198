//! The cluster engine's decisions. Pure: time comes in as a value, effects and commands go out as values.
//!
//! | module | decides |
//! | --- | --- |
//! | [`db`] | what the cluster knows: the replicated database and every change of it |
//! | [`quorum`] | who votes, and whether a partition may go on |
//! | [`membership`] | who is heard, from heartbeats |
//! | [`witness`] | who may run the voter on the disk witness |
//! | [`failover`] | which node owns which volume |
//! | [`groups`] | which node has which group of resources |
//!
//! The drivers are csvd (wall clock, network, LUNs) and the simulation. All safety against late, doubled and reordered
//! commands lies in [`db::ClusterDb::apply`]; `membership` and `failover` only propose.

pub mod agent;
pub mod db;
pub mod failover;
pub mod groups;
pub mod membership;
pub mod quorum;
pub mod witness;
