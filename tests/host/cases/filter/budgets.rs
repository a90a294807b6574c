//! Host calls and WebAssembly instructions of a request, against `tests/host/budgets.csv`. `make budgets`
//! (`PD_BUDGETS=write`) writes what is measured into that file.

use pd_host::{Module, ModuleOptions, Request, SharedStore, Worker};
use pd_support::budgets;

use crate::gateway::*;

const REQUESTS: u64 = 50;
/// By how much instructions may exceed their budget: hash tables have another seed in each run.
const TOLERANCE: f64 = 1.02;

/// What one request of a flow costs.
struct Cost {
    host_calls: f64,
    instructions: f64,
}

/// Mean cost of a request, after as many others.
fn cost(module: &Module, split: &str, request: impl Fn(&Worker, u64)) -> Cost {
    let config = config(&[], TWO_AND_TWO, &format!(r#""split":{{"mode":"{split}"}}"#));
    let worker = Worker::new(module, SharedStore::new(), envoy(&config)).unwrap();
    for id in 0..2 * REQUESTS {
        if id == REQUESTS {
            worker.tick();
            worker.reset_counts();
        }
        request(&worker, id);
        worker.take_logs();
    }
    let each = |sum: u64| sum as f64 / REQUESTS as f64;
    let host_calls = each(worker.host_calls().into_values().sum());
    Cost { host_calls, instructions: each(worker.fuel_used().unwrap()) }
}

#[test]
fn a_request_costs_no_more_than_its_budget() {
    let bytes = std::fs::read(pd_support::places::wasm()).unwrap();
    let module = Module::with_options(&bytes, ModuleOptions { fuel: true }).unwrap();
    let check = |request: &str, cost: Cost| {
        budgets::check(request, "host calls", cost.host_calls, 1.0);
        budgets::check(request, "instructions", cost.instructions, TOLERANCE);
    };
    for bytes in [200, 16_000] {
        let request = |id| Request::post(CHAT, chat(id, bytes));
        let split = cost(&module, "always", |worker, id| drop(run_split(worker, &request(id))));
        check(&format!("split {bytes} B"), split);
        let whole = cost(&module, "never", |worker, id| respond(&request(id).send(worker)));
        check(&format!("whole {bytes} B"), whole);
    }
    check("list of models", cost(&module, "always", |worker, _| respond(&Request::get("/v1/models").send(worker))));
}
