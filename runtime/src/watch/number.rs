//! Encodes Inf and NaN as text: JSON has no such numbers, and users must see them.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Number {
    Finite(f64),
    Text(String),
}

pub(super) fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    let number = |value: f64| if value.is_finite() { Number::Finite(value) } else { Number::Text(value.to_string()) };
    value.map(number).serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    let number = Option::<Number>::deserialize(deserializer)?;
    let value = |number| match number {
        Number::Finite(value) => Ok(value),
        Number::Text(text) => text.parse().map_err(D::Error::custom),
    };
    number.map(value).transpose()
}

#[cfg(test)]
mod tests {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Of(#[serde(with = "super")] Option<f64>);

    #[test]
    fn inf_and_nan_are_encoded_as_text() {
        let values =
            [(None, "null"), (Some(2.5), "2.5"), (Some(f64::NAN), "\"NaN\""), (Some(f64::INFINITY), "\"inf\"")];
        for (value, text) in values {
            assert_eq!(serde_json::to_string(&Of(value)).expect("JSON"), text);
            let Of(back) = serde_json::from_str(text).expect("JSON");
            assert_eq!(back.map(|value| value.to_string()), value.map(|value: f64| value.to_string()));
        }
        assert!(serde_json::from_str::<Of>("\"much\"").is_err());
    }
}
