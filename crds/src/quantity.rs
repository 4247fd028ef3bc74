//! Kubernetes quantities as whole numbers.
//!
//! Only what a size or a rate may be: not negative, at most 2^63 - 1. Fractions are rounded up to a whole unit, as Kubernetes does.
//! Source: Kubernetes API reference, "Quantity".

/// Why a text is no quantity that we can use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("found `{0}`, expected a quantity such as 500M or 10Gi")]
pub struct NotAQuantity(pub String);

/// The number that a quantity means.
pub fn parse(text: &str) -> Result<u64, NotAQuantity> {
    let refuse = || NotAQuantity(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    // (numerator, denominator)
    let (times, by): (u128, u128) = match suffix {
        "" => (1, 1),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1000_u128.pow(2), 1),
        "G" => (1000_u128.pow(3), 1),
        "T" => (1000_u128.pow(4), 1),
        "P" => (1000_u128.pow(5), 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        other => exponent(other).ok_or_else(refuse)?,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.len() > 9 || whole.len() > 19 {
        return Err(refuse());
    }
    let scaled: u128 = format!("{whole}{fraction}").parse().map_err(|_| refuse())?;
    let by = by * 10_u128.pow(fraction.len() as u32);
    // 28 digits times 2^50 stays below 2^144 only in theory: checked.
    let value = scaled.checked_mul(times).ok_or_else(refuse)?.div_ceil(by);
    u64::try_from(value).ok().filter(|value| *value <= i64::MAX as u64).ok_or_else(refuse)
}

/// `e3`, `E3`: a power of ten.
fn exponent(suffix: &str) -> Option<(u128, u128)> {
    let power: u32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
    (power <= 18).then(|| (10_u128.pow(power), 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, value) in [
            ("0", 0),
            ("12", 12),
            ("1k", 1000),
            ("100M", 100_000_000),
            ("10Gi", 10 << 30),
            ("1.5Gi", 3 << 29),
            ("0.5", 1),
            ("1500m", 2),
            ("2e3", 2000),
            ("7E18", 7_000_000_000_000_000_000),
        ] {
            assert_eq!(parse(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity_or_too_large_is_refused() {
        for text in ["", ".", "-1", "1 Gi", "1gi", "Gi", "1e", "1e99", "99999999999999999999", "9223372036854775808"] {
            assert_eq!(parse(text), Err(NotAQuantity(text.to_owned())));
        }
    }
}
