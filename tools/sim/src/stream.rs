//! An answer as server-sent events, one token each.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::Stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use tokio::time::Instant;

use crate::answer::{Body, DONE_EVENT, error_event};
use crate::api_error::ApiError;
use crate::dialects;
use crate::engine::Pod;
use crate::failure::Failure;
use crate::fault::FaultKind;
use crate::guard::Guard;
use crate::head::{Head, Usage};
use crate::request::Generation;
use crate::rules::Api;
use crate::run::Run;

/// A stream under way.
pub(crate) struct Streaming {
    pub(crate) pod: Arc<Pod>,
    pub(crate) generation: Generation,
    pub(crate) head: Head,
    pub(crate) guard: Guard,
    /// [`FaultKind::Die`] or [`FaultKind::ErrorEvent`].
    pub(crate) spoilt: Option<FaultKind>,
    pub(crate) since: Instant,
}

enum Phase {
    Admit,
    Tokens(Run),
    Done,
}

impl Streaming {
    /// The body. Its headers go out at once, as vLLM's do; the first event comes with the first token.
    pub(crate) fn into_body(self) -> Body {
        let state = (self, Phase::Admit, VecDeque::new());
        let frames = futures::stream::unfold(state, |(mut stream, mut phase, mut queue)| async move {
            let frame = stream.next(&mut phase, &mut queue).await?;
            Some((frame.map(Frame::data), (stream, phase, queue)))
        });
        boxed(frames)
    }

    async fn next(&mut self, phase: &mut Phase, queue: &mut VecDeque<Bytes>) -> Option<io::Result<Bytes>> {
        loop {
            if let Some(event) = queue.pop_front() {
                return Some(Ok(event));
            }
            match phase {
                Phase::Admit => match self.pod.admit(&self.generation, self.since).await {
                    Ok(run) => {
                        self.push_heads(run.usage, queue);
                        *phase = Phase::Tokens(run);
                    }
                    Err(Failure::Error(error)) => {
                        self.push_heads(Usage::default(), queue);
                        push_error(&error, queue);
                        *phase = Phase::Done;
                    }
                    Err(Failure::Hang) => std::future::pending().await,
                },
                Phase::Tokens(run) => match self.spoilt {
                    Some(FaultKind::Die(tokens)) if run.step >= tokens => {
                        self.guard.finish();
                        *phase = Phase::Done;
                        return Some(Err(cut().await));
                    }
                    Some(FaultKind::ErrorEvent(tokens)) if run.step >= tokens => {
                        push_error(&ApiError::internal("Internal server error"), queue);
                        *phase = Phase::Done;
                    }
                    _ if run.advance().await => self.push_tokens(run, queue),
                    _ => {
                        // A stream has no field for the parameters: their KV stays until the lease ends.
                        let _ = run.finish(&self.generation, &self.head.id);
                        let usage = run.usage;
                        let outputs: Vec<_> = run.outputs().take(1).cloned().collect();
                        *phase = Phase::Done;
                        let said = outputs.first();
                        queue.extend(dialects::last_events(&self.head, said, usage));
                        if self.generation.include_usage && self.generation.api.says_done() {
                            queue.push_back(self.head.usage_event(usage));
                        }
                        if self.generation.api.says_done() {
                            queue.push_back(Bytes::from_static(DONE_EVENT));
                        }
                    }
                },
                Phase::Done => {
                    self.guard.finish();
                    return None;
                }
            }
        }
    }

    fn push_heads(&self, usage: Usage, queue: &mut VecDeque<Bytes>) {
        if self.generation.api == Api::Chat {
            queue.extend((0..self.generation.choices()).map(|index| self.head.role_event(index)));
        }
        queue.extend(dialects::first_events(&self.head, usage));
    }

    fn push_tokens(&self, run: &Run, queue: &mut VecDeque<Bytes>) {
        let usage = self.generation.continuous_usage.then_some(run.usage);
        for (index, output) in run.outputs().enumerate() {
            if output.tokens < run.step {
                continue;
            }
            let token = output.token(run.step - 1);
            let last = (output.tokens == run.step).then_some(output);
            if !matches!(self.generation.api, Api::Chat | Api::Completions) {
                queue.push_back(dialects::token_event(&self.head, index, (token, run.step == 1), last));
            } else if self.generation.echo && run.step == 1 {
                let prompt = &self.generation.prompts[index / self.generation.n as usize].rendered;
                let text = format!("{}{token}", String::from_utf8_lossy(prompt));
                queue.push_back(self.head.token_event(index, (&text, true), last, usage));
            } else {
                queue.push_back(self.head.token_event(index, (token, run.step == 1), last, usage));
            }
        }
    }
}

/// The first `keep` bytes of a body, then the connection closes.
pub(crate) fn cut_after(bytes: &Bytes, keep: usize) -> Body {
    let kept = bytes.slice(..keep.min(bytes.len()));
    boxed(futures::stream::unfold(Some(kept), |kept| async move {
        match kept {
            Some(kept) if !kept.is_empty() => Some((Ok(Frame::data(kept)), Some(Bytes::new()))),
            Some(_) => Some((Err(cut().await), None)),
            None => None,
        }
    }))
}

/// The error that makes the server close the connection, once what came before has been written.
async fn cut() -> io::Error {
    // hyper writes out what it holds whenever the body has nothing for it.
    tokio::task::yield_now().await;
    io::Error::other("fault: die")
}

fn push_error(error: &ApiError, queue: &mut VecDeque<Bytes>) {
    queue.push_back(error_event(error));
    queue.push_back(Bytes::from_static(DONE_EVENT));
}

fn boxed(frames: impl Stream<Item = io::Result<Frame<Bytes>>> + Send + 'static) -> Body {
    StreamBody::new(frames).boxed_unsync()
}
