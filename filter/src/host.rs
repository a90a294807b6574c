//! Host calls. Every status that the host answers is a value.
//!
//! The SDK's own calls panic on a status that they do not expect, and a panic ends the worker's VM until the next change of
//! the configuration. So this module declares the imports itself, with plain integers for the status. Only the call-out
//! goes through the SDK, which needs its token to find the context again.

use core::time::Duration;
use std::ptr::{null_mut, slice_from_raw_parts_mut};

use pd_core::headers::Headers;
use pd_core::metrics::MetricKind;
use pd_core::time::Monotonic;

/// Status of a host call that did not succeed, as the ABI numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostError(pub u32);

/// Result of a host call.
pub type HostResult<T> = Result<T, HostError>;

/// Header maps, as the ABI numbers them.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Map {
    /// Request headers; gone once the headers phase is over.
    Request = 0,
    /// Response headers, in the callback that has them.
    Response = 2,
    /// Headers of a call-out's answer, in the callback that has it.
    Call = 6,
}

/// Buffers, as the ABI numbers them.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Buffer {
    /// Request body, as far as it is buffered.
    RequestBody = 0,
    /// The part of the response body that the callback has.
    ResponseBody = 1,
    /// Body of a call-out's answer, in the callback that has it.
    CallBody = 4,
    /// Plugin configuration, in the callback that has it.
    PluginConfiguration = 7,
}

mod abi {
    #[link(wasm_import_module = "env")]
    unsafe extern "C" {
        pub fn proxy_get_header_map_pairs(map: u32, data: *mut *mut u8, size: *mut usize) -> u32;
        pub fn proxy_get_header_map_value(
            map: u32,
            key: *const u8,
            key_size: usize,
            data: *mut *mut u8,
            size: *mut usize,
        ) -> u32;
        pub fn proxy_remove_header_map_value(map: u32, key: *const u8, key_size: usize) -> u32;
        pub fn proxy_replace_header_map_value(
            map: u32,
            key: *const u8,
            key_size: usize,
            value: *const u8,
            value_size: usize,
        ) -> u32;
        pub fn proxy_add_header_map_value(
            map: u32,
            key: *const u8,
            key_size: usize,
            value: *const u8,
            value_size: usize,
        ) -> u32;
        pub fn proxy_get_buffer_bytes(
            buffer: u32,
            start: usize,
            max: usize,
            data: *mut *mut u8,
            size: *mut usize,
        ) -> u32;
        pub fn proxy_set_buffer_bytes(buffer: u32, start: usize, size: usize, data: *const u8, data_size: usize)
        -> u32;
        pub fn proxy_get_property(path: *const u8, path_size: usize, data: *mut *mut u8, size: *mut usize) -> u32;
        pub fn proxy_set_property(path: *const u8, path_size: usize, value: *const u8, value_size: usize) -> u32;
        pub fn proxy_send_local_response(
            status: u32,
            details: *const u8,
            details_size: usize,
            body: *const u8,
            body_size: usize,
            headers: *const u8,
            headers_size: usize,
            grpc_status: i32,
        ) -> u32;
        pub fn proxy_continue_stream(stream: u32) -> u32;
        pub fn proxy_define_metric(kind: u32, name: *const u8, name_size: usize, id: *mut u32) -> u32;
        pub fn proxy_increment_metric(id: u32, offset: i64) -> u32;
        pub fn proxy_record_metric(id: u32, value: u64) -> u32;
        pub fn proxy_get_metric(id: u32, value: *mut u64) -> u32;
        pub fn proxy_get_shared_data(
            key: *const u8,
            key_size: usize,
            data: *mut *mut u8,
            size: *mut usize,
            cas: *mut u32,
        ) -> u32;
        pub fn proxy_set_shared_data(
            key: *const u8,
            key_size: usize,
            value: *const u8,
            value_size: usize,
            cas: u32,
        ) -> u32;
        pub fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
        pub fn proxy_set_effective_context(context: u32) -> u32;
        pub fn proxy_register_shared_queue(name: *const u8, name_size: usize, token: *mut u32) -> u32;
        pub fn proxy_resolve_shared_queue(
            vm_id: *const u8,
            vm_id_size: usize,
            name: *const u8,
            name_size: usize,
            token: *mut u32,
        ) -> u32;
        pub fn proxy_enqueue_shared_queue(token: u32, value: *const u8, value_size: usize) -> u32;
        pub fn proxy_dequeue_shared_queue(token: u32, data: *mut *mut u8, size: *mut usize) -> u32;
    }

    #[link(wasm_import_module = "wasi_snapshot_preview1")]
    unsafe extern "C" {
        pub fn clock_time_get(clock: u32, precision: u64, time: *mut u64) -> u16;
    }
}

fn check(status: u32) -> HostResult<()> {
    if status == 0 { Ok(()) } else { Err(HostError(status)) }
}

/// Takes over a buffer that the host allocated in this VM.
fn returned(status: u32, data: *mut u8, size: usize) -> HostResult<Vec<u8>> {
    check(status)?;
    if data.is_null() || size == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the host allocated `size` bytes by `proxy_on_memory_allocate`, which leaks a boxed slice of that size, and
    // hands it to nobody else.
    Ok(unsafe { Box::from_raw(slice_from_raw_parts_mut(data, size)) }.into_vec())
}

/// Time of WASI's monotonic clock, which all workers of the process share. The ABI's own clock is wall-clock time.
pub fn now() -> Monotonic {
    const MONOTONIC: u32 = 1;
    let mut nanos = 0;
    // SAFETY: `nanos` outlives the call.
    unsafe { abi::clock_time_get(MONOTONIC, 0, &mut nanos) };
    Monotonic::from_nanos(nanos)
}

/// All headers of a map.
pub fn headers(map: Map) -> HostResult<Headers> {
    let (mut data, mut size) = (null_mut(), 0);
    // SAFETY: both out-pointers outlive the call.
    let status = unsafe { abi::proxy_get_header_map_pairs(map as u32, &mut data, &mut size) };
    returned(status, data, size).map(Headers::from_wire)
}

/// First value of a header.
pub fn header(map: Map, name: &str) -> HostResult<Vec<u8>> {
    let (mut data, mut size) = (null_mut(), 0);
    // SAFETY: pointer and length are of one string, both out-pointers outlive the call.
    let status =
        unsafe { abi::proxy_get_header_map_value(map as u32, name.as_ptr(), name.len(), &mut data, &mut size) };
    returned(status, data, size)
}

/// HTTP status in a map of response headers; `None` where it has none.
pub fn status(map: Map) -> Option<u16> {
    let value = header(map, ":status").ok()?;
    core::str::from_utf8(&value).ok()?.parse().ok()
}

/// Removes every value of a header.
pub fn remove_header(map: Map, name: &[u8]) -> HostResult<()> {
    // SAFETY: pointer and length are of one slice.
    check(unsafe { abi::proxy_remove_header_map_value(map as u32, name.as_ptr(), name.len()) })
}

/// Sets a header, in place of all of that name.
pub fn set_header(map: Map, name: &str, value: &[u8]) -> HostResult<()> {
    // SAFETY: pointers and lengths are of one string or slice each.
    check(unsafe {
        abi::proxy_replace_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len())
    })
}

/// Adds a header.
pub fn add_header(map: Map, name: &str, value: &str) -> HostResult<()> {
    // SAFETY: pointers and lengths are of one string each.
    check(unsafe {
        abi::proxy_add_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len())
    })
}

/// The whole of a buffer.
pub fn buffer(buffer: Buffer) -> HostResult<Vec<u8>> {
    const ALL: usize = i32::MAX as usize;
    let (mut data, mut size) = (null_mut(), 0);
    // SAFETY: both out-pointers outlive the call.
    let status = unsafe { abi::proxy_get_buffer_bytes(buffer as u32, 0, ALL, &mut data, &mut size) };
    returned(status, data, size)
}

/// Replaces the first `drain` bytes of a buffer.
pub fn replace_front(buffer: Buffer, drain: usize, front: &[u8]) -> HostResult<()> {
    // SAFETY: pointer and length are of one slice.
    check(unsafe { abi::proxy_set_buffer_bytes(buffer as u32, 0, drain, front.as_ptr(), front.len()) })
}

/// A property; path elements are separated by NUL.
pub fn property(path: &str) -> HostResult<Vec<u8>> {
    let (mut data, mut size) = (null_mut(), 0);
    // SAFETY: pointer and length are of one string, both out-pointers outlive the call.
    let status = unsafe { abi::proxy_get_property(path.as_ptr(), path.len(), &mut data, &mut size) };
    returned(status, data, size)
}

/// Sets a property, which Envoy keeps as filter state under `wasm.<path>`.
pub fn set_property(path: &str, value: &[u8]) -> HostResult<()> {
    // SAFETY: pointers and lengths are of one slice each.
    check(unsafe { abi::proxy_set_property(path.as_ptr(), path.len(), value.as_ptr(), value.len()) })
}

/// Answers the client. Call it as the last act of a callback.
pub fn reply(status: u16, details: &str, headers: &[(&'static str, String)], body: &[u8]) -> HostResult<()> {
    let headers = Headers::from_pairs(headers.iter().map(|(name, value)| (*name, value.as_str()))).into_wire();
    // SAFETY: pointers and lengths are of one slice each.
    check(unsafe {
        abi::proxy_send_local_response(
            u32::from(status),
            details.as_ptr(),
            details.len(),
            body.as_ptr(),
            body.len(),
            headers.as_ptr(),
            headers.len(),
            -1,
        )
    })
}

/// Lets a paused request go on. Call it as the last act of a callback.
pub fn resume_request() -> HostResult<()> {
    const HTTP_REQUEST: u32 = 0;
    // SAFETY: no pointers.
    check(unsafe { abi::proxy_continue_stream(HTTP_REQUEST) })
}

/// Resumes a response at its held headers. Call it as the last act of a callback.
pub fn resume_response() -> HostResult<()> {
    const HTTP_RESPONSE: u32 = 1;
    // SAFETY: no pointers.
    check(unsafe { abi::proxy_continue_stream(HTTP_RESPONSE) })
}

/// Defines a metric, or finds the one with that name; its number.
pub fn define_metric(kind: MetricKind, name: &str) -> HostResult<u32> {
    let kind = match kind {
        MetricKind::Counter => 0,
        MetricKind::Gauge => 1,
        MetricKind::Histogram => 2,
    };
    let mut id = 0;
    // SAFETY: pointer and length are of one string, the out-pointer outlives the call.
    check(unsafe { abi::proxy_define_metric(kind, name.as_ptr(), name.len(), &mut id) }).map(|()| id)
}

/// Adds to a counter or gauge.
pub fn increment_metric(id: u32, offset: i64) -> HostResult<()> {
    // SAFETY: no pointers.
    check(unsafe { abi::proxy_increment_metric(id, offset) })
}

/// Sets a gauge, or records a value of a histogram.
pub fn record_metric(id: u32, value: u64) -> HostResult<()> {
    // SAFETY: no pointers.
    check(unsafe { abi::proxy_record_metric(id, value) })
}

/// Reads a counter or gauge.
pub fn metric(id: u32) -> HostResult<u64> {
    let mut value = 0;
    // SAFETY: the out-pointer outlives the call.
    check(unsafe { abi::proxy_get_metric(id, &mut value) }).map(|()| value)
}

/// Value and version of a key in shared data.
pub fn shared_data(key: &str) -> HostResult<(Vec<u8>, u32)> {
    let (mut data, mut size, mut version) = (null_mut(), 0, 0);
    // SAFETY: pointer and length are of one string, the out-pointers outlive the call.
    let status = unsafe { abi::proxy_get_shared_data(key.as_ptr(), key.len(), &mut data, &mut size, &mut version) };
    returned(status, data, size).map(|value| (value, version))
}

/// Writes a key in shared data; with a version only if the key still has it.
pub fn set_shared_data(key: &str, value: &[u8], version: Option<u32>) -> HostResult<()> {
    let cas = version.unwrap_or(0);
    // SAFETY: pointers and lengths are of one slice each.
    check(unsafe { abi::proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), cas) })
}

/// Sets the time between two ticks of the root context.
pub fn set_tick_period(period: Duration) -> HostResult<()> {
    let period = u32::try_from(period.as_millis()).unwrap_or(u32::MAX);
    // SAFETY: no pointers.
    check(unsafe { abi::proxy_set_tick_period_milliseconds(period) })
}

/// Makes the host calls that follow in this callback act on another context.
pub fn set_effective_context(context: u32) -> HostResult<()> {
    // SAFETY: no pointers.
    check(unsafe { abi::proxy_set_effective_context(context) })
}

/// Makes this root context the one that is woken by items of a queue; the queue's token.
pub fn register_queue(name: &str) -> HostResult<u32> {
    let mut token = 0;
    // SAFETY: pointer and length are of one string, the out-pointer outlives the call.
    check(unsafe { abi::proxy_register_shared_queue(name.as_ptr(), name.len(), &mut token) }).map(|()| token)
}

/// The token of a queue that another worker registered.
pub fn resolve_queue(vm_id: &[u8], name: &str) -> HostResult<u32> {
    let mut token = 0;
    // SAFETY: pointers and lengths are of one slice or string each, the out-pointer outlives the call.
    let status =
        unsafe { abi::proxy_resolve_shared_queue(vm_id.as_ptr(), vm_id.len(), name.as_ptr(), name.len(), &mut token) };
    check(status).map(|()| token)
}

/// Puts an item into a queue, which wakes the root context that registered it.
pub fn enqueue(token: u32, item: &[u8]) -> HostResult<()> {
    // SAFETY: pointer and length are of one slice.
    check(unsafe { abi::proxy_enqueue_shared_queue(token, item.as_ptr(), item.len()) })
}

/// Takes an item out of a queue; an error where it has none.
pub fn dequeue(token: u32) -> HostResult<Vec<u8>> {
    let (mut data, mut size) = (null_mut(), 0);
    // SAFETY: both out-pointers outlive the call.
    let status = unsafe { abi::proxy_dequeue_shared_queue(token, &mut data, &mut size) };
    returned(status, data, size)
}

/// Starts a call-out for the current context and returns its token.
pub fn call(cluster: &str, headers: &Headers, body: Option<&[u8]>, timeout: Duration) -> HostResult<u32> {
    let pairs = headers.iter().map(|(name, value)| (as_str(name), as_str(value))).collect();
    proxy_wasm::hostcalls::dispatch_http_call(cluster, pairs, body, Vec::new(), timeout)
        .map_err(|status| HostError(status as u32))
}

/// Header bytes in the type that the SDK takes. Header values may be any bytes; the SDK reads only the bytes and lengths of
/// its `&str`.
fn as_str(bytes: &[u8]) -> &str {
    // SAFETY: the string goes to `dispatch_http_call` alone, which (in 0.2.5, the version that is pinned) copies its
    // bytes into the serialised map and calls no method that relies on UTF-8.
    unsafe { core::str::from_utf8_unchecked(bytes) }
}
