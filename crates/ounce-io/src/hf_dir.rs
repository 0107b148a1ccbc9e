//! The side files of a Hugging Face model directory: everything but the weights.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Value, json};

use crate::atomic::{AtomicFile, write_file};
use crate::chat_template::{MAX_TOKENIZER_CONFIG_BYTES, TEMPLATE_FILE, template_files};
use crate::error::IoError;
use crate::json::{open_regular, read_json};
use crate::model_files::{TOKENIZER_CONFIG, TOKENIZER_FILES, side_files, stay_inside};
use crate::publication::{interrupted_hint, is_interrupted};

/// Longest configuration file accepted.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Reads `config.json` of a model directory, or a configuration file named directly.
///
/// # Errors
/// `Missing`, `Read`, `BadFile` (over [`MAX_CONFIG_BYTES`], not an object), `BadLine` (not strict JSON).
pub fn read_config(dir_or_file: &Path) -> Result<Value, IoError> {
    let path =
        if dir_or_file.is_dir() { dir_or_file.join("config.json") } else { dir_or_file.into() };
    let config = match read_json(&path, MAX_CONFIG_BYTES) {
        Err(IoError::Missing { path, .. }) if is_interrupted(dir_or_file) => {
            return Err(IoError::Missing { path, hint: interrupted_hint(dir_or_file).into() });
        }
        Err(IoError::Missing { path, .. }) if dir_or_file.is_dir() => {
            let hint = "a model directory holds config.json, weights and a tokenizer, as `ounce init` writes it";
            return Err(IoError::Missing { path, hint: hint.into() });
        }
        other => other?,
    };
    if config.is_object() {
        return Ok(config);
    }
    Err(IoError::bad_file(
        &path,
        "holds no JSON object",
        "a Hugging Face config.json is an object with a `model_type`",
    ))
}

/// Writes a JSON file atomically, indented as Hugging Face does, with a newline at its end.
///
/// # Errors
/// `Write`.
pub fn write_json(path: &Path, value: &Value) -> Result<(), IoError> {
    write_file(path, format!("{value:#}\n").as_bytes())
}

/// Copies the tokenizer's files from one directory to another, byte for byte but for several chat templates
/// ([`copy_side_files`]); returns the names copied.
///
/// # Errors
/// `Read`, `Write`, `BadFile` for a link out of the directory.
pub fn copy_tokenizer_files(from: &Path, to: &Path) -> Result<Vec<&'static str>, IoError> {
    let is_tokenizer = |name: &&str| TOKENIZER_FILES.contains(name);
    copy_files(from, to, side_files(from).into_iter().filter(is_tokenizer).collect())
}

/// Copies configuration and tokenizer from one model directory to another, byte for byte; returns the names copied.
/// Chat templates in `additional_chat_templates/` go into `tokenizer_config.json`, as a list with the one of
/// `chat_template.jinja`, which `transformers` reads as well: a checkpoint has no directories.
///
/// # Errors
/// `Missing` without a `config.json`, `Read`, `Write`, `BadFile` for a link out of the directory.
pub fn copy_side_files(from: &Path, to: &Path) -> Result<Vec<&'static str>, IoError> {
    open_regular(&from.join("config.json"))?;
    copy_files(from, to, side_files(from))
}

/// Copies the files called `names`.
fn copy_files(
    from: &Path,
    to: &Path,
    mut names: Vec<&'static str>,
) -> Result<Vec<&'static str>, IoError> {
    for name in &names {
        stay_inside(from, &from.join(name))?;
        copy_file(&from.join(name), &to.join(name))?;
    }
    let templates = template_files(from)?;
    let is_same = || matches!((from.canonicalize(), to.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if templates.len() > 1 && !is_same() {
        write_list(&templates, to)?;
        names.retain(|name| ![TEMPLATE_FILE, TOKENIZER_CONFIG].contains(name));
        names.push(TOKENIZER_CONFIG);
    }
    Ok(names)
}

/// Puts chat templates into `tokenizer_config.json`, in the place of `chat_template.jinja`.
fn write_list(templates: &BTreeMap<String, String>, to: &Path) -> Result<(), IoError> {
    let path = to.join(TOKENIZER_CONFIG);
    let mut config = match read_json(&path, MAX_TOKENIZER_CONFIG_BYTES) {
        Err(IoError::Missing { .. }) => json!({}),
        other => other?,
    };
    let Some(object) = config.as_object_mut() else {
        return Err(IoError::bad_file(&path, "holds no JSON object", "fetch the file again"));
    };
    let list = templates.iter().map(|(name, text)| json!({"name": name, "template": text}));
    object.insert("chat_template".to_owned(), list.collect());
    write_json(&path, &config)?;
    let single = to.join(TEMPLATE_FILE);
    std::fs::remove_file(&single).map_err(|e| IoError::writing(&single, 0, e))
}

/// Copies one file through a small buffer; a copy onto itself changes nothing.
fn copy_file(from: &Path, to: &Path) -> Result<(), IoError> {
    let mut source: File = open_regular(from)?;
    let mut target = AtomicFile::create(to)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = source.read(&mut buffer).map_err(|e| IoError::reading(from, e))?;
        if n == 0 {
            return target.finish();
        }
        target.write_all(&buffer[..n])?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn side_files_that_are_links_out_of_the_directory_are_not_copied() {
        let [from, to] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let secret = to.path().join("secret");
        std::fs::write(&secret, "private").unwrap();
        std::fs::write(from.path().join("config.json"), "{}").unwrap();
        std::os::unix::fs::symlink(&secret, from.path().join("merges.txt")).unwrap();
        let message = copy_side_files(from.path(), to.path()).unwrap_err().to_string();
        assert!(message.contains("merges.txt: is a link out of the model directory"), "{message}");
        assert!(!to.path().join("merges.txt").exists());
    }

    #[test]
    fn side_files_are_copied_byte_for_byte_also_onto_themselves() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(from.path().join("config.json"), "{ \"odd\" :1}\n\n").unwrap();
        fs::write(from.path().join("merges.txt"), [0xff, 0, 13]).unwrap();
        fs::write(from.path().join("model.safetensors"), "weights").unwrap();
        let copied = copy_side_files(from.path(), to.path()).unwrap();
        assert_eq!(copied, ["config.json", "merges.txt"]);
        assert_eq!(fs::read(to.path().join("config.json")).unwrap(), b"{ \"odd\" :1}\n\n");
        assert_eq!(fs::read(to.path().join("merges.txt")).unwrap(), [0xff, 0, 13]);
        copy_side_files(from.path(), from.path()).unwrap();
        assert_eq!(fs::read(from.path().join("merges.txt")).unwrap(), [0xff, 0, 13]);
    }

    #[test]
    fn several_chat_templates_become_a_list() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let more = from.path().join("additional_chat_templates");
        fs::create_dir(&more).unwrap();
        for (path, text) in [
            (from.path().join("config.json"), "{}"),
            (from.path().join("tokenizer_config.json"), "{\"eos_token\": \"<e>\"}"),
            (from.path().join("chat_template.jinja"), "one {{ messages }}"),
            (more.join("tool_use.jinja"), "two {{ tools }}"),
        ] {
            fs::write(path, text).unwrap();
        }
        let copied = copy_side_files(from.path(), to.path()).unwrap();
        assert_eq!(copied, ["config.json", "tokenizer_config.json"]);
        assert!(!to.path().join("chat_template.jinja").exists());
        let config = read_json(&to.path().join("tokenizer_config.json"), 1 << 20).unwrap();
        assert_eq!(config["eos_token"], "<e>");
        let entry = |name: &str, template: &str| json!({"name": name, "template": template});
        let list = [entry("default", "one {{ messages }}"), entry("tool_use", "two {{ tools }}")];
        assert_eq!(config["chat_template"], json!(list));
        // A second copy, and one onto itself, have nothing to do.
        let again = tempfile::tempdir().unwrap();
        copy_side_files(to.path(), again.path()).unwrap();
        copy_side_files(from.path(), from.path()).unwrap();
        assert!(from.path().join("chat_template.jinja").exists());
        let secret = to.path().join("secret");
        fs::write(&secret, "private").unwrap();
        std::os::unix::fs::symlink(&secret, more.join("b.jinja")).unwrap();
        let message = copy_side_files(from.path(), again.path()).unwrap_err().to_string();
        assert!(message.contains("b.jinja: is a link out of the model directory"), "{message}");
    }

    #[test]
    fn a_directory_without_config_is_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let message = copy_side_files(dir.path(), dir.path()).unwrap_err().to_string();
        assert!(message.contains("config.json does not exist\nhint: "), "{message}");
        assert!(read_config(dir.path()).unwrap_err().to_string().contains("config.json"));
    }

    #[test]
    fn configs_that_are_too_long_or_no_object_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::write(&path, " ".repeat(MAX_CONFIG_BYTES as usize + 1)).unwrap();
        assert!(read_config(&path).unwrap_err().to_string().contains("over the limit of 1048576"));
        fs::write(&path, "[1]").unwrap();
        assert!(read_config(dir.path()).unwrap_err().to_string().contains("no JSON object"));
        fs::write(&path, "{\"model_type\": \"gpt2\"}").unwrap();
        assert_eq!(read_config(dir.path()).unwrap()["model_type"], "gpt2");
    }

    #[test]
    fn written_json_is_indented_and_ends_in_a_newline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        write_json(&path, &serde_json::json!({"a": [1]})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\n  \"a\": [\n    1\n  ]\n}\n");
    }
}
