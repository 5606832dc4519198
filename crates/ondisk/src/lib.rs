//! Formats that csvfs writes on a LUN: encode, decode, checksum. Pure; where the bytes lie on the device and who
//! may write them is the business of `csv-lun`.

pub mod label;
pub mod witness;

pub use label::{FsKind, Label, LabelError, check_volume_name};
pub use witness::{Beat, WitnessError, WitnessHeader};
