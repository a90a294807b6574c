//! Overlays with components: every pair of components that can be together, in every overlay of engines.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pd_support::places;
use serde_json::Value;

use super::{faults, find, manifests, parse, read};

const OVERLAYS: [&str; 4] = ["sim", "llm-d", "sidecar", "aibrix"];
/// Components of which one at most can be in an overlay, by what they change.
const GROUPS: [&[&str]; 4] = [
    &["components/ai-gateway-tiers", "components/ai-gateway-hostname"],
    &["components/dual-stack", "components/ipv6"],
    &["autoscaling/keda", "autoscaling/keda-prometheus", "autoscaling/hpa", "autoscaling/aibrix"],
    &["usage"],
];

fn pairs() -> Vec<[&'static str; 2]> {
    let groups = GROUPS.iter().enumerate();
    let pair = |(i, first): (usize, &&'static [&'static str])| {
        let others = GROUPS.iter().skip(i + 1).copied().flatten();
        let pairs = |one: &&'static str| others.clone().map(|other| [*one, *other]).collect::<Vec<_>>();
        first.iter().flat_map(pairs).collect::<Vec<_>>()
    };
    groups.flat_map(pair).collect()
}

/// A copy of the manifests, in which an overlay can be added.
fn copied() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let done = Command::new("cp").arg("-r").arg(manifests()).arg(directory.path().join("manifests")).status().unwrap();
    assert!(done.success());
    let overlay = directory.path().join("manifests/overlays/combined");
    fs::create_dir(&overlay).unwrap();
    (directory, overlay)
}

fn kustomize(program: &Path, overlay: &Path, what: &str) -> String {
    let done = Command::new(program).arg("build").arg(overlay).output().unwrap();
    assert!(done.status.success(), "{what}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

#[test]
fn every_pair_of_components_goes_with_every_overlay_of_engines() {
    let Some(program) = places::program("kustomize", "combinations of overlays") else { return };
    let (_directory, overlay) = copied();
    assert_eq!(pairs().len(), 28);
    for engines in OVERLAYS {
        for pair in pairs() {
            let what = format!("{engines} with {pair:?}");
            let text = format!("resources: [../{engines}]\ncomponents: [../../{}, ../../{}]\n", pair[0], pair[1]);
            fs::write(overlay.join("kustomization.yaml"), text).unwrap();
            let objects = parse(&kustomize(&program, &overlay, &what), &what);
            for object in &objects {
                assert_eq!(faults(object), Vec::<String>::new(), "{what}: {}", object["kind"]);
            }
            // Each object of both components is there.
            for component in pair {
                let mut files = Vec::new();
                find(&manifests().join(component), &mut files);
                for object in files.iter().flat_map(|file| read(file)) {
                    let is_it = |it: &Value| {
                        it["kind"] == object["kind"] && it["metadata"]["name"] == object["metadata"]["name"]
                    };
                    assert!(objects.iter().any(is_it), "{what}: {} {}", object["kind"], object["metadata"]["name"]);
                }
            }
        }
    }
}
