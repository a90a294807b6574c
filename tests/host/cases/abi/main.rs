//! The host against Envoy's behaviour, with guests written by hand.

use pd_host::{Forwarded, Module, SharedStore, Stream, Worker, WorkerConfig};

mod bodies;
mod calls;
mod process;

/// Imports, memory and an allocator. `$note` logs a status as text; strings for the host calls lie below 1024, results
/// from 1024 on: pointer at 1024, size at 1028, a word at 1032.
const PRELUDE: &str = r#"
(import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
(import "env" "proxy_get_buffer_bytes" (func $get_buffer (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_set_buffer_bytes" (func $set_buffer (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_header_map_value" (func $get_header (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_header_map_pairs" (func $get_pairs (param i32 i32 i32) (result i32)))
(import "env" "proxy_get_header_map_size" (func $get_size (param i32 i32) (result i32)))
(import "env" "proxy_add_header_map_value" (func $add_header (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_replace_header_map_value" (func $replace_header (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_remove_header_map_value" (func $remove_header (param i32 i32 i32) (result i32)))
(import "env" "proxy_http_call" (func $call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_continue_stream" (func $continue (param i32) (result i32)))
(import "env" "proxy_send_local_response" (func $reply (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_set_effective_context" (func $effective (param i32) (result i32)))
(import "env" "proxy_set_property" (func $set_property (param i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_property" (func $get_property (param i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_shared_data" (func $get_shared (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_set_shared_data" (func $set_shared (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_define_metric" (func $define (param i32 i32 i32 i32) (result i32)))
(import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
(import "env" "proxy_record_metric" (func $record (param i32 i64) (result i32)))
(import "env" "proxy_get_metric" (func $get_metric (param i32 i32) (result i32)))
(import "env" "proxy_set_tick_period_milliseconds" (func $tick_period (param i32) (result i32)))
(import "env" "proxy_get_current_time_nanoseconds" (func $now (param i32) (result i32)))
(import "env" "proxy_register_shared_queue" (func $register (param i32 i32 i32) (result i32)))
(import "env" "proxy_enqueue_shared_queue" (func $enqueue (param i32 i32 i32) (result i32)))
(import "env" "proxy_dequeue_shared_queue" (func $dequeue (param i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
(memory (export "memory") 2)
(global $heap (mut i32) (i32.const 65536))
(global $stream (mut i32) (i32.const 0))
(global $root (mut i32) (i32.const 0))
(func (export "proxy_abi_version_0_2_1"))
(func (export "malloc") (param $len i32) (result i32)
  (local $at i32)
  (local.set $at (global.get $heap))
  (global.set $heap (i32.add (global.get $heap) (i32.and (i32.add (local.get $len) (i32.const 7)) (i32.const -8))))
  (if (i32.gt_u (global.get $heap) (i32.const 131072)) (then (return (i32.const 0))))
  (local.get $at))
(func $note (param $status i32)
  (i32.store8 (i32.const 1020) (i32.add (i32.const 48) (i32.div_u (local.get $status) (i32.const 10))))
  (i32.store8 (i32.const 1021) (i32.add (i32.const 48) (i32.rem_u (local.get $status) (i32.const 10))))
  (drop (call $log (i32.const 1) (i32.const 1020) (i32.const 2))))
(func $say_result
  (drop (call $log (i32.const 2) (i32.load (i32.const 1024)) (i32.load (i32.const 1028)))))
(func $say_body (param $buffer i32)
  (call $note (call $get_buffer (local.get $buffer) (i32.const 0) (i32.const -1) (i32.const 1024) (i32.const 1028)))
  (call $say_result))
(func $dispatch (result i32)
  (call $call (i32.const 0) (i32.const 7) (i32.const 100) (i32.const 64) (i32.const 16) (i32.const 4)
    (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 1032)))
(data (i32.const 0) "engines")
(data (i32.const 16) "body")
(data (i32.const 32) ":path")
(data (i32.const 40) "x-new")
(data (i32.const 48) "pd.destination")
(data (i32.const 64) "a\00b")
(data (i32.const 72) "shared")
(data (i32.const 80) "1.2.3.4:80")
(data (i32.const 100) "\03\00\00\00\05\00\00\00\02\00\00\00\07\00\00\00\04\00\00\00\0a\00\00\00\02\00\00\00:path\00/p\00:method\00POST\00:authority\00ab\00")
(data (i32.const 200) "request\00path")
"#;

const PAUSE_UNTIL_END: &str = r#"
(func (export "proxy_on_context_create") (param $id i32) (param $root i32)
  (if (local.get $root) (then (global.set $stream (local.get $id))) (else (global.set $root (local.get $id)))))
(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
  (call $note (call $remove_header (i32.const 0) (i32.const 300) (i32.const 14)))
  (i32.const 0))
(data (i32.const 300) "content-length")
"#;

/// The shape of a P/D request: pause the body, call out at its end, edit it and choose when the answer is there, resume.
const SPLIT: &str = r#"
(func (export "proxy_on_request_body") (param i32 i32) (param $end i32) (result i32)
  (if (local.get $end) (then (call $note (call $dispatch))))
  (i32.const 1))
(func (export "proxy_on_http_call_response") (param i32 i32) (param $headers i32) (param i32 i32)
  (call $note (call $effective (global.get $stream)))
  (call $say_body (i32.const 4))
  (call $note (call $set_buffer (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 80) (i32.const 2)))
  (call $note (call $set_property (i32.const 48) (i32.const 14) (i32.const 80) (i32.const 10)))
  (call $note (call $continue (i32.const 0))))
"#;

fn module(parts: &[&str]) -> Module {
    let text = format!("(module {PRELUDE} {})", parts.join("\n"));
    Module::from_bytes(&wat::parse_str(text).unwrap()).unwrap()
}

fn config() -> WorkerConfig {
    WorkerConfig {
        clusters: vec!["engines".into()],
        route_headers: vec![("x-destination".into(), "wasm.pd.destination".into())],
        ..WorkerConfig::default()
    }
}

fn worker(parts: &[&str]) -> Worker {
    Worker::new(&module(parts), SharedStore::new(), config()).unwrap()
}

fn lines(worker: &Worker) -> Vec<String> {
    worker.take_logs().into_iter().map(|(_, line)| line).collect()
}

fn answered(worker: &Worker, stream: &Stream) -> Forwarded {
    let call = worker.callouts().remove(0);
    worker.answer(call.token, [(":status", "200")], "params").unwrap();
    stream.forwarded().expect("resumed")
}
