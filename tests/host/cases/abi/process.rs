//! What the workers of one process share, and modules that do not load.

use std::time::Duration;

use pd_host::{Fleet, LogLevel, Measure, Module, ModuleOptions, Request, SharedStore, Violation, Worker, WorkerConfig};

use crate::{PAUSE_UNTIL_END, PRELUDE, SPLIT, answered, config, lines, module, worker};

#[test]
fn properties_are_filter_state_under_the_whole_path() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $note (call $set_property (i32.const 48) (i32.const 14) (i32.const 16) (i32.const 4)))
        (call $note (call $get_property (i32.const 48) (i32.const 14) (i32.const 1024) (i32.const 1028)))
        (call $say_result)
        (call $note (call $set_property (i32.const 64) (i32.const 3) (i32.const 16) (i32.const 4)))
        (call $note (call $get_property (i32.const 64) (i32.const 3) (i32.const 1024) (i32.const 1028)))
        (call $note (call $get_property (i32.const 360) (i32.const 14) (i32.const 1024) (i32.const 1028)))
        (call $say_result)
        (call $note (call $get_property (i32.const 380) (i32.const 14) (i32.const 1024) (i32.const 1028)))
        (call $say_result)
        (i32.const 0))
      (func (export "proxy_on_tick") (param i32)
        (call $note (call $set_property (i32.const 48) (i32.const 14) (i32.const 16) (i32.const 4))))
      (func (export "proxy_on_configure") (param i32 i32) (result i32)
        (drop (call $tick_period (i32.const 10))) (i32.const 1))
      (data (i32.const 360) "plugin_root_id")
      (data (i32.const 380) "source\00address")"#]);
    let stream = worker.stream();
    stream.set_property("source.address", "9.9.9.9:1");
    stream.request_headers([(":path", "/")], true);
    assert_eq!(lines(&worker), ["00", "00", "body", "00", "01", "00", "root", "00", "9.9.9.9:1"]);
    let names: Vec<String> = stream.filter_state().into_keys().collect();
    assert_eq!(names, ["wasm.a\0b", "wasm.pd.destination"]);
    worker.tick();
    assert_eq!(lines(&worker), ["01"]);
}

#[test]
fn shared_data_is_compared_and_swapped_across_workers() {
    let guest = module(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $note (call $get_shared (i32.const 72) (i32.const 6) (i32.const 1024) (i32.const 1028) (i32.const 1032)))
        (call $note (call $set_shared (i32.const 72) (i32.const 6) (i32.const 16) (i32.const 4) (i32.load (i32.const 1032))))
        (i32.const 0))"#]);
    let fleet = Fleet::new(&guest, 4, SharedStore::new(), config()).unwrap();
    for (i, worker) in fleet.workers().iter().enumerate() {
        Request::get("/").send(worker);
        assert_eq!(lines(worker), if i == 0 { ["01", "00"] } else { ["00", "00"] });
    }
    assert_eq!(fleet.shared().get("vm", b"shared").unwrap().0, b"body");
    fleet.workers()[1].before_set_shared_data(|shared, key| {
        shared.set("vm", key, b"raced", 0);
    });
    Request::get("/").send(&fleet.workers()[1]);
    assert_eq!(lines(&fleet.workers()[1]), ["00", "08"]);
    assert_eq!(fleet.shared().get("vm", b"shared").unwrap().0, b"raced");
}

#[test]
fn metrics_are_the_process_s_and_every_definition_has_its_own_id() {
    let guest = module(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (local $a i32) (local $b i32)
        (call $note (call $define (i32.const 0) (i32.const 72) (i32.const 6) (i32.const 1032)))
        (local.set $a (i32.load (i32.const 1032)))
        (call $note (call $define (i32.const 0) (i32.const 72) (i32.const 6) (i32.const 1032)))
        (local.set $b (i32.load (i32.const 1032)))
        (call $note (i32.ne (local.get $a) (local.get $b)))
        (call $note (call $increment (local.get $a) (i64.const 2)))
        (call $note (call $record (local.get $b) (i64.const 3)))
        (call $note (call $increment (local.get $a) (i64.const 0)))
        (call $note (call $get_metric (local.get $b) (i32.const 1032)))
        (call $note (i32.load (i32.const 1032)))
        (call $note (call $get_metric (i32.const 4000) (i32.const 1032)))
        (call $note (call $get_metric (i32.const 2) (i32.const 1032)))
        (call $note (call $define (i32.const 3) (i32.const 72) (i32.const 6) (i32.const 1032)))
        (call $note (call $define (i32.const 1) (i32.const 72) (i32.const 6) (i32.const 1032)))
        (call $note (call $increment (i32.load (i32.const 1032)) (i64.const -1)))
        (i32.const 0))"#]);
    let fleet = Fleet::new(&guest, 2, SharedStore::new(), config()).unwrap();
    let first = &fleet.workers()[0];
    Request::get("/").send(first);
    assert_eq!(lines(first), ["00", "00", "01", "00", "00", "02", "00", "05", "01", "02", "02", "00", "00"]);
    Request::get("/").send(&fleet.workers()[1]);
    assert_eq!(fleet.shared().counter("shared"), 10);
    assert_eq!(first.violations(), [Violation::GaugeUnderflow { name: "shared".into() }]);
}

#[test]
fn ticks_of_two_generations_run_in_the_order_of_time() {
    let guest = module(&[r#"
      (func (export "proxy_on_configure") (param i32) (param $bytes i32) (result i32)
        (drop (call $tick_period (local.get $bytes)))
        (call $note (call $get_buffer (i32.const 7) (i32.const 0) (i32.const 99) (i32.const 1024) (i32.const 1028)))
        (call $say_result)
        (i32.const 1))
      (func (export "proxy_on_tick") (param $root i32)
        (call $note (call $enqueue (i32.load (i32.const 1040)) (i32.const 16) (i32.const 4))))
      (func (export "proxy_on_vm_start") (param i32 i32) (result i32)
        (call $note (call $register (i32.const 72) (i32.const 6) (i32.const 1040))) (i32.const 1))
      (func (export "proxy_on_queue_ready") (param i32) (param $queue i32)
        (call $note (call $dequeue (local.get $queue) (i32.const 1024) (i32.const 1028)))
        (call $say_result))"#]);
    let config = WorkerConfig { plugin_configuration: b"abc".to_vec(), ..config() };
    let mut fleet = Fleet::new(&guest, 2, SharedStore::new(), config).unwrap();
    assert_eq!(lines(&fleet.workers()[0]), ["00", "00", "abc"]);
    assert_eq!(fleet.workers()[0].tick_period(), Some(Duration::from_millis(3)));
    fleet.reconfigure(b"abcde", None).unwrap();
    assert_eq!((fleet.workers().len(), fleet.draining().len()), (2, 2));
    for worker in fleet.workers() {
        worker.take_logs();
    }
    fleet.advance(Duration::from_millis(6));
    // The old ones at 3 and 6, the new ones at 5.
    assert_eq!(lines(&fleet.draining()[0]), ["00", "00", "abc", "00", "00"][3..]);
    assert_eq!(lines(&fleet.workers()[0]), ["00"]);
    fleet.run_posted();
    assert_eq!(lines(&fleet.workers()[1]).len(), 1 + 2 * 6, "the last to register is notified of every item");
    fleet.retire();
    assert!(fleet.violations().is_empty());
}

#[test]
fn throwaway_vms_only_try_the_configuration() {
    let guest = module(&[r#"
      (func (export "proxy_on_configure") (param i32) (param $bytes i32) (result i32)
        (drop (call $dispatch)) (local.get $bytes))
      (func (export "proxy_on_done") (param i32) (result i32) (unreachable))"#]);
    let config = WorkerConfig { plugin_configuration: b"x".to_vec(), ..config() };
    let worker = Worker::new(&guest, SharedStore::new(), config).unwrap();
    let tried = worker.start_throwaway(b"").unwrap();
    assert!(!tried.accepted && !worker.is_failed());
    assert_eq!(tried.violations.len(), 1);
    assert!(worker.start_throwaway(b"y").unwrap().accepted);
    assert!(worker.reconfigure(b"").unwrap().is_failed());
}

#[test]
fn two_roots_can_share_a_vm() {
    let worker = worker(&[
        PAUSE_UNTIL_END,
        r#"
      (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (call $note (global.get $root)) (i32.const 1))"#,
    ]);
    let old = worker.stream();
    let root = worker.add_root(b"new");
    assert_eq!(lines(&worker), ["01", "03"]);
    assert_eq!(root, 3);
    old.request_headers([(":path", "/")], true);
    Request::get("/").send(&worker);
    old.done();
    worker.retire_root(1);
    assert_eq!(worker.root(), root);
    worker.shutdown();
    worker.assert_clean();
}

#[test]
fn time_and_output_come_from_the_host() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (drop (call $now (i32.const 1040)))
        (drop (call $clock (i32.const 0) (i64.const 0) (i32.const 1048)))
        (call $note (i64.eq (i64.load (i32.const 1040)) (i64.load (i32.const 1048))))
        (call $note (i64.eq (i64.load (i32.const 1040)) (i64.const 7)))
        (i32.store (i32.const 1056) (i32.const 16))
        (i32.store (i32.const 1060) (i32.const 4))
        (call $note (call $fd_write (i32.const 2) (i32.const 1056) (i32.const 1) (i32.const 1064)))
        (call $note (call $fd_write (i32.const 5) (i32.const 1056) (i32.const 1) (i32.const 1064)))
        (i32.const 0))"#]);
    worker.clock().set_wall(7);
    Request::get("/").send(&worker);
    let logs = worker.take_logs();
    let text: Vec<&str> = logs.iter().map(|(_, line)| line.as_str()).collect();
    assert_eq!(text, ["01", "01", "body", "00", "08"]);
    assert_eq!(logs[2].0, LogLevel::Error);
    assert_eq!(worker.memory_bytes(), 2 * 65536);
}

#[test]
fn requests_are_measured_and_leave_nothing_behind() {
    let text = format!("(module {PRELUDE} {PAUSE_UNTIL_END} {})", SPLIT.replace("(call $say_body (i32.const 4))", ""));
    let guest = Module::with_options(&wat::parse_str(text).unwrap(), ModuleOptions { fuel: true }).unwrap();
    let worker = Worker::new(&guest, SharedStore::new(), config()).unwrap();
    let measured = Measure::run(&worker, 1000, |worker| {
        let stream = Request::post("/", "a").send(worker);
        answered(worker, &stream);
        stream.done();
    });
    assert_eq!(measured.host_calls["proxy_http_call"], 1000);
    assert_eq!(measured.callbacks["proxy_on_http_call_response"].calls, 1000);
    assert_eq!(measured.memory_growth_bytes, 0);
    assert!(measured.fuel.is_some_and(|fuel| fuel > 10_000));
    assert_eq!((worker.open_streams(), worker.callouts().len()), (0, 0));
    worker.assert_clean();
}

#[test]
fn workers_run_on_threads_of_their_own() {
    let fleet = Fleet::new(&module(&[PAUSE_UNTIL_END, SPLIT]), 4, SharedStore::new(), config()).unwrap();
    std::thread::scope(|scope| {
        for worker in fleet.workers() {
            scope.spawn(|| {
                let stream = Request::post("/", "abc").send(worker);
                assert_eq!(answered(worker, &stream).body, b"1.bc");
            });
        }
    });
    assert!(fleet.violations().is_empty());
}

#[test]
fn what_envoy_would_not_load_is_an_error() {
    let load = |text: &str| Module::from_bytes(&wat::parse_str(text).unwrap()).unwrap_err().to_string();
    assert!(load("(module)").contains("proxy_abi_version_0_2_1"));
    let foreign = r#"(module (import "env" "proxy_get_configuration" (func))
      (func (export "proxy_abi_version_0_2_1")))"#;
    assert!(load(foreign).contains("proxy_get_configuration"));
    let initialising = module(&[r#"(func (export "_initialize") (drop (call $tick_period (i32.const 1))))"#]);
    let worker = Worker::new(&initialising, SharedStore::new(), config()).unwrap();
    assert!(worker.is_failed());
    assert_eq!(worker.violations()[0], Violation::RestrictedCall { call: "proxy_set_tick_period_milliseconds" });
}
