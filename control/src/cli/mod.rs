//! The `pd-control` command: arguments, the server, `check`, `migrate`, and commands that show a running pd-control in a
//! terminal.

pub mod arguments;
pub mod check;
pub mod client;
mod manifests;
pub mod migrate;
pub mod output;
pub mod run;
pub mod terminal;
pub mod top;
