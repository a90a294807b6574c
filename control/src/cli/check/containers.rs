//! Finds the containers that run pd-control.

use serde_json::Value;

use super::images;
use crate::cli::arguments::TOKEN_VARIABLE;
use crate::cli::manifests::{Manifests, Object, items, text};

/// Label with the version of a program.
const VERSION_LABEL: &str = "app.kubernetes.io/version";
/// Label with the name of a program.
pub(super) const NAME_LABEL: &str = "app.kubernetes.io/name";

/// A container that runs pd-control.
pub(super) struct Container<'a> {
    pub(super) workload: &'a Object,
    /// `spec.template.spec.containers[0]`.
    pub(super) key: String,
    pub(super) value: &'a Value,
}

impl<'m> Container<'m> {
    /// Its version: from the workload's labels, else from the ConfigMap that names its image, else the image's tag.
    /// `None` when none of them is a version.
    pub(super) fn version(&self, all: &'m Manifests) -> Option<&'m str> {
        let labels = ["/spec/template/metadata/labels", "/metadata/labels"];
        let labelled =
            labels.iter().find_map(|pointer| self.workload.value.pointer(pointer)?.get(VERSION_LABEL)?.as_str());
        let name = text(self.value, "/image");
        let tag = || name.split('@').next()?.rsplit_once(':').map(|(_, tag)| tag);
        let version = labelled.or_else(|| images::version(all, name)).or_else(tag)?;
        let version = version.strip_prefix('v').unwrap_or(version);
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        (version.split('.').count() == 3 && version.split('.').take(2).all(is_number)).then_some(version)
    }

    /// One line about a key of the container.
    pub(super) fn says(&self, key: &str, what: impl std::fmt::Display) -> String {
        self.workload.says(&format!("{}.{key}", self.key), what)
    }
}

/// The workloads that run pd-control, with their versions. Workloads without a version are left out.
pub(super) fn versions(all: &Manifests) -> impl Iterator<Item = (&Object, &str)> {
    containers(all).filter_map(|container| Some((container.workload, container.version(all)?)))
}

/// Whether a container passes a token to pd-control.
pub(super) fn has_token(all: &Manifests) -> bool {
    containers(all).any(|container| {
        let names_one = items(container.value, "/args").iter().any(|arg| text(arg, "").starts_with("--token-env"));
        names_one || items(container.value, "/env").iter().any(|env| text(env, "/name") == TOKEN_VARIABLE)
    })
}

/// The pd-control containers of all workloads.
pub(super) fn containers(all: &Manifests) -> impl Iterator<Item = Container<'_>> {
    let kinds = ["Deployment", "StatefulSet", "DaemonSet"];
    kinds.into_iter().flat_map(|kind| all.of_kind(kind)).flat_map(|workload| {
        let list = items(&workload.value, "/spec/template/spec/containers").iter().enumerate();
        let named = list.filter(|(_, value)| text(value, "/name") == "pd-control" || image(value) == "pd-control");
        named.map(move |(i, value)| Container { workload, key: format!("spec.template.spec.containers[{i}]"), value })
    })
}

/// The last part of the image's name, without tag and digest.
fn image(container: &Value) -> &str {
    let name = text(container, "/image").split('@').next().unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default();
    name.split(':').next().unwrap_or_default()
}
