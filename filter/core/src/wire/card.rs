//! The card of a model.

use serde::{Deserialize, Serialize};

/// Facts of a model that engines report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Its name.
    pub id: String,
    /// Most tokens of prompt and answer together. Where servers differ, the smallest number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u64>,
    /// Where the engine loaded it from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// The base model of an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Whose it is, by the engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owned_by: Option<String>,
}

impl ModelCard {
    /// A card with a name only.
    #[must_use]
    pub fn new(id: &str) -> Self {
        Self { id: id.to_owned(), ..Self::default() }
    }

    /// The card of a model that two servers report: the smaller length, and each text from the first one that has it.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let max_model_len = match (self.max_model_len, other.max_model_len) {
            (Some(one), Some(two)) => Some(one.min(two)),
            (one, two) => one.or(two),
        };
        Self {
            id: self.id,
            max_model_len,
            root: self.root.or(other.root),
            parent: self.parent.or(other.parent),
            owned_by: self.owned_by.or(other.owned_by),
        }
    }
}
