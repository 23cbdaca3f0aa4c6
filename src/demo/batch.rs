//! The job: twenty product reviews to be summed up, all sent at once, with a line for each as it is done.

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::client::{self, Answer, Question};
use super::scene::MODELS;
use super::{Broken, say};

/// What customers wrote.
const REVIEWS: [&str; 20] = [
    "음질이 또렷하고 착용감도 편해요.",
    "배송은 하루 만에 왔는데 상자가 찌그러져 있었어요.",
    "가격에 비해 마감이 정말 훌륭합니다.",
    "사진보다 색이 어두워서 조금 실망했어요.",
    "배터리가 이틀은 거뜬히 가요.",
    "설명서가 영어뿐이라 설치가 어려웠어요.",
    "부모님 선물로 드렸더니 아주 좋아하세요.",
    "한 달 만에 단추가 떨어졌습니다.",
    "상담원이 친절해서 교환이 금방 끝났어요.",
    "소음이 생각보다 커서 밤에는 못 쓰겠어요.",
    "두 번째 구매인데 여전히 만족합니다.",
    "사이즈가 작게 나와서 한 치수 크게 사세요.",
    "향이 은은해서 사무실에서 쓰기 좋아요.",
    "앱 연결이 자꾸 끊겨서 불편합니다.",
    "디자인이 깔끔하고 자리도 적게 차지해요.",
    "환불 처리가 2주나 걸렸어요.",
    "아이가 매일 들고 다닐 만큼 좋아해요.",
    "방수라고 했는데 비를 맞고 고장 났어요.",
    "맛있지만 양이 적어서 아쉬워요.",
    "이 가격에 이 성능이면 망설일 이유가 없네요.",
];

/// How many requests there are.
pub const SIZE: usize = REVIEWS.len();

/// What came of the batch.
pub struct Batch {
    /// In the order in which they ended.
    pub finished: Vec<Finished>,
    /// From the first request sent to the last one done.
    pub took: Duration,
}

/// A request that has ended.
pub struct Finished {
    /// From 1.
    pub number: usize,
    pub model: &'static str,
    /// The answer, or what the client saw instead.
    pub outcome: Result<Answer, String>,
}

/// Sends all requests at once, and says of each how it ended.
///
/// # Errors
/// That nothing can be printed; what goes wrong with a request is part of the batch.
pub async fn run(weir: SocketAddr, out: &mut impl Write) -> Result<Batch, Broken> {
    say(out, HEADING)?;
    let begun = Instant::now();
    let mut running: JoinSet<Finished> = (1..=SIZE).map(|number| one(weir, number)).collect();
    let mut finished = Vec::with_capacity(SIZE);
    while let Some(ended) = running.join_next().await {
        let ended = ended.map_err(|error| format!("a request of the demo's own went wrong: {error}"))?;
        finished.push(ended);
        if let Some(ended) = finished.last() {
            say(out, line(finished.len(), ended))?;
        }
    }
    Ok(Batch { finished, took: begun.elapsed() })
}

async fn one(weir: SocketAddr, number: usize) -> Finished {
    let question = question(number);
    let outcome = client::ask(weir, &question).await;
    Finished { number, model: question.model, outcome }
}

/// The request of this number, from 1 to [`SIZE`]: the models take turns, and of each model every second is a stream.
pub fn question(number: usize) -> Question {
    let nth = number - 1;
    Question {
        model: MODELS[nth % MODELS.len()],
        prompt: format!("후기 {number}: {} 장점과 단점을 한 문장으로 정리해 주세요.", REVIEWS[nth]),
        stream: nth / MODELS.len() % 2 == 1,
    }
}

const HEADING: &str = " done  request  model          status  took ms  queued ms  retries";

fn line(done: usize, finished: &Finished) -> String {
    let Finished { number, model, outcome } = finished;
    let start = format!("{done:>2}/{SIZE}  {number:>7}  {model:<13}");
    match outcome {
        Ok(Answer { status, took, queued, retries, .. }) => {
            let (status, took, queued) = (status.as_u16(), took.as_millis(), queued.as_millis());
            format!("{start}  {status:>6}  {took:>7}  {queued:>9}  {retries:>7}")
        }
        Err(error) => format!("{start}  {error}"),
    }
}

impl Batch {
    /// The answers, each with its model.
    pub fn answers(&self) -> impl Iterator<Item = (&'static str, &Answer)> {
        self.finished.iter().filter_map(|finished| Some((finished.model, finished.outcome.as_ref().ok()?)))
    }

    /// Whether every request has its answer.
    ///
    /// # Errors
    /// How many have not, and the first reason.
    pub fn all_answered(&self) -> Result<(), String> {
        let mut errors = self.finished.iter().filter_map(|finished| Some((finished, finished.outcome.as_ref().err()?)));
        let Some((first, error)) = errors.next() else { return Ok(()) };
        let count = 1 + errors.count();
        Err(format!("{count} of {SIZE} requests were not answered; request {}: {error}", first.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_models_get_half_of_the_requests_and_half_of_those_are_streams() {
        for model in MODELS {
            let questions: Vec<Question> = (1..=SIZE).map(question).filter(|q| q.model == model).collect();
            assert_eq!(questions.len(), 10);
            assert_eq!(questions.iter().filter(|question| question.stream).count(), 5);
        }
    }

    #[test]
    fn a_line_stands_below_its_heading_and_an_error_says_itself() {
        let answer = Answer {
            text: "good".to_owned(),
            status: http::StatusCode::OK,
            took: Duration::from_millis(1234),
            queued: Duration::from_millis(20),
            gateway: Duration::from_secs(1),
            retries: 1,
        };
        let good = Finished { number: 7, model: MODELS[0], outcome: Ok(answer) };
        assert_eq!(line(3, &good), " 3/20        7  gpt-4.1-mini      200     1234         20        1");
        assert_eq!(line(3, &good).len(), HEADING.len());
        let bad = Finished { number: 12, model: MODELS[1], outcome: Err("no answer: reset".to_owned()) };
        assert_eq!(line(20, &bad), "20/20       12  deepseek-chat  no answer: reset");
        let batch = Batch { finished: vec![good, bad], took: Duration::ZERO };
        assert_eq!(batch.answers().count(), 1);
        assert!(batch.all_answered().is_err_and(|error| error.contains("1 of 20") && error.contains("request 12")));
    }
}
