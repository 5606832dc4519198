//! Persistent reservations by hand, for tests on real storage: one operation, one JSON object on standard output.
//!
//! `pr OPERATION DEVICE [ARGUMENT...]`, keys in hexadecimal with or without 0x, types by their SCSI number (default 5).
//! Exit status 0: done; 1: an error, which the object tells; 2: wrong usage.

use csv_lun::reservation::check::validate;
use csv_lun::reservation::{
    ErrorKind, FencedState, Holder, Kind, ReservationError, ReservationType, Reservations, VictimOutcome,
};
use csv_lun::{AlignedBuf, IoOp, Lun, LunOptions};
use csv_types::LunOffset;
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

const USAGE: &str = "usage: pr OPERATION DEVICE [ARGUMENT...]
  kind | capabilities | keys | reservation | status | validate
  register OLD|- NEW | register-ignore NEW | unregister KEY
  reserve KEY [TYPE] | release KEY [TYPE] | clear KEY
  preempt OWN VICTIM [TYPE] | preempt-abort OWN VICTIM [TYPE]
  ensure-registered KEY | ensure-reserved KEY | fence OWN VICTIM... | verify KEY | check-fenced KEY
  write OFFSET [KEY] | read OFFSET [KEY]       4096 bytes, as a node with that key; OFFSET in hexadecimal";

enum Failure {
    Usage,
    Reservation(ReservationError),
    Lun(csv_lun::LunError),
}

impl From<ReservationError> for Failure {
    fn from(error: ReservationError) -> Self {
        Failure::Reservation(error)
    }
}

impl From<csv_lun::LunError> for Failure {
    fn from(error: csv_lun::LunError) -> Self {
        Failure::Lun(error)
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let started = Instant::now();
    let (mut answer, code) = match run(&words) {
        Ok(value) => (json!({"ok": true, "result": value}), ExitCode::SUCCESS),
        Err(Failure::Usage) => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
        Err(Failure::Reservation(error)) => {
            let kind = match error.kind() {
                ErrorKind::Rejected => "rejected",
                ErrorKind::Unknown => "unknown",
                ErrorKind::Fatal => "fatal",
            };
            let (conflict, unsupported) = (error.is_conflict(), error.is_unsupported());
            let text = error.to_string();
            let value = json!({"ok": false, "kind": kind, "conflict": conflict, "unsupported": unsupported, "error": text});
            (value, ExitCode::FAILURE)
        }
        Err(Failure::Lun(error)) => {
            let value = json!({
                "ok": false,
                "conflict": Lun::is_conflict(&error),
                "errno": error.errno(),
                "error": error.to_string(),
            });
            (value, ExitCode::FAILURE)
        }
    };
    answer["ms"] = json!(started.elapsed().as_secs_f64() * 1e3);
    println!("{answer}");
    code
}

fn hex(text: &str) -> Result<u64, Failure> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).map_err(|_| Failure::Usage)
}

fn kind_of(rest: &[&str]) -> Result<ReservationType, Failure> {
    match rest {
        [] => Ok(ReservationType::default()),
        [number] => number.parse().ok().and_then(ReservationType::from_scsi).ok_or(Failure::Usage),
        _ => Err(Failure::Usage),
    }
}

fn key_text(key: u64) -> String {
    format!("{key:#x}")
}

fn holder(holder: Option<Holder>) -> Value {
    holder.map_or(Value::Null, |held| json!({"key": key_text(held.key), "type": held.kind.scsi()}))
}

fn run(words: &[&str]) -> Result<Value, Failure> {
    let [operation, device, rest @ ..] = words else { return Err(Failure::Usage) };
    let path = Path::new(device);
    match (*operation, rest) {
        ("validate", []) => return Ok(validate_all(path)),
        ("write" | "read", [offset, key @ ..]) => return io(path, *operation == "write", hex(offset)?, key),
        _ => {}
    }
    let lun = Reservations::open(path)?;
    match (*operation, rest) {
        ("register", [old, new]) => {
            let old = if *old == "-" { None } else { Some(hex(old)?) };
            Ok(json!({"aptpl": lun.register(old, hex(new)?)?.aptpl}))
        }
        ("register-ignore", [new]) => Ok(json!({"aptpl": lun.register_ignore(hex(new)?)?.aptpl})),
        ("ensure-registered", [key]) => Ok(json!({"aptpl": lun.ensure_registered(hex(key)?)?.aptpl})),
        ("unregister", [key]) => Ok(json!(lun.unregister(hex(key)?)?)),
        ("reserve", [key, kind @ ..]) => Ok(json!(lun.reserve(hex(key)?, kind_of(kind)?)?)),
        ("release", [key, kind @ ..]) => Ok(json!(lun.release(hex(key)?, kind_of(kind)?)?)),
        ("clear", [key]) => Ok(json!(lun.clear(hex(key)?)?)),
        ("preempt" | "preempt-abort", [own, victim, kind @ ..]) => {
            let abort = *operation == "preempt-abort";
            let done = lun.preempt(hex(own)?, hex(victim)?, kind_of(kind)?, abort)?;
            Ok(json!({"aborted": done.aborted}))
        }
        ("ensure-reserved", [key]) => Ok(holder(Some(lun.ensure_reserved(hex(key)?)?))),
        ("fence", [own, victims @ ..]) => fence(&lun, hex(own)?, victims),
        ("verify", [key]) => Ok(json!(lun.verify(hex(key)?)?)),
        ("check-fenced", [key]) => Ok(json!(match lun.check_fenced(hex(key)?)? {
            FencedState::Fenced => "fenced",
            FencedState::Registered => "registered",
            FencedState::NoReservation => "no reservation",
        })),
        (_, []) => look(&lun, operation),
        _ => Err(Failure::Usage),
    }
}

fn look(lun: &Reservations, operation: &str) -> Result<Value, Failure> {
    match operation {
        "kind" => Ok(json!(match lun.kind() {
            Kind::Scsi => "scsi",
            Kind::Nvme => "nvme",
            Kind::Ioctl => "ioctl",
            Kind::Emulated => "emulated",
        })),
        "capabilities" => {
            let found = lun.capabilities()?;
            let types = found.types.map(|types| types.iter().map(|kind| kind.scsi()).collect::<Vec<_>>());
            Ok(json!({
                "aptpl": found.aptpl,
                "aptpl_active": found.aptpl_active,
                "preempt_and_abort": found.preempt_and_abort,
                "read_back": found.read_back,
                "types": types,
            }))
        }
        "keys" => {
            let found = lun.read_keys()?;
            let keys: Vec<_> = found.keys.into_iter().map(key_text).collect();
            Ok(json!({"generation": found.generation, "keys": keys}))
        }
        "reservation" => Ok(holder(lun.read_reservation()?)),
        "status" => {
            let list = lun.read_full_status()?.into_iter().map(|one| {
                let kind = one.kind.map(ReservationType::scsi);
                json!({"key": key_text(one.key), "holder": one.holder, "type": kind, "initiator": one.initiator})
            });
            Ok(list.collect())
        }
        _ => Err(Failure::Usage),
    }
}

fn fence(lun: &Reservations, own: u64, victims: &[&str]) -> Result<Value, Failure> {
    let victims = victims.iter().map(|key| hex(key)).collect::<Result<Vec<_>, _>>()?;
    let report = lun.fence(own, &victims)?;
    let list: Vec<_> = report
        .victims
        .iter()
        .map(|victim| {
            let outcome = match victim.outcome {
                VictimOutcome::NotRegistered => "not registered",
                VictimOutcome::Aborted => "aborted",
                VictimOutcome::Preempted => "preempted",
            };
            json!({"key": key_text(victim.key), "outcome": outcome})
        })
        .collect();
    let keys = report.keys.map(|keys| keys.keys.into_iter().map(key_text).collect::<Vec<_>>());
    Ok(json!({"victims": list, "holder": holder(report.holder), "keys": keys}))
}

fn validate_all(path: &Path) -> Value {
    let results = validate(path, &mut |step| eprintln!("{}/{} {}", step.number, step.of, step.name));
    results
        .iter()
        .map(|one| json!({"name": one.name, "outcome": format!("{:?}", one.outcome), "text": one.text}))
        .collect()
}

fn io(path: &Path, write: bool, offset: u64, key: &[&str]) -> Result<Value, Failure> {
    let lun = Lun::open(path, LunOptions { read_only: !write, ..LunOptions::default() })?;
    lun.set_reservation_key(key.first().map(|key| hex(key)).transpose()?);
    let (mut buf, at) = (AlignedBuf::new(4096), LunOffset(offset));
    lun.check_range(if write { IoOp::Write } else { IoOp::Read }, 4096, at)?;
    if write {
        buf.fill(0xc5);
        lun.write_at(&buf, 4096, at)?;
        lun.flush()?;
    } else {
        lun.read_at(&mut buf, 4096, at)?;
    }
    Ok(json!({"bytes": 4096, "first": buf[0]}))
}
