//! The report as one HTML file that needs nothing else: facts, a bar chart per job (inline SVG), the whole table.

use super::jobs::{Job, ModeName};
use super::report::{Outcome, Row, memory, number};
use std::fmt::Write as _;

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:64rem;color:#222;background:#fff}\
h1{font-size:1.5rem}h2{font-size:1.05rem;margin:1.6rem 0 .3rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}td:nth-child(-n+3),th:nth-child(-n+3){text-align:left}\
svg text{font:12px system-ui,sans-serif;fill:#222}dt{font-weight:600;float:left;width:8rem}dd{margin-left:8.5rem}";

const BAR_HEIGHT: usize = 22;
const BAR_LEFT: f64 = 130.0;
const BAR_WIDTH: f64 = 480.0;

/// The whole page.
pub(super) fn page(outcome: &Outcome) -> String {
    let mut html = String::new();
    html.push_str("<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">");
    let _ = write!(html, "<title>csvfs benchmark</title><style>{STYLE}</style></head><body>");
    html.push_str("<h1>csvfs benchmark</h1>");
    facts(outcome, &mut html);
    let mut jobs: Vec<Job> = outcome.rows.iter().map(|row| row.job).collect();
    jobs.dedup();
    for job in jobs {
        let rows: Vec<&Row> = outcome.rows.iter().filter(|row| row.job == job).collect();
        chart(job, &rows, &mut html);
    }
    table(outcome, &mut html);
    html.push_str("</body></html>\n");
    html
}

fn facts(outcome: &Outcome, html: &mut String) {
    let facts = &outcome.facts;
    let entries = [
        ("Kernel", facts.kernel.clone()),
        ("Processors", format!("{} x {}", facts.cpus, facts.cpu_model)),
        ("LUN", facts.lun.clone()),
        ("Measured on", format!("{} MiB in one piece", facts.region_bytes >> 20)),
        ("Rounds", format!("{} of {} s, interleaved; medians", facts.rounds, facts.runtime_s)),
    ];
    html.push_str("<dl>");
    for (name, value) in entries {
        let _ = write!(html, "<dt>{name}</dt><dd>{}</dd>", escape(&value));
    }
    html.push_str("</dl>");
}

fn chart(job: Job, rows: &[&Row], html: &mut String) {
    let most = rows.iter().map(|row| row.iops).fold(0.0, f64::max);
    let height = rows.len() * BAR_HEIGHT;
    let _ = write!(
        html,
        "<h2>{job}</h2><svg role=\"img\" aria-label=\"{job}\" width=\"860\" height=\"{height}\" viewBox=\"0 0 860 {height}\">"
    );
    for (at, row) in rows.iter().enumerate() {
        let top = at * BAR_HEIGHT;
        let width = if most > 0.0 { row.iops / most * BAR_WIDTH } else { 0.0 };
        let text = top + BAR_HEIGHT - 7;
        let rate = match row.bw_bytes_per_s {
            Some(bw) if row.iops > 0.0 && bw / row.iops > 65_536.0 => {
                format!("{:.0} MiB/s", bw / 1_048_576.0)
            }
            Some(_) => format!("{:.0} IOPS", row.iops),
            None => format!("{:.0} ops/s", row.iops),
        };
        let ratio = row.ratio_to_raw.map_or(String::new(), |ratio| format!(", {:.0}% of raw", ratio * 100.0));
        let _ = write!(
            html,
            "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{}</text><rect x=\"{BAR_LEFT}\" y=\"{}\" width=\"{width:.1}\" \
             height=\"{}\" fill=\"{}\"/><text x=\"{:.1}\" y=\"{text}\">{rate}{ratio}</text>",
            BAR_LEFT - 8.0,
            row.mode,
            top + 2,
            BAR_HEIGHT - 5,
            colour(row.mode),
            BAR_LEFT + width + 8.0,
        );
    }
    html.push_str("</svg>");
}

fn table(outcome: &Outcome, html: &mut String) {
    html.push_str(
        "<h2>All figures</h2><table><tr><th>job</th><th>mode</th><th>node</th><th>IOPS</th><th>min</th><th>max</th>\
         <th>MiB/s</th><th>p50 &micro;s</th><th>p99 &micro;s</th><th>/ raw</th><th>/ coordinator</th><th>/ SMB library</th><th>CPU &micro;s/IO</th></tr>",
    );
    for row in &outcome.rows {
        let bw = row.bw_bytes_per_s.map_or("-".into(), |bw| format!("{:.1}", bw / 1_048_576.0));
        let _ = write!(
            html,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.0}</td><td>{:.0}</td><td>{:.0}</td><td>{bw}</td><td>{:.0}</td>\
             <td>{:.0}</td><td>{}</td><td>{}</td><td>{}</td><td>{:.1}</td></tr>",
            row.job,
            row.mode,
            escape(&row.node),
            row.iops,
            row.iops_min,
            row.iops_max,
            row.p50_us,
            row.p99_us,
            number(row.ratio_to_raw),
            number(row.ratio_to_coordinator),
            number(row.ratio_to_smb_library),
            row.cpu_us_per_io,
        );
    }
    html.push_str("</table>");
    for (row, bytes) in memory(outcome) {
        let _ = write!(
            html,
            "<p>Memory: csvfs on {} ({}) grows by {bytes} bytes per open file.</p>",
            escape(&row.node),
            row.mode
        );
    }
}

fn colour(mode: ModeName) -> &'static str {
    match mode {
        ModeName::Raw => "#7f8c8d",
        ModeName::Coordinator => "#8e6bbf",
        ModeName::Direct => "#2e86c1",
        ModeName::BlockRedirected => "#e08e2b",
        ModeName::FsRedirected => "#c0504d",
        ModeName::SmbLibrary => "#bfa36b",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::outcome;
    use super::*;

    #[test]
    fn page_is_self_contained_and_escaped() {
        let html = page(&outcome());
        assert_eq!(html.matches("<svg").count(), 2);
        assert_eq!(html.matches("<tr>").count(), 1 + 5);
        assert!(html.contains("&lt;model&gt;") && !html.contains("<model>"));
        for outside in ["http://", "https://", "<script", "<link", "@import", "src="] {
            assert!(!html.contains(outside), "{outside}");
        }
        assert!(html.contains("91% of raw"), "{html}");
    }
}
