//! Formats that csvfs writes on a LUN.
