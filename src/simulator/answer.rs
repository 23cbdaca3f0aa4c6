//! An answer of the simulated model, as planned before its first byte: how long, in which words, at what cost.

use super::call::Call;
use super::fate::Fate;
use super::prose::Prose;

pub(super) struct Answer {
    pub(super) call: Call,
    /// Sixteen hex digits; each API puts its own prefix before them.
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) created: u64,
    /// The tokens that are said, in each choice; never 0.
    pub(super) spoken: u32,
    /// Whether the request's cap cut it short.
    pub(super) capped: bool,
    pub(super) usage: Usage,
    prose: Vec<Prose>,
}

/// What the answer cost, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) prompt: u64,
    /// The part of the prompt that came from a cache.
    pub(super) cached: u64,
    /// All output, thoughts included.
    pub(super) completion: u64,
    pub(super) reasoning: u64,
}

/// A step of a streamed answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Opening { choice: u32 },
    Token { choice: u32, nth: u32 },
    Closing { choice: u32 },
    Usage,
    Done,
}

impl Answer {
    pub(super) fn plan(call: Call, fate: &Fate, created: u64) -> Self {
        let tokens = call.max_output.map_or(fate.output_tokens, |cap| cap.min(fate.output_tokens));
        let thought = if call.reasoning { tokens / 4 } else { 0 };
        let choices = u64::from(call.choices);
        Self {
            id: format!("{:016x}", fate.id),
            created,
            spoken: tokens - thought,
            capped: tokens < fate.output_tokens,
            usage: Usage {
                prompt: call.prompt_tokens,
                cached: cached(call.prompt_tokens),
                completion: choices * u64::from(tokens),
                reasoning: choices * u64::from(thought),
            },
            prose: (0..call.choices as usize).map(|choice| Prose::of(&call.prompt, choice)).collect(),
            call,
        }
    }

    /// What the quota on tokens is charged: the cap counts in full where there is one, since a gateway does not know
    /// beforehand that it won't be used.
    pub(super) fn charge(&self) -> u64 {
        let output = match self.call.max_output {
            Some(cap) => u64::from(cap) * u64::from(self.call.choices),
            None => self.usage.completion,
        };
        self.usage.prompt + output
    }

    pub(super) fn token(&self, choice: u32, nth: u32) -> String {
        let prose = &self.prose[choice as usize];
        if nth + 1 == self.spoken && !self.capped { prose.last_token(nth) } else { prose.token(nth) }
    }

    pub(super) fn text(&self, choice: u32) -> String {
        (0..self.spoken).map(|nth| self.token(choice, nth)).collect()
    }

    /// All steps of the answer as a stream, in order.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + Send + use<> {
        let (choices, spoken) = (self.call.choices, self.spoken);
        let openings = (0..choices).map(|choice| Part::Opening { choice });
        let tokens = (0..spoken).flat_map(move |nth| (0..choices).map(move |choice| Part::Token { choice, nth }));
        let closings = (0..choices).map(|choice| Part::Closing { choice });
        openings.chain(tokens).chain(closings).chain([Part::Usage, Part::Done])
    }
}

impl Usage {
    pub(super) fn total(self) -> u64 {
        self.prompt + self.completion
    }
}

/// Half of a long prompt, in the blocks that OpenAI caches.
fn cached(prompt_tokens: u64) -> u64 {
    if prompt_tokens < 1024 { 0 } else { prompt_tokens / 2 / 128 * 128 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulator::Settings;
    use crate::simulator::call::Api;

    fn plan(body: &str, output_tokens: u32) -> Answer {
        let call = Call::parse(Api::Chat, body.as_bytes()).expect("a call");
        let settings = Settings { output_tokens: output_tokens..=output_tokens, ..Settings::default() };
        Answer::plan(call, &Fate::of(&settings, 0), 0)
    }

    #[test]
    fn a_cap_cuts_the_answer_and_is_charged_in_full() {
        let answer = plan(r#"{"model":"m","messages":"12345678","max_tokens":50}"#, 20);
        assert_eq!((answer.usage.completion, answer.capped, answer.charge()), (20, false, 52));
        let answer = plan(r#"{"model":"m","messages":"12345678","max_tokens":5}"#, 20);
        assert_eq!((answer.usage.completion, answer.capped, answer.charge()), (5, true, 7));
    }

    #[test]
    fn without_a_cap_the_charge_is_what_the_answer_costs() {
        let answer = plan(r#"{"model":"m","messages":"12345678","n":3,"reasoning_effort":"low"}"#, 20);
        assert_eq!(answer.usage, Usage { prompt: 2, cached: 0, completion: 60, reasoning: 15 });
        assert_eq!((answer.charge(), answer.usage.total(), answer.spoken), (62, 62, 15));
    }

    #[test]
    fn a_stream_says_the_same_as_the_whole_answer() {
        let answer = plan(r#"{"model":"m","messages":"hi","n":2}"#, 30);
        for wanted in 0..2 {
            let streamed: String = answer
                .parts()
                .filter_map(|part| match part {
                    Part::Token { choice, nth } if choice == wanted => Some(answer.token(choice, nth)),
                    _ => None,
                })
                .collect();
            assert_eq!(streamed, answer.text(wanted));
        }
    }
}
