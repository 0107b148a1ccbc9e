//! Learning rate over the steps of a run, as transformers' `get_*_schedule` functions have it.
//!
//! The multiplier of optimizer step `s` (counted from 1) is that of transformers' scheduler after
//! `s - 1` calls: warm-up rises linearly from 0, then the rate stays, falls in a line, or falls along
//! half a cosine, down to `min_lr_ratio` of the peak. A constant rate with a warm-up is `constant_with_warmup` there.

use serde::{Deserialize, Serialize};

use crate::Settings;

/// What happens after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// The rate stays.
    Constant,
    /// The rate falls in a line.
    Linear,
    /// The rate falls along half a cosine.
    Cosine,
}

/// A schedule over a whole run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    kind: SchedulerType,
    peak: f64,
    min_ratio: f64,
    n_warmup_steps: u64,
    n_steps: u64,
}

impl Schedule {
    /// A schedule over `n_steps` steps. `warmup` is a number of steps, or a share of them if below 1
    /// (rounded up).
    pub fn new(kind: SchedulerType, peak: f64, min_ratio: f64, warmup: f64, n_steps: u64) -> Self {
        let n_warmup_steps =
            if warmup < 1.0 { (n_steps as f64 * warmup).ceil() } else { warmup.round() } as u64;
        Self { kind, peak, min_ratio, n_warmup_steps, n_steps }
    }

    /// The schedule of a run of `n_steps` steps.
    pub fn of(settings: &Settings, n_steps: u64) -> Self {
        Self::new(
            settings.lr_scheduler_type,
            settings.learning_rate,
            settings.min_lr_ratio,
            settings.warmup_steps,
            n_steps,
        )
    }

    /// The learning rate of step `step`, counted from 1.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let done = step.saturating_sub(1);
        if done < self.n_warmup_steps {
            return self.peak * (done as f64 / self.n_warmup_steps as f64);
        }
        let span = self.n_steps.saturating_sub(self.n_warmup_steps).max(1) as f64;
        let progress = ((done - self.n_warmup_steps) as f64 / span).min(1.0);
        let share = match self.kind {
            SchedulerType::Constant => return self.peak,
            SchedulerType::Linear => 1.0 - progress,
            SchedulerType::Cosine => 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress)),
        };
        self.peak * (share * (1.0 - self.min_ratio) + self.min_ratio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(s: Schedule, steps: &[u64]) -> Vec<f64> {
        steps.iter().map(|&i| (s.learning_rate(i) * 1e6).round() / 1e6).collect()
    }

    #[test]
    fn linear_rises_from_zero_and_falls_towards_zero() {
        // transformers: get_linear_schedule_with_warmup(opt, 2, 6) at lr 1.
        let s = Schedule::new(SchedulerType::Linear, 1.0, 0.0, 2.0, 6);
        assert_eq!(rates(s, &[1, 2, 3, 4, 5, 6]), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
    }

    #[test]
    fn cosine_falls_to_the_floor() {
        let s = Schedule::new(SchedulerType::Cosine, 1.0, 0.1, 0.0, 4);
        // 0.5 (1 + cos(pi/4)) = 0.853553; times 0.9 plus 0.1.
        assert_eq!(rates(s, &[1, 2, 3, 5]), [1.0, 0.868198, 0.55, 0.1]);
    }

    #[test]
    fn constant_keeps_the_peak_after_the_warm_up() {
        let s = Schedule::new(SchedulerType::Constant, 2.0, 0.0, 4.0, 10);
        assert_eq!(rates(s, &[1, 3, 5, 10]), [0.0, 1.0, 2.0, 2.0]);
    }

    #[test]
    fn a_warm_up_below_one_is_a_share_rounded_up() {
        let s = Schedule::new(SchedulerType::Constant, 1.0, 0.0, 0.15, 10);
        assert_eq!(s.n_warmup_steps, 2);
    }
}
