use pd_core::prefix::hash::prompt_hash;

use super::*;

const PODS: Pods = Pods { decode_cache_tokens: 0, ..Pods::new(4, 2, 100_000) };

fn job(blocks: &[u64], at_ms: u64) -> Job {
    let tokens = blocks.len() as u64 * BLOCK_TOKENS;
    Job { at: Duration::from_millis(at_ms), tokens, output: 3, blocks: blocks.to_vec() }
}

fn serve(filter: &mut Filter, number: usize, job: &Job) -> usize {
    let prefill = filter.arrive(number, job, job.at).unwrap();
    assert!(filter.prefilled(number, job.at).unwrap() < PODS.decode);
    filter.first_token(number, job.at);
    filter.done(number, job.at);
    prefill
}

#[test]
fn text_is_as_long_as_the_prompt_and_cut_blocks_begin_alike() {
    let whole = job(&[1, 2, 3], 0);
    let cut = Job { tokens: 1_100, ..whole.clone() };
    let (whole, cut) = (prompt(&whole), prompt(&cut));
    assert_eq!((whole.len(), cut.len()), (3 * TEXT_BYTES + 2, 552));
    assert_eq!(whole[..551], cut[..551]);
    assert_ne!(prompt(&job(&[1], 0)), prompt(&job(&[2], 0)));
}

#[test]
fn the_next_turn_goes_where_the_one_before_went() {
    let mut filter = Filter::new(&PODS, &Brains::default(), 1).unwrap();
    for number in 0..20 {
        let id = 100 * (number as u64 + 1);
        let first = serve(&mut filter, 2 * number, &job(&[id, id + 1], 0));
        assert_eq!(serve(&mut filter, 2 * number + 1, &job(&[id, id + 1, id + 2], 1)), first);
    }
}

#[test]
fn workers_of_a_gateway_know_of_each_other_at_once() {
    let brains = Brains { workers: 4, ..Brains::default() };
    let mut filter = Filter::new(&PODS, &brains, 1).unwrap();
    for number in 0..200 {
        // Half of them end. Each prefill server has the same number of the others, whichever gateway sent them.
        let now = Duration::from_millis(10 * number as u64);
        let new = Job { at: now, ..job(&[2 * number as u64 + 1_000], 0) };
        let _ =
            if number % 2 == 0 { serve(&mut filter, number, &new) } else { filter.arrive(number, &new, now).unwrap() };
    }
    let now = Monotonic::from_secs(2);
    filter.catch_up(now);
    let queues =
        |worker: &Worker| worker.state.table.iter().map(|(_, state)| state.prefill.work(now)).collect::<Vec<_>>();
    let all: Vec<_> = filter.states.iter().map(queues).collect();
    let is_like = |queues: &Vec<f64>| queues.iter().zip(&all[0]).all(|(a, b)| (a - b).abs() < 1e-3);
    assert!(all.iter().all(is_like), "{all:?}");
    assert!(all[0].iter().sum::<f64>() > 1.0, "{all:?}");
}

#[test]
fn gateways_know_of_each_other_after_two_ticks() {
    let brains = Brains { count: 2, exchange: Some(Duration::from_millis(50)), ..Brains::default() };
    let mut filter = Filter::new(&PODS, &brains, 1).unwrap();
    let text = prompt(&job(&[1, 2], 0));
    let blocks = prompt_hash(b"m", b"", &[&text], HASH_BLOCK_BYTES).blocks;
    // They find each other first.
    filter.catch_up(Monotonic::from_secs(3));
    serve(&mut filter, 0, &job(&[1, 2], 3_010));
    let knowing = |filter: &Filter| filter.states.iter().filter(|worker| worker.state.index.knows(blocks[0])).count();
    filter.catch_up(Monotonic::from_millis(3_049));
    assert_eq!(knowing(&filter), 1);
    filter.catch_up(Monotonic::from_millis(3_100));
    assert_eq!(knowing(&filter), 2);
    for worker in &filter.states {
        assert!(
            worker.state.table.iter().all(|(_, state)| state.work(Monotonic::from_secs(4)) == 0.0),
            "what began is over"
        );
    }
}
