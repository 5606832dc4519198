//! `csv-rhs`: a resource host; see `csv_resource::host`. Started by csvd with a listening socket as standard input.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let first = args.next();
    if first.as_deref() == Some(csv_resource::types::LAUNCH.as_ref()) {
        // Only comes back when it could not become the program.
        eprintln!("csv-rhs: {}", csv_resource::types::launch(args));
        return ExitCode::from(127);
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("CSV_LOG").unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // The standard error of a csvd that is gone may be a broken pipe; the host must not end by it.
        .log_internal_errors(false)
        .init();
    let name = first.unwrap_or_default().to_string_lossy().into_owned();
    match csv_resource::host::run(&name) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!(host = name, "{e:#}");
            ExitCode::FAILURE
        }
    }
}
