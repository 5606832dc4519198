//! The text of smb.conf: one for the server of a group, and one part for each of its shares. Pure.
//!
//! Every directory and file that Samba would otherwise put into `/etc/samba`, `/var` or `/run` is named, so that the servers of
//! several groups, csvfs's own and the machine's Samba never meet.

use crate::types::settings::{Properties, flag, list, text};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Longest name of a share that clients take.
const SHARE_CHARS_MAX: usize = 80;
/// Names with a meaning of their own.
const RESERVED: [&str; 6] = ["global", "homes", "printers", "ipc$", "print$", "admin$"];
/// Longest NetBIOS name.
const SERVER_CHARS_MAX: usize = 15;

/// Where the server of a group keeps its things.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Sockets, locks and pids; lost at boot.
    pub(super) run: PathBuf,
    /// Logs and what Samba remembers.
    pub(super) state: PathBuf,
    /// Passwords (`passdb.tdb`) and the server's identity (`secrets.tdb`).
    pub(super) private: PathBuf,
}

impl Layout {
    pub(super) fn conf(&self) -> PathBuf {
        self.run.join("smb.conf")
    }

    pub(super) fn shares(&self) -> PathBuf {
        self.run.join("shares")
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.run.join("lock")
    }

    pub(super) fn pid_file(&self) -> PathBuf {
        self.run.join("pid/smbd.pid")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.state.join("log/log.smbd")
    }

    pub(super) fn dirs(&self) -> Vec<PathBuf> {
        let of_run = ["shares", "lock", "pid", "ncalrpc", "winbindd"].map(|name| self.run.join(name));
        let of_state = ["log", "state", "cache"].map(|name| self.state.join(name));
        of_run.into_iter().chain(of_state).chain([self.private.clone()]).collect()
    }
}

/// What all shares of a group have in common.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Settings {
    /// Addresses with their prefixes.
    pub(super) addresses: Vec<String>,
    pub(super) port: u16,
    pub(super) server: String,
    pub(super) workgroup: String,
    pub(super) private: PathBuf,
}

/// The server's name in SMB for a name in the DNS.
pub(super) fn server_name(name: &str) -> String {
    let label = name.split('.').next().unwrap_or_default();
    label.chars().take(SERVER_CHARS_MAX).collect::<String>().to_uppercase()
}

/// The main part; `shares` are the files of the shares.
pub(super) fn main(settings: &Settings, layout: &Layout, shares: &[PathBuf], guests: bool) -> String {
    let run = layout.run.display();
    let state = layout.state.display();
    let private = layout.private.display();
    // Who is unknown becomes a guest, but a wrong password is refused.
    let map_to_guest = if guests { "bad user" } else { "never" };
    let mut text = format!(
        "# Written by csvfs whenever a share of the group comes or goes; changes are lost.
[global]
workgroup = {workgroup}
netbios name = {server}
server string = {server}
server role = standalone server
security = user
map to guest = {map_to_guest}
passdb backend = tdbsam:{private}/passdb.tdb
private dir = {private}
smb passwd file = {private}/smbpasswd
binddns dir = {state}/state
ntp signd socket directory = {state}/state
state directory = {state}/state
usershare path = {state}/state
usershare max shares = 0
cache directory = {state}/cache
lock directory = {run}/lock
pid directory = {run}/pid
ncalrpc dir = {run}/ncalrpc
winbindd socket directory = {run}/winbindd
log file = {log}
log level = 1
max log size = 10240
smb ports = {port}
interfaces = {addresses}
bind interfaces only = yes
disable netbios = yes
dns proxy = no
server min protocol = SMB2_10
server multi channel support = no
socket options = TCP_NODELAY
unix charset = UTF-8
load printers = no
printing = bsd
printcap name = /dev/null
disable spoolss = yes
",
        workgroup = settings.workgroup,
        server = settings.server,
        log = layout.log().display(),
        port = settings.port,
        addresses = settings.addresses.join(" "),
    );
    for share in shares {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "include = {}", share.display());
    }
    text
}

/// On what a share lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// A volume of the cluster, which other nodes have mounted too.
    Volume,
    /// A disk that only this node has mounted.
    Disk,
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// The part of one share.
pub(super) fn share(properties: &Properties, place: Place) -> String {
    let users = |name: &str| list(properties, name);
    let (read, write, full) = (users("read_users"), users("write_users"), users("full_users"));
    let writers = [write, full.clone()].concat();
    let everyone = read.is_empty() && writers.is_empty();
    let is_set = |name: &str, default| flag(properties, name, default);
    // With lists, who is in none of them does not write.
    let read_only = is_set("read_only", false) || !everyone;
    let lists = [
        ("valid users", if everyone { Vec::new() } else { [read.clone(), writers.clone()].concat() }),
        ("read list", read),
        ("write list", writers),
        ("admin users", full),
    ];
    let mut out = format!(
        "[{name}]\npath = {path}\ncomment = {comment}\nread only = {read_only}\nguest ok = {guest}\nbrowseable = {browseable}\n\
         access based share enum = {abe}\nhide unreadable = {abe}\nserver smb encrypt = {encrypt}\n",
        name = text(properties, "share").unwrap_or_default(),
        path = text(properties, "path").unwrap_or_default(),
        comment = text(properties, "comment").unwrap_or_default(),
        read_only = yes(read_only),
        guest = yes(is_set("guest", false)),
        browseable = yes(!is_set("hidden", false)),
        abe = yes(is_set("access_based_enumeration", false)),
        encrypt = if is_set("encrypt", false) { "required" } else { "default" },
    );
    for (option, names) in lists.into_iter().filter(|(_, names)| !names.is_empty()) {
        let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
        let _ = writeln!(out, "{option} = {}", quoted.join(", "));
    }
    let _ = write!(
        out,
        "vfs objects = catia\ncatia:mappings = {}\ninherit acls = yes\nstrict sync = yes\nsync always = {}\nmangled names = no\n",
        catia_mappings(),
        yes(is_set("write_through", true))
    );
    out.push_str(place_options(is_durable(properties, place), place).as_str());
    out
}

/// May a client that was cut off for a moment come back to its open files?
fn is_durable(properties: &Properties, place: Place) -> bool {
    match text(properties, "durable_handles") {
        Some("true") => true,
        Some("false") => false,
        _ => place == Place::Disk,
    }
}

fn place_options(durable: bool, place: Place) -> String {
    // Samba grants durable handles only where nobody beside it uses the files (smb.conf(5)).
    let beside = yes(!durable);
    let mut out = format!(
        "durable handles = {}\nposix locking = {beside}\nkernel share modes = {beside}\nkernel oplocks = no\n",
        yes(durable)
    );
    if place == Place::Volume {
        // No client may cache what other nodes change.
        out.push_str("oplocks = no\nlevel2 oplocks = no\ncsc policy = disable\n");
    }
    out
}

/// Characters that SMB reserves, carried as `U+F000 + c`, as on the shares between nodes (csv-smb, `names`).
fn catia_mappings() -> String {
    let pairs = (1..=0x1f_u32).chain(b"\"*:<>?|\\".iter().map(|byte| u32::from(*byte)));
    pairs.map(|c| format!("0x{c:02x}:0x{:04x}", 0xf000 + c)).collect::<Vec<_>>().join(",")
}

fn is_plain(text: &str) -> bool {
    // `%` begins a variable, a backslash at the end continues the line.
    !text.chars().any(|c| c.is_control() || c == '%') && !text.ends_with('\\')
}

/// What cannot be written into smb.conf, and what contradicts itself.
///
/// # Errors
/// In words that name the property.
pub(super) fn check(properties: &Properties) -> Result<(), String> {
    let share = text(properties, "share").unwrap_or_default();
    let odd = |c: char| "\\/[]:|<>+=;,?*\"".contains(c);
    if share.is_empty() || share.chars().count() > SHARE_CHARS_MAX || share.contains(odd) || !is_plain(share)
    {
        return Err(format!(
            "share \"{share}\" is no name for a share: at most 80 characters, none of \\/[]:|<>+=;,?*\"%"
        ));
    }
    if RESERVED.contains(&share.to_lowercase().as_str()) {
        return Err(format!("share \"{share}\" is a name that SMB keeps for itself; choose another"));
    }
    let path = Path::new(text(properties, "path").unwrap_or_default());
    let climbs = path.components().any(|part| matches!(part, std::path::Component::ParentDir));
    if !path.is_absolute() || climbs || path.to_str().is_none_or(|path| !is_plain(path)) {
        return Err(format!("path \"{}\" is not absolute or has odd characters", path.display()));
    }
    for name in ["comment", "workgroup", "monitor_user"] {
        if !is_plain(text(properties, name).unwrap_or_default()) {
            return Err(format!(
                "{name} has characters that smb.conf cannot hold (%, a line break, a backslash at the end)"
            ));
        }
    }
    let mut users = 0;
    for name in ["read_users", "write_users", "full_users"] {
        for user in list(properties, name) {
            if user.contains('"') || !is_plain(&user) || user.trim_start_matches(['@', '+', '&']).is_empty() {
                return Err(format!("{name}: \"{user}\" is no user and no @group"));
            }
            users += 1;
        }
    }
    contradictions(properties, users > 0)
}

fn contradictions(properties: &Properties, has_users: bool) -> Result<(), String> {
    let is_set = |name: &str| flag(properties, name, false);
    let writers = !list(properties, "write_users").is_empty() || !list(properties, "full_users").is_empty();
    if is_set("guest") && has_users {
        return Err(
            "guest lets everybody in, but there are lists of users; set guest to false or empty the lists"
                .into(),
        );
    }
    if is_set("guest") && is_set("encrypt") {
        return Err("guest and encrypt exclude each other: a guest has no key to encrypt with".into());
    }
    if is_set("read_only") && writers {
        return Err(
            "read_only is true, but write_users or full_users are given; move them to read_users".into()
        );
    }
    match (text(properties, "monitor_user"), text(properties, "monitor_password_file")) {
        (Some(_), None) => Err("monitor_user needs monitor_password_file".into()),
        (None, Some(_)) => Err("monitor_password_file needs monitor_user".into()),
        (Some(_), Some(_)) | (None, None) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::testbed::properties;

    const BASE: [(&str, &str); 2] = [("share", "docs"), ("path", "/srv/disk/docs")];

    fn with(more: &[(&str, &str)]) -> Properties {
        properties(&[&BASE, more].concat())
    }

    #[test]
    fn lists_become_samba_options() {
        let text = share(&with(&[("read_users", "ann, @staff people"), ("write_users", "bob")]), Place::Disk);
        for line in [
            "valid users = \"ann\", \"@staff people\", \"bob\"",
            "write list = \"bob\"",
            "read only = yes",
            "guest ok = no",
        ] {
            assert!(text.lines().any(|there| there == line), "{line} in {text}");
        }
        let text = share(&with(&[]), Place::Volume);
        assert!(
            text.contains("read only = no")
                && !text.contains("valid users")
                && text.contains("\noplocks = no")
        );
        assert!(share(&with(&[("read_only", "true")]), Place::Disk).contains("read only = yes"));
    }

    #[test]
    fn writes_go_through_to_the_disk_unless_told() {
        let has = |more: &[(&str, &str)]| share(&with(more), Place::Disk).contains("sync always = yes");
        assert!(has(&[]));
        assert!(!has(&[("write_through", "false")]));
    }

    #[test]
    fn durable_handles_follow_the_place_unless_told() {
        let has = |more: &[(&str, &str)], place| share(&with(more), place).contains("durable handles = yes");
        assert!(has(&[], Place::Disk) && !has(&[], Place::Volume));
        assert!(has(&[("durable_handles", "true")], Place::Volume));
        assert!(!has(&[("durable_handles", "false")], Place::Disk));
    }

    #[test]
    fn nothing_can_be_smuggled_into_the_configuration() {
        let bad = [
            ("share", "a]\nb"),
            ("share", "homes"),
            ("share", "IPC$"),
            ("path", "relative"),
            ("path", "/a/../etc"),
            ("path", "/srv/%u"),
            ("comment", "x\npath = /"),
            ("comment", "x\\"),
            ("read_users", "a\"b"),
            ("write_users", "@"),
        ];
        for pair in bad {
            assert!(check(&with(&[pair])).is_err(), "{pair:?}");
        }
        assert_eq!(
            check(&with(&[("comment", "ours; and # more"), ("read_users", "DOM\\ann,@staff")])),
            Ok(())
        );
    }

    #[test]
    fn contradictions_are_refused() {
        let bad: [(&[(&str, &str)], &str); 5] = [
            (&[("guest", "true"), ("read_users", "ann")], "guest lets everybody in"),
            (&[("guest", "true"), ("encrypt", "true")], "exclude"),
            (&[("read_only", "true"), ("full_users", "ann")], "read_only"),
            (&[("monitor_user", "m")], "monitor_password_file"),
            (&[("monitor_password_file", "/x")], "monitor_user"),
        ];
        for (more, expected) in bad {
            let error = check(&with(more)).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn every_path_of_samba_is_redirected() {
        let layout = Layout { run: "/r".into(), state: "/s".into(), private: "/p".into() };
        let settings = Settings {
            addresses: vec!["10.0.0.5/24".into()],
            port: 445,
            server: server_name("files-of-the-department.example.com"),
            workgroup: "WORKGROUP".into(),
            private: "/p".into(),
        };
        assert_eq!(settings.server, "FILES-OF-THE-DE");
        let text = main(&settings, &layout, &["/r/shares/a".into()], true);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((name, value)) = line.split_once(" = ") else { continue };
            let Some(at) = value.find('/').filter(|_| name != "interfaces") else { continue };
            let ours = ["/r/", "/s/", "/p", "/dev/null"].iter().any(|ours| value[at..].starts_with(ours));
            assert!(ours, "{line}");
        }
    }
}
