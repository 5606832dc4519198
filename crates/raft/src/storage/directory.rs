//! The storage on a local directory.
//!
//! ```text
//! MANIFEST             one frame: owner, and which segments there are
//! log-<number>.seg     frames of records; <number> is that of its first frame, which holds owner and state
//! snapshot-<n>.snap    one frame: owner, metadata, data; the highest n counts
//! tmp-*                half-made files; removed at open
//! ```
//!
//! Frames are numbered through all segments. A new segment is made whole under a temporary name, renamed, and only
//! then named in the manifest; only after that frames are added to it. So a segment that the manifest does not name
//! holds nothing that was acknowledged, and one that it names must be there. A crash between any two steps leaves a
//! directory that opens with everything acknowledged; a torn tail can only be in the last segment.

use super::disk::{Disk, LocalDisk};
use super::frame::{self, Unreadable};
use super::{Backend, FORMAT, OpenError, OpenStorage, StorageFailure};
use crate::codec::{Decoder, Encoder, Malformed};
use crate::image::{Image, Record, StoredSnapshot};
use crate::types::{Identity, LogId, Membership, RaftNode, SnapshotMeta, StoredMembership, Vote};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

const MANIFEST: &str = "MANIFEST";
/// Kinds of frames beside those of [`Record`].
const KIND_MANIFEST: u8 = 0x10;
const KIND_SEGMENT: u8 = 0x11;
const KIND_SNAPSHOT: u8 = 0x12;
/// A segment that has grown to this is followed by a new one.
const SEGMENT_BYTES_MAX: u64 = 4 << 20;
/// From this size of the live log on a snapshot is wanted.
const LOG_BYTES_PRESSED: usize = 16 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    /// Number of its first frame.
    first: u64,
    /// Highest index of an entry in it.
    index_max: Option<u64>,
}

struct Directory {
    disk: Box<dyn Disk>,
    identity: Identity,
    /// In order; the last one is written to. Never empty.
    segments: Vec<Segment>,
    /// Bytes of the last segment.
    tail_bytes: u64,
    /// Number of the next frame.
    next_frame: u64,
    /// Number of the newest snapshot file; 0 for none.
    snapshot: u64,
    segment_bytes_max: u64,
}

/// Makes an empty database for a new voter.
///
/// # Errors
/// When the directory holds one, or cannot be written.
pub fn create(path: &Path, identity: Identity) -> Result<(), OpenError> {
    create_on(&mut open_local(path)?, identity)
}

/// Makes the database of the only voter of a cluster that begins with this state: a backup that is restored.
///
/// # Errors
/// As [`create`].
pub fn create_with(path: &Path, identity: Identity, node: RaftNode, state: Vec<u8>) -> Result<(), OpenError> {
    create_with_on(&mut open_local(path)?, identity, node, state)
}

/// Opens the database of a voter.
///
/// # Errors
/// When it is not there, belongs to somebody else, is in use or damaged.
pub fn open(path: &Path, identity: Identity) -> Result<OpenStorage, OpenError> {
    open_on(Box::new(open_local(path)?), identity)
}

/// Is a database there (whole or not)?
#[must_use]
pub fn exists(path: &Path) -> bool {
    path.join(MANIFEST).exists()
}

fn open_local(path: &Path) -> Result<LocalDisk, OpenError> {
    LocalDisk::open(path).map_err(|e| {
        let place = path.display().to_string();
        if e.kind() == io::ErrorKind::WouldBlock {
            OpenError::Busy { place }
        } else {
            OpenError::io(format!("cannot open {place}"), &e)
        }
    })
}

/// [`create`] on any disk.
///
/// # Errors
/// As [`create`].
pub fn create_on(disk: &mut dyn Disk, identity: Identity) -> Result<(), OpenError> {
    let place = disk.place();
    let names = disk.list().map_err(|e| OpenError::io(format!("cannot list {place}"), &e))?;
    if names.iter().any(|n| n == MANIFEST) {
        return Err(OpenError::NotEmpty { place });
    }
    // Without a manifest, what else is there was left by a create that did not end.
    let failed = |e: io::Error| OpenError::io(format!("cannot create the database in {place}"), &e);
    for name in names.iter().filter(|n| n.starts_with("log-") || n.starts_with("tmp-")) {
        disk.remove(name).map_err(failed)?;
    }
    if names.iter().any(|n| n.starts_with("snapshot-")) {
        return Err(OpenError::NotEmpty { place });
    }
    let segment = segment_start(1, identity, &Image::default());
    write_file(disk, &segment_name(1), &segment).map_err(failed)?;
    write_file(disk, MANIFEST, &manifest(identity, &[1])).map_err(failed)
}

/// [`create_with`] on any disk.
///
/// The state stands for the first entry of the log, which this voter, the only one, has agreed on with itself in term 1.
/// The manifest comes last: without it nothing is there.
///
/// # Errors
/// As [`create_with`].
pub fn create_with_on(
    disk: &mut dyn Disk,
    identity: Identity,
    node: RaftNode,
    state: Vec<u8>,
) -> Result<(), OpenError> {
    let place = disk.place();
    let names = disk.list().map_err(|e| OpenError::io(format!("cannot list {place}"), &e))?;
    if !names.is_empty() {
        return Err(OpenError::NotEmpty { place });
    }
    let failed = |e: io::Error| OpenError::io(format!("cannot create the database in {place}"), &e);
    let voter = identity.voter;
    let first = LogId::new(openraft::CommittedLeaderId::new(1, voter), 1);
    let members = Membership::new(vec![BTreeSet::from([voter])], BTreeMap::from([(voter, node)]));
    let meta = SnapshotMeta {
        last_log_id: Some(first),
        last_membership: StoredMembership::new(Some(first), members),
        snapshot_id: uuid::Uuid::new_v4().to_string(),
    };
    let mut body = Encoder::default();
    frame::encode_identity(&mut body, identity);
    StoredSnapshot { meta, data: Arc::new(state) }.encode(&mut body);
    let image = Image {
        vote: Some(Vote::new(1, voter)),
        committed: Some(first),
        purged: Some(first),
        ..Image::default()
    };
    write_file(disk, &snapshot_name(1), &frame::encode(0, 1, KIND_SNAPSHOT, &body.0)).map_err(failed)?;
    write_file(disk, &segment_name(1), &segment_start(1, identity, &image)).map_err(failed)?;
    write_file(disk, MANIFEST, &manifest(identity, &[1])).map_err(failed)
}

fn segment_name(first: u64) -> String {
    format!("log-{first:020}.seg")
}

fn snapshot_name(number: u64) -> String {
    format!("snapshot-{number:020}.snap")
}

fn number_in(name: &str, prefix: &str, suffix: &str) -> Option<u64> {
    name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok()
}

fn segment_start(number: u64, identity: Identity, image: &Image) -> Vec<u8> {
    let mut body = Encoder::default();
    frame::encode_identity(&mut body, identity);
    image.state().encode(&mut body);
    frame::encode(0, number, KIND_SEGMENT, &body.0)
}

fn manifest(identity: Identity, segments: &[u64]) -> Vec<u8> {
    let mut body = Encoder::default();
    frame::encode_identity(&mut body, identity);
    body.u32(u32::try_from(segments.len()).unwrap_or(u32::MAX));
    for first in segments {
        body.u64(*first);
    }
    frame::encode(0, 0, KIND_MANIFEST, &body.0)
}

/// A file that is there whole or not at all.
fn write_file(disk: &mut dyn Disk, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = format!("tmp-{name}");
    match disk.remove(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    disk.append(&temporary, bytes)?;
    disk.sync(&temporary)?;
    disk.rename(&temporary, name)?;
    disk.sync_dir()
}

impl Backend for Directory {
    fn write(&mut self, record: &Record, image: &Image) -> Result<(), StorageFailure> {
        if let Record::Snapshot(snapshot) = record {
            return self.save_snapshot(snapshot);
        }
        if self.tail_bytes >= self.segment_bytes_max {
            self.roll(image)?;
        }
        let mut body = Encoder::default();
        record.encode(&mut body);
        self.append(record.kind(), &body.0)?;
        match record {
            Record::Append { entries, .. } => {
                let last = entries.last().map(|e| e.log_id.index);
                if let Some(tail) = self.segments.last_mut() {
                    tail.index_max = tail.index_max.max(last);
                }
            }
            Record::Purge { upto } => self.drop_segments(upto.index)?,
            Record::State { .. } | Record::Vote(_) | Record::Truncate { .. } | Record::Snapshot(_) => {}
        }
        Ok(())
    }

    fn pressed(&self, image: &Image) -> bool {
        image.log_bytes > LOG_BYTES_PRESSED
    }
}

impl Directory {
    fn failure(&self, verb: &str, name: &str, error: &io::Error) -> StorageFailure {
        StorageFailure::new(format!("cannot {verb} {}/{name}", self.disk.place()), error)
    }

    fn append(&mut self, kind: u8, body: &[u8]) -> Result<(), StorageFailure> {
        let name = segment_name(self.segments.last().map_or(1, |s| s.first));
        let bytes = frame::encode(self.tail_bytes, self.next_frame, kind, body);
        self.disk.append(&name, &bytes).map_err(|e| self.failure("write", &name, &e))?;
        self.disk.sync(&name).map_err(|e| self.failure("sync", &name, &e))?;
        self.next_frame += 1;
        self.tail_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Makes a snapshot durable, then removes the one before.
    fn save_snapshot(&mut self, snapshot: &StoredSnapshot) -> Result<(), StorageFailure> {
        let mut body = Encoder::default();
        frame::encode_identity(&mut body, self.identity);
        snapshot.encode(&mut body);
        let new = self.snapshot + 1;
        let name = snapshot_name(new);
        write_file(&mut *self.disk, &name, &frame::encode(0, new, KIND_SNAPSHOT, &body.0))
            .map_err(|e| self.failure("write", &name, &e))?;
        let old = std::mem::replace(&mut self.snapshot, new);
        if old > 0 {
            let name = snapshot_name(old);
            self.disk.remove(&name).map_err(|e| self.failure("remove", &name, &e))?;
        }
        Ok(())
    }

    /// Begins a new segment.
    fn roll(&mut self, image: &Image) -> Result<(), StorageFailure> {
        let first = self.next_frame;
        let start = segment_start(first, self.identity, image);
        let name = segment_name(first);
        write_file(&mut *self.disk, &name, &start).map_err(|e| self.failure("write", &name, &e))?;
        self.segments.push(Segment { first, index_max: None });
        self.write_manifest()?;
        self.next_frame += 1;
        self.tail_bytes = start.len() as u64;
        Ok(())
    }

    fn write_manifest(&mut self) -> Result<(), StorageFailure> {
        let firsts: Vec<u64> = self.segments.iter().map(|s| s.first).collect();
        write_file(&mut *self.disk, MANIFEST, &manifest(self.identity, &firsts))
            .map_err(|e| self.failure("write", MANIFEST, &e))
    }

    /// Removes the oldest segments, as far as they hold nothing but purged entries. What else was in them stands
    /// in the first frame of the segment after.
    fn drop_segments(&mut self, purged: u64) -> Result<(), StorageFailure> {
        let older = self.segments.len() - 1;
        let gone =
            self.segments[..older].iter().take_while(|s| s.index_max.is_none_or(|max| max <= purged)).count();
        if gone == 0 {
            return Ok(());
        }
        let removed: Vec<Segment> = self.segments.drain(..gone).collect();
        self.write_manifest()?;
        for segment in removed {
            let name = segment_name(segment.first);
            self.disk.remove(&name).map_err(|e| self.failure("remove", &name, &e))?;
        }
        Ok(())
    }
}

/// [`open`] on any disk.
///
/// # Errors
/// As [`open`].
pub fn open_on(disk: Box<dyn Disk>, identity: Identity) -> Result<OpenStorage, OpenError> {
    open_with(disk, identity, SEGMENT_BYTES_MAX)
}

pub(crate) fn open_with(
    disk: Box<dyn Disk>,
    identity: Identity,
    segment_bytes_max: u64,
) -> Result<OpenStorage, OpenError> {
    let place = disk.place();
    let mut reader = Reader { disk, place, identity, image: Image::default(), warnings: Vec::new() };
    let names = reader.disk.list().map_err(|e| OpenError::io(format!("cannot list {}", reader.place), &e))?;
    if !names.iter().any(|n| n == MANIFEST) {
        return Err(if names.iter().any(|n| n.starts_with("log-") || n.starts_with("snapshot-")) {
            OpenError::damaged(
                &reader.path(MANIFEST),
                "the whole file",
                "it is missing, though others are there",
            )
        } else {
            OpenError::NotFormatted { place: reader.place }
        });
    }
    let firsts = reader.read_manifest()?;
    reader.tidy(&names, &firsts)?;
    let snapshot = reader.read_newest_snapshot(&names)?;
    let mut segments = Vec::new();
    let mut next_frame = firsts.first().copied().unwrap_or(1);
    let mut tail_bytes = 0;
    for (i, first) in firsts.iter().enumerate() {
        let last = i + 1 == firsts.len();
        let (segment, bytes) = reader.read_segment(*first, &mut next_frame, last)?;
        segments.push(segment);
        tail_bytes = bytes;
    }
    let whole = reader.place.clone();
    reader.image.check().map_err(|e| OpenError::damaged(&whole, "the log as a whole", e))?;
    let Reader { disk, image, warnings, .. } = reader;
    let backend = Directory { disk, identity, segments, tail_bytes, next_frame, snapshot, segment_bytes_max };
    Ok(OpenStorage { backend: Box::new(backend), image, identity, warnings })
}

/// Reads a directory back.
struct Reader {
    disk: Box<dyn Disk>,
    place: String,
    identity: Identity,
    image: Image,
    warnings: Vec<String>,
}

impl Reader {
    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.place)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, OpenError> {
        self.disk.read(name).map_err(|e| {
            if e.kind() == io::ErrorKind::NotFound {
                OpenError::damaged(&self.path(name), "the whole file", "it is missing")
            } else {
                OpenError::io(format!("cannot read {}", self.path(name)), &e)
            }
        })
    }

    /// The only frame of a file that is written whole.
    fn only_frame<'a>(&self, name: &str, file: &'a [u8], kind: u8) -> Result<&'a [u8], OpenError> {
        match frame::decode(file, 0) {
            Ok(frame) if frame.kind == kind && frame.len == file.len() => Ok(frame.body),
            Ok(_) => {
                Err(OpenError::damaged(&self.path(name), "its only record", "it is not what must stand here"))
            }
            Err(Unreadable::Torn) => Err(OpenError::damaged(
                &self.path(name),
                "its only record",
                "it is cut off, though it was synced",
            )),
            Err(Unreadable::Damaged(why)) => {
                Err(OpenError::damaged(&self.path(name), "its only record", why))
            }
        }
    }

    fn check_identity(&self, name: &str, input: &mut Decoder<'_>) -> Result<(), OpenError> {
        let bad = |e: Malformed| OpenError::damaged(&self.path(name), "its first record", e);
        let (format, found) = frame::decode_identity(input).map_err(bad)?;
        if format > FORMAT {
            return Err(OpenError::Newer { place: self.path(name), found: format });
        }
        if found != self.identity {
            return Err(OpenError::Foreign { place: self.path(name), found, wanted: self.identity });
        }
        Ok(())
    }

    fn read_manifest(&self) -> Result<Vec<u64>, OpenError> {
        let file = self.read(MANIFEST)?;
        let mut input = Decoder::new(self.only_frame(MANIFEST, &file, KIND_MANIFEST)?);
        self.check_identity(MANIFEST, &mut input)?;
        let bad = |e: Malformed| OpenError::damaged(&self.path(MANIFEST), "its only record", e);
        let count = input.u32().map_err(bad)?;
        let firsts: Vec<u64> = (0..count).map(|_| input.u64()).collect::<Result<_, _>>().map_err(bad)?;
        input.finish().map_err(bad)?;
        if firsts.is_empty() || !firsts.is_sorted_by(|a, b| a < b) {
            return Err(bad(Malformed("the list of segments is empty or not in order".to_owned())));
        }
        Ok(firsts)
    }

    /// Removes what an interrupted step left: temporary files, segments that are not in the manifest yet or any
    /// more, snapshots older than the newest.
    fn tidy(&mut self, names: &[String], firsts: &[u64]) -> Result<(), OpenError> {
        let newest = newest_snapshot(names);
        for name in names {
            let segment = number_in(name, "log-", ".seg").is_some_and(|n| !firsts.contains(&n));
            let snapshot = number_in(name, "snapshot-", ".snap").is_some_and(|n| n < newest);
            if segment || snapshot || name.starts_with("tmp-") {
                self.disk
                    .remove(name)
                    .map_err(|e| OpenError::io(format!("cannot remove {}", self.path(name)), &e))?;
                self.warnings.push(format!("{}: removed, a crash left it over", self.path(name)));
            }
        }
        Ok(())
    }

    fn read_newest_snapshot(&mut self, names: &[String]) -> Result<u64, OpenError> {
        let number = newest_snapshot(names);
        if number > 0 {
            let name = snapshot_name(number);
            let file = self.read(&name)?;
            let mut input = Decoder::new(self.only_frame(&name, &file, KIND_SNAPSHOT)?);
            self.check_identity(&name, &mut input)?;
            let bad = |e: Malformed| OpenError::damaged(&self.path(&name), "its only record", e);
            let snapshot = StoredSnapshot::decode(&mut input).map_err(bad)?;
            input.finish().map_err(bad)?;
            self.image.snapshot = Some(snapshot);
        }
        Ok(number)
    }

    fn read_segment(
        &mut self,
        first: u64,
        next_frame: &mut u64,
        last: bool,
    ) -> Result<(Segment, u64), OpenError> {
        let name = segment_name(first);
        let file = self.read(&name)?;
        let mut segment = Segment { first, index_max: None };
        let mut at = 0;
        while at < file.len() {
            let record = format!("record {next_frame} at byte {at}");
            let frame = match frame::decode(&file, at) {
                Ok(frame) => frame,
                // The first frame was synced before the segment was used.
                Err(Unreadable::Torn) if last && at > 0 => {
                    self.cut(&name, at, file.len())?;
                    break;
                }
                Err(Unreadable::Torn) => {
                    return Err(OpenError::damaged(
                        &self.path(&name),
                        record,
                        "it is cut off, though more follows",
                    ));
                }
                Err(Unreadable::Damaged(why)) => {
                    return Err(OpenError::damaged(&self.path(&name), record, why));
                }
            };
            if frame.number != *next_frame {
                let problem = format!("record {} stands where {next_frame} must stand", frame.number);
                return Err(OpenError::damaged(&self.path(&name), record, problem));
            }
            self.replay(&name, at, frame.kind, frame.body, &mut segment).map_err(|e| match e {
                Replay::Open(e) => e,
                Replay::Malformed(e) => OpenError::damaged(&self.path(&name), record, e),
            })?;
            *next_frame += 1;
            at += frame.len;
        }
        if at == 0 {
            return Err(OpenError::damaged(&self.path(&name), "its first record", "the file is empty"));
        }
        Ok((segment, at as u64))
    }

    fn replay(
        &mut self,
        name: &str,
        at: usize,
        kind: u8,
        body: &[u8],
        segment: &mut Segment,
    ) -> Result<(), Replay> {
        if (kind == KIND_SEGMENT) != (at == 0) {
            return Err(
                Malformed("the beginning of a segment must stand there, and only there".to_owned()).into()
            );
        }
        if kind == KIND_SEGMENT {
            let mut input = Decoder::new(body);
            self.check_identity(name, &mut input).map_err(Replay::Open)?;
            // Identity is 28 bytes; the state record is what follows.
            let state = Record::decode(1, body.get(28..).unwrap_or_default())?;
            return Ok(self.image.apply(state)?);
        }
        let record = Record::decode(kind, body)?;
        if let Record::Append { entries, .. } = &record {
            segment.index_max = segment.index_max.max(entries.last().map(|e| e.log_id.index));
        }
        Ok(self.image.apply(record)?)
    }

    /// Takes away what a crash in mid append left, so that the next record does not stand behind it.
    fn cut(&mut self, name: &str, at: usize, len: usize) -> Result<(), OpenError> {
        let path = self.path(name);
        let failed = |e: io::Error| OpenError::io(format!("cannot cut {path}"), &e);
        self.disk.truncate(name, at as u64).map_err(failed)?;
        self.disk.sync(name).map_err(failed)?;
        self.warnings.push(format!(
            "{path}: {} bytes at the end (from byte {at}) are a record that a crash cut off; it was never \
             acknowledged and is dropped",
            len - at
        ));
        Ok(())
    }
}

fn newest_snapshot(names: &[String]) -> u64 {
    names.iter().filter_map(|n| number_in(n, "snapshot-", ".snap")).max().unwrap_or(0)
}

enum Replay {
    Open(OpenError),
    Malformed(Malformed),
}

impl From<Malformed> for Replay {
    fn from(e: Malformed) -> Self {
        Replay::Malformed(e)
    }
}
