//! Sizes, durations and CPU counts, as people type them.

use std::str::FromStr;
use std::time::Duration;

/// Why a quantity was not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} `{text}` is not understood: write it like {examples}")]
pub struct QuantityError {
    what: &'static str,
    text: String,
    examples: &'static str,
}

/// A size in bytes, from `512M`, `1.5GiB`, `65536`. Units are powers of 1024, as in other container tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let error =
            || QuantityError { what: "size", text: text.into(), examples: "`512M`, `1.5G` or `65536`" };
        let (number, unit) = split_unit(text);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(error()),
        };
        let bytes = parse_decimal(number).ok_or_else(error)? * (1u64 << shift) as f64;
        // Half of the range of i64, the type of every limit in config.json.
        if !(1.0..4.6e18).contains(&bytes) {
            return Err(error());
        }
        Ok(Self(bytes as u64))
    }
}

/// A duration, from `10`, `1.5s`, `500ms`, `1m30s`, `2h`. A number alone is in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let error =
            || QuantityError { what: "duration", text: text.into(), examples: "`10s`, `1m30s` or `500ms`" };
        let mut rest = text;
        let mut seconds = 0.0;
        while !rest.is_empty() {
            let (number, tail) = split_unit(rest);
            let unit_length = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
            let (unit, next) = tail.split_at(unit_length);
            let factor = match unit {
                "ms" => 0.001,
                "" | "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(error()),
            };
            seconds += parse_decimal(number).ok_or_else(error)? * factor;
            rest = next;
        }
        const YEAR_SECONDS: f64 = 365.0 * 24.0 * 3600.0;
        if !(0.001..=YEAR_SECONDS).contains(&seconds) {
            return Err(error());
        }
        Ok(Self(Duration::from_secs_f64(seconds)))
    }
}

/// A number of CPUs in thousandths, from `2` or `0.5`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus {
    /// Thousandths of a CPU, at least 1.
    pub milli: u32,
}

impl Cpus {
    /// The whole CPUs that it takes to give so much.
    pub fn whole(self) -> u32 {
        self.milli.div_ceil(1000)
    }
}

impl FromStr for Cpus {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let milli = parse_decimal(text).map(|cpus| (cpus * 1000.0).round());
        match milli {
            Some(milli) if (1.0..=1e6).contains(&milli) => Ok(Self { milli: milli as u32 }),
            _ => Err(QuantityError { what: "CPU count", text: text.into(), examples: "`2` or `0.5`" }),
        }
    }
}

/// Cuts a text after its leading digits and points.
fn split_unit(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len()))
}

/// A plain decimal number: no sign, exponent, `inf` or `nan`, all of which `f64` would take.
fn parse_decimal(text: &str) -> Option<f64> {
    let plain = text.chars().all(|c| c.is_ascii_digit() || c == '.');
    plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        for (text, bytes) in [
            ("65536", 65536),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("1.5G", 3 << 29),
            ("1t", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn durations_add_up() {
        for (text, millis) in
            [("10", 10_000), ("1.5s", 1500), ("500ms", 500), ("1m30s", 90_000), ("2h", 7_200_000)]
        {
            assert_eq!(text.parse(), Ok(Span(Duration::from_millis(millis))), "{text}");
        }
    }

    #[test]
    fn cpus_round_up_to_whole_ones() {
        assert_eq!("0.5".parse::<Cpus>().map(Cpus::whole), Ok(1));
        assert_eq!("2".parse::<Cpus>().map(Cpus::whole), Ok(2));
        assert_eq!("2.001".parse::<Cpus>().map(Cpus::whole), Ok(3));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "-1", "1e9", "inf", "nan", "0", "M", "1X", "1..2", "99999999999T"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        for text in ["", "-1", "0", "1d", "inf", "s", "1m s", "9999999h"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
        for text in ["", "0", "-2", "two", "0.0001", "1e3"] {
            assert!(text.parse::<Cpus>().is_err(), "{text}");
        }
        let message = "5 MB!".parse::<Size>().unwrap_err().to_string();
        assert_eq!(message, "size `5 MB!` is not understood: write it like `512M`, `1.5G` or `65536`");
    }
}
