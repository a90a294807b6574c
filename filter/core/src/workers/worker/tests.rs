use super::*;
use crate::workers::shared::testing::Store;

const GOOD: &[u8] = br#"{"revision":"1"}"#;
const BAD: &[u8] = br#"{"unknown":1}"#;

fn revision(worker: &Worker) -> Option<&str> {
    worker.config.as_ref().ok().map(|config| config.revision.as_str())
}

#[test]
fn a_worker_that_starts_with_a_bad_configuration_takes_the_last_good_one() {
    let store = Store::default();
    let (mut first, mut second) = (Worker::default(), Worker::default());
    assert!(matches!(first.configure_or_last_good(GOOD, &store), Configured::New(_)));
    let configured = second.configure_or_last_good(BAD, &store);
    assert!(matches!(configured, Configured::LastGood(..)), "{configured:?}");
    assert_eq!(revision(&second), Some("1"));
    let counted = [Metric::ConfigRefused, Metric::ConfigAccepted].map(|metric| second.counts.pending(metric));
    assert_eq!(counted, [1, 1]);
}

#[test]
fn without_a_good_configuration_requests_get_the_refusal() {
    let store = Store::default();
    let mut worker = Worker::default();
    let Configured::Refused(refusal) = worker.configure_or_last_good(BAD, &store) else { panic!() };
    assert!(refusal.to_string().contains("unknown"), "{refusal}");
    assert_eq!(worker.config, Err(refusal));
    assert_eq!(store.get(LAST_GOOD_CONFIG_KEY), None);
}

#[test]
fn a_refused_configuration_is_not_the_last_good_one() {
    let store = Store::default();
    let mut worker = Worker::default();
    worker.configure_or_last_good(GOOD, &store);
    worker.configure_or_last_good(BAD, &store);
    assert_eq!(store.get(LAST_GOOD_CONFIG_KEY).map(|(text, _)| text).as_deref(), Some(GOOD));
    assert_eq!(revision(&worker), Some("1"));
}
