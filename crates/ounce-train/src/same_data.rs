//! Whether a run that goes on has the data that it was begun with.

use crate::settings::DataFile;
use crate::{Error, Observer, Result, Settings};

/// Settings with the full paths of the data files: neither another spelling nor another working directory makes them
/// others.
pub(crate) fn by_full_path(settings: &Settings) -> Settings {
    let mut settings = settings.clone();
    for file in &mut settings.data {
        let path = match file {
            DataFile::Path(path) => path,
            DataFile::Weighted(file) => &mut file.path,
        };
        // What is not there any more keeps its name.
        if let Ok(full) = path.canonicalize() {
            *path = full;
        }
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
