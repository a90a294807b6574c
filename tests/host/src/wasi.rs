//! The parts of WASI preview 1 that Envoy gives to a module: standard output, environment, clocks, random numbers.

use wasmtime::{Caller, Linker, Result, format_err};

use crate::LogLevel;
use crate::host::Host;
use crate::hostcalls::memory::{read, read_u32, write};

const SUCCESS: u32 = 0;
const BADF: u32 = 8;
const FAULT: u32 = 21;
const INVAL: u32 = 28;
const NOENT: u32 = 44;
const NOSYS: u32 = 52;
const NOTSUP: u32 = 58;

/// Envoy gives no more random bytes at once.
const RANDOM_MAX_BYTES: u32 = 64 * 1024;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;

type Guest<'a> = Caller<'a, Host>;

/// Defines the functions under `wasi_snapshot_preview1`.
pub(crate) fn define(linker: &mut Linker<Host>) -> Result<()> {
    let module = "wasi_snapshot_preview1";
    linker.func_wrap(module, "fd_write", |mut c: Guest<'_>, fd: u32, iovs: u32, count: u32, written: u32| {
        note(&mut c, "fd_write");
        errno(fd_write(&mut c, fd, iovs, count, written))
    })?;
    linker.func_wrap(module, "environ_sizes_get", |mut c: Guest<'_>, count: u32, bytes: u32| {
        let vars = environment(&c);
        let size: usize = vars.iter().map(Vec::len).sum();
        errno(put_u32(&mut c, count, vars.len() as u32).and_then(|()| put_u32(&mut c, bytes, size as u32)))
    })?;
    linker.func_wrap(module, "environ_get", |mut c: Guest<'_>, array: u32, buffer: u32| {
        errno(environ_get(&mut c, array, buffer))
    })?;
    linker.func_wrap(module, "args_sizes_get", |mut c: Guest<'_>, count: u32, bytes: u32| {
        errno(put_u32(&mut c, count, 0).and_then(|()| put_u32(&mut c, bytes, 0)))
    })?;
    linker.func_wrap(module, "args_get", |_: Guest<'_>, _: u32, _: u32| SUCCESS)?;
    linker.func_wrap(module, "clock_time_get", |mut c: Guest<'_>, id: u32, _: u64, out: u32| {
        note(&mut c, "clock_time_get");
        let clock = &c.data().config.clock;
        let ns = match id {
            0 => clock.now_ns(),
            1 => clock.monotonic_ns(),
            _ => return NOTSUP,
        };
        errno(write(&mut c, out, &ns.to_le_bytes()).map_err(|_| FAULT))
    })?;
    linker.func_wrap(module, "clock_res_get", |mut c: Guest<'_>, id: u32, out: u32| match id {
        0 | 1 => errno(write(&mut c, out, &1u64.to_le_bytes()).map_err(|_| FAULT)),
        _ => NOTSUP,
    })?;
    linker.func_wrap(module, "random_get", |mut c: Guest<'_>, out: u32, len: u32| {
        note(&mut c, "random_get");
        if len > RANDOM_MAX_BYTES {
            return INVAL;
        }
        let bytes: Vec<u8> = (0..len).map(|_| c.data_mut().next_random()).collect();
        errno(write(&mut c, out, &bytes).map_err(|_| FAULT))
    })?;
    // Envoy only logs an exit and lets the module run on, into `unreachable`. The trap names it better.
    linker.func_wrap(module, "proc_exit", |_: Guest<'_>, code: u32| -> Result<()> {
        Err(format_err!("proc_exit({code})"))
    })?;
    linker.func_wrap(module, "sched_yield", |_: Guest<'_>| SUCCESS)?;
    linker.func_wrap(module, "poll_oneoff", |mut c: Guest<'_>, _: u32, _: u32, _: u32, events: u32| {
        errno(put_u32(&mut c, events, 0))
    })?;
    linker.func_wrap(module, "fd_read", |_: Guest<'_>, _: u32, _: u32, _: u32, _: u32| NOSYS)?;
    linker.func_wrap(module, "fd_seek", |_: Guest<'_>, _: u32, _: i64, _: u32, _: u32| SUCCESS)?;
    linker.func_wrap(module, "fd_close", |_: Guest<'_>, _: u32| SUCCESS)?;
    linker.func_wrap(module, "fd_fdstat_get", |mut c: Guest<'_>, fd: u32, out: u32| {
        if !is_stdio(fd) {
            return BADF;
        }
        let mut stat = [0u8; 24];
        stat[8] = 64; // the right to write
        errno(write(&mut c, out, &stat).map_err(|_| FAULT))
    })?;
    linker.func_wrap(module, "fd_fdstat_set_flags", |_: Guest<'_>, _: u32, _: u32| NOSYS)?;
    linker.func_wrap(module, "fd_filestat_get", |_: Guest<'_>, _: u32, _: u32| BADF)?;
    linker.func_wrap(module, "fd_prestat_get", |_: Guest<'_>, _: u32, _: u32| BADF)?;
    linker.func_wrap(module, "fd_prestat_dir_name", |_: Guest<'_>, _: u32, _: u32, _: u32| NOSYS)?;
    linker.func_wrap(
        module,
        "path_open",
        |_: Guest<'_>, _: u32, _: u32, _: u32, _: u32, _: u32, _: i64, _: i64, _: u32, _: u32| NOENT,
    )?;
    linker.func_wrap(module, "path_filestat_get", |_: Guest<'_>, _: u32, _: u32, _: u32, _: u32, _: u32| NOTSUP)?;
    Ok(())
}

fn fd_write(c: &mut Guest<'_>, fd: u32, iovs: u32, count: u32, written: u32) -> std::result::Result<(), u32> {
    let level = match fd {
        STDOUT => LogLevel::Info,
        STDERR => LogLevel::Error,
        _ => return Err(BADF),
    };
    let mut text = Vec::new();
    for i in 0..count {
        let entry = iovs.checked_add(i.wrapping_mul(8)).ok_or(FAULT)?;
        let pointer = read_u32(c, entry).map_err(|_| FAULT)?;
        let len = read_u32(c, entry.wrapping_add(4)).map_err(|_| FAULT)?;
        text.extend_from_slice(&read(c, pointer, len).map_err(|_| FAULT)?);
    }
    put_u32(c, written, text.len() as u32)?;
    if !text.is_empty() {
        text.pop_if(|last| *last == b'\n');
        let line = String::from_utf8_lossy(&text).into_owned();
        c.data_mut().logs.push((level, line));
    }
    Ok(())
}

fn environ_get(c: &mut Guest<'_>, mut array: u32, mut buffer: u32) -> std::result::Result<(), u32> {
    for var in environment(c) {
        put_u32(c, array, buffer)?;
        write(c, buffer, &var).map_err(|_| FAULT)?;
        array = array.wrapping_add(4);
        buffer = buffer.wrapping_add(var.len() as u32);
    }
    Ok(())
}

fn environment(c: &Guest<'_>) -> Vec<Vec<u8>> {
    c.data().config.environment.iter().map(|(k, v)| format!("{k}={v}\0").into_bytes()).collect()
}

fn put_u32(c: &mut Guest<'_>, pointer: u32, value: u32) -> std::result::Result<(), u32> {
    write(c, pointer, &value.to_le_bytes()).map_err(|_| FAULT)
}

fn note(c: &mut Guest<'_>, call: &'static str) {
    *c.data_mut().host_calls.entry(call).or_default() += 1;
}

fn errno(result: std::result::Result<(), u32>) -> u32 {
    result.err().unwrap_or(SUCCESS)
}

fn is_stdio(fd: u32) -> bool {
    matches!(fd, STDOUT | STDERR)
}
