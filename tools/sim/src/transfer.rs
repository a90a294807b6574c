//! How the KV of a prompt comes from another engine and is kept for one: pulled, met in a room, or in a shared directory.

use std::path::PathBuf;

use crate::api_error::ApiError;
use crate::cache::Allocation;
use crate::engine::Pod;
use crate::failure::Failure;
use crate::handoff::KvParams;
use crate::nixl::{Issue, PromptKv, Pulled, trtllm_params, write_params};
use crate::request::Generation;
use crate::role::Engine;
use crate::tokens::Prompt;

impl Pod {
    /// Fetches the KV of one prompt, once for every sequence that asks for it; says what is wrong with it.
    pub(crate) async fn fetch(
        &self,
        generation: &Generation,
        index: usize,
        prompt: &Prompt,
    ) -> Result<Option<String>, Failure> {
        let mut wrong = None;
        // The sequences of one prompt are requests of their own inside the engine, with the same parameters each.
        let times = if matches!(generation.kv, KvParams::Pull(_)) { generation.n } else { 1 };
        for _ in 0..times {
            let pulled = match &generation.kv {
                KvParams::Pull(remote) => match &remote.source {
                    Some(source) => self.puller.pull(remote, source, generation.request_id.as_deref()).await,
                    None => Pulled::Unpaired,
                },
                // A second prompt without a room of its own reads the first one's.
                KvParams::Meet(rooms) => match rooms.get(index).or(rooms.first()) {
                    Some(room) => self.puller.meet(room).await,
                    None => Pulled::Unpaired,
                },
                KvParams::None | KvParams::Keep | KvParams::Offer(_) => return Ok(None),
            };
            match pulled {
                Pulled::Kv(digest) if digest == prompt.digest => {}
                Pulled::Kv(_) => wrong = Some("other_prompt".to_owned()),
                Pulled::Gone(reason) => wrong = Some(reason),
                Pulled::Unpaired => {
                    self.stats.add(&self.stats.hung, 1);
                    return Err(Failure::Hang);
                }
                Pulled::Unreachable(why) => {
                    self.stats.add(&self.stats.failed_pulls, 1);
                    if matches!(generation.kv, KvParams::Meet(_)) {
                        // It goes on trying to reach the room until its own limit.
                        tokio::time::sleep(self.config.lease).await;
                    }
                    return Err(Failure::Error(ApiError::internal(format!("KV transfer failed: {why}"))));
                }
            }
        }
        Ok(wrong)
    }

    /// Offers the KV of a prompt in a room. SGLang's answer waits until it has been taken.
    pub(crate) async fn offer(&self, room: &str, prompt: &Prompt) -> Result<(), Failure> {
        if !self.rooms.offer(room, prompt.digest) {
            return Err(Failure::Error(ApiError::internal(format!("room {room} is in use"))));
        }
        self.stats.add(&self.stats.leases_issued, 1);
        if self.config.engine == Engine::Sglang && !self.rooms.until_taken(room, self.config.lease).await {
            self.stats.add(&self.stats.leases_expired, 1);
            return Err(Failure::Error(ApiError::internal("Prefill bootstrap failed: nobody came")));
        }
        Ok(())
    }

    /// File that says the KV of these blocks lies in the shared directory. The connector saves and finds whole
    /// prompts, rounded down to blocks.
    fn shared_file(&self, hashes: &[u64]) -> Option<PathBuf> {
        let directory = self.config.shared_dir.as_ref().filter(|_| self.config.engine == Engine::VllmShared)?;
        Some(directory.join(format!("{:016x}", hashes.last()?)))
    }

    /// Saves the KV of these blocks in the shared directory, where the engine has one.
    pub(crate) fn share(&self, hashes: &[u64]) {
        if let Some(file) = self.shared_file(hashes) {
            // A full disk or a missing directory means that others do not find it, as with the real connector.
            let _ = std::fs::write(file, b"");
        }
    }

    /// Tokens beyond the cached ones whose KV lies in the shared directory.
    pub(crate) fn shared_tokens(&self, hashes: &[u64], cached: u64) -> Option<u64> {
        let file = self.shared_file(hashes)?;
        let tokens = (hashes.len() as u64 * u64::from(self.config.block_tokens)).checked_sub(cached)?;
        (tokens > 0 && file.exists()).then_some(tokens)
    }

    /// Keeps the KV of a prompt for a decode leg; returns the `kv_transfer_params` that name it.
    pub(crate) fn keep(
        &self,
        blocks: Allocation,
        prompt: &Prompt,
        cached: u64,
        id: &str,
        request_id: Option<&str>,
    ) -> String {
        let ticket = self.ticket();
        let (host, port) = self.side_channel.get().map_or(("127.0.0.1", 0), |(host, port)| (host.as_str(), *port));
        let issue = Issue {
            engine_id: &self.engine_id,
            request_id: &format!("{id}-{:08x}", ticket as u32),
            host,
            port,
            tokens: prompt.tokens(),
            cached,
            // Between 2^62 and 2^63: a legal int64 that no double holds.
            ticket: (1 << 62) | (ticket >> 2) | 1,
        };
        let mut raw = write_params(&issue, &blocks.ids());
        if self.config.engine == Engine::Trtllm {
            raw = trtllm_params(&raw);
        }
        // Where the client sent no id the engine makes one up, which no other leg has.
        let pair = (self.config.engine == Engine::VllmNixlPush).then(|| request_id.unwrap_or(id));
        let kv = PromptKv { digest: prompt.digest, tokens: prompt.tokens(), _blocks: blocks };
        self.leases.open(&raw, pair, kv, self.config.lease);
        self.stats.add(&self.stats.leases_issued, 1);
        self.lease_opened.notify_one();
        raw
    }
}
