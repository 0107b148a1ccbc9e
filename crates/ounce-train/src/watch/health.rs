//! Warnings when a number of the run leaves its healthy range, each at most once per run.
//!
//! The judgements are pure functions of numbers; [`Health`] keeps the few that they need (the last
//! 64 gradient norms, the means of the last blocks of losses) and what was already said. Ranges are
//! rules of thumb, wide enough to stay silent in a run that goes well:
//!
//! * A fresh model knows nothing, so its first loss is near `ln V`. One that is trained starts below.
//! * A gradient norm stays within 0.01..100, and within 10 times its running median.
//! * The mean loss over blocks of 32 steps does not rise four blocks in a row by 2 % in all.
//! * A learning rate of zero trains nothing; only the first step of a warm-up has it.

use std::fmt;

/// Gradient norms that the running median is taken over.
const N_NORMS: usize = 64;
/// Norms that must be there before the median is trusted.
const MIN_NORMS: usize = 16;
const NORM_RANGE: std::ops::RangeInclusive<f64> = 0.01..=100.0;
const NORM_JUMP: f64 = 10.0;
/// Steps whose losses are averaged before they are compared.
const BLOCK_STEPS: u64 = 32;
/// Rises in a row that are a trend.
const N_RISES: usize = 4;
const MIN_RISE: f64 = 0.02;
/// Nats that the first loss of a fresh model may be off.
const FIRST_LOSS_SLACK: f64 = 1.0;

/// What a step reports.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepNumbers {
    /// The step, counted from 1.
    pub step: u64,
    /// Mean loss over its supervised tokens, in nats.
    pub loss: f64,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of its update.
    pub learning_rate: f64,
}

/// One number out of its healthy range. Its text ends with a `hint:` line.
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "fields are named as in the messages")]
pub enum Warning {
    /// The first loss of a fresh model is far from that of a uniform guess.
    FirstLoss { step: u64, loss: f64, n_vocab: u64 },
    /// The first loss of a trained model is above that of a uniform guess.
    WorseThanGuessing { step: u64, loss: f64, n_vocab: u64 },
    /// A tiny gradient.
    NormVanishes { step: u64, grad_norm: f64 },
    /// A huge gradient.
    NormExplodes { step: u64, grad_norm: f64 },
    /// A gradient far above the usual one of this run.
    NormJumps { step: u64, grad_norm: f64, median: f64 },
    /// The loss goes up.
    LossRises { step: u64, from: f64, to: f64 },
    /// No step is taken.
    LearningRateZero { step: u64 },
}

impl Warning {
    /// One bit per kind.
    const fn bit(&self) -> u8 {
        match self {
            Self::FirstLoss { .. } => 1,
            Self::WorseThanGuessing { .. } => 2,
            Self::NormVanishes { .. } => 4,
            Self::NormExplodes { .. } => 8,
            Self::NormJumps { .. } => 16,
            Self::LossRises { .. } => 32,
            Self::LearningRateZero { .. } => 64,
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::FirstLoss { step, loss, n_vocab } => write!(
                f,
                "step {step}: the loss is {loss:.2}, a fresh model of {n_vocab} tokens starts near \
                 ln {n_vocab} = {:.2}\nhint: check that the weights were initialised and that the \
                 tokenizer belongs to the model",
                (n_vocab as f64).ln()
            ),
            Self::WorseThanGuessing { step, loss, n_vocab } => write!(
                f,
                "step {step}: the loss is {loss:.2}, a uniform guess over {n_vocab} tokens has \
                 {:.2}\nhint: check that the weights were loaded and that the tokenizer belongs to \
                 the model",
                (n_vocab as f64).ln()
            ),
            Self::NormVanishes { step, grad_norm } => write!(
                f,
                "step {step}: the gradient norm is {grad_norm:.2e}, below {}\nhint: check that the \
                 data has supervised tokens and that the parameters meant to be trained are trained",
                NORM_RANGE.start()
            ),
            Self::NormExplodes { step, grad_norm } => write!(
                f,
                "step {step}: the gradient norm is {grad_norm:.1}, above {}\nhint: try a lower \
                 --learning-rate, a longer --warmup-steps or --max-grad-norm 1",
                NORM_RANGE.end()
            ),
            Self::NormJumps { step, grad_norm, median } => write!(
                f,
                "step {step}: the gradient norm is {grad_norm:.3}, {:.0} times the median \
                 {median:.3} of the steps before\nhint: look at the data of this step; \
                 --max-grad-norm 1 bounds what one batch can do",
                grad_norm / median
            ),
            Self::LossRises { step, from, to } => write!(
                f,
                "step {step}: the mean loss of {BLOCK_STEPS} steps rose {N_RISES} times in a row, \
                 from {from:.3} to {to:.3}\nhint: try a lower --learning-rate or a longer \
                 --warmup-steps"
            ),
            Self::LearningRateZero { step } => write!(
                f,
                "step {step}: the learning rate is 0, nothing is learned\nhint: check \
                 --learning-rate, --lr-scheduler-type and --min-lr-ratio"
            ),
        }
    }
}

/// Whether the first loss of a run fits a vocabulary of `n_vocab` tokens. `is_fresh`: the weights
/// are random.
pub(super) fn judge_first_loss(
    step: u64,
    loss: f64,
    n_vocab: u64,
    is_fresh: bool,
) -> Option<Warning> {
    let above = loss - (n_vocab as f64).ln();
    match is_fresh {
        true if above.abs() > FIRST_LOSS_SLACK => Some(Warning::FirstLoss { step, loss, n_vocab }),
        false if above > FIRST_LOSS_SLACK => {
            Some(Warning::WorseThanGuessing { step, loss, n_vocab })
        }
        _ => None,
    }
}

/// Whether a gradient norm is healthy, given the median of those before (if there were enough).
/// A non-finite norm ends the run elsewhere and is not judged here.
pub(super) fn judge_grad_norm(step: u64, grad_norm: f64, median: Option<f64>) -> Option<Warning> {
    match median {
        _ if !grad_norm.is_finite() => None,
        _ if grad_norm > *NORM_RANGE.end() => Some(Warning::NormExplodes { step, grad_norm }),
        _ if grad_norm < *NORM_RANGE.start() => Some(Warning::NormVanishes { step, grad_norm }),
        Some(median) if grad_norm > NORM_JUMP * median => {
            Some(Warning::NormJumps { step, grad_norm, median })
        }
        _ => None,
    }
}

/// Whether mean losses, oldest first, only rise and by enough in all.
pub(super) fn judge_trend(step: u64, means: &[f64; N_RISES + 1]) -> Option<Warning> {
    let (from, to) = (means[0], means[N_RISES]);
    let rises = means.windows(2).all(|w| w[1] > w[0]) && to > from * (1.0 + MIN_RISE);
    rises.then_some(Warning::LossRises { step, from, to })
}

/// Whether a step is taken at all. The first step of a warm-up has a rate of zero by definition.
pub(super) fn judge_learning_rate(step: u64, learning_rate: f64) -> Option<Warning> {
    (learning_rate == 0.0 && step > 1).then_some(Warning::LearningRateZero { step })
}

/// Median of a few finite numbers, the upper one of an even count.
fn median(numbers: &[f64]) -> Option<f64> {
    let mut sorted = [0.0; N_NORMS];
    let sorted = &mut sorted[..numbers.len()];
    sorted.copy_from_slice(numbers);
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

/// Watches one run; of constant size.
#[derive(Debug, Clone)]
pub struct Health {
    n_vocab: u64,
    is_fresh: bool,
    n_steps: u64,
    said: u8,
    norms: [f64; N_NORMS],
    n_norms: usize,
    block_sum: f64,
    block_steps: u64,
    block_means: [f64; N_RISES + 1],
    n_blocks: usize,
}

impl Health {
    /// For a model with `n_vocab` tokens; `is_fresh` if its weights are random. A resumed run is not
    /// fresh.
    pub fn new(n_vocab: u64, is_fresh: bool) -> Self {
        Self {
            n_vocab,
            is_fresh,
            n_steps: 0,
            said: 0,
            norms: [0.0; N_NORMS],
            n_norms: 0,
            block_sum: 0.0,
            block_steps: 0,
            block_means: [0.0; N_RISES + 1],
            n_blocks: 0,
        }
    }

    /// Takes the numbers of the next step and gives the warnings that were not given before.
    pub fn observe(&mut self, numbers: StepNumbers) -> impl Iterator<Item = Warning> + use<> {
        let StepNumbers { step, loss, grad_norm, learning_rate } = numbers;
        let first = if self.n_steps == 0 {
            judge_first_loss(step, loss, self.n_vocab, self.is_fresh)
        } else {
            None
        };
        let norm = judge_grad_norm(step, grad_norm, self.median_norm());
        let trend = self.add_loss(step, loss);
        let rate = judge_learning_rate(step, learning_rate);
        self.add_norm(grad_norm);
        self.n_steps += 1;
        let new = [first, norm, trend, rate].map(|w| w.filter(|w| self.said & w.bit() == 0));
        self.said |= new.iter().flatten().map(Warning::bit).sum::<u8>();
        new.into_iter().flatten()
    }

    fn median_norm(&self) -> Option<f64> {
        let n = self.n_norms.min(N_NORMS);
        if n < MIN_NORMS { None } else { median(&self.norms[..n]) }
    }

    fn add_norm(&mut self, grad_norm: f64) {
        if grad_norm.is_finite() {
            self.norms[self.n_norms % N_NORMS] = grad_norm;
            self.n_norms += 1;
        }
    }

    /// Adds a loss to the current block; at the end of a block judges the trend.
    fn add_loss(&mut self, step: u64, loss: f64) -> Option<Warning> {
        self.block_sum += loss;
        self.block_steps += 1;
        if self.block_steps < BLOCK_STEPS {
            return None;
        }
        self.block_means.rotate_left(1);
        self.block_means[N_RISES] = self.block_sum / BLOCK_STEPS as f64;
        self.n_blocks += 1;
        (self.block_sum, self.block_steps) = (0.0, 0);
        if self.n_blocks > N_RISES { judge_trend(step, &self.block_means) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: u64 = 50257;

    fn healthy(step: u64) -> StepNumbers {
        let loss = 10.8 - 6.0 * (1.0 - (-(step as f64) / 300.0).exp());
        let wobble = 1.0 + 0.3 * (step as f64 * 1.7).sin();
        StepNumbers { step, loss: loss + 0.05 * wobble, grad_norm: wobble, learning_rate: 3e-4 }
    }

    fn warnings(steps: impl Iterator<Item = StepNumbers>) -> Vec<Warning> {
        let mut health = Health::new(V, true);
        steps.flat_map(|s| health.observe(s).collect::<Vec<_>>()).collect()
    }

    #[test]
    fn a_run_that_goes_well_is_silent() {
        assert_eq!(warnings((1..2000).map(healthy)), []);
    }

    #[test]
    fn a_fresh_model_starts_near_the_uniform_guess() {
        assert_eq!(judge_first_loss(1, 10.9, V, true), None);
        assert!(judge_first_loss(1, 12.0, V, true).is_some());
        assert!(judge_first_loss(1, 9.0, V, true).is_some());
    }

    #[test]
    fn a_trained_model_may_start_low_but_not_high() {
        assert_eq!(judge_first_loss(1, 3.0, V, false), None);
        assert_eq!(
            judge_first_loss(1, 14.0, V, false).unwrap().to_string(),
            "step 1: the loss is 14.00, a uniform guess over 50257 tokens has 10.82\nhint: check \
             that the weights were loaded and that the tokenizer belongs to the model"
        );
    }

    #[test]
    fn only_the_first_observed_loss_is_compared_with_a_guess() {
        let mut health = Health::new(V, true);
        assert_eq!(health.observe(healthy(1)).count(), 0);
        assert_eq!(health.observe(StepNumbers { loss: 3.0, ..healthy(2) }).count(), 0);
    }

    #[test]
    fn norms_are_judged_by_range_and_by_median() {
        assert_eq!(judge_grad_norm(5, 1.0, None), None);
        assert_eq!(judge_grad_norm(5, 9.0, None), None);
        assert!(matches!(judge_grad_norm(5, 9.0, Some(0.5)), Some(Warning::NormJumps { .. })));
        assert!(matches!(judge_grad_norm(5, 101.0, None), Some(Warning::NormExplodes { .. })));
        assert!(matches!(judge_grad_norm(5, 0.0, None), Some(Warning::NormVanishes { .. })));
        assert_eq!(judge_grad_norm(5, f64::NAN, Some(1.0)), None);
    }

    #[test]
    fn the_median_is_of_the_last_norms_only() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        let steps = (1..=300).map(|i| StepNumbers {
            // The norm falls slowly by a factor of 300: no step is far from those just before.
            grad_norm: if i == 300 { 2.0 } else { 30.0 * 0.98_f64.powi(i) },
            ..healthy(i as u64)
        });
        let found = warnings(steps);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(matches!(found[0], Warning::NormJumps { step: 300, .. }));
    }

    #[test]
    fn each_warning_is_given_once() {
        let steps = (1..500).map(|i| StepNumbers { grad_norm: 200.0, ..healthy(i) });
        let found = warnings(steps);
        assert_eq!(found, [Warning::NormExplodes { step: 1, grad_norm: 200.0 }]);
        assert_eq!(
            found[0].to_string(),
            "step 1: the gradient norm is 200.0, above 100\nhint: try a lower --learning-rate, a \
             longer --warmup-steps or --max-grad-norm 1"
        );
    }

    #[test]
    fn a_loss_that_rises_for_long_is_noticed() {
        let steps = (1..=160).map(|i| StepNumbers { loss: 10.5 + 0.01 * i as f64, ..healthy(i) });
        let found = warnings(steps);
        assert_eq!(found.len(), 1, "{found:?}");
        let Warning::LossRises { step: 160, from, to } = found[0] else { panic!("{found:?}") };
        assert!((from - 10.665).abs() < 1e-9 && (to - 11.945).abs() < 1e-9, "{from} {to}");
    }

    #[test]
    fn a_plateau_with_noise_is_no_rise() {
        assert_eq!(judge_trend(9, &[3.0, 3.001, 3.002, 3.003, 3.004]), None);
        assert_eq!(judge_trend(9, &[3.0, 3.1, 3.05, 3.2, 3.3]), None);
        assert!(judge_trend(9, &[3.0, 3.02, 3.04, 3.06, 3.08]).is_some());
    }

    #[test]
    fn a_rate_of_zero_is_normal_only_in_the_first_step() {
        assert_eq!(judge_learning_rate(1, 0.0), None);
        assert_eq!(
            judge_learning_rate(2, 0.0).unwrap().to_string(),
            "step 2: the learning rate is 0, nothing is learned\nhint: check --learning-rate, \
             --lr-scheduler-type and --min-lr-ratio"
        );
        assert_eq!(judge_learning_rate(2, 1e-9), None);
    }

    #[test]
    fn every_message_ends_with_a_hint() {
        let (step, loss, grad_norm, n_vocab) = (7, 3.0, 1.0, 97);
        for w in [
            Warning::FirstLoss { step, loss, n_vocab },
            Warning::WorseThanGuessing { step, loss, n_vocab },
            Warning::NormVanishes { step, grad_norm },
            Warning::NormExplodes { step, grad_norm },
            Warning::NormJumps { step, grad_norm, median: 0.05 },
            Warning::LossRises { step, from: 3.0, to: 3.3 },
            Warning::LearningRateZero { step },
        ] {
            let text = w.to_string();
            let (what, hint) = text.split_once("\nhint: ").expect("a hint");
            assert!(what.starts_with("step 7: ") && !hint.is_empty() && !text.ends_with('.'));
        }
    }
}
