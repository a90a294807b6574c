//! What became of each setting.

use std::fmt::Display;

use crate::cli::manifests::Object;

/// Lines about settings, in the order in which they were read. Each names the file, the line, the object and the key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Settings that the values carry over.
    pub carried: Vec<String>,
    /// Settings that nothing stands for, and why.
    pub dropped: Vec<String>,
}

impl Report {
    /// A setting became something.
    pub(super) fn carried(&mut self, object: &Object, key: &str, what: impl Display) {
        self.carried.push(object.says(key, what));
    }

    /// A setting became nothing.
    pub(super) fn dropped(&mut self, object: &Object, key: &str, why: impl Display) {
        self.dropped.push(object.says(key, why));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.carried.is_empty() && self.dropped.is_empty()
    }
}
