//! A file share that fails over: a disk, an address, a name in Debian's DNS server, and Samba on them, for a client outside the
//! cluster that writes file after file through the name. Its node loses power: the client goes on in seconds, permissions are as
//! they were, and nothing that the server had acknowledged is lost. Then it goes back, in the part of the day when it may.

use anyhow::{Context as _, ensure};
use csv_cluster::db::{GroupState, NewResource};
use csv_tests::client::{Client, KEY, Named, SECRET, ZONE};
use csv_tests::groups::{Groups, resource};
use csv_tests::lab::Lab;
use csv_tests::membership::wait_state;
use csv_tests::{fsck, wait};
use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);
/// From the power cut until the client's next file is acknowledged.
const BACK_MAX: Duration = Duration::from_secs(10);
/// A client gives a try up after this time.
const TRY: Duration = Duration::from_secs(3);
/// Longer than the manager takes to see that a node has settled.
const IN_VAIN: Duration = Duration::from_secs(5);
const GROUP: &str = "files";
const PRIVATE: &str = "/var/lib/csv/fileserver/files/private";
const MOUNT: &str = "/var/lib/csv/mnt/data";
/// Users of the system that have a password for the server: one writes, one reads, one is in no list.
const USERS: [&str; 3] = ["backup", "games", "news"];

fn unc() -> String {
    format!("//{GROUP}.{ZONE}/docs")
}

/// The disk's file system, with the directory of the share.
fn make_disk(lab: &Lab) -> anyhow::Result<std::path::PathBuf> {
    let (image, root) = (lab.dir().join("disk-data.img"), tempfile::tempdir()?);
    let docs = root.path().join("docs");
    std::fs::create_dir(&docs)?;
    // backup and its group, by Debian's fixed numbers.
    chown(&docs, Some(34), Some(34))?;
    std::fs::set_permissions(&docs, std::fs::Permissions::from_mode(0o2750))?;
    let mut mkfs = Command::new("mkfs.ext4");
    wait::run(mkfs.args(["-q", "-F", "-d"]).arg(root.path()).arg(&image), DEADLINE)?.ok("mkfs.ext4")?;
    std::fs::File::open(&image)?.sync_all()?;
    Ok(image)
}

fn make_group(lab: &Lab, client: &Client, failback: &str) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n2");
    groups.add(GROUP, &["--preferred", "n1,n2", "--failback", failback])?;
    let address = format!("{}/24", client.on_network(100));
    let server = Named::server(client).to_string();
    let disk =
        resource(GROUP, "disk", "PhysicalDisk", &[("device", "data"), ("fs", "ext4"), ("mount", MOUNT)]);
    let address = resource(GROUP, "address", "IPAddress", &[("address", &address)]);
    let name = NewResource {
        depends: "[address]".into(),
        ..resource(
            GROUP,
            "name",
            "NetworkName",
            &[
                ("name", GROUP),
                ("zone", ZONE),
                ("server", &server),
                ("tsig_key", KEY),
                ("tsig_secret", SECRET),
            ],
        )
    };
    let path = format!("{MOUNT}/docs");
    let share = NewResource {
        depends: "[disk] and [address] and [name]".into(),
        checkpoints: ["passdb.tdb", "secrets.tdb"].map(|file| format!("{PRIVATE}/{file}")).into(),
        ..resource(
            GROUP,
            "share",
            "FileShare",
            &[
                ("share", "docs"),
                ("path", &path),
                ("write_users", USERS[0]),
                ("read_users", USERS[1]),
                ("access_based_enumeration", "true"),
                ("comment", "papers"),
            ],
        )
    };
    for resource in [disk, address, name, share] {
        groups.add_resource(&resource)?;
    }
    groups.online(GROUP)
}

fn password(user: &str) -> String {
    format!("{user}%pw-{user}")
}

/// Passwords, and rights of one who only reads; both are to be there after a failover.
fn make_users(lab: &Lab) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n2");
    for user in USERS {
        let arguments = serde_json::json!({ "user": user, "password": format!("pw-{user}") });
        groups.ctl(&["resource", "control", "share", "set-user", &arguments.to_string()])?;
    }
    let owner = groups.owner(GROUP)?;
    lab.sh(&owner, &format!("setfacl -m u:games:rx,d:u:games:rx {MOUNT}/docs && sync -f {MOUNT}/docs"))?;
    groups.wait_kept(&owner, &format!("{PRIVATE}/passdb.tdb"), DEADLINE)
}

/// A client's programs for SMB, which look names up in the DNS only and know no configuration.
fn smb(client: &Client, program: &str, args: &[&str], deadline: Duration) -> anyhow::Result<wait::Ended> {
    // Nor do they know what names were before: the cache is their own.
    let own = ["lock", "cache", "state"]
        .map(|kind| format!("--option={kind} directory={}", client.dir().display()));
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    let common = ["-s", "/dev/null", "--option=name resolve order=host", "-m", "SMB3"];
    client.run(program, &[args, &common, &own].concat(), deadline)
}

/// Everything that says who may do what, and what the share is.
fn permissions(lab: &Lab, client: &Client) -> anyhow::Result<String> {
    let mut text = String::new();
    let (unc, writer) = (unc(), password(USERS[0]));
    for path in ["/", "first"] {
        let acl = smb(client, "smbcacls", &[&unc, path, "-U", &writer], DEADLINE)?.ok("smbcacls")?;
        text.push_str(&format!("--- smbcacls {path}\n{acl}"));
    }
    for user in USERS {
        // Who may only read may not write, and who is in no list does not get in.
        let seen = smb(
            client,
            "smbclient",
            &[&unc, "-U", &password(user), "-c", "get first -; put /etc/hostname no"],
            DEADLINE,
        )?;
        let seen = format!("{}{}", seen.stdout, seen.stderr);
        let denied = seen.lines().filter(|line| line.contains("NT_STATUS")).collect::<Vec<_>>().join("\n");
        let reads = seen.contains("the first file");
        text.push_str(&format!("--- {user} reads: {reads}\n{denied}\n"));
    }
    let host = format!("{GROUP}.{ZONE}");
    let list = smb(client, "smbclient", &["-L", &host, "-g", "-U", &writer], DEADLINE)?.ok("smbclient -L")?;
    text.push_str(&format!("--- shares\n{list}"));
    let owner = Groups::of(lab, "n2").owner(GROUP)?;
    let posix = lab.sh(&owner, &format!("cd {MOUNT} && getfacl -n docs docs/first"))?;
    text.push_str(&format!("--- getfacl\n{posix}"));
    let definition = Groups::of(lab, "n2").resource("share")?.properties;
    text.push_str(&format!("--- definition\n{definition:?}\n"));
    Ok(text)
}

fn content(number: u64) -> String {
    format!("this is file {number} of a client outside the cluster\n").repeat(500)
}

/// Acknowledged files: number, when its try began, when it was acknowledged.
type Acknowledged = Mutex<Vec<(u64, Instant, Instant)>>;

/// Writes file after file, each again until it is acknowledged. Gives the number of tries that failed.
fn write_on(client: &Client, done: &Acknowledged, over: &AtomicBool) -> anyhow::Result<u64> {
    let (unc, writer) = (unc(), password(USERS[0]));
    let (mut number, mut failed) = (1, 0);
    let local = client.dir().join("next");
    std::fs::write(&local, content(number))?;
    let local_text = local.display().to_string();
    while !over.load(Ordering::Relaxed) {
        let (began, put) = (Instant::now(), format!("put {local_text} file-{number}"));
        // One that hangs is given up, as a client would that is asked to be quick.
        let tried = smb(client, "smbclient", &[&unc, "-U", &writer, "-c", &put], TRY);
        if tried.is_ok_and(|ended| ended.status.success()) {
            done.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.push((number, began, Instant::now()));
            number += 1;
            std::fs::write(&local, content(number))?;
        } else {
            failed += 1;
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(failed)
}

fn acknowledged(done: &Acknowledged) -> Vec<(u64, Instant, Instant)> {
    done.lock().map(|done| done.clone()).unwrap_or_default()
}

/// The first file that was begun after `since` and acknowledged.
fn first_since(done: &Acknowledged, since: Instant) -> anyhow::Result<Instant> {
    wait::until("the client to go on", DEADLINE, || {
        Ok(acknowledged(done).iter().find(|(_, began, _)| *began > since).map(|(_, _, at)| *at))
    })
}

/// Everything acknowledged so far is there, whole.
fn nothing_is_lost(lab: &Lab, done: &Acknowledged) -> anyhow::Result<usize> {
    let (files, owner) = (acknowledged(done), Groups::of(lab, "n2").owner(GROUP)?);
    let sums = lab.sh(&owner, &format!("cd {MOUNT}/docs && cksum file-*"))?;
    let sums: BTreeMap<&str, &str> =
        sums.lines().filter_map(|line| line.rsplit_once(' ')).map(|(sum, name)| (name, sum)).collect();
    let dir = tempfile::tempdir()?;
    for (number, _, _) in &files {
        let name = format!("file-{number}");
        let sum = checksum(dir.path(), &content(*number))?;
        let there = sums.get(name.as_str());
        ensure!(there == Some(&sum.as_str()), "{name} was acknowledged, and is {there:?}, not {sum}");
    }
    Ok(files.len())
}

fn checksum(dir: &Path, text: &str) -> anyhow::Result<String> {
    let path = dir.join("x");
    std::fs::write(&path, text)?;
    let said = wait::run(Command::new("cksum").arg(&path), DEADLINE)?.ok("cksum")?;
    Ok(said.rsplit_once(' ').context("cksum")?.0.to_owned())
}

/// A part of the day, by the nodes' clock, from so many minutes from now to so many.
fn window(lab: &Lab, from: i32, to: i32) -> anyhow::Result<String> {
    let at = |minutes: i32| -> anyhow::Result<String> {
        Ok(lab.sh("n2", &format!("date -d '{minutes} minutes' +%H:%M"))?.trim().to_owned())
    };
    Ok(format!("{}-{}", at(from)?, at(to)?))
}

#[test]
fn a_share_fails_over_and_goes_back() -> anyhow::Result<()> {
    let args = ["--size", "512M", "--all-paths", "--disk", "128M:data"];
    let times = ["--set", "group_settle_ms=0", "--set", "settle_ms=1000"];
    let lab = Lab::up_with("shares", "ext4", &[&args[..], &times].concat())?;
    let client = Client::new(&lab)?;
    let _named = Named::start(&client)?;
    let image = make_disk(&lab)?;
    make_group(&lab, &client, &window(&lab, 120, 180)?)?;
    ensure!(Groups::of(&lab, "n2").owner(GROUP)? == "n1", "n1 is preferred");
    make_users(&lab)?;
    std::fs::write(client.dir().join("first"), "the first file\n")?;
    let put = format!("put {} first", client.dir().join("first").display());
    smb(&client, "smbclient", &[&unc(), "-U", &password(USERS[0]), "-c", &put], DEADLINE)?
        .ok("the first file")?;

    let (done, over) = (Acknowledged::default(), AtomicBool::new(false));
    let failed = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_on(&client, &done, &over));
        let acted = fails_over(&lab, &client, &done).and_then(|()| goes_back(&lab, &client, &done));
        over.store(true, Ordering::Relaxed);
        let failed = writer.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        acted.and(failed)
    })?;
    println!("{} files acknowledged, none lost, {failed} tries failed", nothing_is_lost(&lab, &done)?);
    Groups::of(&lab, "n2").offline(GROUP)?;
    fsck::check(&image, "ext4")?;
    lab.finish()
}

/// The share's node loses power.
fn fails_over(lab: &Lab, client: &Client, done: &Acknowledged) -> anyhow::Result<()> {
    wait::until("the client to have written", DEADLINE, || {
        Ok((acknowledged(done).len() >= 10).then_some(()))
    })?;
    let before = permissions(lab, client)?;
    for word in [
        "backup",
        "--- backup reads: true",
        "--- games reads: true",
        "--- news reads: false",
        "ACCESS_DENIED",
        "docs",
    ] {
        ensure!(before.contains(word), "permissions do not say \"{word}\":\n{before}");
    }
    first_since(done, Instant::now())?;
    let (began, number) = (Instant::now(), acknowledged(done).len());
    lab.lab("crash", &["n1"])?;
    let cut = Instant::now();
    let back = first_since(done, cut)? - began;
    let groups = Groups::of(lab, "n2");
    groups.wait_online(GROUP, DEADLINE)?;
    let owner = groups.owner(GROUP)?;
    println!(
        "n1 lost power after {number} files (done after {} ms): the client's next one is acknowledged by {owner} after {} ms",
        (cut - began).as_millis(),
        back.as_millis()
    );
    ensure!(
        owner != "n1" && back < BACK_MAX,
        "the service was back on {owner} after {} ms",
        back.as_millis()
    );
    let after = permissions(lab, client)?;
    ensure!(after == before, "permissions were:\n{before}\nand are:\n{after}");
    println!("permissions as before; {} files acknowledged, none lost", nothing_is_lost(lab, done)?);
    Ok(())
}

/// Its node is back: it goes there in its window, and not before.
fn goes_back(lab: &Lab, client: &Client, done: &Acknowledged) -> anyhow::Result<()> {
    let groups = Groups::of(lab, "n2");
    let before = permissions(lab, client)?;
    lab.lab("restart", &["n1"])?;
    wait_state(lab, "n2", "n1", "Up")?;
    let end = Instant::now() + IN_VAIN;
    while Instant::now() < end {
        ensure!(groups.owner(GROUP)? != "n1", "it went back outside its window");
        std::thread::sleep(Duration::from_millis(200));
    }
    let began = Instant::now();
    groups.ctl(&["group", "set", GROUP, "--failback", &window(lab, -5, 60)?])?;
    groups.wait_online_at(GROUP, "n1", DEADLINE)?;
    let online = began.elapsed();
    let next = first_since(done, Instant::now())?;
    let files = acknowledged(done);
    let gap = files.windows(2).filter(|two| two[1].2 > began).map(|two| two[1].2 - two[0].2).max();
    println!(
        "in its window it went back to n1: online there after {} ms, the client's longest pause {} ms",
        online.as_millis(),
        gap.unwrap_or_default().as_millis()
    );
    ensure!(next > began && groups.group(GROUP)?.state == GroupState::Online, "{}", groups.describe(GROUP));
    let after = permissions(lab, client)?;
    ensure!(after == before, "permissions were:\n{before}\nand are:\n{after}");
    Ok(())
}
