//! Alert rules: of metrics that exist, each with its tests and its section in the runbook.

use std::collections::BTreeSet;
use std::process::Command;

use pd_support::places;
use serde_json::Value;

use crate::files::{array, monitoring, str_of, text, yaml};
use crate::names::{known, unknown};

fn alerts() -> Vec<Value> {
    let rules = yaml(&monitoring("rules.yml"));
    array(&rules["groups"]).iter().flat_map(|group| array(&group["rules"]).to_vec()).collect()
}

fn names() -> BTreeSet<String> {
    alerts().iter().map(|alert| str_of(&alert["alert"]).to_owned()).collect()
}

#[test]
fn every_metric_of_an_alert_exists() {
    let known = known();
    for alert in alerts() {
        assert_eq!(unknown(str_of(&alert["expr"]), &known), Vec::<String>::new(), "{}", alert["alert"]);
    }
}

#[test]
fn every_alert_has_its_section_in_the_runbook() {
    let runbook = text(&places::root().join("docs/runbook.md"));
    let sections: BTreeSet<_> =
        runbook.lines().filter_map(|line| line.strip_prefix("## ")).map(str::to_owned).collect();
    assert_eq!(sections, names().into_iter().chain(["Symptoms".to_owned()]).collect());
    for alert in alerts() {
        let url = str_of(&alert["annotations"]["runbook_url"]);
        let anchor = url.rsplit_once("docs/runbook.md#").unwrap_or_else(|| panic!("{url}")).1;
        assert_eq!(anchor, str_of(&alert["alert"]).to_lowercase());
    }
}

#[test]
fn the_operators_rules_are_the_plain_ones() {
    assert_eq!(yaml(&monitoring("prometheusrule.yaml"))["spec"], yaml(&monitoring("rules.yml")));
}

#[test]
fn every_alert_is_tested_to_fire_and_to_be_silent() {
    let tests = yaml(&monitoring("rules_test.yml"));
    let outcomes = |fires: bool| -> BTreeSet<String> {
        let all = array(&tests["tests"]).iter().flat_map(|test| array(&test["alert_rule_test"]));
        let those = all.filter(|test| array(&test["exp_alerts"]).is_empty() != fires);
        those.map(|test| str_of(&test["alertname"]).to_owned()).collect()
    };
    assert_eq!(outcomes(true), names());
    assert_eq!(outcomes(false), names());
}

#[test]
fn promtools_tests_of_the_alerts_pass() {
    let Some(promtool) = places::program("promtool", "tests of the alert rules") else { return };
    for arguments in [&["check", "rules", "rules.yml"][..], &["test", "rules", "rules_test.yml"][..]] {
        let done = Command::new(&promtool).args(arguments).current_dir(monitoring("")).output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{said}");
    }
}

#[test]
fn promtools_tests_fail_when_an_alert_changes() {
    let Some(promtool) = places::program("promtool", "tests of the alert rules") else { return };
    let directory = tempfile::tempdir().unwrap();
    std::fs::copy(monitoring("rules_test.yml"), directory.path().join("rules_test.yml")).unwrap();
    let changed = text(&monitoring("rules.yml")).replace("> 0.05", "> 0.5");
    std::fs::write(directory.path().join("rules.yml"), changed).unwrap();
    let done =
        Command::new(&promtool).args(["test", "rules", "rules_test.yml"]).current_dir(&directory).output().unwrap();
    assert!(!done.status.success());
}
