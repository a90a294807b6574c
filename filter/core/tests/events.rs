//! Random sequences of events; the fuzz target of the same name searches further.

#[path = "../fuzz/events.rs"]
mod events;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]
    #[test]
    fn any_order_of_events_leaves_the_worker_sane(input in prop::collection::vec(any::<u8>(), 0..400)) {
        events::run(&input);
    }
}
