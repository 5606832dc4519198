//! Resources on three nodes: what is killed is started again, what hangs is ended in its time, and neither harms a neighbour.
//! Types of all kinds go through their lives; files follow a resource; looking after two hundred costs little; nonsense is
//! refused in words.

use anyhow::{Context as _, ensure};
use csv_cluster::db::{Command, GroupPolicy, GroupState, MoveKind, NewResource, ResourceState};
use csv_tests::groups::{Groups, resource};
use csv_tests::lab::Lab;
use csv_tests::membership::{kill_csvd, start_csvd};
use csv_tests::wait;
use serde_json::json;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);
/// For a restart or a new host; nothing of it waits for a poll.
const SOON: Duration = Duration::from_secs(10);
/// A new cluster would wait for nodes that its groups prefer.
const ARGS: &[&str] = &["--size", "512M", "--all-paths", "--set", "group_settle_ms=0"];
/// Of a resource that is told to hang.
const HANG_MS: u64 = 1_000;
/// For what is done besides waiting for a time-out, on a loaded machine.
const SLACK: Duration = Duration::from_secs(5);
const FOREVER: &str = "sh -c 'while :; do sleep 1000; done'";

fn up(suite: &str, more: &[(&str, &str)]) -> anyhow::Result<Lab> {
    let mut env = vec![("CSV_RHS_TEST_TYPES", "1")];
    env.extend(more);
    Lab::up_with_env(suite, "ext4", ARGS, &env)
}

/// A resource in a group of its own that stays on n1.
fn alone(groups: Groups<'_>, mut of: NewResource) -> anyhow::Result<()> {
    groups.add(&of.group, &[])?;
    of.possible = vec![groups.number("n1")?];
    groups.add_resource(&of)
}

/// Resources that must not notice what happens to others.
struct Neighbours<'a> {
    groups: Groups<'a>,
    /// Resources in the host that all share, one with a process.
    before: Option<String>,
}

impl<'a> Neighbours<'a> {
    const NAMES: [&'static str; 3] = ["near-app", "near-test", "near-own"];

    fn start(groups: Groups<'a>) -> anyhow::Result<Neighbours<'a>> {
        let [app, test, own] = Self::NAMES;
        alone(groups, resource(app, app, "GenericApplication", &[("command", FOREVER)]))?;
        alone(groups, resource(test, test, "Test", &[]))?;
        let mut separate = resource(own, own, "Test", &[]);
        separate.policy.separate_monitor = true;
        alone(groups, separate)?;
        for name in Self::NAMES {
            groups.online(name)?;
        }
        let mut neighbours = Neighbours { groups, before: None };
        neighbours.before = Some(neighbours.look()?);
        Ok(neighbours)
    }

    /// States with when they began, the process, how often each went online.
    fn look(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        for (name, verb) in Self::NAMES.into_iter().zip(["pid", "count", "count"]) {
            let status = self.groups.resource(name)?.status;
            let has = self.groups.control(name, verb, &json!({}))?;
            text.push_str(&format!(
                "{name}: {} since {}, {verb} {has}\n",
                status.state, status.since_unix_ms
            ));
        }
        Ok(text)
    }

    /// Nothing of them has changed; their host may have, and then takes a moment.
    fn check(&self, after: &str) -> anyhow::Result<()> {
        wait::until(&format!("the neighbours to be untouched after {after}"), SOON, || {
            let (before, now) = (self.before.clone().unwrap_or_default(), self.look()?);
            ensure!(now == before, "before:\n{before}now:\n{now}");
            Ok(Some(()))
        })
    }
}

fn pid(groups: Groups<'_>, name: &str) -> anyhow::Result<u64> {
    let pid = groups.control(name, "pid", &json!({}))?;
    pid.as_u64().with_context(|| format!("{name} has no process: {pid}"))
}

fn kill(lab: &Lab, node: &str, pid: u64) -> anyhow::Result<()> {
    lab.sh(node, &format!("kill -KILL {pid}")).map(drop)
}

/// Its process changes, on the same node.
fn starts_again(groups: Groups<'_>, name: &str, before: u64) -> anyhow::Result<u64> {
    wait::until(&format!("{name} to be started again"), SOON, || {
        Ok(pid(groups, name).ok().filter(|now| *now != before))
    })
}

#[test]
fn what_is_killed_comes_back() -> anyhow::Result<()> {
    let lab = up("rkill", &[])?;
    let groups = Groups::of(&lab, "n1");
    let neighbours = Neighbours::start(groups)?;
    alone(groups, resource("app", "app", "GenericApplication", &[("command", FOREVER)]))?;
    groups.online("app")?;

    // The application.
    let began = Instant::now();
    let first = pid(groups, "app")?;
    kill(&lab, "n1", first)?;
    let second = starts_again(groups, "app", first)?;
    println!("the application killed: another one after {} ms", began.elapsed().as_millis());
    groups.wait_online("app", SOON)?;
    neighbours.check("the application was killed")?;

    // Its host, and the others' with it.
    let shared = || lab.sh("n1", "pgrep -f '[c]sv-rhs shared'");
    let (before, began) = (shared()?, Instant::now());
    lab.sh("n1", &format!("kill -KILL {before}"))?;
    wait::until("a host to look after the application again", SOON, || {
        Ok((pid(groups, "app")? == second && shared()? != before).then_some(()))
    })?;
    println!("csv-rhs killed: looked after again after {} ms", began.elapsed().as_millis());
    neighbours.check("their host was killed")?;
    // One that has a host of its own outlives it, too; once is chance.
    let own = || lab.sh("n1", "pgrep -f '[c]sv-rhs own'");
    let (before, began) = (own()?, Instant::now());
    lab.sh("n1", &format!("kill -KILL {before}"))?;
    wait::until("a host to look after near-own again", SOON, || {
        let looked_after = groups.control("near-own", "count", &json!({})).is_ok();
        Ok((looked_after && own()? != before).then_some(()))
    })?;
    println!("csv-rhs of one resource killed: looked after again after {} ms", began.elapsed().as_millis());
    neighbours.check("its own host was killed")?;

    // csvd, back before it is given up. Its hosts go on.
    let hosts = lab.sh("n1", "pgrep -x csv-rhs")?;
    kill_csvd(&lab, "n1")?;
    start_csvd(&lab, "n1")?;
    wait::until("csvd to look after the application again", DEADLINE, || {
        Ok((pid(groups, "app")? == second).then_some(()))
    })?;
    ensure!(lab.sh("n1", "pgrep -x csv-rhs")? == hosts, "csvd's end was noticed by its hosts");
    neighbours.check("csvd was killed")?;
    // And it is really looked after.
    kill(&lab, "n1", second)?;
    starts_again(groups, "app", second)?;
    groups.wait_online("app", SOON)?;
    neighbours.check("the application was killed again")?;
    gone_for_good(&lab)?;
    lab.finish()
}

/// csvd of n2 does not come back: what it had runs elsewhere, and not before it has ended there.
fn gone_for_good(lab: &Lab) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n1");
    groups.add("roams", &["--preferred", "n2,n3"])?;
    groups.add_resource(&resource("roams", "roams", "GenericApplication", &[("command", FOREVER)]))?;
    groups.online("roams")?;
    groups.wait_online_at("roams", "n2", DEADLINE)?;
    let old = pid(groups, "roams")?;
    let began = Instant::now();
    kill_csvd(lab, "n2")?;
    let is_there = format!("kill -0 {old} 2>/dev/null && echo there || echo gone");
    wait::until("the application of n2 to end", DEADLINE, || {
        // Never both.
        let elsewhere = groups.group("roams")?.owner.map(|owner| owner.0) != Some(2)
            && groups.resource("roams")?.status.state == ResourceState::Online;
        let there = lab.sh("n2", &is_there)?.trim() == "there";
        ensure!(!(elsewhere && there), "it is on n2 and elsewhere");
        Ok((!there).then_some(()))
    })?;
    let ended = began.elapsed();
    groups.wait("roams", "to run elsewhere", DEADLINE, |group| {
        group.state == GroupState::Online && group.owner.map(|owner| owner.0) != Some(2)
    })?;
    println!(
        "csvd killed for good: its application ended after {} ms, and runs on {} after {} ms",
        ended.as_millis(),
        groups.owner("roams")?,
        began.elapsed().as_millis()
    );
    start_csvd(lab, "n2")?;
    csv_tests::membership::wait_state(lab, "n1", "n2", "Up")
}

/// A resource that hangs in that entry point while `/run/csv/hang` is there.
fn hanging(groups: Groups<'_>, entry: &str) -> anyhow::Result<String> {
    let name = format!("hang-{}", entry.replace('_', "-"));
    let mut properties = vec![("hang", entry), ("when", "/run/csv/hang")];
    if entry == "terminate" {
        // Going online in vain leads there.
        properties.push(("fail", "online"));
    }
    let mut of = resource(&name, &name, "Test", &properties);
    of.policy.pending_timeout_ms = HANG_MS;
    of.policy.deadlock_timeout_ms = HANG_MS;
    // A thorough look makes the quick one needless.
    of.policy.looks_alive_ms = Some(500);
    of.policy.is_alive_ms = Some(if entry == "is_alive" { 500 } else { 600_000 });
    of.policy.restart_threshold = 1;
    of.policy.restart_delay_ms = 100;
    of.policy.retry_after_ms = 0;
    alone(groups, of)?;
    Ok(name)
}

fn hang(lab: &Lab, on: bool) -> anyhow::Result<()> {
    let script = if on { "touch /run/csv/hang" } else { "rm -f /run/csv/hang" };
    lab.sh("n1", script).map(drop)
}

/// In which state it must be in the end, and after how many time-outs at the latest.
struct Expected {
    entry: &'static str,
    /// It hangs when it is online already.
    late: bool,
    state: ResourceState,
    timeouts: u32,
}

#[test]
fn what_hangs_is_ended_in_its_time() -> anyhow::Result<()> {
    let lab = up("rhang", &[])?;
    let groups = Groups::of(&lab, "n1");
    let neighbours = Neighbours::start(groups)?;
    let of = |entry, late, state, timeouts| Expected { entry, late, state, timeouts };
    use ResourceState::{Failed, Offline, Online};
    for expected in [
        // It and its restart: opened in vain.
        of("open", false, Failed, 2),
        // It and its restart: each is first given up and then, since its thread hangs, its host is ended.
        of("online", false, Failed, 4),
        of("terminate", false, Failed, 2),
        of("looks_alive", true, Failed, 4),
        of("is_alive", true, Failed, 4),
        // Ended by a new host.
        of("offline", true, Offline, 2),
        // Its host is ended, and it is started again.
        of("control", true, Online, 2),
        of("adopt", true, Failed, 4),
        // What is closed is off.
        of("close", true, Offline, 2),
    ] {
        one_hang(&lab, &expected).with_context(|| format!("it hangs in {}", expected.entry))?;
        neighbours.check(expected.entry)?;
    }
    lab.finish()
}

fn one_hang(lab: &Lab, expected: &Expected) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n1");
    let Expected { entry, late, state, timeouts } = *expected;
    let name = hanging(groups, entry)?;
    if late {
        groups.online(&name)?;
    }
    hang(lab, true)?;
    let began = Instant::now();
    match entry {
        "open" | "online" | "terminate" => {
            groups.order("online", &name)?;
        }
        "offline" | "close" => {
            groups.order("offline", &name)?;
        }
        "control" => {
            let refused = groups.control(&name, "count", &json!({})).err().context("control answered")?;
            println!("control that hangs: {refused:#}");
        }
        "adopt" => lab.sh("n1", "pkill -KILL -f '[c]sv-rhs shared'").map(drop)?,
        _ => {}
    }
    let limit = Duration::from_millis(HANG_MS) * timeouts + SLACK;
    if entry == "control" {
        // It must have failed first.
        wait::until("an event that tells of the hang", limit, || {
            Ok(lab.ctl("n1", &["events"])?.contains(&format!("{name} hangs")).then_some(()))
        })?;
    }
    let resource = groups.wait_resource(&name, state, limit)?;
    println!("hangs in {entry}: {state} after {} ms ({})", began.elapsed().as_millis(), resource.status.why);
    if state == ResourceState::Failed {
        if entry != "terminate" && entry != "adopt" {
            // And not tried again.
            groups.wait(&name, "to fail", limit, |group| matches!(group.state, GroupState::Failed { .. }))?;
        }
        let why = &resource.status.why;
        ensure!(why.contains("hang") || why.contains("within"), "\"{why}\" does not tell that it hangs");
    }
    if state == ResourceState::Offline {
        groups
            .wait(&name, "to be offline", limit, |group| matches!(group.state, GroupState::Offline { .. }))?;
    }
    hang(lab, false)?;
    // What hangs no more works.
    groups.order("online", &name)?;
    groups.wait_resource(&name, ResourceState::Online, DEADLINE)?;
    groups.offline(&name)
}

/// Behaves as systemctl does towards one unit, whose main process it really starts. Its notes are the node's own.
const SYSTEMCTL: &str = r#"#!/bin/sh
dir=/run/csv/unit
mkdir -p $dir
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
show) echo LoadState=loaded; echo UnitFileState=disabled
    if alive; then echo ActiveState=active; echo SubState=running; echo MainPID=$main
    elif [ $main != 0 ]; then echo ActiveState=failed; echo SubState=failed; echo MainPID=0
    else echo ActiveState=inactive; echo SubState=dead; echo MainPID=0; fi ;;
*) exit 1 ;;
esac
exit 0
"#;

/// The example of a type in C.
fn build_library(dir: &std::path::Path) -> anyhow::Result<String> {
    let resource = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/resource");
    let library = dir.join("heartbeat_file.so");
    let mut cc = std::process::Command::new("cc");
    cc.args(["-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-o"])
        .arg(&library)
        .arg(format!("-I{}", resource.join("include").display()))
        .arg(resource.join("examples/c/heartbeat_file.c"))
        .arg("-lpthread");
    wait::run(&mut cc, DEADLINE)?.ok("cc")?;
    Ok(library.display().to_string())
}

/// A type's way to fail, and what tells that it runs.
struct Life {
    resource: NewResource,
    /// Makes it fail, on the node that has it.
    fail: &'static str,
    /// Succeeds on a node that has it.
    runs: &'static str,
}

#[test]
fn types_of_all_kinds_go_through_their_lives() -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir_in("/var/tmp")?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    let systemctl = dir.path().join("systemctl");
    std::fs::write(&systemctl, SYSTEMCTL)?;
    std::fs::set_permissions(&systemctl, std::fs::Permissions::from_mode(0o755))?;
    let lab = up("rlife", &[("CSV_SYSTEMCTL", &systemctl.display().to_string())])?;
    let groups = Groups::of(&lab, "n1");
    let library = build_library(dir.path())?;
    groups.ctl(&["resource", "type-add", "HeartbeatFile", "--library", &library, "--required", "path"])?;
    let mut dummy = resource("ocf", "ocf", "ocf:heartbeat:Dummy", &[("state", "/run/csv/dummy")]);
    (dummy.policy.looks_alive_ms, dummy.policy.is_alive_ms) = (Some(500), Some(500));
    let lives = [
        Life {
            resource: resource("c", "c", "HeartbeatFile", &[("path", "/run/csv/heartbeat")]),
            fail: "rm /run/csv/heartbeat",
            runs: "test -e /run/csv/heartbeat",
        },
        Life { resource: dummy, fail: "rm /run/csv/dummy", runs: "test -e /run/csv/dummy" },
        Life {
            resource: resource("unit", "unit", "systemd:web", &[]),
            fail: "kill -KILL $(cat /run/csv/unit/main)",
            runs: "kill -0 $(cat /run/csv/unit/main)",
        },
    ];
    for life in lives {
        let kind = life.resource.kind.clone();
        one_life(&lab, life).with_context(|| kind.clone())?;
    }
    lab.finish()
}

fn one_life(lab: &Lab, Life { mut resource, fail, runs }: Life) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n1");
    let (name, kind) = (resource.name.clone(), resource.kind.clone());
    (resource.policy.restart_threshold, resource.policy.restart_delay_ms) = (1, 100);
    groups.add(&name, &["--preferred", "n1,n2,n3"])?;
    groups.add_resource(&resource)?;
    let where_it_runs = || -> anyhow::Result<Vec<&str>> {
        let mut nodes = Vec::new();
        for node in ["n1", "n2", "n3"] {
            if lab.exec(node, &["sh", "-c", runs], DEADLINE)?.status.success() {
                nodes.push(node);
            }
        }
        Ok(nodes)
    };
    let runs_at = |node: &'static str| -> anyhow::Result<()> {
        groups.wait_online_at(&name, node, DEADLINE)?;
        wait::until(&format!("{kind} on {node} alone"), SOON, || {
            let nodes = where_it_runs()?;
            ensure!(nodes == [node], "it runs on {nodes:?}");
            Ok(Some(()))
        })
    };
    let began = Instant::now();
    groups.online(&name)?;
    runs_at("n1")?;
    // The first failure is mended here.
    let since = groups.resource(&name)?.status.since_unix_ms;
    lab.sh("n1", fail)?;
    let restarted = Instant::now();
    wait::until(&format!("{kind} to be started again"), SOON, || {
        let status = groups.resource(&name)?.status;
        Ok((status.state == ResourceState::Online && status.since_unix_ms > since).then_some(()))
    })?;
    let restart = restarted.elapsed();
    runs_at("n1")?;
    // The second one is not.
    lab.sh("n1", fail)?;
    let failed = Instant::now();
    groups.wait_online_at(&name, "n2", DEADLINE)?;
    let failover = failed.elapsed();
    runs_at("n2")?;
    // Somebody wants it elsewhere.
    groups.move_to(&name, "n3", MoveKind::Shutdown)?;
    runs_at("n3")?;
    groups.offline(&name)?;
    ensure!(where_it_runs()?.is_empty(), "{kind} is offline, and runs on {:?}", where_it_runs()?);
    println!(
        "{kind}: restarted after {} ms, on the next node after {} ms, its life took {} ms",
        restart.as_millis(),
        failover.as_millis(),
        began.elapsed().as_millis()
    );
    Ok(())
}

/// CPU time of csvd and the resource hosts of a node, and of what they ran, in ticks of a hundredth of a second.
fn ticks(lab: &Lab, node: &str) -> anyhow::Result<u64> {
    let stats = lab.sh(node, "for pid in $(pgrep -x 'csvd|csv-rhs'); do cat /proc/$pid/stat; done")?;
    let of = |line: &str| -> anyhow::Result<u64> {
        // Behind the name, which stands in parentheses: the 14th to 17th fields of proc(5).
        let fields: Vec<&str> = line.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
        fields.iter().skip(11).take(4).map(|field| field.parse::<u64>().context("a number")).sum()
    };
    stats.lines().map(of).sum()
}

/// In percent of a core.
fn cost(lab: &Lab, node: &str, over: Duration) -> anyhow::Result<f64> {
    let (began, before) = (Instant::now(), ticks(lab, node)?);
    std::thread::sleep(over);
    let used = ticks(lab, node)?.saturating_sub(before);
    Ok(f64::from(u32::try_from(used)?) / began.elapsed().as_secs_f64())
}

#[test]
fn two_hundred_resources_cost_little() -> anyhow::Result<()> {
    const COUNT: usize = 200;
    let lab = up("rmany", &[])?;
    // Not where the cluster is led: that costs more, with and without resources.
    let groups = Groups::of(&lab, "n1");
    let node = "n3";
    let before = cost(&lab, node, Duration::from_secs(30))?;
    let began = Instant::now();
    for group in 0..10 {
        let group = format!("g{group}");
        groups.add(&group, &["--preferred", node])?;
        for number in 0..COUNT / 10 {
            let command = [("command", "sleep 100000")];
            let name = format!("{group}-{number}");
            let resource = resource(&group, &name, "GenericApplication", &command);
            // By the hundred without a process for each.
            groups.command(&Command::ResourceAdd { resource })?;
        }
        groups.order("online", &group)?;
    }
    for group in 0..10 {
        groups.wait_online_at(&format!("g{group}"), node, DEADLINE)?;
    }
    let took = began.elapsed();
    let running = lab.sh(node, "pgrep -xc sleep")?;
    ensure!(running.trim() == COUNT.to_string(), "{running} processes, not {COUNT}");
    let with = cost(&lab, node, Duration::from_secs(60))?;
    println!(
        "{COUNT} resources made and online after {} ms; csvd and csv-rhs of {node} take {before:.2} % of a core without, {with:.2} % \
         with them",
        took.as_millis()
    );
    ensure!(with - before < 2.0, "{COUNT} resources cost {:.2} % of a core", with - before);
    let began = Instant::now();
    for group in 0..10 {
        groups.order("offline", &format!("g{group}"))?;
    }
    for group in 0..10 {
        groups.wait(&format!("g{group}"), "to be offline", DEADLINE, |group| {
            matches!(group.state, GroupState::Offline { .. })
        })?;
    }
    println!("{COUNT} resources offline after {} ms", began.elapsed().as_millis());
    ensure!(lab.sh(node, "pgrep -xc sleep || true")?.trim() == "0", "processes are left");
    lab.finish()
}

#[test]
fn files_follow_and_nonsense_is_refused() -> anyhow::Result<()> {
    let lab = up("rbad", &[])?;
    checkpoints(&lab)?;
    refused(&lab)?;
    address_in_use(&lab)?;
    lab.finish()
}

fn checkpoints(lab: &Lab) -> anyhow::Result<()> {
    // Of the node alone: what is in it does not come from a disk that all have.
    let file = "/var/lib/csv/suite/settings";
    let groups = Groups::of(lab, "n1");
    groups.add("files", &["--preferred", "n2,n3,n1"])?;
    let mut of = resource("files", "files", "Test", &[]);
    // Of the node's network alone.
    let (setting, value) = ("sysctl:net.ipv4.ip_default_ttl", "/proc/sys/net/ipv4/ip_default_ttl");
    of.checkpoints = vec![file.to_owned(), setting.to_owned()];
    groups.add_resource(&of)?;
    groups.online("files")?;
    groups.wait_online_at("files", "n2", DEADLINE)?;
    lab.sh(
        "n2",
        &format!("mkdir -p $(dirname {file}); echo one > {file}; chmod 640 {file}; chown 1:2 {file}; echo 77 > {value}"),
    )?;
    groups.move_to("files", "n3", MoveKind::Shutdown)?;
    let look = format!("cat {file}; stat -c '%a %u:%g' {file}; cat {value}");
    let seen = lab.sh("n3", &look)?;
    ensure!(seen == "one\n640 1:2\n77\n", "on n3: {seen}");
    // What is saved while it runs outlives its node.
    lab.sh("n3", &format!("echo two > {file}; echo 128 > {value}"))?;
    groups.wait_kept("n3", file, DEADLINE)?;
    groups.wait_kept("n3", setting, DEADLINE)?;
    lab.lab("crash", &["n3"])?;
    groups.wait("files", "to be online elsewhere", DEADLINE, |group| {
        group.state == GroupState::Online && group.owner.map(|owner| owner.0) != Some(3)
    })?;
    let owner = groups.owner("files")?;
    let seen = lab.sh(&owner, &look)?;
    ensure!(seen == "two\n640 1:2\n128\n", "on {owner}: {seen}");
    println!("a file and a kernel setting followed their resource to n3, and after n3 lost power to {owner}");
    lab.lab("restart", &["n3"])?;
    lab.wait_mode("n3", "direct")?;
    groups.offline("files")
}

fn refused(lab: &Lab) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n1");
    groups.add("bad", &[])?;
    groups.add("other", &[])?;
    for (name, on) in [("a", ""), ("b", "[a]"), ("c", "[b]")] {
        let mut of = resource("bad", name, "Test", &[]);
        of.depends = on.into();
        groups.add_resource(&of)?;
    }
    groups.add_resource(&resource("other", "far", "Test", &[]))?;
    let no = |command: Command, words: &[&str]| -> anyhow::Result<()> {
        let error = groups.command(&command).err().with_context(|| format!("taken: {command:?}"))?;
        let text = format!("{error:#}").to_lowercase();
        for word in words {
            ensure!(text.contains(&word.to_lowercase()), "{command:?}: \"{text}\" does not say \"{word}\"");
        }
        println!("refused: {error:#}");
        Ok(())
    };
    let depends = |name: &str, on: &str| Command::ResourceSet {
        name: name.into(),
        change: csv_cluster::db::ResourceChange { depends: Some(on.into()), ..Default::default() },
    };
    no(depends("a", "[c]"), &["circle", "a", "b", "c"])?;
    no(depends("a", "[a]"), &["itself"])?;
    no(depends("a", "[far]"), &["other", "group"])?;
    no(depends("a", "[nobody]"), &["nobody"])?;
    no(depends("a", "[b] and"), &["and"])?;
    let after = |name: &str, on: &str| Command::GroupPolicy {
        name: name.into(),
        policy: GroupPolicy { start_after: vec![on.into()], ..GroupPolicy::default() },
    };
    groups.command(&after("other", "bad"))?;
    no(after("bad", "other"), &["circle"])?;
    let add = |kind: &str, properties: &[(&str, &str)]| Command::ResourceAdd {
        resource: resource("bad", "x", kind, properties),
    };
    for (kind, properties, words) in [
        ("Nonsense", &[][..], &["no resource type", "Nonsense", "VirtualMachine"][..]),
        ("ocf:heartbeat:Nonsense", &[], &["Nonsense"]),
        ("Test", &[("colour", "red")], &["colour", "hang"]),
        ("GenericApplication", &[], &["command"]),
        ("VirtualMachine", &[("disk", "/a"), ("memory_mib", "4")], &["memory_mib", "16"]),
        ("VirtualMachine", &[("disk", "/a"), ("cpus", "many")], &["cpus"]),
        ("VirtualMachine", &[("disk", "relative")], &["disk"]),
        ("IPAddress", &[("address", "10.0.0.300/24")], &["address"]),
        ("IPAddress", &[("address", "224.0.0.1/24")], &["address"]),
        ("PhysicalDisk", &[("device", "d"), ("fs", "ntfs"), ("mount", "/mnt")], &["fs", "ext4"]),
        ("NetworkName", &[("name", "a"), ("zone", "b"), ("server", "here")], &["server"]),
        ("FileShare", &[("share", "s"), ("path", "/x"), ("port", "70000")], &["port", "65535"]),
    ] {
        no(add(kind, properties), words)?;
    }
    let mut of = resource("bad", "x", "Test", &[]);
    of.policy.pending_timeout_ms = 1;
    no(Command::ResourceAdd { resource: of }, &["pending", "100"])?;
    no(Command::ResourceAdd { resource: resource("nowhere", "x", "Test", &[]) }, &["nowhere"])?;
    no(Command::GroupRemove { name: "bad".into() }, &["bad"])?;
    no(Command::GroupOnline { name: "nowhere".into() }, &["nowhere"])
}

/// Another host of the network has the address: the group fails, and the message names that host.
fn address_in_use(lab: &Lab) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n1");
    let taken = lab.sh("n2", "ip -4 -o addr show dev eth0 | awk '{print $4}'")?.trim().to_owned();
    let mac = lab.sh("n2", "cat /sys/class/net/eth0/address")?.trim().to_owned();
    groups.add("address", &["--failover-threshold", "0"])?;
    let mut of = resource("address", "address", "IPAddress", &[("address", &taken)]);
    of.possible = vec![groups.number("n1")?];
    of.policy.restart_threshold = 0;
    groups.add_resource(&of)?;
    // csvctl waits in vain, and says why.
    let error = groups.online("address").err().context("it is online")?;
    let why = groups.wait_resource("address", ResourceState::Failed, DEADLINE)?.status.why;
    println!("address in use: {why}");
    for said in [&why, &format!("{error:#}")] {
        ensure!(said.to_lowercase().contains(&mac), "\"{said}\" does not name {mac}");
    }
    let addresses = lab.sh("n1", "ip -4 -o addr show dev eth0")?;
    ensure!(!addresses.contains(taken.split('/').next().unwrap_or(&taken)), "n1 has it: {addresses}");
    groups.offline("address")
}
