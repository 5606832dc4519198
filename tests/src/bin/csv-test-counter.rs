//! Runs in the guests of the suites about virtual machines: `csv-test-counter JOURNAL BUTTON`.

use anyhow::bail;
use csv_tests::vmguest::counter;
use std::path::Path;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [journal, button] = args.as_slice() else { bail!("csv-test-counter JOURNAL BUTTON") };
    counter::run(Path::new(journal), Path::new(button))
}
