//! Root context: configuration, ticks, the poll of `pd-control` and the calls of the exchange. One per worker.

use core::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use log::{error, info, warn};
use pd_core::envoys::client::{CallKind, ExchangeCall};
use pd_core::wire::WIRE_VERSION;
use pd_core::workers::push::Poll;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::ContextType;

use crate::host::{self, Buffer, HostError, Map};
use crate::metrics::MetricIds;
use crate::shell::Shell;
use crate::stream::StreamContext;
use crate::version::{BUILD, FEATURES, VERSION};
use crate::waiting::{WaitingStream, WaitsForTurn};

const NOT_FOUND: HostError = HostError(1);

/// Root context.
pub struct Root {
    id: u32,
    shell: Rc<RefCell<Shell>>,
    poll: Option<u32>,
    calls: Vec<(u32, CallKind)>,
    /// Calls of streams that were started in a callback of this context: their ends come to this context too.
    stream_calls: BTreeMap<u32, WaitingStream>,
}

impl Root {
    /// The root context of that number.
    pub fn new(id: u32) -> Self {
        Self { id, shell: Rc::default(), poll: None, calls: Vec::new(), stream_calls: BTreeMap::new() }
    }

    /// Passes a turn to one waiting request. It is one only, because the host must not start a call and answer a client in the
    /// same callback. If more requests wait, another callback follows.
    fn take_turn(&mut self) {
        let now = host::now();
        let (turn, waiting) = {
            let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
            shell.is_turn_missed = false;
            shell.catch_up(now);
            let turn = shell.worker.next_turn(now);
            let waiting = turn.and_then(|turn| shell.waiting.remove(&turn.id));
            (turn, waiting)
        };
        if let Some(turn) = turn {
            let is_taken = waiting.is_some_and(|waiting| self.with_stream(waiting, |stream| stream.turn(turn, now)));
            if let Ok(mut shell) = self.shell.try_borrow_mut() {
                if !is_taken {
                    shell.worker.forget_waiting(turn.id);
                }
                if shell.worker.has_waiting() {
                    shell.wake_self();
                }
            }
        }
        if let Ok(mut shell) = self.shell.try_borrow_mut() {
            shell.publish(now);
            shell.wake_workers();
            shell.set_tick_period(now);
        }
    }

    /// Runs `act` for a stream in a callback of this context. `false`: the stream is gone.
    fn with_stream(&mut self, of: WaitingStream, act: impl FnOnce(&dyn WaitsForTurn)) -> bool {
        let Some(stream) = of.stream.upgrade() else { return false };
        if host::set_effective_context(of.context).is_err() {
            return false;
        }
        act(&*stream);
        if let Some(token) = stream.call() {
            self.stream_calls.insert(token, of);
        }
        let back = host::set_effective_context(self.id);
        if let Ok(mut shell) = self.shell.try_borrow_mut() {
            shell.expect_ok("root context", back);
        }
        true
    }

    /// Starts a poll, where one is due.
    fn start(&mut self, poll: Option<Poll>) {
        let Some(poll) = poll else { return };
        let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
        let headers = shell.control_headers("GET", poll.path, poll.authority);
        match host::call(&poll.cluster, &headers, None, poll.timeout) {
            Ok(token) => self.poll = Some(token),
            Err(HostError(status)) => {
                let shell = &mut *shell;
                let news = shell.push.not_started(&mut shell.worker, host::now());
                if news.is_some() {
                    warn!("cluster {}: host status {status}", poll.cluster);
                }
                shell.log_news(news);
            }
        }
    }

    /// Starts calls of the exchange.
    fn exchange(&mut self, calls: Vec<ExchangeCall>) {
        let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
        let shell = &mut *shell;
        for ExchangeCall { kind, path, body, timeout } in calls {
            let control = shell.worker.config.as_ref().ok().and_then(|config| config.control.clone());
            let started = control.ok_or(NOT_FOUND).and_then(|control| {
                let headers = shell.control_headers("POST", path, control.authority);
                host::call(&control.cluster, &headers, Some(&body), timeout)
            });
            match started {
                Ok(token) => self.calls.push((token, kind)),
                Err(_) => shell.exchange.failed(&mut shell.worker, kind, host::now()),
            }
        }
    }

    /// Takes the end of a call of the exchange.
    fn exchanged(&mut self, kind: CallKind, has_answer: bool) {
        let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
        let now = host::now();
        // The answer is compared with what all workers of this Envoy know.
        shell.catch_up(now);
        let status = if has_answer { host::status(Map::Call) } else { None };
        let body = host::buffer(Buffer::CallBody).unwrap_or_default();
        {
            let Shell { worker, exchange, .. } = &mut *shell;
            exchange.answered(worker, kind, status, &body, now);
        }
        shell.publish(now);
        shell.wake_workers();
        shell.set_tick_period(now);
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, num_headers: usize, _: usize, _: usize) {
        if let Some(index) = self.calls.iter().position(|(started, _)| *started == token) {
            let (_, kind) = self.calls.swap_remove(index);
            self.exchanged(kind, num_headers > 0);
            return;
        }
        if let Some(of) = self.stream_calls.remove(&token) {
            self.with_stream(of, |stream| stream.call_ended(token, num_headers));
            return;
        }
        if self.poll != Some(token) {
            return;
        }
        self.poll = None;
        let poll = {
            let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
            let shell = &mut *shell;
            let status = if num_headers > 0 { host::status(Map::Call) } else { None };
            let body = host::buffer(Buffer::CallBody).unwrap_or_default();
            let (poll, news) = shell.push.answered(&mut shell.worker, &shell.metrics, status, &body, host::now());
            shell.log_news(news);
            poll
        };
        self.start(poll);
    }

    /// Flushes the counts a last time: the root context ticks no more. Otherwise gauges would keep the counts of its last
    /// requests.
    fn on_done(&mut self) -> bool {
        if let Ok(mut shell) = self.shell.try_borrow_mut() {
            shell.flush();
        }
        true
    }
}

impl RootContext for Root {
    fn on_vm_start(&mut self, _: usize) -> bool {
        info!("pd-filter {VERSION} build {BUILD} features {FEATURES} wire {WIRE_VERSION}");
        true
    }

    /// Always true: where a plugin refuses its configuration, Envoy may fail every request until the next change.
    fn on_configure(&mut self, _: usize) -> bool {
        let Ok(mut shell) = self.shell.try_borrow_mut() else { return true };
        match MetricIds::define() {
            Ok(metrics) => shell.metrics = metrics,
            Err(HostError(status)) => warn!("metrics cannot be defined: host status {status}"),
        }
        match host::buffer(Buffer::PluginConfiguration) {
            Ok(text) => shell.configure(&text),
            // No configuration at all.
            Err(NOT_FOUND) => shell.configure(b""),
            Err(HostError(status)) => error!("plugin configuration cannot be read: host status {status}"),
        }
        shell.set_tick_period(host::now());
        true
    }

    fn on_queue_ready(&mut self, queue: u32) {
        let is_first = self.shell.try_borrow_mut().is_ok_and(|mut shell| shell.wakes.take_all(queue));
        if is_first {
            self.take_turn();
        }
    }

    fn on_tick(&mut self) {
        let (poll, calls) = {
            let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
            let now = host::now();
            shell.catch_up(now);
            let calls = shell.exchange(now);
            shell.publish(now);
            // The exchange and waiting requests may tick more often than the rest.
            let is_whole = shell.pace.is_whole(now);
            let poll = if is_whole { shell.whole_tick(now) } else { None };
            if shell.worker.has_waiting() {
                shell.wake_self();
            }
            shell.wake_workers();
            shell.set_tick_period(now);
            (poll, calls)
        };
        // Where the host has no queues, the turn is taken here, unless this callback starts calls.
        let is_quiet = poll.is_none() && calls.is_empty();
        self.start(poll);
        self.exchange(calls);
        if is_quiet && self.shell.try_borrow().is_ok_and(|shell| shell.is_turn_missed) {
            self.take_turn();
        }
    }

    fn create_http_context(&self, context: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(StreamContext::new(Rc::clone(&self.shell), context)))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}
