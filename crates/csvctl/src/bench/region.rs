//! The stretch of the LUN that is measured.
//!
//! The bench file is written from end to end before anything is measured, so its blocks are allocated and will not
//! move. Raw jobs run on the LUN at the largest run of the file that is contiguous there, and file jobs run on the
//! same run by file offset: same disk, same place. Writing there goes past the file system, but only into data
//! blocks of a file that belongs to the benchmark and whose content nobody reads.

use anyhow::bail;
use csv_types::admin::MapExtent;

/// Less than this would fit into a device's cache and says little.
pub(super) const LEN_BYTES_MIN: u64 = 256 << 20;
/// Below this nothing useful can be measured.
const LEN_BYTES_FLOOR: u64 = 32 << 20;
/// Jobs of 1 MiB must stay aligned to it.
const ALIGN_BYTES: u64 = 1 << 20;

/// The stretch, in the file and on the LUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) file_offset: u64,
    pub(super) lun_offset: u64,
    pub(super) len: u64,
}

/// The largest run that is contiguous in the file and on the LUN, a whole number of MiB.
///
/// # Errors
/// No run is large enough; the file system is too full or too fragmented.
pub(super) fn largest(extents: &[MapExtent]) -> anyhow::Result<Region> {
    let mut best = Region { file_offset: 0, lun_offset: 0, len: 0 };
    let mut run = best;
    for extent in extents {
        let follows = run.len > 0
            && extent.file_offset == run.file_offset + run.len
            && extent.lun_offset == run.lun_offset + run.len;
        if follows {
            run.len += extent.len;
        } else {
            run = Region { file_offset: extent.file_offset, lun_offset: extent.lun_offset, len: extent.len };
        }
        if run.len > best.len {
            best = run;
        }
    }
    best.len -= best.len % ALIGN_BYTES;
    if best.len < LEN_BYTES_FLOOR {
        bail!(
            "the bench file has no {} MiB in one piece on the LUN (largest: {} MiB in {} extents); free space on the \
             volume or use a new lab",
            LEN_BYTES_FLOOR >> 20,
            best.len >> 20,
            extents.len()
        );
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(file_mib: u64, lun_mib: u64, len_mib: u64) -> MapExtent {
        MapExtent { file_offset: file_mib << 20, lun_offset: lun_mib << 20, len: len_mib << 20 }
    }

    #[test]
    fn neighbours_are_joined_and_the_largest_run_wins() {
        let extents = [extent(0, 1000, 40), extent(40, 500, 60), extent(100, 560, 60), extent(160, 10, 100)];
        let region = largest(&extents).unwrap();
        assert_eq!(region, Region { file_offset: 40 << 20, lun_offset: 500 << 20, len: 120 << 20 });
    }

    #[test]
    fn a_gap_in_the_file_ends_a_run() {
        // Contiguous on the LUN, but a hole of the file lies between: not ours to write.
        let extents = [extent(0, 0, 40), extent(50, 40, 41)];
        assert_eq!(largest(&extents).unwrap().len, 41 << 20);
    }

    #[test]
    fn fragments_are_refused_and_odd_tails_cut() {
        assert!(largest(&[extent(0, 0, 8), extent(8, 20, 8)]).is_err());
        assert!(largest(&[]).is_err());
        let mut odd = extent(0, 0, 64);
        odd.len += 4096;
        assert_eq!(largest(&[odd]).unwrap().len, 64 << 20);
    }
}
