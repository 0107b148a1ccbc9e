//! Reading the goldens of this folder; included by the tests that compare with them.
#![expect(clippy::unwrap_used, reason = "a test that cannot read its goldens should panic")]

use std::path::{Path, PathBuf};

use ounce_io::SafetensorsDir;
use ounce_models::ModelConfig;
use ounce_oracle::Row;
use serde_json::Value;

/// One folder of goldens.
pub(crate) struct Golden {
    pub(crate) folder: PathBuf,
    pub(crate) facts: Value,
    pub(crate) tensors: SafetensorsDir,
}

impl Golden {
    pub(crate) fn open(folder: &Path) -> Self {
        let facts = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        Self {
            folder: folder.to_owned(),
            facts: serde_json::from_str(&facts).unwrap(),
            tensors: SafetensorsDir::open(&folder.join("golden.safetensors")).unwrap(),
        }
    }

    pub(crate) fn fact(&self, name: &str) -> f64 {
        self.facts[name].as_f64().unwrap()
    }

    fn integers(&self, name: &str) -> Vec<i32> {
        let mut bytes = vec![0; self.tensors.get(name).unwrap().bytes as usize];
        self.tensors.read_exact_bytes(name, 0, &mut bytes).unwrap();
        let integer = |b: &[u8]| i64::from_le_bytes(b.try_into().unwrap()) as i32;
        bytes.chunks(8).map(integer).collect()
    }

    /// The model's configuration.
    pub(crate) fn config(&self) -> ModelConfig {
        let config = std::fs::read_to_string(self.folder.join("config.json")).unwrap();
        ModelConfig::from_json(&config).unwrap()
    }

    /// The model's weights.
    pub(crate) fn model(&self) -> SafetensorsDir {
        SafetensorsDir::open(&self.folder.join("model.safetensors")).unwrap()
    }

    /// Asserts that the relative error is below `tolerance`.
    pub(crate) fn check(&self, what: &str, ours: &[f64], theirs: &[f64], tolerance: f64) {
        let error = relative_error(ours, theirs);
        assert!(error < tolerance, "{}: {what} is off by {error:e}", self.folder.display());
    }

    /// Rows with targets as the graph wants them: shifted by one, the last token without.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let n_tokens = self.fact("tokens") as usize;
        let (ids, labels) = (self.integers("input_ids"), self.integers("labels"));
        let row = |(ids, labels): (&[i32], &[i32])| Row {
            token_ids: ids.to_vec(),
            targets: labels[1..].iter().copied().chain([-100]).collect(),
        };
        ids.chunks(n_tokens).zip(labels.chunks(n_tokens)).map(row).collect()
    }
}

/// A tensor as f64.
pub(crate) fn read(tensors: &SafetensorsDir, name: &str) -> Vec<f64> {
    let mut data = vec![0.0; tensors.get(name).unwrap().n_elems()];
    tensors.read_f32(name, &mut data).unwrap();
    data.into_iter().map(f64::from).collect()
}

/// Relative to the larger norm; tensors below 1e-9 are zero (a bias of keys has no gradient).
pub(crate) fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let distance = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    distance / norm(&mut a.iter().copied()).max(norm(&mut b.iter().copied())).max(1e-9)
}

/// The folders of a family, sorted.
pub(crate) fn folders(family: &str) -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let folders = std::fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path());
    let of_family =
        |f: &PathBuf| f.is_dir() && f.file_name().unwrap().to_str().unwrap().starts_with(family);
    let mut folders: Vec<PathBuf> = folders.filter(of_family).collect();
    folders.sort();
    folders
}
