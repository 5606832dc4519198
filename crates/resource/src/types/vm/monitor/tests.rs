//! The monitor against a double of QEMU: a socket, and a process that sleeps.

use super::*;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::channel;

const PATIENCE: Duration = Duration::from_secs(30);

fn sleeper(dir: &Path) -> Arc<Process> {
    Arc::new(Process::spawn("sleep", &["1000".into()], &dir.join("log")).unwrap())
}

/// Answers commands by their names.
fn serve(listener: UnixListener) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"{\"QMP\": {}}\n").unwrap();
        for line in BufReader::new(stream.try_clone().unwrap()).lines() {
            let Ok(line) = line else { return };
            let message: Value = serde_json::from_str(&line).unwrap();
            let id = message["id"].clone();
            let answer = match message["execute"].as_str().unwrap() {
                "refuse" => json!({ "id": id, "error": { "class": "GenericError", "desc": "no" } }),
                "silence" => continue,
                "close" => return,
                other => json!({ "id": id, "return": { "did": other } }),
            };
            let event = json!({ "event": "STOP", "data": { "n": 1 } });
            stream.write_all(format!("{event}\r\n{answer}\r\n").as_bytes()).unwrap();
        }
    })
}

#[test]
fn commands_are_answered_refused_late_or_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let server = serve(UnixListener::bind(&path).unwrap());
    let process = sleeper(dir.path());
    let (heard, hears) = channel();
    let monitor = Monitor::connect(&path, &process, PATIENCE, move |it| drop(heard.send(it))).unwrap();
    assert_eq!(monitor.call("x", json!({}), PATIENCE), Ok(json!({ "did": "x" })));
    assert_eq!(monitor.call("refuse", json!({}), PATIENCE), Err(QmpError::Refused("no".into())));
    let late = monitor.call("silence", json!({}), Duration::from_millis(20));
    assert!(matches!(late, Err(QmpError::Late { .. })), "{late:?}");
    assert_eq!(monitor.call("close", json!({}), PATIENCE), Err(QmpError::Closed));
    assert_eq!(monitor.call("x", json!({}), PATIENCE), Err(QmpError::Closed));
    server.join().unwrap();
    process.kill().unwrap();
    let told: Vec<_> = hears.iter().take(4).collect();
    assert!(matches!(&told[0], Happening::Event { name, data } if name == "STOP" && data["n"] == 1));
    assert!(matches!(&told[3], Happening::Exited(_)), "{told:?}");
}

#[test]
fn a_process_that_ends_before_its_monitor_is_there_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let process = sleeper(dir.path());
    process.kill().unwrap();
    let error = Monitor::connect(&dir.path().join("none"), &process, PATIENCE, drop).unwrap_err();
    assert!(error.contains("has ended"), "{error}");
}

#[test]
fn dropping_it_leaves_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let server = serve(UnixListener::bind(&path).unwrap());
    let process = sleeper(dir.path());
    drop(Monitor::connect(&path, &process, PATIENCE, drop).unwrap());
    server.join().unwrap();
    assert!(!process.has_ended());
    process.kill().unwrap();
}
