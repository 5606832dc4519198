//! Client side: what this node holds of one file.
