//! Which workers there are: each holds a seat and renews it.

use core::time::Duration;

use crate::codec::{Reader, Writer};
use crate::workers::shared::{ABSENT, Shared};

/// Workers of one Envoy that share; more decide for themselves alone. Two generations of 31 and the main thread's.
pub const SEATS: usize = 64;
/// Time without renewal after which a seat is free and its worker's ledger retracted.
const SEAT_LIFE: Duration = Duration::from_millis(700);
pub(super) const SEATS_KEY: &str = "pd/1/seats";

/// The seat of one worker.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seat {
    pub(super) worker_id: u64,
    pub(super) renewed: Duration,
}

impl Seat {
    /// Whether its worker is alive.
    pub(super) fn is_taken(&self, now: Duration) -> bool {
        self.worker_id != 0 && now.saturating_sub(self.renewed) <= SEAT_LIFE
    }
}

/// The seats, and the version to write them with.
pub(super) fn seats(shared: &impl Shared) -> (Vec<Seat>, u32) {
    let value = shared.get(SEATS_KEY);
    let mut seats = vec![Seat::default(); SEATS];
    let mut rest = Reader(value.as_ref().map_or(&[], |(bytes, _)| bytes));
    for seat in &mut seats {
        if let (Some(worker_id), Some(renewed)) = (rest.word(), rest.word()) {
            *seat = Seat { worker_id, renewed: Duration::from_millis(renewed) };
        }
    }
    (seats, value.map_or(ABSENT, |(_, version)| version))
}

/// As [`seats`] reads them.
pub(super) fn to_bytes(seats: &[Seat]) -> Vec<u8> {
    let mut out = Writer::default();
    for seat in seats {
        out.word(seat.worker_id);
        out.word(u64::try_from(seat.renewed.as_millis()).unwrap_or(u64::MAX));
    }
    out.0
}
