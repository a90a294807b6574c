//! Checks pd-control in manifests: its arguments, and the files that it reads from ConfigMaps.

use std::path::Path;

use serde_json::Value;

use super::containers::{Container, NAME_LABEL, containers};
use super::content::{self, FileKind, kind};
use super::faults::MAX_FAULTS;
use super::release;
use super::report::Report;
use super::upstream_tls;
use crate::cli::arguments::files_of;
use crate::cli::manifests::{Manifests, Object, items, text};
use crate::sources::yaml::FileError;

/// Checks every pd-control; returns the objects that were checked.
pub(super) fn check<'a>(all: &'a Manifests, report: &mut Report) -> Vec<&'a Object> {
    let mut seen = Vec::new();
    for container in containers(all) {
        seen.push(container.workload);
        seen.extend(check_container(&container, all, report));
    }
    // ConfigMaps that no workload of the files mounts are known by their name.
    for map in all.of_kind("ConfigMap").filter(|map| is_named(&map.name, &map.value)) {
        if seen.iter().any(|known| std::ptr::eq(*known, map)) {
            continue;
        }
        seen.push(map);
        for (key, content) in map.value.get("data").and_then(Value::as_object).into_iter().flatten() {
            if Path::new(key).extension().is_some_and(|it| it == "yaml" || it == "yml" || it == "json") {
                let content = content.as_str().unwrap_or_default();
                check_content(map, key, &kind(Path::new(key), content.as_bytes()), content, report);
            }
        }
    }
    seen
}

fn is_named(name: &str, value: &Value) -> bool {
    name.starts_with("pd-control") || value.pointer("/metadata/labels").is_some_and(|it| it[NAME_LABEL] == "pd-control")
}

/// Checks a container's arguments and the files that they name; returns the ConfigMaps of the files.
fn check_container<'a>(container: &Container<'_>, all: &'a Manifests, report: &mut Report) -> Vec<&'a Object> {
    let own = release::own().version;
    if container.version(all).is_some_and(|version| version != own) {
        report.note(
            container.says("args", format!("the container is not of version {own}, so its arguments were not checked")),
        );
        return Vec::new();
    }
    let arguments: Vec<&str> = items(container.value, "/args").iter().map(|argument| text(argument, "")).collect();
    let variables = items(container.value, "/env").iter();
    let variables: Vec<_> = variables.map(|env| (text(env, "/name"), text(env, "/value"))).collect();
    // The values of variables are known in the cluster only.
    if arguments.iter().chain(variables.iter().map(|(_, value)| value)).any(|text| text.contains("$(")) {
        report.note(container.says("args", "the arguments have variables, so they were not checked"));
        return Vec::new();
    }
    let files = match files_of(&arguments, &variables) {
        Ok(files) => files,
        Err(error) => {
            report.fault(container.says("args", error));
            return Vec::new();
        }
    };
    if let Some(how) = files.asks_engines {
        upstream_tls::check_asking(container, how, all, report);
    }
    let files = [(FileKind::Endpoints, files.endpoints), (FileKind::Kubernetes, files.kubernetes_config)];
    let named = files.into_iter().filter_map(|(kind, path)| Some((kind, path?)));
    named.filter_map(|(kind, path)| check_mounted(container, &kind, &path, all, report)).collect()
}

fn check_mounted<'a>(
    container: &Container<'_>,
    kind: &FileKind,
    path: &Path,
    all: &'a Manifests,
    report: &mut Report,
) -> Option<&'a Object> {
    let of_mount = items(container.value, "/volumeMounts").iter().find_map(|mount| {
        let rest = path.strip_prefix(text(mount, "/mountPath")).ok()?.to_str()?;
        // A mount of one file has the file's name in its subPath.
        let file = if rest.is_empty() { text(mount, "/subPath") } else { rest };
        Some((text(mount, "/name"), file))
    });
    let Some((volume, file)) = of_mount else {
        report.fault(container.says("args", format!("{}: no volumeMount has this file", path.display())));
        return None;
    };
    let volumes = items(&container.workload.value, "/spec/template/spec/volumes");
    let volume = volumes.iter().find(|it| text(it, "/name") == volume)?;
    let name = text(volume, "/configMap/name");
    if name.is_empty() {
        report.note(
            container.says("args", format!("{}: the file is in no ConfigMap, so it was not checked", path.display())),
        );
        return None;
    }
    let moved = items(volume, "/configMap/items").iter().find(|item| text(item, "/path") == file);
    let key = moved.map_or(file, |item| text(item, "/key"));
    let Some(map) = all.find("ConfigMap", &container.workload.namespace, name) else {
        report.note(container.says(
            "args",
            format!("{}: ConfigMap {name} is in none of the files, so it was not checked", path.display()),
        ));
        return None;
    };
    match map.value.get("data").and_then(|data| data.get(key)).and_then(Value::as_str) {
        Some(content) => check_content(map, key, kind, content, report),
        None => {
            let what = format!("must be there: {} reads it at {}", container.workload.title(), path.display());
            report.fault(map.says(&format!("data[{key:?}]"), what));
        }
    }
    Some(map)
}

fn check_content(map: &Object, key: &str, kind: &FileKind, content: &str, report: &mut Report) {
    let kind = if matches!(kind, FileKind::Kubernetes) { FileKind::Kubernetes } else { FileKind::Endpoints };
    let entry = format!("data[{key:?}]");
    match content::check(&kind, Path::new(key), content.as_bytes()) {
        Ok(good) => good.warnings.into_iter().for_each(|warning| report.warn(map.says(&entry, warning))),
        Err(errors) => {
            for FileError { position, message, .. } in errors.iter().take(MAX_FAULTS) {
                let place = position.map_or(String::new(), |(line, column)| format!("line {line}, column {column}: "));
                report.fault(map.says(&entry, format!("{place}{message}")));
            }
        }
    }
}
