//! Virtual machines as resources: QEMU (without KVM) on three nodes, with guests that keep a journal on the cluster's volume.
//!
//! A node loses power: its machine runs again elsewhere, and its disk has every line that the guest had synced. Machines
//! move while they run, again and again, and when their node is drained, and stay where they are when a move fails. What
//! cannot run says why.

use anyhow::{Context as _, ensure};
use csv_cluster::db::{GroupState, MoveKind, NewResource, ResourceState};
use csv_tests::groups::{self, Groups};
use csv_tests::lab::{Lab, MOUNT};
use csv_tests::membership::{kill_csvd, start_csvd};
use csv_tests::vmguest::{Guest, MEMORY_MIB, Machine, standstill};
use csv_tests::wait;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);
/// For a guest without KVM to boot, several at a time.
const BOOT: Duration = Duration::from_secs(90);
/// From the power cut until the machine runs again on another node.
const FAILOVER_MAX: Duration = Duration::from_secs(10);
/// How long a machine stands still in a live migration.
const STANDSTILL_MAX: Duration = Duration::from_secs(1);

fn up(suite: &str) -> anyhow::Result<(Lab, Guest)> {
    let guest = Guest::make()?;
    // A new cluster would wait for nodes that its groups prefer.
    let args = ["--size", "512M", "--all-paths", "--set", "group_settle_ms=0"];
    Ok((Lab::up_with(suite, "ext4", &args)?, guest))
}

/// A machine's resource, in a group of its name.
fn resource(machine: &Machine) -> NewResource {
    let (memory, disk) = (MEMORY_MIB.to_string(), machine.image());
    let more = machine.properties();
    let mut properties = vec![("disk", disk.as_str()), ("memory_mib", memory.as_str())];
    properties.extend(more.iter().map(|(key, value)| (*key, value.as_str())));
    groups::resource(machine.name(), machine.name(), "VirtualMachine", &properties)
}

/// A machine that counts on a node.
fn start(lab: &Lab, guest: &Guest, node: &str, name: &str) -> anyhow::Result<Machine> {
    let machine = Machine::make(lab, guest, node, name)?;
    let groups = Groups::of(lab, node);
    groups.add(name, &["--preferred", node])?;
    groups.add_resource(&resource(&machine))?;
    groups.online(name)?;
    groups.wait_online_at(name, node, DEADLINE)?;
    Ok(machine)
}

/// Shuts the guest down by its power button and looks at its disk: clean, every synced line there, started so often.
fn end(lab: &Lab, node: &str, machine: &Machine, boots: u64) -> anyhow::Result<()> {
    let unmounted = machine.console.unmounted();
    Groups::of(lab, node).offline(machine.name())?;
    ensure!(machine.console.unmounted() > unmounted, "{} was not shut down in good order", machine.name());
    let journal = machine.journal(lab, node)?;
    let synced = machine.check_durable(&journal)?;
    let last = journal.last().map_or(0, |line| line.boot);
    ensure!(last == boots, "{} was started {last} times, not {boots}", machine.name());
    println!(
        "{}: {boots} boots, {} lines in its journal, all {synced} synced ones among them",
        machine.name(),
        journal.len()
    );
    Ok(())
}

/// Number of the machine's QEMU on its node.
fn qemu(groups: Groups<'_>, machine: &Machine) -> anyhow::Result<u64> {
    let status = groups.control(machine.name(), "status", &serde_json::json!({}))?;
    status["pid"].as_u64().with_context(|| format!("{} has no QEMU: {status}", machine.name()))
}

/// One node after the other loses power, the last one that which coordinates the volume.
#[test]
fn machines_of_a_crashed_node_run_again() -> anyhow::Result<()> {
    let (lab, guest) = up("vmcrash")?;
    let machines = ["n1", "n2", "n3"].map(|node| start(&lab, &guest, node, &format!("vm-{node}")));
    let machines: Vec<Machine> = machines.into_iter().collect::<anyhow::Result<_>>()?;
    let mut boots = [1, 1, 1];
    for machine in &machines {
        machine.console.wait_boot(1, BOOT)?;
    }
    let groups = Groups::of(&lab, "n1");
    let home = |machine: &Machine| groups.owner(machine.name());
    for crashed in ["n3", "n2"] {
        ensure!(lab.owner("n1")? == "n2", "n2 does not coordinate the volume");
        let (gone, others): (Vec<usize>, Vec<usize>) = {
            let homes: Vec<String> = machines.iter().map(home).collect::<anyhow::Result<_>>()?;
            (0..machines.len()).partition(|index| homes[*index] == crashed)
        };
        ensure!(!gone.is_empty(), "{crashed} has no machine");
        let untouched: Vec<u64> =
            others.iter().map(|index| qemu(groups, &machines[*index])).collect::<anyhow::Result<_>>()?;
        machines[gone[0]].console.wait_more(4, DEADLINE)?;
        let began = Instant::now();
        lab.lab("crash", &[crashed])?;
        let cut = began.elapsed();
        for index in &gone {
            let machine = &machines[*index];
            let number = groups.number(crashed)?;
            groups.wait(machine.name(), "to run elsewhere", DEADLINE, |group| {
                group.state == GroupState::Online && group.owner != Some(number)
            })?;
            let took = began.elapsed();
            boots[*index] += 1;
            println!(
                "{crashed} lost power (done after {} ms): {} runs on {} after {} ms",
                cut.as_millis(),
                machine.name(),
                home(machine)?,
                took.as_millis()
            );
            ensure!(took < FAILOVER_MAX, "{} took {} ms to run again", machine.name(), took.as_millis());
        }
        for index in &gone {
            machines[*index].console.wait_boot(boots[*index], BOOT)?;
        }
        let now: Vec<u64> =
            others.iter().map(|index| qemu(groups, &machines[*index])).collect::<anyhow::Result<_>>()?;
        ensure!(now == untouched, "other machines were touched: QEMUs {untouched:?}, now {now:?}");
        lab.lab("restart", &[crashed])?;
        lab.wait_mode(crashed, "direct")?;
        lab.move_volume("n2")?;
    }
    for (machine, boots) in machines.iter().zip(boots) {
        machine.console.check(boots)?;
        end(&lab, "n1", machine, boots)?;
    }
    lab.finish()
}

/// Twenty moves around the nodes, a drain, moves that fail.
#[test]
fn machines_move_while_they_run() -> anyhow::Result<()> {
    let (lab, guest) = up("vmmove")?;
    let machine = start(&lab, &guest, "n1", "vm")?;
    machine.console.wait_boot(1, BOOT)?;
    let moves = std::env::var("CSV_TEST_MOVES").ok().and_then(|text| text.parse().ok());
    around(&lab, &machine, moves.unwrap_or(if csv_tests::full() { 60 } else { 20 }))?;
    let second = start(&lab, &guest, "n1", "second")?;
    second.console.wait_boot(1, BOOT)?;
    drain(&lab, &[&machine, &second])?;
    failed_moves(&lab, &machine)?;
    machine.console.check(1)?;
    for machine in [&machine, &second] {
        end(&lab, "n1", machine, 1)?;
    }
    lab.finish()
}

fn around(lab: &Lab, machine: &Machine, moves: usize) -> anyhow::Result<()> {
    let (groups, console) = (Groups::of(lab, "n1"), &machine.console);
    console.wait_more(3, DEADLINE)?;
    let mut worst = Duration::ZERO;
    for number in 0..moves {
        let to = ["n2", "n3", "n1"][number % 3];
        let began = Instant::now();
        groups.move_to(machine.name(), to, MoveKind::Live)?;
        let (over, took) = (Instant::now(), began.elapsed());
        console.wait_more(3, DEADLINE)?;
        let seen = console.seen();
        let still = standstill(&seen, began, over)?;
        let gap = seen.windows(2).filter(|two| two[1].at > began).map(|two| two[1].at - two[0].at).max();
        println!(
            "live migration {} to {to}: {} ms, stood still for {} ms, at most {} ms between two lines",
            number + 1,
            took.as_millis(),
            still.as_millis(),
            gap.unwrap_or_default().as_millis()
        );
        ensure!(still < STANDSTILL_MAX, "the machine stood still for {} ms", still.as_millis());
        console.check(1)?;
        worst = worst.max(still);
    }
    println!("{moves} live migrations, no line missed, the longest stand-still {} ms", worst.as_millis());
    let group = groups.group(machine.name())?;
    ensure!(group.failures.is_empty() && group.failovers.is_empty(), "something failed: {group:?}");
    Ok(())
}

/// Both machines leave their node while they run.
fn drain(lab: &Lab, machines: &[&Machine]) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n1");
    for machine in machines {
        if groups.owner(machine.name())? != "n1" {
            groups.move_to(machine.name(), "n1", MoveKind::Live)?;
        }
        machine.console.wait_more(2, DEADLINE)?;
    }
    let began = Instant::now();
    lab.ctl("n1", &["node", "drain", "n1"])?;
    let (over, took) = (Instant::now(), began.elapsed());
    for machine in machines {
        let owner = groups.owner(machine.name())?;
        ensure!(owner != "n1", "{} is still on n1", machine.name());
        groups.wait_online(machine.name(), DEADLINE)?;
        machine.console.wait_more(3, DEADLINE)?;
        machine.console.check(1)?;
        let still = standstill(&machine.console.seen(), began, over)?;
        println!(
            "drain of n1 in {} ms: {} went to {owner}, stood still for {} ms",
            took.as_millis(),
            machine.name(),
            still.as_millis()
        );
        ensure!(still < STANDSTILL_MAX, "{} stood still for {} ms", machine.name(), still.as_millis());
    }
    lab.ctl("n1", &["node", "resume", "n1"]).map(drop)
}

/// The machine that waits for the memory is killed; then the node that it waits on. The one that runs goes on.
fn failed_moves(lab: &Lab, machine: &Machine) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n1");
    let name = machine.name();
    if groups.owner(name)? == "n1" {
        groups.move_to(name, "n2", MoveKind::Live)?;
    }
    // Slow, so that there is a middle; whoever has it next knows that.
    groups.set(name, "migration_bandwidth_mib", Some("4"))?;
    groups.move_to(name, "n1", MoveKind::Live)?;
    let running = qemu(groups, machine)?;
    for (what, node) in [("QEMU", "n2"), ("power", "n3")] {
        let generation = groups.group(name)?.generation;
        groups.start_move(name, node, MoveKind::Live)?;
        let waits = format!("pgrep -x vm-{name}");
        wait::until(&format!("QEMU on {node}"), DEADLINE, || {
            Ok(lab.exec(node, &["sh", "-c", &waits], DEADLINE)?.status.success().then_some(()))
        })?;
        let moving = wait::until("the move to be under way", DEADLINE, || {
            let progress = groups.ask(&serde_json::json!({ "cluster": "move-progress", "group": name }))?;
            ensure!(
                progress["percent"].as_u64().is_some_and(|percent| percent > 0),
                "it is {progress}, {}",
                groups.describe(name)
            );
            Ok(Some(progress))
        })?;
        if what == "QEMU" {
            lab.sh(node, &format!("pkill -KILL -x vm-{name}"))?;
        } else {
            lab.lab("crash", &[node])?;
        }
        let began = Instant::now();
        let group = groups.wait_online(name, DEADLINE)?;
        ensure!(
            groups.owner(name)? == "n1" && group.generation == generation,
            "it is not where it was: {group:?}"
        );
        println!(
            "{what} of the target killed in the move ({moving}): {name} is as before after {} ms",
            began.elapsed().as_millis()
        );
        ensure!(qemu(groups, machine)? == running, "{name} runs in another QEMU");
        machine.console.wait_more(4, DEADLINE)?;
        machine.console.check(1)?;
        if what == "power" {
            lab.lab("restart", &[node])?;
            lab.wait_mode(node, "direct")?;
        }
    }
    target_csvd_killed(lab, machine)?;
    // And nothing keeps it from moving afterwards.
    groups.set(name, "migration_bandwidth_mib", None)?;
    groups.move_to(name, "n2", MoveKind::Live)?;
    machine.console.wait_more(2, DEADLINE)?;
    machine.console.check(1)
}

/// Both go, one after the other; the first stands still until the second is there. In the long form that takes longer than
/// the minute after which a guest that was sent and goes on nowhere counts as lost.
#[test]
fn machines_of_one_group_move_together() -> anyhow::Result<()> {
    let (lab, guest) = up("vmpair")?;
    let groups = Groups::of(&lab, "n1");
    groups.add("pair", &["--preferred", "n1"])?;
    let machines = ["first", "second"].map(|name| -> anyhow::Result<Machine> {
        let machine = Machine::make(&lab, &guest, "n1", name)?;
        groups.add_resource(&NewResource { group: "pair".into(), ..resource(&machine) })?;
        Ok(machine)
    });
    let machines: Vec<Machine> = machines.into_iter().collect::<anyhow::Result<_>>()?;
    if csv_tests::full() {
        groups.set("second", "migration_bandwidth_mib", Some("1"))?;
    }
    groups.online("pair")?;
    groups.wait_online_at("pair", "n1", DEADLINE)?;
    for machine in &machines {
        machine.console.wait_boot(1, BOOT)?;
        machine.console.wait_more(4, DEADLINE)?;
    }
    let began = Instant::now();
    groups.move_to("pair", "n2", MoveKind::Live)?;
    println!("two machines of one group moved after {} ms", began.elapsed().as_millis());
    for machine in &machines {
        machine.console.wait_more(4, DEADLINE)?;
        machine.console.check(1)?;
        let owner = groups.resource(machine.name())?.status;
        ensure!(owner.state == ResourceState::Online, "{} is {owner:?}", machine.name());
    }
    // What one of them needs to go nowhere keeps both where they are.
    groups.set("second", "migration_bandwidth_mib", Some("4"))?;
    groups.start_move("pair", "n3", MoveKind::Live)?;
    let waits = "pgrep -x vm-second";
    wait::until("QEMU on n3", DEADLINE, || {
        Ok(lab.exec("n3", &["sh", "-c", waits], DEADLINE)?.status.success().then_some(()))
    })?;
    lab.sh("n3", "pkill -KILL -x vm-second")?;
    groups.wait("pair", "to stay", DEADLINE, |group| group.state == GroupState::Online)?;
    ensure!(groups.owner("pair")? == "n2", "it is not where it was: {}", groups.describe("pair"));
    for machine in &machines {
        machine.console.wait_more(4, DEADLINE)?;
        machine.console.check(1)?;
    }
    groups.offline("pair")?;
    for machine in &machines {
        let journal = machine.journal(&lab, "n1")?;
        println!("{}: all {} synced lines are there", machine.name(), machine.check_durable(&journal)?);
    }
    lab.finish()
}

/// csvd of the target is another one when the guest has been sent: it goes on, on one side or the other.
fn target_csvd_killed(lab: &Lab, machine: &Machine) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n1");
    let name = machine.name();
    groups.set(name, "migration_bandwidth_mib", Some("16"))?;
    groups.start_move(name, "n2", MoveKind::Live)?;
    let waits = format!("pgrep -x vm-{name}");
    wait::until("QEMU on n2", DEADLINE, || {
        Ok(lab.exec("n2", &["sh", "-c", &waits], DEADLINE)?.status.success().then_some(()))
    })?;
    kill_csvd(lab, "n2")?;
    start_csvd(lab, "n2")?;
    groups.wait(name, "to have moved, or not", DEADLINE, |group| group.state == GroupState::Online)?;
    let owner = groups.owner(name)?;
    println!("csvd of the target killed in the move: {name} goes on, on {owner}");
    machine.console.wait_more(4, DEADLINE)?;
    machine.console.check(1)?;
    lab.wait_mode("n2", "direct")?;
    if owner != "n1" {
        groups.move_to(name, "n1", MoveKind::Live)?;
    }
    Ok(())
}

/// No memory for it anywhere; an image that is not there; an image that another machine has.
#[test]
fn what_cannot_run_says_why() -> anyhow::Result<()> {
    let (lab, guest) = up("vmbad")?;
    let groups = Groups::of(&lab, "n1");
    let machine = start(&lab, &guest, "n1", "good")?;
    machine.console.wait_boot(1, BOOT)?;
    no_capacity(&lab, &machine)?;
    for (name, disk, words) in [
        ("missing", format!("{MOUNT}/none.img"), ["none.img", "no such file"]),
        ("taken", machine.image(), ["good.img", "in use"]),
    ] {
        groups.add(name, &["--failover-threshold", "0"])?;
        let mut vm = NewResource { group: name.into(), name: name.into(), ..resource(&machine) };
        vm.properties.insert("disk".into(), disk);
        vm.properties.insert("serial".into(), "none".into());
        vm.possible = vec![groups.number("n2")?];
        vm.policy.restart_threshold = 0;
        groups.add_resource(&vm)?;
        groups.order("online", name)?;
        let resource = groups.wait_resource(name, ResourceState::Failed, DEADLINE)?;
        let why = resource.status.why;
        println!("{name}: {why}");
        for word in words {
            ensure!(why.to_lowercase().contains(word), "\"{why}\" does not say \"{word}\"");
        }
        groups.offline(name)?;
    }
    machine.console.wait_more(2, DEADLINE)?;
    end(&lab, "n1", &machine, 1)?;
    lab.finish()
}

fn no_capacity(lab: &Lab, machine: &Machine) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n1");
    groups.add("big", &[])?;
    let mut vm = NewResource { group: "big".into(), name: "big".into(), ..resource(machine) };
    vm.properties.insert("disk".into(), format!("{MOUNT}/big.img"));
    vm.properties.insert("memory_mib".into(), "1048576".into());
    vm.possible = vec![groups.number("n1")?, groups.number("n2")?];
    groups.add_resource(&vm)?;
    lab.ctl("n1", &["node", "pause", "n2"])?;
    groups.order("online", "big")?;
    let told = wait::until("the manager to say why nobody has big", DEADLINE, || {
        let state = groups.group("big")?.state;
        Ok(Some(state.clone())
            .filter(|state| matches!(state, GroupState::Offline { reason } if reason.contains("no node"))))
    })?;
    println!("big: {told:?}");
    let candidates = groups.candidates("big")?;
    for (node, word) in [("n1", "mib left"), ("n2", "paused"), ("n3", "possible")] {
        let (fit, why) = candidates.get(node).with_context(|| format!("nothing about {node}"))?;
        println!("big on {node}: {why}");
        ensure!(!fit && why.to_lowercase().contains(word), "{node}: {why}");
    }
    lab.ctl("n1", &["node", "resume", "n2"])?;
    groups.offline("big")
}
