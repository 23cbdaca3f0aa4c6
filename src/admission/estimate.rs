//! What a request will cost, before anyone knows: learned for each model from what answers did cost.
//!
//! The prompt's bytes over the model's bytes per token, and the longest answer that the request allows, but no more than four
//! of five answers of late were. No tokenizer: it would cost a hundred times as much, and the names of models behind a gateway
//! rarely say which one is theirs. What the estimate is wrong by is settled when the answer tells its true usage.

use std::time::Duration;

use crate::openai::prompt::Prompt;
use crate::openai::usage::Usage;

/// Before anything is known: English text in JSON.
const SEED_BYTES_PER_TOKEN: f64 = 4.0;

/// Nothing that a gateway counts lies outside.
const BYTES_PER_TOKEN: std::ops::RangeInclusive<f64> = 1.0..=8.0;

/// The newest prompt weighs 1 in so many.
const PROMPT_WEIGHT: f64 = 16.0;

/// Before anything is known: an answer takes no more than this.
const SEED_OUTPUT: u64 = 1024;

/// Answers remembered.
const ANSWERS: usize = 64;

/// Once there are so many, it is looked at them again after each so many new ones.
const ANSWERS_AT_ONCE: usize = 8;

/// An image, a sound or a file in the prompt: of the order of what gateways charge for one.
const TOKENS_PER_EMBEDDED: u64 = 1000;

/// No single request is believed to cost more.
pub const MOST: u64 = 50_000_000;

/// The newest first byte weighs 1 in so many.
const FIRST_BYTE_WEIGHT: u32 = 8;

/// What a request is estimated to cost, in tokens. All 0 for a call that costs none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    pub prompt: u64,
    pub output: u64,
}

impl Cost {
    /// Both together.
    pub fn tokens(self) -> u64 {
        self.prompt.saturating_add(self.output)
    }
}

/// What a request says of its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub prompt: Prompt,
    /// The longest answer that it allows, where it says so.
    pub max_output: Option<u64>,
    /// How many answers it asks for.
    pub choices: u32,
}

/// What was learned about one model.
#[derive(Debug, Clone)]
pub struct Learned {
    bytes_per_token: f64,
    /// The latest answers' lengths in tokens, the oldest at `next`.
    outputs: Vec<u32>,
    next: usize,
    /// The length that four of five of them do not exceed.
    usual_output: u64,
    /// From sending a request to the first byte of its answer: of answers at once, and of streams.
    first_byte: [Option<Duration>; 2],
}

impl Default for Learned {
    fn default() -> Self {
        Self {
            bytes_per_token: SEED_BYTES_PER_TOKEN,
            outputs: Vec::new(),
            next: 0,
            usual_output: SEED_OUTPUT,
            first_byte: [None; 2],
        }
    }
}

impl Learned {
    /// What such a request will cost; at least 1 token.
    pub fn estimate(&self, size: Size) -> Cost {
        let text = (size.prompt.bytes as f64 / self.bytes_per_token).ceil() as u64;
        let embedded = TOKENS_PER_EMBEDDED * u64::from(size.prompt.embedded);
        let prompt = text.saturating_add(embedded).clamp(1, MOST / 2);
        let output = size.max_output.unwrap_or(u64::MAX).min(self.usual_output);
        Cost { prompt, output: output.saturating_mul(u64::from(size.choices.max(1))).min(MOST / 2) }
    }

    /// An answer told what it cost.
    pub fn learn(&mut self, size: Size, usage: Usage) {
        // What an image costs says nothing about text.
        if size.prompt.embedded == 0 && usage.prompt > 0 && size.prompt.bytes > 0 {
            let seen = size.prompt.bytes as f64 / usage.prompt as f64;
            let mean = self.bytes_per_token + (seen - self.bytes_per_token) / PROMPT_WEIGHT;
            self.bytes_per_token = mean.clamp(*BYTES_PER_TOKEN.start(), *BYTES_PER_TOKEN.end());
        }
        let each = usage.completion.div_ceil(u64::from(size.choices.max(1)));
        self.remember(u32::try_from(each).unwrap_or(u32::MAX));
    }

    fn remember(&mut self, output: u32) {
        if self.outputs.len() < ANSWERS {
            self.outputs.push(output);
        } else {
            self.outputs[self.next] = output;
        }
        self.next = (self.next + 1) % ANSWERS;
        // One more of many changes little.
        if self.outputs.len() == ANSWERS && !self.next.is_multiple_of(ANSWERS_AT_ONCE) {
            return;
        }
        let mut sorted = self.outputs.clone();
        let at = (sorted.len() * 4).div_ceil(5) - 1;
        let (_, usual, _) = sorted.select_nth_unstable(at);
        self.usual_output = u64::from(*usual);
    }

    /// The first byte of an answer came so long after its request was sent.
    pub fn saw_first_byte(&mut self, stream: bool, after: Duration) {
        let mean = &mut self.first_byte[usize::from(stream)];
        *mean = Some(mean.map_or(after, |mean| (mean * (FIRST_BYTE_WEIGHT - 1) + after) / FIRST_BYTE_WEIGHT));
    }

    /// How long the first byte of an answer usually takes; nothing where that is not known.
    pub fn usual_first_byte(&self, stream: bool) -> Duration {
        self.first_byte[usize::from(stream)].unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(prompt_bytes: u64, max_output: Option<u64>) -> Size {
        with_images(0, prompt_bytes, max_output)
    }

    fn with_images(embedded: u32, bytes: u64, max_output: Option<u64>) -> Size {
        Size { prompt: Prompt { bytes, embedded }, max_output, choices: 1 }
    }

    fn usage(prompt: u64, completion: u64) -> Usage {
        Usage { prompt, completion, ..Usage::default() }
    }

    #[test]
    fn before_anything_is_known_the_requests_own_limit_counts() {
        let learned = Learned::default();
        assert_eq!(learned.estimate(size(400, Some(50))), Cost { prompt: 100, output: 50 });
        assert_eq!(learned.estimate(size(400, None)), Cost { prompt: 100, output: SEED_OUTPUT });
        assert_eq!(learned.estimate(Size { choices: 3, ..size(4, Some(50)) }).output, 150);
        assert_eq!(learned.estimate(with_images(2, 4, Some(0))).prompt, 2001);
    }

    #[test]
    fn absurd_requests_are_neither_free_nor_without_end() {
        let learned = Learned::default();
        let absurd = Size { choices: u32::MAX, ..with_images(u32::MAX, u64::MAX, Some(u64::MAX)) };
        assert!(learned.estimate(absurd).tokens() <= MOST);
        let nothing = Size { choices: 0, ..size(0, Some(0)) };
        assert_eq!(learned.estimate(nothing).tokens(), 1);
    }

    #[test]
    fn bytes_per_token_and_the_usual_output_are_learned() {
        let mut learned = Learned::default();
        for output in (0..1000).map(|i| 100 + i % 10) {
            learned.learn(size(2000, None), usage(1000, output));
        }
        let cost = learned.estimate(size(2000, None));
        assert!((990..=1010).contains(&cost.prompt), "{cost:?}");
        assert!((107..=108).contains(&cost.output), "four of five are no longer: {cost:?}");
        assert_eq!(learned.estimate(size(2000, Some(5))).output, 5);
        for _ in 0..1000 {
            learned.learn(size(2000, None), usage(u64::MAX, u64::MAX));
        }
        assert_eq!(learned.estimate(size(2000, None)).prompt, 2000, "a token has a byte at least");
    }

    #[test]
    fn an_image_teaches_nothing_about_text() {
        let mut learned = Learned::default();
        learned.learn(with_images(1, 400, None), usage(1500, 10));
        assert_eq!(learned.estimate(size(400, None)).prompt, 100);
    }

    #[test]
    fn the_usual_time_to_the_first_byte_is_learned_of_streams_apart() {
        let mut learned = Learned::default();
        assert_eq!(learned.usual_first_byte(true), Duration::ZERO);
        learned.saw_first_byte(true, Duration::from_secs(1));
        learned.saw_first_byte(true, Duration::from_secs(9));
        learned.saw_first_byte(false, Duration::from_secs(60));
        assert_eq!(learned.usual_first_byte(true), Duration::from_secs(2));
        assert_eq!(learned.usual_first_byte(false), Duration::from_secs(60));
    }
}
