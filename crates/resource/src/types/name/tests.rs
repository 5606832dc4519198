//! Against BIND's named, with a dynamic zone and a TSIG key.

use super::*;
use crate::api::Dependency;
use crate::types::testbed::{Bed, properties, sh, spec};
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

const SECRET: &str = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3I=";

/// A DNS server with the zones `lab.test` and `77.10.in-addr.arpa`.
struct Named {
    dir: tempfile::TempDir,
    port: u16,
    child: Option<Child>,
}

impl Named {
    /// `None` where BIND is not installed.
    fn new() -> Option<Named> {
        Command::new("named").arg("-v").output().ok()?;
        let dir = tempfile::Builder::new().prefix("named").tempdir().unwrap();
        // Free for a moment at least, for TCP and most likely for UDP.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let path = dir.path().display();
        let mut conf = format!(
            "options {{ directory \"{path}\"; listen-on port {port} {{ 127.0.0.1; }}; listen-on-v6 {{ none; }};
              pid-file \"{path}/pid\"; session-keyfile \"{path}/session.key\"; managed-keys-directory \"{path}\";
              recursion no; dnssec-validation no; }};
            controls {{ }};
            key \"csv-key\" {{ algorithm hmac-sha256; secret \"{SECRET}\"; }};\n"
        );
        for zone in ["lab.test", "77.10.in-addr.arpa"] {
            let text = "$TTL 60\n@ IN SOA ns.lab.test. admin.lab.test. 1 60 60 60 60\n@ IN NS ns.lab.test.\n";
            let host = if zone == "lab.test" { "ns IN A 127.0.0.1\nforeign IN A 10.77.0.99\n" } else { "" };
            std::fs::write(dir.path().join(zone), format!("{text}{host}")).unwrap();
            let zone = format!(
                "zone \"{zone}\" {{ type primary; file \"{zone}\"; allow-update {{ key csv-key; }}; }};\n"
            );
            conf.push_str(&zone);
        }
        std::fs::File::create(dir.path().join("conf")).unwrap().write_all(conf.as_bytes()).unwrap();
        let mut named = Named { dir, port, child: None };
        named.start();
        Some(named)
    }

    fn start(&mut self) {
        let log = std::fs::File::create(self.dir.path().join("log")).unwrap();
        let child = Command::new("named")
            .args(["-g", "-n", "1", "-c"])
            .arg(self.dir.path().join("conf"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let patience = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let log = || std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < patience, "named does not answer: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn dig(&self, args: &[&str]) -> String {
        let port = self.port.to_string();
        let text = sh("dig", &[&["@127.0.0.1", "-p", &port, "+short"], args].concat());
        text.lines().collect::<Vec<_>>().join(" ")
    }

    fn name(&self, bed: &Bed, more: &[(&str, &str)]) -> Box<dyn Resource> {
        let server = format!("127.0.0.1:{}", self.port);
        let base = [
            ("name", "web"),
            ("zone", "lab.test"),
            ("server", &server),
            ("tsig_key", "csv-key"),
            ("tsig_secret", SECRET),
        ];
        let mut spec = spec("NetworkName", &base);
        spec.properties.extend(properties(more));
        for address in ["10.77.0.5/24", "fd77::5/64"] {
            spec.depends_on.push(Dependency {
                name: address.into(),
                kind: "IPAddress".into(),
                properties: properties(&[("address", address)]),
            });
        }
        bed.open(&NetworkName, spec)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.stop();
    }
}

#[test]
fn contradictions_are_refused() {
    let base = [("name", "web"), ("zone", "lab.test"), ("server", "10.0.0.1")];
    assert_eq!(NetworkName.check(&properties(&base)), Ok(()));
    let bad = [
        (("tsig_key", "k"), "needs its secret"),
        (("tsig_secret", SECRET), "whose"),
        (("server", "dns.example"), "no IP address"),
        (("name", "web.other.test."), "not in the zone"),
        (("name", "we b"), "no DNS name"),
        (("name", "lab.test"), "the zone itself"),
        (("addresses", "10.0.0.1, x"), "\"x\""),
        (("reverse_zone", "10.in-addr.arpa"), "reverse is false"),
    ];
    for (pair, expected) in bad {
        let mut given = properties(&base);
        given.extend(properties(&[pair]));
        let error = NetworkName.check(&given).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let error = NetworkName.open(spec("NetworkName", &base), Bed::new().context()).err().unwrap();
    assert!(error.to_string().contains("depend on an IPAddress"), "{error}");
}

#[test]
fn a_name_is_registered_put_back_and_removed_only_when_asked() {
    let Some(named) = Named::new() else { return };
    let bed = Bed::new();
    let mut name = named.name(&bed, &[("reverse", "true"), ("remove_on_offline", "true"), ("ttl", "77")]);
    assert!(name.looks_alive().is_err());
    name.online().unwrap();
    assert_eq!(named.dig(&["web.lab.test", "A"]), "10.77.0.5");
    assert_eq!(named.dig(&["web.lab.test", "AAAA"]), "fd77::5");
    assert_eq!(named.dig(&["-x", "10.77.0.5"]), "web.lab.test.");
    assert!(named.dig(&["web.lab.test", "TXT"]).contains("csvfs-owner=11111111-"));
    let port = named.port.to_string();
    assert!(sh("dig", &["@127.0.0.1", "-p", &port, "web.lab.test"]).contains("\t77\tIN\tA"));
    // The other node of the cluster takes it over; its address is another.
    let mut other = named.name(&Bed::of_node(2), &[("addresses", "10.77.0.6")]);
    other.online().unwrap();
    assert_eq!(
        (named.dig(&["web.lab.test", "A"]), named.dig(&["web.lab.test", "AAAA"])),
        ("10.77.0.6".into(), String::new())
    );
    // The first one finds that, and puts it back.
    name.is_alive().unwrap();
    assert_eq!(named.dig(&["web.lab.test", "A"]), "10.77.0.5");
    assert!(bed.events().iter().any(|event| event.contains("resolved to 10.77.0.6")), "{:?}", bed.events());
    let found = name.control("lookup", &serde_json::Value::Null).unwrap();
    assert_eq!(found["as_wanted"], true);
    other.offline().unwrap();
    other.terminate().unwrap();
    assert_eq!(named.dig(&["web.lab.test", "A"]), "10.77.0.5");
    name.offline().unwrap();
    assert_eq!(named.dig(&["web.lab.test", "ANY"]), "");
    assert_eq!(named.dig(&["-x", "10.77.0.5"]), "");
}

#[test]
fn a_foreign_name_is_refused_unless_it_may_be_replaced() {
    let Some(named) = Named::new() else { return };
    let error = named.name(&Bed::new(), &[("name", "foreign")]).online().unwrap_err();
    assert!(error.to_string().contains("10.77.0.99"), "{error}");
    assert_eq!(named.dig(&["foreign.lab.test", "A"]), "10.77.0.99");
    let cluster = |bed: &mut crate::api::NodeInfo| bed.cluster_id = "another".into();
    let mut ours = named.name(&Bed::new(), &[]);
    ours.online().unwrap();
    let error = named.name(&Bed::changed(1, cluster), &[]).online().unwrap_err();
    assert!(error.to_string().contains("held by somebody else"), "{error}");
    named.name(&Bed::new(), &[("name", "foreign"), ("replace_foreign", "true")]).online().unwrap();
    assert_eq!(named.dig(&["foreign.lab.test", "A"]), "10.77.0.5");
}

#[test]
fn it_is_registered_again_by_the_clock() {
    let Some(named) = Named::new() else { return };
    let bed = Bed::new();
    named.name(&bed, &[]).online().unwrap();
    let long_ago = now_s() - 24 * 3600;
    bed.context().save(Some(serde_json::json!({ "registered_s": long_ago }))).unwrap();
    let mut adopted = named.name(&bed, &[]);
    adopted.adopt().unwrap();
    adopted.is_alive().unwrap();
    let registered = bed.saved().unwrap()["registered_s"].as_u64().unwrap();
    assert!(registered > long_ago);
}

#[test]
fn a_wrong_key_and_a_server_that_is_down_are_told_apart() {
    let Some(mut named) = Named::new() else { return };
    for (property, value) in
        [("tsig_secret", "d3Jvbmc="), ("tsig_key", "another-key"), ("tsig_algorithm", "hmac-sha512")]
    {
        let error = named.name(&Bed::new(), &[(property, value)]).online().unwrap_err();
        assert!(error.to_string().contains("TSIG key"), "{error}");
    }
    let error = named.name(&Bed::new(), &[("zone", "other.test")]).online().unwrap_err();
    assert!(error.to_string().contains("not the primary server"), "{error}");
    named.stop();
    let error = named.name(&Bed::new(), &[]).online().unwrap_err();
    assert!(error.to_string().contains("does not answer"), "{error}");
    let bed = Bed::new();
    let mut patient = named.name(&bed, &[("require_dns", "false")]);
    patient.online().unwrap();
    patient.is_alive().unwrap();
    assert_eq!(bed.events().len(), 1, "one warning for one outage: {:?}", bed.events());
    named.start();
    patient.is_alive().unwrap();
    assert_eq!(named.dig(&["web.lab.test", "A"]), "10.77.0.5");
    let mut strict = named.name(&Bed::new(), &[]);
    strict.online().unwrap();
    named.stop();
    assert!(strict.is_alive().is_err());
}

#[test]
fn the_secret_may_be_in_a_file_and_is_shown_nowhere() {
    let Some(named) = Named::new() else { return };
    let bed = Bed::new();
    let file = bed.dir().join("secret");
    std::fs::write(&file, format!("{SECRET}\n")).unwrap();
    let mut spec = spec(
        "NetworkName",
        &[
            ("name", "web2.lab.test"),
            ("zone", "lab.test."),
            ("tsig_key", "csv-key"),
            ("addresses", "10.77.0.7"),
        ],
    );
    let server = format!("127.0.0.1:{}", named.port);
    spec.properties.extend(properties(&[("server", &server), ("tsig_secret_file", file.to_str().unwrap())]));
    let client = open_client(&spec.properties).unwrap();
    let shown = format!("{client:?}");
    assert!(!shown.contains("secret") && shown.contains("127.0.0.1"), "{shown}");
    bed.open(&NetworkName, spec).online().unwrap();
    assert_eq!(named.dig(&["web2.lab.test"]), "10.77.0.7");
}
