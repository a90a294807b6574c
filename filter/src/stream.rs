//! HTTP context: one request.

use core::cell::RefCell;
use std::rc::{Rc, Weak};

use log::warn;
use pd_core::headers::Headers;
use pd_core::request::upstream::AnswerSource;
use pd_core::request::{Effect, Flow, Outcome, PrefillAnswer, Request};
use pd_core::time::Monotonic;
use pd_core::workers::bind::Turn;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

use crate::host::{self, Buffer, Map};
use crate::shell::Shell;
use crate::waiting::{WaitingStream, WaitsForTurn};

/// One request and the worker it belongs to.
pub struct Stream {
    shell: Rc<RefCell<Shell>>,
    context: u32,
    /// The stream itself, for the time that its request waits.
    own: Weak<RefCell<Self>>,
    request: Request,
    call: Option<u32>,
    waiting: Option<u64>,
}

/// A stream as the SDK calls it. The root context calls the same one when it is a waiting request's turn.
pub struct StreamContext(Rc<RefCell<Stream>>);

impl StreamContext {
    /// A request before its first event.
    pub fn new(shell: Rc<RefCell<Shell>>, context: u32) -> Self {
        Self(Rc::new_cyclic(|own| {
            let (own, request) = (Weak::clone(own), Request::default());
            RefCell::new(Stream { shell, context, own, request, call: None, waiting: None })
        }))
    }
}

impl WaitsForTurn for RefCell<Stream> {
    fn turn(&self, turn: Turn, now: Monotonic) {
        if let Ok(mut stream) = self.try_borrow_mut() {
            stream.turn(turn, now);
        }
    }

    fn call_ended(&self, token: u32, num_headers: usize) {
        if let Ok(mut stream) = self.try_borrow_mut() {
            stream.call_ended(token, num_headers);
        }
    }

    fn call(&self) -> Option<u32> {
        self.try_borrow().ok().and_then(|stream| stream.call)
    }
}

impl Stream {
    /// It is the turn of this stream's request.
    fn turn(&mut self, turn: Turn, now: Monotonic) {
        let body = || host::buffer(Buffer::RequestBody).ok();
        let flow = self.step(now, |request, shell| request.turn(&mut shell.worker, turn, body, now));
        self.resume(flow);
    }

    /// A call ended.
    fn call_ended(&mut self, token: u32, num_headers: usize) {
        if self.call != Some(token) {
            return;
        }
        self.call = None;
        let now = host::now();
        let status = if num_headers > 0 { host::status(Map::Call) } else { None };
        // pd-core passes answers other than 200 on to the client, with their type.
        let is_passed_on = status.is_some_and(|status| status != 200);
        let content_type = if is_passed_on { host::header(Map::Call, "content-type").ok() } else { None };
        let answer_body = host::buffer(Buffer::CallBody).unwrap_or_default();
        let answer = match status {
            Some(status) => {
                PrefillAnswer::Answered { status, content_type: content_type.as_deref(), body: &answer_body }
            }
            None => PrefillAnswer::None,
        };
        let body = || host::buffer(Buffer::RequestBody).ok();
        let flow = self.step(now, |request, shell| {
            shell.catch_up(now);
            request.prefill_answer(&mut shell.worker, answer, body, now)
        });
        self.resume(flow);
    }

    fn resume(&self, flow: Flow) {
        if flow == Flow::Continue {
            let resumed = host::resume_request();
            if let Ok(mut shell) = self.shell.try_borrow_mut() {
                shell.expect_ok("resume", resumed);
            }
        }
    }

    /// Notes whether the request waits now, so that the root context finds the stream when it is its turn.
    fn note_waiting(&mut self, shell: &mut Shell, now: Monotonic) {
        let waiting = self.request.waiting_id();
        if self.waiting == waiting {
            return;
        }
        if let Some(before) = self.waiting {
            shell.waiting.remove(&before);
        }
        self.waiting = waiting;
        if let Some(id) = waiting {
            let own = Weak::clone(&self.own);
            shell.waiting.insert(id, WaitingStream { context: self.context, stream: own });
            shell.set_tick_period(now);
        }
    }

    /// Passes an event to the request, carries out its effects and publishes what happened.
    fn step(&mut self, now: Monotonic, event: impl FnOnce(&mut Request, &mut Shell) -> Outcome) -> Flow {
        let shell = Rc::clone(&self.shell);
        let Ok(mut shell) = shell.try_borrow_mut() else { return Flow::Continue };
        let outcome = event(&mut self.request, &mut shell);
        let flow = self.carry_out_all(&mut shell, outcome, now);
        self.note_waiting(&mut shell, now);
        shell.publish(now);
        shell.wake_workers();
        flow
    }

    /// As [`step`](Self::step), for a part of a body. It leads to no call-out, and to no event that others need at once.
    fn part(&mut self, event: impl FnOnce(&mut Request, &mut Shell) -> Outcome) -> Flow {
        let shell = Rc::clone(&self.shell);
        let Ok(mut shell) = shell.try_borrow_mut() else { return Flow::Continue };
        let outcome = event(&mut self.request, &mut shell);
        self.carry_out(&mut shell, outcome).unwrap_or(Flow::Continue)
    }

    fn carry_out_all(&mut self, shell: &mut Shell, mut outcome: Outcome, now: Monotonic) -> Flow {
        // A call-out that the host refuses is a failed prefill leg. Each round tries another endpoint, or ends.
        loop {
            match self.carry_out(shell, outcome) {
                Ok(flow) => return flow,
                Err(CallRefused) => {
                    let body = || host::buffer(Buffer::RequestBody).ok();
                    outcome = self.request.prefill_answer(&mut shell.worker, PrefillAnswer::NotStarted, body, now);
                }
            }
        }
    }

    fn carry_out(&mut self, shell: &mut Shell, outcome: Outcome) -> Result<Flow, CallRefused> {
        for effect in outcome.effects {
            match effect {
                Effect::RemoveHeader(name) => {
                    let removed = host::remove_header(Map::Request, &name);
                    shell.expect_ok("remove header", removed);
                }
                Effect::SetPath(path) => {
                    shell.expect_ok(":path", host::set_header(Map::Request, ":path", &path));
                }
                Effect::SetHeader(name, value) => {
                    shell.expect_ok(&name, host::set_header(Map::Request, &name, &value));
                }
                Effect::SetState(path, value) => {
                    shell.expect_ok(path, host::set_property(path, &value));
                }
                Effect::EditBody(edit) => {
                    let edited = host::replace_front(Buffer::RequestBody, edit.drain as usize, &edit.head);
                    shell.expect_ok("edit body", edited);
                }
                Effect::Call(call) => {
                    let body = Some(call.body.as_slice()).filter(|body| !body.is_empty());
                    let token = host::call(&call.cluster, &call.headers, body, call.timeout);
                    self.call = shell.expect_ok(&call.cluster, token);
                    if self.call.is_none() {
                        return Err(CallRefused);
                    }
                }
                Effect::RemoveResponseHeader(name) => {
                    let removed = host::remove_header(Map::Response, name.as_bytes());
                    shell.expect_ok(name, removed);
                }
                Effect::EditResponse(edit) => {
                    let edited = host::replace_front(Buffer::ResponseBody, edit.drain as usize, &edit.head);
                    shell.expect_ok("edit response", edited);
                }
                Effect::AddResponseHeader(name, value) => {
                    shell.expect_ok(name, host::add_header(Map::Response, name, &value));
                }
                Effect::Warn(text) => warn!("{text}"),
                Effect::ResumeResponse => {
                    shell.expect_ok("resume response", host::resume_response());
                }
                Effect::Reply(reply) => {
                    let sent = host::reply(reply.status, reply.reason, &reply.headers, &reply.body);
                    shell.expect_ok("reply", sent);
                }
            }
        }
        Ok(outcome.flow)
    }

    fn whole_body(&mut self) -> Action {
        if !self.request.wants_body() {
            let is_held = self.request.is_prefilling() || self.request.waiting_id().is_some();
            return action(if is_held { Flow::Pause } else { Flow::Continue });
        }
        let body = host::buffer(Buffer::RequestBody);
        let now = host::now();
        action(self.step(now, |request, shell| {
            shell.catch_up(now);
            let body = shell.expect_ok("request body", body).unwrap_or_default();
            request.body(&mut shell.worker, &body, now)
        }))
    }
}

struct CallRefused;

fn action(flow: Flow) -> Action {
    match flow {
        Flow::Continue => Action::Continue,
        Flow::Pause => Action::Pause,
    }
}

impl Context for StreamContext {
    fn on_http_call_response(&mut self, token: u32, num_headers: usize, _: usize, _: usize) {
        self.0.call_ended(token, num_headers);
    }
}

impl HttpContext for StreamContext {
    fn on_http_request_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        self.0.try_borrow_mut().map_or(Action::Continue, |mut stream| stream.request_headers(end_of_stream))
    }

    fn on_http_request_body(&mut self, bytes: usize, end_of_stream: bool) -> Action {
        self.0.try_borrow_mut().map_or(Action::Continue, |mut stream| stream.request_body(bytes, end_of_stream))
    }

    fn on_http_request_trailers(&mut self, _: usize) -> Action {
        self.0.try_borrow_mut().map_or(Action::Continue, |mut stream| stream.whole_body())
    }

    fn on_http_response_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        self.0.try_borrow_mut().map_or(Action::Continue, |mut stream| stream.response_headers(end_of_stream))
    }

    fn on_http_response_body(&mut self, bytes: usize, end_of_stream: bool) -> Action {
        self.0.try_borrow_mut().map_or(Action::Continue, |mut stream| stream.response_body(bytes, end_of_stream))
    }

    fn on_log(&mut self) {
        if let Ok(mut stream) = self.0.try_borrow_mut() {
            stream.done();
        }
    }
}

/// Callbacks of the stream.
impl Stream {
    fn request_headers(&mut self, end_of_stream: bool) -> Action {
        let headers = host::headers(Map::Request);
        let now = host::now();
        action(self.step(now, |request, shell| {
            shell.catch_up(now);
            let headers: Headers = shell.expect_ok("request headers", headers).unwrap_or_default();
            request.headers(&mut shell.worker, headers, end_of_stream, now)
        }))
    }

    fn request_body(&mut self, bytes: usize, end_of_stream: bool) -> Action {
        if end_of_stream {
            return self.whole_body();
        }
        action(self.part(|request, shell| request.body_part(&mut shell.worker, bytes)))
    }

    fn response_headers(&mut self, end_of_stream: bool) -> Action {
        let is_forwarded = self.request.is_forwarded();
        if !is_forwarded && self.request.is_answered() {
            return Action::Continue;
        }
        let status = host::status(Map::Response);
        if !is_forwarded && status.is_none_or(|status| status < 400) {
            return Action::Continue;
        }
        let property = |path| move || host::property(path).ok();
        let source = AnswerSource::read(status, property("response\0code_details"), property("upstream\0address"));
        let mut flow = Flow::Continue;
        if is_forwarded {
            let now = host::now();
            flow = self.step(now, |request, shell| {
                request.response_headers(&mut shell.worker, source.answerer(), status, now)
            });
        }
        // Headers that core holds back, or has answered in place of, are not for the client.
        if flow == Flow::Continue && source.is_envoys_error() {
            let content_type = host::header(Map::Response, "content-type").ok();
            let status = status.unwrap_or_default();
            flow = self.part(|request, _| request.envoys_error(status, content_type.as_deref(), end_of_stream));
        }
        action(flow)
    }

    fn response_body(&mut self, bytes: usize, end_of_stream: bool) -> Action {
        if bytes > 0
            && self.request.awaits_first_byte()
            && let Ok(mut shell) = self.shell.try_borrow_mut()
        {
            self.request.first_byte(&mut shell.worker, host::now());
        }
        if self.request.wants_response_body() {
            let part = if bytes > 0 { host::buffer(Buffer::ResponseBody) } else { Ok(Vec::new()) };
            let now = host::now();
            return action(self.part(|request, shell| {
                let part = shell.expect_ok("response body", part).unwrap_or_default();
                request.response_part(&mut shell.worker, &part, end_of_stream, now)
            }));
        }
        Action::Continue
    }

    fn done(&mut self) {
        let shell = Rc::clone(&self.shell);
        if let Ok(mut shell) = shell.try_borrow_mut() {
            let now = host::now();
            self.request.done(&mut shell.worker, now);
            self.note_waiting(&mut shell, now);
            shell.publish(now);
            shell.wake_workers();
        }
    }
}
