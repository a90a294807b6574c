//! A real Envoy takes the decisions that the simulation takes; `make sim-agree` has the large runs.

use pd_support::places;
use pd_trace::agree::{self, Setup};
use pd_trace::generate::Shape;
use pd_trace::load::Pods;

#[tokio::test(flavor = "multi_thread")]
async fn envoy_decides_as_the_simulation() {
    let mut loads = [0; 4];
    for (shape, requests) in [(Shape::Agents, 500), (Shape::SharedPrefix, 500), (Shape::Unique, 200)] {
        let mut entries = shape.entries(1);
        entries.truncate(requests);
        // Small enough for the agents' caches to overflow.
        let cache_tokens = 300_000;
        let setup = Setup {
            pods: Pods { batch_tokens: 0, ..Pods::new(4, 4, cache_tokens) },
            open: 10,
            workers: 1,
            envoy: places::envoy_path(),
            wasm: places::wasm_path(),
            out: places::root().join("target/agree"),
        };
        let found = agree::run(&entries, &setup, || ()).await.unwrap_or_else(|error| panic!("{shape:?}: {error:#}"));
        assert!(found.requests == requests && found.percent() >= 99.0, "{shape:?}: {found:?}");
        let apart = found.cached_there.abs_diff(found.cached_here) as f64 / found.tokens as f64;
        assert!(apart < 0.02, "{shape:?}: {found:?}");
        loads.iter_mut().zip(&found.loads).for_each(|(sum, requests)| *sum += requests);
    }
    assert!(loads.iter().all(|requests| *requests > 0), "not every server was chosen: {loads:?}");
}
