//! What a request asks for: the few fields that the simulated gateway heeds.

use serde_json::Value;

use super::problem::Problem;

/// The APIs that make text. Each has its own names for the same things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    Chat,
    Completions,
    Responses,
    Messages,
}

/// A request for text.
#[derive(Debug, PartialEq)]
pub(super) struct Call {
    pub(super) api: Api,
    pub(super) model: String,
    pub(super) stream: bool,
    /// Whether a stream shall say its usage at the end (the chat and completions APIs ask).
    pub(super) include_usage: bool,
    /// How many answers; never 0.
    pub(super) choices: u32,
    /// The cap on the tokens of each.
    pub(super) max_output: Option<u32>,
    /// Whether the model shall think before it speaks.
    pub(super) reasoning: bool,
    /// The last text of the request: what the user said.
    pub(super) prompt: String,
    pub(super) prompt_tokens: u64,
}

/// `n` beyond this is refused.
const MAX_CHOICES: u32 = 8;

impl Call {
    pub(super) fn parse(api: Api, body: &[u8]) -> Result<Self, Problem> {
        let body = parse_object(body)?;
        let model = model(&body)?;
        let input = match api {
            Api::Chat | Api::Messages => "messages",
            Api::Completions => "prompt",
            Api::Responses => "input",
        };
        let mut spoken = Spoken::default();
        spoken.hear(&body["system"]);
        spoken.hear(&body["instructions"]);
        spoken.hear(present(&body, input)?);
        Ok(Self {
            api,
            model,
            stream: body["stream"].as_bool().unwrap_or(false),
            include_usage: body["stream_options"]["include_usage"].as_bool().unwrap_or(false),
            choices: choices(api, &body)?,
            max_output: max_output(&body)?,
            reasoning: body.get("reasoning").or_else(|| body.get("reasoning_effort")).is_some_and(|it| !it.is_null()),
            prompt_tokens: spoken.tokens(),
            prompt: spoken.last.to_owned(),
        })
    }
}

/// Reads a body, which must be a JSON object.
pub(super) fn parse_object(body: &[u8]) -> Result<Value, Problem> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(object)) => Ok(Value::Object(object)),
        Ok(_) => Err(Problem::invalid(None, "The JSON body of your request is not an object.")),
        Err(error) => {
            Err(Problem::invalid(None, format!("We could not parse the JSON body of your request: {error}.")))
        }
    }
}

/// The field of this name.
pub(super) fn present<'body>(body: &'body Value, name: &'static str) -> Result<&'body Value, Problem> {
    let missing = || Problem::invalid(Some(name), format!("Missing required parameter: '{name}'."));
    body.get(name).filter(|value| !value.is_null()).ok_or_else(missing)
}

pub(super) fn model(body: &Value) -> Result<String, Problem> {
    let model = present(body, "model")?.as_str().filter(|model| !model.is_empty());
    model.map(str::to_owned).ok_or_else(|| Problem::invalid(Some("model"), "'model' is not the name of a model."))
}

fn choices(api: Api, body: &Value) -> Result<u32, Problem> {
    if matches!(api, Api::Responses | Api::Messages) {
        return Ok(1);
    }
    let choices = count(body, "n")?.unwrap_or(1);
    if choices > MAX_CHOICES {
        return Err(Problem::invalid(Some("n"), format!("'n' is {choices}; {MAX_CHOICES} is the most.")));
    }
    Ok(choices)
}

/// The cap on the output: the larger, where a request gives more than one.
fn max_output(body: &Value) -> Result<Option<u32>, Problem> {
    let caps = [count(body, "max_tokens")?, count(body, "max_completion_tokens")?, count(body, "max_output_tokens")?];
    Ok(caps.into_iter().flatten().max())
}

fn count(body: &Value, name: &'static str) -> Result<Option<u32>, Problem> {
    let Some(value) = body.get(name).filter(|value| !value.is_null()) else { return Ok(None) };
    let number = value.as_f64().filter(|number| number.fract() == 0.0 && *number >= 1.0);
    let number = number.ok_or_else(|| Problem::invalid(Some(name), format!("'{name}' must be a whole number from 1.")));
    // A float's cast stops at the type's ends.
    number.map(|number| Some(number as u32))
}

/// The text in a request, wherever its API puts it.
#[derive(Default)]
pub(super) struct Spoken<'body> {
    bytes: usize,
    last: &'body str,
}

impl<'body> Spoken<'body> {
    /// Takes in a string, a list of messages, of parts or of token numbers.
    pub(super) fn hear(&mut self, value: &'body Value) {
        match value {
            Value::String(text) => {
                self.bytes += text.len();
                self.last = text;
            }
            Value::Number(_) => self.bytes += BYTES_PER_TOKEN,
            Value::Array(items) => items.iter().for_each(|item| self.hear(item)),
            Value::Object(object) => {
                object.get("content").or_else(|| object.get("text")).into_iter().for_each(|text| self.hear(text));
            }
            Value::Null | Value::Bool(_) => {}
        }
    }

    /// About as many as a tokenizer would find.
    pub(super) fn tokens(&self) -> u64 {
        self.bytes.div_ceil(BYTES_PER_TOKEN).max(1) as u64
    }
}

const BYTES_PER_TOKEN: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(api: Api, body: Value) -> Result<Call, Problem> {
        Call::parse(api, body.to_string().as_bytes())
    }

    #[test]
    fn each_api_finds_what_the_user_said() {
        use serde_json::json;
        let parts = json!([{"role": "system", "content": "Be kind."},
                           {"role": "user", "content": [{"type": "text", "text": "hello"}]}]);
        for (api, body) in [
            (Api::Chat, json!({"model": "m", "messages": parts})),
            (Api::Messages, json!({"model": "m", "system": "Be kind.", "messages": [{"content": "hello"}]})),
            (Api::Responses, json!({"model": "m", "instructions": "Be kind.", "input": "hello"})),
            (Api::Completions, json!({"model": "m", "prompt": ["Be kind.", "hello"]})),
        ] {
            let call = parse(api, body).expect("a call");
            assert_eq!((call.prompt.as_str(), call.prompt_tokens), ("hello", 4), "{api:?}");
        }
    }

    #[test]
    fn the_larger_of_two_caps_holds() {
        let body = serde_json::json!({"model": "m", "messages": "hi", "max_tokens": 5, "max_completion_tokens": 7});
        assert_eq!(parse(Api::Chat, body).expect("a call").max_output, Some(7));
    }

    #[test]
    fn a_bad_body_is_refused_with_the_field_to_blame() {
        use serde_json::json;
        assert!(Call::parse(Api::Chat, b"{").is_err());
        assert!(Call::parse(Api::Chat, b"[]").is_err());
        for (body, field) in [
            (json!({"messages": []}), "model"),
            (json!({"model": 5, "messages": []}), "model"),
            (json!({"model": "m"}), "messages"),
            (json!({"model": "m", "messages": [], "n": 9}), "n"),
            (json!({"model": "m", "messages": [], "max_tokens": 0}), "max_tokens"),
            (json!({"model": "m", "messages": [], "max_tokens": "many"}), "max_tokens"),
        ] {
            let problem = parse(Api::Chat, body).expect_err(field);
            assert_eq!(problem.to_json()["error"]["param"], field);
        }
    }
}
