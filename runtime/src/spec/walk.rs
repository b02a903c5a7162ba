//! Holds a `config.json` against the table of fields.

use serde_json::Value;

use super::SpecError;
use super::fields::{FIELDS, Rule};

/// Looks at every value of a configuration: an error for the first field that the table refuses or lacks.
pub fn check(config: &Value) -> Result<(), SpecError> {
    walk(config, &Place::default())
}

/// The same for a value that stands for the part of a configuration at `path`, which has no lists in it.
pub fn check_part(part: &Value, path: &str) -> Result<(), SpecError> {
    walk(part, &Place { pattern: path.into(), path: path.into() })
}

/// Where a value stands: as the table writes it (`mounts[].type`) and as a reader finds it (`mounts[3].type`).
#[derive(Clone, Default)]
struct Place {
    pattern: String,
    path: String,
}

impl Place {
    fn key(&self, key: &str) -> Self {
        let join = |to: &str, key: &str| match to {
            "" => key.to_owned(),
            to => format!("{to}.{key}"),
        };
        let map = join(&self.pattern, "*");
        let pattern = if FIELDS.iter().any(|f| f.path == map) { map } else { join(&self.pattern, key) };
        Self { pattern, path: join(&self.path, key) }
    }

    fn index(&self, index: usize) -> Self {
        Self { pattern: format!("{}[]", self.pattern), path: format!("{}[{index}]", self.path) }
    }

    /// Whether the table has fields below this place.
    fn has_fields_below(&self) -> bool {
        let below = |path: &str| {
            let rest = path.strip_prefix(self.pattern.as_str());
            self.pattern.is_empty()
                || rest.is_some_and(|rest| rest.starts_with('.') || rest.starts_with("[]"))
        };
        FIELDS.iter().any(|field| below(field.path))
    }
}

fn walk(value: &Value, place: &Place) -> Result<(), SpecError> {
    if let Some(field) = FIELDS.iter().find(|field| field.path == place.pattern) {
        return match field.rule {
            Rule::Refused(reason) if !asks_for_nothing(value) => {
                Err(SpecError::Unsupported { path: place.path.clone(), reason: reason.into() })
            }
            // Whether the value has the right shape is for the typed reading that follows.
            Rule::Honoured(_) | Rule::Ignored(_) | Rule::Refused(_) => Ok(()),
        };
    }
    if !place.has_fields_below() {
        return Err(SpecError::UnknownField { path: place.path.clone(), similar: similar(&place.pattern) });
    }
    match value {
        Value::Object(map) => map.iter().try_for_each(|(key, value)| walk(value, &place.key(key))),
        Value::Array(list) => list.iter().enumerate().try_for_each(|(i, value)| walk(value, &place.index(i))),
        _ => Ok(()),
    }
}

fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        // An object of empty members, as engines write hooks: {"prestart": []}.
        Value::Object(map) => map.values().all(asks_for_nothing),
        // The weight, the share or the limit that is not set, in the types that engines write.
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Bool(true) => false,
    }
}

/// The field that somebody may have meant: the same but for case, or for one letter.
fn similar(pattern: &str) -> Option<&'static str> {
    let depth = pattern.split('.').count();
    let candidates = FIELDS.iter().flat_map(|field| {
        let end = field.path.match_indices('.').nth(depth - 1).map_or(field.path.len(), |(at, _)| at);
        Some(field.path.get(..end)?.trim_end_matches("[]"))
    });
    candidates.into_iter().find(|known| is_near(&known.to_lowercase(), &pattern.to_lowercase()))
}

/// Whether two texts are the same, but for one character that is changed, added or left out.
fn is_near(a: &str, b: &str) -> bool {
    let common = a.bytes().zip(b.bytes()).take_while(|(x, y)| x == y).count();
    let (a, b) = (&a.as_bytes()[common..], &b.as_bytes()[common..]);
    let tail = |x: &[u8]| x.get(1..).unwrap_or_default().to_vec();
    tail(a) == tail(b) || tail(a) == b || tail(b) == a
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn error(config: Value) -> String {
        check(&config).unwrap_err().to_string()
    }

    #[test]
    fn unknown_fields_are_named_by_path_with_a_guess() {
        let message = error(json!({"process": {"arg": ["sh"]}}));
        assert!(message.contains("`process.arg`") && message.contains("`process.args`"), "{message}");
        let message = error(json!({"mounts": [{"destination": "/a"}, {"option": []}]}));
        assert!(
            message.contains("`mounts[1].option`") && message.contains("`mounts[].options`"),
            "{message}"
        );
        let message = error(json!({"Linux": {}}));
        assert!(message.contains("`Linux`") && message.contains("`linux`"), "{message}");
        let message = error(json!({"bogus": 1}));
        assert!(message.contains("`bogus`") && !message.contains("mean"), "{message}");
    }

    #[test]
    fn every_refused_field_is_refused_with_its_path_and_accepted_when_empty() {
        for field in FIELDS {
            let Rule::Refused(reason) = field.rule else { continue };
            let message = error(nested(field.path, json!("something")));
            let path = field.path.replace("[]", "[0]");
            assert!(message.contains(&path) && message.contains(reason), "{message}");
            for empty in
                [json!(null), json!(false), json!(""), json!([]), json!({}), json!({"a": []}), json!(0)]
            {
                check(&nested(field.path, empty)).unwrap();
            }
        }
    }

    #[test]
    fn every_honoured_field_passes() {
        for field in FIELDS.iter().filter(|f| !matches!(f.rule, Rule::Refused(_))) {
            check(&nested(field.path, json!("something"))).unwrap();
        }
    }

    #[test]
    fn a_part_is_named_by_its_whole_path() {
        check_part(&json!({"memory": {"limit": 1}, "blockIO": {"weight": 0}}), "linux.resources").unwrap();
        let message =
            check_part(&json!({"memory": {"kernel": 1}}), "linux.resources").unwrap_err().to_string();
        assert!(message.contains("`linux.resources.memory.kernel`"), "{message}");
        let message = check_part(&json!({"cpus": 1}), "linux.resources").unwrap_err().to_string();
        assert!(
            message.contains("`linux.resources.cpus`") && message.contains("`linux.resources.cpu`"),
            "{message}"
        );
    }

    #[test]
    fn map_keys_may_have_points() {
        check(&json!({"linux": {"sysctl": {"net.ipv4.ip_forward": "1"}}, "annotations": {"a.b/c": "d"}}))
            .unwrap();
    }

    /// A configuration in which only the field at `path` has a value.
    fn nested(path: &str, value: Value) -> Value {
        path.rsplit('.').fold(value, |value, part| match part.strip_suffix("[]") {
            Some(name) => json!({ name: [value] }),
            None => json!({ part: value }),
        })
    }
}
