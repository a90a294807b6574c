//! Overlays of a test's own, with engine pods as the field's charts and controllers make them, and what these pods did.

use std::fs;

use pd_support::body::words;
use pd_support::client::{Answer, Client, Http};

use crate::cluster::{Cluster, OURS, kubectl, until};

/// Requests that have to be split.
const REQUESTS: u64 = 12;

/// The engine pods of one role: the label that they have, and the port of the engine in them.
#[derive(Clone, Copy)]
pub struct Engines {
    pub label: &'static str,
    pub port: u16,
}

/// What engines counted: prefill legs, decode legs, and what must not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub prefill: u64,
    pub decode: u64,
    pub wrong: u64,
}

impl Cluster {
    /// An overlay of the repository with other engine pods, the token of overlay `sim`, and Envoys as small as there.
    /// `patches` are entries of kustomize's list.
    pub async fn with_pods(base: &str, pods: &str, patches: &str) -> Self {
        let cluster = Self::new("test").await;
        let overlays = cluster.manifests().join("overlays");
        let read = |file: &str| fs::read_to_string(overlays.join(file)).expect(file);
        let sim = read("sim/kustomization.yaml");
        let (_, small) = sim.split_once("patches:\n").expect("the patches of overlay sim");
        let text = format!(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../{base}, pods.yaml, token.yaml]\n\
             patches:\n{small}{patches}"
        );
        fs::create_dir_all(overlays.join("test")).expect("a folder");
        for (file, text) in
            [("kustomization.yaml", text.as_str()), ("pods.yaml", pods), ("token.yaml", &read("sim/token.yaml"))]
        {
            fs::write(overlays.join("test").join(file), text).expect(file);
        }
        cluster
    }

    /// What these engines counted, in sum.
    pub async fn counts(&self, prefill: Engines, decode: Engines) -> Counts {
        let mut counts = Counts { prefill: 0, decode: 0, wrong: 0 };
        for (engines, is_prefill) in [(prefill, true), (decode, false)] {
            for pod in self.pod_names(OURS, engines.label).await {
                let stats = self.stats_at(&pod, engines.port).await;
                counts.wrong += stats.wrong_text + stats.failed_pulls + stats.local_prefills;
                if is_prefill {
                    counts.prefill += stats.prefill_legs;
                    counts.wrong += stats.decode_legs;
                } else {
                    counts.decode += stats.decode_legs;
                    counts.wrong += stats.prefill_legs;
                }
            }
        }
        counts
    }

    /// Waits until the pods are ready and a request is split, then requires that every request is and that each engine took part.
    pub async fn splits_over(&self, model: &str, prefill: Engines, decode: Engines) {
        for label in [prefill.label, decode.label] {
            until(format!("pods {label} are ready"), async || {
                let pods = self.pod_names(OURS, label).await;
                let mut are_ready = !pods.is_empty();
                for pod in &pods {
                    are_ready &= self.is_ready(OURS, pod).await;
                }
                are_ready.then_some(())
            })
            .await;
        }
        until(format!("a request for {model} is split"), async || {
            let before = self.counts(prefill, decode).await.prefill;
            let answer = self.ask_for(model).await?;
            let is_split = self.counts(prefill, decode).await.prefill > before;
            (answer.status == 200 && is_split).then_some(())
        })
        .await;
        // Others may be listed a moment later.
        until(format!("each engine of {model} has a request"), async || {
            self.ask_for(model).await;
            for engines in [prefill, decode] {
                for pod in self.pod_names(OURS, engines.label).await {
                    let stats = self.stats_at(&pod, engines.port).await;
                    if stats.prefill_legs + stats.decode_legs == 0 {
                        return None;
                    }
                }
            }
            Some(())
        })
        .await;
        let before = self.counts(prefill, decode).await;
        for _ in 0..REQUESTS {
            let answer = self.ask_for(model).await.expect("an answer");
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert_eq!(answer.header("x-pd-kv"), None);
        }
        let after = self.counts(prefill, decode).await;
        let done = Counts {
            prefill: after.prefill - before.prefill,
            decode: after.decode - before.decode,
            wrong: after.wrong - before.wrong,
        };
        assert_eq!(done, Counts { prefill: REQUESTS, decode: REQUESTS, wrong: 0 });
    }

    /// A request with a new prompt that is long enough to be split.
    pub async fn ask_for(&self, model: &str) -> Option<Answer> {
        let mut client = Client::try_connect(self.address, Http::One).await.ok()?;
        let prompt = words(&format!("{model} {:?}", std::time::SystemTime::now()), 4_000);
        let body = format!(r#"{{"model":"{model}","max_tokens":4,"prompt":"{prompt}"}}"#);
        client.try_send(client.json("/v1/completions", body, &[])).await.ok()
    }

    /// Deletes what a test has added to the namespace, and applies overlay `sim` again.
    pub async fn without(kinds: &str, label: &str) {
        kubectl(&["delete", kinds, "--namespace", OURS, "--ignore-not-found", "-l", label]).await.expect("deleted");
        Self::ready().await;
    }
}
