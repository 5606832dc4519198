//! The types that come with csvfs, and where a type is looked up.

pub mod csv;
pub mod disk;
pub mod ip;
mod mounts;
pub mod name;
mod run;
mod settings;
pub mod share;
#[cfg(test)]
mod testbed;
pub mod vm;
