//! The price of a second of prefill work where a server is chosen when the request comes.

/// `w` of `W + w·S`: what a second of work at one of `servers` costs all, in seconds, while `requests` prompts are in
/// flight at them, waiting or computed.
///
/// `w = 1 + 2·requests/servers`. The second counts once for the request itself. It counts once for each prompt that comes
/// to stand behind it before the server has caught up: about as many as stand there now, `requests/servers`. And it counts
/// once more for each of these, because a prompt that is computed anew displaces as much from the server's cache, which
/// one of them has to compute again. An idle pool gives 1: the server that is through first.
///
/// A constant is right at one load only: 3 leaves warm servers too early when much waits, and each departure adds to what
/// waits; 30 makes short prompts stand behind long ones when little waits.
#[must_use]
pub fn affinity_weight(requests: usize, servers: usize) -> f64 {
    1.0 + 2.0 * requests as f64 / servers.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_price_follows_what_is_in_flight_per_server() {
        assert_eq!(affinity_weight(0, 8), 1.0);
        assert_eq!(affinity_weight(8, 8), 3.0);
        assert_eq!(affinity_weight(80, 8), 21.0);
        assert_eq!(affinity_weight(3, 0), 7.0, "no server counts as one");
    }
}
