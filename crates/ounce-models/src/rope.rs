//! Rotary frequencies and their scaling variants.
//!
//! Element pair `i` of a head of `D` elements turns by `position * inv_freq[i]`, where
//! `inv_freq[i] = theta^(-2i/D)`. The variants stretch the context by changing these frequencies and
//! by an attention factor that multiplies cos and sin:
//!
//! | variant | frequencies | attention factor |
//! |---|---|---|
//! | `default` | as above | 1 |
//! | `linear` | divided by `factor` | 1 |
//! | `dynamic` | of a theta that grows with rows longer than `max_position_embeddings` | 1 |
//! | `yarn` | slow pairs divided by `factor`, fast ones kept, a linear ramp between | `0.1 ln(factor) + 1` |
//! | `llama3` | long wavelengths divided by `factor`, short ones kept, a blend between | 1 |
//! | `longrope` | divided pair by pair, by short or long factors | `sqrt(1 + ln(factor) / ln(original))` |
//!
//! `dynamic` and `longrope` depend on the length of the row. A graph has one table, for the longest
//! row it is built for: up to `max_position_embeddings` (`dynamic`) and up to the original context
//! (`longrope`: short factors) this is exact for every row, and beyond it is what `transformers` does
//! for a batch with a row of that length.
//!
//! Precision: exponents are rounded to f32, powers are taken in f64 and rounded to f32, then f32, as
//! `transformers` does. Sources: `[Su21]`; `[Peng23]` (`yarn`); `[Ding24]` (`longrope`);
//! Meta's Llama 3.1 reference (`llama3`).

use std::f64::consts::PI;

use serde_json::{Map, Value, json};

use crate::config::ModelError;
use crate::json::Reader;

/// Rotary positions of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the wavelengths.
    pub theta: f64,
    /// How the context is stretched.
    pub scaling: RopeScaling,
    /// The part of each head that is turned, from its start; above 0, at most 1.
    pub partial_rotary_factor: f64,
}

/// How the context is stretched. Lengths are in tokens.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    missing_docs,
    reason = "fields have the names of the keys in config.json; see the table above"
)]
pub enum RopeScaling {
    Default,
    Linear {
        factor: f64,
    },
    Dynamic {
        factor: f64,
    },
    Yarn {
        factor: f64,
        original_max_position_embeddings: u64,
        attention_factor: Option<f64>,
        beta_fast: f64,
        beta_slow: f64,
        mscale: Option<f64>,
        mscale_all_dim: Option<f64>,
        truncate: bool,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: u64,
    },
    LongRope {
        short_factor: Vec<f64>,
        long_factor: Vec<f64>,
        factor: Option<f64>,
        attention_factor: Option<f64>,
        original_max_position_embeddings: u64,
    },
}

impl RopeConfig {
    /// Plain RoPE.
    pub const fn plain(theta: f64) -> Self {
        Self { theta, scaling: RopeScaling::Default, partial_rotary_factor: 1.0 }
    }

    /// Elements of a head that are turned.
    pub fn rotary_dim(&self, head_dim: u64) -> u64 {
        (head_dim as f64 * self.partial_rotary_factor) as u64
    }

    /// Reads either spelling: `rope_parameters` (transformers 5), or `rope_theta` and
    /// `rope_scaling` with `rope_type` or `type`.
    pub(crate) fn read(
        r: &mut Reader<'_>,
        head_dim: u64,
        max_positions: u64,
        default_theta: f64,
    ) -> Result<Self, ModelError> {
        let theta = r.f64("rope_theta", default_theta)?;
        let partial = read_partial(r, 1.0)?;
        let original = r.optional_u64("original_max_position_embeddings")?;
        let (old, new) = (r.object("rope_scaling")?, r.object("rope_parameters")?);
        let (key, map) = match (old, new) {
            (Some(map), _) => ("rope_scaling.", map),
            (None, Some(map)) => ("rope_parameters.", map),
            (None, None) => {
                return Ok(Self { partial_rotary_factor: partial, ..Self::plain(theta) });
            }
        };
        let sizes = Sizes { head_dim, max_positions, original };
        Self::read_object(key, map, &sizes, theta, partial)
    }

    /// Reads one object of rotary keys alone.
    pub(crate) fn read_parameters(
        map: &Map<String, Value>,
        head_dim: u64,
        max_positions: u64,
        theta: f64,
    ) -> Result<Self, ModelError> {
        let sizes = Sizes { head_dim, max_positions, original: None };
        Self::read_object("rope_parameters.", map, &sizes, theta, 1.0)
    }

    fn read_object(
        key: &str,
        map: &Map<String, Value>,
        sizes: &Sizes,
        theta: f64,
        partial: f64,
    ) -> Result<Self, ModelError> {
        let max_positions = sizes.max_positions;
        let mut r = Reader::new(map, "rotary", key);
        let theta = r.f64("rope_theta", theta)?;
        let partial_rotary_factor = read_partial(&mut r, partial)?;
        let rotary_dim = (sizes.head_dim as f64 * partial_rotary_factor) as u64;
        let (new_type, old_type) = (r.optional_str("rope_type")?, r.optional_str("type")?);
        let inner = r.optional_u64("original_max_position_embeddings")?;
        let original = sizes.original.or(inner).unwrap_or(max_positions);
        let scaling = match new_type.or(old_type).unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: required(&mut r, "factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: required(&mut r, "factor")? },
            "yarn" => read_yarn(&mut r, original, max_positions)?,
            "llama3" => RopeScaling::Llama3 {
                factor: required(&mut r, "factor")?,
                low_freq_factor: required(&mut r, "low_freq_factor")?,
                high_freq_factor: required(&mut r, "high_freq_factor")?,
                original_max_position_embeddings: original,
            },
            // `su` is what the first Phi-3 called it.
            "longrope" | "su" => read_longrope(&mut r, original, rotary_dim)?,
            other => {
                let hint = "supported are default, linear, dynamic, yarn, llama3 and longrope";
                return Err(r.unsupported("rope_type", other, hint));
            }
        };
        r.finish(&[])?;
        Ok(Self { theta, scaling, partial_rotary_factor })
    }

    /// The keys `rope_theta` and `rope_scaling`, which transformers 4 and 5 both read.
    pub(crate) fn write(&self, map: &mut Map<String, Value>) {
        let scaling = match &self.scaling {
            RopeScaling::Default => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Dynamic { factor } => json!({"rope_type": "dynamic", "factor": factor}),
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                mscale,
                mscale_all_dim,
                truncate,
            } => json!({
                "rope_type": "yarn", "factor": factor,
                "original_max_position_embeddings": original_max_position_embeddings,
                "attention_factor": attention_factor, "beta_fast": beta_fast, "beta_slow": beta_slow,
                "mscale": mscale, "mscale_all_dim": mscale_all_dim, "truncate": truncate,
            }),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                factor,
                attention_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "longrope", "short_factor": short_factor, "long_factor": long_factor,
                "factor": factor, "attention_factor": attention_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
        };
        map.insert("rope_theta".to_owned(), json!(self.theta));
        map.insert("rope_scaling".to_owned(), without_nulls(scaling));
    }

    /// `inv_freq` (one per pair of a head of `head_dim` elements, radians per position) and the
    /// attention factor, for a graph whose longest row has `max_length` tokens.
    pub fn frequencies(
        &self,
        head_dim: u64,
        max_positions: u64,
        max_length: u64,
    ) -> (Vec<f32>, f32) {
        let d = self.rotary_dim(head_dim);
        match &self.scaling {
            RopeScaling::Default => (inverse(&powers(self.theta, d)), 1.0),
            RopeScaling::Linear { factor } => {
                let f = *factor as f32;
                (inverse(&powers(self.theta, d)).iter().map(|x| x / f).collect(), 1.0)
            }
            RopeScaling::Dynamic { factor } => {
                let stretch = factor * max_length.max(max_positions) as f64 / max_positions as f64;
                let exponent = d as f64 / (d as f64 - 2.0);
                // Within max_positions the base is multiplied by one to a power.
                let grown = stretch - (factor - 1.0);
                let base =
                    if grown == 1.0 { self.theta } else { self.theta * libm::pow(grown, exponent) };
                (inverse(&powers(base, d)), 1.0)
            }
            RopeScaling::Yarn { .. } => self.yarn(d),
            RopeScaling::Llama3 { .. } => self.llama3(d),
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                factor,
                attention_factor,
                original_max_position_embeddings,
            } => {
                let original = *original_max_position_embeddings;
                let factors = if max_length > original { long_factor } else { short_factor };
                let powers = powers(self.theta, d);
                let inv = powers.iter().zip(factors).map(|(p, f)| 1.0 / (*f as f32 * p));
                let factor = factor.unwrap_or(max_positions as f64 / original as f64);
                let computed = if factor <= 1.0 {
                    1.0
                } else {
                    (1.0 + libm::log(factor) / libm::log(original as f64)).sqrt()
                };
                (inv.collect(), attention_factor.unwrap_or(computed) as f32)
            }
        }
    }

    /// Pairs that turn more than `beta_fast` times within the original context are kept, those that
    /// turn less than `beta_slow` times are interpolated, with a linear ramp between.
    fn yarn(&self, d: u64) -> (Vec<f32>, f32) {
        let RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            truncate,
        } = self.scaling
        else {
            unreachable!("called for the yarn variant only")
        };
        let pair_of = |turns: f64| {
            let context = original_max_position_embeddings as f64;
            d as f64 * libm::log(context / (turns * 2.0 * PI)) / (2.0 * libm::log(self.theta))
        };
        let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(d as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let inv = powers(self.theta, d).into_iter().enumerate().map(|(i, p)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            (1.0 / (factor as f32 * p)) * (1.0 - keep) + (1.0 / p) * keep
        });
        let scale_of = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * libm::log(factor) + 1.0 };
        let computed = match (mscale, mscale_all_dim) {
            (Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale_of(m) / scale_of(all),
            _ => scale_of(1.0),
        };
        (inv.collect(), attention_factor.unwrap_or(computed) as f32)
    }

    fn llama3(&self, d: u64) -> (Vec<f32>, f32) {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } = self.scaling
        else {
            unreachable!("called for the llama3 variant only")
        };
        let context = original_max_position_embeddings as f32;
        let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
        let factor = factor as f32;
        let scaled = inverse(&powers(self.theta, d)).into_iter().map(|inv| {
            let wavelength = 2.0 * PI as f32 / inv;
            if wavelength < context / high {
                inv
            } else if wavelength > context / low {
                inv / factor
            } else {
                let smooth = (context / wavelength - low) / (high - low);
                (1.0 - smooth) * inv / factor + smooth * inv
            }
        });
        (scaled.collect(), 1.0)
    }
}

/// What rotary keys may depend on.
struct Sizes {
    head_dim: u64,
    max_positions: u64,
    /// `original_max_position_embeddings` outside of the rotary keys.
    original: Option<u64>,
}

fn read_partial(r: &mut Reader<'_>, default: f64) -> Result<f64, ModelError> {
    let factor = r.f64("partial_rotary_factor", default)?;
    if factor > 0.0 && factor <= 1.0 {
        return Ok(factor);
    }
    let hint = "give a number above 0 and at most 1";
    Err(r.unsupported("partial_rotary_factor", &factor.to_string(), hint))
}

fn read_yarn(
    r: &mut Reader<'_>,
    original: u64,
    max_positions: u64,
) -> Result<RopeScaling, ModelError> {
    let default_factor = max_positions as f64 / original as f64;
    let nonzero = |x: Option<f64>, default: f64| x.filter(|b| *b != 0.0).unwrap_or(default);
    Ok(RopeScaling::Yarn {
        factor: positive(r, "factor")?.unwrap_or(default_factor),
        original_max_position_embeddings: original,
        attention_factor: r.optional_f64("attention_factor")?,
        beta_fast: nonzero(r.optional_f64("beta_fast")?, 32.0),
        beta_slow: nonzero(r.optional_f64("beta_slow")?, 1.0),
        mscale: r.optional_f64("mscale")?,
        mscale_all_dim: r.optional_f64("mscale_all_dim")?,
        truncate: r.bool("truncate", true)?,
    })
}

fn read_longrope(
    r: &mut Reader<'_>,
    original: u64,
    rotary_dim: u64,
) -> Result<RopeScaling, ModelError> {
    let (short_factor, long_factor) = (r.numbers("short_factor")?, r.numbers("long_factor")?);
    for (key, list) in [("short_factor", &short_factor), ("long_factor", &long_factor)] {
        if list.len() as u64 != rotary_dim / 2 {
            let what = format!(
                "rope's {key} has {} numbers, {rotary_dim} turned elements need {}",
                list.len(),
                rotary_dim / 2
            );
            return Err(ModelError::Inconsistent { what });
        }
    }
    Ok(RopeScaling::LongRope {
        short_factor,
        long_factor,
        factor: positive(r, "factor")?,
        attention_factor: r.optional_f64("attention_factor")?,
        original_max_position_embeddings: original,
    })
}

/// A number above zero, if there.
fn positive(r: &mut Reader<'_>, key: &'static str) -> Result<Option<f64>, ModelError> {
    match r.optional_f64(key)? {
        Some(x) if x <= 0.0 => Err(r.unsupported(key, &x.to_string(), "give a number above 0")),
        x => Ok(x),
    }
}

fn required(r: &mut Reader<'_>, key: &'static str) -> Result<f64, ModelError> {
    positive(r, key)?.ok_or_else(|| r.missing(key))
}

fn without_nulls(mut value: Value) -> Value {
    if let Value::Object(map) = &mut value {
        map.retain(|_, v| !v.is_null());
    }
    value
}

/// `theta^(2i/D)` for every pair: exponents in f32, powers in f64, rounded to f32.
fn powers(theta: f64, head_dim: u64) -> Vec<f32> {
    let power = |i: u64| libm::pow(theta, f64::from(i as f32 / head_dim as f32)) as f32;
    (0..head_dim).step_by(2).map(power).collect()
}

fn inverse(powers: &[f32]) -> Vec<f32> {
    powers.iter().map(|p| 1.0 / p).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the rope keys of a config and computes the frequencies.
    fn frequencies(text: &str, d: u64, max_positions: u64, max_length: u64) -> (Vec<f32>, f32) {
        let value: Value = serde_json::from_str(text).unwrap();
        let map = value.as_object().unwrap();
        let config =
            RopeConfig::read(&mut Reader::new(map, "llama", ""), d, max_positions, 10000.0)
                .unwrap();
        let mut written = Map::new();
        config.write(&mut written);
        let again =
            RopeConfig::read(&mut Reader::new(&written, "llama", ""), d, max_positions, 10000.0)
                .unwrap();
        assert_eq!(again, config, "what is written reads back");
        config.frequencies(d, max_positions, max_length)
    }

    fn assert_close(got: &(Vec<f32>, f32), want: &[f64], factor: f64) {
        assert_eq!(got.0.len(), want.len());
        for (&g, w) in got.0.iter().zip(want) {
            assert!((f64::from(g) / w - 1.0).abs() < 4e-7, "{:?} is not {want:?}", got.0);
        }
        assert!((f64::from(got.1) / factor - 1.0).abs() < 1e-7, "{} is not {factor}", got.1);
    }

    // The numbers below were printed by transformers 5.23.0 (`modeling_rope_utils`, f32, CPU).

    #[test]
    fn default_frequencies_are_those_of_transformers() {
        let want = [1.0, 0.1, 0.01, 0.001];
        assert_close(&frequencies("{}", 8, 64, 64), &want, 1.0);
        let new = r#"{"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}"#;
        assert_close(&frequencies(new, 8, 64, 64), &want, 1.0);
    }

    #[test]
    fn linear_frequencies_are_those_of_transformers() {
        let text = r#"{"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2.5}}"#;
        assert_close(&frequencies(text, 8, 64, 64), &[0.4, 0.04, 0.004, 0.0004], 1.0);
    }

    #[test]
    fn dynamic_frequencies_grow_only_beyond_the_context() {
        let text = r#"{"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}"#;
        let within = frequencies(text, 8, 32, 20);
        assert_eq!(within, frequencies("{}", 8, 32, 20));
        let beyond = [1.0, 0.0820176527, 0.00672689499, 0.000551724166];
        assert_close(&frequencies(text, 8, 32, 45), &beyond, 1.0);
    }

    #[test]
    fn yarn_frequencies_are_those_of_transformers() {
        let text = r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 16}}"#;
        let want = [
            1.0,
            0.079056941,
            0.0250000004,
            0.00790569466,
            0.00249999994,
            0.000790569466,
            0.000250000012,
            7.90569466e-05,
        ];
        assert_close(&frequencies(text, 16, 64, 37), &want, 1.13862944);
    }

    #[test]
    fn yarn_takes_its_optional_keys() {
        let text = r#"{"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 8.0,
            "original_max_position_embeddings": 32, "beta_fast": 16.0, "beta_slow": 2.0,
            "mscale": 1.0, "mscale_all_dim": 0.8, "truncate": false}}"#;
        let want = [1.0, 0.00124999986, 1.2499996e-05];
        assert_close(&frequencies(text, 6, 256, 39), &want, 1.03565708);
        let text = r#"{"rope_scaling": {"type": "yarn", "factor": 40.0, "attention_factor": 1.25,
            "original_max_position_embeddings": 4096}}"#;
        let got = frequencies(text, 64, 163840, 64);
        let (ramp, scale) = (&got.0[10..15], got.1);
        let want = [0.0562341288, 0.0390069261, 0.0268793609, 0.0183781441, 0.012447956];
        assert_close(&(ramp.to_vec(), scale), &want, 1.25);
    }

    #[test]
    fn llama3_frequencies_are_those_of_transformers() {
        let text = r#"{"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}}"#;
        let want =
            [1.0, 0.0187231898, 0.00157490105, 0.000176776681, 1.98425078e-05, 2.22724748e-06];
        assert_close(&frequencies(text, 12, 512, 52), &want, 1.0);
    }

    #[test]
    fn longrope_takes_short_factors_up_to_the_original_context() {
        let text = r#"{"rope_scaling": {"rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.25, 1.5], "long_factor": [1.5, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 32}}"#;
        let short = [1.0, 0.0909090936, 0.00800000038, 0.00066666666];
        assert_close(&frequencies(text, 8, 128, 32), &short, 1.18321596);
        let long = [0.666666687, 0.0500000007, 0.00333333341, 0.000250000012];
        assert_close(&frequencies(text, 8, 128, 33), &long, 1.18321596);
        let unscaled = text.replace("\"rope_type\"", "\"factor\": 1.0, \"rope_type\"");
        assert_close(&frequencies(&unscaled, 8, 128, 70), &long, 1.0);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let error = |text: &str| {
            let value: Value = serde_json::from_str(text).unwrap();
            let mut r = Reader::new(value.as_object().unwrap(), "llama", "");
            RopeConfig::read(&mut r, 8, 64, 10000.0).unwrap_err().to_string()
        };
        assert!(error(r#"{"rope_scaling": {"type": "linear"}}"#).contains("rope_scaling.factor"));
        assert!(
            error(r#"{"rope_scaling": {"type": "spiral"}}"#)
                .contains("\"rope_scaling.rope_type\" = spiral")
        );
        assert!(error(r#"{"rope_scaling": {"type": "linear", "factor": -1}}"#).contains("-1"));
        assert!(
            error(r#"{"rope_parameters": {"rope_theta": "x"}}"#)
                .contains("rope_parameters.rope_theta")
        );
        assert!(error(r#"{"rope_parameters": {"twist": 1}}"#).contains("rope_parameters.twist"));
        assert!(error(r#"{"partial_rotary_factor": 1.5}"#).contains("partial_rotary_factor"));
        let short =
            r#"{"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}"#;
        assert!(error(short).contains("need 4"));
    }
}
