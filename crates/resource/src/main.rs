//! A resource host.

fn main() {}
