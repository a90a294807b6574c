//! Files of the repository, read.

use std::path::{Path, PathBuf};

use pd_support::places;
use serde_json::Value;

pub fn monitoring(name: &str) -> PathBuf {
    places::root().join("gateway-manifests/monitoring").join(name)
}

pub fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub fn yaml(path: &Path) -> Value {
    serde_saphyr::from_str(&text(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub fn str_of(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}
