//! pd-control killed, paused and restarted while requests flow: none fails, and the list is current again soon after.

use std::time::Duration;

use pd_support::file::replace;
use pd_tests::rig::{Rig, endpoints_file, entries, run};
use pd_tests::traffic::Traffic;

/// How soon requests go by the list again, once pd-control is back: its filter looks every second at the latest.
const SOON: Duration = Duration::from_secs(5);

/// A list in which one of the decode engines gets nothing.
fn without(rig: &Rig, out: usize) -> String {
    let mut list: Vec<_> = entries(&rig.prefill, "prefill").chain(entries(&rig.decode, "decode")).collect();
    list[rig.prefill.len() + out]["state"] = "draining".into();
    endpoints_file(&list)
}

#[test]
fn pd_control_is_killed_paused_and_restarted_under_load() {
    run(async {
        let mut rig = Rig::start().await;
        let traffic = Traffic::start(rig.address(), 8);
        let mut longest = Duration::ZERO;
        for round in 0..9 {
            let out = round % 2;
            let edit = |rig: &Rig| replace(&rig.endpoints_path(), &without(rig, out)).expect("replaced");
            match round % 3 {
                // Killed while it reads the new list, or before.
                0 => {
                    edit(&rig);
                    rig.kill_control();
                    traffic.more(60).await;
                    rig.start_control().await;
                }
                // Paused: connections stay, nobody answers.
                1 => {
                    rig.signal_control("STOP");
                    edit(&rig);
                    traffic.more(200).await;
                    rig.signal_control("CONT");
                }
                // Told to stop, as in a rollout; the list changes between the two.
                _ => {
                    rig.signal_control("TERM");
                    traffic.more(20).await;
                    rig.kill_control();
                    edit(&rig);
                    rig.start_control().await;
                }
            }
            longest = longest.max(traffic.until_spared(&rig.decode[out]).await);
        }
        let answered = traffic.stop().await;
        println!("{answered} requests, none failed; the list was current again within {longest:?}");
        assert!(longest < SOON, "{longest:?}");
        rig.until_idle().await;
    });
}
