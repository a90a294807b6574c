//! Versions of filter and pd-control that must know each other's keys and lists, while one replaces the other.

use super::containers;
use super::filters::{Filter, filters};
use super::images::version;
use super::manifests::{Manifests, Object};
use super::release::{self, Release};
use super::report::Report;

/// What the release that the image is of knows, and the one that runs until its pods are gone.
pub(super) fn check(filter: &Filter<'_>, new: &Manifests, old: &Manifests, report: &mut Report) {
    let own = release::own();
    let of_image = match version(new, filter.image()) {
        None => {
            let what = format!(
                "which version it is stands nowhere (`make push … PIN=` writes it), so it was checked as {}",
                own.version
            );
            report.note(filter.says("code", what));
            own
        }
        Some(version) => match release::named(version) {
            Some(release) => release,
            None => {
                let what = format!(
                    "its version {version} is not known to pd-control {}: check with the pd-control of that version",
                    own.version
                );
                report.fault(filter.says("code", what));
                return;
            }
        },
    };
    for key in of_image.unknown_keys(filter.raw_config()) {
        let what = format!("filter {} does not know this key and would refuse the whole", of_image.version);
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
        let what = "which version runs now stands nowhere, so whether it knows the new configuration was not checked";
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
        let what = format!("its version {version} is not known to pd-control {}", release::own().version);
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
