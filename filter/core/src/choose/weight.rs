//! The affinity weight that follows the load.

/// `w` of `W + w·S` at one endpoint: the seconds that one second of work there costs all requests together.
///
/// - `legs_there`: prompts in flight at the endpoint, waiting or computed.
/// - `legs_each`: the mean of that number over the endpoints that may be chosen.
/// - Negative numbers count as 0.
///
/// `w = 1 + legs_there + legs_each`, so an idle pool has 1 and the prompt goes to the endpoint that is ready first.
/// - 1 for the request itself.
/// - `legs_there` for the prompts that come behind it before the endpoint has caught up: about as many as are there now.
/// - `legs_each` because a prompt that is computed anew displaces as much from the endpoint's cache, and others have to
///   compute that again.
///
/// Alternatives:
/// - 3 leaves warm endpoints too early at a high load, and each departure adds work.
/// - 30 makes short prompts wait behind long ones at a low load.
/// - `1 + 2·legs_each` keeps prompts at a busy endpoint while another one is idle.
#[must_use]
pub fn affinity_weight(legs_there: f64, legs_each: f64) -> f64 {
    1.0 + legs_there.max(0.0) + legs_each.max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_price_follows_what_is_in_flight() {
        assert_eq!(affinity_weight(0.0, 0.0), 1.0);
        assert_eq!(affinity_weight(0.0, 1.0), 2.0);
        assert_eq!(affinity_weight(10.0, 5.0), 16.0);
        assert_eq!(affinity_weight(-1.0, -1.0), 1.0);
    }
}
