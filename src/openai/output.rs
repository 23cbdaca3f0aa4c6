//! How much a stream has said so far, before the gateway counts it: what is known of an answer that never ends.

use memchr::{memchr, memchr2};

use super::word;

/// How many bytes of output text an event's JSON carries, escapes undone: the strings named `content`, `text`, `delta`,
/// `arguments`, `partial_json`, `thinking`, `reasoning_content` or `reasoning`, at any depth.
///
/// The events of Responses that repeat at the end what the deltas said carry none. What is no JSON gives any number up to
/// its length. One pass, without allocating.
pub fn text_bytes(event_data: &[u8]) -> usize {
    let mut total = 0;
    let mut rest = event_data;
    while let Some((name, after)) = next_string(rest) {
        rest = after;
        let Some(value) = after.trim_ascii_start().strip_prefix(b":") else { continue };
        let value = value.trim_ascii_start();
        if !is_output(name) && name != b"type" || value.first() != Some(&b'"') {
            rest = value;
            continue;
        }
        let Some((text, after)) = next_string(value) else { break };
        if name != b"type" {
            total += unescaped_len(text);
        } else if repeats_output(text) {
            return 0;
        }
        rest = after;
    }
    total
}

fn is_output(name: &[u8]) -> bool {
    matches!(
        name,
        b"content"
            | b"text"
            | b"delta"
            | b"arguments"
            | b"partial_json"
            | b"thinking"
            | b"reasoning_content"
            | b"reasoning"
    )
}

/// Whether an event of this type is one of Responses that tells of a whole: only its deltas are news.
fn repeats_output(kind: &[u8]) -> bool {
    kind.starts_with(b"response.") && !kind.ends_with(b".delta")
}

/// The inside of the next string, and what stands behind it; `None` where there is none that ends.
fn next_string(json: &[u8]) -> Option<(&[u8], &[u8])> {
    let inside = &json[quote(json)? + 1..];
    let mut end = 0;
    loop {
        end += quote_or_backslash(inside.get(end..)?)?;
        if inside[end] == b'"' {
            return Some((&inside[..end], &inside[end + 1..]));
        }
        end += 2;
    }
}

fn quote(bytes: &[u8]) -> Option<usize> {
    word::find(bytes, |word| word.is(b'"'), |far| memchr(b'"', far))
}

fn quote_or_backslash(bytes: &[u8]) -> Option<usize> {
    word::find(bytes, |word| word.is(b'"').or(word.is(b'\\')), |far| memchr2(b'"', b'\\', far))
}

/// The length of a string's UTF-8 once its escapes are undone.
fn unescaped_len(text: &[u8]) -> usize {
    let mut len = text.len();
    let mut rest = text;
    while let Some(at) = memchr(b'\\', rest) {
        let escape = escape_len(&rest[at..]);
        len -= escape.written - escape.meant;
        rest = &rest[at + escape.written..];
    }
    len
}

/// The bytes of one escape.
struct Escape {
    written: usize,
    meant: usize,
}

/// The escape that these bytes begin with; one that is cut or wrong counts as it stands.
fn escape_len(bytes: &[u8]) -> Escape {
    let written = bytes.len().min(if bytes.get(1) == Some(&b'u') { 6 } else { 2 });
    let meant = match bytes.get(1..6) {
        Some([b'u', b'0', b'0', b'0'..=b'7', _]) => 1,
        Some([b'u', b'0', b'0'..=b'7', ..]) => 2,
        // A half of a pair, which together are four bytes.
        Some([b'u', b'd' | b'D', b'8' | b'9' | b'a'..=b'f' | b'A'..=b'F', ..]) => 2,
        Some([b'u', ..]) => 3,
        _ => 1,
    };
    Escape { written, meant: meant.min(written) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_every_api_is_counted() {
        let events = [
            (
                r#"{"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"Hello"},"finish_reason":null}]}"#,
                5,
            ),
            (
                r#"{"choices":[{"delta":{"content":null,"tool_calls":[{"function":{"name":"f","arguments":"{\"a"}}]}}]}"#,
                3,
            ),
            (r#"{"choices" : [ { "delta" : { "reasoning_content" : "hm" } }, {"delta":{"reasoning":"mm"}} ] }"#, 4),
            (r#"{"object":"text_completion","choices":[{"text":"Hello","logprobs":null}]}"#, 5),
            (r#"{"type":"response.output_text.delta","item_id":"m","delta":"Hi","logprobs":[]}"#, 2),
            (r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}"#, 5),
            (r#"{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{\"x\":1}"}}"#, 7),
            (r#"{"type":"content_block_delta","delta":{"type":"thinking_delta","thinking":"so"}}"#, 2),
            (r#"{"choices":[],"usage":{"prompt_tokens":10}}"#, 0),
            ("[DONE]", 0),
        ];
        for (event, expected) in events {
            assert_eq!(text_bytes(event.as_bytes()), expected, "{event}");
        }
    }

    #[test]
    fn what_responses_repeats_at_the_end_is_not_output_again() {
        for kind in
            ["response.output_text.done", "response.content_part.done", "response.completed", "response.created"]
        {
            let event = format!(r#"{{"type":"{kind}","part":{{"type":"output_text","text":"all of it"}}}}"#);
            assert_eq!(text_bytes(event.as_bytes()), 0, "{kind}");
        }
    }

    #[test]
    fn names_inside_strings_are_no_names() {
        assert_eq!(text_bytes(br#"{"x":"\"content\":\"abc\"","content":"\"text\":\"abc\""}"#), 12);
        assert_eq!(text_bytes(br#"{"type":"text","role":"content","y":["content","text"]}"#), 0);
        assert_eq!(text_bytes(br#"{"x\\":"content","content":"a\\"}"#), 2);
        assert_eq!(text_bytes(br#"{"logprobs":{"content":[{"token":"Hi"}]},"content":{"content":"a"}}"#), 1);
    }

    #[test]
    fn escapes_count_as_what_they_mean() {
        for text in ["a\"\\/\n", "é", "日本", "😀", "\u{7}\u{7f}\u{80}\u{7ff}\u{800}\u{ffff}", "\u{d7ff}\u{e000}"]
        {
            let escaped: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
            for escaped in [escaped.to_uppercase().replace("\\U", "\\u"), escaped] {
                let event = format!(r#"{{"delta":{{"content":"{escaped}"}}}}"#);
                assert_eq!(text_bytes(event.as_bytes()), text.len(), "{event}");
            }
        }
    }

    #[test]
    fn garbage_is_no_panic() {
        let event = br#"{"content":"a\u00e9\n","text" :"\ud83d\ude00", "delta":"\\"}"#;
        for from in 0..event.len() {
            for to in from..event.len() {
                assert!(text_bytes(&event[from..to]) <= to - from);
            }
        }
        for garbage in
            [r#""content":"\u"#, r#""content":"\u00""#, r#""content":"\"#, r#""content":"\"#, r#""content":"\uzzzz\u""#]
        {
            assert!(text_bytes(garbage.as_bytes()) <= garbage.len());
        }
    }
}
