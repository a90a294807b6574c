//! What the reports of all Envoys say together that one alone does not: a worker that is missing, a rollout that took no
//! effect, an engine that many cannot reach. Each with what to do.

use std::collections::{BTreeMap, BTreeSet};

use pd_core::envoys::report::Report;
use pd_core::workers::recent::Generation;

/// One line each, the gravest first; empty when all is as it should be. Names are those of the Envoys.
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

/// Envoys of one fleet have equally many workers; where one has fewer, the filter has ended there.
fn missing_workers(reports: &[(&str, &Report)]) -> Vec<String> {
    let most = reports.iter().map(|(_, report)| workers(report)).max().unwrap_or(0);
    let fewer = reports.iter().map(|(name, report)| (name, workers(report))).filter(|(_, workers)| *workers < most);
    let line = |(name, workers): (&&str, u64)| {
        format!(
            "Envoy {name} has {workers} of {most} workers with the filter. Where one has trapped, its requests get 503 until \
             the plugin configuration changes: set another `revision` and apply, or restart that Envoy. Its log says why"
        )
    };
    fewer.map(line).collect()
}

/// An Envoy that runs two builds or configurations for long has refused the newer one.
fn mixed(reports: &[(&str, &Report)]) -> Vec<String> {
    let line = |(name, report): &(&str, &Report)| {
        let all: Vec<_> = report.generations.iter().map(named).collect();
        format!(
            "Envoy {name} runs {} at once, as it does for some seconds while one replaces the other. If that stays, workers \
             refused the newer one: pd_configs_total{{result=\"refused\"}}, and its log names the key",
            all.join(" and ")
        )
    };
    reports.iter().filter(|(_, report)| report.generations.len() > 1).map(line).collect()
}

/// Envoys that differ are in the midst of a rollout, or it did not reach some.
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
            "Envoys run different builds of the filter: {counts}. If that stays, the old ones' pods are old: new code needs \
             new pods, which come with their annotation `pd-filter-image`"
        )
    });
    let revisions = of(|generation| format!("{:?}", generation.revision)).map(|counts| {
        format!(
            "Envoys have different configurations in force: revision {counts}. If that stays, some refused the new one: their \
             logs name the key, and `pd-control check` finds it beforehand"
        )
    });
    builds.into_iter().chain(revisions).collect()
}

/// An engine that fails one Envoy may be out of its reach; one that fails most of them is ill.
fn failing(reports: &[(&str, &Report)]) -> Vec<String> {
    let mut failed: BTreeMap<&str, usize> = BTreeMap::new();
    for address in
        reports.iter().flat_map(|(_, report)| report.failing.iter().map(String::as_str).collect::<BTreeSet<_>>())
    {
        *failed.entry(address).or_default() += 1;
    }
    let line = |(address, count): (&str, usize)| {
        format!(
            "{address} did not answer {count} of {} Envoys. They go round it and look again; if that stays, its process or \
             its network is ill",
            reports.len()
        )
    };
    failed.into_iter().map(line).collect()
}

fn named(generation: &Generation) -> String {
    let Generation { version, build, revision, workers } = generation;
    format!("{version} ({build}) with revision {revision:?} on {workers} workers")
}

#[cfg(test)]
mod tests {
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
}
