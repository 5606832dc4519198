//! Nodes on loopback: who gets in, and what happens when something breaks.

mod beats;
mod faults;
mod joining;
mod pki;
mod rig;
mod trust;
