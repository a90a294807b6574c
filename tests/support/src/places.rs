//! Where the parts under test are.

use std::path::{Path, PathBuf};

/// Root of the workspace.
#[must_use]
pub fn root() -> &'static Path {
    // The manifest's directory is `tests/support`.
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("."))
}

/// The Envoy binary.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn envoy() -> PathBuf {
    part("PD_ENVOY", "make envoy", || {
        let pinned = || std::fs::read_to_string(root().join("envoy/version")).unwrap_or_default();
        let version = std::env::var("PD_ENVOY_VERSION").unwrap_or_else(|_| pinned());
        root().join(format!(".cache/envoy-{}/bin/envoy", version.trim()))
    })
}

/// The filter.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn wasm() -> PathBuf {
    part("PD_WASM", "make wasm", || root().join("target/wasm32-wasip1/filter/pd_filter.wasm"))
}

/// The pd-control binary.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn control() -> PathBuf {
    part("PD_CONTROL", "make build", || root().join("target/debug/pd-control"))
}

/// The Envoy configuration that is shipped and tested.
#[must_use]
pub fn local_yaml() -> PathBuf {
    root().join("envoy/local.yaml")
}

/// A program of `tests/programs.sh` (`helm`, `kustomize`, `grpcurl`), or one that `PATH` has. `None`: there is neither, and
/// standard error says what is not run.
#[must_use]
pub fn program(name: &str, what: &str) -> Option<PathBuf> {
    let built = std::env::var_os("PD_PROGRAMS").map(PathBuf::from);
    let in_path =
        std::env::var_os("PATH").into_iter().flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    let found = built.into_iter().chain(in_path).map(|folder| folder.join(name)).find(|path| path.is_file());
    if found.is_none() {
        eprintln!(
            "NOT RUN, {what}: there is no {name} (with Go: PD_PROGRAMS=$(tests/programs.sh); Debian has prometheus)"
        );
    }
    found
}

fn part(variable: &str, target: &str, default: impl FnOnce() -> PathBuf) -> PathBuf {
    let named = std::env::var_os(variable).filter(|value| !value.is_empty());
    let path = named.map_or_else(default, PathBuf::from);
    match path.canonicalize() {
        Ok(path) => path,
        Err(_) => panic!("{} is missing: run `{target}`, or name another one in {variable}", path.display()),
    }
}
