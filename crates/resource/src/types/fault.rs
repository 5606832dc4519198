//! `Test`: a resource that misbehaves as it is told. There only with `CSV_RHS_TEST_TYPES=1` in the environment of whoever looks
//! types up (csvd, csv-rhs), for tests.
//!
//! It is online on a node while the file `<run_dir>/test/<name>` is there, which holds the number of times it went online.

use super::{property, property_ms};
use crate::api::{Context, Failure, Form, Property, Resource, ResourceType, Spec, TypeInfo};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// Between two looks whether a hang is over.
const LOOK: Duration = Duration::from_millis(20);
const ENTRIES: [&str; 9] =
    ["open", "adopt", "online", "offline", "terminate", "looks_alive", "is_alive", "control", "close"];

/// Are types for tests to be there?
pub(super) fn enabled() -> bool {
    std::env::var_os("CSV_RHS_TEST_TYPES").is_some_and(|value| value == "1")
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct FaultType;

impl ResourceType for FaultType {
    fn info(&self) -> TypeInfo {
        let property = |name: &str, form: Form, help: &str| Property {
            name: name.to_owned(),
            numbered: false,
            required: false,
            default: None,
            form,
            help: help.to_owned(),
            live: false,
        };
        let entry = || Form::Words(ENTRIES.map(str::to_owned).to_vec());
        TypeInfo {
            name: "Test".to_owned(),
            help: "Misbehaves as it is told".to_owned(),
            properties: vec![
                property("hang", entry(), "entry point that does not return"),
                property("wait", entry(), "entry point that does not return before it is cancelled"),
                property("crash", entry(), "entry point that aborts the host"),
                property("panic", entry(), "entry point that panics"),
                property("fail", entry(), "entry point that fails"),
                property("when", Form::Path, "misbehaves only while this file is there"),
                property(
                    "slow_ms",
                    Form::Number { min: 0, max: 3_600_000 },
                    "milliseconds for online and offline",
                ),
            ],
            verbs: vec![("count".to_owned(), "how often it went online on this node".to_owned())],
            looks_alive: Duration::from_secs(5),
            is_alive: Duration::from_secs(60),
            shared: false,
        }
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        let file = context.node().run_dir.join("test").join(&spec.name);
        let resource = Fault { spec, context, file };
        resource.misbehave("open")?;
        Ok(Box::new(resource))
    }
}

#[derive(Debug)]
struct Fault {
    spec: Spec,
    context: Context,
    file: PathBuf,
}

impl Fault {
    fn misbehaves(&self, how: &str, entry: &str) -> bool {
        property(&self.spec, how) == Some(entry)
            && property(&self.spec, "when").is_none_or(|when| Path::new(when).exists())
    }

    fn misbehave(&self, entry: &str) -> Result<(), Failure> {
        if self.misbehaves("crash", entry) {
            std::process::abort();
        }
        assert!(!self.misbehaves("panic", entry), "told to panic in {entry}");
        if self.misbehaves("fail", entry) {
            return Err(Failure::new(format!("told to fail in {entry}")));
        }
        while self.misbehaves("hang", entry) {
            thread::sleep(LOOK);
        }
        while self.misbehaves("wait", entry) {
            if self.context.cancelled() {
                return Err(Failure::Cancelled);
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Takes the time it is told to, getting on all the while.
    fn take_time(&self) -> Result<(), Failure> {
        let mut left = property_ms(&self.spec, "slow_ms", 0);
        while !left.is_zero() {
            if self.context.cancelled() {
                return Err(Failure::Cancelled);
            }
            let step = left.min(LOOK);
            thread::sleep(step);
            left -= step;
            self.context.progress(&format!("{} ms left", left.as_millis()));
        }
        Ok(())
    }

    fn count(&self) -> u64 {
        fs::read_to_string(self.file.with_extension("count"))
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    }

    fn look(&self) -> Result<(), Failure> {
        if self.file.exists() {
            Ok(())
        } else {
            Err(Failure::new(format!("{} is gone", self.file.display())))
        }
    }

    fn remove(&self) -> Result<(), Failure> {
        match fs::remove_file(&self.file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Failure::new(e)),
            _ => Ok(()),
        }
    }
}

impl Resource for Fault {
    fn adopt(&mut self) -> Result<(), Failure> {
        self.misbehave("adopt")?;
        self.look()
    }

    fn online(&mut self) -> Result<(), Failure> {
        self.misbehave("online")?;
        self.take_time()?;
        if let Some(parent) = self.file.parent() {
            fs::create_dir_all(parent).map_err(Failure::new)?;
        }
        fs::write(self.file.with_extension("count"), (self.count() + 1).to_string()).map_err(Failure::new)?;
        fs::write(&self.file, &self.spec.name).map_err(Failure::new)
    }

    fn offline(&mut self) -> Result<(), Failure> {
        self.misbehave("offline")?;
        self.take_time()?;
        self.remove()
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        self.misbehave("terminate")?;
        self.remove()
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        self.misbehave("looks_alive")?;
        self.look()
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        self.misbehave("is_alive")?;
        self.look()
    }

    fn control(&mut self, verb: &str, _arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        self.misbehave("control")?;
        match verb {
            "count" => Ok(self.count().into()),
            _ => Err(Failure::Unsupported(format!("Test cannot \"{verb}\""))),
        }
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = self.misbehave("close");
    }
}
