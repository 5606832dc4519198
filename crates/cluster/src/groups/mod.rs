//! Groups and resources: who gets a group ([`manager`]), on which nodes it can be ([`candidates`]), how load is evened out
//! ([`balance`]), how its owner brings a group online and keeps it so ([`local`]), and what depends on what ([`expr`]). All of it pure: time comes in as a value, what is to be done goes out as
//! one. csvd does not carry any of it out yet.

pub mod balance;
pub mod candidates;
pub mod expr;
pub mod local;
pub mod manager;
