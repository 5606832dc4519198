//! With Samba's smbd and smbclient on loopback.

use super::*;
use crate::api::Dependency;
use crate::types::testbed::{Bed, properties, sh, spec};
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Instant;

/// A node with a volume mounted, and a port for its group's server.
struct Node {
    bed: Bed,
    port: u16,
}

impl Node {
    /// `None` when not run as root or without Samba.
    fn new(number: u32) -> Option<Node> {
        Command::new("smbd").arg("-V").output().ok()?;
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let node = Node { bed: Bed::of_node(number), port: free_port() };
        let volume = node.volume();
        fs::create_dir_all(&volume).unwrap();
        // Users other than root pass through.
        for dir in volume.ancestors().skip(1).take(2) {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        }
        sh("mount", &["-t", "tmpfs", "-o", "mode=0777", "csv-test", volume.to_str().unwrap()]);
        Some(node)
    }

    fn volume(&self) -> PathBuf {
        self.bed.node().mount_dir.join("vol1")
    }

    fn share(&self, share: &str, more: &[(&str, &str)]) -> Box<dyn Resource> {
        self.bed.open(&FileShare, self.spec(share, more))
    }

    fn spec(&self, share: &str, more: &[(&str, &str)]) -> Spec {
        let path = self.volume().join(share);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        let port = self.port.to_string();
        let mut spec =
            spec("FileShare", &[("share", share), ("path", path.to_str().unwrap()), ("port", &port)]);
        spec.name = format!("share {share}");
        spec.properties.extend(properties(more));
        for (kind, name, value) in
            [("IPAddress", "address", "127.0.0.1/8"), ("NetworkName", "name", "files.lab.test")]
        {
            spec.depends_on.push(Dependency {
                name: kind.into(),
                kind: kind.into(),
                properties: properties(&[(name, value)]),
            });
        }
        spec
    }

    /// What smbclient says as a user (`name%password`).
    fn client(&self, user: &str, share: &str, command: &str) -> String {
        let port = self.port.to_string();
        let output = Command::new("smbclient")
            .args([&format!("//127.0.0.1/{share}"), "-p", &port, "-U", user, "-m", "SMB3", "-s", "/dev/null"])
            .args(["-c", command])
            .output()
            .unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }

    fn listed(&self, user: &str) -> String {
        let port = self.port.to_string();
        let args = ["-L", "127.0.0.1", "-g", "-p", &port, "-U", user, "-m", "SMB3", "-s", "/dev/null"];
        String::from_utf8_lossy(&Command::new("smbclient").args(args).output().unwrap().stdout).into_owned()
    }

    fn pid(&self) -> Option<i32> {
        let pid = fs::read_to_string(self.bed.node().run_dir.join("fileserver/g/pid/smbd.pid")).ok()?;
        let pid = pid.trim().parse().ok()?;
        Path::new(&format!("/proc/{pid}/fd/0")).symlink_metadata().ok().map(|_| pid)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // What a test that failed has left.
        for name in ["a", "b", "c"] {
            let _ = server_of(&self.spec(name, &[]), &self.bed.context())
                .and_then(|server| server.remove(&self.bed.context(), &format!("share {name}"), name));
        }
        let _ = Command::new("umount").arg("--lazy").arg(self.volume()).status();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn password(share: &mut dyn Resource, user: &str) {
    share
        .control("set-user", &serde_json::json!({ "user": user, "password": format!("pw-{user}") }))
        .unwrap();
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let bed = Bed::new();
    let pairs = [("share", "a"), ("path", "/srv/elsewhere")];
    let error = FileShare.open(spec("FileShare", &pairs), bed.context()).err().unwrap();
    assert!(matches!(&error, Failure::Config(text) if text.contains("neither on a volume")), "{error}");
    let path = bed.node().mount_dir.join("vol1/a");
    let pairs = [("share", "a"), ("path", path.to_str().unwrap())];
    let error = FileShare.open(spec("FileShare", &pairs), bed.context()).err().unwrap();
    assert!(matches!(&error, Failure::Config(text) if text.contains("depend on an IPAddress")), "{error}");
    let mut spec = spec("FileShare", &pairs);
    let address = properties(&[("address", "127.0.0.1/8")]);
    spec.depends_on.push(Dependency { name: "ip".into(), kind: "IPAddress".into(), properties: address });
    fs::create_dir_all(&path).unwrap();
    let error = bed.open(&FileShare, spec).online().unwrap_err();
    assert!(error.to_string().contains("nothing is mounted"), "{error}");
}

#[test]
fn permissions_and_enumeration_are_as_the_properties_say() {
    let Some(node) = Node::new(1) else { return };
    let users = [("read_users", "games"), ("write_users", "daemon"), ("access_based_enumeration", "true")];
    let mut share = node.share("a", &users);
    assert!(share.looks_alive().is_err());
    share.online().unwrap();
    for user in ["daemon", "games", "mail"] {
        password(share.as_mut(), user);
    }
    assert_eq!(share.control("users", &serde_json::Value::Null).unwrap().as_array().unwrap().len(), 3);
    let mut open = node.share("b", &[("read_only", "true"), ("hidden", "true")]);
    open.online().unwrap();
    fs::write(node.volume().join("a/seen"), "text").unwrap();
    fs::write(node.volume().join("a/secret"), "text").unwrap();
    fs::set_permissions(node.volume().join("a/secret"), fs::Permissions::from_mode(0o600)).unwrap();
    // Access-based enumeration, of files and of shares.
    let listing = node.client("daemon%pw-daemon", "a", "ls");
    assert!(listing.contains("seen") && !listing.contains("secret"), "{listing}");
    fs::copy(node.volume().join("a/secret"), node.volume().join("b/secret")).unwrap();
    assert!(node.client("daemon%pw-daemon", "b", "ls").contains("secret"), "without it");
    assert!(node.listed("games%pw-games").contains("Disk|a|"));
    let listed = node.listed("mail%pw-mail");
    assert!(
        listed.contains("IPC$") && !listed.contains("Disk|a|") && !listed.contains("Disk|b|"),
        "{listed}"
    );
    // Who may what.
    assert!(!node.client("daemon%pw-daemon", "a", "mkdir new").contains("NT_STATUS"));
    assert!(node.client("games%pw-games", "a", "mkdir other").contains("NT_STATUS"));
    assert!(node.client("mail%pw-mail", "a", "ls").contains("NT_STATUS_ACCESS_DENIED"));
    assert!(node.client("daemon%wrong", "a", "ls").contains("NT_STATUS_LOGON_FAILURE"));
    assert!(node.client("daemon%pw-daemon", "b", "mkdir new").contains("NT_STATUS"));
    assert!(!node.client("mail%pw-mail", "b", "ls").contains("NT_STATUS"));
    // Names that SMB reserves.
    fs::write(node.volume().join("b/what?"), "text").unwrap();
    assert!(node.client("mail%pw-mail", "b", "ls").contains("what"));
    share.is_alive().unwrap();
    open.is_alive().unwrap();
    share.control("remove-user", &serde_json::json!({ "user": "mail" })).unwrap();
    assert!(node.client("mail%pw-mail", "b", "ls").contains("NT_STATUS"));
    share.control("sessions", &serde_json::Value::Null).unwrap();
    share.offline().unwrap();
    assert!(node.client("daemon%pw-daemon", "a", "ls").contains("BAD_NETWORK_NAME"));
    open.offline().unwrap();
}

#[test]
fn two_shares_have_one_server_which_goes_with_the_last() {
    let Some(node) = Node::new(1) else { return };
    let mut a = node.share("a", &[("guest", "true")]);
    let mut b = node.share("b", &[]);
    a.online().unwrap();
    let pid = node.pid().unwrap();
    b.online().unwrap();
    assert_eq!(node.pid(), Some(pid));
    let error = node.share("c", &[("workgroup", "OTHER")]).online().unwrap_err();
    assert!(matches!(&error, Failure::Config(text) if text.contains("must have the same")), "{error}");
    let mut same = node.spec("c", &[]);
    same.properties.extend(properties(&[("share", "A")]));
    let error = node.bed.open(&FileShare, same).online().unwrap_err();
    assert!(matches!(&error, Failure::Config(text) if text.contains("already")), "{error}");
    a.is_alive().unwrap();
    b.is_alive().unwrap();
    assert!(!node.client("%", "a", "mkdir by-guest").contains("NT_STATUS"));
    a.offline().unwrap();
    assert!(a.looks_alive().is_err());
    assert_eq!(node.pid(), Some(pid));
    b.is_alive().unwrap();
    b.terminate().unwrap();
    b.terminate().unwrap();
    assert_eq!(node.pid(), None);
}

#[test]
fn a_new_host_takes_it_over_and_a_killed_server_is_noticed() {
    let Some(node) = Node::new(1) else { return };
    let mut first = node.share("a", &[("guest", "true")]);
    first.online().unwrap();
    drop(first);
    let mut adopted = node.share("a", &[("guest", "true")]);
    adopted.adopt().unwrap();
    adopted.is_alive().unwrap();
    let pid = node.pid().unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    let patience = Instant::now() + Duration::from_secs(30);
    while adopted.looks_alive().is_ok() {
        assert!(Instant::now() < patience);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(adopted.adopt().is_err());
    adopted.terminate().unwrap();
    let began = Instant::now();
    adopted.online().unwrap();
    println!("server started in {:?}", began.elapsed());
    let began = Instant::now();
    adopted.is_alive().unwrap();
    println!("thorough look in {:?}", began.elapsed());
    // A share that is not what it should be: the directory is gone, then the volume.
    fs::remove_dir_all(node.volume().join("a")).unwrap();
    let error = adopted.is_alive().unwrap_err();
    assert!(error.to_string().contains("cannot be shared"), "{error}");
    adopted.offline().unwrap();
    let busy = TcpListener::bind(("127.0.0.1", node.port)).unwrap();
    fs::create_dir(node.volume().join("a")).unwrap();
    let error = adopted.online().unwrap_err();
    assert!(error.to_string().contains("in use by another program"), "{error}");
    drop(busy);
    adopted.terminate().unwrap();
}

#[test]
fn a_share_on_a_disk_needs_the_disk() {
    let Some(node) = Node::new(1) else { return };
    let disk = node.bed.dir().join("disk");
    fs::create_dir_all(disk.join("a")).unwrap();
    let mut spec = node.spec("a", &[("guest", "true")]);
    spec.properties.extend(properties(&[("path", disk.join("a/").to_str().unwrap())]));
    let mount = properties(&[("mount", disk.to_str().unwrap())]);
    spec.depends_on.push(Dependency { name: "disk".into(), kind: "PhysicalDisk".into(), properties: mount });
    let mut share = node.bed.open(&FileShare, spec);
    let error = share.online().unwrap_err();
    assert!(error.to_string().contains("nothing is mounted"), "{error}");
    sh("mount", &["-t", "tmpfs", "-o", "mode=0777", "csv-test", disk.to_str().unwrap()]);
    fs::create_dir(disk.join("a")).unwrap();
    share.online().unwrap();
    share.is_alive().unwrap();
    let part = fs::read_to_string(node.bed.node().run_dir.join("fileserver/g/shares/share+20a")).unwrap();
    assert!(part.contains("durable handles = yes"), "{part}");
    share.offline().unwrap();
    // Nothing keeps the disk.
    sh("umount", &[disk.to_str().unwrap()]);
}

#[test]
fn passwords_follow_the_group_and_a_monitor_logs_on() {
    let (Some(one), Some(two)) = (Node::new(1), Node::new(2)) else { return };
    let dir = tempfile::tempdir().unwrap();
    let passdb = dir.path().join("passdb");
    let file = dir.path().join("password");
    fs::write(&file, "pw-daemon\n").unwrap();
    let more = [
        ("passdb_dir", passdb.to_str().unwrap()),
        ("encrypt", "true"),
        ("monitor_user", "daemon"),
        ("monitor_password_file", file.to_str().unwrap()),
    ];
    let mut here = one.share("a", &more);
    here.online().unwrap();
    assert!(here.is_alive().is_err(), "the monitor has no account yet");
    password(here.as_mut(), "daemon");
    here.is_alive().unwrap();
    here.offline().unwrap();
    let mut there = two.share("a", &more);
    there.online().unwrap();
    there.is_alive().unwrap();
    assert!(!two.client("daemon%pw-daemon", "a", "ls").contains("NT_STATUS"));
    there.offline().unwrap();
}
