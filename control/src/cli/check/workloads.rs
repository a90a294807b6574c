//! pd-control in manifests: its arguments and the files that ConfigMaps hold for it.

use std::path::Path;

use serde_json::Value;

use super::manifests::{Manifests, Object};
use super::{Kind, Report, check_own, items, kind, release, text};
use crate::cli::arguments as cli;

/// Label that says a program's version.
const VERSION_LABEL: &str = "app.kubernetes.io/version";
/// Label that says which program it is.
const NAME_LABEL: &str = "app.kubernetes.io/name";

/// A container that runs pd-control.
struct Container<'a> {
    workload: &'a Object,
    /// `spec.template.spec.containers[0]`.
    key: String,
    value: &'a Value,
}

/// Checks every pd-control; returns the objects that are looked at.
pub(super) fn check<'a>(all: &'a Manifests, report: &mut Report) -> Vec<&'a Object> {
    let mut seen = Vec::new();
    for container in containers(all) {
        seen.push(container.workload);
        seen.extend(container.check(all, report));
    }
    // Those that nothing here mounts are known by their name.
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

/// Which versions of pd-control the workloads run, where they say it.
pub(super) fn versions(all: &Manifests) -> impl Iterator<Item = (&Object, &str)> {
    containers(all).filter_map(|container| Some((container.workload, container.version(all)?)))
}

/// Whether a pd-control is given a token.
pub(super) fn has_token(all: &Manifests) -> bool {
    containers(all).any(|container| {
        let names_one = items(container.value, "/args").iter().any(|arg| text(arg, "").starts_with("--token-env"));
        names_one || items(container.value, "/env").iter().any(|env| text(env, "/name") == cli::TOKEN_VARIABLE)
    })
}

fn is_named(name: &str, value: &Value) -> bool {
    name.starts_with("pd-control") || value.pointer("/metadata/labels").is_some_and(|it| it[NAME_LABEL] == "pd-control")
}

fn containers(all: &Manifests) -> impl Iterator<Item = Container<'_>> {
    let kinds = ["Deployment", "StatefulSet", "DaemonSet"];
    kinds.into_iter().flat_map(|kind| all.of_kind(kind)).flat_map(|workload| {
        let list = items(&workload.value, "/spec/template/spec/containers").iter().enumerate();
        let named = list.filter(|(_, value)| text(value, "/name") == "pd-control" || image(value) == "pd-control");
        named.map(move |(i, value)| Container { workload, key: format!("spec.template.spec.containers[{i}]"), value })
    })
}

/// The last part of the image's name.
fn image(container: &Value) -> &str {
    let name = text(container, "/image").split('@').next().unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default();
    name.split(':').next().unwrap_or_default()
}

impl<'m> Container<'m> {
    /// What its labels say, else the ConfigMap that names its image, else the image's tag.
    fn version(&self, all: &'m Manifests) -> Option<&'m str> {
        let labels = ["/spec/template/metadata/labels", "/metadata/labels"];
        let labelled = labels.iter().find_map(|at| self.workload.value.pointer(at)?.get(VERSION_LABEL)?.as_str());
        let name = text(self.value, "/image");
        let tag = || name.split('@').next()?.rsplit_once(':').map(|(_, tag)| tag);
        let version = labelled.or_else(|| super::filter::version(all, name)).or_else(tag)?;
        let version = version.strip_prefix('v').unwrap_or(version);
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        (version.split('.').count() == 3 && version.split('.').take(2).all(is_number)).then_some(version)
    }

    fn says(&self, key: &str, what: impl std::fmt::Display) -> String {
        self.workload.says(&format!("{}.{key}", self.key), what)
    }

    /// Checks its arguments and the files that they name; returns the ConfigMaps.
    fn check<'a>(&self, all: &'a Manifests, report: &mut Report) -> Vec<&'a Object> {
        let own = release::own().version;
        if self.version(all).is_some_and(|version| version != own) {
            report.note(self.says("args", format!("it is not of version {own}, so its arguments were not checked")));
            return Vec::new();
        }
        let arguments: Vec<&str> = items(self.value, "/args").iter().map(|argument| text(argument, "")).collect();
        let variables = items(self.value, "/env").iter();
        let variables: Vec<_> = variables.map(|env| (text(env, "/name"), text(env, "/value"))).collect();
        // What the cluster fills in is not known here.
        if arguments.iter().chain(variables.iter().map(|(_, value)| value)).any(|text| text.contains("$(")) {
            report.note(self.says("args", "they have variables, so they were not checked"));
            return Vec::new();
        }
        let files = match cli::files_of(&arguments, &variables) {
            Ok(files) => files,
            Err(error) => {
                report.fault(self.says("args", error));
                return Vec::new();
            }
        };
        let files = [(Kind::Endpoints, files.endpoints), (Kind::Kubernetes, files.kubernetes_config)];
        let named = files.into_iter().filter_map(|(kind, path)| Some((kind, path?)));
        named.filter_map(|(kind, path)| self.check_mounted(&kind, &path, all, report)).collect()
    }

    fn check_mounted<'a>(
        &self,
        kind: &Kind,
        path: &Path,
        all: &'a Manifests,
        report: &mut Report,
    ) -> Option<&'a Object> {
        let of_mount = items(self.value, "/volumeMounts").iter().find_map(|mount| {
            let rest = path.strip_prefix(text(mount, "/mountPath")).ok()?.to_str()?;
            // A mount of one file is named by its subPath.
            let file = if rest.is_empty() { text(mount, "/subPath") } else { rest };
            Some((text(mount, "/name"), file))
        });
        let Some((volume, file)) = of_mount else {
            report.fault(self.says("args", format!("{}: no volumeMount has it", path.display())));
            return None;
        };
        let volumes = items(&self.workload.value, "/spec/template/spec/volumes");
        let volume = volumes.iter().find(|it| text(it, "/name") == volume)?;
        let name = text(volume, "/configMap/name");
        if name.is_empty() {
            report.note(self.says("args", format!("{}: it is in no ConfigMap, so it was not checked", path.display())));
            return None;
        }
        let moved = items(volume, "/configMap/items").iter().find(|item| text(item, "/path") == file);
        let key = moved.map_or(file, |item| text(item, "/key"));
        let Some(map) = all.find("ConfigMap", &self.workload.namespace, name) else {
            report.note(
                self.says("args", format!("{}: ConfigMap {name} is not here, so it was not checked", path.display())),
            );
            return None;
        };
        match map.value.get("data").and_then(|data| data.get(key)).and_then(Value::as_str) {
            Some(content) => check_content(map, key, kind, content, report),
            None => {
                let what = format!("must be there: {} reads it at {}", self.workload.title(), path.display());
                report.fault(map.says(&format!("data[{key:?}]"), what));
            }
        }
        Some(map)
    }
}

fn check_content(map: &Object, key: &str, kind: &Kind, content: &str, report: &mut Report) {
    let kind = if matches!(kind, Kind::Kubernetes) { Kind::Kubernetes } else { Kind::Endpoints };
    if let Err(error) = check_own(&kind, Path::new(key), content.as_bytes()) {
        let place = error.position.map_or(String::new(), |(line, column)| format!("line {line}, column {column}: "));
        report.fault(map.says(&format!("data[{key:?}]"), format!("{place}{}", error.message)));
    }
}
