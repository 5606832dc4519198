//! Resource types, and the resource hosts (`csv-rhs`) in which their entry points run.
//!
//! | module | is |
//! | --- | --- |
//! | [`api`] | what a resource type is: the trait, properties, what an entry point may use |
//! | [`protocol`] | what csvd and a resource host say to each other |
//! | [`client`] | csvd's side: starts hosts, finds those of an earlier csvd again |
//! | [`host`] | a resource host |
//! | [`types`] | the types that come with csvfs, and where a type is looked up |
//!
//! A resource host is a process of its own, so that a resource that hangs or crashes takes neither csvd nor, once it was
//! put into a host of its own, another resource along. What a resource manages (a virtual machine, an address, a
//! program) outlives its host: a new host takes it over as it is.

#![deny(unsafe_code)]

pub mod api;
pub mod client;
pub mod host;
pub mod protocol;
pub mod types;

mod processes;
