//! Typed look-ups in a JSON object that remember which keys were read, so that the rest can be
//! refused. `null` means absent.

use serde_json::{Map, Value};

use crate::config::ModelError;

/// Keys of `config.json` that never change what the model computes in training and evaluation,
/// for any family. Dropout of attention probabilities is among them: it does not exist here.
const HARMLESS: &[&str] = &[
    "architectures",
    "model_type",
    "use_cache",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "transformers.js_config",
    "task_specific_params",
    "attention_dropout",
    "gradient_checkpointing",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "return_dict",
    "id2label",
    "label2id",
    "num_labels",
    "auto_map",
    "keys_to_ignore_at_inference",
];

/// One object, its family's name and what was read of it.
pub(crate) struct Reader<'a> {
    map: &'a Map<String, Value>,
    family: &'static str,
    /// `rope_scaling.` and the like, for messages.
    prefix: String,
    seen: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(map: &'a Map<String, Value>, family: &'static str, prefix: &str) -> Self {
        Self { map, family, prefix: prefix.to_owned(), seen: Vec::new() }
    }

    /// The value, unless absent or null.
    fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.seen.push(key);
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether the key is there, be it null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    fn wrong(&self, key: &str, found: &Value, want: &'static str) -> ModelError {
        ModelError::WrongType {
            key: format!("{}{key}", self.prefix),
            found: found.to_string(),
            want,
        }
    }

    /// The error of a value that is not built.
    pub(crate) fn unsupported(&self, key: &str, value: &str, hint: &str) -> ModelError {
        ModelError::Unsupported {
            key: format!("{}{key}", self.prefix),
            value: value.to_owned(),
            hint: hint.to_owned(),
        }
    }

    pub(crate) fn optional_u64(&mut self, key: &'static str) -> Result<Option<u64>, ModelError> {
        let Some(v) = self.get(key) else { return Ok(None) };
        v.as_u64().map(Some).ok_or_else(|| self.wrong(key, v, "a whole number"))
    }

    /// A size: at least 1, and small enough that bytes of a product of two of them fit 64 bits many times over.
    pub(crate) fn size(
        &mut self,
        key: &'static str,
        default: Option<u64>,
    ) -> Result<u64, ModelError> {
        match self.optional_u64(key)?.or(default) {
            Some(n) if (1..=1 << 24).contains(&n) => Ok(n),
            Some(n) => Err(self.wrong(key, &Value::from(n), "a number from 1 to 2^24")),
            None => Err(self.missing(key)),
        }
    }

    /// A size, if there.
    pub(crate) fn optional_size(&mut self, key: &'static str) -> Result<Option<u64>, ModelError> {
        let is_there = self.has(key) && !self.map[key].is_null();
        if is_there { self.size(key, None).map(Some) } else { self.optional_u64(key) }
    }

    /// A window in tokens: a null turns it off, an absent key means the default.
    pub(crate) fn window(
        &mut self,
        key: &'static str,
        default: Option<u64>,
    ) -> Result<Option<u64>, ModelError> {
        let given = self.optional_size(key)?;
        Ok(if self.has(key) { given } else { default })
    }

    /// A soft cap: a null turns it off, an absent key means the default.
    pub(crate) fn soft_cap(
        &mut self,
        key: &'static str,
        default: Option<f64>,
    ) -> Result<Option<f64>, ModelError> {
        let given = self.optional_f64(key)?;
        Ok(if self.has(key) { given } else { default })
    }

    /// A list of strings, if there.
    pub(crate) fn strings(
        &mut self,
        key: &'static str,
    ) -> Result<Option<Vec<&'a str>>, ModelError> {
        let Some(v) = self.get(key) else { return Ok(None) };
        let strings: Option<Vec<&str>> =
            v.as_array().and_then(|a| a.iter().map(Value::as_str).collect());
        strings.map(Some).ok_or_else(|| self.wrong(key, v, "a list of strings"))
    }

    /// A list of numbers, if there.
    pub(crate) fn optional_numbers(
        &mut self,
        key: &'static str,
    ) -> Result<Option<Vec<f64>>, ModelError> {
        let is_there = self.has(key) && !self.map[key].is_null();
        if is_there { self.numbers(key).map(Some) } else { Ok(None) }
    }

    pub(crate) fn missing(&self, key: &str) -> ModelError {
        ModelError::Missing { key: format!("{}{key}", self.prefix), family: self.family }
    }

    pub(crate) fn optional_f64(&mut self, key: &'static str) -> Result<Option<f64>, ModelError> {
        let Some(v) = self.get(key) else { return Ok(None) };
        v.as_f64().map(Some).ok_or_else(|| self.wrong(key, v, "a number"))
    }

    pub(crate) fn f64(&mut self, key: &'static str, default: f64) -> Result<f64, ModelError> {
        Ok(self.optional_f64(key)?.unwrap_or(default))
    }

    pub(crate) fn bool(&mut self, key: &'static str, default: bool) -> Result<bool, ModelError> {
        let Some(v) = self.get(key) else { return Ok(default) };
        v.as_bool().ok_or_else(|| self.wrong(key, v, "true or false"))
    }

    pub(crate) fn optional_str(
        &mut self,
        key: &'static str,
    ) -> Result<Option<&'a str>, ModelError> {
        let Some(v) = self.get(key) else { return Ok(None) };
        v.as_str().map(Some).ok_or_else(|| self.wrong(key, v, "a string"))
    }

    pub(crate) fn object(
        &mut self,
        key: &'static str,
    ) -> Result<Option<&'a Map<String, Value>>, ModelError> {
        let Some(v) = self.get(key) else { return Ok(None) };
        v.as_object().map(Some).ok_or_else(|| self.wrong(key, v, "an object"))
    }

    /// A list of numbers.
    pub(crate) fn numbers(&mut self, key: &'static str) -> Result<Vec<f64>, ModelError> {
        let Some(v) = self.get(key) else { return Err(self.missing(key)) };
        let numbers = v.as_array().and_then(|a| a.iter().map(Value::as_f64).collect());
        numbers.ok_or_else(|| self.wrong(key, v, "a list of numbers"))
    }

    /// A token id or a list of them.
    pub(crate) fn ids(&mut self, key: &'static str) -> Result<Vec<u64>, ModelError> {
        let ids = match self.get(key) {
            None => Some(Vec::new()),
            Some(Value::Array(a)) => a.iter().map(Value::as_u64).collect(),
            Some(one) => one.as_u64().map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, &self.map[key], "a token id or a list of them"))
    }

    /// Reads the key and refuses every value but `only`; absent means `only`.
    pub(crate) fn only(
        &mut self,
        key: &'static str,
        only: &Value,
        hint: &str,
    ) -> Result<(), ModelError> {
        match self.get(key) {
            Some(v) if !same(v, only) => Err(self.unsupported(key, &v.to_string(), hint)),
            _ => Ok(()),
        }
    }

    /// Refuses every key that was neither read nor is known to be harmless. Keys that start with an
    /// underscore are notes of `transformers` to itself; a null says nothing.
    pub(crate) fn finish(self, harmless: &[&str]) -> Result<(), ModelError> {
        for (key, value) in self.map {
            let known = self.seen.contains(&key.as_str())
                || HARMLESS.contains(&key.as_str())
                || harmless.contains(&key.as_str());
            if !known && !value.is_null() && !key.starts_with('_') {
                let key = format!("{}{key}", self.prefix);
                return Err(ModelError::UnknownKey { key, family: self.family });
            }
        }
        Ok(())
    }
}

/// Equality that takes 1 and 1.0 for the same number.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
