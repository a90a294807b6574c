//! The documents say what the code does: their generated tables are those of the code, whatever they name exists, and
//! every link between them resolves. `make docs` (`PD_DOCS=write`) writes the generated tables.

use std::collections::BTreeSet;
use std::path::Path;

use clap::Parser;
use pd_control::cli::arguments::Cli;
use pd_control::sources::kubernetes::annotations::ANNOTATIONS;
use pd_core::config::keys::Key;
use pd_core::request::STATES;
use pd_core::wire::Engine;

use markdown::Document;

mod circles;
mod cost;
mod markdown;
mod tables;

/// Lines that README may have.
const README_LINES: usize = 150;
/// Folders that a path in a document begins with.
const FOLDERS: &[&str] =
    &[".ci/", "control/", "docs/", "envoy/", "filter/", "gateway-manifests/", "tests/", "tools/", "target/"];

fn documents() -> Vec<Document> {
    let documents = Document::all();
    assert!(documents.len() > 10, "{}", documents.len());
    documents
}

fn document(path: &str) -> Document {
    documents().into_iter().find(|document| document.path == Path::new(path)).unwrap_or_else(|| panic!("no {path}"))
}

#[test]
fn generated_tables_are_those_of_the_code() {
    let mut tables = tables::all();
    for document in documents() {
        let text = document.with_tables(&mut tables);
        if std::env::var_os("PD_DOCS").is_some_and(|value| value == "write") {
            document.write(&text);
        } else {
            let same = text.lines().zip(document.text.lines()).take_while(|(new, old)| new == old).count();
            let line = text.lines().nth(same).unwrap_or_default();
            assert_eq!(text, document.text, "{}:{}: run `make docs`: {line}", document.path.display(), same + 1);
        }
    }
    assert!(tables.is_empty(), "no document has a place for {:?}", tables.keys());
}

#[test]
fn every_link_between_documents_resolves() {
    let documents = documents();
    let mut count = 0;
    for document in &documents {
        for link in document.links() {
            count += 1;
            if let Err(fault) = document.resolve(&link, &documents) {
                panic!("{}: ({link}): {fault}", document.path.display());
            }
        }
    }
    assert!(count > 50, "{count}");
}

#[test]
fn every_document_is_reached_from_readme() {
    let documents = documents();
    let mut reached = BTreeSet::from([Path::new("README.md").to_owned()]);
    loop {
        let from = documents.iter().filter(|document| reached.contains(&document.path));
        let links: Vec<_> = from.flat_map(|document| document.links().map(|link| document.target(&link))).collect();
        let before = reached.len();
        reached.extend(links);
        if reached.len() == before {
            break;
        }
    }
    for document in &documents {
        assert!(reached.contains(&document.path), "no link leads to {}", document.path.display());
    }
}

#[test]
fn readme_is_short() {
    let lines = document("README.md").text.lines().count();
    assert!(lines <= README_LINES, "{lines} lines");
}

#[test]
fn every_filter_state_has_a_row() {
    let rows = document("docs/headers-and-access-log.md").rows("Filter state");
    assert_eq!(rows, STATES.iter().map(|state| (*state).to_owned()).collect());
}

#[test]
fn every_reason_code_stands_in_the_code() {
    let document = document("docs/headers-and-access-log.md");
    let codes: BTreeSet<_> =
        ["Reasons of decisions", "Errors"].iter().flat_map(|heading| document.rows(heading)).collect();
    assert!(codes.len() > 20, "{codes:?}");
    let sources = tables::sources("filter/core/src");
    for code in &codes {
        let is_there = [format!("\"{code}\""), format!(";reason={code}\"")].iter().any(|text| sources.contains(text));
        assert!(is_there, "no source of pd-core has the reason {code}");
    }
}

#[test]
fn every_engine_has_a_row() {
    let engines = Engine::ALL.iter().map(|engine| serde_json::to_value(engine).unwrap().as_str().unwrap().to_owned());
    assert_eq!(document("docs/engines.md").rows("Overview"), engines.collect());
}

#[test]
fn every_annotation_of_a_pod_has_a_row() {
    let annotations = ANNOTATIONS.iter().map(|name| format!("envoy-pd/{name}"));
    assert_eq!(document("docs/pd-control.md").rows("Annotations"), annotations.collect());
}

/// Names of metrics that documents mention, with a `*` for any end.
#[test]
fn every_metric_that_is_named_exists() {
    let known = tables::metric_names();
    for document in documents() {
        for span in document.code_spans().filter(|span| span.starts_with("pd_")) {
            let name = span.split(['{', ' ']).next().unwrap_or(span);
            let is_known = match name.strip_suffix('*') {
                Some(start) => known.iter().any(|known| known.starts_with(start)),
                None => known.contains(name) || name == "pd_filter.wasm",
            };
            assert!(is_known, "{}: {span}", document.path.display());
        }
    }
}

#[test]
fn every_metric_that_the_filter_makes_up_is_documented() {
    let known = tables::metric_names();
    let sources = tables::sources("filter");
    for name in sources.split("\"pd_").skip(1).filter_map(|rest| rest.split(['"', ';', '{']).next()) {
        assert!(known.contains(format!("pd_{name}").as_str()), "pd_{name}");
    }
    for family in pd_core::metrics::FAMILIES {
        assert!(sources.contains(&format!("\"{}", family.name)), "{}", family.name);
    }
}

#[test]
fn every_configuration_key_that_is_named_exists() {
    let known: BTreeSet<_> = Key::ALL.iter().map(|key| key.path()).collect();
    for document in documents() {
        for span in document.code_spans() {
            let is_key = ["pools.", "models.", "prefix.", "control."].iter().any(|start| span.starts_with(start));
            let is_object = || known.iter().any(|key| key.starts_with(&format!("{span}.")));
            let is_meant = is_key
                && !span.ends_with(".yaml")
                && span.bytes().all(|b| b.is_ascii_alphabetic() || b"._*".contains(&b));
            let is_known = || match span.strip_suffix('*') {
                Some(start) => known.iter().any(|key| key.starts_with(start)),
                None => known.contains(span) || is_object(),
            };
            assert!(!is_meant || is_known(), "{}: {span}", document.path.display());
        }
    }
}

#[test]
fn every_make_target_that_is_named_exists() {
    let makefile = std::fs::read_to_string(markdown::root().join("Makefile")).unwrap();
    let mut count = 0;
    for document in documents() {
        let commands = document.commands().chain(document.code_spans());
        for target in commands.filter_map(|line| line.trim().strip_prefix("make ")?.split_whitespace().next()) {
            assert!(makefile.contains(&format!("\n{target}:")), "{}: make {target}", document.path.display());
            count += 1;
        }
    }
    assert!(count > 8, "{count}");
}

#[test]
fn every_pd_control_command_is_understood() {
    let mut count = 0;
    for document in documents() {
        for line in document.commands() {
            let command = line.split(" #").next().unwrap_or(line);
            let Some(start) =
                command.find("pd-control ").filter(|start| *start == 0 || command[..*start].ends_with("| "))
            else {
                continue;
            };
            let words = command[start..].split_whitespace();
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{}: {line}: {error}", document.path.display());
            }
            count += 1;
        }
    }
    assert!(count >= 4, "{count}");
}

#[test]
fn every_path_that_is_named_exists() {
    for document in documents() {
        for span in document.code_spans().filter(|span| FOLDERS.iter().any(|folder| span.starts_with(folder))) {
            let is_placeholder = span.contains(['*', ' ', '<', '…', '=']) || span.starts_with("target/");
            let exists = || markdown::root().join(span).exists();
            assert!(is_placeholder || exists(), "{}: {span}", document.path.display());
        }
    }
}
