//! The host functions of ABI 0.2.1 under `env`.

mod call;
mod http;
pub(crate) mod memory;
mod process;

use wasmtime::{Linker, Result};

use crate::host::Host;

/// Defines all functions.
pub(crate) fn define(linker: &mut Linker<Host>) -> Result<()> {
    http::define(linker)?;
    process::define(linker)
}
