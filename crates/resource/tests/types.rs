//! Resource types in a real host: applications, scripts, units, OCF agents, and the example in C.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    missing_debug_implementations,
    reason = "tests"
)]

mod common;

use common::{Node, is_there, kill, spec, until};
use csv_resource::protocol::{Entry, FromHost, HostState, Outcome};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Without polls: what is heard is heard by itself.
fn unpolled(name: &str, kind: &str, properties: &[(&str, &str)]) -> csv_resource::api::Spec {
    let mut spec = spec(name, kind, properties);
    (spec.looks_alive_ms, spec.is_alive_ms) = (Some(0), Some(0));
    spec
}

const FOREVER: &str = "sh -c 'while :; do sleep 1000; done'";

#[test]
fn an_application_goes_online_is_killed_and_goes_offline() {
    let node = Node::new();
    let rhs = node.start("shared");
    let app = unpolled("app", "GenericApplication", &[("command", FOREVER), ("env", "A=b c")]);
    rhs.open(&app);
    rhs.call("app", Entry::Online);
    let pid = rhs.control("app", "pid").as_u64().unwrap();
    until("it became its program", || {
        fs::read(format!("/proc/{pid}/environ")).unwrap().windows(5).any(|at| at == b"A=b c")
    });
    rhs.call("app", Entry::IsAlive);
    kill(pid);
    let why = rhs.failed("app");
    assert!(why.contains("killed by signal 9"), "{why}");
    rhs.call("app", Entry::Online);
    let next = rhs.control("app", "pid").as_u64().unwrap();
    assert_ne!(next, pid);
    rhs.call("app", Entry::Offline);
    assert!(!is_there(next));
    assert!(!rhs.has_said(|said| matches!(said, FromHost::Failed { .. })), "its end was wanted");
    let killed = |said: &FromHost| matches!(said, FromHost::Event { text, .. } if text.contains("SIGTERM"));
    assert!(!rhs.has_said(killed), "it ended by SIGTERM");
}

#[test]
fn everything_that_an_application_started_ends_with_it() {
    let node = Node::new();
    let rhs = node.start("shared");
    let pids = node.path("pids");
    // A child that ignores SIGTERM, one that left the session, and one that threw its environment away, too.
    let script = node.script(
        "tree",
        &format!(
            "#!/bin/sh\n(trap '' TERM; while :; do sleep 1000; done) & echo $! >>{0}\n\
             setsid sh -c 'echo $$ >>{0}; while :; do sleep 1000; done' &\n\
             env -i setsid sh -c 'echo $$ >>{0}; while :; do sleep 1000; done' &\nwait\n",
            pids.display()
        ),
    );
    let command = script.display().to_string();
    rhs.open(&unpolled("app", "GenericApplication", &[("command", &command)]));
    let started = || {
        let lines = fs::read_to_string(&pids).unwrap_or_default();
        let numbers: Vec<u64> = lines.lines().filter_map(|line| line.parse().ok()).collect();
        numbers
    };
    for (round, entry) in [Entry::Offline, Entry::Terminate, Entry::Terminate].into_iter().enumerate() {
        rhs.call("app", Entry::Online);
        until("all are there", || started().len() == 3 * (round + 1));
        if round == 2 {
            // They are orphans then, but were seen before.
            rhs.call("app", Entry::IsAlive);
            kill(rhs.control("app", "pid").as_u64().unwrap());
            rhs.failed("app");
        }
        rhs.call("app", entry);
        assert!(!started().into_iter().any(is_there));
    }
}

#[test]
fn an_application_that_ignores_sigterm_is_killed() {
    let node = Node::new();
    let rhs = node.start("shared");
    let command =
        format!("sh -c \"trap '' TERM; touch {}; while :; do sleep 1000; done\"", node.path("up").display());
    rhs.open(&unpolled("app", "GenericApplication", &[("command", &command), ("stop_timeout_ms", "100")]));
    rhs.call("app", Entry::Online);
    until("it runs", || node.path("up").exists());
    let pid = rhs.control("app", "pid").as_u64().unwrap();
    rhs.call("app", Entry::Offline);
    rhs.event("did not end by SIGTERM");
    assert!(!is_there(pid));
}

#[test]
fn an_application_outlives_its_host_and_is_taken_over() {
    let node = Node::new();
    let rhs = node.start("one");
    let app = unpolled("app", "GenericApplication", &[("command", FOREVER)]);
    rhs.open(&app);
    rhs.call("app", Entry::Online);
    let pid = rhs.control("app", "pid").as_u64().unwrap();
    rhs.host.kill();
    rhs.gone();
    assert!(is_there(pid));
    let rhs = node.start("two");
    rhs.adopt(&app).unwrap();
    assert_eq!(rhs.control("app", "pid").as_u64(), Some(pid));
    rhs.call("app", Entry::IsAlive);
    kill(pid);
    rhs.failed("app");
    rhs.call("app", Entry::Terminate);
    // One whose process is gone is not taken over.
    rhs.close("app");
    assert!(rhs.adopt(&app).unwrap_err().contains("no process of it is known"));
}

#[test]
fn an_application_that_cannot_run_here_says_so() {
    let node = Node::new();
    let rhs = node.start("shared");
    for (property, value, has) in [
        ("command", "/nonsense/program", "no program on this node"),
        ("directory", "/nonsense", "is not there"),
        ("user", "nonsense-user", "no user"),
    ] {
        let mut properties = vec![("command", "sleep 1000"), (property, value)];
        properties.sort();
        properties.dedup_by_key(|(name, _)| *name);
        if property == "command" {
            properties = vec![(property, value)];
        }
        rhs.open(&unpolled("app", "GenericApplication", &properties));
        let Outcome::Failed { why, retry, elsewhere } = rhs.outcome(rhs.begin("app", Entry::Online)) else {
            panic!("online with {property}={value}");
        };
        assert!(why.contains(has) && !retry && elsewhere, "{why}");
    }
    let call = rhs.open_begin(&unpolled("bad", "GenericApplication", &[("command", "'")]), false);
    assert!(matches!(rhs.outcome(call), Outcome::Failed { retry: false, elsewhere: false, .. }));
}

/// Online is a file; `hang` and `no` in its directory name the action that hangs or fails.
const SCRIPT: &str = r#"#!/bin/sh
dir=$CSV_PROPERTY_parameter
[ "$(cat $dir/hang 2>/dev/null)" = "$1" ] && { echo $$ >$dir/hanging; sleep 1000; }
[ "$(cat $dir/no 2>/dev/null)" = "$1" ] && { echo "no $1 for $CSV_RESOURCE_NAME" >&2; exit 1; }
case $1 in
online) touch $dir/up ;;
offline|terminate) rm -f $dir/up ;;
looks_alive|is_alive) [ -e $dir/up ] ;;
close) touch $dir/closed ;;
*) exit 2 ;;
esac
"#;

#[test]
fn a_script_goes_through_its_life() {
    let node = Node::new();
    let rhs = node.start("shared");
    let (script, dir) = (node.script("script", SCRIPT), node.dir.path().display().to_string());
    let mut often = spec("s", "GenericScript", &[("script", script.to_str().unwrap()), ("parameter", &dir)]);
    often.looks_alive_ms = Some(50);
    rhs.open(&often);
    rhs.call("s", Entry::Online);
    rhs.call("s", Entry::IsAlive);
    fs::remove_file(node.path("up")).unwrap();
    rhs.failed("s");
    fs::write(node.path("no"), "online").unwrap();
    assert!(rhs.why_not(rhs.begin("s", Entry::Online)).contains("no online for s"));
    fs::remove_file(node.path("no")).unwrap();
    rhs.call("s", Entry::Online);
    rhs.call("s", Entry::Offline);
    assert!(!node.path("up").exists());
    rhs.close("s");
    assert!(node.path("closed").exists());
}

#[test]
fn what_a_script_or_an_agent_starts_outlives_the_host() {
    let node = Node::new();
    // A server that says something all the time, and is ended by its first word that nobody takes.
    let lines = r#"dir=@DIR@
up() { [ -e $dir/$1.pid ] && kill -0 $(cat $dir/$1.pid) 2>/dev/null; }
serve() { echo serving $1; (while :; do echo $1 says; echo $1 warns >&2; echo beat >>$dir/$1.beats; sleep 0.05; done) &
    echo $! >$dir/$1.pid; }
halt() { kill $(cat $dir/$1.pid); rm $dir/$1.pid; }
"#;
    let lines = lines.replace("@DIR@", &node.dir.path().display().to_string());
    let script = format!(
        "#!/bin/sh\n{lines}case $1 in online) serve s;; offline|terminate) up s && halt s; true;; close) ;; *) up s;; esac\n"
    );
    let script = node.script("script", &script);
    let agent = format!(
        "#!/bin/sh\n[ $1 = meta-data ] && {{ echo '<resource-agent name=\"x\"/>'; exit 0; }}\n{lines}\
         case $1 in start) serve a;; stop) up a && halt a; true;; *) up a || exit 7;; esac\n"
    );
    let agents = node.path("ocf/resource.d/test");
    fs::create_dir_all(&agents).unwrap();
    fs::rename(node.script("agent", &agent), agents.join("x")).unwrap();
    node.environment(&[("OCF_ROOT", node.path("ocf").to_str().unwrap())]);
    let rhs = node.start("one");
    let specs = [
        unpolled("s", "GenericScript", &[("script", script.to_str().unwrap())]),
        unpolled("a", "ocf:test:x", &[]),
    ];
    for spec in &specs {
        rhs.open(spec);
        rhs.call(&spec.name, Entry::Online);
    }
    rhs.host.kill();
    rhs.gone();
    let beats = |name: &str| fs::read(node.path(&format!("{name}.beats"))).map_or(0, |text| text.len());
    let rhs = node.start("two");
    for spec in &specs {
        let name = spec.name.as_str();
        let before = beats(name);
        until("it goes on", || beats(name) > before + 50);
        rhs.adopt(spec).unwrap();
        rhs.call(name, Entry::Offline);
        let log = fs::read_to_string(node.path(&format!("state/log/{name}.log"))).unwrap();
        let says = [format!("serving {name}\n"), format!("{name} says\n"), format!("{name} warns\n")];
        assert!(says.iter().all(|line| log.contains(line)), "{log}");
    }
}

#[test]
fn a_script_that_hangs_is_killed_when_cancelled_and_by_the_next_host() {
    let node = Node::new();
    let rhs = node.start("one");
    let (script, dir) = (node.script("script", SCRIPT), node.dir.path().display().to_string());
    let s = unpolled("s", "GenericScript", &[("script", script.to_str().unwrap()), ("parameter", &dir)]);
    rhs.open(&s);
    let hanging =
        || fs::read_to_string(node.path("hanging")).ok().and_then(|text| text.trim().parse::<u64>().ok());
    fs::write(node.path("hang"), "online").unwrap();
    let call = rhs.begin("s", Entry::Online);
    until("it hangs", || hanging().is_some());
    let first = hanging().unwrap();
    rhs.call("s", Entry::Terminate);
    assert!(rhs.why_not(call).contains("given up"));
    assert!(!is_there(first));
    fs::remove_file(node.path("hanging")).unwrap();
    rhs.begin("s", Entry::Online);
    until("it hangs again", || hanging().is_some());
    let second = hanging().unwrap();
    rhs.host.kill();
    rhs.gone();
    assert!(is_there(second), "the host's end is not the script's");
    let rhs = node.start("two");
    rhs.open(&s);
    rhs.call("s", Entry::Terminate);
    assert!(!is_there(second));
}

/// Behaves as systemctl does towards one unit, whose main process it really starts.
const SYSTEMCTL: &str = r#"#!/bin/sh
dir=@DIR@
main=$(cat $dir/main 2>/dev/null || echo 0)
alive() { [ $main != 0 ] && kill -0 $main 2>/dev/null && ! grep -q '^State:.Z' /proc/$main/status; }
eval unit=\${$#}
[ $unit = web.service ] || {
    [ $1 = show ] && { echo LoadState=not-found; echo ActiveState=inactive; echo SubState=dead; echo MainPID=0; exit 0; }
    echo "Unit $unit not loaded." >&2; exit 5; }
case $1 in
start) alive || { setsid sleep 1000 >/dev/null 2>&1 </dev/null & echo $! >$dir/main; } ;;
stop) alive && kill $main; while alive; do sleep 0.01; done; rm -f $dir/main ;;
kill) alive && kill -9 $main ;;
reset-failed) rm -f $dir/main ;;
show) echo LoadState=loaded; echo UnitFileState=enabled
    if alive; then echo ActiveState=active; echo SubState=running; echo MainPID=$main
    elif [ $main != 0 ]; then echo ActiveState=failed; echo SubState=failed; echo MainPID=0
    else echo ActiveState=inactive; echo SubState=dead; echo MainPID=0; fi ;;
*) exit 1 ;;
esac
exit 0
"#;

#[test]
fn units_go_through_their_life() {
    let node = Node::new();
    let program = node.script("systemctl", &SYSTEMCTL.replace("@DIR@", node.dir.path().to_str().unwrap()));
    node.environment(&[("CSV_SYSTEMCTL", program.to_str().unwrap())]);
    let rhs = node.start("shared");
    let main = || fs::read_to_string(node.path("main")).unwrap().trim().parse::<u64>().unwrap();
    for unit in
        [unpolled("a", "systemd:web", &[]), unpolled("b", "GenericService", &[("unit", "web.service")])]
    {
        let name = unit.name.as_str();
        rhs.open(&unit);
        rhs.call(name, Entry::Online);
        rhs.event("is enabled");
        assert_eq!(rhs.control(name, "show")["active"], "active");
        rhs.call(name, Entry::IsAlive);
        kill(main());
        assert!(rhs.failed(name).contains("web.service is failed"));
        rhs.call(name, Entry::Online);
        let pid = main();
        rhs.call(name, Entry::Offline);
        assert!(!is_there(pid));
        rhs.call(name, Entry::Online);
        let pid = main();
        rhs.call(name, Entry::Terminate);
        assert!(!is_there(pid));
        assert!(!rhs.has_said(|said| matches!(said, FromHost::Failed { .. })), "its end was wanted");
        rhs.close(name);
    }
    // Taken over by the next host.
    let a = unpolled("a", "systemd:web", &[]);
    rhs.open(&a);
    rhs.call("a", Entry::Online);
    rhs.host.kill();
    rhs.gone();
    let rhs = node.start("next");
    rhs.adopt(&a).unwrap();
    kill(main());
    rhs.failed("a");
    rhs.call("a", Entry::Terminate);
    rhs.open(&unpolled("x", "systemd:other", &[]));
    let outcome = rhs.outcome(rhs.begin("x", Entry::Online));
    let Outcome::Failed { why, retry: false, elsewhere: true } = outcome else { panic!("{outcome:?}") };
    assert!(why.contains("not installed"), "{why}");
}

#[test]
fn the_ocf_agent_dummy_goes_through_its_life() {
    // From the package resource-agents, which scripts/deps.sh installs.
    assert!(Path::new("/usr/lib/ocf/resource.d/heartbeat/Dummy").exists(), "run scripts/deps.sh");
    let info = csv_resource::types::find("ocf:heartbeat:Dummy", None).unwrap().info();
    assert!(info.properties.iter().any(|property| property.name == "state" && !property.required));
    assert_eq!(info.looks_alive.as_secs(), 10);
    let node = Node::new();
    let rhs = node.start("one");
    let state = node.path("dummy.state");
    let mut dummy = spec("d", "ocf:heartbeat:Dummy", &[("state", state.to_str().unwrap())]);
    (dummy.looks_alive_ms, dummy.is_alive_ms) = (Some(100), Some(100));
    rhs.open(&dummy);
    rhs.call("d", Entry::Online);
    assert!(state.exists());
    rhs.control("d", "validate-all");
    fs::remove_file(&state).unwrap();
    assert!(rhs.failed("d").contains("does not run"));
    rhs.call("d", Entry::Online);
    rhs.host.kill();
    rhs.gone();
    let rhs = node.start("two");
    rhs.adopt(&dummy).unwrap();
    rhs.call("d", Entry::IsAlive);
    rhs.call("d", Entry::Offline);
    assert!(!state.exists());
    rhs.call("d", Entry::Terminate);
    assert!(
        csv_resource::types::find("ocf:heartbeat:Nonsense", None).err().unwrap().contains("resource-agents")
    );
    assert!(csv_resource::types::find("ocf:../x:y", None).is_err());
}

#[test]
fn exit_codes_of_ocf_agents_say_what_helps() {
    let node = Node::new();
    let agents = node.path("ocf/resource.d/test");
    fs::create_dir_all(&agents).unwrap();
    let agent = "#!/bin/sh\n[ $1 = meta-data ] && { echo '<resource-agent name=\"x\"><parameters>\
                 <parameter name=\"code\" required=\"1\"><content type=\"integer\"/></parameter></parameters>\
                 </resource-agent>'; exit 0; }\n[ $1 = start ] && exit $OCF_RESKEY_code\nexit 7\n";
    fs::rename(node.script("agent", agent), agents.join("x")).unwrap();
    node.environment(&[("OCF_ROOT", node.path("ocf").to_str().unwrap())]);
    let rhs = node.start("shared");
    for (code, retry, elsewhere) in [(1, true, true), (2, false, false), (5, false, true), (6, false, false)]
    {
        rhs.open(&unpolled("x", "ocf:test:x", &[("code", &code.to_string())]));
        let outcome = rhs.outcome(rhs.begin("x", Entry::Online));
        let Outcome::Failed { why, retry: r, elsewhere: e } = outcome else { panic!("code {code}") };
        assert_eq!((r, e), (retry, elsewhere), "{code}: {why}");
        rhs.call("x", Entry::Terminate);
    }
}

/// The example, built as its first lines say.
fn build_example(node: &Node) -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = node.path("heartbeat_file.so");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&library)
        .arg("-I")
        .arg(crate_dir.join("include"))
        .arg(crate_dir.join("examples/c/heartbeat_file.c"))
        .arg("-lpthread")
        .status();
    assert!(built.unwrap().success());
    library
}

#[test]
fn the_example_in_c_goes_through_its_life() {
    let node = Node::new();
    let file = node.path("beat");
    let mut c = unpolled("c", "HeartbeatFile", &[("path", file.to_str().unwrap())]);
    c.library = Some(build_example(&node));
    let rhs = node.start("one");
    rhs.open(&c);
    rhs.call("c", Entry::Online);
    rhs.event("the heart beats");
    rhs.call("c", Entry::IsAlive);
    until("it beats", || rhs.control("c", "beats")["beats"].as_u64().unwrap() >= 1);
    fs::remove_file(&file).unwrap();
    assert!(rhs.failed("c").contains("cannot touch"), "reported by its own thread");
    rhs.call("c", Entry::Online);
    rhs.host.kill();
    rhs.gone();
    let rhs = node.start("two");
    rhs.adopt(&c).unwrap();
    rhs.call("c", Entry::IsAlive);
    rhs.call("c", Entry::Offline);
    assert!(!file.exists());
    rhs.call("c", Entry::Online);
    rhs.call("c", Entry::Terminate);
    assert!(!file.exists());
    let verb = Entry::Control { verb: "fly".to_owned(), arguments: serde_json::Value::Null };
    assert!(rhs.why_not(rhs.begin("c", verb)).contains("fly"));
    rhs.close("c");
    // Wrong use of a library says what is wrong.
    c.properties.clear();
    assert!(rhs.why_not(rhs.open_begin(&c, false)).contains("absolute path"));
    c.kind = "Other".to_owned();
    assert!(rhs.why_not(rhs.open_begin(&c, false)).contains("its type is HeartbeatFile"));
    c.library = Some(node.path("nothing.so"));
    assert!(rhs.why_not(rhs.open_begin(&c, false)).contains("nothing.so"));
    drop(rhs);
    assert!(node.adopt("two").is_none_or(|rhs| rhs.state("c") != Some(HostState::Online)));
}
