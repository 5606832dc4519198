//! The resource host: states, the lease, lost connections, hangs, crashes, and its successor.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    missing_debug_implementations,
    reason = "tests"
)]

mod common;

use common::{LEASE_MS, LONG, Node, Rhs, spec, until};
use csv_resource::client::{ClientError, Host};
use csv_resource::protocol::{Entry, FromHost, HostState, Outcome, ToHost};
use std::fs;
use std::time::Duration;

/// A resource for tests that misbehaves so while the file `when` is there.
fn misbehaving(node: &Node, name: &str, how: &str, entry: &str) -> csv_resource::api::Spec {
    let when = node.path("when");
    let mut spec = spec(name, "Test", &[(how, entry), ("when", when.to_str().unwrap())]);
    (spec.looks_alive_ms, spec.is_alive_ms, spec.deadlock_timeout_ms) = (Some(0), Some(0), 50);
    spec
}

fn open_online(rhs: &Rhs, names: &[&str]) {
    for name in names {
        rhs.open(&spec(name, "Test", &[]));
        rhs.call(name, Entry::Online);
    }
}

#[test]
fn online_offline_terminate_are_level_triggered() {
    let node = Node::new();
    let rhs = node.start("shared");
    open_online(&rhs, &["a"]);
    rhs.call("a", Entry::Online);
    assert_eq!(rhs.control("a", "count"), 1, "the second online did nothing");
    rhs.call("a", Entry::Offline);
    rhs.call("a", Entry::Offline);
    assert!(!node.path("run/test/a").exists());
    rhs.call("a", Entry::Terminate);
    rhs.call("a", Entry::Online);
    assert_eq!(rhs.control("a", "count"), 2);
    rhs.close("a");
    let why = rhs.why_not(rhs.begin("a", Entry::Online));
    assert!(why.contains("not open"), "{why}");
    assert!(node.path("run/test/a").exists(), "closing ends nothing");
}

#[test]
fn nothing_goes_online_without_a_lease() {
    let node = Node::new();
    let rhs = node.start_without_lease("shared");
    rhs.open(&spec("a", "Test", &[]));
    let why = rhs.why_not(rhs.begin("a", Entry::Online));
    assert!(why.contains("lease"), "{why}");
    assert!(!node.path("run/test/a").exists());
    let why = rhs.why_not(rhs.open_begin(&spec("b", "Test", &[]), true));
    assert!(why.contains("lease"), "{why}");
    rhs.lease(LEASE_MS);
    rhs.call("a", Entry::Online);
}

#[test]
fn a_lease_that_is_over_ends_everything_and_is_told_later_too() {
    let node = Node::new();
    let rhs = node.start("shared");
    open_online(&rhs, &["a", "b"]);
    rhs.lease(1);
    assert_eq!(rhs.lease_over(), []);
    assert!(!node.path("run/test/a").exists() && !node.path("run/test/b").exists());
    rhs.leave();
    let rhs = node.adopt("shared").unwrap();
    assert_eq!(rhs.state("a"), Some(HostState::Offline));
    assert_eq!(rhs.lease_over(), []);
    let why = rhs.why_not(rhs.begin("a", Entry::Online));
    assert!(why.contains("lease"), "{why}");
    rhs.lease(LEASE_MS);
    rhs.call("a", Entry::Online);
}

#[test]
fn a_lease_counts_from_when_it_was_said() {
    let node = Node::new();
    let rhs = node.start("shared");
    open_online(&rhs, &["a"]);
    // Ten seconds long, and eleven on its way.
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now_ms = u64::try_from(now.tv_sec).unwrap() * 1000;
    rhs.say(ToHost::Lease { for_ms: 10_000, at_boot_ms: Some(now_ms - 11_000) });
    assert_eq!(rhs.lease_over(), []);
    assert!(!node.path("run/test/a").exists());
}

#[test]
fn a_lease_ends_without_anybody_connected() {
    let node = Node::new();
    let rhs = node.start("shared");
    open_online(&rhs, &["a"]);
    rhs.lease(200);
    rhs.leave();
    until("terminated", || !node.path("run/test/a").exists());
    assert_eq!(node.adopt("shared").unwrap().lease_over(), []);
}

#[test]
fn what_cannot_be_ended_when_the_lease_is_over_is_named() {
    let node = Node::new();
    fs::write(node.path("when"), "").unwrap();
    let rhs = node.start("shared");
    open_online(&rhs, &["good"]);
    rhs.open(&misbehaving(&node, "bad", "fail", "terminate"));
    rhs.call("bad", Entry::Online);
    rhs.lease(1);
    let left = rhs.lease_over();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(left[0].0 == "bad" && left[0].1.contains("told to fail"), "{left:?}");
    assert!(!node.path("run/test/good").exists());
    // Its end later is told as well.
    fs::remove_file(node.path("when")).unwrap();
    rhs.call("bad", Entry::Terminate);
    assert_eq!(rhs.lease_over(), []);
}

#[test]
fn a_call_that_hangs_does_not_keep_others_from_being_ended_with_the_lease() {
    let node = Node::new();
    fs::write(node.path("when"), "").unwrap();
    let rhs = node.start("shared");
    open_online(&rhs, &["good"]);
    rhs.open(&misbehaving(&node, "bad", "hang", "online"));
    rhs.begin("bad", Entry::Online);
    rhs.lease(1);
    until("the others are ended", || !node.path("run/test/good").exists());
    let left = rhs.lease_over();
    assert!(left.len() == 1 && left[0].1.contains("still in online"), "{left:?}");
    fs::remove_file(node.path("when")).unwrap();
    assert_eq!(rhs.lease_over(), [], "told when it ended after all");
    assert!(!node.path("run/test/bad").exists());
}

#[test]
fn a_hang_in_each_entry_point_is_named_and_harms_nobody_else() {
    let node = Node::new();
    let rhs = node.start("shared");
    open_online(&rhs, &["good"]);
    let control = Entry::Control { verb: "count".to_owned(), arguments: serde_json::Value::Null };
    let calls = [
        ("online", Entry::Online),
        ("is_alive", Entry::IsAlive),
        ("control", control),
        ("offline", Entry::Offline),
        ("terminate", Entry::Terminate),
    ];
    for (entry, call) in calls {
        rhs.open(&misbehaving(&node, entry, "hang", entry));
        if entry != "online" {
            rhs.call(entry, Entry::Online);
        }
        fs::write(node.path("when"), "").unwrap();
        let hanging = rhs.begin(entry, call);
        hang_is_named(&rhs, entry, entry);
        fs::remove_file(node.path("when")).unwrap();
        rhs.done(hanging);
    }
    // Polls, opening and closing are no calls of that kind.
    fs::write(node.path("when"), "").unwrap();
    let opening = rhs.open_begin(&misbehaving(&node, "open", "hang", "open"), false);
    hang_is_named(&rhs, "open", "open");
    let mut polled = misbehaving(&node, "looks_alive", "hang", "looks_alive");
    polled.looks_alive_ms = Some(10);
    rhs.open(&polled);
    rhs.call("looks_alive", Entry::Online);
    hang_is_named(&rhs, "looks_alive", "looks_alive");
    rhs.open(&misbehaving(&node, "close", "hang", "close"));
    rhs.say(ToHost::Close { call: 1_000_000, name: "close".to_owned() });
    hang_is_named(&rhs, "close", "close");
    fs::remove_file(node.path("when")).unwrap();
    rhs.done(opening);
    rhs.done(1_000_000);
    rhs.call("looks_alive", Entry::IsAlive);
}

/// It is named as stuck, while another resource of the host goes on.
fn hang_is_named(rhs: &Rhs, name: &str, entry: &str) {
    until("named as stuck", || rhs.lease(LEASE_MS).iter().any(|s| s.name == name && s.entry == entry));
    rhs.call("good", Entry::IsAlive);
}

#[test]
fn a_cancelled_call_gives_up_and_terminate_follows() {
    let node = Node::new();
    fs::write(node.path("when"), "").unwrap();
    let rhs = node.start("shared");
    rhs.open(&misbehaving(&node, "a", "wait", "online"));
    let call = rhs.begin("a", Entry::Online);
    let waits = rhs.begin("a", Entry::Offline);
    rhs.say(ToHost::Cancel { call: waits });
    assert!(rhs.why_not(waits).contains("given up"));
    rhs.say(ToHost::Cancel { call });
    assert!(rhs.why_not(call).contains("given up"));
    // Terminate cancels what runs, and what waits is not begun.
    let call = rhs.begin("a", Entry::Online);
    let waits = rhs.begin("a", Entry::Offline);
    rhs.call("a", Entry::Terminate);
    assert!(rhs.why_not(call).contains("given up"));
    assert!(rhs.why_not(waits).contains("given up"));
}

#[test]
fn polls_find_what_failed() {
    let node = Node::new();
    let rhs = node.start("shared");
    let mut often = spec("a", "Test", &[]);
    often.looks_alive_ms = Some(10);
    rhs.open(&often);
    rhs.call("a", Entry::Online);
    // Under maintenance nothing is polled.
    rhs.say(ToHost::Polls { name: "a".to_owned(), on: false });
    rhs.lease(LEASE_MS);
    fs::remove_file(node.path("run/test/a")).unwrap();
    rhs.say(ToHost::Polls { name: "a".to_owned(), on: true });
    assert!(rhs.failed("a").contains("is gone"));
    // One that failed goes online again.
    rhs.call("a", Entry::Online);
    assert_eq!(rhs.control("a", "count"), 2);
}

#[test]
fn only_the_thorough_look_decides() {
    let node = Node::new();
    let rhs = node.start("shared");
    fs::write(node.path("when"), "").unwrap();
    let mut often = misbehaving(&node, "a", "fail", "looks_alive");
    often.looks_alive_ms = Some(10);
    rhs.open(&often);
    rhs.call("a", Entry::Online);
    let mut both = misbehaving(&node, "b", "fail", "is_alive");
    both.is_alive_ms = Some(10);
    rhs.open(&both);
    rhs.call("b", Entry::Online);
    assert!(rhs.failed("b").contains("told to fail in is_alive"));
    rhs.call("a", Entry::IsAlive);
    assert!(!rhs.has_said(|said| matches!(said, FromHost::Failed { name, .. } if name == "a")));
}

#[test]
fn a_panic_is_a_failure_of_its_resource() {
    let node = Node::new();
    let rhs = node.start("shared");
    fs::write(node.path("when"), "").unwrap();
    open_online(&rhs, &["good"]);
    rhs.open(&misbehaving(&node, "a", "panic", "online"));
    let call = rhs.begin("a", Entry::Online);
    assert!(rhs.why_not(call).contains("panicked: told to panic in online"));
    rhs.event("online panicked");
    rhs.open(&misbehaving(&node, "b", "panic", "control"));
    rhs.call("b", Entry::Online);
    let control = Entry::Control { verb: "count".to_owned(), arguments: serde_json::Value::Null };
    rhs.why_not(rhs.begin("b", control));
    rhs.failed("b");
    rhs.call("good", Entry::IsAlive);
    fs::remove_file(node.path("when")).unwrap();
    rhs.call("a", Entry::Online);
}

#[test]
fn a_crash_ends_the_host_and_a_new_one_takes_over() {
    let node = Node::new();
    let rhs = node.start("shared");
    open_online(&rhs, &["good"]);
    fs::write(node.path("when"), "").unwrap();
    rhs.open(&misbehaving(&node, "bad", "crash", "online"));
    rhs.begin("bad", Entry::Online);
    assert!(rhs.gone().contains("has ended"));
    assert!(!rhs.host.is_running());
    assert!(node.adopt("shared").is_none());
    assert!(Host::list(&node.run_dir()).is_empty());
    let next = node.start("next");
    next.adopt(&spec("good", "Test", &[])).unwrap();
    next.call("good", Entry::IsAlive);
    assert_eq!(next.control("good", "count"), 1, "it was not started again");
    // What is not there is not taken over, and can be ended all the same.
    let why = next.adopt(&spec("bad", "Test", &[])).unwrap_err();
    assert!(why.contains("gone"), "{why}");
    next.call("bad", Entry::Terminate);
}

#[test]
fn a_lost_connection_changes_nothing_and_news_are_kept() {
    let node = Node::new();
    let rhs = node.start("shared");
    let pid = rhs.host.pid();
    let mut often = spec("b", "Test", &[]);
    often.looks_alive_ms = Some(10);
    rhs.open(&often);
    rhs.call("b", Entry::Online);
    open_online(&rhs, &["a"]);
    rhs.leave();
    fs::remove_file(node.path("run/test/b")).unwrap();
    assert_eq!(Host::list(&node.run_dir()), ["shared"]);
    let rhs = node.adopt("shared").unwrap();
    assert_eq!(rhs.host.pid(), pid);
    assert_eq!(rhs.state("a"), Some(HostState::Online));
    assert!(rhs.failed("b").contains("is gone"));
    rhs.call("a", Entry::Online);
    assert_eq!(rhs.control("a", "count"), 1);
}

#[test]
fn a_new_connection_takes_over() {
    let node = Node::new();
    let first = node.start("shared");
    first.open(&spec("a", "Test", &[("slow_ms", "300")]));
    first.begin("a", Entry::Online);
    let second = node.adopt("shared").unwrap();
    assert!(first.gone().contains("closed"));
    assert!(first.host.is_running());
    second.call("a", Entry::Online);
    assert_eq!(second.control("a", "count"), 1, "what the first asked for was done once");
    assert!(first.host.say(&ToHost::Lease { for_ms: 1, at_boot_ms: None }).is_err());
    first.leave();
    second.call("a", Entry::IsAlive);
}

#[test]
fn progress_is_told_and_extends_the_time() {
    let node = Node::new();
    let rhs = node.start("shared");
    let mut slow = spec("a", "Test", &[("slow_ms", "1500")]);
    slow.deadlock_timeout_ms = 1000;
    rhs.open(&slow);
    let call = rhs.begin("a", Entry::Online);
    rhs.wait("progress", |said| match said {
        FromHost::Progress { call: of, text, .. } if *of == call => text.contains("ms left").then_some(()),
        _ => None,
    });
    rhs.done(call);
}

#[test]
fn another_specification_counts_from_the_next_online() {
    let node = Node::new();
    let rhs = node.start("shared");
    open_online(&rhs, &["a"]);
    rhs.open(&spec("a", "Test", &[("fail", "online")]));
    rhs.call("a", Entry::Online);
    rhs.call("a", Entry::Offline);
    assert!(rhs.why_not(rhs.begin("a", Entry::Online)).contains("told to fail"));
    rhs.open(&spec("a", "Test", &[]));
    rhs.call("a", Entry::Online);
}

#[test]
fn too_many_calls_are_refused() {
    let node = Node::new();
    let rhs = node.start("shared");
    fs::write(node.path("when"), "").unwrap();
    rhs.open(&misbehaving(&node, "a", "wait", "online"));
    let calls: Vec<u64> = (0..70).map(|_| rhs.begin("a", Entry::Online)).collect();
    let why = rhs.why_not(calls[69]);
    assert!(why.contains("too many"), "{why}");
    rhs.call("a", Entry::Terminate);
    calls[..69].iter().for_each(|call| drop(rhs.why_not(*call)));
}

#[test]
fn unknown_types_are_refused_with_what_there_is() {
    let node = Node::new();
    let rhs = node.start("shared");
    let call = rhs.open_begin(&spec("a", "Nonsense", &[]), false);
    let Outcome::Failed { why, retry, elsewhere } = rhs.outcome(call) else { panic!("opened") };
    assert!(!retry && elsewhere);
    for word in ["Nonsense", "GenericApplication", "systemd:UNIT", "ocf:PROVIDER:AGENT"] {
        assert!(why.contains(word), "{why}");
    }
}

#[test]
fn end_and_sigterm_leave_what_is_online() {
    let node = Node::new();
    let rhs = node.start("one");
    open_online(&rhs, &["a"]);
    rhs.say(ToHost::End);
    rhs.gone();
    assert!(rhs.host.wait_for_end(LONG));
    assert!(node.path("run/test/a").exists());
    let rhs = node.start("two");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(rhs.host.pid()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(rhs.host.wait_for_end(LONG));
}

#[test]
fn a_host_is_there_once_and_leaves_no_zombie() {
    let node = Node::new();
    let rhs = node.start("shared");
    assert!(matches!(node.try_start("shared"), Err(ClientError::Exists(_))));
    let pid = rhs.host.pid();
    assert!(
        nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap()))).unwrap().as_raw()
            == i32::try_from(pid).unwrap()
    );
    rhs.host.kill();
    rhs.gone();
    until("no zombie is left", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    // The socket that is left is no obstacle.
    drop(node.start("shared"));
}

#[test]
fn a_program_that_is_no_host_is_an_error_in_time() {
    let node = Node::new();
    node.script("csv-rhs", "#!/bin/sh\nexit 3\n");
    let error = node.try_start("x").err().unwrap();
    assert!(matches!(error, ClientError::NoWelcome { .. }), "{error}");
    assert!(Host::list(&node.run_dir()).is_empty());
}

/// Printed, not judged: other tests run at the same time.
#[test]
fn two_hundred_resources_cost_little() {
    let node = Node::new();
    let rhs = node.start("shared");
    for number in 0..200 {
        rhs.open(&spec(&format!("r{number}"), "Test", &[]));
    }
    let calls: Vec<u64> = (0..200).map(|number| rhs.begin(&format!("r{number}"), Entry::Online)).collect();
    calls.into_iter().for_each(|call| drop(rhs.done(call)));
    let before = cpu_ticks(rhs.host.pid());
    // What is measured is the time itself.
    let seconds = 10;
    for _ in 0..seconds {
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(rhs.lease(LEASE_MS), []);
    }
    let ticks = cpu_ticks(rhs.host.pid()) - before;
    println!("200 resources, default polls, {seconds} s: {ticks}0 ms of CPU");
    assert!(!rhs.has_said(|said| matches!(said, FromHost::Failed { .. })));
    assert!(ticks < seconds * 50, "half a core for polls: {ticks} ticks in {seconds} s");
}

/// User and system time in hundredths of a second.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}
