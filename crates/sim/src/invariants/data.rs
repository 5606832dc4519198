//! File data: a read must return a write that no other write, acknowledged before the read began, has replaced.
//!
//! Writes of one block may overlap in time; then either may be found. A write whose end was not seen may take effect at any
//! time. On storage that can lose its cache only what an fsync has acknowledged counts.

use crate::world::lun::FileNo;
use std::collections::BTreeMap;

/// Set in the number of a write of zeros.
pub const ZERO: u64 = 1 << 63;
const NEVER: u64 = u64::MAX;
const REMEMBERED: usize = 200;

#[derive(Debug, Clone, Copy)]
struct Write {
    number: u64,
    begun_ms: u64,
    ended_ms: u64,
    acknowledged_ms: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Data {
    loses_cache: Vec<bool>,
    blocks: BTreeMap<(usize, FileNo, u32), Vec<Write>>,
}

impl Data {
    pub(super) fn new(loses_cache: &[bool]) -> Data {
        Data { loses_cache: loses_cache.to_vec(), blocks: BTreeMap::new() }
    }

    fn writes(&mut self, volume: usize, (file, fblock): (FileNo, u32)) -> &mut Vec<Write> {
        let first = Write { number: ZERO, begun_ms: 0, ended_ms: 0, acknowledged_ms: 0 };
        self.blocks.entry((volume, file, fblock)).or_insert_with(|| vec![first])
    }

    pub(super) fn begun(&mut self, now_ms: u64, volume: usize, at: (FileNo, u32), number: u64) {
        let writes = self.writes(volume, at);
        writes.push(Write { number, begun_ms: now_ms, ended_ms: NEVER, acknowledged_ms: NEVER });
        if writes.len() > REMEMBERED {
            // What was replaced long ago can be forgotten.
            let old: Vec<u64> = writes[..REMEMBERED / 2].iter().map(|write| write.number).collect();
            let dead: Vec<u64> = old.into_iter().filter(|number| replaced(writes, *number, now_ms)).collect();
            writes.retain(|write| !dead.contains(&write.number));
        }
    }

    pub(super) fn ended(&mut self, now_ms: u64, volume: usize, at: (FileNo, u32), number: u64) {
        let acknowledged = !self.loses_cache[volume];
        if let Some(write) = self.writes(volume, at).iter_mut().find(|write| write.number == number) {
            write.ended_ms = now_ms;
            if acknowledged {
                write.acknowledged_ms = now_ms;
            }
        }
    }

    pub(super) fn synced(&mut self, now_ms: u64, volume: usize, at: (FileNo, u32), number: u64) {
        if let Some(write) = self.writes(volume, at).iter_mut().find(|write| write.number == number) {
            write.acknowledged_ms = write.acknowledged_ms.min(now_ms);
        }
    }

    pub(super) fn read(
        &mut self,
        volume: usize,
        (file, first): (FileNo, u32),
        contents: &[u64],
        began_ms: u64,
    ) -> Result<(), String> {
        for (fblock, &number) in (first..).zip(contents) {
            let writes = self.writes(volume, (file, fblock));
            let good = if number == 0 {
                writes
                    .iter()
                    .any(|write| write.number & ZERO != 0 && !replaced(writes, write.number, began_ms))
            } else {
                writes.iter().any(|write| write.number == number) && !replaced(writes, number, began_ms)
            };
            if !good {
                let what = if number == u64::MAX {
                    "what belongs elsewhere".into()
                } else {
                    format!("write {number}")
                };
                let last: Vec<&Write> = writes.iter().rev().take(6).collect();
                return Err(format!(
                    "block {fblock} (begun at {began_ms}) shows {what}; last writes: {last:?}"
                ));
            }
        }
        Ok(())
    }
}

/// Has another write replaced this one before that time?
fn replaced(writes: &[Write], number: u64, before_ms: u64) -> bool {
    let Some(write) = writes.iter().find(|write| write.number == number) else { return true };
    writes.iter().any(|other| write.ended_ms < other.begun_ms && other.acknowledged_ms < before_ms)
}
