//! Both roles follow a load that turns, each by itself, without flapping, and near what an oracle needs.

use std::time::Duration;

use pd_trace::autoscale::{Scaling, Setup, load, repeated, run, there_and_back};

const PHASE: Duration = Duration::from_secs(5_400);

#[test]
fn both_roles_follow_a_load_that_turns_and_back() {
    let (requests, setup) = (load(&there_and_back(PHASE), 1), Setup::default());
    let ours = run(&requests, Scaling::Autoscaler, &setup).unwrap();
    // An oracle that loads servers more serves fewer than 95 % well, or needs hardly fewer.
    let oracle = run(&requests, Scaling::Oracle([0.95; 2]), &setup).unwrap();
    assert!(oracle.goodput() >= 0.95, "{}", oracle.goodput());
    assert!(ours.goodput() >= 0.95, "{}", ours.goodput());
    assert!(ours.turns().iter().all(|turns| *turns <= 2), "{:?}", ours.turns());
    let sum = |seconds: [f64; 2]| seconds.iter().sum::<f64>();
    let ratio = sum(ours.server_seconds) / sum(oracle.server_seconds);
    assert!(ratio <= 1.15, "{ratio}");
}

#[test]
fn one_prompt_again_and_again_scales_decode_only() {
    let requests = load(&repeated(PHASE), 1);
    let ours = run(&requests, Scaling::Autoscaler, &Setup::default()).unwrap();
    let second = PHASE.as_secs() as usize;
    let most = |role: usize, seconds: &[pd_trace::autoscale::Second]| seconds.iter().map(|it| it.servers[role]).max();
    let (before, after) = ours.seconds.split_at(second);
    assert!(most(0, after) <= most(0, before), "prefill grew");
    assert!(most(1, after) > most(1, before), "decode did not grow");
    assert_eq!(ours.seconds.last().unwrap().servers[0], 1, "nothing is left for prefill");
}
