//! Nodes are loop devices on one file, as in the lab. Without root these tests say that they were skipped.

use super::*;
use crate::testutil::{LoopDevice, Mounted, RegistryFile, lun_file, run};
use crate::{AlignedBuf, IoOp, Lun, LunError, LunOptions, Ring};
use csv_types::LunOffset;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::collections::VecDeque;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Barrier, mpsc};

const WERO: ReservationType = ReservationType::WriteExclusiveRegistrantsOnly;
const KEYS: [u64; 2] = [0xa1, 0xb2];

/// Two nodes with a path each to one file; both registered, the reservation is node 1's (the victim's).
struct Pair {
    devices: [LoopDevice; 2],
    nodes: [Reservations; 2],
    registry: RegistryFile,
}

impl Pair {
    fn new(bytes: u64) -> Option<Pair> {
        let Some(first) = LoopDevice::new(bytes, 512) else {
            eprintln!("skipped: loop devices need root");
            return None;
        };
        let second = first.second();
        let registry = RegistryFile::of(first.backing());
        let nodes = [&first, &second].map(|device| Reservations::open(device.path()).unwrap());
        let pair = Pair { devices: [first, second], nodes, registry };
        pair.join();
        Some(pair)
    }

    fn join(&self) {
        for (node, key) in self.nodes.iter().zip(KEYS) {
            assert!(node.ensure_registered(key).unwrap().aptpl);
        }
        self.nodes[1].ensure_reserved(KEYS[1]).unwrap();
    }

    fn fence_second(&self) -> FenceReport {
        self.nodes[0].fence(KEYS[0], &[KEYS[1]]).unwrap()
    }

    fn lun(&self, node: usize) -> Lun {
        let lun = Lun::open(self.devices[node].path(), LunOptions::default()).unwrap();
        lun.set_reservation_key(Some(KEYS[node]));
        lun
    }

    /// Of everything that is in the file.
    fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        hasher.write(&fs::read(self.devices[0].backing()).unwrap());
        hasher.finish()
    }
}

#[test]
fn a_fence_takes_the_victims_access_and_its_reservation() {
    let Some(pair) = Pair::new(1 << 20) else { return };
    let luns = [pair.lun(0), pair.lun(1)];
    let buf = AlignedBuf::new(4096);
    for lun in &luns {
        lun.write_at(&buf, 4096, LunOffset(0)).unwrap();
    }
    assert_eq!(pair.nodes[0].check_fenced(KEYS[1]), Ok(FencedState::Registered));
    let report = pair.fence_second();
    let victim = VictimReport { key: KEYS[1], outcome: VictimOutcome::Aborted };
    assert_eq!(report.victims, [victim]);
    assert_eq!(report.holder, Some(Holder { key: KEYS[0], kind: WERO }));
    assert_eq!(report.keys.unwrap().keys, [KEYS[0]]);
    assert_eq!(pair.nodes[0].check_fenced(KEYS[1]), Ok(FencedState::Fenced));
    assert_eq!((pair.nodes[0].verify(KEYS[0]), pair.nodes[1].verify(KEYS[1])), (Ok(true), Ok(false)));

    luns[0].write_at(&buf, 4096, LunOffset(0)).unwrap();
    let error = luns[1].write_at(&buf, 4096, LunOffset(0)).unwrap_err();
    assert!(Lun::is_conflict(&error) && !error.is_path_failure(), "{error}");
    let mut into = AlignedBuf::new(4096);
    assert!(luns[1].read_at(&mut into, 4096, LunOffset(0)).unwrap_err().is_fenced());
    assert!(luns[1].check_capacity().unwrap_err().is_fenced());
    let error = Lun::open(pair.devices[1].path(), LunOptions::default()).unwrap_err();
    assert!(matches!(error, LunError::Fenced { op: IoOp::Open, .. }), "{error}");

    // Again, and by the one that is out.
    let report = pair.fence_second();
    assert_eq!(report.victims, [VictimReport { key: KEYS[1], outcome: VictimOutcome::NotRegistered }]);
    let error = pair.nodes[1].fence(KEYS[1], &[KEYS[0]]).unwrap_err();
    assert!(matches!(error, ReservationError::Fatal { .. }), "{error}");
    assert!(pair.nodes[1].ensure_reserved(KEYS[1]).is_ok(), "a reservation of others will do");
    assert!(pair.nodes[1].preempt(KEYS[1], KEYS[0], WERO, true).unwrap_err().is_conflict());

    pair.nodes[1].ensure_registered(KEYS[1]).unwrap();
    luns[1].write_at(&buf, 4096, LunOffset(0)).unwrap();
    assert_eq!(luns[1].check_capacity(), Ok(1 << 20));
    let name = pair.devices[1].path().file_name().unwrap().to_str().unwrap();
    let dio = fs::read_to_string(format!("/sys/block/{name}/loop/dio")).unwrap();
    assert_eq!(dio.trim(), "1", "direct I/O must outlast a fence");
}

#[test]
fn a_broken_path_is_no_conflict_while_the_key_is_registered() {
    let Some(pair) = Pair::new(1 << 20) else { return };
    let lun = pair.lun(1);
    let at = LunOffset(4096);
    assert!(lun.io_error(IoOp::Write, at, rustix::io::Errno::IO).is_path_failure());
    lun.set_reservation_key(Some(0x77));
    assert!(lun.io_error(IoOp::Write, at, rustix::io::Errno::IO).is_fenced());
    assert!(lun.io_error(IoOp::Write, at, rustix::io::Errno::NODEV).is_path_failure());
}

/// Writes one place of the LUN as node 1, as deep as it can, until it cannot. `tell` gets the number of writes sent.
fn write_deep(pair: &Pair, len: usize, tell: &mpsc::Sender<u64>) -> LunError {
    let mut ring = Ring::new(Arc::new(pair.lun(1)), 64).unwrap();
    let (mut count, mut done) = (0_u64, VecDeque::new());
    let mut failed = None;
    while failed.is_none() || ring.in_flight() > 0 {
        while ring.has_room() && failed.is_none() {
            match ring.write(count, AlignedBuf::new(len), len, LunOffset(0)) {
                Ok(()) => count += 1,
                Err(refused) => failed = Some(refused.error),
            }
        }
        ring.wait().unwrap();
        ring.completions(&mut done).unwrap();
        for one in done.drain(..) {
            failed = failed.or(one.result.err());
        }
        let _ = tell.send(count);
    }
    failed.unwrap()
}

/// What is queued when the fence comes lands before it returns, or never. With one step instead of the two of
/// `Attached::cut_off` this finds writes that come later.
#[test]
fn no_queued_write_lands_after_a_fence() {
    const LEN: usize = 512 << 10;
    const ROUNDS: usize = 10;
    let Some(pair) = Pair::new(64 << 20) else { return };
    let survivor = pair.lun(0);
    let mut marker = AlignedBuf::new(LEN);
    marker.fill(0x5a);
    for _ in 0..ROUNDS {
        let (tell, told) = mpsc::channel();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| write_deep(&pair, LEN, &tell));
            // Until the writer is well under way.
            while told.recv().unwrap() < 200 {}
            pair.fence_second();
            survivor.write_at(&marker, LEN, LunOffset(0)).unwrap();
            let error = writer.join().unwrap();
            assert!(error.is_fenced(), "{error}");
        });
        let mut now = AlignedBuf::new(LEN);
        survivor.read_at(&mut now, LEN, LunOffset(0)).unwrap();
        assert!(now[..] == marker[..], "a write of the victim landed after the fence");
        pair.join();
    }
}

/// Not a test: the process of a node that writes until it cannot. Run by `Writer`.
#[test]
#[ignore = "run by the tests that need a process of its own"]
fn writer_process() {
    let Ok(device) = std::env::var("CSV_TEST_WRITER") else { return };
    let lun = Lun::open(Path::new(&device), LunOptions::default()).unwrap();
    let mut buf = AlignedBuf::new(65536);
    for count in 0_u64.. {
        buf[..8].copy_from_slice(&count.to_le_bytes());
        match lun.write_at(&buf, 65536, LunOffset(count % 16 * 65536)) {
            Ok(()) if count == 100 => println!("\nwriter: under way"),
            Ok(()) => {}
            Err(error) => {
                println!("\nwriter: fenced {}", error.is_fenced());
                break;
            }
        }
    }
    std::io::stdout().flush().unwrap();
}

struct Writer {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Writer {
    fn start(device: &Path) -> Writer {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["reservation::tests::writer_process", "--exact", "--ignored", "--nocapture"])
            .env("CSV_TEST_WRITER", device)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Writer { child, output }
    }

    /// The next thing it says.
    fn says(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the writer ended without a word");
            if let Some(text) = line.strip_prefix("writer: ") {
                return text.trim().to_owned();
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
        if signal == Signal::STOP {
            let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
            assert!(status.stopped());
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_frozen_process_that_wakes_up_after_its_fence_cannot_write() {
    let Some(pair) = Pair::new(1 << 20) else { return };
    let mut writer = Writer::start(pair.devices[1].path());
    assert_eq!(writer.says(), "under way");
    writer.signal(Signal::STOP);
    pair.fence_second();
    let after_fence = pair.hash();
    writer.signal(Signal::CONT);
    assert_eq!(writer.says(), "fenced true");
    assert!(pair.hash() == after_fence, "a write landed after the fence");
}

#[test]
fn a_file_system_on_the_victim_writes_no_more() {
    let Some(pair) = Pair::new(64 << 20) else { return };
    let victim = pair.devices[1].path();
    run("mkfs.ext4", &["-q", "-F"], victim);
    {
        let mounted = Mounted::new(victim);
        let mut file = fs::File::create(mounted.point().join("kept")).unwrap();
        file.write_all(&[1; 1 << 20]).unwrap();
        file.sync_all().unwrap();
        drop(file);
        // Dirty in memory when the fence comes.
        let mut file = fs::File::create(mounted.point().join("dirty")).unwrap();
        file.write_all(&[2; 8 << 20]).unwrap();
        pair.fence_second();
        let after_fence = pair.hash();
        file.sync_all().unwrap_err();
        drop(file);
        drop(mounted);
        assert!(pair.hash() == after_fence, "the file system wrote after the fence");
    }
    // The survivor takes the volume over.
    let mounted = Mounted::new(pair.devices[0].path());
    assert!(fs::read(mounted.point().join("kept")).unwrap() == [1; 1 << 20]);
    fs::write(mounted.point().join("new"), [3; 4096]).unwrap();
    drop(mounted);
    pair.nodes[1].ensure_registered(KEYS[1]).unwrap();
    let mounted = Mounted::new(victim);
    assert!(fs::read(mounted.point().join("new")).unwrap() == [3; 4096]);
}

#[test]
fn of_two_that_fence_each_other_exactly_one_wins() {
    let Some(pair) = Pair::new(1 << 20) else { return };
    let buf = AlignedBuf::new(4096);
    for _ in 0..10 {
        let luns = [pair.lun(0), pair.lun(1)];
        let barrier = Barrier::new(2);
        let fence = |own: usize| {
            barrier.wait();
            pair.nodes[own].fence(KEYS[own], &[KEYS[1 - own]])
        };
        let results = std::thread::scope(|scope| {
            let other = scope.spawn(|| fence(1));
            [fence(0), other.join().unwrap()]
        });
        let winners: Vec<usize> = (0..2).filter(|node| results[*node].is_ok()).collect();
        let [winner] = winners[..] else { panic!("{results:?}") };
        let lost = results[1 - winner].as_ref().unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::Fatal, "{lost}");
        assert_eq!(pair.nodes[0].read_keys().unwrap().keys, [KEYS[winner]]);
        luns[winner].write_at(&buf, 4096, LunOffset(0)).unwrap();
        assert!(luns[1 - winner].write_at(&buf, 4096, LunOffset(0)).unwrap_err().is_fenced());
        pair.nodes[1 - winner].ensure_registered(KEYS[1 - winner]).unwrap();
    }
}

#[test]
fn a_path_that_was_attached_anew_must_register_again() {
    let Some(Pair { devices, nodes, registry }) = Pair::new(1 << 20) else { return };
    let [_first, second] = devices;
    let again = second.reattach();
    let node = Reservations::open(again.path()).unwrap();
    assert_eq!(node.verify(KEYS[1]), Ok(false));
    assert_eq!(node.check_fenced(KEYS[1]), Ok(FencedState::Registered), "its old registration stands");
    node.ensure_registered(KEYS[1]).unwrap();
    assert_eq!(nodes[0].read_keys().unwrap().keys, KEYS, "the old one became the new one");
    assert_eq!(nodes[0].read_reservation().unwrap().unwrap().key, KEYS[1], "with its reservation");
    drop(registry);
}

#[test]
fn unregistering_under_a_reservation_takes_ones_own_access() {
    let Some(pair) = Pair::new(1 << 20) else { return };
    let lun = pair.lun(0);
    let buf = AlignedBuf::new(4096);
    pair.nodes[0].unregister(KEYS[0]).unwrap();
    assert!(lun.write_at(&buf, 4096, LunOffset(0)).unwrap_err().is_fenced());
    pair.nodes[1].clear(KEYS[1]).unwrap();
    // Without a reservation everybody may write again. A node that has a key and lost it is told so all the same.
    lun.write_at(&buf, 4096, LunOffset(0)).unwrap();
    assert_eq!(pair.nodes[0].check_fenced(KEYS[0]), Ok(FencedState::NoReservation));
}

#[test]
fn another_type_of_reservation_is_not_taken_over() {
    let Some(pair) = Pair::new(1 << 20) else { return };
    pair.nodes[1].release(KEYS[1], WERO).unwrap();
    pair.nodes[1].reserve(KEYS[1], ReservationType::WriteExclusive).unwrap();
    let error = pair.nodes[0].ensure_reserved(KEYS[0]).unwrap_err();
    assert!(error.to_string().contains("0xb2"), "{error}");
    let error = pair.nodes[0].fence(KEYS[0], &[0x77]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected);
    // One's own is changed, and a victim's goes with the victim.
    assert_eq!(pair.nodes[1].ensure_reserved(KEYS[1]).unwrap(), Holder { key: KEYS[1], kind: WERO });
    pair.nodes[1].release(KEYS[1], WERO).unwrap();
    pair.nodes[1].reserve(KEYS[1], ReservationType::WriteExclusive).unwrap();
    assert_eq!(pair.fence_second().holder, Some(Holder { key: KEYS[0], kind: WERO }));
}

#[test]
fn a_plain_file_is_guarded_by_the_lun_itself() {
    let file = lun_file(1 << 20);
    let _registry = RegistryFile::of(file.path());
    let nodes = [0, 1].map(|_| Reservations::open(file.path()).unwrap());
    let luns = [0, 1].map(|_| Lun::open(file.path(), LunOptions::default()).unwrap());
    let buf = AlignedBuf::new(4096);
    let write = |node: usize| luns[node].write_at(&buf, 4096, LunOffset(0)).map_err(|e| e.is_fenced());
    assert_eq!(write(0), Ok(()), "nothing is reserved");
    for (node, key) in nodes.iter().zip(KEYS) {
        node.ensure_registered(key).unwrap();
    }
    nodes[1].ensure_reserved(KEYS[1]).unwrap();
    assert_eq!(write(1), Err(true), "it has not told its key");
    for (lun, key) in luns.iter().zip(KEYS) {
        lun.set_reservation_key(Some(key));
    }
    assert_eq!([write(0), write(1)], [Ok(()), Ok(())]);
    let report = nodes[0].fence(KEYS[0], &[KEYS[1], KEYS[1]]).unwrap();
    assert_eq!(report.victims.len(), 1);
    assert_eq!([write(0), write(1)], [Ok(()), Err(true)]);
    nodes[1].register_ignore(KEYS[1]).unwrap();
    nodes[1].register(Some(KEYS[1]), 0xcc).unwrap();
    assert_eq!(nodes[1].read_keys().unwrap().keys, [KEYS[0], 0xcc]);
    let status = nodes[1].read_full_status().unwrap();
    assert_eq!(status.iter().map(|one| one.holder).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn keys_of_zero_and_oneself_as_a_victim_are_refused() {
    let file = lun_file(1 << 20);
    let node = Reservations::open(file.path()).unwrap();
    assert_eq!(node.kind(), Kind::Emulated);
    for error in [
        node.register_ignore(0).unwrap_err(),
        node.fence(1, &[1]).unwrap_err(),
        node.fence(1, &[0]).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    }
    assert_eq!(node.fence(1, &[2]).unwrap_err().kind(), ErrorKind::Fatal, "not registered");
    let error = Reservations::open(Path::new("/dev/null")).unwrap_err();
    assert!(error.is_unsupported(), "{error}");
    let error = Reservations::open(Path::new("/nonexistent")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected);
}
