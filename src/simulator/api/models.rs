//! `GET /v1/models`: a few names to list. Any other name is answered just as well.

use serde_json::{Value, json};

const MODELS: [&str; 5] = ["gpt-4.1", "gpt-4.1-mini", "deepseek-chat", "claude-sonnet-4", "text-embedding-3-small"];

pub(in crate::simulator) fn list() -> Value {
    json!({"object": "list", "data": MODELS.map(model)})
}

/// The listed model of this name.
pub(in crate::simulator) fn find(name: &str) -> Option<Value> {
    MODELS.contains(&name).then(|| model(name))
}

fn model(id: &str) -> Value {
    json!({"id": id, "object": "model", "created": 1_744_316_542, "owned_by": "weir-simulator"})
}
