//! Bodies of requests: where their members are, and how bytes change.
//!
//! [`scan`] checks the whole body in one pass and keeps the offsets of its top-level members. A [`Scan`] borrows nothing: it
//! outlives the bytes that it describes.

use std::borrow::Cow;

use self::json::{ErrorKind, MAX_MEDIA, Mark, ScanError, Scanner, Span};
use self::media::Media;

mod forbidden;
pub mod form;
pub mod json;
pub mod markers;
pub mod media;
pub mod splice;

pub use forbidden::{FORBIDDEN, cuts, is_content};

/// Most known members of one body, duplicates included, and most nested members that are cut out of one; a body with more
/// of either is refused. With [`MAX_MEDIA`] it bounds a [`Scan`] to 80 kB. There are some sixty keys, and no client repeats one
/// for a reason.
pub const MAX_MEMBERS: usize = 1_024;

/// Percent-encoding undone; an escape that is none stays as it stands.
pub(crate) fn decode_percent(text: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let digit = |index: usize| char::from(*tail.get(index)?).to_digit(16);
        let hex = digit(0).zip(digit(1)).and_then(|(high, low)| u8::try_from(high.wrapping_shl(4) | low).ok());
        let (byte, next) = match (first, hex, tail.get(2..)) {
            (b'%', Some(byte), Some(next)) => (byte, next),
            _ => (*first, tail),
        };
        decoded.push(byte);
        rest = next;
    }
    decoded
}

/// API of a request with a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Api {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
    /// `/v1/messages`
    Messages,
    /// `/inference/v1/generate`: token ids in, token ids out.
    Generate,
}

impl Api {
    /// The path at which engines have the API.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Responses => "/v1/responses",
            Self::Messages => "/v1/messages",
            Self::Generate => "/inference/v1/generate",
        }
    }

    /// The API that a `:path` names, without its query string; `None` for every other path. The path must be spelt exactly:
    /// percent-encoding is not undone.
    #[must_use]
    pub fn of_path(path: &[u8]) -> Option<Self> {
        match path.split(|&byte| byte == b'?').next()? {
            b"/v1/chat/completions" => Some(Self::Chat),
            b"/v1/completions" => Some(Self::Completions),
            b"/v1/responses" => Some(Self::Responses),
            b"/v1/messages" => Some(Self::Messages),
            b"/inference/v1/generate" => Some(Self::Generate),
            _ => None,
        }
    }
}

macro_rules! keys {
    ($($name:literal $key:ident,)*) => {
        /// Keys of the top-level members that the filter knows. All other members pass through unseen.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Key {
            $(#[doc = concat!("`", $name, "`")] $key,)*
        }

        impl Key {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$key,)*];

            /// The key's name, without quotes. No name needs an escape in JSON.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$key => $name,)*
                }
            }

            /// The key of a name without escapes; `None` for a name that the filter does not know.
            #[must_use]
            pub fn of_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$key),)*
                    _ => None,
                }
            }
        }
    };
}

keys! {
    "model" Model,
    // The prompt.
    "messages" Messages,
    "prompt" Prompt,
    "input" Input,
    "token_ids" TokenIds,
    "prompt_token_ids" PromptTokenIds,
    "system" System,
    "instructions" Instructions,
    "tools" Tools,
    "previous_response_id" PreviousResponseId,
    "background" Background,
    "store" Store,
    // The answer.
    "stream" Stream,
    "stream_options" StreamOptions,
    "max_tokens" MaxTokens,
    "max_completion_tokens" MaxCompletionTokens,
    "max_output_tokens" MaxOutputTokens,
    "min_tokens" MinTokens,
    "ignore_eos" IgnoreEos,
    "stop" Stop,
    "stop_token_ids" StopTokenIds,
    "stop_sequences" StopSequences,
    "n" N,
    "best_of" BestOf,
    "use_beam_search" UseBeamSearch,
    "echo" Echo,
    "logprobs" Logprobs,
    "top_logprobs" TopLogprobs,
    "logprob_token_ids" LogprobTokenIds,
    "prompt_logprobs" PromptLogprobs,
    "return_hidden_states" ReturnHiddenStates,
    "return_routed_experts" ReturnRoutedExperts,
    "temperature" Temperature,
    "thinking" Thinking,
    "seed" Seed,
    // `/inference/v1/generate` keeps its limits in here: scan and rewrite the value, then replace it.
    "sampling_params" SamplingParams,
    // Who asks, and what may be shared.
    "user" User,
    "priority" Priority,
    "cache_salt" CacheSalt,
    "prompt_cache_key" PromptCacheKey,
    "lora_path" LoraPath,
    // Hand-over protocols.
    "kv_transfer_params" KvTransferParams,
    "ec_transfer_params" EcTransferParams,
    "kv_hints" KvHints,
    "bootstrap_host" BootstrapHost,
    "bootstrap_port" BootstrapPort,
    "bootstrap_room" BootstrapRoom,
    "bootstrap_pair_key" BootstrapPairKey,
    "decode_tp_size" DecodeTpSize,
    "encoder_urls" EncoderUrls,
    "need_wait_for_mm_inputs" NeedWaitForMmInputs,
    "num_items_assigned" NumItemsAssigned,
    "http_worker_ipc" HttpWorkerIpc,
    "data_parallel_rank" DataParallelRank,
    "routed_dp_rank" RoutedDpRank,
    "disagg_prefill_dp_rank" DisaggPrefillDpRank,
    "disaggregated_params" DisaggregatedParams,
    "disagg_prefill_resp" DisaggPrefillResp,
}

/// Bytes that the longest [`Key::name`] may have in a body: each character as `\u00xx`.
const MAX_KEY_BYTES: usize = 6 * 24;

impl Key {
    /// The key that stands between the quotes of a string, escapes seen through.
    fn read(raw: &[u8]) -> Option<Self> {
        if raw.len() > MAX_KEY_BYTES {
            return None;
        }
        Self::of_name(&json::unescape(raw)?)
    }

    const fn bit(self) -> u128 {
        1_u128.wrapping_shl(self as u32)
    }
}

/// A set of [`Key`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeySet(u128);

impl KeySet {
    /// No key.
    pub const EMPTY: Self = Self(0);

    /// The set of some keys.
    #[must_use]
    pub const fn of(mut keys: &[Key]) -> Self {
        let mut set = 0;
        while let [key, rest @ ..] = keys {
            set |= key.bit();
            keys = rest;
        }
        Self(set)
    }

    /// The set with one more key.
    #[must_use]
    pub const fn with(self, key: Key) -> Self {
        Self(self.0 | key.bit())
    }

    /// The keys that are in either set.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The keys that are in both sets.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether the key is in the set.
    #[must_use]
    pub const fn contains(self, key: Key) -> bool {
        self.0 & key.bit() != 0
    }

    /// Whether the set has no key.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// A known member of the body's object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub key: Key,
    /// Whether it is the first member of the object, known or not.
    pub first: bool,
    /// Whether it is the last member of the object, known or not.
    pub last: bool,
    /// From the opening quote of the key to the end of the value.
    pub span: Span,
    /// The value.
    pub value: Span,
    /// Offset of the comma before the member; for the first member, the offset just past the object's opening brace.
    pub before: u32,
    /// Offset of the comma behind the member; for the last member, the offset of the object's closing brace.
    pub after: u32,
}

/// Where the known members of a body are. Offsets count bytes of the body that was scanned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    /// Bytes of the body.
    pub len: u32,
    /// Offset just past the object's opening brace.
    pub open: u32,
    /// Members of the object, unknown ones and duplicates included.
    pub count: u32,
    known: KeySet,
    members: Vec<Member>,
    cuts: Vec<Span>,
    media: Vec<Media>,
}

/// Checks a body and finds its known top-level members.
///
/// Accepts exactly the objects that `serde_json` parses as a `Value`, except that [`MAX_MEMBERS`] bounds repetition.
///
/// # Errors
/// [`ScanError`] where the body is not such an object.
pub fn scan(body: &[u8]) -> Result<Scan, ScanError> {
    let mut scanner = Scanner::new(body)?;
    scanner.white_space();
    if !scanner.eat(b'{') {
        return Err(scanner.error(ErrorKind::NotAnObject));
    }
    let open = Span::new(scanner.offset(), scanner.offset()).start;
    let mut scan = Scan {
        len: Span::new(0, body.len()).end,
        open,
        count: 0,
        known: KeySet::EMPTY,
        members: Vec::with_capacity(12),
        cuts: Vec::new(),
        media: Vec::new(),
    };
    let mut before = open;
    let mut first = true;
    while let Some(member) = scanner.member(1, first)? {
        let key = Key::read(member.key.get(body));
        forbidden::find(body, &member, key, &mut scan.cuts).map_err(|kind| scanner.error(kind))?;
        let marks = scanner.take_marks();
        if key.is_some_and(|key| PROMPTS.contains(key)) {
            scan.add_media(body, &marks);
        }
        if let Some(key) = key {
            if scan.members.len() >= MAX_MEMBERS {
                return Err(scanner.error(ErrorKind::TooManyMembers));
            }
            scan.known = scan.known.with(key);
            let span = Span { start: member.key.start.saturating_sub(1), end: member.value.end };
            let last = !member.more;
            scan.members.push(Member { key, first, last, span, value: member.value, before, after: member.next });
        }
        scan.count = scan.count.saturating_add(1);
        before = member.next;
        first = false;
        if !member.more {
            break;
        }
    }
    scanner.finish()?;
    Ok(scan)
}

/// Members whose values have the content that a model reads, and in it media.
const PROMPTS: KeySet = KeySet::of(&[Key::Messages, Key::Input, Key::System, Key::Prompt]);

impl Scan {
    /// Adds the payloads behind marks, as far as there is room, none inside another.
    fn add_media(&mut self, body: &[u8], marks: &[Mark]) {
        // A mark inside a value that was read already is passed over: no byte is read twice.
        let mut read_until = 0;
        for mark in marks {
            if mark.value < read_until || self.media.len() >= MAX_MEDIA {
                continue;
            }
            let (end, media) = mark.read(body);
            read_until = end;
            self.media.extend(media);
        }
    }

    /// The media of the prompt, in the order of the body; [`MAX_MEDIA`] at most.
    #[must_use]
    pub fn media(&self) -> &[Media] {
        &self.media
    }

    /// The member of that key; the last one of several, as every engine's parser has it.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&Member> {
        if !self.has(key) {
            return None;
        }
        self.members.iter().rev().find(|member| member.key == key)
    }

    /// Whether there is a member of that key.
    #[must_use]
    pub fn has(&self, key: Key) -> bool {
        self.known.contains(key)
    }

    /// The keys of the known members.
    #[must_use]
    pub fn keys(&self) -> KeySet {
        self.known
    }

    /// The known members in the order of the body, duplicates included.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Spans that every edit leaves out, in the order of the body: [`FORBIDDEN`] members of objects inside the values of
    /// other members, each with one of the commas beside it.
    #[must_use]
    pub fn cuts(&self) -> &[Span] {
        &self.cuts
    }

    /// The bytes of a member's value; `None` where the body has no such member.
    #[must_use]
    pub fn raw<'a>(&self, body: &'a [u8], key: Key) -> Option<&'a [u8]> {
        self.get(key).map(|member| member.value.get(body))
    }

    /// A member's value as a string, borrowed unless it has escapes; `None` where there is no such member or the value is
    /// not a string.
    #[must_use]
    pub fn str<'a>(&self, body: &'a [u8], key: Key) -> Option<Cow<'a, str>> {
        json::string(self.raw(body, key)?)
    }

    /// A member's value as a Boolean; `None` where there is no such member or the value is neither `true` nor `false`.
    #[must_use]
    pub fn bool(&self, body: &[u8], key: Key) -> Option<bool> {
        match self.raw(body, key)? {
            b"true" => Some(true),
            b"false" => Some(false),
            _ => None,
        }
    }

    /// A member's value as an integer; `None` where there is no such member or the value is anything else (negative, `1.0`,
    /// `1e3`, beyond 64 bits).
    #[must_use]
    pub fn u64(&self, body: &[u8], key: Key) -> Option<u64> {
        let raw = self.raw(body, key)?;
        core::str::from_utf8(raw).ok()?.parse().ok()
    }
}
