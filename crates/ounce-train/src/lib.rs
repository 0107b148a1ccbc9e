//! The training session: the whole flow on one screen, schedules, evaluation, sampling.
