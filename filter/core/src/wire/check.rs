//! Checks a list, and says why a list is refused.

use core::net::SocketAddr;

use hashbrown::HashSet;

use super::card::ModelCard;
use super::endpoint::{Endpoint, EndpointId};
use super::error::{MAX_CARD_BYTES, MAX_CARDS, MAX_ENDPOINTS, MAX_MODELS, MAX_NAME_BYTES, WIRE_VERSION, WireError};
use super::snapshot::Snapshot;
use super::stated::Stated;

impl Snapshot {
    /// Reads and checks a snapshot; it is taken whole or not at all.
    ///
    /// # Errors
    /// [`WireError`] for anything but a well-formed snapshot of [`WIRE_VERSION`].
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let snapshot: Self = serde_json::from_slice(bytes).map_err(|error| WireError::Malformed(error.to_string()))?;
        snapshot.validate()?;
        Ok(snapshot)
    }

    /// Checks versions, the number of endpoints, each endpoint, and that no endpoint is listed twice.
    ///
    /// # Errors
    /// As [`Snapshot::parse`].
    pub fn validate(&self) -> Result<(), WireError> {
        if self.wire != WIRE_VERSION {
            return Err(WireError::Version(self.wire));
        }
        if self.base.is_some_and(|base| base >= self.version) {
            return Err(WireError::Malformed("base must be below version".to_owned()));
        }
        if self.endpoints.len() > MAX_ENDPOINTS || self.removed.len() > MAX_ENDPOINTS {
            return Err(WireError::TooMany);
        }
        let mut seen = HashSet::with_capacity(self.endpoints.len());
        for endpoint in &self.endpoints {
            endpoint.validate()?;
            if !seen.insert(endpoint.id()) {
                return Err(WireError::Duplicate(endpoint.id()));
            }
        }
        for id in &self.removed {
            id.parse::<EndpointId>()?;
        }
        if self.models.len() > MAX_CARDS {
            return Err(WireError::Malformed(format!("more than {MAX_CARDS} models")));
        }
        if let Some(card) = self.models.iter().find(|card| !card.is_valid()) {
            let why = format!("models: {:.64}: a name or a text is empty or too long", card.id);
            return Err(WireError::Malformed(why));
        }
        self.stated.as_ref().map_or(Ok(()), Stated::validate)
    }
}

impl Endpoint {
    /// Checks what the types alone do not say.
    ///
    /// # Errors
    /// [`WireError::BadEndpoint`] names the endpoint and the key.
    pub fn validate(&self) -> Result<(), WireError> {
        let bad = |key: &'static str, why: &'static str| WireError::BadEndpoint { id: self.id(), key, why };
        if self.address.port() == 0 {
            return Err(bad("address", "port must not be 0"));
        }
        // Envoy names no zone in the addresses of hosts, so such an endpoint would never be known again.
        if matches!(self.address, SocketAddr::V6(address) if address.scope_id() != 0) {
            return Err(bad("address", "must not have a zone"));
        }
        if self.bootstrap_port == Some(0) {
            return Err(bad("bootstrap_port", "must not be 0"));
        }
        if self.min_prompt_tokens.zip(self.max_prompt_tokens).is_some_and(|(min, max)| min > max) {
            return Err(bad("max_prompt_tokens", "must not be below min_prompt_tokens"));
        }
        if self.address.ip().is_unspecified() {
            return Err(bad("address", "must not be the unspecified address"));
        }
        if !(0.01..=100.0).contains(&self.weight) {
            return Err(bad("weight", "must be between 0.01 and 100"));
        }
        if self.models.len() > MAX_MODELS {
            return Err(bad("models", "too many"));
        }
        let names = [
            ("pool", Some(&self.pool)),
            ("group", self.group.as_ref()),
            ("revision", self.revision.as_ref()),
            ("container", self.container.as_ref()),
        ];
        for (key, name) in names.into_iter().chain(self.models.iter().map(|model| ("models", Some(model)))) {
            if let Some(name) = name
                && (name.is_empty() || name.len() > MAX_NAME_BYTES)
            {
                return Err(bad(key, "names must have 1 to 256 bytes"));
            }
        }
        Ok(())
    }
}

impl ModelCard {
    /// Whether a snapshot may have the card.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let texts = [&self.root, &self.parent, &self.owned_by];
        !self.id.is_empty()
            && self.id.len() <= MAX_NAME_BYTES
            && texts.into_iter().flatten().all(|text| text.len() <= MAX_CARD_BYTES)
    }
}

impl core::str::FromStr for EndpointId {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        let bad = || WireError::BadId(text.to_owned());
        let (address, rank) = match text.split_once('#') {
            None => (text, None),
            Some((address, rank)) => (address, Some(rank.parse().map_err(|_| bad())?)),
        };
        Ok(Self { address: address.parse().map_err(|_| bad())?, rank })
    }
}
