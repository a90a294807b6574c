//! Host functions of the process side: properties, shared data, queues, metrics, time, log.

use std::time::Duration;

use wasmtime::{Caller, Linker, Result};

use super::call::host_call;
use super::memory::{HostResult, give, read, write_u32, write_u64};
use crate::host::{Action, Host, VM_CONTEXT, Violation};
use crate::{LogLevel, MetricKind, Status};

type Guest<'a> = Caller<'a, Host>;

/// Property roots a root context can read: they need no stream.
const PROCESS_PROPERTIES: [&str; 4] = ["node", "listener_direction", "listener_metadata", "xds"];

pub(crate) fn define(linker: &mut Linker<Host>) -> Result<()> {
    host_call!(linker, "proxy_log", log, (level: u32, message: u32, len: u32));
    host_call!(linker, "proxy_get_log_level", get_log_level, (out: u32));
    host_call!(linker, "proxy_get_current_time_nanoseconds", current_time, (out: u32));
    host_call!(linker, "proxy_set_tick_period_milliseconds", set_tick_period, (period: u32));
    host_call!(linker, "proxy_set_effective_context", set_effective_context, (context: u32));
    host_call!(linker, "proxy_done", done, ());
    host_call!(linker, "proxy_get_status", get_status, (code: u32, out: u32, size: u32));
    host_call!(linker, "proxy_get_property", get_property, (path: u32, len: u32, out: u32, size: u32));
    host_call!(linker, "proxy_set_property", set_property, (path: u32, len: u32, value: u32, size: u32));
    host_call!(
        linker,
        "proxy_get_shared_data",
        get_shared_data,
        (key: u32, len: u32, out: u32, size: u32, cas: u32)
    );
    host_call!(
        linker,
        "proxy_set_shared_data",
        set_shared_data,
        (key: u32, len: u32, value: u32, size: u32, cas: u32)
    );
    host_call!(linker, "proxy_register_shared_queue", register_queue, (name: u32, len: u32, out: u32));
    host_call!(
        linker,
        "proxy_resolve_shared_queue",
        resolve_queue,
        (vm: u32, vm_len: u32, name: u32, len: u32, out: u32)
    );
    host_call!(linker, "proxy_enqueue_shared_queue", enqueue, (token: u32, value: u32, size: u32));
    host_call!(linker, "proxy_dequeue_shared_queue", dequeue, (token: u32, out: u32, size: u32));
    host_call!(linker, "proxy_define_metric", define_metric, (kind: u32, name: u32, len: u32, out: u32));
    host_call!(linker, "proxy_increment_metric", increment_metric, (id: u32, by: i64));
    host_call!(linker, "proxy_record_metric", record_metric, (id: u32, value: u64));
    host_call!(linker, "proxy_get_metric", get_metric, (id: u32, out: u32));
    host_call!(linker, "proxy_call_foreign_function", foreign, (
        name: u32, len: u32, args: u32, args_len: u32, out: u32, size: u32
    ));
    host_call!(linker, "proxy_grpc_call", grpc_call, (
        service: u32, service_len: u32, name: u32, name_len: u32, method: u32, method_len: u32,
        metadata: u32, metadata_len: u32, message: u32, message_len: u32, timeout: u32, token: u32
    ));
    host_call!(linker, "proxy_grpc_stream", grpc_stream, (
        service: u32, service_len: u32, name: u32, name_len: u32, method: u32, method_len: u32,
        metadata: u32, metadata_len: u32, token: u32
    ));
    host_call!(linker, "proxy_grpc_cancel", grpc_end, (token: u32));
    host_call!(linker, "proxy_grpc_close", grpc_end, (token: u32));
    host_call!(linker, "proxy_grpc_send", grpc_send, (token: u32, message: u32, len: u32, end: u32));
    Ok(())
}

fn log(c: &mut Guest<'_>, level: u32, message: u32, len: u32) -> HostResult {
    let level = LogLevel::from_wire(level).ok_or(Status::BadArgument)?;
    let line = String::from_utf8_lossy(&read(c, message, len)?).into_owned();
    c.data_mut().logs.push((level, line));
    Ok(())
}

fn get_log_level(c: &mut Guest<'_>, out: u32) -> HostResult {
    let level = c.data().config.log_level as u32;
    write_u32(c, out, level)
}

fn current_time(c: &mut Guest<'_>, out: u32) -> HostResult {
    let now = c.data().config.clock.now_ns();
    write_u64(c, out, now)
}

fn set_tick_period(c: &mut Guest<'_>, period: u32) -> HostResult {
    let host = c.data_mut();
    let now = host.config.clock.monotonic_ns();
    let root = host.root_of(host.context());
    if let Some(root) = host.roots.get_mut(&root) {
        let period = Duration::from_millis(period.into());
        root.tick_period = (!period.is_zero()).then_some(period);
        root.next_tick_ns = now + period.as_nanos() as u64;
    }
    Ok(())
}

fn set_effective_context(c: &mut Guest<'_>, context: u32) -> HostResult {
    let host = c.data_mut();
    if !host.has_context(context) {
        return Err(Status::BadArgument.into());
    }
    host.effective = context;
    Ok(())
}

fn done(c: &mut Guest<'_>) -> HostResult {
    let host = c.data_mut();
    let context = host.context();
    let pending = host.roots.get_mut(&context).filter(|root| root.pending_done).ok_or(Status::NotFound)?;
    pending.pending_done = false;
    host.actions.push_back(Action::DeleteRoot(context));
    Ok(())
}

fn get_status(c: &mut Guest<'_>, code: u32, out: u32, size: u32) -> HostResult {
    let message = c.data().status_message;
    write_u32(c, code, if message.is_empty() { 0 } else { 11 })?;
    give(c, message.as_bytes(), out, size)
}

fn get_property(c: &mut Guest<'_>, path: u32, len: u32, out: u32, size: u32) -> HostResult {
    let path = read(c, path, len)?;
    if path.is_empty() {
        return Err(Status::SerializationFailure.into());
    }
    let value = property(c.data(), &path).ok_or(Status::NotFound)?;
    give(c, &value, out, size)
}

/// Looks a path up in Envoy's order: attributes, the plugin's own, then filter state by the first element alone.
fn property(host: &Host, path: &[u8]) -> Option<Vec<u8>> {
    let dotted = String::from_utf8_lossy(path).replace('\0', ".");
    let stream = host.stream();
    if let Some(value) = stream.and_then(|s| s.property(path, &dotted)) {
        return Some(value);
    }
    let top = dotted.split('.').next().unwrap_or_default();
    let readable = stream.is_some() || PROCESS_PROPERTIES.contains(&top);
    if let Some(value) = host.config.properties.get(&dotted).filter(|_| readable) {
        return Some(value.to_bytes());
    }
    match path {
        b"plugin_name" => Some(host.config.plugin_name.as_bytes().to_vec()),
        b"plugin_root_id" => {
            let own = host.context() != VM_CONTEXT;
            Some(if own { host.config.root_id.as_bytes().to_vec() } else { Vec::new() })
        }
        b"plugin_vm_id" => Some(host.config.vm_id.as_bytes().to_vec()),
        _ => {
            // A state written under several elements has NUL bytes in its name, and a read looks only for the first.
            (!path.contains(&0)).then_some(())?;
            let key = [b"wasm.", path].concat();
            stream?.filter_state.get(&key).cloned()
        }
    }
}

/// Writes filter state `wasm.<path>`, NUL bytes between elements included. A root context has no stream to write to.
fn set_property(c: &mut Guest<'_>, path: u32, len: u32, value: u32, size: u32) -> HostResult {
    let (path, value) = (read(c, path, len)?, read(c, value, size)?);
    let stream = c.data_mut().stream_mut().ok_or(Status::NotFound)?;
    let key = [b"wasm.", path.as_slice()].concat();
    stream.property_writes.push((key.clone(), value.clone()));
    stream.filter_state.insert(key, value);
    Ok(())
}

fn get_shared_data(c: &mut Guest<'_>, key: u32, len: u32, out: u32, size: u32, cas_out: u32) -> HostResult {
    let key = read(c, key, len)?;
    let host = c.data();
    let (value, cas) = host.shared.get(&host.config.vm_id, &key).ok_or(Status::NotFound)?;
    give(c, &value, out, size)?;
    write_u32(c, cas_out, cas)
}

fn set_shared_data(c: &mut Guest<'_>, key: u32, len: u32, value: u32, size: u32, cas: u32) -> HostResult {
    let (key, value) = (read(c, key, len)?, read(c, value, size)?);
    let host = c.data_mut();
    if let Some(hook) = &mut host.before_set_shared_data {
        hook(&host.shared, &key);
    }
    match host.shared.set(&host.config.vm_id, &key, &value, cas) {
        Status::Ok => Ok(()),
        status => Err(status.into()),
    }
}

fn register_queue(c: &mut Guest<'_>, name: u32, len: u32, out: u32) -> HostResult {
    let name = read(c, name, len)?;
    let host = c.data();
    let owner = (host.worker_id, host.root_of(host.context()));
    let token = host.shared.register_queue(&host.config.vm_id, &name, owner);
    write_u32(c, out, token)
}

fn resolve_queue(c: &mut Guest<'_>, vm: u32, vm_len: u32, name: u32, len: u32, out: u32) -> HostResult {
    let vm = String::from_utf8_lossy(&read(c, vm, vm_len)?).into_owned();
    let name = read(c, name, len)?;
    let host = c.data();
    let vm = if vm.is_empty() { &host.config.vm_id } else { &vm };
    let token = host.shared.resolve_queue(vm, &name).ok_or(Status::NotFound)?;
    write_u32(c, out, token)
}

fn enqueue(c: &mut Guest<'_>, token: u32, value: u32, size: u32) -> HostResult {
    let value = read(c, value, size)?;
    match c.data().shared.enqueue(token, &value) {
        Status::Ok => Ok(()),
        status => Err(status.into()),
    }
}

fn dequeue(c: &mut Guest<'_>, token: u32, out: u32, size: u32) -> HostResult {
    let value = c.data().shared.dequeue(token)?;
    give(c, &value, out, size)
}

/// Every definition gets a new id, also of a name that is defined already; the ids then share one metric.
fn define_metric(c: &mut Guest<'_>, kind: u32, name: u32, len: u32, out: u32) -> HostResult {
    let name = String::from_utf8_lossy(&read(c, name, len)?).into_owned();
    let kinds = [MetricKind::Counter, MetricKind::Gauge, MetricKind::Histogram];
    let metric_kind = *kinds.get(kind as usize).ok_or(Status::BadArgument)?;
    let host = c.data_mut();
    let metric = host.shared.metric(metric_kind, &name);
    let id = host.next_metric[kind as usize] + 4;
    host.next_metric[kind as usize] = id;
    host.metrics.insert(id, (metric_kind, name, metric));
    write_u32(c, out, id)
}

fn increment_metric(c: &mut Guest<'_>, id: u32, by: i64) -> HostResult {
    if id & 3 > 1 {
        return Err(Status::BadArgument.into());
    }
    let host = c.data_mut();
    let (kind, name, metric) = host.metrics.get(&id).ok_or(Status::NotFound)?;
    if by > 0 {
        metric.add(by.unsigned_abs());
    } else if *kind == MetricKind::Counter {
        return Err(Status::BadArgument.into());
    } else if metric.sub(by.unsigned_abs()) {
        let name = name.clone();
        host.violate(Violation::GaugeUnderflow { name });
    }
    Ok(())
}

/// Recording to a counter adds.
fn record_metric(c: &mut Guest<'_>, id: u32, value: u64) -> HostResult {
    let (kind, _, metric) = c.data().metrics.get(&id).ok_or(Status::NotFound)?;
    match kind {
        MetricKind::Counter => metric.add(value),
        MetricKind::Gauge => metric.set(value),
        MetricKind::Histogram => metric.sample(value),
    }
    Ok(())
}

fn get_metric(c: &mut Guest<'_>, id: u32, out: u32) -> HostResult {
    if id & 3 > 1 {
        return Err(Status::BadArgument.into());
    }
    let (_, _, metric) = c.data().metrics.get(&id).ok_or(Status::NotFound)?;
    let value = metric.get();
    write_u64(c, out, value)
}

fn foreign(_: &mut Guest<'_>, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32) -> HostResult {
    Err(Status::NotFound.into())
}

#[allow(clippy::too_many_arguments, reason = "the ABI's")]
fn grpc_call(
    _: &mut Guest<'_>,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
) -> HostResult {
    Err(Status::InternalFailure.into())
}

#[allow(clippy::too_many_arguments, reason = "the ABI's")]
fn grpc_stream(
    _: &mut Guest<'_>,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
    _: u32,
) -> HostResult {
    Err(Status::InternalFailure.into())
}

fn grpc_end(_: &mut Guest<'_>, _: u32) -> HostResult {
    Err(Status::NotFound.into())
}

fn grpc_send(_: &mut Guest<'_>, _: u32, _: u32, _: u32, _: u32) -> HostResult {
    Err(Status::NotFound.into())
}
