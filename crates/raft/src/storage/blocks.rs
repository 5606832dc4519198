//! The storage on a raw block region, for the disk witness: no file system, no cache, no allocation.
//!
//! ```text
//! slot 0, 1   superblock of even generations, twice
//! slot 2, 3   superblock of odd generations, twice
//! slot 4 ..   area of even generations
//!        ..   area of odd generations, just as long
//! ```
//!
//! The superblock with the highest generation says which area counts. Records are appended to that area, each with
//! one write that is durable when it returns. When the area is full, what is alive is written to the other one,
//! which was zeroed before, and a superblock with the next generation makes the change: both its copies are durable
//! before anything is appended there. A snapshot is saved in the same way. A crash at any point leaves one of the
//! two generations whole, with everything acknowledged.

use super::slot::{self, Content, SLOT};
use super::{Backend, FORMAT, OpenError, OpenStorage, StorageFailure, frame};
use crate::codec::{Decoder, Encoder, Malformed};
use crate::image::{Image, Record, StoredSnapshot};
use crate::types::{Entry, Identity};
use std::io;

const SUPERBLOCKS: u64 = 4;
const KIND_SUPERBLOCK: u8 = 0x20;
/// Smallest region: two areas that hold a snapshot and a log worth the name.
pub const REGION_BYTES_MIN: u64 = 4 << 20;
/// More than this of a region is not used, so that a take-over does not read for long.
pub const REGION_BYTES_MAX: u64 = 64 << 20;
/// Writes of a new area are cut into pieces of this size.
const WRITE_BYTES_MAX: usize = 1 << 20;
/// Entries are packed into records of about this size when an area is written anew.
const RECORD_BYTES: usize = 256 << 10;

/// A block device, or a part of one. Offsets and lengths are multiples of 4096; the memory is not aligned, so an
/// implementation with O_DIRECT copies it.
#[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
pub trait BlockStore: Send + 'static {
    /// What to call it in messages.
    fn place(&self) -> String;
    /// Bytes of the region.
    fn len(&self) -> u64;
    /// Reads past every cache of this machine.
    ///
    /// # Errors
    /// Of the device.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes; durable when it returns (flush or FUA). Must not be tried again inside after an error.
    ///
    /// # Errors
    /// Of the device, and a reservation conflict.
    fn write_synced(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
}

struct Blocks {
    store: Box<dyn BlockStore>,
    identity: Identity,
    generation: u64,
    /// Slots of one area.
    area_slots: u64,
    /// Next slot to be written in the current area.
    next: u64,
    /// Slots of the other area that may not be zeros.
    other_dirty: u64,
}

fn area_slots(len: u64) -> u64 {
    (len.min(REGION_BYTES_MAX) / SLOT as u64).saturating_sub(SUPERBLOCKS) / 2
}

/// `start_slots`: slots that were written before the area was taken into use.
fn superblock(generation: u64, identity: Identity, area_slots: u64, start_slots: u64) -> Vec<u8> {
    let mut body = Encoder::default();
    frame::encode_identity(&mut body, identity);
    body.u64(area_slots);
    body.u64(start_slots);
    slot::encode(generation, generation % 2, KIND_SUPERBLOCK, false, &body.0)
}

fn area_offset(generation: u64, area_slots: u64, slot: u64) -> u64 {
    (SUPERBLOCKS + (generation % 2) * area_slots + slot) * SLOT as u64
}

/// Makes an empty database of a voter on a region. What is there is lost; only a region that is nobody's is taken.
///
/// # Errors
/// When the region is too small, holds a database already (`NotEmpty`: wipe the first 16 KiB by hand), or fails.
pub fn format(store: &mut dyn BlockStore, identity: Identity) -> Result<(), OpenError> {
    if store.len() < REGION_BYTES_MIN {
        let (place, bytes) = (store.place(), store.len());
        return Err(OpenError::TooSmall { place, bytes, bytes_min: REGION_BYTES_MIN });
    }
    format_any(store, identity)
}

/// [`format`] without the least size.
pub(crate) fn format_any(store: &mut dyn BlockStore, identity: Identity) -> Result<(), OpenError> {
    let place = store.place();
    let failed = |e: io::Error| OpenError::io(format!("cannot format {place}"), &e);
    for number in 0..SUPERBLOCKS {
        let mut buf = vec![0; SLOT];
        store.read(number * SLOT as u64, &mut buf).map_err(failed)?;
        if matches!(slot::decode(&buf), Content::Slot(_)) {
            return Err(OpenError::NotEmpty { place });
        }
    }
    let slots = area_slots(store.len());
    zero(store, 0, (SUPERBLOCKS + 2 * slots) * SLOT as u64).map_err(failed)?;
    let mut state = Encoder::default();
    Image::default().state().encode(&mut state);
    let first = slot::encode(2, 0, 1, false, &state.0);
    store.write_synced(area_offset(2, slots, 0), &first).map_err(failed)?;
    write_superblocks(store, &superblock(2, identity, slots, 1), 2).map_err(failed)
}

fn write_superblocks(store: &mut dyn BlockStore, superblock: &[u8], generation: u64) -> io::Result<()> {
    let first = (generation % 2) * 2;
    for number in [first, first + 1] {
        store.write_synced(number * SLOT as u64, superblock)?;
    }
    Ok(())
}

fn zero(store: &mut dyn BlockStore, offset: u64, len: u64) -> io::Result<()> {
    let zeros = vec![0; WRITE_BYTES_MAX];
    let mut at = 0;
    while at < len {
        let piece = usize::try_from(len - at).unwrap_or(usize::MAX).min(WRITE_BYTES_MAX);
        store.write_synced(offset + at, &zeros[..piece])?;
        at += piece as u64;
    }
    Ok(())
}

impl Backend for Blocks {
    fn write(&mut self, record: &Record, image: &Image) -> Result<(), StorageFailure> {
        if let Record::Snapshot(snapshot) = record {
            return self.compact(image, Some(snapshot));
        }
        let mut body = Encoder::default();
        record.encode(&mut body);
        let slots = slot::slots_for(body.0.len());
        if self.next + slots > self.area_slots {
            self.compact(image, image.snapshot.as_ref())?;
            if self.next + slots > self.area_slots {
                return Err(self.full());
            }
        }
        let bytes = slot::encode(self.generation, self.next, record.kind(), true, &body.0);
        let offset = area_offset(self.generation, self.area_slots, self.next);
        self.store.write_synced(offset, &bytes).map_err(|e| self.failure(offset, &e))?;
        self.next += slots;
        Ok(())
    }

    fn pressed(&self, image: &Image) -> bool {
        // What is purged already needs no snapshot, only a new area, which comes by itself.
        self.next > self.area_slots / 2 && (image.log_bytes as u64) > self.area_slots * SLOT as u64 / 8
    }
}

impl Blocks {
    fn failure(&self, offset: u64, error: &io::Error) -> StorageFailure {
        StorageFailure::new(format!("cannot write {} at byte {offset}", self.store.place()), error)
    }

    fn full(&self) -> StorageFailure {
        StorageFailure::Full {
            what: format!(
                "{}: the {} slots of an area do not hold log and snapshot",
                self.store.place(),
                self.area_slots
            ),
        }
    }

    /// Writes what is alive to the other area and changes over.
    fn compact(&mut self, image: &Image, snapshot: Option<&StoredSnapshot>) -> Result<(), StorageFailure> {
        let generation = self.generation + 1;
        let bytes = encode_area(generation, image, snapshot);
        let slots = (bytes.len() / SLOT) as u64;
        if slots > self.area_slots {
            return Err(self.full());
        }
        let offset = area_offset(generation, self.area_slots, 0);
        zero(&mut *self.store, offset, self.other_dirty * SLOT as u64)
            .map_err(|e| self.failure(offset, &e))?;
        for (i, piece) in bytes.chunks(WRITE_BYTES_MAX).enumerate() {
            let at = offset + (i * WRITE_BYTES_MAX) as u64;
            self.store.write_synced(at, piece).map_err(|e| self.failure(at, &e))?;
        }
        let superblock = superblock(generation, self.identity, self.area_slots, slots);
        write_superblocks(&mut *self.store, &superblock, generation).map_err(|e| self.failure(0, &e))?;
        self.other_dirty = self.next;
        self.generation = generation;
        self.next = slots;
        Ok(())
    }
}

fn encode_area(generation: u64, image: &Image, snapshot: Option<&StoredSnapshot>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut put = |record: &Record| {
        let mut body = Encoder::default();
        record.encode(&mut body);
        let number = (bytes.len() / SLOT) as u64;
        bytes.extend(slot::encode(generation, number, record.kind(), false, &body.0));
    };
    put(&image.state());
    if let Some(snapshot) = snapshot {
        put(&Record::Snapshot(snapshot.clone()));
    }
    let mut batch: Vec<Entry> = Vec::new();
    let mut batch_bytes = 0;
    for entry in &image.entries {
        batch_bytes += crate::codec::encoded_len(entry);
        batch.push(entry.clone());
        if batch_bytes >= RECORD_BYTES {
            put(&Record::Append { committed: None, entries: std::mem::take(&mut batch) });
            batch_bytes = 0;
        }
    }
    if !batch.is_empty() {
        put(&Record::Append { committed: None, entries: batch });
    }
    bytes
}

/// Opens the database of a voter on a region.
///
/// # Errors
/// When it is not formatted, belongs to somebody else or is damaged.
pub fn open(mut store: Box<dyn BlockStore>, identity: Identity) -> Result<OpenStorage, OpenError> {
    let place = store.place();
    let mut warnings = Vec::new();
    let supers = read_superblocks(&*store, &place)?;
    let Some(newest) = supers.iter().flatten().max_by_key(|s| s.generation).copied() else {
        return Err(OpenError::NotFormatted { place });
    };
    if newest.format > FORMAT {
        return Err(OpenError::Newer { place, found: newest.format });
    }
    if newest.identity != identity {
        return Err(OpenError::Foreign { place, found: newest.identity, wanted: identity });
    }
    let bytes_min = (SUPERBLOCKS + 2 * newest.area_slots) * SLOT as u64;
    if store.len() < bytes_min || newest.area_slots == 0 {
        return Err(OpenError::TooSmall { place, bytes: store.len(), bytes_min });
    }
    let (generation, area_slots) = (newest.generation, newest.area_slots);
    let lost = supers.iter().filter(|s| s.is_none()).count();
    if lost > 0 {
        check_no_later_area(&*store, &place, generation, area_slots)?;
    }
    let area = read_area(&*store, &place, generation, area_slots)?;
    let mut image = Image::default();
    let next = replay(&area, &place, generation, &mut image)?;
    if next < newest.start_slots {
        let problem = format!("{} slots were written before the area was taken into use", newest.start_slots);
        return Err(OpenError::damaged(&place, format!("slot {next} of generation {generation}"), problem));
    }
    image.check().map_err(|e| OpenError::damaged(&place, format!("generation {generation}"), e))?;

    let failed = |e: io::Error| OpenError::io(format!("cannot repair {place}"), &e);
    let first = usize::try_from((generation % 2) * 2).unwrap_or(0);
    if [supers[first], supers[first + 1]] != [Some(newest); 2] {
        write_superblocks(
            &mut *store,
            &superblock(generation, identity, area_slots, newest.start_slots),
            generation,
        )
        .map_err(failed)?;
        warnings.push(format!("{place}: one copy of the superblock was missing and is written anew"));
    }
    let used = usize::try_from(next).unwrap_or(usize::MAX) * SLOT;
    let dirty = area[used..].iter().rposition(|b| *b != 0).map_or(0, |last| last / SLOT + 1);
    if dirty > 0 {
        zero(&mut *store, area_offset(generation, area_slots, next), (dirty * SLOT) as u64)
            .map_err(failed)?;
        warnings.push(format!(
            "{place}: {dirty} slots from slot {next} of generation {generation} are a record that a crash cut off; \
             it was never acknowledged and is dropped"
        ));
    }
    let backend = Blocks { store, identity, generation, area_slots, next, other_dirty: area_slots };
    Ok(OpenStorage { backend: Box::new(backend), image, identity, warnings })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Superblock {
    generation: u64,
    format: u32,
    identity: Identity,
    area_slots: u64,
    start_slots: u64,
}

fn read_superblocks(store: &dyn BlockStore, place: &str) -> Result<[Option<Superblock>; 4], OpenError> {
    let mut supers = [None; 4];
    for (number, found) in supers.iter_mut().enumerate() {
        let mut buf = vec![0; SLOT];
        store
            .read((number * SLOT) as u64, &mut buf)
            .map_err(|e| OpenError::io(format!("cannot read the superblock of {place}"), &e))?;
        if let Content::Slot(slot) = slot::decode(&buf)
            && slot.kind == KIND_SUPERBLOCK
            && slot.generation % 2 == (number / 2) as u64
        {
            *found = decode_superblock(slot.generation, slot.payload).ok();
        }
    }
    Ok(supers)
}

fn decode_superblock(generation: u64, payload: &[u8]) -> Result<Superblock, Malformed> {
    let mut input = Decoder::new(payload);
    let (format, identity) = frame::decode_identity(&mut input)?;
    Ok(Superblock { generation, format, identity, area_slots: input.u64()?, start_slots: input.u64()? })
}

fn read_area(
    store: &dyn BlockStore,
    place: &str,
    generation: u64,
    area_slots: u64,
) -> Result<Vec<u8>, OpenError> {
    let len = usize::try_from(area_slots).unwrap_or(usize::MAX).saturating_mul(SLOT);
    let mut area = vec![0; len];
    let offset = area_offset(generation, area_slots, 0);
    for (i, piece) in area.chunks_mut(WRITE_BYTES_MAX).enumerate() {
        let at = offset + (i * WRITE_BYTES_MAX) as u64;
        store.read(at, piece).map_err(|e| OpenError::io(format!("cannot read {place} at byte {at}"), &e))?;
    }
    Ok(area)
}

/// With a superblock gone it could be that the newest generation is not seen. Its area would hold records that
/// were appended after the change.
fn check_no_later_area(
    store: &dyn BlockStore,
    place: &str,
    generation: u64,
    area_slots: u64,
) -> Result<(), OpenError> {
    let area = read_area(store, place, generation + 1, area_slots)?;
    let later = area.chunks(SLOT).any(|bytes| {
        matches!(slot::decode(bytes), Content::Slot(s) if s.generation > generation && s.flags & slot::LIVE != 0)
    });
    if later {
        let problem = "its two copies cannot be read, and records were written under it";
        return Err(OpenError::damaged(
            place,
            format!("superblock of generation {}", generation + 1),
            problem,
        ));
    }
    Ok(())
}

/// Is slot `at` part of a record that was followed by another one?
fn acknowledged(area: &[u8], generation: u64, at: usize) -> bool {
    area.chunks(SLOT).skip(at + 1).any(|bytes| {
        matches!(slot::decode(bytes), Content::Slot(s) if s.generation == generation && s.flags & slot::FIRST != 0)
    })
}

/// Replays an area and returns the number of its first free slot.
fn replay(area: &[u8], place: &str, generation: u64, image: &mut Image) -> Result<u64, OpenError> {
    let damaged = |at: usize, problem: String| {
        OpenError::damaged(place, format!("slot {at} of generation {generation}"), problem)
    };
    let mut free = 0;
    let mut record: Vec<u8> = Vec::new();
    for (at, bytes) in area.chunks(SLOT).enumerate() {
        let slot = match slot::decode(bytes) {
            Content::Slot(slot) if slot.generation == generation && slot.number == at as u64 => slot,
            Content::Slot(slot) => {
                let problem = format!("slot {} of generation {} stands here", slot.number, slot.generation);
                return Err(damaged(at, problem));
            }
            Content::Damaged => return Err(damaged(at, "its checksum is wrong".to_owned())),
            Content::Zeros | Content::Torn if acknowledged(area, generation, at) => {
                return Err(damaged(at, "it cannot be read, and other records follow it".to_owned()));
            }
            Content::Zeros | Content::Torn => break,
        };
        if (slot.flags & slot::FIRST != 0) != (at == free) {
            return Err(damaged(at, "a record begins or ends in the wrong place".to_owned()));
        }
        record.extend_from_slice(slot.payload);
        if slot.flags & slot::LAST != 0 {
            let decoded = Record::decode(slot.kind, &record).and_then(|r| image.apply(r));
            decoded.map_err(|e| damaged(free, e.0))?;
            record.clear();
            free = at + 1;
        }
    }
    if free == 0 {
        return Err(damaged(0, "the area has no first record".to_owned()));
    }
    Ok(free as u64)
}
