//! No two files of a crate import each other, however many files lie between them.
//! A circle that a platform imposes must stand in `docs/architecture.md`, which has none at this time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::markdown::root;

/// Folders of sources that are checked.
const CRATES: &[&str] = &[
    "filter/core/src",
    "filter/src",
    "control/src",
    "tools/bench/src",
    "tools/image/src",
    "tools/run/src",
    "tools/sim/src",
    "tools/trace/src",
    "tests/cluster/src",
    "tests/envoy/src",
    "tests/host/src",
    "tests/support/src",
];

/// Files by their module paths, and what each imports.
struct Imports(BTreeMap<Vec<String>, BTreeSet<Vec<String>>>);

impl Imports {
    fn of(folder: &str) -> Self {
        let mut files = BTreeMap::new();
        read(&root().join(folder), &mut Vec::new(), &mut files);
        let modules: BTreeSet<Vec<String>> = files.keys().cloned().collect();
        let imports = files.iter().map(|(module, text)| (module.clone(), imports(module, text, &modules)));
        Self(imports.collect())
    }

    /// Modules from which a path of imports leads back to them.
    fn circles(&self) -> Vec<&Vec<String>> {
        self.0.keys().filter(|module| self.reaches(module, module)).collect()
    }

    fn reaches(&self, from: &[String], to: &[String]) -> bool {
        let mut seen = BTreeSet::new();
        let mut open: Vec<_> = self.0[from].iter().collect();
        while let Some(next) = open.pop() {
            if next.as_slice() == to {
                return true;
            }
            if seen.insert(next) {
                open.extend(&self.0[next]);
            }
        }
        false
    }
}

/// Reads the files below a folder, without tests and programs.
fn read(folder: &Path, module: &mut Vec<String>, files: &mut BTreeMap<Vec<String>, String>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            module.push(name);
            read(&path, module, files);
            module.pop();
        } else if path.extension().is_some_and(|end| end == "rs") {
            let mut own = module.clone();
            own.extend((!matches!(name.as_str(), "mod" | "lib" | "main")).then_some(name));
            if own.iter().all(|part| part != "tests" && part != "bin") {
                files.insert(own, std::fs::read_to_string(path).unwrap());
            }
        }
    }
}

/// The files whose items a file imports: by `use`, or by a path that begins with `crate`.
fn imports(module: &[String], text: &str, modules: &BTreeSet<Vec<String>>) -> BTreeSet<Vec<String>> {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = code.lines().map(|line| line.split("//").next().unwrap_or_default());
    let code = lines.collect::<Vec<_>>().join(" ").replace("pub(in crate::", "pub(");
    let mut paths = Vec::new();
    for statement in code.split("use ").skip(1).filter_map(|rest| rest.split(';').next()) {
        expand(&[], statement, &mut paths);
    }
    for path in code.split("crate::").skip(1) {
        let end = path.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').unwrap_or(path.len());
        expand(&["crate".to_owned()], &path[..end], &mut paths);
    }
    let found = paths.iter().filter_map(|path| file_of(module, path, modules));
    found.filter(|other| other != module && !other.is_empty()).collect()
}

/// The paths of a `use`, braces undone.
fn expand(before: &[String], text: &str, paths: &mut Vec<Vec<String>>) {
    let (mut depth, mut start) = (0, 0);
    let mut parts = Vec::new();
    for (index, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    for part in parts.into_iter().map(str::trim).filter(|part| !part.is_empty()) {
        let (path, inner) = part.split_once('{').unwrap_or((part, ""));
        let path = path.split(" as ").next().unwrap_or_default();
        let segments = path.split("::").map(str::trim).filter(|segment| !segment.is_empty());
        let whole: Vec<String> = before.iter().cloned().chain(segments.map(str::to_owned)).collect();
        match inner.rsplit_once('}') {
            Some((inner, _)) => expand(&whole, inner, paths),
            None => paths.push(whole),
        }
    }
}

/// The file that a path leads to: the longest beginning of it that is a module.
fn file_of(module: &[String], path: &[String], modules: &BTreeSet<Vec<String>>) -> Option<Vec<String>> {
    let (first, mut rest) = path.split_first()?;
    let mut whole = module.to_vec();
    match first.as_str() {
        "crate" => whole.clear(),
        "self" => {}
        "super" => {
            whole.pop();
            while let Some(("super", behind)) = rest.split_first().map(|(first, behind)| (first.as_str(), behind)) {
                whole.pop();
                rest = behind;
            }
        }
        child => {
            whole.push(child.to_owned());
            if !modules.contains(&whole) {
                return None;
            }
        }
    }
    whole.extend(rest.iter().cloned());
    while !modules.contains(&whole) {
        whole.pop()?;
    }
    Some(whole)
}

#[test]
fn no_files_import_each_other() {
    for folder in CRATES {
        let imports = Imports::of(folder);
        assert!(imports.0.len() > 3, "{folder}");
        let circles = imports.circles();
        let imported: Vec<_> = circles.iter().map(|module| (module.join("::"), &imports.0[*module])).collect();
        assert!(circles.is_empty(), "{folder}: these files import each other: {imported:#?}");
    }
}

#[test]
fn a_circle_is_found() {
    let files = [
        ("a", "use crate::b::{self, X};"),
        ("b", "use super::c::d::Y;"),
        ("c", "fn f() { crate::a::g() }"),
        ("d", "use crate::a::Z;"),
    ];
    let modules: BTreeSet<Vec<String>> = files.iter().map(|(name, _)| vec![(*name).to_owned()]).collect();
    let of = |(name, text): &(&str, &str)| (vec![(*name).to_owned()], imports(&[(*name).to_owned()], text, &modules));
    let imports = Imports(files.iter().map(of).collect());
    let circles: Vec<String> = imports.circles().into_iter().map(|module| module.join("::")).collect();
    assert_eq!(circles, ["a", "b", "c"]);
}
