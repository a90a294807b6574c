//! What a body says about KV transfer, in each engine's words.

use serde::Deserialize;

use crate::api_error::ApiError;
use crate::fields::{Fields, missing, wrong_type};
use crate::role::{Engine, Role};
use crate::rules::{Api, Rules};

/// Smallest `disagg_request_id` that TensorRT-LLM takes for one of a router's.
const MIN_DISAGG_REQUEST_ID: u64 = 1 << 42;
/// A bootstrap room is a signed 64-bit number.
const MAX_ROOM: u64 = (1 << 63) - 1;
/// First token id of a prompt that a simulated TensorRT-LLM has tokenised; the last two bits are the padding in bytes.
const TOKENISED: u32 = 0xffff_fff0;

/// What the body says about KV transfer.
#[derive(Clone, Debug)]
pub enum KvParams {
    /// Nothing, or nothing that asks for work.
    None,
    /// Keep the KV for another server and say in the answer where it is.
    Keep,
    /// Keep the KV of each prompt for the decode leg that comes to its room.
    Offer(Vec<String>),
    /// Fetch the KV from another server by the parameters that it issued.
    Pull(Remote),
    /// Fetch the KV of each prompt at its room.
    Meet(Vec<Room>),
}

/// Where the KV of a decode leg is.
#[derive(Clone, Debug)]
pub struct Remote {
    /// The object exactly as it stood in the body.
    pub raw: Box<str>,
    /// `remote_block_ids` is there, not null and not empty.
    pub has_block_ids: bool,
    /// `remote_prefill_cached_tokens`, if it is a number: what decode reports as its own cached tokens.
    pub prefills_cached: Option<u64>,
    /// `remote_engine_id`, `remote_host` and `remote_port`, if these and `remote_request_id` are there.
    pub source: Option<Source>,
}

/// The server that holds the KV.
#[derive(Clone, Debug)]
pub struct Source {
    /// `remote_engine_id`.
    pub engine_id: String,
    /// `remote_host`.
    pub host: String,
    /// `remote_port`.
    pub port: u16,
}

/// Where a decode leg meets its prefill leg.
#[derive(Clone, Debug)]
pub struct Room {
    /// `host:port` of the prefill server's bootstrap server.
    pub server: String,
    /// Id of the engine that is expected there, where the protocol names it.
    pub engine_id: Option<String>,
    /// What both legs call it.
    pub key: String,
}

pub(crate) fn kv_params(
    fields: &Fields<'_>,
    rules: Rules,
    prompts: usize,
    n: usize,
    stream: bool,
) -> Result<KvParams, ApiError> {
    match rules.engine {
        Engine::VllmNixl | Engine::VllmNixlPush => nixl(fields),
        // The connector looks for no parameters, vLLM checks their type.
        Engine::VllmShared => nixl(fields).map(|_| KvParams::None),
        Engine::Mooncake => mooncake(fields),
        Engine::Sglang => sglang(fields, rules, prompts, n),
        Engine::Trtllm => trtllm(fields, stream),
        Engine::Neuron => neuron(fields, rules),
    }
}

fn object<'a>(fields: &Fields<'a>, name: &'static str) -> Result<Option<(&'a str, Fields<'a>)>, ApiError> {
    let Some(raw) = fields.raw(name) else { return Ok(None) };
    Ok(Some((raw.get(), serde_json::from_str(raw.get()).map_err(|_| wrong_type(name))?)))
}

/// vLLM 0.32 copies `vllm_xargs`, and the `sampling_params.extra_args` of its own API, into the place that the
/// parameters come from; those of the top level win, unless they are empty. What is false to Python and no object ends
/// the scheduler (`'int' object has no attribute 'get'`), other values end the request.
fn nixl(fields: &Fields<'_>) -> Result<KvParams, ApiError> {
    let of_extra_args = |place: &Fields<'_>| -> Result<Option<KvParams>, ApiError> {
        let Some(raw) = place.raw("kv_transfer_params") else { return Ok(None) };
        if raw.get().starts_with('{') {
            return nixl_params(place).map(Some);
        }
        if place.truthy("kv_transfer_params") {
            return Err(wrong_type("kv_transfer_params"));
        }
        Ok(Some(KvParams::Pull(Remote {
            raw: raw.get().into(),
            has_block_ids: false,
            prefills_cached: None,
            source: None,
        })))
    };
    if !fields.truthy("kv_transfer_params") {
        let nested = [("vllm_xargs", None), ("sampling_params", Some("extra_args"))];
        for (outer, inner) in nested {
            let Ok(Some((_, mut place))) = object(fields, outer) else { continue };
            if let Some(inner) = inner {
                let Ok(Some((_, deeper))) = object(&place, inner) else { continue };
                place = deeper;
            }
            if let Some(params) = of_extra_args(&place)? {
                return Ok(params);
            }
        }
    }
    nixl_params(fields)
}

fn nixl_params(fields: &Fields<'_>) -> Result<KvParams, ApiError> {
    let Some((raw, params)) = object(fields, "kv_transfer_params")? else { return Ok(KvParams::None) };
    if params.truthy("do_remote_prefill") {
        return Ok(KvParams::Pull(remote(raw, &params)));
    }
    Ok(if params.truthy("do_remote_decode") { KvParams::Keep } else { KvParams::None })
}

fn remote(raw: &str, params: &Fields<'_>) -> Remote {
    let source = (|| {
        params.raw("remote_request_id")?;
        Some(Source {
            engine_id: params.get("remote_engine_id").ok()??,
            host: params.get("remote_host").ok()??,
            port: params.get("remote_port").ok()??,
        })
    })();
    let prefills_cached = params.get("remote_prefill_cached_tokens").ok().flatten();
    Remote { raw: raw.into(), has_block_ids: params.truthy("remote_block_ids"), prefills_cached, source }
}

fn mooncake(fields: &Fields<'_>) -> Result<KvParams, ApiError> {
    let Some((_, params)) = object(fields, "kv_transfer_params")? else { return Ok(KvParams::None) };
    if params.truthy("do_remote_prefill") {
        let address: String = params.required("remote_bootstrap_addr")?;
        let Some(server) = address.strip_prefix("http://") else {
            return Err(ApiError::bad_field("remote_bootstrap_addr", "remote_bootstrap_addr must begin with http://"));
        };
        return Ok(KvParams::Meet(vec![Room {
            server: server.to_owned(),
            engine_id: Some(params.required("remote_engine_id")?),
            key: params.required("transfer_id")?,
        }]));
    }
    if params.truthy("do_remote_decode") {
        return Ok(KvParams::Offer(vec![params.required("transfer_id")?]));
    }
    Ok(KvParams::None)
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrList<T> {
    One(T),
    List(Vec<T>),
}

fn sglang(fields: &Fields<'_>, rules: Rules, prompts: usize, n: usize) -> Result<KvParams, ApiError> {
    if rules.role == Role::Both {
        return Ok(KvParams::None);
    }
    let is_list = fields.raw("bootstrap_room").is_some_and(|raw| raw.get().starts_with('['));
    let lists = [prompts, n.max(prompts)];
    fn values<T>(value: OneOrList<T>, is_list: bool, lists: &[usize], name: &'static str) -> Result<Vec<T>, ApiError> {
        match value {
            OneOrList::One(value) if !is_list => Ok(vec![value]),
            OneOrList::List(values) if is_list && lists.contains(&values.len()) => Ok(values),
            _ => Err(ApiError::bad_field(name, format!("{name} must be a list with one value for each prompt"))),
        }
    }
    let Some(rooms) = fields.get::<OneOrList<u64>>("bootstrap_room")? else {
        return Err(ApiError::bad_request("Disaggregated request received without bootstrap room id."));
    };
    let hosts: OneOrList<String> = fields.required("bootstrap_host")?;
    let ports: OneOrList<u16> = fields.required("bootstrap_port")?;
    let rooms = values(rooms, is_list, &lists, "bootstrap_room")?;
    let hosts = values(hosts, is_list, &lists, "bootstrap_host")?;
    let ports = values(ports, is_list, &lists, "bootstrap_port")?;
    if rooms.iter().any(|room| *room > MAX_ROOM) || !is_list && prompts > 1 {
        return Err(ApiError::bad_field("bootstrap_room", "bootstrap_room is out of range or not one for each prompt"));
    }
    if rules.role == Role::Prefill {
        return Ok(KvParams::Offer(rooms.iter().map(u64::to_string).collect()));
    }
    let room = |((host, port), key): ((&String, &u16), &u64)| Room {
        server: if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") },
        engine_id: None,
        key: key.to_string(),
    };
    Ok(KvParams::Meet(hosts.iter().zip(&ports).zip(&rooms).map(room).collect()))
}

fn trtllm(fields: &Fields<'_>, stream: bool) -> Result<KvParams, ApiError> {
    let bad = |why: &str| ApiError::bad_field("disaggregated_params", why);
    let Some((raw, params)) = object(fields, "disaggregated_params")? else { return Ok(KvParams::None) };
    let kind: String = params.required("request_type")?;
    match kind.as_str() {
        "context_only" if stream => Err(bad("context_only requests do not stream")),
        "context_only" => match params.get::<u64>("disagg_request_id")? {
            Some(id) if (MIN_DISAGG_REQUEST_ID..=MAX_ROOM).contains(&id) => Ok(KvParams::Keep),
            _ => Err(bad("disagg_request_id must be at least 2^42")),
        },
        "generation_only" => {
            // What was issued, but for the one value that the router turns.
            let issued = raw.replacen("\"generation_only\"", "\"context_only\"", 1);
            Ok(KvParams::Pull(Remote { has_block_ids: true, ..remote(&issued, &params) }))
        }
        _ => Err(bad("request_type must be context_only or generation_only")),
    }
}

fn neuron(fields: &Fields<'_>, rules: Rules) -> Result<KvParams, ApiError> {
    if rules.role == Role::Prefill {
        return Ok(KvParams::Keep);
    }
    let Some((_, answer)) = object(fields, "disagg_prefill_resp")? else { return Ok(KvParams::None) };
    for name in ["id", "object", "choices", "usage"] {
        answer.raw(name).ok_or_else(|| missing(name))?;
    }
    let Some((raw, params)) = object(&answer, "kv_transfer_params")? else {
        return Err(missing("disagg_prefill_resp.kv_transfer_params"));
    };
    Ok(KvParams::Pull(remote(raw, &params)))
}

/// The token ids that a simulated TensorRT-LLM makes of a prompt, as JSON.
pub(crate) fn tokenise(rendered: &[u8]) -> String {
    let padding = rendered.len().next_multiple_of(4) - rendered.len();
    let mut ids = vec![(TOKENISED | padding as u32).to_string()];
    for chunk in rendered.chunks(4) {
        let mut four = [0; 4];
        four[..chunk.len()].copy_from_slice(chunk);
        ids.push(u32::from_le_bytes(four).to_string());
    }
    format!("[{}]", ids.join(","))
}

/// The prompt of a `generation_only` request: TensorRT-LLM takes it as the prefill server's token ids only.
pub(crate) fn trtllm_prompts(api: Api, fields: &Fields<'_>, rules: Rules) -> Result<Option<Vec<Vec<u8>>>, ApiError> {
    let params = object(fields, "disaggregated_params")?.filter(|_| rules.engine == Engine::Trtllm);
    let Some((_, params)) = params else { return Ok(None) };
    if params.get::<String>("request_type")?.as_deref() != Some("generation_only") {
        return Ok(None);
    }
    let name = if api == Api::Chat { "prompt_token_ids" } else { "prompt" };
    let ids: Vec<u32> = fields.required(name)?;
    match ids.split_first() {
        Some((first, ids)) if first & !3 == TOKENISED => {
            let mut rendered: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            rendered.truncate(rendered.len().saturating_sub((first & 3) as usize));
            Ok(Some(vec![rendered]))
        }
        _ => Err(ApiError::bad_field("prompt_token_ids", "not the token ids of the prefill answer")),
    }
}
