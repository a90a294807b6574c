//! The endpoint list: valid, sorted, each endpoint once. Also the texts of roles and states.

use std::collections::BTreeMap;

use pd_core::wire::{Endpoint, EndpointId, MAX_CARDS, ModelCard, Role, Snapshot, State, Stated, WireError};

/// A list that may be published.
///
/// Every endpoint is valid, no endpoint is listed twice, and they are sorted by name (address and rank). A list may be
/// empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EndpointList {
    endpoints: Vec<Endpoint>,
    cards: BTreeMap<String, ModelCard>,
    stated: Stated,
}

impl EndpointList {
    /// Checks and sorts a list.
    ///
    /// # Errors
    /// The first [`WireError`] for which a filter would refuse the list.
    pub fn new(mut endpoints: Vec<Endpoint>) -> Result<Self, WireError> {
        endpoints.sort_by_key(Endpoint::id);
        let snapshot = Snapshot::whole("", 1, endpoints);
        snapshot.validate()?;
        Ok(Self { endpoints: snapshot.endpoints, ..Self::default() })
    }

    /// Adds objectives and aliases.
    ///
    /// # Errors
    /// The [`WireError`] for which a filter would refuse them.
    pub fn with_stated(mut self, stated: Stated) -> Result<Self, WireError> {
        stated.validate()?;
        self.stated = stated;
        Ok(self)
    }

    /// Objectives and aliases from objects of the Kubernetes cluster.
    #[must_use]
    pub fn stated(&self) -> &Stated {
        &self.stated
    }

    /// Adds the cards that engines report, for models that an endpoint of the list serves. Cards that a snapshot cannot have
    /// are left out.
    #[must_use]
    pub fn with_cards<'a>(mut self, reported: impl Iterator<Item = &'a ModelCard>) -> Self {
        let mut cards: BTreeMap<&str, Option<ModelCard>> =
            self.endpoints.iter().flat_map(|it| &it.models).map(|model| (model.as_str(), None)).collect();
        for card in reported.filter(|card| card.is_valid()) {
            if let Some(known) = cards.get_mut(card.id.as_str()) {
                *known = Some(known.take().map_or_else(|| card.clone(), |known| known.or(card.clone())));
            }
        }
        let cards = cards.into_values().flatten().take(MAX_CARDS);
        self.cards = cards.map(|card| (card.id.clone(), card)).collect();
        self
    }

    /// The cards of models, by name.
    #[must_use]
    pub fn cards(&self) -> &BTreeMap<String, ModelCard> {
        &self.cards
    }

    /// The endpoints, sorted by name.
    #[must_use]
    pub fn as_slice(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The endpoint of this name; `None` when the list has none.
    #[must_use]
    pub fn get(&self, id: EndpointId) -> Option<&Endpoint> {
        let index = self.endpoints.binary_search_by_key(&id, Endpoint::id).ok()?;
        self.endpoints.get(index)
    }
}

/// Counts a list for people: `4 endpoints (2 prefill, 2 decode)`.
#[must_use]
pub fn summary(endpoints: &[Endpoint]) -> String {
    let counts = [(Role::Prefill, "prefill"), (Role::Decode, "decode"), (Role::Both, "both")]
        .map(|(role, name)| (endpoints.iter().filter(|endpoint| endpoint.role == role).count(), name));
    let roles: Vec<_> = counts.iter().filter(|(count, _)| *count > 0).map(|(n, name)| format!("{n} {name}")).collect();
    let plural = if endpoints.len() == 1 { "" } else { "s" };
    let roles = if roles.is_empty() { String::new() } else { format!(" ({})", roles.join(", ")) };
    format!("{} endpoint{plural}{roles}", endpoints.len())
}

/// A role as endpoints files write it.
#[must_use]
pub fn role(role: Role) -> &'static str {
    match role {
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Both => "both",
    }
}

/// A state as endpoints files write it.
#[must_use]
pub fn state(state: State) -> &'static str {
    match state {
        State::Ready => "ready",
        State::Draining => "draining",
        State::Down => "down",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_with_a_name_twice_is_refused() {
        let endpoint = Endpoint::new(([10, 0, 0, 1], 8000).into(), Role::Both);
        let twice = EndpointList::new(vec![endpoint.clone(), endpoint]);
        assert!(matches!(twice, Err(WireError::Duplicate(_))));
    }
}
