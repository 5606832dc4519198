//! Both storages: openraft's own suite, crashes at any call, faults, damage.

use super::faulty::{Fault, FaultyBlocks, FaultyDisk};
use super::{OpenError, OpenStorage, StorageFailure, blocks, directory};
use crate::cluster_tests::machine::ListMachine;
use crate::image::{Image, Record, StoredSnapshot};
use crate::machine::Machine;
use crate::store::{LogStore, Store};
use crate::types::{Command, Entry, Identity, LogId, SnapshotMeta, StorageError, TypeConfig, Vote};
use openraft::testing::{StoreBuilder, Suite};
use openraft::{CommittedLeaderId, EntryPayload};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io;
use std::sync::Arc;

fn me() -> Identity {
    Identity { cluster: uuid::Uuid::from_u128(0xC5F5), voter: 3 }
}

fn somebody_else() -> Identity {
    Identity { voter: 4, ..me() }
}

struct OnDirectory;

impl StoreBuilder<TypeConfig, LogStore, Machine, tempfile::TempDir> for OnDirectory {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Machine), StorageError> {
        let dir = tempfile::tempdir().unwrap();
        directory::create(dir.path(), me()).unwrap();
        let (log, machine) = pair(directory::open(dir.path(), me()).unwrap());
        Ok((dir, log, machine))
    }
}

struct OnBlocks;

impl StoreBuilder<TypeConfig, LogStore, Machine, ()> for OnBlocks {
    async fn build(&self) -> Result<((), LogStore, Machine), StorageError> {
        let mut region = FaultyBlocks::new(4 << 20);
        blocks::format(&mut region, me()).unwrap();
        let (log, machine) = pair(blocks::open(Box::new(region), me()).unwrap());
        Ok(((), log, machine))
    }
}

fn pair(storage: OpenStorage) -> (LogStore, Machine) {
    let store = Store::new(storage);
    let machine = Machine::new(store.clone(), Box::new(ListMachine::default())).unwrap();
    (LogStore(store), machine)
}

#[test]
fn openraft_suite_on_a_directory() {
    Suite::test_all(OnDirectory).unwrap();
}

#[test]
fn openraft_suite_on_blocks() {
    Suite::test_all(OnBlocks).unwrap();
}

/// A medium that can be opened again and again.
#[derive(Clone)]
enum Medium {
    Disk(FaultyDisk),
    Blocks(FaultyBlocks),
}

/// Small, so that segments and areas change often.
const SEGMENT_BYTES: u64 = 20_000;
const REGION_BYTES: usize = 64 * 4096;

impl Medium {
    fn disk() -> Self {
        let mut disk = FaultyDisk::default();
        directory::create_on(&mut disk, me()).unwrap();
        Medium::Disk(disk)
    }

    fn blocks() -> Self {
        let mut region = FaultyBlocks::new(REGION_BYTES);
        blocks::format_any(&mut region, me()).unwrap();
        Medium::Blocks(region)
    }

    fn open(&self) -> Result<OpenStorage, OpenError> {
        match self {
            Medium::Disk(disk) => directory::open_with(Box::new(disk.clone()), me(), SEGMENT_BYTES),
            Medium::Blocks(region) => blocks::open(Box::new(region.clone()), me()),
        }
    }

    fn set_fault(&self, after_calls: u64, fault: Fault) {
        match self {
            Medium::Disk(disk) => disk.set_fault(after_calls, fault),
            Medium::Blocks(region) => region.set_fault(after_calls, fault),
        }
    }

    fn crash(&self, seed: u64) {
        match self {
            Medium::Disk(disk) => disk.crash(seed),
            Medium::Blocks(region) => region.crash(seed),
        }
    }
}

fn entry(term: u64, index: u64, len: usize) -> Entry {
    let log_id = LogId::new(CommittedLeaderId::new(term, 1), index);
    let fill = index.to_le_bytes()[0];
    Entry { log_id, payload: EntryPayload::Normal(Command::new(&vec![fill; len])) }
}

/// A record that may follow, as openraft would write it.
fn next_record(rng: &mut StdRng, image: &Image) -> Record {
    let next = |id: Option<LogId>| id.map_or(0, |id| id.index + 1);
    let term = image.vote.map_or(0, |vote| vote.leader_id.term);
    let snapshot = image.snapshot.as_ref().and_then(|s| s.meta.last_log_id);
    let choice = if term == 0 { 60 } else { rng.random_range(0..100) };
    match choice {
        60..70 => Record::Vote(Vote::new(term + 1, rng.random_range(1..4))),
        70..78 if !image.entries.is_empty() => {
            let least = next(snapshot).max(next(image.committed)).max(next(image.purged));
            Record::Truncate { from: rng.random_range(least..=next(image.last_log_id()).max(least)) }
        }
        78..88 if image.last_log_id() > snapshot => Record::Snapshot(StoredSnapshot {
            meta: SnapshotMeta {
                last_log_id: image.last_log_id(),
                snapshot_id: rng.random::<u64>().to_string(),
                ..SnapshotMeta::default()
            },
            data: Arc::new(vec![7; rng.random_range(0..20_000)]),
        }),
        88..100 if snapshot > image.purged => {
            let covered: Vec<LogId> =
                image.entries.iter().map(|e| e.log_id).filter(|id| Some(*id) <= snapshot).collect();
            match covered.as_slice() {
                [] => Record::Purge { upto: snapshot.unwrap() },
                ids => Record::Purge { upto: ids[rng.random_range(0..ids.len())] },
            }
        }
        _ => {
            let first = next(image.last_log_id());
            let count = rng.random_range(1..4);
            let entries = (first..first + count).map(|i| entry(term, i, rng.random_range(0..5000))).collect();
            Record::Append { committed: image.committed, entries }
        }
    }
}

fn write(storage: &mut OpenStorage, record: Record) -> Result<(), StorageFailure> {
    storage.backend.write(&record, &storage.image)?;
    storage.image.apply(record).unwrap();
    if let Some(snapshot) = &storage.image.snapshot {
        // What a snapshot holds is committed.
        storage.image.committed = storage.image.committed.max(snapshot.meta.last_log_id);
    }
    Ok(())
}

/// The commit index becomes durable with the next entries only.
fn but_committed(image: &Image) -> Image {
    Image { committed: None, ..image.clone() }
}

/// Writes until the fault comes and returns what was acknowledged, and what would be there with the record that
/// was under way.
fn run_until_fault(rng: &mut StdRng, storage: &mut OpenStorage) -> (Image, Image) {
    for _ in 0..200 {
        let before = storage.image.clone();
        let record = next_record(rng, &before);
        if write(storage, record.clone()).is_err() {
            let mut after = before.clone();
            after.apply(record).unwrap();
            return (before, after);
        }
    }
    (storage.image.clone(), storage.image.clone())
}

fn survives(medium: &Medium, seed: u64, fault: Fault) -> Result<(), TestCaseError> {
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..3 {
        let mut storage = medium.open().unwrap();
        medium.set_fault(rng.random_range(1..150), fault);
        let (before, after) = run_until_fault(&mut rng, &mut storage);
        drop(storage);
        medium.crash(rng.random());
        // The power goes once more while it is being opened.
        medium.set_fault(rng.random_range(1..4), Fault::Crash);
        let opened = medium.open();
        drop(opened);
        medium.crash(rng.random());
        let found = medium.open().map_err(|e| TestCaseError::fail(format!("round {round}: {e}")))?.image;
        let found = but_committed(&found);
        prop_assert!(
            found == but_committed(&before) || found == but_committed(&after),
            "round {round}: acknowledged up to {:?}, found {:?}",
            before.last_log_id(),
            found.last_log_id()
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn a_directory_survives_a_crash_at_any_call(seed in any::<u64>()) {
        survives(&Medium::disk(), seed, Fault::Crash)?;
    }

    #[test]
    fn blocks_survive_a_crash_at_any_call(seed in any::<u64>()) {
        survives(&Medium::blocks(), seed, Fault::Crash)?;
    }

    #[test]
    fn a_directory_survives_a_full_disk(seed in any::<u64>()) {
        survives(&Medium::disk(), seed, Fault::Error(io::ErrorKind::StorageFull))?;
    }

    #[test]
    fn a_flipped_bit_is_refused_or_does_no_harm(seed in any::<u64>()) {
        let mut rng = StdRng::seed_from_u64(seed);
        let disk = FaultyDisk::default();
        directory::create_on(&mut disk.clone(), me()).unwrap();
        let medium = Medium::Disk(disk.clone());
        let mut storage = medium.open().unwrap();
        for _ in 0..rng.random_range(1..30) {
            let record = next_record(&mut rng, &storage.image);
            write(&mut storage, record).unwrap();
        }
        drop(storage);
        let good = medium.open().unwrap().image;
        let names = super::disk::Disk::list(&disk).unwrap();
        for _ in 0..30 {
            let bad = disk.copy();
            let name = &names[rng.random_range(0..names.len())];
            let bits = super::disk::Disk::read(&bad, name).unwrap().len() * 8;
            bad.flip(name, rng.random_range(0..bits));
            match Medium::Disk(bad).open() {
                Ok(opened) => prop_assert_eq!(&opened.image, &good, "in {}", name),
                Err(e) => prop_assert!(e.to_string().contains(name.as_str()), "{} in {}", e, name),
            }
        }
    }

    #[test]
    fn a_flipped_bit_of_a_region_is_refused_or_does_no_harm(seed in any::<u64>()) {
        let mut rng = StdRng::seed_from_u64(seed);
        let Medium::Blocks(region) = Medium::blocks() else { unreachable!() };
        let medium = Medium::Blocks(region.clone());
        let mut storage = medium.open().unwrap();
        for _ in 0..rng.random_range(1..10) {
            let record = next_record(&mut rng, &storage.image);
            if write(&mut storage, record).is_err() {
                break;
            }
        }
        drop(storage);
        let good = medium.open().unwrap().image;
        for _ in 0..20 {
            let bad = region.copy();
            bad.flip(rng.random_range(0..REGION_BYTES * 8));
            match Medium::Blocks(bad).open() {
                Ok(opened) => prop_assert_eq!(&opened.image, &good),
                Err(e) => prop_assert!(e.to_string().contains("cluster rejoin"), "{}", e),
            }
        }
    }
}

/// CSV_TEST_FULL=1 makes it long.
fn cases() -> u32 {
    if std::env::var_os("CSV_TEST_FULL").is_some() { 5000 } else { 150 }
}

fn filled_disk() -> FaultyDisk {
    let disk = FaultyDisk::default();
    directory::create_on(&mut disk.clone(), me()).unwrap();
    let mut storage = Medium::Disk(disk.clone()).open().unwrap();
    write(&mut storage, Record::Vote(Vote::new(1, 1))).unwrap();
    for i in 0..40 {
        let entries = vec![entry(1, i, 1000)];
        write(&mut storage, Record::Append { committed: None, entries }).unwrap();
    }
    let meta = SnapshotMeta { last_log_id: Some(entry(1, 30, 0).log_id), ..SnapshotMeta::default() };
    write(&mut storage, Record::Snapshot(StoredSnapshot { meta, data: Arc::new(vec![1; 5000]) })).unwrap();
    write(&mut storage, Record::Purge { upto: entry(1, 10, 0).log_id }).unwrap();
    disk
}

#[test]
fn a_missing_file_is_refused_by_name() {
    let disk = filled_disk();
    let names = super::disk::Disk::list(&disk).unwrap();
    assert!(names.len() >= 4, "{names:?}");
    for name in names {
        let bad = disk.copy();
        bad.delete(&name);
        let error = Medium::Disk(bad).open().unwrap_err();
        assert!(matches!(error, OpenError::Damaged { .. }), "{name}: {error}");
        assert!(error.to_string().contains("csvctl cluster rejoin"), "{error}");
    }
}

#[test]
fn the_error_names_file_and_record() {
    let disk = filled_disk();
    let names = super::disk::Disk::list(&disk).unwrap();
    let segment = names.iter().find(|n| n.starts_with("log-")).unwrap();
    disk.flip(segment, 500 * 8);
    let error = Medium::Disk(disk).open().unwrap_err().to_string();
    assert!(error.contains(segment) && error.contains("record 3 at byte"), "{error}");
}

#[test]
fn an_empty_or_foreign_place_is_refused() {
    let disk = FaultyDisk::default();
    let open = |disk: &FaultyDisk, who| directory::open_on(Box::new(disk.clone()), who);
    assert!(matches!(open(&disk, me()), Err(OpenError::NotFormatted { .. })));
    directory::create_on(&mut disk.clone(), me()).unwrap();
    assert!(matches!(open(&disk, somebody_else()), Err(OpenError::Foreign { .. })));
    assert!(matches!(directory::create_on(&mut disk.clone(), me()), Err(OpenError::NotEmpty { .. })));

    let mut region = FaultyBlocks::new(4 << 20);
    let open = |region: &FaultyBlocks, who| blocks::open(Box::new(region.clone()), who);
    assert!(matches!(open(&region, me()), Err(OpenError::NotFormatted { .. })));
    blocks::format(&mut region, me()).unwrap();
    assert!(matches!(open(&region, somebody_else()), Err(OpenError::Foreign { .. })));
    assert!(matches!(blocks::format(&mut region, me()), Err(OpenError::NotEmpty { .. })));
    let mut small = FaultyBlocks::new(1 << 20);
    assert!(matches!(blocks::format(&mut small, me()), Err(OpenError::TooSmall { .. })));
}

#[test]
fn a_directory_is_opened_once_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    directory::create(dir.path(), me()).unwrap();
    let first = directory::open(dir.path(), me()).unwrap();
    assert!(matches!(directory::open(dir.path(), me()), Err(OpenError::Busy { .. })));
    drop(first);
    directory::open(dir.path(), me()).unwrap();
}

#[test]
fn a_region_goes_on_for_ever() {
    let Medium::Blocks(region) = Medium::blocks() else { unreachable!() };
    let medium = Medium::Blocks(region);
    let mut storage = medium.open().unwrap();
    for term in 1..500 {
        write(&mut storage, Record::Vote(Vote::new(term, 1))).unwrap();
    }
    let image = storage.image.clone();
    drop(storage);
    assert_eq!(medium.open().unwrap().image, image);
}

/// What is left of a record of several slots must not be taken for the rest of a shorter one that is written there.
#[test]
fn a_short_record_in_place_of_a_torn_long_one() {
    for seed in 0..60 {
        for medium in [Medium::blocks(), Medium::disk()] {
            let mut storage = medium.open().unwrap();
            write(&mut storage, Record::Vote(Vote::new(1, 1))).unwrap();
            medium.set_fault(1, Fault::Crash);
            let entries = vec![entry(1, 0, 9000)];
            write(&mut storage, Record::Append { committed: None, entries }).unwrap_err();
            drop(storage);
            medium.crash(seed);
            let mut storage = medium.open().unwrap();
            write(&mut storage, Record::Vote(Vote::new(2, 1))).unwrap();
            let image = storage.image.clone();
            drop(storage);
            assert_eq!(medium.open().unwrap().image, image, "seed {seed}");
        }
    }
}

/// The same for what a crash left of an area that was not taken into use.
#[test]
fn an_area_is_written_again_after_a_crash() {
    for seed in 0..60 {
        let medium = Medium::blocks();
        let mut storage = medium.open().unwrap();
        write(&mut storage, Record::Vote(Vote::new(1, 1))).unwrap();
        write(&mut storage, Record::Append { committed: None, entries: vec![entry(1, 0, 30_000)] }).unwrap();
        let snapshot = |len| {
            let meta = SnapshotMeta { last_log_id: Some(entry(1, 0, 0).log_id), ..SnapshotMeta::default() };
            Record::Snapshot(StoredSnapshot { meta, data: Arc::new(vec![5; len]) })
        };
        medium.set_fault(2 + seed % 3, Fault::Crash);
        write(&mut storage, snapshot(40_000)).unwrap_err();
        drop(storage);
        medium.crash(seed);
        let mut storage = medium.open().unwrap();
        write(&mut storage, Record::Purge { upto: entry(1, 0, 0).log_id }).unwrap();
        write(&mut storage, snapshot(10)).unwrap();
        for term in 2..5 {
            write(&mut storage, Record::Vote(Vote::new(term, 1))).unwrap();
        }
        let image = storage.image.clone();
        drop(storage);
        assert_eq!(but_committed(&medium.open().unwrap().image), but_committed(&image), "seed {seed}");
    }
}

#[test]
fn a_full_region_says_so_and_keeps_what_it_has() {
    let medium = Medium::blocks();
    let mut storage = medium.open().unwrap();
    write(&mut storage, Record::Vote(Vote::new(1, 1))).unwrap();
    let mut index = 0;
    let failure = loop {
        let entries = vec![entry(1, index, 9000)];
        match write(&mut storage, Record::Append { committed: None, entries }) {
            Ok(()) => index += 1,
            Err(failure) => break failure,
        }
    };
    assert!(matches!(failure, StorageFailure::Full { .. }), "{failure}");
    assert!(index > 5, "{index}");
    let image = storage.image.clone();
    drop(storage);
    assert_eq!(medium.open().unwrap().image, image);
}
