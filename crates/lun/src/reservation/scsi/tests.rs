//! The back end against a target made of the emulation's rules, which speaks SCSI bytes and can be made to misbehave.

use super::*;
use crate::reservation::cluster::{FencedState, VictimOutcome};
use crate::reservation::emu::registry::{Nexus, Refusal, Registry};
use crate::reservation::{ErrorKind, Reservations};
use parking_lot::Mutex;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

const WERO: ReservationType = ReservationType::WriteExclusiveRegistrantsOnly;

/// What the target cannot do, as tgtd; or does badly.
#[derive(Debug, Default)]
struct Target {
    registry: Mutex<Registry>,
    no_aptpl: bool,
    no_abort: bool,
    /// So many next commands end with a unit attention.
    attentions: AtomicU32,
    /// After `delay` good commands, so many time out after they were done.
    timeouts: AtomicU32,
    delay: AtomicU32,
}

fn take_one(counter: &AtomicU32) -> bool {
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

/// One path of one initiator.
#[derive(Debug, Clone)]
struct Port {
    target: Arc<Target>,
    nexus: Nexus,
    down: bool,
}

fn check_condition(key: u8, code: u8, qualifier: u8) -> SgReply {
    reply(2, 0, &[0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0])
}

fn refused(refusal: Refusal) -> SgReply {
    match refusal {
        Refusal::Conflict => reply(0x18, 0, &[]),
        Refusal::WrongType => check_condition(5, 0x26, 4),
        Refusal::InvalidKey => check_condition(5, 0x26, 0),
        Refusal::Full => check_condition(5, 0x55, 4),
    }
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().unwrap())
}

impl Port {
    fn out(&self, cdb: &[u8], list: &[u8]) -> Result<(), SgReply> {
        assert_eq!((cdb.len(), list.len(), &cdb[5..9]), (10, 24, &[0, 0, 0, 24][..]));
        let (own, other, aptpl) = (be64(list), be64(&list[8..]), list[20] & 1 != 0);
        if aptpl && self.target.no_aptpl {
            return Err(check_condition(5, 0x26, 0));
        }
        let kind = || ReservationType::from_scsi(cdb[2]).ok_or_else(|| check_condition(5, 0x24, 0));
        let mut registry = self.target.registry.lock();
        match cdb[1] {
            0 => registry.register(self.nexus, Some(own), other),
            1 => registry.reserve(self.nexus, own, kind()?),
            2 => registry.release(self.nexus, own, kind()?),
            3 => registry.clear(self.nexus, own),
            4 => registry.preempt(self.nexus, own, other, kind()?),
            5 if !self.target.no_abort => registry.preempt(self.nexus, own, other, kind()?),
            6 => registry.register(self.nexus, None, other),
            _ => return Err(check_condition(5, 0x20, 0)),
        }
        .map_err(refused)
    }

    fn read(&self, cdb: &[u8]) -> Result<Vec<u8>, SgReply> {
        let registry = self.target.registry.lock();
        let list = match (cdb[0], cdb[1]) {
            (0x5e, 0) => registry.keys().keys.iter().flat_map(|key| key.to_be_bytes()).collect(),
            (0x5e, 1) => registry.holder().map_or_else(Vec::new, |held| {
                let mut bytes = held.key.to_be_bytes().to_vec();
                bytes.extend([0, 0, 0, 0, 0, held.kind.scsi(), 0, 0]);
                bytes
            }),
            (0x5e, 2) => {
                let ptpl = u8::from(!self.target.no_aptpl);
                return Ok(vec![0, 8, ptpl, 0x80 | ptpl, 0xea, 1, 0, 0]);
            }
            _ => return Err(check_condition(5, 0x20, 0)),
        };
        let mut data = registry.generation.to_be_bytes().to_vec();
        data.extend(u32::try_from(list.len()).unwrap().to_be_bytes());
        data.extend(list);
        data.truncate(usize::from(u16::from_be_bytes([cdb[7], cdb[8]])));
        Ok(data)
    }
}

impl Transport for Port {
    fn send(&self, cdb: &[u8], data: SgData<'_>) -> io::Result<SgReply> {
        if self.down {
            return Ok(reply(0, 1, &[]));
        }
        if take_one(&self.target.attentions) {
            return Ok(check_condition(6, 0x2a, 5));
        }
        let answer = match data {
            SgData::ToDevice(list) => self.out(cdb, list).map(|()| list.len()),
            SgData::FromDevice(buffer) => self.read(cdb).map(|bytes| {
                buffer[..bytes.len()].copy_from_slice(&bytes);
                bytes.len()
            }),
        };
        if !take_one(&self.target.delay) && take_one(&self.target.timeouts) {
            return Ok(reply(0, 3, &[]));
        }
        Ok(answer.map_or_else(|error| error, |transferred| SgReply { transferred, ..reply(0, 0, &[]) }))
    }
}

/// A node with so many paths.
fn node(target: &Arc<Target>, number: u32, paths: u32) -> (Reservations, Vec<Port>) {
    let port = |path| {
        let nexus = Nexus::Loop { index: number, sequence: u64::from(path) };
        Port { target: Arc::clone(target), nexus, down: false }
    };
    let ports: Vec<_> = (0..paths).map(port).collect();
    (node_of(ports.clone()), ports)
}

fn node_of(ports: Vec<Port>) -> Reservations {
    let errors = Errors(Arc::from(Path::new("/dev/test")));
    Reservations { backend: Box::new(Scsi::new(ports, errors.clone())), errors }
}

#[test]
fn a_target_with_everything() {
    let target = Arc::new(Target::default());
    let (a, _) = node(&target, 1, 1);
    let (b, _) = node(&target, 2, 2);
    assert!(a.ensure_registered(1).unwrap().aptpl && b.ensure_registered(2).unwrap().aptpl);
    assert_eq!(a.read_keys().unwrap().keys, [1, 2, 2], "a key for each path");
    assert_eq!(b.ensure_reserved(2).unwrap(), Holder { key: 2, kind: WERO });
    assert!(a.reserve(1, WERO).unwrap_err().is_conflict());
    let report = a.fence(1, &[2]).unwrap();
    assert_eq!(report.victims[0].outcome, VictimOutcome::Aborted);
    assert_eq!(report.holder, Some(Holder { key: 1, kind: WERO }));
    assert_eq!(a.check_fenced(2), Ok(FencedState::Fenced));
    assert_eq!(b.fence(2, &[1]).unwrap_err().kind(), ErrorKind::Fatal);
    let error = a.release(1, ReservationType::WriteExclusive).unwrap_err();
    assert!(error.to_string().contains("type"), "{error}");
    assert!(a.read_full_status().unwrap_err().is_unsupported());
    a.unregister(1).unwrap();
    assert_eq!(a.check_fenced(1), Ok(FencedState::NoReservation));
}

#[test]
fn a_target_without_aptpl_and_abort_is_used_and_said_so() {
    let target = Arc::new(Target { no_aptpl: true, no_abort: true, ..Target::default() });
    let ((a, _), (b, _)) = (node(&target, 1, 1), node(&target, 2, 1));
    assert_eq!(a.capabilities().unwrap().aptpl, Some(false));
    assert!(!a.ensure_registered(1).unwrap().aptpl && !b.ensure_registered(2).unwrap().aptpl);
    assert_eq!(a.preempt(1, 2, WERO, true), Ok(PreemptOutcome { aborted: false }));
    b.ensure_registered(2).unwrap();
    let report = a.fence(1, &[2, 3]).unwrap();
    let outcomes: Vec<_> = report.victims.iter().map(|one| one.outcome).collect();
    assert_eq!(outcomes, [VictimOutcome::Preempted, VictimOutcome::NotRegistered]);
}

/// As QEMU's initiator after a restart of the storage: with another session id it is another one by the standard.
#[test]
fn a_node_that_became_another_initiator_is_told_to_register_anew() {
    let target = Arc::new(Target::default());
    let ((a, _), (b, _)) = (node(&target, 1, 1), node(&target, 2, 1));
    a.ensure_registered(1).unwrap();
    b.ensure_registered(2).unwrap();
    b.ensure_reserved(2).unwrap();
    let (again, _) = node(&target, 3, 1);
    assert!(again.verify(1).unwrap(), "the key is there");
    let error = again.fence(1, &[2]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fatal, "{error}");
    assert_eq!(a.read_keys().unwrap().keys, [1, 2]);
    again.ensure_registered(5).unwrap();
    let report = again.fence(5, &[1, 2]).unwrap();
    let victims: Vec<_> = report.victims.iter().map(|one| one.key).collect();
    assert_eq!(victims, [2, 1], "the holder first");
    assert_eq!(report.keys.unwrap().keys, [5]);
}

#[test]
fn unit_attentions_are_repeated_up_to_the_bound() {
    let target = Arc::new(Target::default());
    let (a, _) = node(&target, 1, 1);
    target.attentions.store(TRIES_MAX - 1, Ordering::Relaxed);
    a.register(None, 1).unwrap();
    target.attentions.store(TRIES_MAX, Ordering::Relaxed);
    let error = a.reserve(1, WERO).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    assert_eq!(a.read_reservation(), Ok(None));
    a.reserve(1, WERO).unwrap();
}

#[test]
fn a_command_that_timed_out_is_unknown_and_a_fence_reads_what_became_of_it() {
    let target = Arc::new(Target::default());
    let ((a, _), (b, _)) = (node(&target, 1, 1), node(&target, 2, 1));
    a.ensure_registered(1).unwrap();
    b.ensure_registered(2).unwrap();
    a.ensure_reserved(1).unwrap();
    target.timeouts.store(1, Ordering::Relaxed);
    let error = a.preempt(1, 2, WERO, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
    assert_eq!(a.read_keys().unwrap().keys, [1], "it was done");

    b.ensure_registered(2).unwrap();
    // Reads of the fence before its first preemption: own key, reservation twice, keys.
    let before_preempt = 4;
    for healthy in 0..before_preempt {
        target.timeouts.store(0, Ordering::Relaxed);
        let kind = fence_with_timeout_after(&a, &target, healthy);
        assert_eq!(kind, Err(ErrorKind::Unknown), "a read that timed out");
        assert_eq!(a.read_keys().unwrap().keys, [1, 2]);
    }
    let outcome = fence_with_timeout_after(&a, &target, before_preempt);
    assert_eq!(outcome, Ok(VictimOutcome::Preempted), "it was done, but perhaps not its abort");
}

/// Fences key 2 with a time-out of the command after so many good ones.
fn fence_with_timeout_after(
    a: &Reservations,
    target: &Arc<Target>,
    healthy: u32,
) -> Result<VictimOutcome, ErrorKind> {
    target.delay.store(healthy, Ordering::Relaxed);
    target.timeouts.store(1, Ordering::Relaxed);
    a.fence(1, &[2]).map(|report| report.victims[0].outcome).map_err(|error| error.kind())
}

#[test]
fn a_path_that_is_down_is_left_out() {
    let target = Arc::new(Target::default());
    let (_, mut ports) = node(&target, 1, 2);
    ports[0].down = true;
    let a = node_of(ports.clone());
    a.ensure_registered(1).unwrap();
    assert_eq!(a.read_keys().unwrap().keys, [1]);
    ports[0].down = false;
    // It comes back without a registration; taking back works all the same, registering again covers it.
    let a = node_of(ports.clone());
    a.unregister(1).unwrap();
    assert!(a.read_keys().unwrap().keys.is_empty());
    a.ensure_registered(1).unwrap();
    assert_eq!(a.read_keys().unwrap().keys, [1, 1]);
    for port in &mut ports {
        port.down = true;
    }
    let error = node_of(ports).read_keys().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
}

/// More keys than the first buffer takes.
#[test]
fn long_lists_are_asked_for_again() {
    let target = Arc::new(Target::default());
    {
        let mut registry = target.registry.lock();
        registry.registrations = (1..=2000)
            .map(|key| crate::reservation::emu::registry::Registration { nexus: Nexus::File { key }, key })
            .collect();
    }
    let (a, _) = node(&target, 1, 1);
    assert_eq!(a.read_keys().unwrap().keys, (1..=2000).collect::<Vec<_>>());
}

fn reply(status: u8, host_status: u16, sense: &[u8]) -> SgReply {
    SgReply { status, host_status, sense: sense.to_vec(), transferred: 0 }
}

#[test]
fn answers_are_sorted_by_what_a_caller_may_do() {
    let fixed =
        |key, code, qualifier| [0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0];
    assert_eq!(classify(&reply(0, 0, &[])), Answer::Good);
    assert_eq!(classify(&reply(0x18, 0, &[])), Answer::Conflict);
    assert_eq!(classify(&reply(0x18, 0x11, &[])), Answer::Conflict);
    assert_eq!(classify(&reply(8, 0, &[])), Answer::Busy);
    for (code, qualifier) in [(0x29, 0), (0x2a, 3), (0x2a, 5), (0x3f, 0x0e)] {
        assert!(matches!(classify(&reply(2, 0, &fixed(6, code, qualifier))), Answer::Again(_)));
    }
    // tgtd on APTPL, LIO on APTPL, tgtd on PREEMPT AND ABORT.
    for (code, qualifier) in [(0x24, 0), (0x26, 0), (0x20, 0)] {
        assert!(matches!(classify(&reply(2, 0, &fixed(5, code, qualifier))), Answer::Unsupported(_)));
    }
    assert!(matches!(classify(&reply(2, 0, &fixed(5, 0x26, 4))), Answer::Refused(_)));
    assert!(matches!(classify(&reply(2, 0, &fixed(5, 0x55, 4))), Answer::Refused(_)));
    assert!(matches!(classify(&reply(2, 0, &fixed(0xb, 0, 0))), Answer::Unknown(_)));
    assert!(matches!(classify(&reply(2, 0, &[])), Answer::Unknown(_)));
    assert!(matches!(classify(&reply(2, 0, &fixed(2, 8, 0))), Answer::NoCommunication(_)));
    assert!(matches!(classify(&reply(2, 0, &fixed(2, 4, 1))), Answer::Refused(_)));
    // DID_NO_CONNECT was never sent, DID_TIME_OUT may have been done.
    assert!(matches!(classify(&reply(0, 1, &[])), Answer::Refused(_)));
    assert!(matches!(classify(&reply(0, 3, &[])), Answer::Unknown(_)));
}

/// Answers every command with the bytes that Linux's target has for an initiator that is not registered.
#[derive(Debug)]
struct LinuxTarget;

impl Transport for LinuxTarget {
    fn send(&self, _: &[u8], _: SgData<'_>) -> io::Result<SgReply> {
        Ok(check_condition(2, 8, 0))
    }
}

#[test]
fn an_initiator_that_is_not_registered_meets_a_conflict_on_the_linux_target() {
    let lun = Scsi::new(vec![LinuxTarget], Errors(Arc::from(Path::new("lun"))));
    let kind = ReservationType::default();
    for answer in [lun.reserve(1, kind), lun.release(1, kind), lun.clear(1)] {
        assert!(answer.unwrap_err().is_conflict());
    }
    // Reading needs no registration, so there the same bytes are what they say.
    assert_eq!(lun.read_keys().unwrap_err().kind(), ErrorKind::Rejected);
}
