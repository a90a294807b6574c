//! The report of a migration: which settings the values carry over, and which not.

use std::fmt::Display;

use crate::cli::manifests::Object;

/// Lines about settings, in the order in which they were read. Each names the file, the line, the object and the key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Settings that the values carry over.
    pub carried: Vec<String>,
    /// Settings that the values do not carry over, and why.
    pub dropped: Vec<String>,
}

impl Report {
    /// Adds a line about a setting that the values carry over.
    pub(super) fn carried(&mut self, object: &Object, key: &str, what: impl Display) {
        self.carried.push(object.says(key, what));
    }

    /// Adds a line about a setting that the values do not carry over.
    pub(super) fn dropped(&mut self, object: &Object, key: &str, why: impl Display) {
        self.dropped.push(object.says(key, why));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.carried.is_empty() && self.dropped.is_empty()
    }
}
