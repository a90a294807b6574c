//! Linear memory as host functions use it.

use wasmtime::Caller;

use crate::Status;
use crate::host::{Host, VM_CONTEXT};

/// Why a host function does not succeed.
pub(crate) enum Fail {
    /// The module gets a status.
    Status(Status),
    /// The VM traps.
    Trap(wasmtime::Error),
}

pub(crate) type HostResult<T = ()> = Result<T, Fail>;

impl From<Status> for Fail {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

const BAD_MEMORY: Fail = Fail::Status(Status::InvalidMemoryAccess);

pub(crate) fn read(c: &Caller<'_, Host>, pointer: u32, len: u32) -> HostResult<Vec<u8>> {
    let data = c.data().memory.ok_or(BAD_MEMORY)?.data(c);
    let start = pointer as usize;
    data.get(start..start + len as usize).map(<[u8]>::to_vec).ok_or(BAD_MEMORY)
}

pub(crate) fn read_u32(c: &Caller<'_, Host>, pointer: u32) -> HostResult<u32> {
    let bytes = read(c, pointer, 4)?;
    Ok(u32::from_le_bytes(bytes.try_into().map_err(|_| BAD_MEMORY)?))
}

pub(crate) fn write(c: &mut Caller<'_, Host>, pointer: u32, bytes: &[u8]) -> HostResult {
    let memory = c.data().memory.ok_or(BAD_MEMORY)?;
    let start = pointer as usize;
    let target = memory.data_mut(c).get_mut(start..start + bytes.len()).ok_or(BAD_MEMORY)?;
    target.copy_from_slice(bytes);
    Ok(())
}

pub(crate) fn write_u32(c: &mut Caller<'_, Host>, pointer: u32, value: u32) -> HostResult {
    write(c, pointer, &value.to_le_bytes())
}

pub(crate) fn write_u64(c: &mut Caller<'_, Host>, pointer: u32, value: u64) -> HostResult {
    write(c, pointer, &value.to_le_bytes())
}

/// Gives bytes to the module in memory from its own allocator. No bytes become a null pointer.
pub(crate) fn give(c: &mut Caller<'_, Host>, bytes: &[u8], pointer_out: u32, size_out: u32) -> HostResult {
    let pointer = if bytes.is_empty() { 0 } else { allocate(c, bytes.len())? };
    if !bytes.is_empty() {
        write(c, pointer, bytes)?;
    }
    write_u32(c, pointer_out, pointer)?;
    write_u32(c, size_out, bytes.len() as u32)
}

/// The module's allocator runs in the VM's own context and may call next to nothing.
fn allocate(c: &mut Caller<'_, Host>, len: usize) -> HostResult<u32> {
    let malloc = c.data().malloc.clone().ok_or(BAD_MEMORY)?;
    let len = u32::try_from(len).map_err(|_| BAD_MEMORY)?;
    let host = c.data_mut();
    let saved = (host.current, host.effective, host.restricted);
    (host.current, host.effective, host.restricted) = (VM_CONTEXT, 0, true);
    let result = malloc.call(&mut *c, len);
    let host = c.data_mut();
    (host.current, host.effective, host.restricted) = saved;
    match result {
        Ok(0) => Err(BAD_MEMORY),
        Ok(pointer) => Ok(pointer),
        Err(trap) => Err(Fail::Trap(trap)),
    }
}
