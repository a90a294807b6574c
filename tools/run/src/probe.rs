//! Asking what was started whether it is ready.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use pd_support::client::{self, Answer};

/// How long one question may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Pause between two questions.
const PAUSE: Duration = Duration::from_millis(50);

/// The answer to a GET.
///
/// # Errors
/// When there is no whole answer in time.
pub async fn get(address: SocketAddr, path: &str) -> anyhow::Result<Answer> {
    Ok(tokio::time::timeout(ANSWER_LIMIT, client::get(address, path)).await.context("no answer in time")??)
}

/// Asks until the answer is a 200 whose body is as wanted.
///
/// # Errors
/// Says what the last answer was, when `limit` is over.
pub async fn wait(
    address: SocketAddr,
    path: &str,
    limit: Duration,
    is_wanted: impl Fn(&str) -> bool,
) -> anyhow::Result<()> {
    let mut last = String::new();
    let asked = async {
        loop {
            last = match get(address, path).await {
                Ok(answer) if answer.status == 200 && is_wanted(&answer.text()) => return,
                Ok(answer) => format!("status {} {}", answer.status, answer.text().trim()),
                Err(error) => format!("{error:#}"),
            };
            tokio::time::sleep(PAUSE).await;
        }
    };
    let in_time = tokio::time::timeout(limit, asked).await;
    in_time.with_context(|| format!("http://{address}{path} is not as expected after {} s: {last}", limit.as_secs()))
}
