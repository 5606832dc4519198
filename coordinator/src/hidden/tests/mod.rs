//! Tests on real file systems.
