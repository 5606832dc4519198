//! Virtual machines under real QEMU, emulated, with a guest that counts on its disk.
//!
//! Skipped, with a line that says so, where QEMU or the guests' kernel package cannot be had.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "vm/rig.rs"]
mod rig;

use csv_resource::api::{Failure, Resource};
use rig::{Console, Lab, PATIENCE, counts_on_disk, guest, kill, open, pid, run, status, verb};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn none() -> Value {
    json!({})
}

#[test]
fn a_machine_is_watched_paused_adopted_and_shut_down() {
    if guest().is_none() {
        return;
    }
    let (lab, name) = (Lab::new(), "counter");
    let (node, image, console) = (lab.node("n1"), lab.image("disk.img"), lab.console(name));
    let properties = lab.properties(name, "count button", &[("disk", image.to_str().unwrap())]);
    let mut vm = open(&node, name, &properties);
    assert!(vm.adopt().is_err(), "there is nothing to adopt");
    vm.online().unwrap();
    assert_eq!(vm.online(), Ok(()), "online is asked for again");
    console.counts_on(3);
    assert_eq!((vm.looks_alive(), vm.is_alive()), (Ok(()), Ok(())));

    verb(&mut *vm, "pause", &none());
    let paused_at = console.last_count();
    assert_eq!((vm.is_alive(), status(&mut *vm).as_str()), (Ok(()), "paused"));
    assert_eq!(console.last_count(), paused_at);
    verb(&mut *vm, "resume", &none());
    console.counts_on(1);

    let qemu = pid(&mut *vm);
    drop(vm);
    let mut vm = open(&node, name, &properties);
    vm.adopt().unwrap();
    assert_eq!((pid(&mut *vm), vm.is_alive()), (qemu, Ok(())));
    console.counts_on(1);
    assert!(matches!(vm.control("dance", &none()), Err(Failure::Unsupported(_))));
    let answer = verb(&mut *vm, "qmp", &json!({ "execute": "query-name" }));
    assert_eq!(answer["name"], name);

    vm.offline().unwrap();
    assert!(console.lines().contains(&"guest: button".to_owned()));
    console.check(1);
    assert_eq!(counts_on_disk(&image), console.counts());
    assert!(!std::path::Path::new(&format!("/proc/{qemu}")).exists());
    assert_eq!(vm.offline(), Ok(()));
    assert!(vm.looks_alive().is_err() && !node.has_reports());
}

#[test]
fn a_qemu_that_is_killed_is_reported_at_once_and_a_deaf_guest_is_killed() {
    if guest().is_none() {
        return;
    }
    let (lab, name) = (Lab::new(), "idle");
    let node = lab.node("n1");
    let mut vm = open(&node, name, &lab.properties(name, "idle", &[("shutdown_timeout_s", "1")]));
    vm.online().unwrap();
    let asked = Instant::now();
    vm.offline().unwrap();
    assert!(asked.elapsed() >= Duration::from_secs(1));
    node.event_with("did not shut down within 1 s");

    vm.online().unwrap();
    kill(pid(&mut *vm));
    let why = node.failure();
    assert!(why.contains("signal 9"), "{why}");
    assert!(vm.looks_alive().is_err() && vm.is_alive().is_err());
    vm.terminate().unwrap();
    vm.terminate().unwrap();
}

#[test]
fn what_a_dead_host_left_is_ended_before_a_start() {
    if guest().is_none() {
        return;
    }
    let (lab, name) = (Lab::new(), "a name with, comma");
    let node = lab.node("n1");
    let properties = lab.properties("left", "idle", &[]);
    let mut vm = open(&node, name, &properties);
    vm.online().unwrap();
    let old = pid(&mut *vm);
    drop(vm);
    // It died before it could save what it had started.
    csv_resource::api::Services::save(&*node, None).unwrap();
    let mut vm = open(&node, name, &properties);
    assert!(vm.adopt().is_err());
    vm.online().unwrap();
    assert_ne!(pid(&mut *vm), old);
    node.event_with(&format!("process {old}"));
    drop(vm);
    let mut vm = open(&node, name, &properties);
    vm.terminate().unwrap();
    assert!(vm.adopt().is_err());
}

#[test]
fn a_saved_machine_goes_on_where_it_was() {
    if guest().is_none() {
        return;
    }
    let (lab, name) = (Lab::new(), "sleeper");
    let (n1, n2, image, console) = (lab.node("n1"), lab.node("n2"), lab.image("disk.img"), lab.console(name));
    let disk = image.to_str().unwrap();
    let properties = lab.properties(name, "count button", &[("disk", disk), ("offline_action", "save")]);
    let mut vm = open(&n1, name, &properties);
    vm.online().unwrap();
    console.counts_on(2);
    vm.offline().unwrap();
    let state = lab.path("disk.img.vmstate");
    assert!(state.exists());
    assert_eq!(status(&mut *vm), "off");
    let at = console.last_count();

    // On another node, since the state lies beside the disk.
    let mut vm = open(&n2, name, &properties);
    vm.online().unwrap();
    console.counts_on(2);
    assert!(!state.exists(), "a state is used once");
    assert_eq!(vm.is_alive(), Ok(()));
    console.check(1);
    assert!(console.last_count() > at);

    verb(&mut *vm, "shutdown", &none());
    vm.offline().unwrap();
    assert!(!state.exists());
    assert_eq!(counts_on_disk(&image), console.counts());

    // One that cannot be loaded is put aside.
    std::fs::write(&state, b"no state of QEMU at all").unwrap();
    let hardware = json!({ "machine": "q35", "accelerator": "tcg", "cpu": "max" });
    let beside = json!({ "vm": name, "hardware": hardware }).to_string();
    std::fs::write(lab.path("disk.img.vmstate.json"), beside).unwrap();
    vm.online().unwrap();
    n2.event_with("put aside");
    assert!(lab.path("disk.img.vmstate.bad").exists() && !state.exists());
    verb(&mut *vm, "kill", &none());
    vm.offline().unwrap();
}

#[test]
fn a_guest_goes_on_only_without_a_saved_state() {
    if guest().is_none() {
        return;
    }
    let (lab, name) = (Lab::new(), "unsaved");
    let (node, image, console) = (lab.node("n1"), lab.image("disk.img"), lab.console(name));
    let disk = image.to_str().unwrap();
    let properties = lab.properties(name, "count button", &[("disk", disk), ("offline_action", "save")]);
    let mut vm = open(&node, name, &properties);
    vm.online().unwrap();
    console.counts_on(2);
    let (state, json) = (lab.path("disk.img.vmstate"), lab.path("disk.img.vmstate.json"));
    // The state cannot be finished, and one that can be found is removed before the guest goes on.
    std::fs::write(&state, b"a state").unwrap();
    std::fs::create_dir(&json).unwrap();
    let error = vm.offline().unwrap_err();
    assert!(error.to_string().contains("could not be saved"), "{error}");
    assert!(!state.exists() && !lab.path("disk.img.vmstate.part").exists());
    assert_eq!(status(&mut *vm), "running");
    console.counts_on(2);
    // One that cannot be removed keeps it stopped.
    std::fs::create_dir(&state).unwrap();
    let error = vm.offline().unwrap_err();
    assert!(error.to_string().contains("is kept paused"), "{error}");
    let stands = |vm: &mut dyn Resource| assert_eq!(status(vm), "postmigrate");
    stands(&mut *vm);
    let refused = |vm: &mut dyn Resource| {
        let error = vm.control("resume", &none()).unwrap_err();
        assert!(error.to_string().contains("vmstate, which cannot be removed"), "{error}");
    };
    refused(&mut *vm);
    verb(&mut *vm, "shutdown", &none());
    assert!(vm.offline().is_err());
    // It is no guest that was sent away.
    assert_eq!(vm.is_alive(), Ok(()));
    refused(&mut *vm);
    stands(&mut *vm);
    std::fs::remove_dir(&state).unwrap();
    verb(&mut *vm, "resume", &none());
    console.counts_on(2);
    // A state whose guest QEMU refuses to let run, since another has the image, is kept.
    std::fs::remove_dir(&json).unwrap();
    verb(&mut *vm, "save", &none());
    vm.offline().unwrap();
    assert!(state.exists());
    let elsewhere = lab.path("n1");
    let more = [("disk", disk), ("save_dir", elsewhere.to_str().unwrap())];
    let mut other = open(&node, "other", &lab.properties("other", "idle", &more));
    other.online().unwrap();
    let error = vm.online().unwrap_err();
    assert!(error.to_string().contains("refused \"cont\""), "{error}");
    assert!(state.exists());
    other.terminate().unwrap();
    vm.online().unwrap();
    console.counts_on(2);
    console.check(1);
    assert!(!state.exists());
    vm.terminate().unwrap();
}

#[test]
fn what_cannot_be_started_says_why() {
    if guest().is_none() {
        return;
    }
    let lab = Lab::new();
    let node = lab.node("n1");
    let (image, qcow2) = (lab.image("disk.img"), lab.qcow2("disk.qcow2"));
    let (image, qcow2) = (image.to_str().unwrap(), qcow2.to_str().unwrap());
    let online = |name: &str, more: &[(&str, &str)]| {
        let mut vm = open(&node, name, &lab.properties(name, "idle", more));
        let result = vm.online();
        if result.is_err() {
            vm.terminate().unwrap();
        }
        (vm, result)
    };
    let (mut first, started) = online("first", &[("disk", image)]);
    started.unwrap();
    let holder = pid(&mut *first);
    let (_, error) = online("second", &[("disk", image)]);
    let error = error.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Failure::Failed(_)) && text.contains("in use"), "{error}");
    assert!(text.contains(&holder.to_string()), "{error}");
    first.terminate().unwrap();

    let config = |failure: &Failure| matches!(failure, Failure::Config(_));
    let not_here = |failure: &Failure| matches!(failure, Failure::NotHere(_));
    let missing = lab.path("none.img");
    let as_raw = format!("{qcow2},format=raw");
    let as_qcow2 = format!("{image},format=qcow2");
    type Case<'a> = (&'a [(&'a str, &'a str)], &'a dyn Fn(&Failure) -> bool, &'a str);
    let cases: [Case; 7] = [
        (&[("disk", missing.to_str().unwrap())], &not_here, "none.img"),
        (&[("disk", &as_raw)], &config, "qcow2"),
        (&[("disk", &as_qcow2)], &config, "not in the format qcow2"),
        (&[("memory_mib", "16000000")], &not_here, "16000000 MiB"),
        (&[("qemu", "/no/such/qemu")], &not_here, "install the package"),
        (&[("extra_args", "-device no-such-device")], &config, "no-such-device"),
        (&[("nic", "tap,bridge=no-such-br")], &not_here, "no bridge"),
    ];
    for (more, kind, text) in cases {
        let (_, result) = online("bad", more);
        let error = result.unwrap_err();
        assert!(kind(&error) && error.to_string().contains(text), "{more:?}: {error:?}");
    }
}

#[test]
fn a_guest_that_shuts_itself_down_fails_or_stays_off() {
    if guest().is_none() {
        return;
    }
    let (lab, name) = (Lab::new(), "short");
    let node = lab.node("n1");
    let mut vm = open(&node, name, &lab.properties(name, "poweroff", &[]));
    vm.online().unwrap();
    assert_eq!(node.failure(), "the guest shut itself down");
    assert!(vm.is_alive().unwrap_err().to_string().contains("shut itself down"));
    vm.terminate().unwrap();

    let node = lab.node("n2");
    let properties = lab.properties(name, "poweroff", &[("on_guest_shutdown", "stay")]);
    let mut vm = open(&node, name, &properties);
    vm.online().unwrap();
    node.event_with("stays off");
    assert_eq!((vm.looks_alive(), vm.is_alive()), (Ok(()), Ok(())));
    assert_eq!((status(&mut *vm).as_str(), node.has_reports()), ("off", false));
    drop(vm);
    let mut vm = open(&node, name, &properties);
    assert_eq!((vm.adopt(), vm.is_alive()), (Ok(()), Ok(())));
    verb(&mut *vm, "start", &none());
    assert!(matches!(status(&mut *vm).as_str(), "running" | "ended"));
    vm.terminate().unwrap();
    // Offline is not off: it may be online elsewhere.
    let error = vm.control("start", &none()).unwrap_err();
    assert!(error.to_string().contains("csvctl vm start"), "{error}");
    assert_eq!(status(&mut *vm), "off");
    assert!(vm.looks_alive().is_err());
}

#[test]
fn the_agent_of_a_guest_is_its_heartbeat() {
    if guest().is_none() {
        return;
    }
    let (lab, name) = (Lab::new(), "agent");
    let node = lab.node("n1");
    let more = [("guest_agent", "true"), ("agent_timeout_s", "5")];
    let mut vm = open(&node, name, &lab.properties(name, "agent agent-dies", &more));
    vm.online().unwrap();
    let began = Instant::now();
    // It answers twice, and never again; before it answers, its silence counts for nothing.
    let error = loop {
        match vm.is_alive() {
            Ok(()) => assert!(began.elapsed() < PATIENCE, "its silence is not noticed"),
            Err(error) => break error,
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(error.to_string().contains("agent has been silent"), "{error}");
    assert!(lab.console(name).lines().contains(&"guest: up".to_owned()));
    vm.terminate().unwrap();
}

#[test]
fn a_guest_whose_storage_is_lost_waits_and_goes_on() {
    if guest().is_none() || !rustix::process::geteuid().is_root() {
        println!("skipped: needs root for a file system that is full");
        return;
    }
    let (lab, name) = (Lab::new(), "full");
    let node = lab.node("n1");
    let (small, whole) = (lab.path("small"), lab.path("whole"));
    std::fs::create_dir(&small).unwrap();
    let mount = small.to_str().unwrap();
    run("mkfs.ext4", &["-q", "-F", "-m", "0", whole.to_str().unwrap(), "32M"]);
    run("mount", &["-o", "loop", whole.to_str().unwrap(), mount]);
    let _mounted = Mounted(mount);
    {
        let (image, filler) = (small.join("disk.img"), small.join("filler"));
        run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap(), "64M"]);
        // What is free then is too little for what the guest writes.
        run("fallocate", &["-l", "20M", filler.to_str().unwrap()]);
        let mut vm = open(&node, name, &lab.properties(name, "fill", &[("disk", image.to_str().unwrap())]));
        vm.online().unwrap();
        let lost = node.event_with("storage lost");
        assert!(lost.contains("no space"), "{lost}");
        for _ in 0..3 {
            assert_eq!(vm.is_alive(), Ok(()), "waiting for storage counts as online");
        }
        assert!(!node.has_reports());
        std::fs::remove_file(&filler).unwrap();
        let began = Instant::now();
        while !lab.console(name).lines().contains(&"guest: filled".to_owned()) {
            assert_eq!(vm.is_alive(), Ok(()));
            assert!(began.elapsed() < PATIENCE, "{:#?}", lab.console(name).lines());
            std::thread::sleep(Duration::from_millis(100));
        }
        vm.is_alive().unwrap();
        node.event_with("storage answers again");
        assert_eq!(node.events().iter().filter(|event| event.contains("storage lost")).count(), 1);
        vm.terminate().unwrap();
    }
}

/// Migration ports of one test, so that those that run at the same time do not meet.
fn machine(
    lab: &Lab,
    name: &str,
    ports: &str,
) -> (Vec<(String, String)>, std::path::PathBuf, std::path::PathBuf) {
    let (raw, qcow2) = (lab.image("disk.img"), lab.qcow2("disk1.qcow2"));
    let (disk, disk1) = (raw.to_str().unwrap(), qcow2.to_str().unwrap());
    let more = [("disk", disk), ("disk1", disk1), ("migration_ports", ports)];
    (lab.properties(name, "count button", &more), raw, qcow2)
}

fn await_guest(source: &mut dyn Resource, target: &mut dyn Resource) -> Value {
    let hardware = verb(source, "status", &none())["hardware"].clone();
    let waiting = json!({ "listen": "127.0.0.1", "hardware": hardware });
    verb(target, "incoming", &waiting)["uri"].clone()
}

fn stays(source: &mut dyn Resource, console: &Console) {
    assert_eq!((source.is_alive(), status(source).as_str()), (Ok(()), "running"));
    console.counts_on(2);
}

#[test]
fn a_guest_moves_while_it_counts() {
    if guest().is_none() {
        return;
    }
    let (lab, name) = (Lab::new(), "mover");
    let names = ["n1", "n2"];
    let (properties, raw, qcow2) = machine(&lab, name, "41000-41019");
    let nodes = names.map(|node| lab.node(node));
    let mut vms = [open(&nodes[0], name, &properties), open(&nodes[1], name, &properties)];
    let console = lab.console(name);
    vms[0].online().unwrap();
    console.counts_on(2);
    for round in 0..10 {
        let [first, second] = &mut vms;
        let (source, target, to) = if round % 2 == 0 { (first, second, 1) } else { (second, first, 0) };
        let uri = await_guest(&mut **source, &mut **target);
        assert!(target.looks_alive().is_ok() && target.is_alive().is_err(), "it waits only");
        let sent = verb(&mut **source, "migrate", &json!({ "uri": uri, "tls_hostname": names[to] }));
        assert_eq!(status(&mut **source), "postmigrate");
        let handover = Instant::now();
        assert_eq!(verb(&mut **target, "arrived", &none())["status"], "running");
        let handover = handover.elapsed();
        verb(&mut **source, "migrated", &none());
        assert_eq!((status(&mut **source).as_str(), target.is_alive()), ("off", Ok(())));
        println!(
            "migration {round}: down {} ms and {} ms for the handover; {} ms in all, {} KiB sent in {} rounds",
            sent["downtime_ms"],
            handover.as_millis(),
            sent["total_time_ms"],
            sent["transferred_bytes"].as_u64().unwrap() >> 10,
            sent["rounds"],
        );
        assert!(sent["total_time_ms"].as_u64().unwrap() > 0);
        console.counts_on(2);
    }
    vms[0].offline().unwrap();
    assert!(nodes.iter().all(|node| !node.has_reports()));
    console.check(1);
    assert_eq!(counts_on_disk(&raw), console.counts());
    let again = lab.path("disk1.raw");
    run("qemu-img", &["check", "-q", qcow2.to_str().unwrap()]);
    run("qemu-img", &["convert", "-O", "raw", qcow2.to_str().unwrap(), again.to_str().unwrap()]);
    assert_eq!(counts_on_disk(&again), console.counts());
}

#[test]
fn a_migration_that_fails_leaves_the_guest_where_it_was() {
    if guest().is_none() {
        return;
    }
    let (lab, name) = (Lab::new(), "stayer");
    let (properties, _, _) = machine(&lab, name, "41020-41039");
    let (n1, n2) = (lab.node("n1"), lab.node("n2"));
    let (mut source, mut target) = (open(&n1, name, &properties), open(&n2, name, &properties));
    let console = lab.console(name);
    source.online().unwrap();
    console.counts_on(2);
    // The other end is not who it should be.
    let uri = await_guest(&mut *source, &mut *target);
    let error = source.control("migrate", &json!({ "uri": uri, "tls_hostname": "n9" })).unwrap_err();
    assert!(error.to_string().contains("n9"), "{error}");
    stays(&mut *source, &console);

    // Its QEMU dies in the middle.
    let uri = await_guest(&mut *source, &mut *target);
    let slowly = |uri: &Value| json!({ "uri": uri, "tls_hostname": "n2", "bandwidth_mib": 1 });
    let waiting = pid(&mut *target);
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            n1.progress_with("migrating: ");
            kill(waiting);
        });
        source.control("migrate", &slowly(&uri)).unwrap_err()
    });
    assert!(error.to_string().contains("migrating failed"), "{error}");
    stays(&mut *source, &console);
    assert!(target.control("arrived", &none()).is_err());

    // Nobody waits for it any more.
    n1.forget_progress();
    let uri = await_guest(&mut *source, &mut *target);
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            n1.progress_with("migrating: ");
            n1.cancel(true);
        });
        source.control("migrate", &slowly(&uri)).unwrap_err()
    });
    assert_eq!(error, Failure::Cancelled);
    n1.cancel(false);
    stays(&mut *source, &console);
    verb(&mut *target, "cancel-incoming", &none());
    console.check(1);
}

#[test]
fn whoever_dies_in_a_migration_the_guest_goes_on() {
    if guest().is_none() {
        return;
    }
    let (lab, name) = (Lab::new(), "survivor");
    let (properties, raw, _) = machine(&lab, name, "41060-41079");
    let (n1, n2) = (lab.node("n1"), lab.node("n2"));
    let (mut source, mut target) = (open(&n1, name, &properties), open(&n2, name, &properties));
    let console = lab.console(name);
    source.online().unwrap();
    console.counts_on(2);

    // It has everything, and dies before it is told to go on.
    let uri = await_guest(&mut *source, &mut *target);
    verb(&mut *source, "migrate", &json!({ "uri": uri, "tls_hostname": "n2" }));
    kill(pid(&mut *target));
    assert!(target.control("arrived", &none()).is_err());
    let refused = source.control("resume", &none()).unwrap_err();
    assert!(refused.to_string().contains("being moved"), "{refused}");
    verb(&mut *source, "hold", &none());
    verb(&mut *source, "take-back", &none());
    stays(&mut *source, &console);
    console.check(1);

    // The source's resource host dies while QEMU sends.
    let hardware = verb(&mut *source, "status", &none())["hardware"].clone();
    let waiting = json!({ "listen": "127.0.0.1", "hardware": hardware, "tls": false });
    let uri = verb(&mut *target, "incoming", &waiting)["uri"].clone();
    verb(
        &mut *source,
        "qmp",
        &json!({ "execute": "migrate-set-parameters", "arguments": { "tls-creds": "" } }),
    );
    verb(&mut *source, "qmp", &json!({ "execute": "migrate", "arguments": { "uri": uri } }));
    drop(source);
    let mut source = open(&n1, name, &properties);
    source.adopt().unwrap();
    let began = Instant::now();
    while status(&mut *source) != "postmigrate" {
        assert!(began.elapsed() < PATIENCE, "{}", status(&mut *source));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(source.is_alive(), Ok(()), "it may go on at the other end at any moment");
    assert_eq!(verb(&mut *source, "status", &none())["phase"], "migrated");
    verb(&mut *target, "cancel-incoming", &none());
    source.online().unwrap();
    stays(&mut *source, &console);

    // The source dies between sending and the word to go on: nothing is lost.
    let uri = await_guest(&mut *source, &mut *target);
    verb(&mut *source, "migrate", &json!({ "uri": uri, "tls_hostname": "n2" }));
    kill(pid(&mut *source));
    target.online().unwrap();
    console.counts_on(2);
    console.check(1);
    source.terminate().unwrap();

    // The source dies in the middle: a start from the disks.
    n2.forget_progress();
    let uri = await_guest(&mut *target, &mut *source);
    let sending = pid(&mut *target);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            n2.progress_with("migrating: ");
            kill(sending);
        });
        let back = json!({ "uri": uri, "tls_hostname": "n1", "bandwidth_mib": 1 });
        assert!(target.control("migrate", &back).is_err());
    });
    source.online().unwrap();
    n1.event_with("did not arrive");
    console.counts_on(2);
    source.offline().unwrap();
    let counts = counts_on_disk(&raw);
    assert!(counts.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{counts:?}");
    let told = console.counts();
    assert!(told.iter().all(|count| counts.contains(count)), "what was durable is lost");
}

#[test]
fn every_device_starts_and_moves() {
    if guest().is_none() {
        return;
    }
    let lab = Lab::new();
    let bridge = Bridge::make();
    for machine in ["q35", "pc"] {
        let (image, qcow2) = (lab.image("a.img"), lab.qcow2("b.qcow2"));
        let readonly = lab.image("c, with comma.img");
        let readonly = format!("{},readonly=on,bus=sata", readonly.to_str().unwrap().replace(',', ",,"));
        let scsi = format!("{},bus=scsi", qcow2.to_str().unwrap());
        let screen = lab.path("screen");
        let vnc = format!("unix:{}", screen.display());
        let mut more = vec![
            ("machine", machine),
            ("disk", image.to_str().unwrap()),
            ("disk1", scsi.as_str()),
            ("disk2", readonly.as_str()),
            ("serial", "socket"),
            ("vnc", vnc.as_str()),
            ("guest_agent", "true"),
            ("cpus", "2"),
            ("nic", "user"),
            ("migration_ports", "41040-41059"),
        ];
        let card = bridge.as_ref().map(|bridge| format!("tap,bridge={}", bridge.0));
        more.extend(card.as_ref().map(|card| ("nic1", card.as_str())));
        let properties = lab.properties(machine, "idle", &more);
        let (n1, n2) = (lab.node("n1"), lab.node("n2"));
        let (mut source, mut target) = (open(&n1, machine, &properties), open(&n2, machine, &properties));
        source.online().unwrap();
        assert_eq!(source.is_alive(), Ok(()));
        assert_eq!(bridge.as_ref().map_or(1, Bridge::ports), 1, "its card is on the bridge");
        let picture = lab.path("picture.ppm");
        verb(&mut *source, "screendump", &json!({ "path": picture }));
        assert!(picture.exists());
        let uri = await_guest(&mut *source, &mut *target);
        verb(&mut *source, "migrate", &json!({ "uri": uri, "tls_hostname": "n2" }));
        verb(&mut *target, "arrived", &none());
        verb(&mut *source, "migrated", &none());
        assert_eq!(target.is_alive(), Ok(()));
        assert_eq!(bridge.as_ref().map_or(1, Bridge::ports), 1, "and vanishes with its QEMU");
        target.terminate().unwrap();
    }
}

/// A bridge of this test, where one can be made.
struct Bridge(String);

impl Bridge {
    fn make() -> Option<Bridge> {
        let bridge = Bridge(format!("csvt{}", std::process::id()));
        let made =
            std::process::Command::new("ip").args(["link", "add", &bridge.0, "type", "bridge"]).output();
        if made.is_ok_and(|output| output.status.success()) {
            return Some(bridge);
        }
        println!("without a bridge: it needs root, iproute2, and the kernel's bridges");
        std::mem::forget(bridge);
        None
    }

    fn ports(&self) -> usize {
        std::fs::read_dir(format!("/sys/class/net/{}/brif", self.0)).unwrap().count()
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        run("ip", &["link", "del", &self.0]);
    }
}

/// Unmounted also by a test that fails.
struct Mounted<'a>(&'a str);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        run("umount", &["--lazy", self.0]);
    }
}
