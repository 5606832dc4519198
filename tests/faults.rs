//! Bad input and bad luck: what must be refused is refused with a reason, what must wait waits, what must go on goes
//! on, and nothing that was safe is lost.

use anyhow::{Context as _, ensure};
use csv_tests::driver::Node as _;
use csv_tests::lab::{Lab, MOUNT, VOLUME};
use csv_tests::node_agent::NodeAgent;
use csv_tests::ops::{Op, Reply};
use csv_tests::wait::{self, Ended};
use csv_tests::{rng, tools};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const CLUSTER_A: &str = "11111111-1111-4111-8111-111111111111";
const CLUSTER_B: &str = "22222222-2222-4222-8222-222222222222";
const DEADLINE: Duration = Duration::from_secs(120);
/// How long the coordinator is kept away.
const OUTAGE: Duration = Duration::from_secs(4);
/// A direct read during the outage may be slow, but must not wait for its end.
const READ_LATENCY_MAX_MS: f64 = 2000.0;

fn sh(script: &str) -> anyhow::Result<String> {
    wait::run(Command::new("sh").args(["-ec", script]), DEADLINE)?.ok(script)
}

fn create(lun: &Path, cluster: &str, more: &[&str]) -> anyhow::Result<Ended> {
    let mut command = Command::new(tools::csvctl()?);
    command.args(["volume", "create", "--name", "V", "--cluster-id", cluster, "--lun"]).arg(lun).args(more);
    wait::run(&mut command, DEADLINE)
}

/// Creation must fail, say one of the words, and leave the LUN as it was.
fn refused(lun: &Path, cluster: &str, more: &[&str], words: &[&str]) -> anyhow::Result<()> {
    let sum = || sh(&format!("sha256sum < {}", lun.display()));
    let before = if lun.exists() { Some(sum()?) } else { None };
    let text = create(lun, cluster, more)?.failed(&format!("volume create on {}", lun.display()))?;
    ensure!(words.iter().any(|word| text.contains(word)), "none of {words:?} in: {text}");
    if let Some(before) = before {
        ensure!(sum()? == before, "a refused create changed {}", lun.display());
    }
    println!("refused: {}", text.trim());
    Ok(())
}

/// A loop device that goes away with its guard.
struct Loop(String);

impl Loop {
    fn new(image: &Path, more: &str) -> anyhow::Result<Loop> {
        Ok(Loop(sh(&format!("losetup -f --show {more} {}", image.display()))?.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        sh(&format!("losetup -d {}", self.0)).ok();
    }
}

#[test]
fn create_refuses_what_would_destroy() -> anyhow::Result<()> {
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let image = |name: &str, mib: u64| -> anyhow::Result<std::path::PathBuf> {
        let path = dir.path().join(name);
        std::fs::File::create(&path)?.set_len(mib << 20)?;
        Ok(path)
    };
    refused(&image("small", 16)?, CLUSTER_A, &[], &["small", "MiB"])?;
    refused(&dir.path().join("missing"), CLUSTER_A, &[], &["No such file", "missing"])?;
    refused(&image("fs", 512)?, CLUSTER_A, &["--fs", "btrfs"], &["btrfs"])?;

    let foreign = image("foreign", 512)?;
    sh(&format!("mkfs.ext4 -q {}", foreign.display()))?;
    refused(&foreign, CLUSTER_A, &[], &["--force"])?;
    create(&foreign, CLUSTER_A, &["--force"])?.ok("create --force over ext4")?;
    refused(&foreign, CLUSTER_B, &[], &["--force"])?;

    let used = image("used", 512)?;
    sh(&format!("mkfs.ext4 -q {}", used.display()))?;
    let device = Loop::new(&used, "")?;
    let csvctl = tools::csvctl()?;
    let text = sh(&format!(
        "unshare --mount --propagation private sh -c 'mount {d} /mnt; \
         {c} volume create --name V --cluster-id {CLUSTER_A} --lun {d} --force 2>&1 && echo MADE; umount /mnt; true'",
        d = device.0,
        c = csvctl.display()
    ))?;
    ensure!(text.contains("in use") && !text.contains("MADE"), "a mounted LUN: {text}");
    drop(device);

    let read_only = Loop::new(&image("ro", 512)?, "--read-only")?;
    refused(Path::new(&read_only.0), CLUSTER_A, &["--force"], &["read-only", "Read-only"])
}

#[test]
fn names_and_full_volumes() -> anyhow::Result<()> {
    let lab = Lab::up_with("names", "ext4", &["--size", "512M"])?;
    names(&lab)?;
    full(&lab)?;
    lab.finish()
}

/// Every name that ext4 takes works on every node, and is the same name on the others.
fn names(lab: &Lab) -> anyhow::Result<()> {
    lab.sh("n1", &format!("mkdir {MOUNT}/names"))?;
    for node in ["n1", "n2", "n3"] {
        let long = "x".repeat(255);
        lab.sh(node, &format!("cd {MOUNT}/names; echo {node} > {long}; rm {long}"))?;
        let script = format!("cd {MOUNT}/names; : > {long}x");
        let text = lab.exec(node, &["sh", "-c", &script], DEADLINE)?.failed("a name of 256 bytes")?;
        ensure!(text.contains("too long"), "{node}: {text}");
    }
    // Bytes that are not UTF-8, characters that SMB reserves, dots and spaces at the end, case alone.
    let odd = [
        r"\377\376raw",
        r#"a:b*c?d"e<f>g|h\\i"#,
        "dot.",
        "space ",
        "CON",
        "Case",
        "case",
        r"new\nline",
        "~1",
    ];
    for (number, name) in odd.iter().enumerate() {
        let [maker, reader, remover] =
            [["n1", "n2", "n3"], ["n3", "n1", "n2"], ["n2", "n3", "n1"]][number % 3];
        // printf makes the bytes; the name never passes the shell's word splitting.
        let with =
            |action: &str| format!("cd {MOUNT}/names; n=$(printf '{name}.'); n=\"${{n%.}}\"; {action}");
        lab.sh(maker, &with(&format!("echo data-{number} > \"$n\"")))?;
        let data = lab.sh(reader, &with("cat \"$n\"; find . -mindepth 1 -printf x | wc -c"))?;
        ensure!(data == format!("data-{number}\n1\n"), "{name} made on {maker} reads {data:?} on {reader}");
        lab.sh(remover, &with("rm \"$n\""))?;
        let left = lab.sh(maker, &format!("ls -A {MOUNT}/names"))?;
        ensure!(left.is_empty(), "{name} removed on {remover} is still on {maker}: {left:?}");
    }
    println!("names: {} odd names on all nodes", odd.len());
    Ok(())
}

/// A full volume says ENOSPC on every node; what was there before is intact, and space comes back.
fn full(lab: &Lab) -> anyhow::Result<()> {
    let agent = tools::agent()?.to_string_lossy().into_owned();
    let exec = |node: &str, argv: &[&str]| lab.exec(node, argv, Duration::from_secs(600));
    for node in ["n1", "n3"] {
        let (early, late) = (format!("{MOUNT}/early-{node}"), format!("{MOUNT}/late-{node}"));
        let files = exec(node, &[&agent, "fill", &early, "8"])?.ok("filling the volume")?;
        let files = files.trim().to_owned();
        ensure!(files.parse::<u64>()? > 10, "the volume was full after {files} files");
        let write = format!("head -c 33554432 /dev/zero > {late}");
        let text = exec(node, &["sh", "-c", &write])?.failed("writing to a full volume")?;
        ensure!(text.contains("No space left"), "{node}: {text}");
        for reader in ["n1", "n2", "n3"] {
            exec(reader, &[&agent, "verify", &early, "8", &files])?
                .ok(&format!("{reader} after ENOSPC on {node}"))?;
        }
        lab.sh("n2", &format!("rm -rf {early} {late}"))?;
        lab.sh(node, &format!("head -c 33554432 /dev/zero > {late} && rm {late}"))?;
        println!("full: {files} files of 8 MiB intact after ENOSPC on {node}");
    }
    Ok(())
}

/// The coordinator's csvfs is killed and kept away: direct reads go on, other operations wait and then succeed, and
/// a waiting operation can be interrupted.
#[test]
fn coordinator_killed() -> anyhow::Result<()> {
    let seed = rng::seed("coordinator_killed");
    let lab = Lab::up_with("kill", "ext4", &["--size", "2G"])?;
    lab.wait_mode("n1", "direct")?;
    lab.sh(
        "n1",
        &format!("dd if=/dev/urandom of={MOUNT}/data bs=1M count=64 oflag=direct conv=fsync status=none"),
    )?;
    let sum = lab.sh("n1", &format!("sha256sum < {MOUNT}/data"))?;
    let mut waiter = NodeAgent::start(&lab, "n3", MOUNT)?;

    let log = tempfile::NamedTempFile::new()?;
    let mut fio = lab
        .command("n1")
        .args([
            "fio",
            "--name=kill",
            "--ioengine=libaio",
            "--direct=1",
            "--rw=randread",
            "--bs=4k",
            "--iodepth=4",
        ])
        .args(["--size=64m", "--time_based", "--runtime=15", "--output-format=json", "--allow_file_create=0"])
        .arg(format!("--filename={MOUNT}/data"))
        .stdin(Stdio::null())
        .stdout(log.reopen()?)
        .spawn()
        .context("starting fio")?;
    let reads = lab.state("n1")?.io.direct_reads;
    wait::until("direct reads of fio", DEADLINE, || {
        Ok((lab.state("n1")?.io.direct_reads > reads + 1000).then_some(()))
    })?;

    // Every csvd is stopped first, so that nobody takes the volume over before its time.
    let csvfs = lab.sh("n2", &format!("cat /run/csv/{VOLUME}.pid"))?.trim().to_owned();
    let signal_csvds = |signal: &str| {
        ["n1", "n2", "n3"]
            .iter()
            .try_for_each(|node| lab.sh(node, &format!("pkill -{signal} -x csvd")).map(drop))
    };
    signal_csvds("STOP")?;
    lab.sh("n2", &format!("kill -KILL {csvfs}"))?;
    let killed = Instant::now();
    waiter.send(&Op::Truncate { name: "data2".into(), size: 0 })?;
    let answer = waiter.answer(OUTAGE)?;
    let interrupted = interrupt(&lab);
    signal_csvds("CONT")?;
    ensure!(answer.is_none(), "an operation was answered without a coordinator: {answer:?}");
    interrupted?;
    let answer = waiter.answer(DEADLINE)?.context("the waiting operation never ended")?;
    ensure!(answer == Reply::Failed { errno: libc::ENOENT }, "the waiting operation: {answer:?}");
    let outage = killed.elapsed();
    ensure!(
        matches!(waiter.call(&Op::Stat { name: "data".into() })?, Reply::Stat { size: 67_108_864, .. }),
        "stat"
    );
    waiter.stop()?;

    let status = wait::exit_within(&mut fio, DEADLINE)?;
    let text = std::fs::read_to_string(log.path())?;
    ensure!(status.is_some_and(|status| status.success()), "fio: {status:?}\n{text}");
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{').context("no JSON from fio")?..])?;
    let slowest_ms = json["jobs"][0]["read"]["lat_ns"]["max"].as_f64().context("no latency")? / 1e6;
    println!(
        "coordinator_killed: away for {} ms, slowest direct read {slowest_ms:.0} ms, seed {seed}",
        outage.as_millis()
    );
    ensure!(slowest_ms < READ_LATENCY_MAX_MS, "a direct read took {slowest_ms} ms");
    let again = lab.sh("n3", &format!("sha256sum < {MOUNT}/data"))?;
    ensure!(again == sum, "the data changed");
    lab.finish()
}

/// Ctrl-C on a command that waits for the coordinator ends it at once.
fn interrupt(lab: &Lab) -> anyhow::Result<()> {
    let mut command = lab.command("n3");
    // Who starts this suite in the background has SIGINT ignored, and that is inherited.
    command.args(["env", "--default-signal=INT", "mkdir", &format!("{MOUNT}/interrupted")]);
    command.stdin(Stdio::null()).stderr(Stdio::null());
    let mut mkdir = command.spawn().context("starting mkdir")?;
    // It waits when its process sleeps inside the call.
    wait::until("mkdir to wait for the coordinator", DEADLINE, || {
        ensure!(mkdir.try_wait()?.is_none(), "mkdir did not wait");
        let script =
            format!("pgrep -xf 'mkdir {MOUNT}/interrupted' | head -1 | xargs -I P cat /proc/P/wchan");
        let place = lab.sh("n3", &script)?;
        Ok(["request_wait_answer", "fuse"].iter().any(|name| place.contains(name)).then_some(()))
    })?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(mkdir.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT)?;
    let at = Instant::now();
    let status = wait::exit_within(&mut mkdir, Duration::from_secs(5))?;
    ensure!(status.is_some_and(|status| !status.success()), "Ctrl-C did not end mkdir: {status:?}");
    println!("interrupt: ended {} ms after Ctrl-C", at.elapsed().as_millis());
    Ok(())
}

/// Strangers on the network get nothing: no certificate, no password.
#[test]
fn strangers_are_refused() -> anyhow::Result<()> {
    let lab = Lab::up_with("strange", "ext4", &["--size", "512M"])?;
    let config = csv_types::config::Config::parse(&lab.sh("n2", "cat /run/csv/csv.toml")?)?;
    let secrets = config.local.secrets_dir.display().to_string();
    let volume = config.volume(VOLUME).context("no volume")?;
    let control = config.control_addr(config.me(), volume);

    // With TLS 1.3 the server's refusal comes after the handshake, so something has to be read.
    let tls = |more: &str| {
        let script = format!(
            "(printf 'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n\\0\\0\\0\\4\\0\\0\\0\\0\\0'; sleep 1) | \
             openssl s_client -connect {control} -CAfile {secrets}/ca.pem -alpn h2 {more} 2>&1 || true"
        );
        lab.sh("n1", &script)
    };
    let stranger = tls("")?;
    ensure!(stranger.contains("alert"), "a peer without certificate was not refused:\n{stranger}");
    let member = tls(&format!("-cert {secrets}/node.pem -key {secrets}/node.key"))?;
    ensure!(!member.contains("alert"), "a node's own certificate was refused:\n{member}");

    let addr = config.me().addr;
    let smb = |password: &str| {
        let script = format!(
            "smbclient //{addr}/{VOLUME} -p {} -m SMB3 -U \"csvnode%{password}\" -c ls 2>&1 || true",
            config.cluster.smb_port
        );
        lab.sh("n1", &script)
    };
    let wrong = smb("wrong")?;
    ensure!(wrong.contains("NT_STATUS_LOGON_FAILURE"), "a wrong password was not refused:\n{wrong}");
    let right = smb(&format!("$(cat {secrets}/smb.password)"))?;
    ensure!(!right.contains("LOGON_FAILURE"), "the right password was refused:\n{right}");
    println!("strangers: refused by the control service and by SMB");
    lab.finish()
}

/// A node whose SMB password is wrong has no redirected way by SMB: its data goes by the control protocol, and an event
/// says why. (A server that goes down can refuse the right password for a moment.)
#[test]
fn a_refused_smb_password_fails_no_io() -> anyhow::Result<()> {
    let lab = Lab::up_with("password", "ext4", &["--size", "512M"])?;
    let config = csv_types::config::Config::parse(&lab.sh("n3", "cat /run/csv/csv.toml")?)?;
    let file = config.local.secrets_dir.join("smb.password").display().to_string();
    let mode_of = |node: &str| lab.state(node).map(|row| row.mode);
    lab.sh("n3", &format!("cp -L {file} /run/csv/right; rm {file}; echo wrong > {file}"))?;
    lab.sh("n3", &format!("kill -KILL $(cat /run/csv/{VOLUME}.pid)"))?;
    wait::until("csvfs of n3 to be back", DEADLINE, || {
        Ok((mode_of("n3").is_ok_and(|mode| mode == "block-redirected")
            && lab.sh("n3", &format!("stat -f {MOUNT}")).is_ok_and(|text| text.contains("fuse")))
        .then_some(()))
    })?;
    let image = format!("{MOUNT}/image");
    lab.sh("n1", &format!("head -c 4M /dev/urandom > {image}; sync {image}"))?;
    let sum = |node: &str| lab.sh(node, &format!("sha256sum < {image}"));
    ensure!(sum("n3")? == sum("n1")?, "n3 reads other data");
    lab.sh(
        "n3",
        &format!("dd if=/dev/urandom of={image} bs=64k count=16 seek=8 oflag=direct conv=notrunc,fsync"),
    )?;
    ensure!(sum("n3")? == sum("n1")?, "n3 wrote other data");
    let events = lab.ctl("n3", &["events", "--local"])?;
    ensure!(events.contains("smb-error") && events.contains("password"), "no event tells why:\n{events}");
    let io = lab.state("n3")?.io;
    ensure!(io.control_reads > 0 && io.control_writes > 0 && io.block_writes == 0, "{io:?}");
    println!("password: n3 read and wrote by the control protocol");
    lab.finish()
}
