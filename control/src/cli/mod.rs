//! The `pd-control` command: arguments, `check`, and the commands that show a running pd-control in a terminal.

pub mod arguments;
pub mod check;
pub mod client;
pub mod output;
pub mod run;
pub mod terminal;
