//! `POST /v1/embeddings`: the same input has the same vector, whatever the seed.

use serde_json::{Value, json};

use crate::simulator::call::{Spoken, model, parse_object, present};
use crate::simulator::dice::Dice;
use crate::simulator::problem::Problem;

/// A request for vectors.
#[derive(Debug)]
pub(in crate::simulator) struct Embeddings {
    pub(in crate::simulator) model: String,
    /// What the quota on tokens is charged, and the usage.
    pub(in crate::simulator) tokens: u64,
    vectors: Vec<Vector>,
    /// The SDKs of OpenAI ask for little-endian floats in base64 unless told otherwise.
    base64: bool,
}

const DIMENSIONS: usize = 8;
const MAX_INPUTS: usize = 2048;

type Vector = [f32; DIMENSIONS];

impl Embeddings {
    pub(in crate::simulator) fn parse(body: &[u8]) -> Result<Self, Problem> {
        let body = parse_object(body)?;
        let input = present(&body, "input")?;
        let mut spoken = Spoken::default();
        spoken.hear(input);
        Ok(Self {
            model: model(&body)?,
            tokens: spoken.tokens(),
            vectors: inputs(input)?.into_iter().map(vector).collect(),
            base64: body["encoding_format"] == "base64",
        })
    }

    pub(in crate::simulator) fn to_json(&self) -> Value {
        let data: Vec<Value> =
            self.vectors.iter().enumerate().map(|(index, vector)| self.item(index, vector)).collect();
        json!({
            "object": "list",
            "data": data,
            "model": self.model,
            "usage": {"prompt_tokens": self.tokens, "total_tokens": self.tokens},
        })
    }

    fn item(&self, index: usize, vector: &Vector) -> Value {
        let embedding = if self.base64 {
            let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
            base64(&bytes).into()
        } else {
            json!(vector)
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    }
}

/// A string or a list of token numbers is one input; a list of these is many.
fn inputs(input: &Value) -> Result<Vec<&Value>, Problem> {
    let wrong = |message: &str| Err(Problem::invalid(Some("input"), message));
    match input {
        Value::String(_) => Ok(vec![input]),
        Value::Array(items) if items.is_empty() => wrong("'input' is an empty list."),
        Value::Array(items) if items.len() > MAX_INPUTS => wrong("'input' has more than 2048 entries."),
        Value::Array(items) if items.iter().all(Value::is_number) => Ok(vec![input]),
        Value::Array(items) if items.iter().all(|item| item.is_string() || item.is_array()) => {
            Ok(items.iter().collect())
        }
        _ => wrong("'input' is neither a text, nor tokens, nor a list of these."),
    }
}

/// Of length 1, pointing wherever the input's hash says.
fn vector(input: &Value) -> Vector {
    let mut dice = Dice::of(0, fnv1a(input.to_string().as_bytes()));
    let numbers: [f64; DIMENSIONS] = std::array::from_fn(|_| 2.0 * dice.fraction() - 1.0);
    let length = numbers.iter().map(|number| number * number).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    numbers.map(|number| (number / length) as f32)
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |nth: usize| u32::from(chunk.get(nth).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for nth in 0..4 {
            let digit = ALPHABET[(bits >> (18 - 6 * nth) & 63) as usize];
            text.push(if nth <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn embed(body: &str) -> Value {
        Embeddings::parse(body.as_bytes()).expect(body).to_json()
    }

    #[test]
    fn base64_matches_the_rfc() {
        for (plain, encoded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn the_same_input_has_the_same_vector_of_length_one() {
        let answer = embed(r#"{"model":"m","input":["hello","hello","other"]}"#);
        assert_eq!(answer["data"][0]["embedding"], answer["data"][1]["embedding"]);
        assert_ne!(answer["data"][0]["embedding"], answer["data"][2]["embedding"]);
        assert_eq!(answer["data"][2]["index"], 2);
        let length: f32 = vector(&json!("hello")).iter().map(|number| number * number).sum();
        assert!((length - 1.0).abs() < 1e-6);
    }

    #[test]
    fn base64_says_the_same_numbers_in_32_bytes() {
        let answer = embed(r#"{"model":"m","input":"hello","encoding_format":"base64"}"#);
        assert_eq!(answer["data"][0]["embedding"].as_str().map(str::len), Some(44));
    }

    #[test]
    fn token_numbers_are_one_input_and_cost_one_token_each() {
        let answer = embed(r#"{"model":"m","input":[1,2,3]}"#);
        assert_eq!(answer["data"].as_array().map(Vec::len), Some(1));
        assert_eq!(answer["usage"]["total_tokens"], 3);
        assert!(Embeddings::parse(br#"{"model":"m","input":[]}"#).is_err());
        assert!(Embeddings::parse(br#"{"model":"m","input":{}}"#).is_err());
    }
}
