//! The price of a second of prefill work where a server is chosen when the request comes.

/// `w` of `W + w·S` at one endpoint: what a second of work there costs all, in seconds. `legs_there`: prompts in flight at
/// the endpoint, waiting or computed; `legs_each`: those at each endpoint that may be chosen, on average.
///
/// `w = 1 + legs_there + legs_each`. The second counts once for the request itself. It counts once for each prompt that
/// comes to stand behind it before the endpoint has caught up: about as many as stand there now. And a prompt that is computed
/// anew displaces as much from the endpoint's cache, which others have to compute again, before those that stand there then:
/// `legs_each`. An idle pool gives 1: the endpoint that is through first.
///
/// A constant is right at one load only: 3 leaves warm endpoints too early when much waits, and each departure adds to what
/// waits; 30 makes short prompts stand behind long ones when little waits. `1 + 2·legs_each` keeps prompts at a busy endpoint
/// while another one is idle. Negative numbers count as 0.
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
