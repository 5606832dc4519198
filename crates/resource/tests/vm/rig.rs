//! What the tests of virtual machines need: a guest in a few lines, nodes, and a double of the resource host.

use csv_resource::api::{
    Context, EventLevel, Failure, NodeInfo, Resource, ResourceType, Services, Spec, check_properties,
};
use csv_resource::types::vm::VirtualMachine;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// For anything that a guest does on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
/// Exit status of guest-kernel.sh for "cannot be had here".
const UNAVAILABLE: i32 = 3;

/// Kernel and initramfs of the guests.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
}

/// The guest, or `None`, with a line that says why, where there can be none.
pub(crate) fn guest() -> Option<&'static Guest> {
    static GUEST: OnceLock<Result<Guest, String>> = OnceLock::new();
    match GUEST.get_or_init(make_guest) {
        Ok(guest) => Some(guest),
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

fn make_guest() -> Result<Guest, String> {
    for program in ["qemu-system-x86_64", "qemu-img", "busybox", "cpio", "gcc", "setsid"] {
        if Command::new("sh")
            .args(["-c", &format!("command -v {program}")])
            .output()
            .unwrap()
            .stdout
            .is_empty()
        {
            return Err(format!("{program} is not installed"));
        }
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm-guest");
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made =
        Command::new(here.join("../../scripts/guest-kernel.sh")).arg(&dir).output().expect("guest-kernel.sh");
    if made.status.code() == Some(UNAVAILABLE) {
        return Err(String::from_utf8_lossy(&made.stderr).into_owned());
    }
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // A second archive behind the first replaces its /init.
    let script = r#"
        set -e
        root=$(mktemp -d "$1/root.XXXXXX"); trap 'rm -rf "$root"' EXIT
        gcc -O1 -static -o "$root/button" "$2/button.c"
        cp "$2/init.sh" "$root/init"; chmod +x "$root/init"
        (cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$root.gz"
        cat "$1/initrd.gz" "$root.gz" >"$root.all"; rm "$root.gz"; mv "$root.all" "$1/initrd-vm.gz"
    "#;
    run("bash", &["-c", script, "bash", dir.to_str().unwrap(), here.join("tests/vm").to_str().unwrap()]);
    Ok(Guest { kernel: dir.join("vmlinux"), initrd: dir.join("initrd-vm.gz") })
}

/// Runs a program that must succeed; what it wrote.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A node, as its resource host sees it, and what the host was told.
#[derive(Debug)]
pub(crate) struct Node {
    info: NodeInfo,
    told: Mutex<Told>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Told {
    reports: Vec<Result<(), String>>,
    events: Vec<(EventLevel, String)>,
    progress: Vec<String>,
    saved: Option<Value>,
    cancelled: bool,
}

impl Services for Node {
    fn node(&self) -> &NodeInfo {
        &self.info
    }

    fn progress(&self, text: &str) {
        self.told.lock().unwrap().progress.push(text.to_owned());
        self.changed.notify_all();
    }

    fn cancelled(&self) -> bool {
        self.told.lock().unwrap().cancelled
    }

    fn report(&self, alive: Result<(), String>) {
        self.told.lock().unwrap().reports.push(alive);
        self.changed.notify_all();
    }

    fn event(&self, level: EventLevel, text: &str) {
        self.told.lock().unwrap().events.push((level, text.to_owned()));
        self.changed.notify_all();
    }

    fn save(&self, state: Option<Value>) -> Result<(), Failure> {
        self.told.lock().unwrap().saved = state;
        Ok(())
    }

    fn saved(&self) -> Option<Value> {
        self.told.lock().unwrap().saved.clone()
    }
}

impl Node {
    pub(crate) fn events(&self) -> Vec<String> {
        self.told.lock().unwrap().events.iter().map(|(_, text)| text.clone()).collect()
    }

    pub(crate) fn cancel(&self, cancelled: bool) {
        self.told.lock().unwrap().cancelled = cancelled;
    }

    pub(crate) fn forget_progress(&self) {
        self.told.lock().unwrap().progress.clear();
    }

    fn wait<T>(&self, what: &str, mut look: impl FnMut(&Told) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut told = self.told.lock().unwrap();
        loop {
            if let Some(found) = look(&told) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no {what}: {told:?}");
            told = self.changed.wait_timeout(told, left).unwrap().0;
        }
    }

    /// Waits for a report of failure.
    pub(crate) fn failure(&self) -> String {
        self.wait("report", |told| told.reports.iter().find_map(|report| report.clone().err()))
    }

    pub(crate) fn has_reports(&self) -> bool {
        !self.told.lock().unwrap().reports.is_empty()
    }

    /// Waits for an event with that text.
    pub(crate) fn event_with(&self, text: &str) -> String {
        self.wait(text, |told| {
            told.events.iter().map(|(_, event)| event).find(|event| event.contains(text)).cloned()
        })
    }

    /// Waits until progress with that text was told.
    pub(crate) fn progress_with(&self, text: &str) {
        self.wait(text, |told| told.progress.iter().any(|line| line.contains(text)).then_some(()));
    }
}

/// Nodes with shared storage.
#[derive(Debug)]
pub(crate) struct Lab {
    dir: TempDir,
    authority: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
}

impl Lab {
    pub(crate) fn new() -> Lab {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(rcgen::DnType::CommonName, "csv cluster test");
        let key = rcgen::KeyPair::generate().unwrap();
        let authority = rcgen::CertifiedIssuer::self_signed(params, key).unwrap();
        Lab { dir: tempfile::Builder::new().prefix("vm").tempdir().unwrap(), authority }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A node by name, with a certificate like those of csvd.
    pub(crate) fn node(&self, name: &str) -> Arc<Node> {
        let dir = self.path(name);
        for sub in ["run", "state", "secrets"] {
            std::fs::create_dir_all(dir.join(sub)).unwrap();
        }
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        for (file, text) in [
            ("ca.pem", self.authority.pem()),
            ("node.pem", certificate.pem()),
            ("node.key", key.serialize_pem()),
        ] {
            std::fs::write(dir.join("secrets").join(file), text).unwrap();
        }
        let info = NodeInfo {
            cluster: "lab".into(),
            cluster_id: "11111111-2222-3333-4444-555555555555".into(),
            node: name.into(),
            node_id: 1,
            addr: "127.0.0.1".into(),
            run_dir: dir.join("run"),
            state_dir: dir.join("state"),
            mount_dir: self.dir.path().to_owned(),
            secrets_dir: dir.join("secrets"),
            luns: BTreeMap::new(),
        };
        Arc::new(Node { info, told: Mutex::default(), changed: Condvar::new() })
    }

    /// A raw image with ext4.
    pub(crate) fn image(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        run("mkfs.ext4", &["-q", "-F", path.to_str().unwrap(), "32M"]);
        path
    }

    /// The same as qcow2.
    pub(crate) fn qcow2(&self, name: &str) -> PathBuf {
        let (raw, path) = (self.image(&format!("{name}.raw")), self.path(name));
        run("qemu-img", &["convert", "-O", "qcow2", raw.to_str().unwrap(), path.to_str().unwrap()]);
        path
    }

    /// Properties of a guest that does what `words` say, with its console in `<name>.console`.
    pub(crate) fn properties(&self, name: &str, words: &str, more: &[(&str, &str)]) -> Vec<(String, String)> {
        let guest = guest().unwrap();
        let words: Vec<String> = words.split(' ').map(|word| format!("vm.{word}")).collect();
        let mut properties = vec![
            ("accelerator".to_owned(), "tcg".to_owned()),
            ("memory_mib".to_owned(), "256".to_owned()),
            ("kernel".to_owned(), guest.kernel.display().to_string()),
            ("initrd".to_owned(), guest.initrd.display().to_string()),
            ("cmdline".to_owned(), format!("console=ttyS0 quiet panic=-1 {}", words.join(" "))),
            ("serial".to_owned(), format!("file:{}", self.console(name).path.display())),
        ];
        properties.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        properties
    }

    pub(crate) fn console(&self, name: &str) -> Console {
        Console { path: self.path(&format!("{name}.console")) }
    }
}

impl Drop for Lab {
    /// A test that fails leaves no QEMU behind.
    fn drop(&mut self) {
        let dir = self.dir.path().to_string_lossy().into_owned();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let ours = line.split(|byte| *byte == 0).any(|word| {
                word.starts_with(b"socket,id=qmp,") && String::from_utf8_lossy(word).contains(&dir)
            });
            if ours {
                kill(pid);
            }
        }
    }
}

/// Opens a machine as a resource host does.
pub(crate) fn open(node: &Arc<Node>, name: &str, properties: &[(String, String)]) -> Box<dyn Resource> {
    let spec = Spec {
        name: name.to_owned(),
        kind: "VirtualMachine".into(),
        group: "g".into(),
        properties: properties.iter().cloned().collect(),
        depends_on: Vec::new(),
        looks_alive_ms: None,
        is_alive_ms: None,
        deadlock_timeout_ms: 300_000,
        pending_timeout_ms: 180_000,
        generation: 1,
        library: None,
    };
    check_properties(&VirtualMachine.info(), &spec.properties).unwrap();
    VirtualMachine.check(&spec.properties).unwrap();
    VirtualMachine.open(spec, Arc::clone(node) as Context).unwrap()
}

/// Runs a verb that must succeed.
pub(crate) fn verb(vm: &mut dyn Resource, verb: &str, arguments: &Value) -> Value {
    vm.control(verb, arguments).unwrap_or_else(|error| panic!("{verb}: {error}"))
}

pub(crate) fn status(vm: &mut dyn Resource) -> String {
    verb(vm, "status", &json!({}))["status"].as_str().unwrap().to_owned()
}

pub(crate) fn pid(vm: &mut dyn Resource) -> i32 {
    verb(vm, "status", &json!({}))["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap()
}

/// Ends a QEMU of this test, as a crash would.
pub(crate) fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    // One that has ended already is as dead.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// What a guest wrote on its console.
#[derive(Debug)]
pub(crate) struct Console {
    path: PathBuf,
}

impl Console {
    pub(crate) fn lines(&self) -> Vec<String> {
        let bytes = std::fs::read(&self.path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).lines().map(|line| line.trim().to_owned()).collect()
    }

    /// Every count that the guest told, in order.
    pub(crate) fn counts(&self) -> Vec<u64> {
        let lines = self.lines();
        lines.iter().filter_map(|line| line.strip_prefix("guest: count ")?.parse().ok()).collect()
    }

    pub(crate) fn last_count(&self) -> u64 {
        self.counts().last().copied().unwrap_or(0)
    }

    fn wait(&self, what: &str, mut there: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !there() {
            assert!(Instant::now() < deadline, "no {what} on the console: {:#?}", self.lines());
            // The console is a file: there is nothing to wait for.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the guest has counted on by that much.
    pub(crate) fn counts_on(&self, by: u64) {
        let from = self.last_count();
        self.wait("further count", || self.last_count() >= from + by);
    }

    /// The guest counted without a gap, told no error, and was started so many times.
    pub(crate) fn check(&self, starts: usize) {
        let lines = self.lines();
        assert_eq!(lines.iter().filter(|line| *line == "guest: up").count(), starts, "{lines:#?}");
        assert!(!lines.iter().any(|line| line.contains("error")), "{lines:#?}");
        for pair in self.counts().windows(2) {
            assert_eq!(pair[0] + 1, pair[1], "a count is missing or came twice");
        }
    }
}

/// The counts on a raw image of a guest that has ended; the file system must be clean.
pub(crate) fn counts_on_disk(image: &Path) -> Vec<u64> {
    run("e2fsck", &["-fn", image.to_str().unwrap()]);
    let text = run("debugfs", &["-R", "cat /counter", image.to_str().unwrap()]);
    text.lines().map(|line| line.parse().unwrap()).collect()
}
