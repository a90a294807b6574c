//! Where the parts under test are.

use std::path::{Path, PathBuf};

/// Root of the workspace.
#[must_use]
pub fn root() -> &'static Path {
    // The manifest's directory is `tests/support`.
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("."))
}

/// The Envoy binary, which exists.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn envoy() -> PathBuf {
    existing(envoy_path(), "PD_ENVOY", "make envoy")
}

/// Where the Envoy binary should be: `PD_ENVOY`, or the installed one of version `PD_ENVOY_VERSION`, or of the pinned one.
#[must_use]
pub fn envoy_path() -> PathBuf {
    named("PD_ENVOY").unwrap_or_else(|| installed_envoy(root(), std::env::var("PD_ENVOY_VERSION").ok()))
}

/// Where `envoy/fetch.sh` installs a version of Envoy in a workspace; without one, the version in `envoy/version`.
#[must_use]
pub fn installed_envoy(root: &Path, version: Option<String>) -> PathBuf {
    let pinned = || std::fs::read_to_string(root.join("envoy/version")).unwrap_or_default();
    root.join(format!(".cache/envoy-{}/bin/envoy", version.unwrap_or_else(pinned).trim()))
}

/// The filter's module, which exists.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn wasm() -> PathBuf {
    existing(wasm_path(), "PD_WASM", "make wasm")
}

/// Where the filter's module should be: `PD_WASM`, or what the `filter` profile builds.
#[must_use]
pub fn wasm_path() -> PathBuf {
    named("PD_WASM").unwrap_or_else(|| root().join("target/wasm32-wasip1/filter/pd_filter.wasm"))
}

/// The pd-control binary, which exists.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn control() -> PathBuf {
    existing(control_path(), "PD_CONTROL", "make build")
}

/// Where the pd-control binary should be: `PD_CONTROL`, or what `make build` builds.
#[must_use]
pub fn control_path() -> PathBuf {
    named("PD_CONTROL").unwrap_or_else(|| root().join("target/debug/pd-control"))
}

/// The Envoy configuration that is shipped and tested.
#[must_use]
pub fn local_yaml() -> PathBuf {
    root().join("envoy/local.yaml")
}

/// A program of `tests/programs.sh` (`helm`, `kustomize`, `grpcurl`, `collector`), or one that `PATH` has. `None`: there is neither, and
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

fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn existing(path: PathBuf, variable: &str, target: &str) -> PathBuf {
    match path.canonicalize() {
        Ok(path) => path,
        Err(_) => panic!("{} is missing: run `{target}`, or name another one in {variable}", path.display()),
    }
}
