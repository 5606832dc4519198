//! Runs inside a lab node for the end-to-end suites.
//!
//! `csv-test-agent serve DIR`: one operation per line on standard input, one answer per line on standard output;
//! ends at the end of input. `csv-test-agent admin SOCKET JSON`: sends one admin request and prints the answer.
//! `csv-test-agent fill DIR MIB`: fills the file system with pattern files of that size and prints their number;
//! `csv-test-agent verify DIR MIB FILES` compares every byte of them.
//! `csv-test-agent guest PORT` serves the channel of a guest. `csv-test-agent stamp FILE ACKNOWLEDGED FIRST` writes numbered
//! records until it is killed or an error ends it, without FIRST from 1 on and again after an error; `csv-test-agent stamps FILE LAST` checks that none up to that number is lost.

use anyhow::{Context as _, bail};
use csv_tests::agent::Agent;
use csv_tests::files;
use csv_tests::guest::{serve as guest, stamps};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A clean stop of a node writes back and unmounts before it answers.
const ADMIN_DEADLINE: Duration = Duration::from_secs(60);

/// Far more than a lab's volume can hold.
const FILL_FILES_MAX: u64 = 100_000;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", dir] => serve(dir),
        ["admin", socket, request] => admin(socket, request),
        ["fill", dir, mib] => {
            let files = files::fill(dir.as_ref(), mib.parse().context("MIB")?, FILL_FILES_MAX)?;
            writeln!(std::io::stdout(), "{files}").context("printing the number")
        }
        ["verify", dir, mib, count] => {
            files::verify(dir.as_ref(), mib.parse().context("MIB")?, count.parse().context("FILES")?)
        }
        ["guest", port] => guest::serve(port.as_ref()),
        ["stamp", file, acknowledged, first] => {
            stamps::write(file.as_ref(), acknowledged.as_ref(), first.parse().context("FIRST")?)
        }
        ["stamp", file, acknowledged] => stamps::write_again(file.as_ref(), acknowledged.as_ref()),
        ["stamps", file, last] => stamps::check(file.as_ref(), last.parse().context("LAST")?),
        _ => {
            bail!(
                "usage: csv-test-agent serve DIR | admin SOCKET JSON | fill DIR MIB | verify DIR MIB FILES | guest PORT | \
                 stamp FILE ACKNOWLEDGED [FIRST] | stamps FILE LAST"
            )
        }
    }
}

fn serve(dir: &str) -> anyhow::Result<()> {
    let mut agent = Agent::new(dir.into());
    let mut out = std::io::stdout();
    for line in std::io::stdin().lock().lines() {
        let line = line.context("reading an operation")?;
        let op = serde_json::from_str(&line).with_context(|| format!("not an operation: {line}"))?;
        let reply = serde_json::to_string(&agent.run(&op))?;
        writeln!(out, "{reply}").context("answering")?;
        out.flush().context("answering")?;
    }
    Ok(())
}

fn admin(socket: &str, request: &str) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("connecting to {socket}"))?;
    stream.set_read_timeout(Some(ADMIN_DEADLINE))?;
    writeln!(stream, "{request}").context("sending the request")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).with_context(|| format!("waiting for {socket}"))?;
    write!(std::io::stdout(), "{answer}").context("printing the answer")
}
