//! Live migration: verbs of both ends. The sequence stands in [`super`].

use super::command::{Hardware, Start};
use super::machine::Machine;
use super::running::Phase;
use super::transfer::{self, Transfer};
use crate::api::{EventLevel, Failure};
use serde::Deserialize;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

/// Name of the credentials in QEMU.
const CREDENTIALS: &str = "migration-tls";
/// Most connections of one migration.
const CHANNELS_MAX: u64 = 16;
/// QEMU's names for the files of a certificate, and ours.
const CERTIFICATE_FILES: [(&str, &str); 5] = [
    ("ca-cert.pem", "ca.pem"),
    ("server-cert.pem", "node.pem"),
    ("server-key.pem", "node.key"),
    ("client-cert.pem", "node.pem"),
    ("client-key.pem", "node.key"),
];

/// Arguments of `incoming`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Incoming {
    listen: IpAddr,
    #[serde(default = "yes")]
    tls: bool,
    hardware: Hardware,
    #[serde(default)]
    channels: u64,
}

/// Arguments of `migrate`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Migrate {
    uri: String,
    #[serde(default = "yes")]
    tls: bool,
    #[serde(default)]
    tls_hostname: Option<String>,
    #[serde(default)]
    bandwidth_mib: Option<u64>,
    #[serde(default)]
    downtime_ms: Option<u64>,
    #[serde(default)]
    channels: u64,
    #[serde(default = "hour")]
    timeout_s: u64,
}

/// Arguments of `arrived`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Arrived {
    #[serde(default = "half_a_minute")]
    wait_ms: u64,
    #[serde(default)]
    paused: bool,
}

fn yes() -> bool {
    true
}

fn hour() -> u64 {
    3600
}

fn half_a_minute() -> u64 {
    30_000
}

fn read<'a, T: Deserialize<'a>>(verb: &str, arguments: &'a Value) -> Result<T, Failure> {
    T::deserialize(arguments).map_err(|error| Failure::Config(format!("arguments of \"{verb}\": {error}")))
}

impl Machine {
    /// Target: starts a QEMU that waits for the guest.
    pub(crate) fn incoming(&mut self, arguments: &Value) -> Result<Value, Failure> {
        let wanted: Incoming = read("incoming", arguments)?;
        if wanted.channels > CHANNELS_MAX {
            return Err(Failure::Config(format!("channels can be {CHANNELS_MAX} at most")));
        }
        if let Some(running) = self.running.as_ref().filter(|running| !running.process.has_ended()) {
            if running.phase == Phase::Running {
                return Err(Failure::new("the virtual machine runs on this node already"));
            }
            // Of an earlier attempt.
            self.end()?;
        }
        self.forget();
        self.launch(Some(wanted.hardware.clone()), Start::Incoming)?;
        let listening = self.listen(&wanted);
        match listening {
            Ok(port) => {
                self.enter(Phase::Incoming);
                let uri = format!("tcp:{}:{port}", in_uri(wanted.listen));
                Ok(json!({ "uri": uri, "port": port, "pid": self.running()?.process.pid() }))
            }
            Err(failure) => {
                self.end()?;
                Err(failure)
            }
        }
    }

    fn listen(&self, wanted: &Incoming) -> Result<u64, Failure> {
        let running = self.running()?;
        let channels = wanted.channels > 0;
        // The images are opened for writing when the guest goes on here, not before: until then it can go on there.
        let on =
            [("events", true), ("late-block-activate", true), ("return-path", true), ("multifd", channels)];
        transfer::capabilities(running, &on)?;
        let mut parameters = json!({ "tls-creds": "" });
        if wanted.tls {
            self.credentials("server")?;
            parameters["tls-creds"] = CREDENTIALS.into();
        }
        if channels {
            parameters["multifd-channels"] = wanted.channels.into();
        }
        running.ask("migrate-set-parameters", parameters)?;
        running.watch.forget_migration();
        let (first, last) = self.config.ports;
        let uri = format!("tcp:{}:{first},to={last}", in_uri(wanted.listen));
        running.ask("migrate-incoming", json!({ "uri": uri })).map_err(|failure| {
            Failure::new(format!(
                "no migration can be awaited on {} (ports {first}-{last}): {failure}",
                wanted.listen
            ))
        })?;
        let account = running.ask("query-migrate", json!({}))?;
        let port = account["socket-address"][0]["port"].as_str().and_then(|port| port.parse().ok());
        port.ok_or_else(|| Failure::new("QEMU does not tell on which port it waits for the guest"))
    }

    /// Source: sends the guest away. It can be taken back until it goes on at the other end.
    pub(crate) fn migrate(&mut self, arguments: &Value) -> Result<Value, Failure> {
        let wanted: Migrate = read("migrate", arguments)?;
        if wanted.channels > CHANNELS_MAX {
            return Err(Failure::Config(format!("channels can be {CHANNELS_MAX} at most")));
        }
        if !wanted.uri.starts_with("tcp:") || wanted.uri.contains(',') {
            return Err(Failure::Config(format!(
                "\"{}\" is no address of a waiting machine, such as tcp:10.0.0.2:49152",
                wanted.uri
            )));
        }
        let running = self.running()?;
        let was = running.status()?;
        if running.phase != Phase::Running || !matches!(was.as_str(), "running" | "paused") {
            return Err(Failure::new(format!("the guest cannot be sent away while it is \"{was}\"")));
        }
        let tls = if wanted.tls {
            self.credentials("client")?;
            let named = wanted.tls_hostname.clone();
            Some((CREDENTIALS, named.unwrap_or_else(|| host_of(&wanted.uri))))
        } else {
            None
        };
        let transfer = Transfer {
            doing: "migrating",
            uri: wanted.uri,
            bandwidth_mib: wanted.bandwidth_mib.unwrap_or(self.config.bandwidth_mib),
            downtime_ms: wanted.downtime_ms.unwrap_or(self.config.downtime_ms),
            tls,
            answered: true,
            channels: wanted.channels,
            limit: Duration::from_secs(wanted.timeout_s),
        };
        let account = transfer::send(running, &self.context, &transfer)?;
        self.enter(Phase::Migrated);
        Ok(json!({
            "status": "completed",
            "was_paused": was == "paused",
            "downtime_ms": account["downtime"],
            "total_time_ms": account["total-time"],
            "setup_time_ms": account["setup-time"],
            "transferred_bytes": account["ram"]["transferred"],
            "memory_bytes": account["ram"]["total"],
            "rounds": account["ram"]["dirty-sync-count"],
        }))
    }

    /// Target: waits for the guest and lets it go on here.
    pub(crate) fn arrived(&mut self, arguments: &Value) -> Result<Value, Failure> {
        let wanted: Arrived = read("arrived", arguments)?;
        let running = self.running()?;
        match running.phase {
            Phase::Running => {
                let status = running.status()?;
                self.judge(&status)?;
                return Ok(json!({ "status": status }));
            }
            Phase::Incoming => {}
            Phase::Starting | Phase::Migrated | Phase::Off => {
                return Err(Failure::new("this node does not wait for the guest"));
            }
        }
        transfer::arrive(running, &self.context, Duration::from_millis(wanted.wait_ms))?;
        if wanted.paused {
            self.enter(Phase::Running);
        } else {
            self.go()?;
        }
        Ok(json!({ "status": self.running()?.status()? }))
    }

    /// Source: the guest goes on at the other end; its QEMU here ends.
    pub(crate) fn migrated(&mut self) -> Result<Value, Failure> {
        match self.running.as_ref().map(|running| running.phase) {
            None => {}
            Some(Phase::Migrated) => {
                self.running()?.quit()?;
                self.forget();
            }
            Some(Phase::Starting | Phase::Running | Phase::Incoming | Phase::Off) => {
                return Err(Failure::new("the guest has not been sent away from this node"));
            }
        }
        Ok(json!({}))
    }

    /// Target: no longer waits.
    pub(crate) fn cancel_incoming(&mut self) -> Result<Value, Failure> {
        match self.running.as_ref().map(|running| running.phase) {
            None => {}
            Some(Phase::Incoming) => self.end()?,
            Some(Phase::Starting | Phase::Running | Phase::Migrated | Phase::Off) => {
                return Err(Failure::new("this node does not wait for the guest"));
            }
        }
        Ok(json!({}))
    }

    /// Source: takes back a guest that was sent away and does not go on at the other end.
    pub(crate) fn take_back(&mut self) -> Result<(), Failure> {
        if self.running()?.phase != Phase::Migrated {
            return Err(Failure::new("the guest has not been sent away from this node"));
        }
        self.context.event(EventLevel::Info, "the guest that was sent away is taken back");
        // A guest that was saved to its end counts as sent away, too, when the host died then.
        let back = self.unsave().and_then(|()| Ok(self.go()?));
        // One that cannot go on here goes on nowhere: it is not to stand still until somebody looks.
        back.inspect_err(|failure| {
            self.context.report(Err(format!("the guest that was sent away cannot be taken back: {failure}")));
        })
    }

    /// Source: the guest that was sent away is not lost yet.
    pub(crate) fn hold(&mut self) -> Result<Value, Failure> {
        match &mut self.running {
            Some(running) if running.phase == Phase::Migrated => running.enter(Phase::Migrated),
            Some(_) | None => return Err(Failure::new("the guest has not been sent away from this node")),
        }
        Ok(json!({}))
    }

    /// Gives QEMU this node's certificate, under the names that it wants. A new one is read at every migration.
    fn credentials(&self, endpoint: &str) -> Result<(), Failure> {
        let dir = self.place.tls();
        copy_certificates(&self.context.node().secrets_dir, &dir)?;
        let running = self.running()?;
        // Of an earlier migration, if there was one.
        let _ = running.ask("migrate-set-parameters", json!({ "tls-creds": "" }));
        let _ = running.ask("object-del", json!({ "id": CREDENTIALS }));
        let object = json!({
            "qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": dir, "endpoint": endpoint, "verify-peer": true,
        });
        let made = running.ask("object-add", object);
        let _ = std::fs::remove_dir_all(&dir);
        made.map(drop).map_err(|failure| {
            Failure::NotHere(format!(
                "QEMU does not take this node's certificate for the migration: {failure}"
            ))
        })
    }
}

fn copy_certificates(secrets: &Path, dir: &Path) -> Result<(), Failure> {
    let _ = std::fs::remove_dir_all(dir);
    let made = std::fs::DirBuilder::new().mode(0o700).create(dir);
    made.map_err(|error| Failure::new(format!("{} cannot be made: {error}", dir.display())))?;
    for (to, from) in CERTIFICATE_FILES {
        let from = secrets.join(from);
        let copy = || -> std::io::Result<()> {
            let bytes = std::fs::read(&from)?;
            let mut file =
                std::fs::File::options().write(true).create_new(true).mode(0o600).open(dir.join(to))?;
            std::io::Write::write_all(&mut file, &bytes)
        };
        copy().map_err(|error| {
            Failure::NotHere(format!(
                "{} is needed for the migration and cannot be used: {error}",
                from.display()
            ))
        })?;
    }
    Ok(())
}

fn in_uri(addr: IpAddr) -> String {
    match addr {
        IpAddr::V4(addr) => addr.to_string(),
        IpAddr::V6(addr) => format!("[{addr}]"),
    }
}

/// The host in `tcp:HOST:PORT`.
fn host_of(uri: &str) -> String {
    let rest = uri.strip_prefix("tcp:").unwrap_or(uri);
    let host = rest.rsplit_once(':').map_or(rest, |(host, _)| host);
    host.trim_matches(['[', ']']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_go_into_uris_and_out_again() {
        for addr in ["10.0.0.2", "fd00::2"] {
            let uri = format!("tcp:{}:49152", in_uri(addr.parse().unwrap()));
            assert_eq!(host_of(&uri), addr);
        }
    }

    #[test]
    fn unknown_arguments_are_refused() {
        let error = read::<Migrate>("migrate", &json!({ "uri": "tcp:a:1", "speed": 1 })).unwrap_err();
        assert!(error.to_string().contains("speed"), "{error}");
        let plain: Migrate = read("migrate", &json!({ "uri": "tcp:a:1" })).unwrap();
        assert!(plain.tls && plain.timeout_s == 3600);
    }

    #[test]
    fn certificates_are_copied_for_their_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        for name in ["ca.pem", "node.pem"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let to = dir.path().join("tls");
        let error = copy_certificates(dir.path(), &to).unwrap_err();
        assert!(error.to_string().contains("node.key"), "{error}");
        std::fs::write(dir.path().join("node.key"), "key").unwrap();
        copy_certificates(dir.path(), &to).unwrap();
        assert_eq!(std::fs::read(to.join("client-key.pem")).unwrap(), b"key");
        let mode = std::fs::metadata(to.join("server-key.pem")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
