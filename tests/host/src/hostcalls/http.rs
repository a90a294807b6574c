//! Host functions of the HTTP side: maps, bodies, call-outs, resume and local replies.

use std::time::Duration;

use wasmtime::{Caller, Linker, Result, format_err};

use super::call::host_call;
use super::memory::{Fail, HostResult, give, read, write_u32};
use crate::abi::{BufferType, MapType, decode_pairs, encode_pairs};
use crate::host::{Action, Callout, Host, Violation};
use crate::stream_state::LocalReply;
use crate::{ClusterState, Pairs, Status, find_header};

type Guest<'a> = Caller<'a, Host>;

/// Header names that Envoy keeps once: another value is joined to the first.
const SINGLE: [&[u8]; 8] =
    [b":authority", b":method", b":path", b":scheme", b":status", b"content-length", b"content-type", b"x-request-id"];

pub(crate) fn define(linker: &mut Linker<Host>) -> Result<()> {
    host_call!(linker, "proxy_get_header_map_value", get_value, (map: u32, key: u32, len: u32, out: u32, size: u32));
    host_call!(linker, "proxy_add_header_map_value", add_value, (map: u32, key: u32, len: u32, value: u32, size: u32));
    host_call!(
        linker,
        "proxy_replace_header_map_value",
        replace_value,
        (map: u32, key: u32, len: u32, value: u32, size: u32)
    );
    host_call!(linker, "proxy_remove_header_map_value", remove_value, (map: u32, key: u32, len: u32));
    host_call!(linker, "proxy_get_header_map_pairs", get_pairs, (map: u32, out: u32, size: u32));
    host_call!(linker, "proxy_set_header_map_pairs", set_pairs, (map: u32, data: u32, len: u32));
    host_call!(linker, "proxy_get_header_map_size", get_size, (map: u32, out: u32));
    host_call!(
        linker,
        "proxy_get_buffer_bytes",
        get_buffer,
        (buffer: u32, start: u32, max: u32, out: u32, size: u32)
    );
    host_call!(linker, "proxy_get_buffer_status", buffer_status, (buffer: u32, len: u32, flags: u32));
    host_call!(
        linker,
        "proxy_set_buffer_bytes",
        set_buffer,
        (buffer: u32, start: u32, len: u32, data: u32, size: u32)
    );
    host_call!(linker, "proxy_http_call", http_call, (
        cluster: u32, cluster_len: u32, headers: u32, headers_len: u32, body: u32, body_len: u32,
        trailers: u32, trailers_len: u32, timeout_ms: u32, token: u32
    ));
    host_call!(linker, "proxy_continue_stream", continue_stream, (kind: u32));
    host_call!(linker, "proxy_close_stream", close_stream, (kind: u32));
    host_call!(linker, "proxy_send_local_response", send_local_response, (
        code: u32, details: u32, details_len: u32, body: u32, body_len: u32, headers: u32, headers_len: u32, grpc: i32
    ));
    Ok(())
}

fn get_value(c: &mut Guest<'_>, map: u32, key: u32, len: u32, out: u32, size: u32) -> HostResult {
    let kind = MapType::from_wire(map).ok_or(Status::BadArgument)?;
    let key = read(c, key, len)?.to_ascii_lowercase();
    let in_log = c.data().stream().is_some_and(|s| s.in_log);
    let Some(fields) = c.data().map(kind) else {
        c.data_mut().miss("proxy_get_header_map_value");
        return Err(if in_log { Status::NotFound } else { Status::BadArgument }.into());
    };
    let value = fields.iter().find(|(k, _)| *k == key).map(|(_, v)| v.clone()).ok_or(Status::NotFound)?;
    give(c, &value, out, size)
}

fn add_value(c: &mut Guest<'_>, map: u32, key: u32, len: u32, value: u32, size: u32) -> HostResult {
    let (key, value) = (read(c, key, len)?.to_ascii_lowercase(), read(c, value, size)?);
    check_field(c, "proxy_add_header_map_value", &key, &value);
    edit(c, "proxy_add_header_map_value", map, |fields| {
        let single = SINGLE.contains(&key.as_slice()).then(|| fields.iter_mut().find(|(k, _)| *k == key)).flatten();
        match single {
            Some((_, present)) => {
                present.push(b',');
                present.extend_from_slice(&value);
            }
            None => fields.push((key, value)),
        }
    })
}

fn replace_value(c: &mut Guest<'_>, map: u32, key: u32, len: u32, value: u32, size: u32) -> HostResult {
    let (key, value) = (read(c, key, len)?.to_ascii_lowercase(), read(c, value, size)?);
    check_field(c, "proxy_replace_header_map_value", &key, &value);
    edit(c, "proxy_replace_header_map_value", map, |fields| match fields.iter().position(|(k, _)| *k == key) {
        Some(first) => {
            let mut index = 0;
            fields.retain(|(k, _)| {
                index += 1;
                *k != key || index == first + 1
            });
            fields[first].1 = value;
        }
        None => fields.push((key, value)),
    })
}

fn remove_value(c: &mut Guest<'_>, map: u32, key: u32, len: u32) -> HostResult {
    let key = read(c, key, len)?.to_ascii_lowercase();
    edit(c, "proxy_remove_header_map_value", map, |fields| fields.retain(|(k, _)| *k != key))
}

/// A missing map reads as an empty one, with `Ok`.
fn get_pairs(c: &mut Guest<'_>, map: u32, out: u32, size: u32) -> HostResult {
    let kind = MapType::from_wire(map).ok_or(Status::BadArgument)?;
    let bytes = match c.data().map(kind) {
        Some(fields) if !fields.is_empty() => encode_pairs(fields),
        Some(_) => Vec::new(),
        None => {
            c.data_mut().miss("proxy_get_header_map_pairs");
            Vec::new()
        }
    };
    give(c, &bytes, out, size)
}

fn set_pairs(c: &mut Guest<'_>, map: u32, data: u32, len: u32) -> HostResult {
    let new: Pairs = decode_pairs(&read(c, data, len)?).into_iter().map(|(k, v)| (k.to_ascii_lowercase(), v)).collect();
    for (key, value) in &new {
        check_field(c, "proxy_set_header_map_pairs", key, value);
    }
    edit(c, "proxy_set_header_map_pairs", map, |fields| *fields = new)
}

/// Bytes of all names and values; like the writing calls it knows no answers of call-outs.
fn get_size(c: &mut Guest<'_>, map: u32, out: u32) -> HostResult {
    let mut bytes = 0;
    edit(c, "proxy_get_header_map_size", map, |fields| bytes = fields.iter().map(|(k, v)| k.len() + v.len()).sum())?;
    write_u32(c, out, bytes as u32)
}

fn edit(c: &mut Guest<'_>, call: &'static str, map: u32, change: impl FnOnce(&mut Pairs)) -> HostResult {
    let kind = MapType::from_wire(map).ok_or(Status::BadArgument)?;
    match c.data_mut().map_mut(kind) {
        Some(fields) => {
            change(fields);
            Ok(())
        }
        None => {
            c.data_mut().miss(call);
            Err(Status::BadArgument.into())
        }
    }
}

fn check_field(c: &mut Guest<'_>, call: &'static str, key: &[u8], value: &[u8]) {
    let bad = |bytes: &[u8]| bytes.iter().any(|b| matches!(b, 0 | b'\r' | b'\n'));
    if key.is_empty() || bad(key) || bad(value) {
        c.data_mut().violate(Violation::InvalidHeader { call });
    }
}

fn get_buffer(c: &mut Guest<'_>, buffer: u32, start: u32, max: u32, out: u32, size: u32) -> HostResult {
    let kind = BufferType::from_wire(buffer).ok_or(Status::BadArgument)?;
    let bytes = c.data().buffer(kind).ok_or(Status::NotFound)?;
    let start = (start as usize).min(bytes.len());
    let end = start.saturating_add(max as usize).min(bytes.len());
    let bytes = bytes[start..end].to_vec();
    give(c, &bytes, out, size)
}

fn buffer_status(c: &mut Guest<'_>, buffer: u32, len: u32, flags: u32) -> HostResult {
    let kind = BufferType::from_wire(buffer).ok_or(Status::BadArgument)?;
    let bytes = c.data().buffer(kind).ok_or(Status::NotFound)?.len();
    write_u32(c, len, bytes as u32)?;
    write_u32(c, flags, 0)
}

/// Start 0 replaces that many bytes at the front, a start at or after the end appends, anything between is refused.
fn set_buffer(c: &mut Guest<'_>, buffer: u32, start: u32, len: u32, data: u32, size: u32) -> HostResult {
    let kind = BufferType::from_wire(buffer).ok_or(Status::BadArgument)?;
    if c.data().buffer(kind).is_none() {
        return Err(Status::NotFound.into());
    }
    let data = read(c, data, size)?;
    let body = c.data_mut().body_mut(kind).ok_or(Status::BadArgument)?;
    let bytes = body.edit().ok_or(Status::BadArgument)?;
    if start == 0 {
        let gone = (len as usize).min(bytes.len());
        bytes.splice(..gone, data);
    } else if start as usize >= bytes.len() {
        bytes.extend_from_slice(&data);
    } else {
        return Err(Status::BadArgument.into());
    }
    if !body.check_limit() || kind != BufferType::RequestBody {
        return Ok(());
    }
    let context = c.data().context();
    let host = c.data_mut();
    if host.streams.get(&context).is_some_and(|s| s.in_decode) {
        host.streams.entry(context).and_modify(|s| s.prepare_reply(LocalReply::too_large()));
        return Ok(());
    }
    host.violate(Violation::BodyOverLimitInCallback { context });
    Err(Fail::Trap(format_err!("the VM was entered again from a host call: body over the limit")))
}

#[allow(clippy::too_many_arguments, reason = "the ABI's")]
fn http_call(
    c: &mut Guest<'_>,
    cluster: u32,
    cluster_len: u32,
    headers: u32,
    headers_len: u32,
    body: u32,
    body_len: u32,
    trailers: u32,
    trailers_len: u32,
    timeout_ms: u32,
    token_out: u32,
) -> HostResult {
    let cluster = String::from_utf8_lossy(&read(c, cluster, cluster_len)?).into_owned();
    let body = read(c, body, body_len)?;
    let mut headers: Pairs = lower(decode_pairs(&read(c, headers, headers_len)?));
    let trailers = lower(decode_pairs(&read(c, trailers, trailers_len)?));
    write_u32(c, token_out, 0)?;
    if i32::try_from(timeout_ms).is_err() {
        return Err(Status::BadArgument.into());
    }
    let state = *c.data().clusters.get(&cluster).ok_or(Status::BadArgument)?;
    if [":path", ":method", ":authority"].iter().any(|name| find_header(&headers, name).is_none()) {
        return Err(Status::BadArgument.into());
    }
    for (key, value) in &headers {
        check_field(c, "proxy_http_call", key, value);
    }
    if !body.is_empty() {
        headers.retain(|(k, _)| k != b"content-length");
        headers.push((b"content-length".to_vec(), body.len().to_string().into_bytes()));
    }
    let host = c.data_mut();
    host.mark_dispatch();
    // Envoy numbers the call before it sends it.
    host.next_call += 4;
    if state == ClusterState::FailsAtOnce {
        return Err(Status::InternalFailure.into());
    }
    let token = host.next_call;
    let timeout = Duration::from_millis(timeout_ms.into());
    let at_ns = host.config.clock.now_ns();
    let monotonic_ns = host.config.clock.monotonic_ns();
    let context = host.context();
    let callout = Callout {
        token,
        cluster,
        headers,
        body,
        trailers,
        timeout,
        context,
        callback: host.callback,
        at_ns,
        root: host.root_of(context),
        deadline_ns: (timeout_ms > 0).then(|| monotonic_ns + timeout.as_nanos() as u64),
    };
    host.callouts.insert(token, callout);
    write_u32(c, token_out, token)
}

fn lower(fields: Pairs) -> Pairs {
    fields.into_iter().map(|(k, v)| (k.to_ascii_lowercase(), v)).collect()
}

fn continue_stream(c: &mut Guest<'_>, kind: u32) -> HostResult {
    let host = c.data_mut();
    let context = host.context();
    let action = match kind {
        0 => Action::ContinueRequest(context),
        1 => Action::ContinueResponse(context),
        2 => return Ok(()),
        3 => return Err(Status::Unimplemented.into()),
        _ => return Err(Status::BadArgument.into()),
    };
    if let Some(stream) = host.streams.get_mut(&context) {
        // Either direction: the request's maps and chunk are gone from here on, also within this callback.
        stream.forget_request();
        host.actions.push_back(action);
    }
    Ok(())
}

fn close_stream(c: &mut Guest<'_>, kind: u32) -> HostResult {
    let host = c.data_mut();
    let context = host.context();
    match kind {
        0 | 1 if host.streams.contains_key(&context) => host.actions.push_back(Action::Reset(context)),
        0..=3 => {}
        _ => return Err(Status::BadArgument.into()),
    }
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the ABI's")]
fn send_local_response(
    c: &mut Guest<'_>,
    code: u32,
    details: u32,
    details_len: u32,
    body: u32,
    body_len: u32,
    headers: u32,
    headers_len: u32,
    _grpc: i32,
) -> HostResult {
    let details = String::from_utf8_lossy(&read(c, details, details_len)?).replace(char::is_whitespace, "_");
    let body = read(c, body, body_len)?;
    let headers = lower(decode_pairs(&read(c, headers, headers_len)?));
    for (key, value) in &headers {
        check_field(c, "proxy_send_local_response", key, value);
    }
    let host = c.data_mut();
    host.mark_reply();
    host.stop_iteration = true;
    let context = host.context();
    if host.streams.contains_key(&context) {
        host.actions.push_back(Action::LocalReply(context, LocalReply { code, details, headers, body }));
    }
    Ok(())
}
