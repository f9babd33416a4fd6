//! Points in time as people write them.

use std::time::{Duration, SystemTime};

use time::{OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description};

/// Reads `90s`, `5m`, `1h30m`, `2d` (that long before `now`) or an RFC 3339 time.
pub(crate) fn parse(text: &str, now: SystemTime) -> Result<SystemTime, String> {
    if let Ok(at) = OffsetDateTime::parse(text, &Rfc3339) {
        return Ok(at.into());
    }
    let bad = || format!("{text:?} is no time; write 5m, 1h30m or 2026-01-02T15:04:05Z");
    let (mut total, mut digits) = (0_u64, String::new());
    for c in text.chars() {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        let unit = match c {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(bad()),
        };
        let number: u64 = digits.parse().map_err(|_| bad())?;
        total = number.checked_mul(unit).and_then(|n| total.checked_add(n)).ok_or_else(bad)?;
        digits.clear();
    }
    if text.is_empty() || !digits.is_empty() {
        return Err(bad());
    }
    now.checked_sub(Duration::from_secs(total)).ok_or_else(bad)
}

/// The time of day in UTC with milliseconds, `15:04:05.123`.
pub(crate) fn clock(at: SystemTime) -> String {
    let format = format_description!("[hour]:[minute]:[second].[subsecond digits:3]");
    OffsetDateTime::from(at).format(&format).unwrap_or_default()
}

/// The whole time, RFC 3339.
pub(crate) fn full(at: SystemTime) -> String {
    OffsetDateTime::from(at).format(&Rfc3339).unwrap_or_default()
}

/// Seconds since 1970.
pub(crate) fn seconds(at: SystemTime) -> i64 {
    OffsetDateTime::from(at).unix_timestamp()
}

/// A length of time in its two largest units: `3d4h`, `5m10s`, `42s`.
pub(crate) fn span(length: Duration) -> String {
    let s = length.as_secs();
    let (d, h, m) = (s / 86_400, s / 3600 % 24, s / 60 % 60);
    match (d, h, m) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, _) => format!("{m}m{}s", s % 60),
        (0, ..) => format!("{h}h{m}m"),
        _ => format!("{d}d{h}h"),
    }
}

/// A latency with three significant digits: `850us`, `3.21ms`, `1.50s`.
pub(crate) fn latency(length: Duration) -> String {
    let us = length.as_micros();
    let ms = length.as_secs_f64() * 1e3;
    match us {
        0..1_000 => format!("{us}us"),
        1_000..10_000 => format!("{ms:.2}ms"),
        10_000..100_000 => format!("{ms:.1}ms"),
        100_000..1_000_000 => format!("{ms:.0}ms"),
        _ => format!("{:.2}s", length.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_write_them() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let at = |s: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(s);
        assert_eq!(parse("90s", now), Ok(at(999_910)));
        assert_eq!(parse("1h30m", now), Ok(at(994_600)));
        assert_eq!(parse("1970-01-01T00:01:00Z", now), Ok(at(60)));
        for bad in ["", "5", "m", "5x", "99999999999999999999d", "yesterday"] {
            assert!(parse(bad, now).is_err(), "{bad}");
        }
    }

    #[test]
    fn lengths() {
        assert_eq!(span(Duration::from_secs(59)), "59s");
        assert_eq!(span(Duration::from_secs(310)), "5m10s");
        assert_eq!(span(Duration::from_secs(3 * 86_400 + 4 * 3600)), "3d4h");
        assert_eq!(latency(Duration::from_micros(850)), "850us");
        assert_eq!(latency(Duration::from_micros(3214)), "3.21ms");
        assert_eq!(latency(Duration::from_millis(1500)), "1.50s");
    }
}
