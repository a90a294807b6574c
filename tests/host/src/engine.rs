//! Compiling a module once for all workers.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use wasmtime::{Config, Engine, InstancePre, Linker};

use crate::host::Host;
use crate::{Error, hostcalls, wasi};

/// The export that names the ABI; Envoy picks its host functions by it.
const ABI_EXPORT: &str = "proxy_abi_version_0_2_1";

/// Options of compilation.
#[derive(Clone, Copy, Debug, Default)]
pub struct ModuleOptions {
    /// Count executed instructions; see [`crate::Worker::fuel_used`]. Costs some speed.
    pub fuel: bool,
}

/// A compiled module, shared by any number of workers. Clones are cheap.
#[derive(Clone)]
pub struct Module {
    inner: Arc<Inner>,
}

struct Inner {
    pre: InstancePre<Host>,
    engine: Engine,
    fuel: bool,
    bytes: usize,
}

impl Module {
    /// Compiles the module in a file.
    ///
    /// # Errors
    /// The file cannot be read, or see [`Module::from_bytes`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::from_bytes(&bytes).with_context(|| format!("cannot load {}", path.display()))
    }

    /// Compiles a module.
    ///
    /// # Errors
    /// It is not valid, is not written for ABI 0.2.1, or imports a function that Envoy does not offer to that ABI.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        Self::with_options(bytes, ModuleOptions::default())
    }

    /// Compiles a module with options.
    ///
    /// # Errors
    /// See [`Module::from_bytes`].
    pub fn with_options(bytes: &[u8], options: ModuleOptions) -> Result<Self, Error> {
        let mut config = Config::new();
        config.consume_fuel(options.fuel);
        let engine = Engine::new(&config).map_err(host_error)?;
        let module = wasmtime::Module::from_binary(&engine, bytes).map_err(host_error)?;
        ensure!(module.get_export(ABI_EXPORT).is_some(), "the module does not export {ABI_EXPORT}");
        let mut linker = Linker::new(&engine);
        hostcalls::define(&mut linker).map_err(host_error)?;
        wasi::define(&mut linker).map_err(host_error)?;
        let pre = linker.instantiate_pre(&module).map_err(host_error)?;
        Ok(Self { inner: Arc::new(Inner { pre, engine, fuel: options.fuel, bytes: bytes.len() }) })
    }

    /// Size of the module's code as loaded, bytes.
    pub fn bytes(&self) -> usize {
        self.inner.bytes
    }

    pub(crate) fn pre(&self) -> &InstancePre<Host> {
        &self.inner.pre
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    pub(crate) fn counts_fuel(&self) -> bool {
        self.inner.fuel
    }
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Module").field("bytes", &self.inner.bytes).finish_non_exhaustive()
    }
}

pub(crate) fn host_error(error: wasmtime::Error) -> Error {
    anyhow::anyhow!("{error:#}")
}
