//! What the simulated model says: an analysis of the review it was given, a word at a time.
//!
//! It quotes the prompt, so that a mixed-up answer is seen at a glance, and answers Hangul in Korean.

/// An endless analysis of one prompt; a token is a word with the space before it.
pub(super) struct Prose {
    opening: Vec<String>,
    analysis: Vec<&'static str>,
}

const ENGLISH: [&str; 8] = [
    "The tone is mostly positive.",
    "Delivery and value for money are praised.",
    "The packaging leaves room for improvement.",
    "The customer would buy again.",
    "A quick answer from support made a good impression.",
    "Compared with similar products it does well.",
    "Nothing in it calls for a refund.",
    "A word of thanks would be a fitting reply.",
];

const KOREAN: [&str; 8] = [
    "전반적으로 긍정적인 후기입니다.",
    "배송 속도와 가격에 대한 만족도가 높습니다.",
    "다만 포장 상태는 개선이 필요해 보입니다.",
    "고객은 다시 구매할 의향이 있습니다.",
    "상담원의 빠른 대응이 좋은 인상을 남겼습니다.",
    "비슷한 상품과 비교해도 평가가 좋은 편입니다.",
    "환불이나 교환이 필요한 내용은 없습니다.",
    "감사 인사로 답변하는 것이 알맞습니다.",
];

impl Prose {
    /// What is said to `prompt`; another `variant` says it in another order.
    pub(super) fn of(prompt: &str, variant: usize) -> Self {
        let quote = excerpt(prompt);
        let (opening, mut sentences) = if prompt.chars().any(is_hangul) {
            (format!("“{quote}” 후기를 분석했습니다."), KOREAN)
        } else {
            (format!("Analysis of “{quote}”:"), ENGLISH)
        };
        sentences.rotate_left((prompt.len() + variant) % ENGLISH.len());
        Self {
            opening: opening.split_whitespace().map(str::to_owned).collect(),
            analysis: sentences.iter().flat_map(|sentence| sentence.split(' ')).collect(),
        }
    }

    /// The `nth` token, the first with no space before it.
    pub(super) fn token(&self, nth: u32) -> String {
        let nth = nth as usize;
        let word = match self.opening.get(nth) {
            Some(word) => word,
            None => self.analysis[(nth - self.opening.len()) % self.analysis.len()],
        };
        if nth == 0 { word.to_owned() } else { format!(" {word}") }
    }

    /// The token that comes last, after `nth` others: with a full stop.
    pub(super) fn last_token(&self, nth: u32) -> String {
        let token = self.token(nth);
        format!("{}.", token.trim_end_matches(['.', ',', ':']))
    }
}

/// The first words, 40 characters at most.
fn excerpt(prompt: &str) -> String {
    const MOST: usize = 40;
    // Words beyond these can't fit; a long prompt is not walked to its end.
    let words: Vec<&str> = prompt.split_whitespace().take(MOST).collect();
    let start = words.join(" ");
    if start.chars().count() <= MOST {
        return start;
    }
    let cut: String = start.chars().take(MOST).collect();
    format!("{}…", cut.trim_end())
}

fn is_hangul(character: char) -> bool {
    matches!(character, '\u{1100}'..='\u{11ff}' | '\u{3130}'..='\u{318f}' | '\u{ac00}'..='\u{d7a3}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(prompt: &str, tokens: u32) -> String {
        let prose = Prose::of(prompt, 0);
        (0..tokens - 1).map(|nth| prose.token(nth)).chain([prose.last_token(tokens - 1)]).collect()
    }

    #[test]
    fn the_answer_quotes_the_prompt_and_ends_with_a_full_stop() {
        let said = say("great value", 10);
        assert!(said.starts_with("Analysis of “great value”: "), "{said}");
        assert!(said.ends_with('.') && !said.contains("  "), "{said}");
        assert_eq!(said.split(' ').count(), 10);
    }

    #[test]
    fn a_korean_prompt_gets_a_korean_answer() {
        assert!(say("가성비 최고", 30).starts_with("“가성비 최고” 후기를 분석했습니다. "));
    }

    #[test]
    fn any_prompt_has_an_answer_of_any_length() {
        for prompt in ["", " ", "a\nb\tc", &"가".repeat(1000), &"word ".repeat(1000)] {
            assert_eq!(say(prompt, 500).split(' ').count(), 500);
            assert!(excerpt(prompt).chars().count() <= 41);
        }
    }
}
