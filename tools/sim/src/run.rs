//! One request in the engine: admitted, computed or fetched, generated, kept for a decode leg.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::sync::SemaphorePermit;
use tokio::time::Instant;

use crate::api_error::ApiError;
use crate::cache::Allocation;
use crate::engine::Pod;
use crate::failure::Failure;
use crate::fault::Leg;
use crate::handoff::KvParams;
use crate::head::Usage;
use crate::presence::Presence;
use crate::request::Generation;
use crate::timing::pause;
use crate::tokens::{Finish, Output, Prompt};

impl Pod {
    /// Everything up to the first token.
    ///
    /// # Errors
    /// [`Failure`]
    pub(crate) async fn admit(self: &Arc<Self>, generation: &Generation, since: Instant) -> Result<Run, Failure> {
        if generation.leg() == Leg::Prefill {
            self.stats.add(&self.stats.prefill_legs, 1);
        }
        let remote = if let KvParams::Pull(remote) = &generation.kv { Some(remote) } else { None };
        if remote.is_some_and(|remote| !remote.has_block_ids) {
            // The scheduler's assertion ends the engine core, and the API server with it.
            self.crash();
            return Err(Failure::Hang);
        }
        if remote.is_some_and(|remote| remote.source.is_none()) {
            // The scheduler waits for a transfer that it never started.
            self.stats.add(&self.stats.hung, 1);
            return Err(Failure::Hang);
        }
        let presence = Presence::waiting(self, generation);
        let permit = self.sequence_permits.acquire().await.map_err(|_| Failure::Hang)?;
        permit.forget();
        let mut run = Run {
            pod: Arc::clone(self),
            sequences: Vec::with_capacity(generation.prompts.len()),
            usage: Usage::default(),
            step: 0,
            longest: 0,
            due: since,
            decoding: false,
            presence,
        };
        for (index, prompt) in generation.prompts.iter().enumerate() {
            let sequence = self.compute(generation, index, prompt, &mut run.presence).await?;
            run.usage.prompt += prompt.tokens();
            run.usage.cached += sequence.reused_tokens;
            let block_tokens = u64::from(self.config.block_tokens);
            let whole_blocks = prompt.tokens() / block_tokens * block_tokens;
            run.usage.created += whole_blocks.saturating_sub(sequence.reused_tokens);
            run.longest = sequence.outputs.iter().map(|output| output.tokens).fold(run.longest, u64::max);
            run.sequences.push(sequence);
        }
        // vLLM 0.32 reports the prefill server's hits in place of its own, whether the KV cache came or not.
        if let Some(cached) = remote.and_then(|remote| remote.prefills_cached) {
            run.usage.cached = cached;
        }
        run.due = Instant::now();
        self.ttft.observe(run.due - since);
        Ok(run)
    }

    async fn compute(
        &self,
        generation: &Generation,
        index: usize,
        prompt: &Prompt,
        presence: &mut Presence,
    ) -> Result<Sequence, Failure> {
        let stats = &self.stats;
        let block_tokens = u64::from(self.config.block_tokens);
        let tokens = prompt.tokens();
        let hashes = prompt.blocks(self.config.block_tokens);
        let mut outputs: Vec<Output> =
            (0..generation.n).map(|choice| generation.output(index, choice, false)).collect();
        let generated: u64 = outputs.iter().map(|output| output.tokens).sum();
        let total = (tokens + generated).div_ceil(block_tokens) as usize;
        // The last token is always computed: its logits are what the first output token comes from.
        let max_hits = ((tokens - 1) / block_tokens) as usize;

        let turn: SemaphorePermit<'_> = self.prefill.acquire().await.map_err(|_| Failure::Hang)?;
        let mut blocks =
            self.cache.reserve(&hashes, max_hits, total).await.ok_or_else(|| {
                Failure::Error(ApiError::internal("The request needs more KV blocks than the cache has"))
            })?;
        presence.run();
        let cached = blocks.hits() as u64 * block_tokens;
        let mut wrong = None;
        let mut external = 0;
        if generation.leg() == Leg::Decode && !generation.recomputes {
            drop(turn);
            if let Some(time) = generation.stall {
                tokio::time::sleep(time).await;
            }
            external = tokens - cached;
            let begun = Instant::now();
            wrong = self.fetch(generation, index, prompt).await?;
            pause(self.timing.transfer(external)).await;
            self.transfers.observe(begun.elapsed());
        } else if let Some(found) = self.shared_tokens(&hashes, cached) {
            drop(turn);
            external = found;
            pause(self.timing.transfer(external)).await;
        } else {
            pause(self.timing.prefill(tokens, cached)).await;
            drop(turn);
        }

        self.count_prompt(tokens, cached, external);
        if let Some(all) = self.config.computed.as_ref().filter(|_| tokens - cached - external > tokens / 2) {
            all.add(prompt.digest);
        }
        match &wrong {
            Some(reason) => {
                stats.wrong(reason);
                outputs = (0..generation.n).map(|choice| generation.output(index, choice, true)).collect();
            }
            None => {
                blocks.commit(hashes.get(blocks.hits()..).unwrap_or_default());
                if external > 0 {
                    stats.add(&stats.decode_legs, 1);
                } else if generation.leg() != Leg::Prefill {
                    stats.add(&stats.local_prefills, 1);
                }
                self.share(&hashes);
            }
        }
        stats.touch();
        if let KvParams::Offer(rooms) = &generation.kv
            && let Some(room) = rooms.get(index)
        {
            self.offer(room, prompt).await?;
        }
        let reused_tokens = cached + external;
        Ok(Sequence { outputs, blocks: Some(blocks), hashes, wrong: wrong.is_some(), reused_tokens })
    }

    /// Counts a prompt, of which some tokens were cached here and others came from elsewhere.
    fn count_prompt(&self, tokens: u64, cached: u64, external: u64) {
        let computed = tokens - cached - external;
        self.stats.prompt_tokens.fetch_add(tokens, Relaxed);
        self.stats.cached_tokens.fetch_add(cached, Relaxed);
        self.stats.external_tokens.fetch_add(external, Relaxed);
        self.stats.computed_tokens.fetch_add(computed, Relaxed);
        self.lifetime.prompt_tokens.fetch_add(tokens, Relaxed);
        self.lifetime.cached_tokens.fetch_add(cached, Relaxed);
        self.lifetime.external_tokens.fetch_add(external, Relaxed);
        self.lifetime.computed_tokens.fetch_add(computed, Relaxed);
    }
}

/// One prompt of a request, with its KV.
pub(crate) struct Sequence {
    pub(crate) outputs: Vec<Output>,
    /// Taken when the request ends.
    blocks: Option<Allocation>,
    hashes: Vec<u64>,
    wrong: bool,
    /// Prompt tokens that were not computed here.
    reused_tokens: u64,
}

/// A request from its first token on. Dropping it gives its blocks and its place among the sequences back.
pub(crate) struct Run {
    pod: Arc<Pod>,
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) usage: Usage,
    /// Tokens that every choice has got, as far as it is that long.
    pub(crate) step: u64,
    longest: u64,
    /// When the last token came.
    due: Instant,
    decoding: bool,
    presence: Presence,
}

impl Run {
    /// The choices of the answer in the order of their index.
    pub(crate) fn outputs(&self) -> impl Iterator<Item = &Output> {
        self.sequences.iter().flat_map(|sequence| &sequence.outputs)
    }

    /// Waits for the next token of every choice; false once all are complete.
    pub(crate) async fn advance(&mut self) -> bool {
        if self.step >= self.longest {
            return false;
        }
        // The first token comes with the prompt.
        if self.step > 0 {
            if !self.decoding {
                self.decoding = true;
                self.pod.decoding.fetch_add(1, Relaxed);
            }
            let time = self.pod.timing.token(self.pod.decoding.load(Relaxed));
            if !time.is_zero() {
                self.due += time;
                tokio::time::sleep_until(self.due).await;
            }
        }
        self.step += 1;
        let step = self.step;
        let tokens = self.outputs().filter(|output| output.tokens >= step).count() as u64;
        self.usage.completion += tokens;
        self.pod.stats.generated_tokens.fetch_add(tokens, Relaxed);
        self.pod.lifetime.generated_tokens.fetch_add(tokens, Relaxed);
        true
    }

    /// Ends the request: the answer's blocks become the next turn's prefix, and what a decode leg is to fetch stays.
    /// Returns the `kv_transfer_params` of the first prompt.
    pub(crate) fn finish(&mut self, generation: &Generation, id: &str) -> Option<String> {
        let pod = Arc::clone(&self.pod);
        let mut params = None;
        for (index, (sequence, prompt)) in self.sequences.iter_mut().zip(&generation.prompts).enumerate() {
            let (Some(output), Some(mut blocks)) = (sequence.outputs.first(), sequence.blocks.take()) else { continue };
            for output in &sequence.outputs {
                let finished = match output.finish {
                    Finish::Length => &pod.lifetime.finished_length,
                    Finish::End | Finish::Stop(_) => &pod.lifetime.finished_stop,
                };
                finished.fetch_add(1, Relaxed);
            }
            if !sequence.wrong {
                let block_tokens = pod.config.block_tokens;
                let full = ((prompt.tokens() + output.tokens) / u64::from(block_tokens)) as usize;
                let mut more = prompt.blocks_after(&sequence.hashes, block_tokens, &output.text);
                more.truncate(full.saturating_sub(blocks.named()));
                blocks.commit(&more);
            }
            if matches!(generation.kv, KvParams::Keep) && output.finish == Finish::Length {
                let raw = pod.keep(blocks, prompt, sequence.reused_tokens, id, generation.request_id.as_deref());
                if index == 0 {
                    params = Some(raw);
                }
            }
        }
        params
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.decoding {
            self.pod.decoding.fetch_sub(1, Relaxed);
        }
        self.pod.sequence_permits.add_permits(1);
    }
}
