//! The text of the private smbd's configuration.
//!
//! Every directory and file that Samba would otherwise put into `/etc/samba`, `/var` or `/run` is named here, so
//! that several instances and the machine's own Samba never meet. Parameters that an older or newer Samba does
//! not know are ignored by it.

use crate::names::catia_mappings;
use crate::smbd::SmbdConfig;
use std::path::{Path, PathBuf};

/// Where an instance keeps its things.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) conf: PathBuf,
    pub(crate) user_map: PathBuf,
    pub(crate) log_dir: PathBuf,
    /// The name smbd gives it by itself, before it has read its configuration.
    pub(crate) log: PathBuf,
    pub(crate) private: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) cache: PathBuf,
    pub(crate) lock: PathBuf,
    pub(crate) pid: PathBuf,
    pub(crate) ncalrpc: PathBuf,
    pub(crate) winbindd: PathBuf,
}

impl Layout {
    /// What has to survive lies under `base_dir`; sockets, locks and pids under `run_dir`.
    pub(crate) fn new(base_dir: &Path, run_dir: &Path) -> Self {
        Layout {
            conf: base_dir.join("smb.conf"),
            user_map: base_dir.join("user.map"),
            log_dir: base_dir.join("log"),
            log: base_dir.join("log/log.smbd"),
            private: base_dir.join("private"),
            state: base_dir.join("state"),
            cache: base_dir.join("cache"),
            lock: run_dir.join("lock"),
            pid: run_dir.join("pid"),
            ncalrpc: run_dir.join("ncalrpc"),
            winbindd: run_dir.join("winbindd"),
        }
    }

    pub(crate) fn dirs(&self) -> [&Path; 8] {
        [
            &self.log_dir,
            &self.private,
            &self.state,
            &self.cache,
            &self.lock,
            &self.pid,
            &self.ncalrpc,
            &self.winbindd,
        ]
    }
}

/// The whole smb.conf.
pub(crate) fn smb_conf(config: &SmbdConfig, layout: &Layout) -> String {
    format!("{}\n{}", global(config, layout), share(config))
}

fn global(config: &SmbdConfig, layout: &Layout) -> String {
    let Layout { private, state, cache, lock, pid, ncalrpc, winbindd, log, user_map, .. } = layout;
    let encrypt = if config.encrypt { "required" } else { "off" };
    format!(
        "# Written by csvfs at each start; changes are lost.
[global]
workgroup = CSVFS
netbios name = CSVFS
server role = standalone server
security = user
map to guest = never
passdb backend = tdbsam:{private}/passdb.tdb
username map = {user_map}
private dir = {private}
smb passwd file = {private}/smbpasswd
binddns dir = {state}
ntp signd socket directory = {state}
state directory = {state}
usershare path = {state}
usershare max shares = 0
cache directory = {cache}
lock directory = {lock}
pid directory = {pid}
ncalrpc dir = {ncalrpc}
winbindd socket directory = {winbindd}
log file = {log}
log level = 1
max log size = 1024
smb ports = {port}
interfaces = {addr}
bind interfaces only = yes
disable netbios = yes
dns proxy = no
server min protocol = SMB3_11
server max protocol = SMB3_11
server signing = mandatory
server smb encrypt = {encrypt}
# One connection per worker already; interfaces of other networks must not be offered.
server multi channel support = no
socket options = TCP_NODELAY
deadtime = 0
keepalive = 30
unix charset = UTF-8
load printers = no
printing = bsd
printcap name = /dev/null
disable spoolss = yes
rpc start on demand helpers = no
smb2 leases = no
",
        private = private.display(),
        user_map = user_map.display(),
        state = state.display(),
        cache = cache.display(),
        lock = lock.display(),
        pid = pid.display(),
        ncalrpc = ncalrpc.display(),
        winbindd = winbindd.display(),
        log = log.display(),
        port = config.port,
        addr = config.addr,
    )
}

fn share(config: &SmbdConfig) -> String {
    format!(
        "[{share}]
path = {path}
read only = no
browseable = no
valid users = root
force user = root
vfs objects = catia
catia:mappings = {mappings}
case sensitive = yes
preserve case = yes
mangled names = no
hide dot files = no
# Nobody may cache what other nodes change.
oplocks = no
level2 oplocks = no
kernel oplocks = no
kernel share modes = no
kernel change notify = no
durable handles = no
# Locks and attributes are the control protocol's.
strict locking = no
posix locking = no
store dos attributes = no
ea support = no
nt acl support = no
map archive = no
map hidden = no
map system = no
map readonly = no
csc policy = disable
wide links = no
# A worker has one request on its way, so a thread of smbd's pool would only add a switch; large requests that
# arrive in several parts still go to the pool.
aio read size = 1048577
aio write size = 1048577
use sendfile = no
strict sync = yes
sync always = no
strict allocate = no
",
        share = config.share,
        path = config.path.display(),
        mappings = catia_mappings(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_of_samba_is_redirected() {
        let config = SmbdConfig {
            share: "vol".into(),
            path: "/mnt/vol".into(),
            addr: std::net::Ipv4Addr::LOCALHOST.into(),
            port: 4450,
            base_dir: "/b".into(),
            run_dir: "/r".into(),
            encrypt: true,
            user: "u".into(),
            password: "geheim".into(),
        };
        let text = smb_conf(&config, &Layout::new(&config.base_dir, &config.run_dir));
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((_, value)) = line.split_once(" = ") else { continue };
            if let Some(at) = value.find('/') {
                let path = &value[at..];
                let ours = ["/b/", "/r/", "/mnt/vol", "/dev/null"].iter().any(|ours| path.starts_with(ours));
                assert!(ours, "{line}");
            }
        }
        assert!(!text.contains("geheim"));
        assert!(text.contains("server smb encrypt = required"));
    }
}
