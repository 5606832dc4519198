//! The report as one HTML file that needs nothing else.

use super::report::{Check, Outcome, sum};
use std::fmt::Write as _;

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:64rem;color:#222;background:#fff}\
h1{font-size:1.5rem}h2{font-size:1.05rem;margin:1.6rem 0 .3rem}table{border-collapse:collapse;width:100%}\
td{padding:.25rem .6rem;vertical-align:top;border-bottom:1px solid #ddd}td:first-child{width:5rem;font-weight:600}\
td:nth-child(2){width:14rem}.next{color:#555}.passed{color:#1a7f37}.warning{color:#9a6700}.failed{color:#c00}.skipped{color:#666}";

/// The whole page. `facts` stand above the results.
pub(super) fn page(facts: &[(&str, String)], checks: &[Check]) -> String {
    let mut html = String::new();
    html.push_str("<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">");
    let _ = write!(html, "<title>csvfs validation</title><style>{STYLE}</style></head><body>");
    let _ = write!(html, "<h1>csvfs validation</h1><p>{}</p><p>", escape(&sum(checks)));
    for (name, value) in facts {
        let _ = write!(html, "<b>{name}</b> {}<br>", escape(value));
    }
    html.push_str("</p>");
    let mut area = None;
    for check in checks {
        if area != Some(&check.area) {
            html.push_str(if area.is_some() { "</table>" } else { "" });
            let _ = write!(html, "<h2>{}</h2><table>", escape(&check.area));
            area = Some(&check.area);
        }
        row(check, &mut html);
    }
    html.push_str(if area.is_some() { "</table>" } else { "" });
    html.push_str("</body></html>\n");
    html
}

fn row(check: &Check, html: &mut String) {
    let class = match check.outcome {
        Outcome::Passed => "passed",
        Outcome::Warning => "warning",
        Outcome::Failed => "failed",
        Outcome::Skipped => "skipped",
    };
    let (name, text) = (escape(&check.name), escape(&check.text));
    let _ = write!(html, "<tr><td class=\"{class}\">{}</td><td>{name}</td><td>{text}", check.outcome);
    if let Some(next) = &check.next {
        let _ = write!(html, "<div class=\"next\">&rarr; {}</div>", escape(next));
    }
    html.push_str("</td></tr>");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::report::{Run, failed, passed};
    use super::*;

    #[test]
    fn the_page_has_everything_and_nothing_foreign_in_it() {
        let mut run = Run::new(2);
        run.add("one", "a", passed("fine"));
        run.add("two", "b", failed("<script>", "do & see"));
        let html = page(&[("Node", "n<1".into())], &run.finish());
        assert!(html.contains("1 passed") && html.contains("1 failed") && html.contains("do &amp; see"));
        assert!(!html.contains("<script>") && html.contains("n&lt;1"));
        assert_eq!(html.matches("<table>").count(), html.matches("</table>").count());
    }
}
