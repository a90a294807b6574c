//! Advice for the operator, from the reports of all Envoys compared: a worker without the filter, a rollout that did
//! not take effect, an engine that several Envoys cannot reach. Each line says what to do.

use std::collections::{BTreeMap, BTreeSet};

use pd_core::endpoints::health::Cause;
use pd_core::envoys::report::Report;
use pd_core::workers::recent::Generation;

/// Compares reports, each with the name of its Envoy. Returns one line for each finding, the gravest first; empty when
/// there is none.
#[must_use]
pub fn advice(reports: &[(&str, &Report)]) -> Vec<String> {
    let mut lines = missing_workers(reports);
    lines.extend(mixed(reports));
    lines.extend(differing(reports));
    lines.extend(failing(reports));
    lines
}

fn workers(report: &Report) -> u64 {
    report.generations.iter().fold(0, |sum, generation| sum.saturating_add(generation.workers))
}

/// Envoys of one fleet have equally many workers. Where one has fewer, the filter has trapped in a worker.
fn missing_workers(reports: &[(&str, &Report)]) -> Vec<String> {
    let most = reports.iter().map(|(_, report)| workers(report)).max().unwrap_or(0);
    let fewer = reports.iter().map(|(name, report)| (name, workers(report))).filter(|(_, workers)| *workers < most);
    let line = |(name, workers): (&&str, u64)| {
        format!(
            "Envoy {name} has {workers} of {most} workers with the filter. A worker whose filter trapped answers 503 until \
             the plugin configuration changes: set another `revision` and apply, or restart that Envoy. Its log says why"
        )
    };
    fewer.map(line).collect()
}

/// An Envoy that keeps running two builds or configurations has refused the newer one.
fn mixed(reports: &[(&str, &Report)]) -> Vec<String> {
    let line = |(name, report): &(&str, &Report)| {
        let all: Vec<_> = report.generations.iter().map(named).collect();
        format!(
            "Envoy {name} runs {} at once, as it does for some seconds while one replaces the other. If that stays, workers \
             refused the newer one: pd_configs_total{{result=\"refused\"}} counts them, and the log names the key",
            all.join(" and ")
        )
    };
    reports.iter().filter(|(_, report)| report.generations.len() > 1).map(line).collect()
}

/// Envoys differ during a rollout, or when the rollout did not reach some of them.
fn differing(reports: &[(&str, &Report)]) -> Vec<String> {
    let of = |read: fn(&Generation) -> String| {
        let mut found: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
        for (name, report) in reports {
            for generation in &report.generations {
                found.entry(read(generation)).or_default().insert(name);
            }
        }
        let counts = found.iter().map(|(what, names)| format!("{what} on {}", names.len()));
        (found.len() > 1).then(|| counts.collect::<Vec<_>>().join(", "))
    };
    let builds = of(|generation| format!("{} ({})", generation.version, generation.build)).map(|counts| {
        format!(
            "Envoys run different builds of the filter: {counts}. If that stays, the pods with the old build were not \
             replaced: set their annotation `pd-filter-image` to the new image"
        )
    });
    let revisions = of(|generation| format!("{:?}", generation.revision)).map(|counts| {
        format!(
            "Envoys have different configurations in force: revision {counts}. If that stays, some Envoys refused the new \
             one: their logs name the key, and `pd-control check` finds it before you apply it"
        )
    });
    builds.into_iter().chain(revisions).collect()
}

/// An engine that one Envoy ejected may be out of that Envoy's reach. An engine that many Envoys ejected has a fault.
fn failing(reports: &[(&str, &Report)]) -> Vec<String> {
    let mut failed: BTreeMap<&str, usize> = BTreeMap::new();
    for address in
        reports.iter().flat_map(|(_, report)| report.failing.iter().map(String::as_str).collect::<BTreeSet<_>>())
    {
        *failed.entry(address).or_default() += 1;
    }
    let outlier = |address: &str| {
        let mut ejected = reports.iter().flat_map(|(_, report)| &report.ejected);
        ejected.find(|it| it.address == address && it.reason != Cause::Unreachable.text()).map(|it| it.reason.as_str())
    };
    let line = |(address, count): (&str, usize)| match outlier(address) {
        Some(reason) => format!(
            "{address} {reason}, by {count} of {} Envoys. The Envoys avoid it and probe it. If that stays, read its log, \
             and restart it or take it out of the list (`state: draining`)",
            reports.len()
        ),
        None => format!(
            "{address} did not answer {count} of {} Envoys. The Envoys avoid it and probe it. If that stays, check its \
             process and its network",
            reports.len()
        ),
    };
    failed.into_iter().map(line).collect()
}

fn named(generation: &Generation) -> String {
    let Generation { version, build, revision, workers } = generation;
    format!("{version} ({build}) with revision {revision:?} on {workers} workers")
}

#[cfg(test)]
mod tests {
    use pd_core::endpoints::outliers::ErrorClass;
    use pd_core::envoys::report::Ejected;

    use super::*;

    fn report(generations: &[(&str, &str, u64)]) -> Report {
        let generation = |(build, revision, workers): &(&str, &str, u64)| Generation {
            version: "0.1.0".into(),
            build: (*build).into(),
            revision: (*revision).into(),
            workers: *workers,
        };
        Report { generations: generations.iter().map(generation).collect(), ..Report::default() }
    }

    fn said(reports: &[Report]) -> Vec<String> {
        let names = ["a", "b", "c"];
        advice(&names.into_iter().zip(reports).collect::<Vec<_>>())
    }

    #[test]
    fn where_all_is_well_nothing_is_said() {
        assert_eq!(said(&[]), Vec::<String>::new());
        let well = report(&[("x", "1", 4)]);
        assert_eq!(said(&[well.clone(), well]), Vec::<String>::new());
    }

    #[test]
    fn a_worker_that_is_missing_is_said_with_its_remedy() {
        let said = said(&[report(&[("x", "1", 4)]), report(&[("x", "1", 3)])]);
        assert_eq!(said.len(), 1);
        assert!(said[0].starts_with("Envoy b has 3 of 4 workers") && said[0].contains("`revision`"), "{said:?}");
    }

    #[test]
    fn a_rollout_that_took_no_effect_is_said_with_its_remedy() {
        let mixed = said(&[report(&[("x", "1", 1), ("x", "2", 3)]), report(&[("x", "2", 4)])]);
        assert!(
            mixed[0].starts_with("Envoy a runs 0.1.0 (x) with revision \"1\" on 1 workers and 0.1.0 (x)"),
            "{mixed:?}"
        );
        assert!(mixed[1].contains("revision \"1\" on 1, \"2\" on 2"), "{mixed:?}");
        let old = said(&[report(&[("x", "1", 4)]), report(&[("y", "1", 4)]), report(&[("y", "1", 4)])]);
        assert_eq!(old.len(), 1);
        assert!(old[0].contains("0.1.0 (x) on 1, 0.1.0 (y) on 2") && old[0].contains("pd-filter-image"), "{old:?}");
    }

    #[test]
    fn an_engine_that_fails_envoys_is_counted_once_for_each() {
        let mut ill = report(&[("x", "1", 4)]);
        ill.failing = vec!["10.0.0.1:1".into(), "10.0.0.1:1".into()];
        let said = said(&[ill.clone(), ill, report(&[("x", "1", 4)])]);
        assert_eq!(said.len(), 1);
        assert!(said[0].starts_with("10.0.0.1:1 did not answer 2 of 3 Envoys"), "{said:?}");
    }

    #[test]
    fn an_engine_that_answers_errors_is_said_with_its_remedy() {
        let mut ill = report(&[("x", "1", 4)]);
        ill.failing = vec!["10.0.0.1:1".into()];
        let reason = Cause::Outlier(ErrorClass::Server).text().to_owned();
        ill.ejected = vec![Ejected { address: "10.0.0.1:1".into(), reason, ..Ejected::default() }];
        let said = said(&[ill, report(&[("x", "1", 4)])]);
        let begin = "10.0.0.1:1 answers 5xx where others of its pool do not, by 1 of 2 Envoys.";
        assert!(said.len() == 1 && said[0].starts_with(begin) && said[0].contains("draining"), "{said:?}");
    }
}
