//! The manager against obedient owners.
