//! What a choice needs to know of a prompt.

use crate::endpoints::fitted_media::MediaTokens;
use crate::prefix::hash::{BlockHash, PromptHash};

/// What the scheduler needs to know of a prompt.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    /// Bytes of the prompt's JSON, without media.
    pub bytes: usize,
    /// Tokens of its media, as configured.
    pub media: MediaTokens,
    /// Estimated tokens, 0 or more.
    pub tokens: f64,
    /// Estimated tokens of a block of the smallest size.
    pub block_tokens: f64,
    /// Block hashes.
    pub hash: PromptHash,
    /// The session that a header names, as a block of its own. The endpoint that holds that block served the session last.
    pub session: Option<BlockHash>,
    /// Key for rendezvous hashing: the prompt's first block that is not hot.
    pub key: u64,
    /// Whether this worker never routed a prompt with the block of [`key`](Self::key). Another Envoy may have routed one.
    pub is_unseen: bool,
    /// Whether the request wants more than one sequence: a batch of prompts, or several answers.
    pub is_several: bool,
    /// Whether the decode endpoint may refuse the request because of members that the prefill leg leaves out.
    pub is_refusable: bool,
    /// Whether the estimated prompt and the limit of tokens together exceed the model's length.
    pub is_too_long: bool,
    /// Whether the request has a thinking budget, which a limit of one token does not allow.
    pub has_budget: bool,
    /// Whether the answer describes the prompt, so that only the endpoint that computes the prompt can give it.
    pub describes_prompt: bool,
}
