//! Durations and quantities as manifests write them.

use serde_json::Value;

/// Milliseconds of a duration of the Gateway API: `1h2m3s4ms`.
pub(super) fn milliseconds(text: &str) -> Option<u64> {
    let (mut rest, mut sum) = (text, 0_u64);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest.get(..end)?.parse().ok()?;
        let (unit, factor) = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)]
            .into_iter()
            .find(|(unit, _)| rest[end..].starts_with(unit))?;
        sum = sum.checked_add(number.checked_mul(factor)?)?;
        rest = &rest[end + unit.len()..];
    }
    Some(sum)
}

/// The bytes of a Kubernetes quantity; `None` when it is none.
pub(super) fn quantity(value: &Value) -> Option<f64> {
    if let Some(number) = value.as_f64() {
        return Some(number);
    }
    let text = value.as_str()?;
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    let factor = match unit {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_milliseconds() {
        for (text, ms) in [
            ("3s", Some(3_000)),
            ("500ms", Some(500)),
            ("1h2m3s4ms", Some(3_723_004)),
            ("0s", Some(0)),
            ("3", None),
            ("s", None),
            ("3d", None),
            ("-1s", None),
        ] {
            assert_eq!(milliseconds(text), ms, "{text}");
        }
    }

    #[test]
    fn quantities_are_bytes() {
        for (text, bytes) in
            [("16Mi", Some(16_777_216.0)), ("16M", Some(16e6)), ("5", Some(5.0)), ("5x", None), ("", None)]
        {
            assert_eq!(quantity(&text.into()), bytes, "{text}");
        }
        assert_eq!(quantity(&7.into()), Some(7.0));
    }
}
