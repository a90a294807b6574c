//! Asking what was started whether it is ready.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

/// How long one question may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Pause between two questions.
const PAUSE: Duration = Duration::from_millis(50);

/// Status and body of a GET.
///
/// # Errors
/// When there is no whole answer in time.
pub async fn get(address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let answer = async {
        let response = client.get(format!("http://{address}{path}").parse()?).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        anyhow::Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    tokio::time::timeout(ANSWER_LIMIT, answer).await.context("no answer in time")?
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
                Ok((200, body)) if is_wanted(&body) => return,
                Ok((status, body)) => format!("status {status} {}", body.trim()),
                Err(error) => format!("{error:#}"),
            };
            tokio::time::sleep(PAUSE).await;
        }
    };
    let in_time = tokio::time::timeout(limit, asked).await;
    in_time.with_context(|| format!("http://{address}{path} is not as expected after {} s: {last}", limit.as_secs()))
}
