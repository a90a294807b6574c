//! What a program's file says of itself.

use anyhow::{Context as _, bail};

/// Type of the program header that names a dynamic loader.
const INTERPRETER: u32 = 3;

/// The platform's name in images of a program that runs without any other file.
///
/// # Errors
/// One line when these bytes are none.
pub fn of_static(program: &[u8]) -> anyhow::Result<&'static str> {
    if !program.starts_with(b"\x7fELF\x02\x01") {
        bail!("this is no 64-bit Linux program");
    }
    let architecture = match number(program, 0x12, 2)? {
        62 => "amd64",
        183 => "arm64",
        other => bail!("a program for machine {other}"),
    };
    let (table, size, count) = (number(program, 0x20, 8)?, number(program, 0x36, 2)?, number(program, 0x38, 2)?);
    for index in 0..count {
        if number(program, table.saturating_add(index * size), 4)? == u64::from(INTERPRETER) {
            bail!("the program needs a dynamic loader; link it statically (target x86_64-unknown-linux-musl)");
        }
    }
    Ok(architecture)
}

/// A little-endian number.
fn number(program: &[u8], offset: u64, bytes: usize) -> anyhow::Result<u64> {
    let offset = usize::try_from(offset)?;
    let field = offset.checked_add(bytes).and_then(|end| program.get(offset..end)).context("the program is cut off")?;
    Ok(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Header and one program header of that type.
    pub fn program(kind: u32) -> Vec<u8> {
        let mut program = vec![0; 64 + 56];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[0x12] = 62;
        program[0x20] = 64;
        program[0x36] = 56;
        program[0x38] = 1;
        program[64..68].copy_from_slice(&kind.to_le_bytes());
        program
    }

    #[test]
    fn only_static_programs_are_taken() {
        assert_eq!(of_static(&program(1)).unwrap(), "amd64");
        let refused = |bytes: &[u8]| of_static(bytes).unwrap_err().to_string();
        assert!(refused(&program(INTERPRETER)).starts_with("the program needs a dynamic loader"));
        assert_eq!(refused(&program(1)[..66]), "the program is cut off");
        assert_eq!(refused(b"#!/bin/sh"), "this is no 64-bit Linux program");
    }
}
