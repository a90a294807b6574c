//! `pd-control check`: says whether a file would be taken, before anyone applies it.

use std::path::Path;

use pd_core::wire::{Endpoint, Role};

use crate::file::{self, FileError};

/// Checks one file; returns the line that sums it up.
///
/// # Errors
/// The [`FileError`] that `pd-control` would refuse it with.
pub fn check(path: &Path) -> Result<String, FileError> {
    let list = file::parse(path, &file::read(path)?)?;
    Ok(format!("{}: ok, {}", path.display(), summary(list.as_slice())))
}

/// `4 endpoints (2 prefill, 2 decode)`.
#[must_use]
pub fn summary(endpoints: &[Endpoint]) -> String {
    let counts = [(Role::Prefill, "prefill"), (Role::Decode, "decode"), (Role::Both, "both")]
        .map(|(role, name)| (endpoints.iter().filter(|endpoint| endpoint.role == role).count(), name));
    let roles: Vec<_> = counts.iter().filter(|(count, _)| *count > 0).map(|(n, name)| format!("{n} {name}")).collect();
    let plural = if endpoints.len() == 1 { "" } else { "s" };
    let roles = if roles.is_empty() { String::new() } else { format!(" ({})", roles.join(", ")) };
    format!("{} endpoint{plural}{roles}", endpoints.len())
}
