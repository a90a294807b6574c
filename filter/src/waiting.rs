//! Streams whose requests wait, as the root context finds them again.

use std::rc::Weak;

use pd_core::time::Monotonic;
use pd_core::workers::bind::Turn;

/// Calls of the root context to a stream whose request waits. It is a trait because every stream has the shell and the shell
/// has these streams.
pub trait WaitsForTurn {
    /// Passes a turn to the stream's request.
    fn turn(&self, turn: Turn, now: Monotonic);
    /// Passes the end of a call to the stream.
    fn call_ended(&self, token: u32, num_headers: usize);
    /// The call whose end the stream waits for.
    fn call(&self) -> Option<u32>;
}

/// A stream whose request waits.
pub struct WaitingStream {
    /// The stream's context.
    pub context: u32,
    /// The stream; gone when the host has deleted it.
    pub stream: Weak<dyn WaitsForTurn>,
}
