//! Whether a run that goes on has the data that it was begun with.

use std::path::Path;

use crate::settings::{DataFile, WeightedFile};
use crate::{Error, Observer, Result, Settings};

/// Settings with the full paths of model and data files: neither another spelling nor another working directory makes
/// them others.
pub(crate) fn by_full_path(settings: &Settings) -> Settings {
    let mut settings = settings.clone();
    // What is not there any more keeps its name, as does a model in the hub's cache.
    let full = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    settings.model = settings.model.as_deref().map(full);
    for file in &mut settings.data {
        let path = full(file.path());
        let weight = file.weight();
        // A weight of 1 says nothing.
        *file = if weight == 1.0 {
            DataFile::Path(path)
        } else {
            DataFile::Weighted(WeightedFile { path, weight })
        };
    }
    settings
}

/// Tells that `what` of the data is not what it was; whoever insists goes on.
///
/// # Errors
/// [`Error::Input`] without `--override`; `why` begins its hint.
pub(crate) fn changed_data(
    what: &str,
    why: &str,
    settings: &Settings,
    observer: &mut dyn Observer,
) -> Result<()> {
    let files: Vec<String> =
        settings.data.iter().map(|file| file.path().display().to_string()).collect();
    let files = files.join(", ");
    let message = format!("{files}: {what} is not what it was when the checkpoint was saved");
    if settings.override_begun {
        observer.note(&format!("warning: {message}"));
        return Ok(());
    }
    let hint = format!(
        "{why}: put it back, begin a new run, or `--override` to go on with what is there now"
    );
    Err(Error::Input { message, hint })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_run_has_one_spelling() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        std::fs::create_dir(&model).unwrap();
        let (name, weight) = (|| dir.path().join("no/../model"), 1.0);
        std::fs::create_dir(dir.path().join("no")).unwrap();
        let settings =
            |model, data| Settings { model: Some(model), data: vec![data], ..Settings::default() };
        let weighted = settings(name(), DataFile::Weighted(WeightedFile { path: name(), weight }));
        let plain = settings(model.clone(), DataFile::Path(model));
        assert_eq!(by_full_path(&weighted), by_full_path(&plain));
        // A name in the hub's cache, and weights that say something.
        let named = settings(
            "ORG/NAME".into(),
            DataFile::Weighted(WeightedFile { path: "a".into(), weight: 2.0 }),
        );
        assert_eq!(by_full_path(&named), named);
    }
}
