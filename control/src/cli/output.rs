//! Output of commands. A reader such as `head` may close it before the end.

use std::fmt;
use std::io::{ErrorKind, Write};

use anyhow::Context;

/// The reader has closed standard output. The command ends without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output is closed")
    }
}

impl std::error::Error for Closed {}

/// Writes a text to standard output and flushes it.
///
/// # Errors
/// [`Closed`] when the reader has closed it; otherwise why the text cannot be written, such as a full disk.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Closed.into()),
        other => other.context("standard output"),
    }
}

/// Prints a line to standard error. A closed standard error is no fault.
pub fn print_error(line: &str) {
    let _ = writeln!(std::io::stderr(), "pd-control: {line}");
}
