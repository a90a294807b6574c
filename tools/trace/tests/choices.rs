//! pd-core's choices on made-up loads, small enough for every test run: `make sim` has the large ones.

use pd_bench::trace::Entry;
use pd_sim::Timing;
use pd_trace::filter::Brains;
use pd_trace::generate::Shape;
use pd_trace::late::Classes;
use pd_trace::load::{Load, Pods};
use pd_trace::outcome::Outcome;
use pd_trace::rules::Policy;
use pd_trace::sim::{DecodeBy, Other, Setup, run};

/// They compute one prompt after another, as the ledger takes servers to. With steps of several prompts the 90th percentile is 1.12 × that of
/// one for four gateways, and 1.04 × that of right coefficients for fitted ones.
const PODS: Pods = Pods { fast_tokens: 400_000, decode_cache_tokens: 0, batch_tokens: 0, ..Pods::new(4, 4, 2_000_000) };

/// Of the made-up twenty minutes.
const SPAN_MS: f64 = 300_000.0;

fn outcome(shape: Shape, policy: Policy, brains: &Brains) -> Outcome {
    outcome_beside(Other::default(), shape, policy, brains)
}

/// Of the requests that do not come through another gateway.
fn outcome_beside(other: Other, shape: Shape, policy: Policy, brains: &Brains) -> Outcome {
    let timing = Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() });
    let entries: Vec<Entry> = shape.entries(1).into_iter().filter(|entry| entry.at_ms < SPAN_MS).collect();
    let load = Load::new(&entries, &PODS, &timing, 0.7, 1);
    let setup = Setup {
        pods: &PODS,
        timing: &timing,
        brains,
        classes: Classes::default(),
        decode_by: DecodeBy::Tokens,
        closed_loop: false,
        other,
        seed: 1,
    };
    let outcome = run(&load, policy, &setup, || ()).unwrap();
    if other.share == 0.0 {
        assert_eq!(outcome.requests, load.len() - load.warm_up());
    }
    assert_eq!(outcome.ttft.len(), outcome.requests, "every request got its first token");
    outcome
}

fn ours_and_with_true_state(shape: Shape) -> (Outcome, Outcome) {
    (outcome(shape, Policy::PdCore, &Brains::default()), outcome(shape, Policy::GreedyLoad, &Brains::default()))
}

#[test]
fn the_same_load_and_seed_give_the_same_figures() {
    let exchange = Some(std::time::Duration::from_millis(50));
    for brains in [Brains::default(), Brains { count: 3, workers: 2, exchange, ..Brains::default() }] {
        let twice = || outcome(Shape::SharedPrefix, Policy::PdCore, &brains);
        assert_eq!(twice(), twice());
    }
}

#[test]
fn agents_find_what_they_left_as_if_everything_were_known() {
    let (ours, truth) = ours_and_with_true_state(Shape::Agents);
    assert!(ours.hit_percent() > 0.97 * truth.hit_percent(), "{} {}", ours.hit_percent(), truth.hit_percent());
    // Five minutes at this load are a few queues that come and go: their highest tenth is chance.
    let constant = outcome(Shape::Agents, Policy::GreedyTrue, &Brains::default());
    assert!(ours.mean_ttft() < constant.mean_ttft(), "{} {}", ours.mean_ttft(), constant.mean_ttft());
}

#[test]
fn shared_prefixes_are_found_and_spread() {
    let (ours, truth) = ours_and_with_true_state(Shape::SharedPrefix);
    assert!(ours.hit_percent() > 0.95 * truth.hit_percent(), "{} {}", ours.hit_percent(), truth.hit_percent());
    assert!(ours.ttft(0.9) < 1.1 * truth.ttft(0.9), "{} {}", ours.ttft(0.9), truth.ttft(0.9));
    assert!(ours.busy_over_mean() < 1.05, "{}", ours.busy_over_mean());
}

#[test]
fn without_prefixes_it_is_hardly_worse_than_least_work_anywhere_and_better_on_average() {
    let ours = outcome(Shape::Unique, Policy::PdCore, &Brains::default());
    let least = outcome(Shape::Unique, Policy::LeastWork, &Brains::default());
    // Short prompts stand behind long ones less often, and so some long ones wait longer.
    for (share, bound) in [(0.5, 0.95), (0.9, 1.02), (0.99, 1.25)] {
        assert!(ours.ttft(share) < bound * least.ttft(share), "{share}: {} {}", ours.ttft(share), least.ttft(share));
    }
    assert!(ours.mean_ttft() < 0.97 * least.mean_ttft(), "{} {}", ours.mean_ttft(), least.mean_ttft());
    assert_eq!(ours.hit_percent(), 0.0);
}

#[test]
fn wrong_coefficients_are_corrected_while_it_serves() {
    let config = |fit: bool| {
        // As if every prompt took nearly the same: queues are counted in requests.
        let pool = serde_json::json!({"fit": fit, "cost": {"a_ms": 100.0, "b_us": 4.0, "c_ns": 0.08}});
        Brains { config: serde_json::json!({"pools": {"default": pool}}), ..Brains::default() }
    };
    let [fitted, fixed] = [true, false].map(|fit| outcome(Shape::Unique, Policy::PdCore, &config(fit)));
    let right = outcome(Shape::Unique, Policy::PdCore, &Brains::default());
    let off = |outcome: &Outcome| outcome.ttft(0.9) / right.ttft(0.9);
    assert!(off(&fitted) < 1.03 && off(&fixed) > 1.1, "{} {}", off(&fitted), off(&fixed));
}

/// Whether several brains hit as much as one, with a time to the first token at most so many times as long.
fn nearly_as_one(brains: &Brains, slower: f64) {
    let one = outcome(Shape::SharedPrefix, Policy::PdCore, &Brains::default());
    let several = outcome(Shape::SharedPrefix, Policy::PdCore, brains);
    assert!(several.hit_percent() > 0.95 * one.hit_percent(), "{} {}", several.hit_percent(), one.hit_percent());
    assert!(several.ttft(0.9) < slower * one.ttft(0.9), "{} {}", several.ttft(0.9), one.ttft(0.9));
}

#[test]
fn workers_of_one_gateway_choose_as_one() {
    nearly_as_one(&Brains { workers: 16, ..Brains::default() }, 1.05);
}

#[test]
fn gateways_that_exchange_choose_nearly_as_one() {
    // What is left is the age of what they know of each other, 50 to 100 ms.
    for (count, slower) in [(4, 1.12), (16, 1.18)] {
        let exchange = Some(std::time::Duration::from_millis(50));
        nearly_as_one(&Brains { count, exchange, ..Brains::default() }, slower);
    }
}

/// Two gateways of ours that exchange, with a gateway of another make that sends its share to two of the four servers.
fn beside(share: f64, reports: Option<u64>) -> Outcome {
    let brains = Brains { count: 2, exchange: Some(std::time::Duration::from_millis(50)), ..Brains::default() };
    let other = Other { share, servers: 2, reports: reports.map(std::time::Duration::from_secs) };
    outcome_beside(other, Shape::Unique, Policy::PdCore, &brains)
}

#[test]
fn what_engines_report_makes_up_for_a_part_of_what_another_gateway_spoils() {
    let [unknown, reported] = [None, Some(1)].map(|reports| beside(0.3, reports));
    assert!(reported.mean_ttft() < 0.95 * unknown.mean_ttft(), "{} {}", reported.mean_ttft(), unknown.mean_ttft());
    assert!(reported.ttft(0.9) < unknown.ttft(0.9), "{} {}", reported.ttft(0.9), unknown.ttft(0.9));
}

#[test]
fn what_engines_report_costs_nothing_without_another_gateway() {
    let [unknown, reported] = [None, Some(1)].map(|reports| beside(0.0, reports));
    for (reported, unknown) in [
        (reported.mean_ttft(), unknown.mean_ttft()),
        (reported.ttft(0.9), unknown.ttft(0.9)),
        (reported.ttft(0.99), unknown.ttft(0.99)),
    ] {
        assert!(reported < 1.01 * unknown, "{reported} {unknown}");
    }
}
