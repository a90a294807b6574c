//! What all host functions have in common: they are counted, a fault may answer for them, they return a status.

use wasmtime::{Result, format_err};

use super::memory::{Fail, HostResult};
use crate::host::{Host, Violation};
use crate::{Fault, Status};

/// Defines one host function: counted, subject to faults, returning a status.
macro_rules! host_call {
    ($linker:ident, $name:literal, $body:path, ($($arg:ident: $ty:ty),*)) => {
        $linker.func_wrap(
            "env",
            $name,
            |mut caller: wasmtime::Caller<'_, crate::host::Host>, $($arg: $ty),*| -> wasmtime::Result<u32> {
                match crate::hostcalls::call::enter(caller.data_mut(), $name)? {
                    Some(status) => Ok(status),
                    None => crate::hostcalls::call::settle($body(&mut caller, $($arg),*)),
                }
            },
        )?;
    };
}
pub(crate) use host_call;

/// What the module may call while it initialises or allocates.
const UNRESTRICTED: [&str; 1] = ["proxy_log"];

/// Counts a call and says whether a fault answers it.
pub(crate) fn enter(host: &mut Host, name: &'static str) -> Result<Option<u32>> {
    *host.host_calls.entry(name).or_default() += 1;
    if host.restricted && !UNRESTRICTED.contains(&name) {
        host.violate(Violation::RestrictedCall { call: name });
        return Err(format_err!("restricted_callback: {name}"));
    }
    let Some(fault) = host.faults.get_mut(name) else { return Ok(None) };
    match *fault {
        Fault::Always(status) => Ok(Some(status)),
        Fault::After(calls, status) if calls > 0 => {
            *fault = Fault::After(calls - 1, status);
            Ok(None)
        }
        Fault::Once(status) | Fault::After(_, status) => {
            host.faults.remove(name);
            Ok(Some(status))
        }
    }
}

pub(crate) fn settle(result: HostResult) -> Result<u32> {
    match result {
        Ok(()) => Ok(Status::Ok as u32),
        Err(Fail::Status(status)) => Ok(status as u32),
        Err(Fail::Trap(trap)) => Err(trap),
    }
}
