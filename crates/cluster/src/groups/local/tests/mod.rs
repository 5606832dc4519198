//! Each rule by itself, and all of them against a model of the hosts.

mod any;
mod faults;
mod hosts;
mod rules;
mod world;
