//! Groups and resources: who gets a group ([`manager`]), on which nodes it can be ([`candidates`]), how load is evened out
//! ([`balance`]), and what depends on what ([`expr`]). All of it pure: time comes in as a value, what is to be done goes out as
//! one. csvd does not carry any of it out yet.

pub mod balance;
pub mod candidates;
pub mod expr;
pub mod manager;
