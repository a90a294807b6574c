//! How many replicas each role should have, over time.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::cluster::{Cluster, OURS};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// Seconds since the start, and the replicas of prefill and decode from then on.
type Change = (f64, [i32; 2]);

/// Looks at the Deployments `prefill` and `decode` until it is dropped.
pub struct Watch {
    seen: Arc<Mutex<Vec<Change>>>,
    task: JoinHandle<()>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// Starts.
    pub fn start(cluster: &Cluster) -> Self {
        let api: Api<Deployment> = Api::namespaced(cluster.client.clone(), OURS);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let changes = Arc::clone(&seen);
        let begun = Instant::now();
        let task = tokio::spawn(async move {
            loop {
                let of = async |name| api.get(name).await.ok()?.spec?.replicas;
                if let (Some(prefill), Some(decode)) = (of("prefill").await, of("decode").await) {
                    let mut changes = changes.lock().expect("changes");
                    let now = [prefill, decode];
                    if changes.last().is_none_or(|(_, last)| *last != now) {
                        changes.push((begun.elapsed().as_secs_f64(), now));
                    }
                }
                sleep(PAUSE).await;
            }
        });
        Self { seen, task }
    }

    fn seen(&self) -> Vec<Change> {
        self.seen.lock().expect("changes").clone()
    }

    /// Replicas of prefill and decode; -1 before the first look.
    pub fn now(&self) -> [i32; 2] {
        self.seen().last().map_or([-1; 2], |(_, now)| *now)
    }

    /// Most replicas so far.
    pub fn most(&self) -> [i32; 2] {
        let seen = self.seen();
        [0, 1].map(|role| seen.iter().map(|(_, now)| now[role]).max().unwrap_or(-1))
    }

    /// How often each role changed its direction.
    pub fn turns(&self) -> [usize; 2] {
        let seen = self.seen();
        [0, 1].map(|role| {
            let changes = seen.windows(2).map(|pair| pair[1].1[role].cmp(&pair[0].1[role]));
            let mut directions: Vec<_> = changes.filter(|change| change.is_ne()).collect();
            directions.dedup();
            directions.len().saturating_sub(1)
        })
    }

    /// Seconds and replicas, for people.
    pub fn series(&self) -> String {
        self.seen().iter().fold(String::new(), |mut text, (at, [prefill, decode])| {
            let _ = write!(text, "{at:.0}s {prefill}P{decode}D  ");
            text
        })
    }
}
