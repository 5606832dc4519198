//! The shared LUN of a volume as one node sees it, and the few system calls that need `unsafe`.
//!
//! * [`sys`]: file handles, FIEMAP, shutdown, page-cache counts; the only module with raw system calls.

pub mod sys;
