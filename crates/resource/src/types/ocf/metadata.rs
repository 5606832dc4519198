//! What an OCF agent says of itself: XML by the schema `ra-api-1.dtd` of the standard.

use crate::api::{Form, Property};
use std::time::Duration;

/// For agents that do not say it.
const TIMEOUT: Duration = Duration::from_secs(20);
const INTERVAL: Duration = Duration::from_secs(10);
/// A monitor is a process or more each time.
const INTERVAL_MIN: Duration = Duration::from_secs(1);

/// See the module's text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    pub(super) help: String,
    pub(super) parameters: Vec<Parameter>,
    pub(super) monitor_interval: Duration,
    pub(super) monitor_timeout: Duration,
    pub(super) stop_timeout: Duration,
}

/// A parameter of an agent.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parameter {
    name: String,
    help: String,
    required: bool,
    default: Option<String>,
    /// `select`, with its values.
    words: Vec<String>,
}

impl Parameter {
    /// Forms of the standard are hints: `boolean` takes yes, on and 1 as well, `integer` a sign, `time` a unit. So
    /// only a choice is checked here; the rest is the agent's.
    pub(super) fn property(&self) -> Property {
        Property {
            name: self.name.clone(),
            numbered: false,
            required: self.required,
            default: self.default.clone(),
            form: if self.words.is_empty() { Form::Text } else { Form::Words(self.words.clone()) },
            help: self.help.clone(),
            live: false,
        }
    }
}

impl Metadata {
    /// # Errors
    /// That is no XML, or of something else.
    pub(super) fn parse(text: &str) -> Result<Metadata, String> {
        // Agents name the schema, which is not fetched.
        let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
        let document = roxmltree::Document::parse_with_options(text, options).map_err(|e| e.to_string())?;
        let root = document.root_element();
        if !root.has_tag_name("resource-agent") {
            return Err(format!("it says <{}>, not <resource-agent>", root.tag_name().name()));
        }
        let tags = |name: &'static str| root.descendants().filter(move |node| node.has_tag_name(name));
        let monitors: Vec<roxmltree::Node<'_, '_>> = tags("action")
            .filter(|action| action.attribute("name") == Some("monitor"))
            .filter(|action| action.attribute("depth").is_none_or(|depth| depth == "0"))
            .collect();
        let stop = tags("action").find(|action| action.attribute("name") == Some("stop"));
        let of_monitor =
            |what: &str| monitors.iter().find_map(|monitor| monitor.attribute(what)).and_then(duration);
        Ok(Metadata {
            help: child_text(root, "shortdesc").unwrap_or_else(|| "An OCF agent".to_owned()),
            parameters: tags("parameter").filter_map(parameter).collect(),
            monitor_interval: of_monitor("interval").unwrap_or(INTERVAL).max(INTERVAL_MIN),
            monitor_timeout: of_monitor("timeout").unwrap_or(TIMEOUT),
            stop_timeout: stop
                .and_then(|stop| stop.attribute("timeout"))
                .and_then(duration)
                .unwrap_or(TIMEOUT),
        })
    }
}

fn parameter(node: roxmltree::Node<'_, '_>) -> Option<Parameter> {
    let content = node.children().find(|child| child.has_tag_name("content"));
    let options = content.into_iter().flat_map(|content| content.children());
    let words = options.filter(|option| option.has_tag_name("option"));
    let is_select = content.and_then(|content| content.attribute("type")) == Some("select");
    Some(Parameter {
        name: node.attribute("name")?.to_owned(),
        help: child_text(node, "shortdesc").or_else(|| child_text(node, "longdesc")).unwrap_or_default(),
        required: matches!(node.attribute("required"), Some("1" | "true")),
        default: content.and_then(|content| content.attribute("default")).map(str::to_owned),
        words: words
            .filter(|_| is_select)
            .filter_map(|option| option.attribute("value"))
            .map(str::to_owned)
            .collect(),
    })
}

fn child_text(node: roxmltree::Node<'_, '_>, name: &str) -> Option<String> {
    let text = node.children().find(|child| child.has_tag_name(name))?.text()?;
    let words: Vec<&str> = text.split_whitespace().collect();
    (!words.is_empty()).then(|| words.join(" "))
}

/// `20s`, `20`, `500ms`, `2min`, `1h`; seconds without a unit. 0 is none.
fn duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let ms = match text[digits..].trim() {
        "ms" | "msec" => number,
        "" | "s" | "sec" => number.checked_mul(1000)?,
        "m" | "min" => number.checked_mul(60_000)?,
        "h" | "hr" => number.checked_mul(3_600_000)?,
        _ => return None,
    };
    (ms > 0).then(|| Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use super::{Metadata, duration};
    use crate::api::Form;
    use std::time::Duration;

    const TEXT: &str = r#"<?xml version="1.0"?>
<!DOCTYPE resource-agent SYSTEM "ra-api-1.dtd">
<resource-agent name="x" version="1.0">
<shortdesc lang="en">An
   example</shortdesc>
<parameters>
<parameter name="device" unique="0" required="1"><longdesc lang="en">Which.</longdesc><content type="string"/></parameter>
<parameter name="mode"><shortdesc lang="en">How</shortdesc>
<content type="select" default="soft"><option value="soft"/><option value="hard"/></content></parameter>
</parameters>
<actions>
<action name="stop" timeout="1min"/>
<action name="monitor" depth="10" timeout="90s" interval="60s"/>
<action name="monitor" depth="0" timeout="30s" interval="15"/>
</actions>
</resource-agent>"#;

    #[test]
    fn metadata_becomes_a_type() {
        let metadata = Metadata::parse(TEXT).unwrap();
        assert_eq!(metadata.help, "An example");
        assert_eq!(metadata.monitor_interval, Duration::from_secs(15));
        assert_eq!(metadata.monitor_timeout, Duration::from_secs(30));
        assert_eq!(metadata.stop_timeout, Duration::from_secs(60));
        let properties: Vec<_> = metadata.parameters.iter().map(super::Parameter::property).collect();
        assert!(properties[0].required && properties[0].help == "Which.");
        assert_eq!(properties[1].default.as_deref(), Some("soft"));
        assert_eq!(properties[1].form, Form::Words(vec!["soft".to_owned(), "hard".to_owned()]));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Metadata::parse("").is_err());
        assert!(Metadata::parse("<resource-agent>").is_err());
        assert!(Metadata::parse("<html/>").unwrap_err().contains("html"));
    }

    #[test]
    fn durations() {
        let ms = |text| duration(text).map(|duration| duration.as_millis());
        assert_eq!(
            (ms("20s"), ms("20"), ms("500ms"), ms("2min")),
            (Some(20_000), Some(20_000), Some(500), Some(120_000))
        );
        assert_eq!((ms("0"), ms("x"), ms("5 parsecs")), (None, None, None));
    }
}
