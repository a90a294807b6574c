//! The `pd-control` command: arguments, the server, `check`, and commands that show a running pd-control in a terminal.

pub mod arguments;
pub mod check;
pub mod client;
pub mod output;
pub mod run;
pub mod terminal;
