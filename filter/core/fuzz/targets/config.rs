//! Any configuration is taken or refused with a message; what is taken can be used.
#![no_main]

use pd_core::config::Config;
use pd_core::worker::Worker;

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    match Config::parse(text) {
        Ok(config) => {
            let cost = config.pool("default").cost;
            assert!(cost.seconds(1e6, 1e3).is_finite());
            let mut worker = Worker::default();
            worker.configure(text).unwrap();
            assert_eq!(worker.state.table.len(), config.endpoints.len());
            assert!(worker.configure(b"{\"unknown\":1}").is_err());
            assert_eq!(worker.config.unwrap().as_ref(), &config, "a refused configuration changes nothing");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
