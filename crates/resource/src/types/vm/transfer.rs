//! Sending a guest out of its QEMU, to a file or to another node, and waiting for one that is coming in.

use super::running::{QUICK, Running};
use crate::api::{Context, Failure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How often QEMU is asked how far it is.
const LOOK: Duration = Duration::from_millis(250);
/// How often it is told how far it is.
const TELL: Duration = Duration::from_secs(1);
/// A transfer of which nothing has moved for so long is given up.
const STALLED: Duration = Duration::from_secs(60);
/// For a transfer that is given up to be over.
const CANCEL_LIMIT: Duration = Duration::from_secs(30);
/// For QEMU to have counted.
const COUNT_LIMIT: Duration = Duration::from_secs(2);
/// QEMU's default would hold a fast network back; it wants some number.
const BANDWIDTH_UNLIMITED: u64 = 1 << 40;

/// How a transfer is to go.
#[derive(Debug, Clone)]
pub(crate) struct Transfer {
    /// What is sent, for people: "saving", "migrating".
    pub(crate) doing: &'static str,
    /// For QEMU.
    pub(crate) uri: String,
    /// MiB/s; 0 is no limit.
    pub(crate) bandwidth_mib: u64,
    pub(crate) downtime_ms: u64,
    /// Credentials and the name that the other end must have.
    pub(crate) tls: Option<(&'static str, String)>,
    /// The other end says when it has everything.
    pub(crate) answered: bool,
    /// TCP connections beside the first; 0 is none.
    pub(crate) channels: u64,
    pub(crate) limit: Duration,
}

/// Capabilities of both ends.
pub(crate) fn capabilities(running: &Running, on: &[(&str, bool)]) -> Result<(), Failure> {
    let list: Vec<Value> =
        on.iter().map(|(name, state)| json!({ "capability": name, "state": state })).collect();
    running.ask("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
}

/// Sends the guest; QEMU's account of it. On failure the guest is here, in the state in which it was.
pub(crate) fn send(running: &Running, context: &Context, transfer: &Transfer) -> Result<Value, Failure> {
    let before = running.status()?;
    let result = begin(running, transfer).and_then(|()| follow(running, context, transfer));
    if let Err(failure) = result {
        return Err(back(running, &before, transfer.doing, failure));
    }
    result
}

fn begin(running: &Running, transfer: &Transfer) -> Result<(), Failure> {
    capabilities(
        running,
        &[
            ("events", true),
            ("xbzrle", false),
            ("auto-converge", transfer.answered),
            ("return-path", transfer.answered),
            ("multifd", transfer.channels > 0),
        ],
    )?;
    let bandwidth = match transfer.bandwidth_mib {
        0 => BANDWIDTH_UNLIMITED,
        mib => mib << 20,
    };
    let (credentials, name) = transfer.tls.clone().unwrap_or_default();
    let mut parameters = json!({
        "max-bandwidth": bandwidth, "downtime-limit": transfer.downtime_ms, "tls-creds": credentials, "tls-hostname": name,
    });
    if transfer.channels > 0 {
        parameters["multifd-channels"] = transfer.channels.into();
    }
    running.ask("migrate-set-parameters", parameters)?;
    running.watch.forget_migration();
    running.ask("migrate", json!({ "uri": transfer.uri })).map(drop)
}

fn follow(running: &Running, context: &Context, transfer: &Transfer) -> Result<Value, Failure> {
    let began = Instant::now();
    let (mut told, mut moved, mut moved_bytes) = (Instant::now(), Instant::now(), 0);
    loop {
        running.watch.wait_migration(LOOK);
        let account = running.ask("query-migrate", json!({}))?;
        match account["status"].as_str().unwrap_or("none") {
            "completed" => return whole_account(running, account),
            "failed" | "cancelled" => {
                let why = account["error-desc"].as_str().unwrap_or("QEMU gives no reason");
                return Err(Failure::new(format!("{} failed: {why}", transfer.doing)));
            }
            _ => {}
        }
        let bytes = account["ram"]["transferred"].as_u64().unwrap_or(0);
        if bytes != moved_bytes {
            (moved, moved_bytes) = (Instant::now(), bytes);
        }
        let why = if context.cancelled() {
            Failure::Cancelled
        } else if moved.elapsed() > STALLED {
            Failure::new(format!(
                "{} is given up: nothing has moved for {} s",
                transfer.doing,
                STALLED.as_secs()
            ))
        } else if began.elapsed() > transfer.limit {
            let text = format!(
                "{} is given up after {} s: the guest changes its memory faster than it can be sent",
                transfer.doing,
                transfer.limit.as_secs()
            );
            Failure::Failed(text)
        } else {
            if told.elapsed() >= TELL {
                told = Instant::now();
                context.progress(&in_words(transfer.doing, &account["ram"]));
            }
            continue;
        };
        cancel(running);
        return Err(why);
    }
}

/// QEMU says that it is complete a moment before it has counted, and before the guest's state is what it will be.
fn whole_account(running: &Running, mut account: Value) -> Result<Value, Failure> {
    let deadline = Instant::now() + COUNT_LIMIT;
    while account["total-time"].as_u64().unwrap_or(0) == 0 && Instant::now() < deadline {
        running.watch.wait(Duration::from_millis(5));
        account = running.ask("query-migrate", json!({}))?;
    }
    Ok(account)
}

fn cancel(running: &Running) {
    let deadline = Instant::now() + CANCEL_LIMIT;
    let _ = running.ask("migrate_cancel", json!({}));
    while Instant::now() < deadline && !running.process.has_ended() {
        let account = running.monitor.call("query-migrate", json!({}), QUICK).unwrap_or_default();
        if !matches!(account["status"].as_str(), Some("setup" | "active" | "device" | "cancelling")) {
            return;
        }
        running.watch.wait(LOOK);
    }
}

/// How far it is; numbers are QEMU's.
fn in_words(doing: &str, ram: &Value) -> String {
    let mib = |name: &str| ram[name].as_u64().unwrap_or(0) >> 20;
    let (total, left) = (mib("total"), mib("remaining"));
    let percent = (total.saturating_sub(left) * 100).checked_div(total).unwrap_or(0);
    let pages = ram["dirty-pages-rate"].as_u64().unwrap_or(0);
    let page_bytes = ram["page-size"].as_u64().unwrap_or(4096);
    let dirty = pages.saturating_mul(page_bytes) >> 20;
    format!("{doing}: {percent} %, {left} MiB left, the guest changes {dirty} MiB/s")
}

/// After a transfer that did not succeed: the guest is as it was before.
fn back(running: &Running, before: &str, doing: &str, failure: Failure) -> Failure {
    if running.process.has_ended() {
        return Failure::Failed(running.watch.end().unwrap_or_else(|| failure.to_string()));
    }
    let deadline = Instant::now() + CANCEL_LIMIT;
    loop {
        match running.status().as_deref() {
            Ok(now) if now == before => return failure,
            // QEMU is about to let it go on itself.
            Ok("finish-migrate") if Instant::now() < deadline => running.watch.wait(LOOK),
            Ok(_) if before == "running" => break,
            Ok(_) => return failure,
            Err(error) => return Failure::new(format!("{failure}; moreover {error}")),
        }
    }
    match running.resume() {
        Ok(()) => failure,
        Err(error) => {
            Failure::new(format!("{failure}; and the guest does not go on here after {doing}: {error}"))
        }
    }
}

/// Waits for a guest that is coming in to have arrived whole.
pub(crate) fn arrive(running: &Running, context: &Context, limit: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + limit;
    let mut told = Instant::now();
    loop {
        if let Some(why) = running.watch.end() {
            return Err(Failure::new(format!("the guest did not arrive: {why}")));
        }
        let account = running.ask("query-migrate", json!({}))?;
        match account["status"].as_str().unwrap_or("none") {
            "completed" if running.status()? != "inmigrate" => return Ok(()),
            "failed" => {
                let why = account["error-desc"].as_str().unwrap_or("QEMU gives no reason");
                return Err(Failure::new(format!("the guest did not arrive: {why}")));
            }
            _ => {}
        }
        if context.cancelled() {
            return Err(Failure::Cancelled);
        }
        if Instant::now() > deadline {
            return Err(Failure::new(format!("the guest has not arrived after {} s", limit.as_secs())));
        }
        if told.elapsed() >= TELL {
            told = Instant::now();
            context.progress("waiting for the guest to arrive");
        }
        if running.watch.migration().as_deref() == Some("completed") {
            // The event comes just before the state.
            running.watch.wait(Duration::from_millis(5));
        } else {
            running.watch.wait_migration(LOOK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_far_it_is_is_told_with_numbers() {
        let ram = json!({ "total": 400u64 << 20, "remaining": 100u64 << 20, "dirty-pages-rate": 512, "page-size": 4096 });
        assert_eq!(in_words("migrating", &ram), "migrating: 75 %, 100 MiB left, the guest changes 2 MiB/s");
        assert_eq!(in_words("x", &json!({})), "x: 0 %, 0 MiB left, the guest changes 0 MiB/s");
    }
}
