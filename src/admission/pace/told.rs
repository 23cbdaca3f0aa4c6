//! A quota that the gateway tells in its headers: how it stands, and how it comes back.
//!
//! An answer tells how the quota stood when its request was *sent*, long before the answer comes, so what has passed since has to
//! be counted on top. weir keeps the level itself, and each request remembers at which level it left; where its answer tells
//! another, the difference is put right. Differences that were put right since count too, so that no answer corrects what another
//! has corrected already. Too high a level is lowered at once; too low a one is raised when three answers in a row say so.
//!
//! How fast the quota comes back is read from two answers: in a bucket what is lacking and the time until it is full grow
//! together, and their ratio is the rate. Where less remains and yet the time gets shorter, it is a window, which comes back all at
//! once.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::openai::headers::Quota;

/// Answers remembered.
const ANSWERS: usize = 16;

/// So many answers in a row have to tell of more before that is believed.
const CONSISTENT: u32 = 3;

/// A gateway that has not told anything for so many answers does not any more.
const SILENT: u32 = 32;

/// Over so many charges the rate is measured, at least and at most.
const MEASURED: [f64; 2] = [20.0, 200.0];

/// Two answers that differ by so much tell the rate well enough: what remains is told in whole numbers.
const CERTAIN: f64 = 20.0;

/// The part of what a quota holds beyond a charge that is left untouched, and the part of a charge at the least.
const RESERVE: f64 = 0.2;
const LEAST_RESERVE: f64 = 0.03;

/// Differences within these, down and up, are no differences.
const NOISE: [f64; 2] = [0.05, 0.25];

/// No rate is higher, in units a second.
const MOST: f64 = 1e9;

/// Resets are told in milliseconds, rounded.
const ROUNDING: f64 = 0.002;

/// What remains before a window ends may be used up by whoever comes a moment too early.
const WINDOW_MARGIN: Duration = Duration::from_millis(5);

/// However long a quota says that it takes, one request a minute may find out.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Answers older than that say nothing any more.
const OLD: Duration = Duration::from_secs(600);

/// A quota that tells of more than this many times its limit tells nonsense.
const MOST_BURST: u64 = 1000;

/// A level that is off by more than this part of what the quota holds is put right at once where nothing is under way.
const FAR: f64 = 4.0;

/// Ends that differ by less are of the same window.
const SAME_WINDOW: Duration = Duration::from_millis(250);

/// A request's charge may be this many times what weir takes it for, or a part of it.
const CHARGE: [f64; 2] = [0.05, 20.0];

/// Before that is known it is taken to be more.
const FACTOR: f64 = 1.5;

/// The newest answers weigh 1 in so many in that.
const CHARGE_WEIGHT: f64 = 8.0;

/// The level at which a request left, to be compared with what its answer tells.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Mark {
    /// What weir took to remain behind it.
    remaining: f64,
    /// What had been put right so far.
    corrected: f64,
    /// What had been charged so far, by weir's own estimates, this one included.
    charged: f64,
}

/// A quota as told.
#[derive(Debug)]
pub struct Told {
    limit: f64,
    /// What remains at `at`.
    level: f64,
    at: Instant,
    shape: Shape,
    /// The most that it has been seen to hold.
    capacity: f64,
    answers: VecDeque<Answer>,
    /// From where the rate is being measured, and what it was found to be: what remained more than before, and what was charged,
    /// has come in between.
    base: Option<Answer>,
    measured: Option<f64>,
    corrected: f64,
    charged: f64,
    /// How much the gateway charges for what weir takes for 1.
    factor: f64,
    higher: u32,
    least_higher: f64,
    silent: u32,
    /// How long a window is, at least.
    period: Duration,
    /// When a window began.
    rolled_at: Instant,
    passed_at: Instant,
    /// When the gateway will take a request again, in its own words.
    named: Option<Instant>,
    /// Charges are estimates of weir's.
    guesses: bool,
}

/// How a quota stands that the gateway tells.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ToldView {
    /// In the gateway's words: for whatever time it has in mind.
    pub limit: f64,
    /// The most that it was seen to hold at once, which may be less.
    pub capacity: f64,
    /// As weir reckons it now: what was told, less what has passed since, and with what has come back.
    pub remaining: f64,
    /// How fast it comes back, as far as that was seen; of a window at most, since that is as long as it was seen to be at least.
    pub per_second: Option<f64>,
    /// When all of it is back, where it comes back all at once.
    pub window_ends_in: Option<Duration>,
}

#[derive(Debug, Clone, Copy)]
struct Answer {
    sent_at: Instant,
    remaining: f64,
    reset: f64,
    /// What weir had charged by then; `None` where that does not compare with what the gateway has.
    charged: Option<f64>,
}

/// How a quota comes back.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Shape {
    /// So much a second.
    Bucket { rate: f64 },
    /// All of it, then.
    Window { ends_at: Instant },
}

impl Told {
    /// As an answer told it whose request left at that time; `charge` is what was charged for it, nothing where it was refused, and `since` what was charged after it.
    pub fn new(quota: Quota, sent_at: Instant, charge: f64, since: f64, guesses: bool, now: Instant) -> Option<Self> {
        let answer = Answer::of(quota, sent_at, Some(0.0))?;
        let capacity = answer.remaining + charge.max(1.0);
        let mut told = Self {
            limit: quota.limit as f64,
            level: (answer.remaining - since).max(0.0),
            at: now,
            shape: Shape::Bucket { rate: 1.0 },
            capacity,
            answers: VecDeque::from([answer]),
            base: None,
            measured: None,
            corrected: 0.0,
            charged: since,
            factor: if guesses { FACTOR } else { 1.0 },
            higher: 0,
            least_higher: 0.0,
            silent: 0,
            period: Duration::ZERO,
            rolled_at: sent_at,
            passed_at: now,
            named: None,
            guesses,
        };
        told.shape = told.shape_of_answers();
        told.advance(sent_at, now);
        Some(told)
    }

    /// Whether the gateway still tells of it.
    pub fn is_told(&self) -> bool {
        self.silent < SILENT
    }

    /// When that much may pass; never later than when all of it is back.
    pub fn opens_at(&self, charge: f64, now: Instant) -> Instant {
        // Whatever it tells, it is asked now and then; and where it has said when to come back, that counts.
        let latest = self.passed_at + LONGEST_WAIT;
        let latest = self.named.map_or(latest, |named| named.min(latest));
        self.lets_pass_at(charge, now).min(latest.max(now))
    }

    fn lets_pass_at(&self, charge: f64, now: Instant) -> Instant {
        let charge = self.charge_of(charge);
        let wanted = charge + self.reserve(charge);
        let level = self.level_at(now);
        // Sums of fractions that make up a whole may be a little short of it.
        if level + 1e-6 >= wanted {
            return now;
        }
        match self.shape {
            Shape::Bucket { rate } => now + seconds((wanted - level) / rate),
            Shape::Window { .. } => self.next_window(now),
        }
    }

    /// The gateway has said when it will take a request again that it has refused.
    pub fn name(&mut self, at: Instant) {
        self.named = Some(at);
    }

    /// Charges for one that passes.
    pub fn pass(&mut self, charge: f64, now: Instant) -> Mark {
        self.advance(self.at, now);
        self.level = (self.level - self.charge_of(charge)).max(-self.capacity);
        self.charged += charge;
        (self.passed_at, self.named) = (now, None);
        Mark { remaining: self.level, corrected: self.corrected, charged: self.charged }
    }

    /// One that passed was never sent, or was not charged for.
    pub fn take_back(&mut self, charge: f64) {
        self.level = (self.level + self.charge_of(charge)).min(self.capacity);
        self.charged -= charge;
    }

    /// What a request's answer told; where it was `refused`, the gateway has not charged for it.
    ///
    /// A request that left before anything was told has no mark: nothing is put right by its answer.
    pub fn hear(
        &mut self,
        quota: Option<Quota>,
        mark: Option<Mark>,
        sent_at: Instant,
        charge: f64,
        refused: bool,
        now: Instant,
    ) {
        if refused && mark.is_some() {
            self.charged -= charge;
        }
        let charged = mark.filter(|_| !refused).map(|mark| mark.charged);
        let answer = quota.and_then(|quota| Answer::of(quota, sent_at, charged));
        let Some((answer, quota)) = answer.zip(quota) else {
            self.silent += 1;
            return;
        };
        self.silent = 0;
        self.advance(self.at, now);
        self.note_limit(quota.limit as f64);
        self.capacity = self.capacity.max(answer.remaining + if refused { 0.0 } else { charge });
        self.measure(answer);
        self.remember(answer);
        self.shape = self.shape_of_answers();
        if let Shape::Window { .. } = self.shape {
            self.period = self.answers.iter().map(|answer| seconds(answer.reset)).max().unwrap_or_default();
        }
        if let (Shape::Bucket { rate }, Some(slope)) = (self.shape, self.slope())
            && slope.lacking >= CERTAIN
        {
            self.capacity = answer.remaining + rate * answer.reset;
        }
        let Some(mark) = mark.filter(|_| sent_at >= self.rolled_at) else { return };
        // What was refused is not charged, which is the same as a level that was lower by as much before.
        let error = self.exact(answer) - (mark.remaining + self.corrected - mark.corrected);
        if error < -NOISE[0] {
            self.correct(error);
            self.higher = 0;
        } else if error > (self.capacity / FAR).max(1.0) && mark.charged >= self.charged {
            // It is far off, and nothing was sent after it.
            self.correct(error);
            self.higher = 0;
        } else if error > NOISE[1] {
            self.least_higher = if self.higher == 0 { error } else { self.least_higher.min(error) };
            self.higher += 1;
            if self.higher >= CONSISTENT {
                self.correct(self.least_higher);
                self.higher = 0;
            }
        } else {
            self.higher = 0;
        }
    }

    /// When so much in all may have passed from now on.
    pub fn available_at(&self, charge: f64, now: Instant) -> Instant {
        let lacking = charge * self.factor - self.level_at(now).max(0.0);
        if lacking <= 0.0 {
            return now;
        }
        match self.shape {
            Shape::Bucket { rate } => now + seconds(lacking / rate),
            Shape::Window { .. } => self.next_window(now),
        }
    }

    /// How long it takes for so much to come back; nothing where it comes back all at once.
    pub fn time_for(&self, charge: f64) -> Duration {
        match self.shape {
            Shape::Bucket { rate } => seconds(charge * self.factor / rate),
            Shape::Window { .. } => Duration::ZERO,
        }
    }

    /// Whether the rate was seen and not only guessed.
    pub fn is_certain(&self) -> bool {
        self.measured.is_some() || self.slope().is_some_and(|slope| slope.lacking >= CERTAIN)
    }

    /// How it stands, for operators.
    pub fn view(&self, now: Instant) -> ToldView {
        let window = match self.shape {
            Shape::Bucket { .. } => None,
            Shape::Window { .. } => Some(self.next_window(now).saturating_duration_since(now)),
        };
        let per_second = match self.shape {
            Shape::Bucket { rate } => self.is_certain().then_some(rate),
            Shape::Window { .. } if self.period.is_zero() => None,
            Shape::Window { .. } => Some(self.limit / self.period.as_secs_f64()),
        };
        ToldView {
            limit: self.limit,
            capacity: self.capacity,
            remaining: self.level_at(now).clamp(0.0, self.capacity),
            per_second,
            window_ends_in: window,
        }
    }

    /// What the gateway charges for it, as far as it can be had at once.
    fn charge_of(&self, charge: f64) -> f64 {
        (charge * self.factor).min(self.capacity.max(1.0))
    }

    /// When the next window begins.
    fn next_window(&self, now: Instant) -> Instant {
        match self.shape {
            Shape::Window { ends_at } if ends_at > now => ends_at,
            // Of the one that has begun nothing was told yet.
            Shape::Window { ends_at } => (ends_at + self.period).max(now + WINDOW_MARGIN),
            Shape::Bucket { .. } => now,
        }
    }

    fn level_at(&self, now: Instant) -> f64 {
        match self.shape {
            Shape::Bucket { rate } => {
                let refill = now.saturating_duration_since(self.at).as_secs_f64() * rate;
                (self.level + refill).min(self.most().max(self.level))
            }
            Shape::Window { ends_at } if ends_at <= now && ends_at > self.at => self.limit,
            Shape::Window { .. } => self.level,
        }
    }

    /// What is left untouched of a quota, for what weir does not see: a part of what it holds beyond the charge, up to one charge.
    fn reserve(&self, charge: f64) -> f64 {
        (RESERVE * (self.capacity - charge)).clamp(LEAST_RESERVE * charge, charge)
    }

    /// The highest level: what it holds, or what the least request wants.
    fn most(&self) -> f64 {
        if self.guesses { self.capacity * (1.0 + LEAST_RESERVE) } else { self.capacity.max(1.0 + self.reserve(1.0)) }
    }

    fn advance(&mut self, from: Instant, now: Instant) {
        self.at = from.min(now);
        if matches!(self.shape, Shape::Window { ends_at } if ends_at <= now && ends_at > self.at) {
            self.rolled_at = now;
        }
        self.level = self.level_at(now);
        self.at = now;
    }

    /// What remains is told in whole numbers; the time until it is full tells the fraction.
    fn exact(&self, answer: Answer) -> f64 {
        match self.shape {
            Shape::Bucket { rate } if !self.guesses => {
                (self.capacity - rate * answer.reset).clamp(answer.remaining, answer.remaining + 0.95)
            }
            Shape::Bucket { .. } | Shape::Window { .. } => answer.remaining,
        }
    }

    /// Measures the rate over a time in which the quota was never full.
    fn measure(&mut self, answer: Answer) {
        let Some(charged) = answer.charged.filter(|_| !self.guesses) else { return };
        let Some((base, before)) = self.base.and_then(|base| Some((base, base.charged?))) else {
            self.base = Some(answer);
            return;
        };
        if answer.remaining + 1.0 >= self.capacity {
            self.base = Some(answer);
            return;
        }
        let (charged, time) = (charged - before, answer.sent_at.saturating_duration_since(base.sent_at).as_secs_f64());
        if charged < MEASURED[0] || time <= 0.0 {
            return;
        }
        let measured = (answer.remaining - base.remaining + charged) / time;
        self.measured = Some(measured).filter(|rate| *rate > 0.0);
        if charged >= MEASURED[1] {
            self.base = Some(answer);
        }
    }

    fn correct(&mut self, by: f64) {
        let level = (self.level + by).max(-self.capacity);
        self.corrected += level - self.level;
        self.level = level;
    }

    fn note_limit(&mut self, limit: f64) {
        if (limit - self.limit).abs() > f64::EPSILON {
            // What was seen of the old one says nothing about the new.
            self.limit = limit;
            self.answers.clear();
            (self.base, self.measured) = (None, None);
        }
    }

    fn remember(&mut self, answer: Answer) {
        if self.guesses {
            self.learn_factor(answer);
        }
        self.answers.retain(|old| old.sent_at + OLD > answer.sent_at);
        if self.answers.len() >= ANSWERS {
            // The two that are farthest apart tell the rate best.
            let keep = self.extremes();
            let at = (0..self.answers.len()).find(|at| keep.is_none_or(|(low, high)| *at != low && *at != high));
            self.answers.remove(at.unwrap_or(0));
        }
        self.answers.push_back(answer);
    }

    /// What was charged between two answers, as the gateway has it and as weir has it.
    fn learn_factor(&mut self, answer: Answer) {
        let (Some(before), Shape::Bucket { rate }) = (self.answers.back(), self.shape) else { return };
        let Some((charged, before_charged)) = answer.charged.zip(before.charged) else { return };
        let charged = charged - before_charged;
        let between = answer.sent_at.saturating_duration_since(before.sent_at).as_secs_f64();
        let may_have_been_full = rate * between > self.capacity - before.remaining + charged;
        if charged <= 0.0 || self.slope().is_none() || may_have_been_full {
            return;
        }
        let by_gateway = before.remaining - answer.remaining + rate * between;
        let seen = (by_gateway / charged).clamp(CHARGE[0], CHARGE[1]);
        self.factor += (seen - self.factor) / CHARGE_WEIGHT;
    }

    fn shape_of_answers(&self) -> Shape {
        let Some(latest) = self.answers.iter().max_by_key(|answer| answer.sent_at) else { return self.shape };
        // The one whose request was on its way for the shortest time says when: what is sent then does not come too early.
        let end = |answer: &Answer| answer.sent_at + seconds(answer.reset);
        let of_this_window = self.answers.iter().map(end).filter(|end_at| *end_at <= end(latest) + SAME_WINDOW);
        let ends_at = of_this_window.max().unwrap_or_else(|| end(latest)) + WINDOW_MARGIN;
        if let Some((low, high)) = self.extremes() {
            let (less, more) = (self.answers[low], self.answers[high]);
            if less.remaining < more.remaining && less.reset + ROUNDING < more.reset {
                return Shape::Window { ends_at };
            }
        }
        let most = self.most_by_any_answer();
        let rate = match (self.measured, self.slope()) {
            (_, Some(slope)) if slope.lacking >= CERTAIN => slope.rate,
            (Some(measured), _) => measured,
            (None, Some(slope)) => slope.rate.min(most),
            (None, None) => most,
        };
        Shape::Bucket { rate }
    }

    /// No answer allows a higher rate: what it lacks, up to a whole number, is back in the time that it tells.
    fn most_by_any_answer(&self) -> f64 {
        let rate = |answer: &Answer| (self.capacity - answer.remaining).max(1.0) / answer.reset.max(0.001);
        self.answers.iter().filter(|answer| answer.reset > 0.0).map(rate).fold(f64::INFINITY, f64::min).min(MOST)
    }

    /// The rate at which a bucket comes back, from the two answers that are farthest apart.
    fn slope(&self) -> Option<Slope> {
        let (low, high) = self.extremes()?;
        let (less, more) = (self.answers[low], self.answers[high]);
        let (lacking, time) = (more.remaining - less.remaining, less.reset - more.reset);
        (lacking >= 2.0 && time > 2.0 * ROUNDING).then(|| Slope { rate: lacking / time, lacking })
    }

    /// Where the answers stand that told of least and of most.
    fn extremes(&self) -> Option<(usize, usize)> {
        let by_remaining = |a: &usize, b: &usize| self.answers[*a].remaining.total_cmp(&self.answers[*b].remaining);
        let low = (0..self.answers.len()).min_by(by_remaining)?;
        let high = (0..self.answers.len()).max_by(by_remaining)?;
        Some((low, high))
    }
}

/// A rate as two answers tell it, and by how much they differ.
struct Slope {
    rate: f64,
    lacking: f64,
}

impl Answer {
    /// `None` where the numbers mean nothing: some gateways send -1 or 0 for what they do not limit.
    fn of(quota: Quota, sent_at: Instant, charged: Option<f64>) -> Option<Self> {
        let sound = quota.limit > 0;
        // Nobody has more than some times what it is limited to.
        let remaining = quota.remaining.min(quota.limit.saturating_mul(MOST_BURST)) as f64;
        let reset = quota.reset.as_secs_f64();
        sound.then_some(Self { sent_at, remaining, reset, charged })
    }
}

fn seconds(seconds: f64) -> Duration {
    const DAY: f64 = 86_400.0;
    Duration::from_secs_f64(seconds.clamp(0.0, DAY))
}

#[cfg(test)]
mod tests;
