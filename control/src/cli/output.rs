//! Standard output of commands, which a reader such as `head` may leave before its end.

use std::fmt;
use std::io::{ErrorKind, Write};

use anyhow::Context;

/// Nobody reads standard output any longer: the command has nothing left to do, and nothing to print_error of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nobody reads standard output")
    }
}

impl std::error::Error for Closed {}

/// Prints a text as it stands.
///
/// # Errors
/// [`Closed`], or why it cannot be written, such as a full disk.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Closed.into()),
        other => other.context("standard output"),
    }
}

/// Prints a line for people to standard error. Where nobody reads that, there is nobody left to tell.
pub fn print_error(line: &str) {
    let _ = writeln!(std::io::stderr(), "pd-control: {line}");
}
