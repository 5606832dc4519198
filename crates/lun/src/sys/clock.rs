//! Is the system clock kept right by somebody?

use std::io;
use std::mem::MaybeUninit;

/// What the kernel knows of its clock's discipline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockStatus {
    /// A time service (NTP, PTP, the hypervisor) keeps it right.
    pub synchronised: bool,
    /// Largest error that the time service admits, in microseconds; grows while nobody keeps the clock.
    pub error_us_max: i64,
}

/// Asks `adjtimex(2)`; changes nothing.
///
/// # Errors
/// The kernel's errno.
pub fn clock_status() -> io::Result<ClockStatus> {
    // SAFETY: `timex` is plain numbers, for which zeros are a value; `modes` 0 asks only.
    let mut status = unsafe { MaybeUninit::<libc::timex>::zeroed().assume_init() };
    // SAFETY: the pointer is to a whole `timex` that lives through the call.
    let state = unsafe { libc::adjtimex(&raw mut status) };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    let synchronised = state != libc::TIME_ERROR && status.status & libc::STA_UNSYNC == 0;
    Ok(ClockStatus { synchronised, error_us_max: status.maxerror })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_answers() {
        assert!(clock_status().unwrap().error_us_max >= 0);
    }
}
