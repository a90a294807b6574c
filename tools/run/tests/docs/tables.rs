//! The tables that are generated from the code.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use clap::{Arg, ArgAction, Command, CommandFactory};
use pd_control::api::metrics::Metrics;
use pd_control::cli::arguments::Cli;
use pd_control::counters::Counters;
use pd_control::engines::answers::{Scraped, Scrapes};
use pd_control::engines::metrics::EngineLoad;
use pd_control::list::EndpointList;
use pd_control::publish::registry::Registry;
use pd_control::scaling::history::DemandSource;
use pd_control::scaling::metrics::GAUGES;
use pd_control::sources::kubernetes::keys::KEYS;
use pd_control::sources::kubernetes::pod::PodName;
use pd_control::sources::kubernetes::pods::{Pods, PodsView, WatchView};
use pd_core::body::{self, FORBIDDEN};
use pd_core::config::keys::{ENDPOINT, Entry, Key, REQUIRED, Values};
use pd_core::metrics::{FAMILIES, Level, Metric, MetricKind};
use pd_core::paths::INFERENCE;
use pd_core::wire::{Endpoint, Role};

use crate::cost;
use crate::markdown::root;

/// A metric for its table: name, kind, labels, meaning.
struct Row {
    name: String,
    kind: &'static str,
    labels: String,
    help: String,
}

/// Every generated table, by the name of its place.
pub fn all() -> BTreeMap<&'static str, String> {
    let filter_keys = Key::ALL.iter().map(|key| (key.path(), key.default_value(), key.values(), key.meaning()));
    let entries =
        |entries: &'static [Entry]| keys(entries.iter().map(|it| (it.key, it.default_value, it.values, it.meaning)));
    [
        ("plugin configuration", keys(filter_keys)),
        ("endpoint keys", entries(ENDPOINT)),
        ("kubernetes configuration", entries(KEYS)),
        ("inference paths", list(INFERENCE.iter().copied())),
        (
            "forbidden members",
            list(body::Key::ALL.iter().filter(|key| FORBIDDEN.contains(**key)).map(|key| key.name())),
        ),
        ("filter metrics", metrics(&filter_metrics())),
        ("pd-control metrics", metrics(&control_metrics())),
        ("pd-control options", command_line()),
    ]
    .into_iter()
    .chain(cost::tables())
    .collect()
}

/// Names of all metrics, without labels.
pub fn metric_names() -> BTreeSet<String> {
    filter_metrics().into_iter().chain(control_metrics()).map(|row| row.name).collect()
}

/// All Rust sources below a folder.
pub fn sources(folder: &str) -> String {
    fn read(folder: &Path, text: &mut String) {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() && entry.file_name() != "target" {
                read(&path, text);
            } else if path.extension().is_some_and(|end| end == "rs") {
                *text += &std::fs::read_to_string(path).unwrap();
            }
        }
    }
    let mut text = String::new();
    read(&root().join(folder), &mut text);
    text
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(|name| format!("- `{name}`\n")).collect()
}

fn keys<'a>(keys: impl Iterator<Item = (&'a str, &'a str, Values, &'a str)>) -> String {
    let mut table = "| key | default | values | meaning |\n|---|---|---|---|\n".to_owned();
    for (key, default, values, meaning) in keys {
        let default = if default == REQUIRED { default.to_owned() } else { format!("`{default}`") };
        let _ = writeln!(table, "{}", row(&[&format!("`{key}`"), &default, &described(values), meaning]));
    }
    table
}

fn described(values: Values) -> String {
    match values {
        Values::Between { low, high, unit } => {
            format!("{} to {} {unit}", grouped(low), grouped(high)).trim_end().to_owned()
        }
        Values::OneOf(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
        Values::Described(text) => text.to_owned(),
    }
}

/// A number with commas between thousands.
fn grouped(value: f64) -> String {
    if value.fract() != 0.0 {
        return value.to_string();
    }
    let digits = (value as u64).to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group)).collect();
    groups.join(",")
}

fn metrics(rows: &[Row]) -> String {
    let mut table = "| metric | kind | labels | meaning |\n|---|---|---|---|\n".to_owned();
    for Row { name, kind, labels, help } in rows {
        let _ = writeln!(table, "{}", row(&[&format!("`{name}`"), kind, labels, help]));
    }
    table
}

fn filter_metrics() -> Vec<Row> {
    let kind = |kind| match kind {
        MetricKind::Counter => "counter",
        MetricKind::Gauge => "gauge",
        MetricKind::Histogram => "histogram",
    };
    let counted = Metric::ALL.iter().map(|metric| {
        let (name, tag) = metric.name().split_once(';').unwrap_or((metric.name(), ""));
        let labels = tag.split_once('=').map_or_else(String::new, |(label, value)| format!("`{label}=\"{value}\"`"));
        Row { name: name.to_owned(), kind: kind(metric.kind()), labels, help: metric.help().to_owned() }
    });
    let levels = Level::ALL.iter().map(|level| Row {
        name: level.name().to_owned(),
        kind: "gauge",
        labels: String::new(),
        help: level.help().to_owned(),
    });
    let families = FAMILIES.iter().map(|family| {
        let labels = family.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
        Row { name: family.name.to_owned(), kind: kind(family.kind), labels, help: family.help.to_owned() }
    });
    counted.chain(levels).chain(families).collect()
}

/// What `/metrics` of a pd-control says that has one of everything.
fn control_metrics() -> Vec<Row> {
    let address = ([10, 0, 0, 1], 80).into();
    let registry = Arc::new(Registry::new("e", SystemTime::UNIX_EPOCH));
    let list = EndpointList::new(vec![Endpoint::new(address, Role::Both)]).unwrap();
    registry.publish(list, SystemTime::UNIX_EPOCH);
    let pods = Pods::default();
    let watches = vec![WatchView { name: "pods in n".into(), is_listed: true, problem: None }];
    let refused = BTreeMap::from([(PodName { namespace: "n".into(), name: "p".into() }, "why".into())]);
    pods.set(PodsView { refused, watches, ..PodsView::default() });
    let load = EngineLoad {
        waiting: Some(1.0),
        running: Some(1.0),
        kv_usage: Some(1.0),
        cache_tokens: Some(1),
        prefix_queries: Some(1.0),
        prefix_hits: Some(1.0),
        work: Some(1.0),
        expired_kv_leases: Some(1.0),
        late_fetches: Some(1.0),
        process_start: Some(1.0),
        is_asleep: false,
    };
    let scrapes = Scrapes::from_iter([(address, Scraped { load, ..Scraped::default() })]);
    let counters = Counters::default();
    counters.watch_answered(200);
    counters.exchanged(200);
    counters.relayed("ok");
    counters.scraped(true);
    let scrapes = Arc::new(scrapes);
    let demand = DemandSource { registry: Arc::clone(&registry), hub: Arc::default(), scrapes: Arc::clone(&scrapes) };
    let metrics = Metrics::new(&counters, registry, Arc::new(pods), Some(scrapes)).with_demand(Arc::new(demand));
    let mut rows = rows_of(&metrics.encode());
    // Without an Envoy some of them have no series.
    let of_roles = |row: &&mut Row| GAUGES.iter().any(|(name, ..)| row.name.ends_with(name));
    rows.iter_mut().filter(of_roles).for_each(|row| row.labels = "`pool`, `role`".to_owned());
    rows
}

/// Reads an OpenMetrics text.
fn rows_of(text: &str) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            let help = help.trim_end_matches('.').to_owned();
            rows.push(Row { name: name.to_owned(), kind: "", labels: String::new(), help });
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let row = rows.iter_mut().find(|row| row.name == name).unwrap();
            (row.kind, row.name) = match kind {
                "counter" => ("counter", format!("{name}_total")),
                "gauge" => ("gauge", name.to_owned()),
                // OpenMetrics' kind for texts: a gauge that is always 1.
                "info" => ("gauge", format!("{name}_info")),
                other => panic!("{other}"),
            };
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap();
            let Some(row) = rows.iter_mut().find(|row| row.name == name) else { panic!("{line}") };
            let labels = line.split_once('{').map_or("", |(_, rest)| rest.split('}').next().unwrap_or_default());
            let names = labels.split(',').filter_map(|label| Some(format!("`{}`", label.split_once('=')?.0)));
            row.labels = names.collect::<Vec<_>>().join(", ");
        }
    }
    assert!(rows.len() > 20 && rows.iter().all(|row| !row.kind.is_empty()), "{text}");
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    rows
}

/// Commands and options of pd-control. Options that several commands share stand in one table.
fn command_line() -> String {
    let command = Cli::command();
    let own = options(command.get_arguments());
    let mut text = format!("`pd-control [OPTIONS]` runs until it gets SIGTERM or SIGINT.\n\n{own}");
    let asks_server = |command: &&Command| command.get_arguments().any(|it| it.get_long() == Some("server"));
    let subs: Vec<_> = command.get_subcommands().filter(|sub| sub.get_name() != "help").collect();
    for sub in &subs {
        let positionals: Vec<_> = sub.get_positionals().map(positional).collect();
        let usage = [&["pd-control".to_owned(), sub.get_name().to_owned()], positionals.as_slice()].concat().join(" ");
        let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
        let is_own = |argument: &&Arg| !asks_server(sub) || !is_of_server(argument);
        let own = options(sub.get_arguments().filter(is_own));
        let _ = write!(text, "\n`{usage}`: {about}.\n{}{own}", if own.is_empty() { "" } else { "\n" });
    }
    let servers: Vec<_> = subs.iter().filter(|sub| asks_server(sub)).collect();
    let names: Vec<_> = servers.iter().map(|sub| format!("`{}`", sub.get_name())).collect();
    let shared = servers[0].get_arguments().filter(is_of_server);
    let _ = write!(text, "\nOptions of {}:\n\n{}", names.join(", "), options(shared));
    text
}

/// Whether an option says which pd-control a command asks.
fn is_of_server(argument: &&Arg) -> bool {
    let long = argument.get_long().unwrap_or_default();
    ["server", "ca-file", "tls-server-name", "token-env", "token-file"].contains(&long)
}

fn positional(argument: &Arg) -> String {
    let name = argument.get_id().as_str().to_uppercase();
    if matches!(argument.get_action(), ArgAction::Append) { "FILE…".to_owned() } else { name }
}

fn options<'a>(arguments: impl Iterator<Item = &'a Arg>) -> String {
    let mut table = String::new();
    for argument in arguments {
        let names = argument.get_value_names().unwrap_or_default().join(" ");
        let name = match argument.get_long() {
            Some("help" | "version") => continue,
            Some(long) if argument.get_action().takes_values() => format!("--{long} {names}"),
            Some(long) => format!("--{long}"),
            None => positional(argument),
        };
        let variable = argument.get_env().map_or_else(String::new, |name| format!("`{}`", name.to_string_lossy()));
        let defaults = argument.get_default_values().iter().map(|value| value.to_string_lossy().into_owned());
        let default: String = defaults.filter(|value| value != "false").map(|value| format!("`{value}`")).collect();
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default().replace('\n', " ");
        // A default that is no value stands behind the meaning, in brackets.
        let (help, default) = match help.split_once(" [default: ") {
            Some((help, text)) => (help.to_owned(), text.trim_end_matches(']').to_owned()),
            None => (help, default),
        };
        let help = help.replace('|', "\\|");
        let _ = writeln!(table, "{}", row(&[&format!("`{name}`"), &variable, &default, &help]));
    }
    if !table.is_empty() {
        table.insert_str(0, "| option | variable | default | meaning |\n|---|---|---|---|\n");
    }
    table
}

/// A row of a table.
fn row(cells: &[&str]) -> String {
    let cells = cells.iter().map(|cell| if cell.is_empty() { " |".to_owned() } else { format!(" {cell} |") });
    format!("|{}", cells.collect::<String>())
}
