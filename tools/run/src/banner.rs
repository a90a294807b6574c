//! What to do next, once everything runs.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

/// What the text names.
pub struct Banner<'a> {
    /// Where clients connect.
    pub gateway: SocketAddr,
    /// Envoy's own pages.
    pub admin: SocketAddr,
    /// `pd-control`.
    pub control: SocketAddr,
    /// File to edit.
    pub endpoints: &'a Path,
    /// Directory of the logs.
    pub logs: &'a Path,
    /// Model to ask for.
    pub model: &'a str,
}

impl Banner<'_> {
    /// A command whose prompt is long enough to be split.
    fn curl(&self) -> String {
        let model = serde_json::Value::from(self.model);
        format!(
            "curl -s http://{}/v1/chat/completions -H 'content-type: application/json' \\\n    \
             -d '{{\"model\":{model},\"max_tokens\":16,\"messages\":[{{\"role\":\"user\",\"content\":\"Add up: '\"$(seq -s ' ' 800)\"'\"}}]}}'",
            self.gateway
        )
    }

    /// The text.
    pub fn text(&self) -> String {
        let Self { admin, control, endpoints, logs, .. } = self;
        let mut text = String::from("\nReady. Ask something long, in another terminal:\n\n");
        let _ = write!(text, "  {}\n\n", self.curl());
        text.push_str(
            "The access log line that then appears here says what became of it: \"decision\":\"split\", and which\n",
        );
        text.push_str("endpoints served its \"prefill\" and its \"decode\".\n\n");
        for (what, how) in [
            (
                "endpoints",
                format!("edit {}, routing follows; in force: curl http://{control}/v1/endpoints", endpoints.display()),
            ),
            ("metrics", format!("curl -s http://{admin}/stats/prometheus | grep ^pd_")),
            ("admin", format!("http://{admin}/")),
            ("logs", format!("{}/*.log", logs.display())),
            ("stop", "Ctrl-C".to_owned()),
        ] {
            let _ = writeln!(text, "  {what:<11}{how}");
        }
        text
    }
}
