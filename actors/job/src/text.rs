//! Formats counts and sizes.

use std::fmt::Display;

/// Formats a count with its noun: `1 device`, `2 devices`, `2 processes`.
pub fn counted(count: impl Display, thing: &str) -> String {
    let count = count.to_string();
    let ending = match thing.chars().last() {
        _ if count == "1" => "",
        Some('s' | 'h') => "es",
        _ => "s",
    };
    format!("{count} {thing}{ending}")
}

/// Formats a size, such as `12.5 KiB`.
pub fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    if unit == 0 { counted(bytes, "byte") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_of_one_is_singular() {
        let counts = [(0, "device"), (1, "device"), (2, "device"), (1, "micro-batch"), (2, "launch"), (3, "process")];
        let texts = counts.map(|(count, thing)| counted(count, thing));
        assert_eq!(texts, ["0 devices", "1 device", "2 devices", "1 micro-batch", "2 launches", "3 processes"]);
    }

    #[test]
    fn sizes_have_units() {
        let sizes = [0, 1, 1023, 1024, 1 << 20, 5 << 40].map(size);
        assert_eq!(sizes, ["0 bytes", "1 byte", "1023 bytes", "1.0 KiB", "1.0 MiB", "5.0 TiB"]);
    }
}
