//! Words of persistent reservations. Source: SPC-4 5.13 and 6.15, 6.16; NVM Express Base Specification, "Reservations".

use std::fmt;

/// Kinds of reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ReservationType {
    /// The holder writes, everybody reads.
    WriteExclusive,
    /// The holder reads and writes.
    ExclusiveAccess,
    /// Who is registered writes, everybody reads. What csvfs uses (safety rule 10).
    #[default]
    WriteExclusiveRegistrantsOnly,
    /// Who is registered reads and writes.
    ExclusiveAccessRegistrantsOnly,
    /// As `WriteExclusiveRegistrantsOnly`, and everyone who is registered is a holder.
    WriteExclusiveAllRegistrants,
    /// As `ExclusiveAccessRegistrantsOnly`, and everyone who is registered is a holder.
    ExclusiveAccessAllRegistrants,
}

impl ReservationType {
    /// All six.
    pub const ALL: [ReservationType; 6] = [
        ReservationType::WriteExclusive,
        ReservationType::ExclusiveAccess,
        ReservationType::WriteExclusiveRegistrantsOnly,
        ReservationType::ExclusiveAccessRegistrantsOnly,
        ReservationType::WriteExclusiveAllRegistrants,
        ReservationType::ExclusiveAccessAllRegistrants,
    ];

    /// The number in SCSI commands (SPC-4 table 65).
    #[must_use]
    pub fn scsi(self) -> u8 {
        match self {
            ReservationType::WriteExclusive => 1,
            ReservationType::ExclusiveAccess => 3,
            ReservationType::WriteExclusiveRegistrantsOnly => 5,
            ReservationType::ExclusiveAccessRegistrantsOnly => 6,
            ReservationType::WriteExclusiveAllRegistrants => 7,
            ReservationType::ExclusiveAccessAllRegistrants => 8,
        }
    }

    /// From the number in SCSI data.
    #[must_use]
    pub fn from_scsi(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.scsi() == number)
    }

    /// The number in NVMe commands and in linux/pr.h.
    #[must_use]
    pub fn nvme(self) -> u8 {
        match self {
            ReservationType::WriteExclusive => 1,
            ReservationType::ExclusiveAccess => 2,
            ReservationType::WriteExclusiveRegistrantsOnly => 3,
            ReservationType::ExclusiveAccessRegistrantsOnly => 4,
            ReservationType::WriteExclusiveAllRegistrants => 5,
            ReservationType::ExclusiveAccessAllRegistrants => 6,
        }
    }

    /// From the number in NVMe data.
    #[must_use]
    pub fn from_nvme(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.nvme() == number)
    }

    /// May everyone who is registered write, and nobody else?
    #[must_use]
    pub fn is_for_registrants(self) -> bool {
        !matches!(self, ReservationType::WriteExclusive | ReservationType::ExclusiveAccess)
    }

    /// Is everyone who is registered a holder?
    #[must_use]
    pub fn is_all_registrants(self) -> bool {
        matches!(
            self,
            ReservationType::WriteExclusiveAllRegistrants | ReservationType::ExclusiveAccessAllRegistrants
        )
    }
}

impl fmt::Display for ReservationType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ReservationType::WriteExclusive => "Write Exclusive",
            ReservationType::ExclusiveAccess => "Exclusive Access",
            ReservationType::WriteExclusiveRegistrantsOnly => "Write Exclusive - Registrants Only",
            ReservationType::ExclusiveAccessRegistrantsOnly => "Exclusive Access - Registrants Only",
            ReservationType::WriteExclusiveAllRegistrants => "Write Exclusive - All Registrants",
            ReservationType::ExclusiveAccessAllRegistrants => "Exclusive Access - All Registrants",
        })
    }
}

/// How reservations of a device are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// SCSI commands by SG_IO, to every path of a multipath device.
    Scsi,
    /// NVMe reservation commands.
    Nvme,
    /// The kernel's `IOC_PR_*` calls.
    Ioctl,
    /// The lab's emulation on a file.
    Emulated,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Scsi => "SCSI-3 persistent reservations",
            Kind::Nvme => "NVMe reservations",
            Kind::Ioctl => "the kernel's reservation calls",
            Kind::Emulated => "the lab's emulation",
        })
    }
}

/// What a device says that it can do; `None` where it does not say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// Can registrations survive a power loss of the storage (APTPL, PTPL)?
    pub aptpl: Option<bool>,
    /// Are they set to do so now?
    pub aptpl_active: Option<bool>,
    /// PREEMPT AND ABORT.
    pub preempt_and_abort: Option<bool>,
    /// Can keys and reservation be read back?
    pub read_back: bool,
    /// Types on offer.
    pub types: Option<Vec<ReservationType>>,
}

/// Registered keys. One key stands several times when several paths or sessions have registered it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Keys {
    /// Counts registrations, preemptions and clears.
    pub generation: u32,
    /// The keys, in the device's order.
    pub keys: Vec<u64>,
}

/// The reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// Key of the holder; 0 when everyone who is registered holds it.
    pub key: u64,
    /// Its type.
    pub kind: ReservationType,
}

/// One registration with where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FullStatus {
    /// Its key.
    pub key: u64,
    /// Does it hold the reservation?
    pub holder: bool,
    /// Type of the reservation, when it holds it.
    pub kind: Option<ReservationType>,
    /// Initiator, in words: `iscsi:iqn...`, `fc:2100...`, `nvme host ...`, `loop3`.
    pub initiator: String,
}

/// A registration was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegisterOutcome {
    /// Does it survive a power loss of the storage? If not, register and reserve again after one.
    pub aptpl: bool,
}

/// A preemption was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PreemptOutcome {
    /// Were the victim's commands under way aborted? If not, some may still reach the medium: wait until they must
    /// have ended.
    pub aborted: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_both_ways() {
        for kind in ReservationType::ALL {
            assert_eq!(ReservationType::from_scsi(kind.scsi()), Some(kind));
            assert_eq!(ReservationType::from_nvme(kind.nvme()), Some(kind));
        }
        assert_eq!(ReservationType::default().scsi(), 5);
        assert_eq!((ReservationType::from_scsi(0), ReservationType::from_scsi(2)), (None, None));
    }
}
