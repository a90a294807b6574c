//! `tools/release/pack.sh` and `verify.sh`, on small images in place of those that take long to build.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pd_image::layout;
use pd_image::manifest::Image;
use pd_support::places;
use tempfile::TempDir;

use crate::files::{array, text, yaml};

/// Header and one program header of a static program.
fn program(machine: u8) -> Vec<u8> {
    let mut bytes = vec![0; 64 + 56];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (bytes[0x12], bytes[0x20], bytes[0x36], bytes[0x38], bytes[64]) = (machine, 64, 56, 1, 1);
    bytes
}

/// What `build.sh` leaves for `pack.sh`, and a pair of keys.
fn input() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join("input").join(name);
    std::fs::create_dir(directory.path().join("input")).unwrap();
    layout::write(&Image::new(b"\0asm\x01\0\0\0").unwrap(), &path("filter")).unwrap();
    for (name, machine) in [("amd64", 62), ("arm64", 183)] {
        for program_name in ["control", "sim"] {
            let image = Image::of_program(&format!("pd-{program_name}"), &program(machine)).unwrap();
            layout::write(&image, &path(&format!("{program_name}-{name}"))).unwrap();
        }
    }
    std::fs::write(path("pd-filter-9.8.7.cdx.json"), r#"{"bomFormat":"CycloneDX","components":[{"name":"log"}]}"#)
        .unwrap();
    let key = directory.path().join("private.pem");
    openssl(&["genpkey", "-algorithm", "ed25519", "-out", key.to_str().unwrap()]);
    openssl(&["pkey", "-in", key.to_str().unwrap(), "-pubout", "-out", public(&directory).to_str().unwrap()]);
    directory
}

fn openssl(arguments: &[&str]) {
    let done = Command::new("openssl").args(arguments).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

fn public(directory: &TempDir) -> PathBuf {
    directory.path().join("public.pem")
}

fn script(name: &str) -> Command {
    Command::new(places::root().join("tools/release").join(name))
}

fn pack(input: &TempDir, name: &str) -> PathBuf {
    let output = input.path().join(name);
    let mut command = script("pack.sh");
    command.arg(input.path().join("input")).arg(&output);
    command.envs([("VERSION", "9.8.7"), ("COMMIT", "c0ffee"), ("EPOCH", "1700000000"), ("REGISTRY", "images.example")]);
    let done = command.env("KEY", input.path().join("private.pem")).output().unwrap();
    assert!(done.status.success(), "{}", said(&done));
    output
}

fn verify(folder: &Path, public: &Path) -> Output {
    script("verify.sh").arg(folder).env("PUB", public).output().unwrap()
}

fn said(done: &Output) -> String {
    String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr)
}

/// Contents by name.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> =
        entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect();
    files.sort();
    files
}

#[test]
fn two_releases_of_the_same_are_equal_bit_for_bit_and_verify() {
    let input = input();
    let (one, two) = (pack(&input, "one"), pack(&input, "two"));
    let names: Vec<_> = contents(&one).into_iter().map(|(name, _)| name).collect();
    assert_eq!(
        names,
        [
            "SHA256SUMS",
            "SHA256SUMS.sig",
            "envoy-pd-9.8.7.tgz",
            "images.env",
            "pd-control-9.8.7.index.json",
            "pd-control-amd64-9.8.7.oci.tar",
            "pd-control-arm64-9.8.7.oci.tar",
            "pd-filter-9.8.7.cdx.json",
            "pd-filter-9.8.7.oci.tar",
            "pd-sim-9.8.7.index.json",
            "pd-sim-amd64-9.8.7.oci.tar",
            "pd-sim-arm64-9.8.7.oci.tar",
            "provenance-9.8.7.intoto.json",
        ]
    );
    assert_eq!(contents(&one), contents(&two));
    let done = verify(&one, &public(&input));
    assert!(done.status.success() && said(&done).contains("signed by"), "{}", said(&done));
}

#[test]
fn the_chart_of_a_release_names_its_images_and_its_version() {
    let input = input();
    let release = pack(&input, "one");
    let unpacked = tempfile::tempdir().unwrap();
    let tar =
        Command::new("tar").arg("-xzf").arg(release.join("envoy-pd-9.8.7.tgz")).arg("-C").arg(unpacked.path()).status();
    assert!(tar.unwrap().success());
    let values = text(&unpacked.path().join("envoy-pd/values.yaml"));
    let digest = Image::new(b"\0asm\x01\0\0\0").unwrap().manifest.digest;
    assert!(values.contains(&format!("  filter: images.example/pd-filter@{digest}\n")), "{values}");
    for (key, name) in [("control", "control"), ("simulator", "sim")] {
        let index = text(&release.join(format!("pd-{name}-9.8.7.index.json")));
        let digest = pd_image::manifest::digest(index.as_bytes());
        assert!(values.contains(&format!("  {key}: images.example/pd-{name}@{digest}\n")), "{values}");
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        let images = array(&index["manifests"]);
        for (image, (architecture, machine)) in images.iter().zip([("amd64", 62), ("arm64", 183)]) {
            let made = Image::of_program(&format!("pd-{name}"), &program(machine)).unwrap();
            assert_eq!(image["digest"], made.manifest.digest);
            assert_eq!(image["platform"], serde_json::json!({"architecture": architecture, "os": "linux"}));
        }
        assert_eq!(images.len(), 2);
    }
    assert!(text(&unpacked.path().join("envoy-pd/Chart.yaml")).contains("\nversion: 9.8.7\nappVersion: 9.8.7\n"));
    let dashboard = unpacked.path().join("envoy-pd/files/dashboard.json");
    assert!(!dashboard.is_symlink() && dashboard.is_file());
}

#[test]
fn whatever_is_changed_is_found() {
    let input = input();
    let resign = |folder: &Path| {
        // Only a holder of the key can do this, not an attacker with write access to the files.
        let command = "rm SHA256SUMS.sig; sha256sum -- $(ls | grep -v SHA256SUMS) >SHA256SUMS; \
                       openssl pkeyutl -sign -rawin -inkey ../private.pem -in SHA256SUMS -out SHA256SUMS.sig";
        assert!(Command::new("bash").args(["-c", command]).current_dir(folder).status().unwrap().success());
    };
    let append = |path: PathBuf| std::fs::write(&path, text(&path) + "\n").unwrap();
    type Change<'a> = (&'a str, Box<dyn Fn(&Path) + 'a>);
    // The same text in every file of a release that it is in.
    let replace = |folder: &Path, name: &str, from: &str, to: &str| {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).unwrap();
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).expect(from);
        std::fs::write(&path, [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat()).unwrap();
    };
    // The provenance names the sums of the other files.
    let attest = |folder: &Path, name: &str| {
        let sum = Command::new("bash")
            .args(["-c", "sha256sum \"$0\" | cut -c1-64; grep \"  $0$\" SHA256SUMS | cut -c1-64", name])
            .current_dir(folder)
            .output()
            .unwrap();
        let sums = String::from_utf8(sum.stdout).unwrap();
        let (new, old) = sums.trim().split_once('\n').unwrap();
        replace(folder, "provenance-9.8.7.intoto.json", old, new);
        resign(folder);
    };
    let changes: [Change<'_>; 14] = [
        ("does not name: SHA256SUMS.more", Box::new(|it| std::fs::write(it.join("SHA256SUMS.more"), "").unwrap())),
        (
            "there are links: ./extra",
            Box::new(|it| std::os::unix::fs::symlink("images.env", it.join("extra")).unwrap()),
        ),
        ("does not name: extra", Box::new(|it| std::fs::create_dir(it.join("extra")).unwrap())),
        (
            "images.env: sim-arm64 is not pd-sim-arm64",
            Box::new(|it| {
                replace(
                    it,
                    "images.env",
                    "sim-arm64=images.example/pd-sim@sha256:",
                    "sim-arm64=images.example/pd-sim@sha256:0",
                );
                attest(it, "images.env");
            }),
        ),
        (
            "images.env: control is not pd-control-9.8.7.index.json",
            Box::new(|it| {
                replace(it, "pd-control-9.8.7.index.json", "linux", "minix");
                attest(it, "pd-control-9.8.7.index.json");
            }),
        ),
        (
            "its simulator is not",
            Box::new(|it| {
                replace(it, "images.env", "\nsim=images.example/pd-sim", "\nsim=images.example/PD-sim");
                attest(it, "images.env");
            }),
        ),
        (
            "has another digest",
            Box::new(|it| {
                replace(it, "pd-control-amd64-9.8.7.oci.tar", "linux", "minix");
                attest(it, "pd-control-amd64-9.8.7.oci.tar");
            }),
        ),
        (
            "no CycloneDX list of components",
            Box::new(|it| {
                replace(it, "pd-filter-9.8.7.cdx.json", "components", "nothing");
                attest(it, "pd-filter-9.8.7.cdx.json");
            }),
        ),
        ("a file is not what SHA256SUMS says", Box::new(|it| append(it.join("images.env")))),
        ("the signature is not that", Box::new(|it| append(it.join("SHA256SUMS")))),
        ("does not name: extra", Box::new(|it| std::fs::write(it.join("extra"), "").unwrap())),
        ("there is no signature", Box::new(|it| std::fs::remove_file(it.join("SHA256SUMS.sig")).unwrap())),
        (
            "does not name these files",
            Box::new(|it| {
                append(it.join("images.env"));
                resign(it);
            }),
        ),
        ("is not what SHA256SUMS says", Box::new(|it| std::fs::remove_file(it.join("envoy-pd-9.8.7.tgz")).unwrap())),
    ];
    for (number, (finding, change)) in changes.iter().enumerate() {
        let release = pack(&input, &number.to_string());
        change(&release);
        let done = verify(&release, &public(&input));
        assert!(!done.status.success() && said(&done).contains(finding), "{finding}: {}", said(&done));
    }
}

#[test]
fn the_workflows_are_yaml_and_call_targets_and_scripts_that_exist() {
    let makefile = text(&places::root().join("Makefile"));
    let mut count = 0;
    for name in ["ci", "release"] {
        let path = places::root().join(format!(".github/workflows/{name}.yaml"));
        let jobs = yaml(&path)["jobs"].clone();
        let steps = jobs.as_object().unwrap().values().flat_map(|job| array(&job["steps"]).to_vec());
        let commands: Vec<String> = steps.filter_map(|step| Some(step["run"].as_str()?.to_owned())).collect();
        for line in commands.iter().flat_map(|command| command.lines()) {
            let words: Vec<_> = line.split_whitespace().collect();
            if let Some(index) = words.iter().position(|word| *word == "make") {
                assert!(makefile.contains(&format!("\n{}:", words[index + 1])), "{line}");
                count += 1;
            }
            for script in words.iter().filter(|word| word.starts_with("tools/") || word.starts_with(".ci/")) {
                assert!(places::root().join(script).is_file(), "{line}");
                count += 1;
            }
        }
    }
    assert_eq!(count, 4);
}
