//! A node's clocks. The monotonic one runs a little fast or slow and goes on while the node is frozen (`CLOCK_BOOTTIME`);
//! the wall clock can be set by anybody to anything.

/// Wall clock at the beginning (Unix ms).
pub const START_UNIX_MS: u64 = 1_800_000_000_000;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// Parts per million that it runs too fast; negative: too slow.
    pub drift_ppm: i64,
    /// How far the wall clock was set forward.
    pub wall_offset_ms: i64,
}

impl Clock {
    fn scaled(ms: u64, ppm: i64) -> u64 {
        let ms = i128::from(ms);
        u64::try_from(ms + ms * i128::from(ppm) / 1_000_000).unwrap_or(0)
    }

    /// Monotonic milliseconds at the true time `now_ms`.
    #[must_use]
    pub fn mono_ms(&self, now_ms: u64) -> u64 {
        Clock::scaled(now_ms, self.drift_ppm)
    }

    /// Wall clock (Unix ms).
    #[must_use]
    pub fn unix_ms(&self, now_ms: u64) -> u64 {
        START_UNIX_MS.saturating_add(self.mono_ms(now_ms)).saturating_add_signed(self.wall_offset_ms)
    }

    /// How long that much time of this clock really takes.
    #[must_use]
    pub fn true_ms(&self, local_ms: u64) -> u64 {
        Clock::scaled(local_ms, -self.drift_ppm)
    }
}
