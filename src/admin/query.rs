//! A query string: `name=value` pairs, as a form or a URL encodes them.

/// The pairs of a query.
pub struct Query<'q>(&'q str);

impl<'q> Query<'q> {
    /// Of a target's query, without its `?`.
    pub fn new(query: Option<&'q str>) -> Self {
        Self(query.unwrap_or_default())
    }

    /// The first value of that name; `None` where there is none, or an empty one.
    pub fn get(&self, name: &str) -> Option<String> {
        let pairs = self.0.split('&').filter_map(|pair| pair.split_once('='));
        let value = pairs.into_iter().find(|(key, _)| decode(key) == name).map(|(_, value)| decode(value));
        value.filter(|value| !value.is_empty())
    }
}

/// `%41` and `+` undone. What is no escape stands for itself, and what is no UTF-8 for a replacement character.
fn decode(text: &str) -> String {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let bytes = text.as_bytes();
    let (mut decoded, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        let escaped = if *byte == b'%' { digit(bytes.get(at + 1)).zip(digit(bytes.get(at + 2))) } else { None };
        decoded.push(match (escaped, byte) {
            (Some((high, low)), _) => u8::try_from(high * 16 + low).unwrap_or(b'?'),
            (None, b'+') => b' ',
            (None, byte) => *byte,
        });
        at += if escaped.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// A value as a query carries it.
pub fn encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_encoded_comes_back() {
        for text in ["gpt-4.1-mini", "a b&c=d%", "모델/1", "<img onerror=x>", "+"] {
            let query = format!("x=1&model={}&client=", encode(text));
            assert_eq!(Query::new(Some(&query)).get("model").as_deref(), Some(text), "{query}");
        }
    }

    #[test]
    fn nonsense_stands_for_itself() {
        let query = Query::new(Some("a=%&b=%4&c=%zz&d=%ff&=e&f&g="));
        for (name, value) in [("a", "%"), ("b", "%4"), ("c", "%zz"), ("d", "\u{fffd}")] {
            assert_eq!(query.get(name).as_deref(), Some(value));
        }
        assert_eq!((query.get("f"), query.get("g"), query.get("h")), (None, None, None));
        assert_eq!(Query::new(None).get("a"), None);
    }
}
