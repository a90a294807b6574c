//! What one Envoy worker knows: configuration, endpoints, index, counts.

use core::time::Duration;
use std::sync::Arc;

use crate::config::{Config, ConfigError};
use crate::index::PrefixIndex;
use crate::metrics::{Counts, Metric};
use crate::table::{Applied, Table};
use crate::wire::{Snapshot, WireError};

/// Name of the gauge of the prefix index's bytes, in the worker that told last.
pub const INDEX_BYTES: &str = "pd_index_bytes";

/// State of one worker. All of it may be lost and built again.
#[derive(Debug)]
pub struct Worker {
    /// Configuration in force; the error that refused the newest one, when there was none before it.
    pub config: Result<Arc<Config>, ConfigError>,
    /// Endpoints.
    pub table: Table,
    /// Who holds which prefix.
    pub index: PrefixIndex,
    /// Counts that wait for the tick.
    pub counts: Counts,
    legs: u64,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            config: Err(ConfigError::none_yet()),
            table: Table::default(),
            index: PrefixIndex::new(0),
            counts: Counts::default(),
            legs: 0,
        }
    }
}

impl Worker {
    /// Puts a configuration in force. A refused one changes nothing but the counts and, when no configuration was in
    /// force before, the answer that requests get.
    ///
    /// # Errors
    /// The refusal, for the log.
    pub fn configure(&mut self, text: &[u8]) -> Result<Arc<Config>, ConfigError> {
        match Config::parse(text) {
            Ok(config) => {
                let config = Arc::new(config);
                self.counts.count(Metric::ConfigAccepted);
                self.index = PrefixIndex::new(config.prefix.index_bytes);
                self.table = Table::default();
                self.table.apply(&config.static_snapshot(), &config, &mut self.index);
                self.config = Ok(Arc::clone(&config));
                Ok(config)
            }
            Err(error) => {
                self.counts.count(Metric::ConfigRefused);
                if self.config.is_err() {
                    self.config = Err(error.clone());
                }
                Err(error)
            }
        }
    }

    /// Applies pushed bytes; anything but a good snapshot leaves the list as it is.
    ///
    /// # Errors
    /// The refusal, for the log.
    pub fn apply(&mut self, bytes: &[u8]) -> Result<Applied, WireError> {
        let Ok(config) = self.config.clone() else { return Ok(Applied::Unchanged) };
        let applied = Snapshot::parse(bytes).map(|snapshot| self.table.apply(&snapshot, &config, &mut self.index));
        match applied {
            Ok(Applied::Changed) => self.counts.count(Metric::SnapshotsApplied),
            Ok(Applied::Unchanged | Applied::OutOfStep) => {}
            Ok(Applied::Empty) | Err(_) => self.counts.count(Metric::SnapshotsRefused),
        }
        applied
    }

    /// Drops ledger entries whose end was never told. Call it a few times a second.
    pub fn prune(&mut self, now: Duration) {
        self.table.prune(now);
        if let Ok(config) = &self.config {
            self.table.resize_caches(config, &mut self.index);
        }
    }

    /// Gauges that change now and then, by name and tags: [`INDEX_BYTES`] and what was [fitted](crate::fit::GAUGES).
    pub fn gauges(&self) -> impl Iterator<Item = (String, u64)> {
        core::iter::once((INDEX_BYTES.to_owned(), self.index.bytes() as u64)).chain(self.table.fitted_gauges())
    }

    /// A number for a prefill leg, unique within the worker.
    pub(crate) fn next_leg(&mut self) -> u64 {
        self.legs = self.legs.wrapping_add(1);
        self.legs
    }
}
