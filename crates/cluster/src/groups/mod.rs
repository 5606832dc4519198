//! Groups and resources: who gets a group ([`manager`]), how its owner brings it online and keeps it so ([`local`]), and
//! what depends on what ([`expr`]). All of it pure: time comes in as a value, what is to be done goes out as one.

pub mod expr;
pub mod local;
