//! Spans, as the debug exporter of an OpenTelemetry Collector writes them down.

use std::collections::BTreeMap;

/// One span. What it lacks is empty.
#[derive(Clone, Debug, Default)]
pub struct Span {
    /// Its id, 16 digits.
    pub id: String,
    /// Id of its parent; empty: it has none.
    pub parent: String,
    /// Id of its trace, 32 digits.
    pub trace: String,
    attributes: BTreeMap<String, String>,
}

impl Span {
    /// An attribute as text; empty where there is none.
    #[must_use]
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

/// The spans in the exporter's text (`verbosity: detailed`), in their order.
#[must_use]
pub fn parse(text: &str) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with("Span #") {
            spans.push(Span::default());
        }
        let Some(span) = spans.last_mut() else { continue };
        if let Some(attribute) = line.strip_prefix("-> ") {
            let Some((name, value)) = attribute.split_once(": ") else { continue };
            let value = value.split_once('(').map_or(value, |(_, value)| value.trim_end_matches(')'));
            span.attributes.insert(name.to_owned(), value.to_owned());
        } else if let Some((name, value)) = line.split_once(':') {
            match name.trim() {
                "Trace ID" => span.trace = value.trim().to_owned(),
                "Parent ID" => span.parent = value.trim().to_owned(),
                "ID" => span.id = value.trim().to_owned(),
                _ => {}
            }
        }
    }
    spans
}
