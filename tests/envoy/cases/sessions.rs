//! Sessions: a conversation stays where it is.

use pd_support::body::CHAT;
use pd_support::client::BOTH;
use pd_tests::rig::{Rig, run};
use serde_json::json;

use crate::support::{assert_right, short_chat};

#[test]
fn whole_requests_of_a_session_stay_on_one_server_whichever_worker_has_them() {
    run(async {
        let rig = Rig::builder().plugin(json!({"session_cookies": ["sid"]})).start().await;
        let sessions: [&[(&str, &[u8])]; 10] = [
            &[("x-session-id", b"a")],
            &[("session_id", b"b")],
            &[("x-claude-code-session-id", b"c")],
            &[("x-session-affinity", b"d")],
            &[("agent-session-id", b"g")],
            &[("x-kilocode-taskid", b"h")],
            &[("x-openwebui-chat-id", b"i")],
            &[("x-litellm-trace-id", b"j")],
            &[("cookie", b"theme=dark; sid=e")],
            &[("x-session-id", b"f"), ("cookie", b"sid=e")],
        ];
        for session in sessions {
            rig.engines().for_each(pd_sim::Handle::clear_requests);
            for http in BOTH {
                for client in &mut rig.client_of_each_worker(http).await {
                    for _ in 0..4 {
                        let body = short_chat();
                        assert_right(&client.send(client.json(CHAT, body.clone(), session)).await, &body);
                    }
                }
            }
            let got: Vec<usize> = rig.decode.iter().map(|engine| engine.requests().len()).collect();
            assert!(got.contains(&0), "{session:?}: {got:?}");
        }
        rig.until_idle().await;
    });
}
