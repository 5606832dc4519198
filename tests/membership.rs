//! Nodes come and go, and everything that an administrator can get wrong about it: each is refused with the reason and
//! changes nothing in the cluster's database.

use anyhow::{Context as _, ensure};
use csv_net::{JoinError, JoinOptions, JoinRequest, NodeIdentity, Token};
use csv_tests::lab::{Lab, MOUNT, VOLUME};
use csv_tests::membership::{Small, ask, join_as, kill_csvd, numbers, start_csvd, state_of, wait_state};
use csv_tests::wait;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);
/// The manager looks five times a second; what it leaves alone for so long it leaves alone.
const SETTLE: Duration = Duration::from_millis(500);

/// The database without its events.
fn dump(lab: &Lab, node: &str) -> anyhow::Result<Value> {
    let mut db: Value = serde_json::from_str(&lab.ctl(node, &["db", "dump"])?)?;
    db.as_object_mut().context("the dump is no object")?.remove("events");
    Ok(db)
}

/// The same, when nothing in the background changes it any more.
fn settled(lab: &Lab, node: &str) -> anyhow::Result<Value> {
    let mut last = Value::Null;
    wait::until(&format!("the database of {node} to settle"), DEADLINE, || {
        std::thread::sleep(SETTLE);
        let now = dump(lab, node)?;
        let same = now == last;
        last = now;
        Ok(same.then(|| last.clone()))
    })
}

/// csvctl on `node` must fail, say each of the words, and leave the database (as `witness` has it) as it was.
fn refused(lab: &Lab, node: &str, args: &[&str], words: &[&str], witness: &str) -> anyhow::Result<()> {
    let before = settled(lab, witness)?;
    let mut argv = vec![lab.csvctl().as_os_str()];
    argv.extend(args.iter().map(std::ffi::OsStr::new));
    let text = lab.exec(node, &argv, DEADLINE)?.failed(&format!("{node}: csvctl {}", args.join(" ")))?;
    for word in words {
        ensure!(text.contains(word), "csvctl {}: no \"{word}\" in: {text}", args.join(" "));
    }
    let after = dump(lab, witness)?;
    ensure!(
        after == before,
        "csvctl {} was refused and changed something:\n{before}\n{after}",
        args.join(" ")
    );
    println!("refused: {}", text.trim());
    Ok(())
}

fn token(lab: &Lab, node: &str, uses: u32) -> anyhow::Result<String> {
    Ok(lab.ctl(node, &["cluster", "token", "--uses", &uses.to_string()])?.trim().to_owned())
}

#[test]
fn nodes_come_and_go() -> anyhow::Result<()> {
    let lab = Lab::up_with("member", "ext4", &["--size", "512M"])?;
    settings(&lab)?;
    drain_and_resume(&lab)?;
    evictions(&lab)?;
    lab.ctl("n3", &["cluster", "leave"])?;
    ensure!(numbers(&lab, "n1")?.len() == 2, "n3 left and is still there");
    other_clusters(&lab)?;
    voter_of_a_pair_leaves(&lab)?;
    bad_tokens(&lab)?;
    bad_requests(&lab)?;
    duplicate_name(&lab)?;
    lab.ctl("n3", &["cluster", "join", &token(&lab, "n2", 1)?])?;
    wait_state(&lab, "n1", "n3", "Up")?;
    lab.wait_mode("n3", "block-redirected")?;
    refused(&lab, "n3", &["cluster", "join", &token(&lab, "n1", 1)?], &["in cluster", "already"], "n1")?;
    refused(&lab, "n3", &["cluster", "create", "other"], &["in cluster", "already"], "n1")?;
    evicted_while_away(&lab)?;
    lab.finish()
}

fn settings(lab: &Lab) -> anyhow::Result<()> {
    lab.ctl("n3", &["cluster", "settings", "op_timeout_ms", "45000"])?;
    for node in ["n1", "n2", "n3"] {
        wait::until(&format!("the setting on {node}"), DEADLINE, || {
            Ok((dump(lab, node)?["settings"]["op_timeout_ms"] == 45_000).then_some(()))
        })?;
    }
    refused(lab, "n1", &["cluster", "settings", "op_timeout_ms", "soon"], &["op_timeout_ms"], "n1")?;
    refused(lab, "n1", &["cluster", "settings", "heartbeat_ms", "1"], &["50"], "n1")?;
    refused(lab, "n1", &["cluster", "settings", "no_such_thing", "1"], &["no_such_thing"], "n1")
}

fn drain_and_resume(lab: &Lab) -> anyhow::Result<()> {
    lab.ctl("n1", &["node", "pause", "n3"])?;
    wait_state(lab, "n2", "n3", "Paused")?;
    lab.ctl("n1", &["node", "resume", "n3"])?;
    wait_state(lab, "n2", "n3", "Up")?;
    lab.sh("n3", &format!("echo before > {MOUNT}/drained"))?;
    lab.ctl("n3", &["node", "drain", "n2"])?;
    wait_state(lab, "n1", "n2", "Paused")?;
    wait::until(
        "the drained node's volume on n1",
        DEADLINE,
        || Ok((lab.owner("n1")? == "n1").then_some(())),
    )?;
    ensure!(lab.sh("n3", &format!("cat {MOUNT}/drained"))? == "before\n", "the file changed");
    lab.ctl("n3", &["node", "resume", "n2"])?;
    wait_state(lab, "n1", "n2", "Up")?;
    lab.move_volume("n2")
}

fn evictions(lab: &Lab) -> anyhow::Result<()> {
    refused(lab, "n1", &["cluster", "evict", "n2"], &["n2", VOLUME, "drain"], "n1")?;
    refused(lab, "n2", &["cluster", "evict", "n2"], &["n2", VOLUME, "drain"], "n1")?;
    refused(lab, "n1", &["cluster", "evict", "n3"], &["n3 is Up", "drain"], "n1")?;
    refused(lab, "n1", &["cluster", "evict", "n9"], &["no node \"n9\"", "n1, n2, n3"], "n1")?;
    refused(lab, "n1", &["cluster", "destroy"], &["other nodes"], "n1")
}

/// n3 is in no cluster. It makes some of its own, whose tokens and last nodes are tried.
fn other_clusters(lab: &Lab) -> anyhow::Result<()> {
    refused(lab, "n3", &["cluster", "create", "no good name"], &["cluster name"], "n1")?;
    lab.ctl("n3", &["cluster", "create", "first"])?;
    wait_state(lab, "n3", "n3", "Up")?;
    refused(lab, "n3", &["cluster", "evict", "n3"], &["last node"], "n3")?;
    refused(lab, "n3", &["cluster", "leave"], &["last node", "destroy"], "n3")?;
    let stranger = token(lab, "n3", 1)?;
    lab.ctl("n3", &["cluster", "destroy"])?;
    lab.ctl("n3", &["cluster", "create", "second"])?;
    lab.ctl("n1", &["node", "drain", "n2"])?;
    lab.ctl("n2", &["cluster", "leave"])?;
    refused(lab, "n2", &["cluster", "join", &stranger], &["not the cluster of this token"], "n3")?;
    lab.ctl("n3", &["cluster", "destroy"])?;
    refused(lab, "n2", &["cluster", "join", &stranger], &["no member", "could be asked"], "n1")?;
    lab.ctl("n2", &["cluster", "join", &token(lab, "n1", 1)?])?;
    wait_state(lab, "n1", "n2", "Up")?;
    lab.wait_mode("n2", "direct").map(drop)
}

/// Of two nodes without a witness one has the only vote. When that one leaves, the other one has it and goes on.
fn voter_of_a_pair_leaves(lab: &Lab) -> anyhow::Result<()> {
    lab.ctl("n1", &["cluster", "leave"])?;
    ensure!(lab.owner("n2")? == "n2", "n2 has not got the volume");
    lab.ctl("n2", &["cluster", "settings", "op_timeout_ms", "46000"])?;
    lab.sh("n2", &format!("echo alone > {MOUNT}/alone"))?;
    lab.ctl("n1", &["cluster", "join", &token(lab, "n2", 1)?])?;
    wait_state(lab, "n2", "n1", "Up")?;
    lab.wait_mode("n1", "direct").map(drop)?;
    ensure!(lab.sh("n1", &format!("cat {MOUNT}/alone"))? == "alone\n", "the file changed");
    lab.move_volume("n1")
}

fn bad_tokens(lab: &Lab) -> anyhow::Result<()> {
    let join = |token: &str, words: &[&str]| refused(lab, "n3", &["cluster", "join", token], words, "n1");
    let good = token(lab, "n1", 1)?;
    join("", &["token"])?;
    join("csvfs", &["token"])?;
    join(&good[..good.len() - 3], &["token"])?;
    let at = good.len() / 2;
    let typed = if good.as_bytes()[at] == b'a' { "b" } else { "a" };
    join(&format!("{}{typed}{}", &good[..at], &good[at + 1..]), &["token"])?;
    let mut wrong = Token::parse(&good)?;
    wrong.secret = [7; 32];
    join(&wrong.encode()?, &["not known in this cluster"])?;
    let stale = ask(
        lab,
        "n1",
        &json!({"request": "cluster", "what": {"cluster": "token", "valid_s": 1, "uses": 1}}),
    )?;
    let stale = stale["data"].as_str().context("no token")?.to_owned();
    let expires = Token::parse(&stale)?.expires_unix_ms;
    wait::until("the token to expire", DEADLINE, || Ok((now_unix_ms()? > expires).then_some(())))?;
    join(&stale, &["expired"])?;
    // One that this machine takes for good is refused by the cluster itself.
    let mut longer = Token::parse(&stale)?;
    longer.expires_unix_ms += 3_600_000;
    join(&longer.encode()?, &["expired"])
}

fn now_unix_ms() -> anyhow::Result<u64> {
    Ok(u64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis())?)
}

/// A machine that is not what it should be: its clock hours off, its software too old. It speaks the protocol itself.
fn bad_requests(lab: &Lab) -> anyhow::Result<()> {
    let token = Token::parse(&token(lab, "n1", 1)?)?;
    let addr = lab.sh("n3", "ip -o -4 addr show dev eth0 | awk '{split($4, a, \"/\"); print a[1]}'")?;
    let good = JoinRequest {
        name: "n3".into(),
        addr: addr.trim().parse().with_context(|| format!("address of n3: {addr}"))?,
        csr_pem: NodeIdentity::create()?.csr_pem,
        feature_level: csv_cluster::db::FEATURE_LEVEL,
        software_version: "0.0.1".into(),
        now_unix_ms: now_unix_ms()?,
        rejoin: false,
    };
    let tries = [
        (JoinRequest { now_unix_ms: good.now_unix_ms - 3 * 3_600_000, ..good.clone() }, "3 hours behind"),
        (JoinRequest { now_unix_ms: good.now_unix_ms + 3 * 3_600_000, ..good.clone() }, "ahead of"),
        (JoinRequest { feature_level: 0, ..good.clone() }, "wrong version"),
        (JoinRequest { name: "n1".into(), ..good.clone() }, "n1 exists already"),
        (JoinRequest { name: "n1".into(), rejoin: true, ..good.clone() }, "n1 is Up"),
        (JoinRequest { addr: token.addrs[0].ip(), ..good.clone() }, "an address of its own"),
    ];
    for (request, word) in tries {
        let before = settled(lab, "n1")?;
        // Tokens name the time until which they are good: the joiner itself looks at its own clock first.
        let token = Token { expires_unix_ms: u64::MAX / 2, ..token.clone() };
        match join_as(lab, "n3", &token, request, &JoinOptions::default())? {
            Err(JoinError::Refused(refusal)) => {
                ensure!(refusal.text.contains(word), "no \"{word}\" in: {}", refusal.text);
                println!("refused: {}", refusal.text);
            }
            other => anyhow::bail!("not refused for \"{word}\": {other:?}"),
        }
        ensure!(dump(lab, "n1")? == before, "refused for \"{word}\", and something changed");
    }
    Ok(())
}

/// A machine that is called as a node is.
fn duplicate_name(lab: &Lab) -> anyhow::Result<()> {
    let good = token(lab, "n1", 1)?;
    kill_csvd(lab, "n3")?;
    lab.sh(
        "n3",
        "cp /etc/csv/csv.toml /etc/csv/kept; sed -i 's/^node = .*/node = \"n1\"/' /etc/csv/csv.toml",
    )?;
    start_csvd(lab, "n3")?;
    refused(lab, "n3", &["cluster", "join", &good], &["n1 exists already", "another host name"], "n1")?;
    kill_csvd(lab, "n3")?;
    lab.sh("n3", "mv /etc/csv/kept /etc/csv/csv.toml")?;
    start_csvd(lab, "n3")
}

/// A node that is evicted while it is down finds out, and comes back with a token.
fn evicted_while_away(lab: &Lab) -> anyhow::Result<()> {
    lab.lab("stop", &["n3"])?;
    wait_state(lab, "n1", "n3", "Down")?;
    let number = numbers(lab, "n1")?["n3"];
    lab.ctl("n1", &["cluster", "evict", "n3"])?;
    ensure!(!numbers(lab, "n1")?.contains_key("n3"), "n3 is still there");
    lab.lab("restart", &["n3", "--wait-s", "0"])?;
    wait::until("n3 to be cut off", DEADLINE, || {
        Ok(lab.ctl("n3", &["cluster", "status"])?.contains("IS CUT OFF").then_some(()))
    })?;
    lab.ctl("n3", &["cluster", "rejoin", &token(lab, "n1", 1)?])?;
    wait_state(lab, "n1", "n3", "Up")?;
    ensure!(numbers(lab, "n1")?["n3"] > number, "an evicted node came back under its old number");
    lab.wait_mode("n3", "block-redirected").map(drop)
}

#[test]
fn damaged_and_full_databases() -> anyhow::Result<()> {
    let lab = Lab::up_with("database", "ext4", &["--size", "512M"])?;
    lab.sh("n1", &format!("head -c 4M /dev/urandom > {MOUNT}/data; sync {MOUNT}/data"))?;
    let sum = lab.sh("n1", &format!("sha256sum < {MOUNT}/data"))?;
    let flip = "f=$(ls log-*.seg | head -1); at=$(($(stat -c %s $f) / 2)); \
                b=$(od -An -tu1 -j $at -N 1 $f); printf \"\\\\$(printf %o $((b ^ 255)))\" | dd of=$f bs=1 seek=$at conv=notrunc status=none";
    let empty = "for f in log-*.seg; do : > $f; done";
    let cut = "truncate -s 20 MANIFEST";
    let lost = "rm MANIFEST";
    for (what, damage, words) in [
        ("a byte of the log", flip, &["log-", "record"][..]),
        ("an empty log", empty, &["log-", "record"]),
        ("a cut manifest", cut, &["MANIFEST", "record"]),
        ("a lost manifest", lost, &["MANIFEST", "missing"]),
    ] {
        damaged(&lab, what, damage, words)?;
        let again = lab.sh("n3", &format!("sha256sum < {MOUNT}/data"))?;
        ensure!(again == sum, "n3 reads other data after {what}");
    }
    full_disk(&lab)?;
    lab.finish()
}

/// csvd of n3 finds its database damaged: it says so and takes no part; one command brings it back.
fn damaged(lab: &Lab, what: &str, damage: &str, words: &[&str]) -> anyhow::Result<()> {
    let number = numbers(lab, "n1")?["n3"];
    kill_csvd(lab, "n3")?;
    lab.sh("n3", &format!("cd /var/lib/csv/cluster/raft; {damage}"))?;
    start_csvd(lab, "n3")?;
    let text =
        lab.exec("n3", &[lab.csvctl().as_os_str(), "cluster".as_ref(), "status".as_ref()], DEADLINE)?;
    let text = text.failed(&format!("status with {what}"))?;
    for word in [words, &["does not take part", "rejoin"]].concat() {
        ensure!(text.contains(word), "{what}: no \"{word}\" in: {text}");
    }
    println!("{what}: {}", text.trim());
    ensure!(lab.ctl("n3", &["events", "--local"])?.contains("cluster-not-started"), "no event tells");
    ensure!(lab.sh("n3", "pgrep -x csvfs || true")?.is_empty(), "csvfs of a node that takes no part runs");
    wait_state(lab, "n1", "n3", "Down")?;
    let before = lab.sh("n3", "cd /var/lib/csv/cluster; find . -type f | sort | xargs sha256sum")?;
    let mut wrong = Token::parse(&token(lab, "n1", 1)?)?;
    wrong.secret = [7; 32];
    refused(lab, "n3", &["cluster", "rejoin", &wrong.encode()?], &["not known"], "n1")?;
    let after = lab.sh("n3", "cd /var/lib/csv/cluster; find . -type f | sort | xargs sha256sum")?;
    ensure!(after == before, "a refused rejoin changed the node:\n{before}\n{after}");
    lab.ctl("n3", &["cluster", "rejoin", &token(lab, "n1", 1)?])?;
    wait_state(lab, "n1", "n3", "Up")?;
    ensure!(numbers(lab, "n1")?["n3"] > number, "a node without its database came back under its old number");
    lab.wait_mode("n3", "block-redirected")?;
    refused(lab, "n3", &["cluster", "rejoin", &token(lab, "n1", 1)?], &["in order"], "n1")
}

/// The disk under a node's database is full: the node stops and says so, the others go on, and it comes back.
fn full_disk(lab: &Lab) -> anyhow::Result<()> {
    lab.lab("stop", &["n3"])?;
    let small = Small::under(&lab.dir().join("n3/state"), "24m")?;
    lab.lab("restart", &["n3"])?;
    wait_state(lab, "n1", "n3", "Up")?;
    lab.sh("n3", "cat /dev/zero > /var/lib/csv/fill 2>/dev/null || true")?;
    // Until a record meets the end of the disk; each of them goes to n3 as well.
    wait::until("n3 to stop", DEADLINE, || {
        let value = lab.ctl("n1", &["cluster", "settings", "op_timeout_ms", "--json"])?;
        let now = if value.contains("50000") { "45000" } else { "50000" };
        lab.ctl("n1", &["cluster", "settings", "op_timeout_ms", now])?;
        Ok(lab.ctl("n3", &["cluster", "status"])?.contains("IS CUT OFF").then_some(()))
    })?;
    let status = lab.ctl("n3", &["cluster", "status"])?;
    ensure!(status.contains("no space left"), "the reason is missing:\n{status}");
    println!("full disk: {}", status.lines().nth(1).unwrap_or_default());
    wait_state(lab, "n1", "n3", "Down")?;
    lab.ctl("n1", &["cluster", "settings", "op_timeout_ms", "60000"])?;
    ensure!(state_of(lab, "n1", "n2")? == "Up", "another node stopped too");
    kill_csvd(lab, "n3")?;
    lab.sh("n3", "rm /var/lib/csv/fill")?;
    start_csvd(lab, "n3")?;
    wait_state(lab, "n1", "n3", "Up")?;
    lab.wait_mode("n3", "block-redirected")?;
    lab.lab("stop", &["n3"])?;
    drop(small);
    Ok(())
}

#[test]
fn a_lost_cluster_is_restored() -> anyhow::Result<()> {
    let lab = Lab::up_with("restore", "ext4", &["--size", "512M", "--all-paths"])?;
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let file = |name: &str| dir.path().join(name).display().to_string();
    lab.ctl("n1", &["cluster", "settings", "op_timeout_ms", "45000"])?;
    lab.ctl("n1", &["cluster", "backup", &file("backup")])?;
    refused(&lab, "n1", &["cluster", "backup", &file("backup")], &["not written over"], "n1")?;
    lab.sh("n1", &format!("echo after > {MOUNT}/after; sync {MOUNT}/after"))?;
    // What the backup does not know: ownerships after it.
    lab.move_volume("n1")?;
    lab.move_volume("n2")?;
    let restore = |node: &str, name: &str, words: &[&str]| {
        refused(&lab, node, &["cluster", "restore", &file(name), "--others-are-down"], words, "n1")
    };
    restore("n1", "backup", &["in cluster", "already"])?;
    lab.lab("stop", &["n3"])?;
    std::fs::rename(lab.dir().join("n3/state/cluster"), lab.dir().join("n3/state/lost"))?;
    lab.lab("restart", &["n3", "--wait-s", "0"])?;
    spoiled(dir.path())?;
    restore("n3", "cut", &["cut off"])?;
    restore("n3", "flipped", &["damaged"])?;
    restore("n3", "newer", &["format 9"])?;
    restore("n3", "foreign", &["no backup"])?;
    restore("n3", "none", &["cannot read"])?;
    refused(&lab, "n3", &["cluster", "restore", &file("backup")], &["n1, n2", "--others-are-down"], "n1")?;
    restore("n3", "backup", &["n1, n2", "answers"])?;
    let before = dump(&lab, "n1")?;
    lab.lab("crash", &["n1"])?;
    lab.lab("crash", &["n2"])?;
    lab.ctl("n3", &["cluster", "restore", &file("backup"), "--others-are-down"])?;
    wait::until("the volume on n3", DEADLINE, || Ok((lab.owner("n3")? == "n3").then_some(())))?;
    lab.wait_mode("n3", "direct")?;
    ensure!(lab.sh("n3", &format!("cat {MOUNT}/after"))? == "after\n", "the volume's data");
    let db = dump(&lab, "n3")?;
    ensure!(db["id"] == before["id"] && db["settings"]["op_timeout_ms"] == 45_000, "other records: {db}");
    let epoch = |db: &Value| db["volumes"][VOLUME]["epoch"].as_u64().unwrap_or(0);
    ensure!(epoch(&db) > epoch(&before), "the epoch went back: {} after {}", epoch(&db), epoch(&before));
    ensure!(lab.ctl("n3", &["events"])?.contains("restored from a backup"), "no event tells");
    // A node of the former cluster is no danger, and comes in again.
    lab.lab("restart", &["n1", "--wait-s", "0"])?;
    // When the only vote of the former cluster was its own it goes on by itself, and meets the new owner's label.
    wait::until("n1 to stand aside", DEADLINE, || {
        let cut_off = lab.ctl("n1", &["cluster", "status"])?.contains("IS CUT OFF");
        let lost = || anyhow::Ok(lab.ctl("n1", &["events"])?.contains("this node has lost the volume"));
        Ok((cut_off || lost()?).then_some(()))
    })?;
    ensure!(lab.owner("n3")? == "n3", "n3 has lost the volume");
    lab.ctl("n1", &["cluster", "rejoin", "--discard", &token(&lab, "n3", 1)?])?;
    wait_state(&lab, "n3", "n1", "Up")?;
    lab.wait_mode("n1", "direct")?;
    lab.sh("n1", &format!("echo again > {MOUNT}/again"))?;
    ensure!(lab.sh("n3", &format!("cat {MOUNT}/again"))? == "again\n", "n1 and n3 differ");
    lab.finish()
}

/// Two of three are gone. The third stays without the volume until it is told to go on alone; the others come back as nodes of
/// a cluster that has gone on without them.
#[test]
fn a_cluster_without_quorum_is_started_by_force() -> anyhow::Result<()> {
    let lab = Lab::up_with("force", "ext4", &["--size", "512M", "--all-paths"])?;
    let cluster = dump(&lab, "n3")?["name"].as_str().context("the dump has no name")?.to_owned();
    let force = ["cluster", "start", "--force", "--yes-i-know", &cluster];
    lab.sh("n1", &format!("echo before > {MOUNT}/before; sync {MOUNT}/before"))?;
    refused(&lab, "n3", &force, &["has quorum", "not needed"], "n1")?;
    let before = dump(&lab, "n3")?;
    // At once: with time between them the votes would follow who is up.
    std::thread::scope(|scope| {
        let crashes = ["n1", "n2"].map(|node| scope.spawn(|| lab.lab("crash", &[node])));
        crashes.into_iter().try_for_each(|crash| match crash.join() {
            Ok(crashed) => crashed.map(drop),
            Err(_) => anyhow::bail!("the crashing thread panicked"),
        })
    })?;
    let cut_off = || anyhow::Ok(lab.ctl("n3", &["cluster", "status"])?.contains("IS CUT OFF"));
    wait::until("n3 to be cut off", DEADLINE, || Ok(cut_off()?.then_some(())))?;
    lab.wait_mode("n3", "paused")?;
    refused(&lab, "n3", &["cluster", "start"], &["--force"], "n3")?;
    refused(&lab, "n3", &force[..3], &["nobody can be asked", "--yes-i-know"], "n3")?;
    let other = ["cluster", "start", "--force", "--yes-i-know", "other"];
    refused(&lab, "n3", &other, &[&cluster, "other"], "n3")?;

    lab.ctl("n3", &force)?;
    wait::until("the volume on n3", DEADLINE, || Ok((lab.owner("n3")? == "n3").then_some(())))?;
    lab.wait_mode("n3", "direct")?;
    ensure!(lab.sh("n3", &format!("cat {MOUNT}/before"))? == "before\n", "the volume's data");
    lab.sh("n3", &format!("echo alone > {MOUNT}/alone; sync {MOUNT}/alone"))?;
    let epoch = |db: &Value| db["volumes"][VOLUME]["epoch"].as_u64().unwrap_or(0);
    ensure!(epoch(&dump(&lab, "n3")?) > epoch(&before), "the epoch did not rise");
    ensure!(lab.ctl("n3", &["events"])?.contains("by force"), "no event tells");

    // Those that were away had decided nothing else, and come in again by themselves.
    for node in ["n1", "n2"] {
        lab.lab("restart", &[node, "--wait-s", "0"])?;
        wait_state(&lab, "n3", node, "Up")?;
        lab.wait_mode(node, "direct")?;
        ensure!(lab.sh(node, &format!("cat {MOUNT}/alone"))? == "alone\n", "{node} and n3 differ");
    }
    lab.finish()
}

/// Backups that are none.
fn spoiled(dir: &Path) -> anyhow::Result<()> {
    let good = std::fs::read(dir.join("backup"))?;
    std::fs::write(dir.join("cut"), &good[..good.len() - 100])?;
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    std::fs::write(dir.join("flipped"), flipped)?;
    let text = String::from_utf8(good)?;
    let newer = text.replacen("\"csvfs_backup\":1", "\"csvfs_backup\":9", 1);
    ensure!(newer != text, "a backup begins in another way");
    std::fs::write(dir.join("newer"), newer)?;
    std::fs::write(dir.join("foreign"), "[local]\nnode = \"n1\"\n").map_err(Into::into)
}

#[test]
fn validation() -> anyhow::Result<()> {
    let lab = Lab::up_with("validate", "ext4", &["--size", "512M"])?;
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let html = dir.path().join("report.html");
    let spare = dir.path().join("spare.img");
    std::fs::File::create(&spare)?.set_len(64 << 20)?;
    let (html_text, spare_text) = (html.display().to_string(), spare.display().to_string());
    let run = |node: &str, more: &[&str]| {
        let mut argv: Vec<&str> = vec!["cluster", "validate", "--json"];
        argv.extend(more);
        let command: Vec<&std::ffi::OsStr> = std::iter::once(lab.csvctl().as_os_str())
            .chain(argv.into_iter().map(std::ffi::OsStr::new))
            .collect();
        let ended = lab.exec(node, &command, DEADLINE)?;
        let checks: Vec<Value> = serde_json::from_str(&ended.stdout)
            .with_context(|| format!("{}{}", ended.stdout, ended.stderr))?;
        anyhow::Ok((ended.status.success(), checks))
    };
    let (good, checks) = run("n1", &["--html", &html_text, "--lun", &spare_text])?;
    for check in checks.iter().filter(|check| check["outcome"] == "failed") {
        println!("failed: {check}");
    }
    ensure!(good, "a good cluster fails");
    let has = |checks: &[Value], name: &str, outcome: &str| {
        checks.iter().any(|check| check["name"] == name && check["outcome"] == outcome)
    };
    for name in
        ["n2 to n1", "n3 to n2", "n2", "versions", "reservations", "preempt", "clock of n3", "FUSE", "smbd"]
    {
        ensure!(has(&checks, name, "passed"), "{name} did not pass: {checks:?}");
    }
    // n3 has no path, which is told.
    ensure!(has(&checks, VOLUME, "warning"), "{checks:?}");
    let page = std::fs::read_to_string(&html)?;
    ensure!(page.contains("n3 to n2") && !page.contains("http"), "the page is not self-contained");
    lab.lab("partition", &["n3"])?;
    let (good, checks) = run("n1", &[])?;
    ensure!(!good && has(&checks, "n1 to n3", "failed") && has(&checks, "n3", "failed"), "{checks:?}");
    lab.lab("heal", &[])?;
    wait_state(&lab, "n1", "n3", "Up")?;
    // A machine in no cluster.
    lab.ctl("n3", &["cluster", "leave"])?;
    let (good, checks) = run("n3", &["--lun", &spare_text])?;
    ensure!(
        good && has(&checks, "TCP port 7440", "passed") && has(&checks, "reserve", "passed"),
        "{checks:?}"
    );
    lab.ctl("n3", &["cluster", "join", &token(&lab, "n1", 1)?])?;
    wait_state(&lab, "n1", "n3", "Up")?;
    lab.finish()
}
