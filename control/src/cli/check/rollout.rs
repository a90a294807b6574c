//! Checks versions: filter and pd-control must understand each other, also while one release replaces another.

use super::containers;
use super::filters::{Filter, filters};
use super::images::version;
use super::release::{self, Release};
use super::report::Report;
use crate::cli::manifests::{Manifests, Object};

/// Checks a filter's configuration against the release of its image, and against the release that runs until its pods
/// are replaced.
pub(super) fn check(filter: &Filter<'_>, new: &Manifests, old: &Manifests, report: &mut Report) {
    let own = release::own();
    let of_image = match version(new, filter.image()) {
        None => {
            let what = format!(
                "no ConfigMap has its version (`make push … PIN=` writes one), so it was checked as {}",
                own.version
            );
            report.note(filter.says("code", what));
            own
        }
        Some(version) => match release::named(version) {
            Some(release) => release,
            None => {
                let what = format!(
                    "pd-control {} does not know its version {version}: check with the pd-control of that version",
                    own.version
                );
                report.fault(filter.says("code", what));
                return;
            }
        },
    };
    for key in of_image.unknown_keys(filter.raw_config()) {
        let what = format!("filter {} does not know this key and would refuse the configuration", of_image.version);
        report.fault(filter.says(&format!("config.{key}"), what));
    }
    let of_control = |manifests| containers::versions(manifests);
    for (deployment, version) in of_control(new) {
        check_pair(filter, of_image, deployment, version, report);
    }
    let Some(before) = filters(old).find(|it| {
        (&it.policy.namespace, &it.policy.name, &it.key) == (&filter.policy.namespace, &filter.policy.name, &filter.key)
    }) else {
        return;
    };
    for (deployment, version) in of_control(old) {
        check_pair(filter, of_image, deployment, version, report);
    }
    if before.image() == filter.image() {
        return;
    }
    let Some(version) = version(old, before.image()) else {
        let what = "no ConfigMap has the version that runs now, so the new configuration was not checked against it";
        report.note(filter.says("code", what));
        return;
    };
    let Some(running) = release::named(version) else { return };
    for key in running.unknown_keys(filter.raw_config()) {
        let what = format!(
            "filter {version}, which runs until its pods are gone, does not know this key: \
             apply the image first, and the key when it has rolled out"
        );
        report.fault(filter.says(&format!("config.{key}"), what));
    }
}

fn check_pair(filter: &Filter<'_>, release: &Release, deployment: &Object, version: &str, report: &mut Report) {
    let Some(control) = release::named(version) else {
        let what = format!("pd-control {} does not know its version {version}", release::own().version);
        report.fault(deployment.says("spec.template", what));
        return;
    };
    if control.wire != release.wire {
        let what = format!(
            "filter {} takes lists of wire version {}, pd-control {version} in {} sends {}: roll pd-control out first",
            release.version,
            release.wire,
            deployment.title(),
            control.wire
        );
        report.fault(filter.says("code", what));
    } else if !release::are_neighbours(control, release) {
        let what = format!(
            "filter {} and pd-control {version} in {} are not of neighbouring versions",
            release.version,
            deployment.title()
        );
        report.fault(filter.says("code", what));
    }
}
