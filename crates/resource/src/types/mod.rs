//! The types that come with csvfs, and where a type is looked up.
