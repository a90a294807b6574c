//! Waiting for what has to come true.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Longest time for anything that a test waits for: far above the usual time, and short enough for a person.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks.
pub(crate) const PAUSE: Duration = Duration::from_millis(3);

/// Waits until `look` finds something.
///
/// # Panics
/// When [`PATIENCE`] is over, saying `what` was waited for.
pub async fn until<T>(what: impl Display, look: impl AsyncFnMut() -> Option<T>) -> T {
    within(PATIENCE, PAUSE, what, look).await
}

/// Waits until a condition holds.
///
/// # Panics
/// As [`until`].
pub async fn until_true(what: impl Display, mut condition: impl AsyncFnMut() -> bool) {
    until(what, async || condition().await.then_some(())).await;
}

/// Waits until `look`, with `pause` between two looks, finds something.
///
/// # Panics
/// When `limit` is over, saying `what` was waited for.
pub async fn within<T>(
    limit: Duration,
    pause: Duration,
    what: impl Display,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(pause).await;
    }
}

/// Waits until a condition holds, and blocks this thread.
///
/// # Panics
/// When `limit` is over, saying `what` was waited for.
pub fn block_until(limit: Duration, what: impl Display, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(PAUSE);
    }
}
