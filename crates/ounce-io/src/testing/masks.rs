//! Rows compared with what TRL makes of them: the ids, and the mask of those that the assistant says.

use std::path::Path;

use serde_json::{Value, json};

use super::templates::Comparison;
use crate::chat_template::ChatTemplate;
use crate::dataset::{ColumnMapping, Place, RawRow, RowFormat, RowOptions, samples};
use crate::row_tokens::{EncodedRow, RowTokens};
use crate::tokenizer::{Tokenizer, Words};

/// Encodes every case of a file that `tests/data/make_mask_goldens.py` wrote into `folder`. A case is equal where ids
/// and masks are.
///
/// # Panics
/// If the file is not of that form, or a tokenizer that it names cannot be read.
pub fn compare_masks(goldens: &Value, folder: &Path) -> Comparison {
    let templates = goldens["templates"].as_object().expect("templates by name");
    let now_s = goldens["now_s"].as_u64().expect("a time");
    let mut found = Comparison { n_templates: templates.len(), ..Comparison::default() };
    for entry in goldens["tokenizers"].as_array().expect("a list of tokenizers") {
        let name = entry["folder"].as_str().expect("a folder");
        let tokenizer = Tokenizer::load(&folder.join(name)).expect("a tokenizer");
        for (template_name, source) in templates {
            let (source, special) = (source.as_str(), entry["special"].as_object());
            let (source, special) = (source.expect("a template"), special.expect("tokens"));
            let template = ChatTemplate::from_source(source, special.clone(), now_s)
                .expect("a template that compiles");
            for case in entry["cases"][template_name].as_array().expect("a list of cases") {
                let what = format!("{name}, {template_name}, {}", case["conversation"]);
                let ours = encode(goldens, &tokenizer, &template, case);
                compare(&mut found, &what, ours, case);
            }
        }
    }
    found
}

/// The row of a case, as a data set would hold it.
fn encode(
    goldens: &Value,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    case: &Value,
) -> Result<EncodedRow, String> {
    let conversation = case["conversation"].as_str().expect("a name");
    let mut value = json!({ "messages": goldens["conversations"][conversation] });
    if conversation.starts_with("tools") {
        value["tools"] = json!([goldens["tool"]]);
    }
    let row = RawRow { value, place: Place::Line(1), n_bytes: 0 };
    let options = RowOptions::default();
    let rows =
        RowTokens { tokenizer, template, options: &options, max_length: 1 << 16, n_workers: 1 };
    let (path, columns) = (Path::new("rows.jsonl"), ColumnMapping::default());
    let samples = samples(path, &row, RowFormat::Messages, &columns).map_err(|e| e.to_string())?;
    let [sample] = &samples[..] else { return Err(format!("{} samples", samples.len())) };
    rows.encode_sample(sample, &rows.end_of_turn(), &mut Words::default())
}

fn compare(found: &mut Comparison, what: &str, ours: Result<EncodedRow, String>, case: &Value) {
    let row = match (ours, case["error"].as_str()) {
        (Err(_), Some(_)) => return found.n_refused += 1,
        (Err(e), None) => return found.differences.push(format!("{what}: refused: {e}")),
        (Ok(_), Some(e)) => return found.differences.push(format!("{what}: not refused: {e}")),
        (Ok(row), None) => row,
    };
    let words: Vec<String> = row.tokens().map(|(id, _)| id.to_string()).collect();
    let mask: String = row.tokens().map(|(_, said)| if said { '1' } else { '0' }).collect();
    if words.join(" ") != case["ids"] {
        found.differences.push(format!("{what}: ids {words:?} for {}", case["ids"]));
    } else if mask != case["mask"] {
        found.differences.push(format!("{what}: mask\n    {mask} for\n    {}", case["mask"]));
    } else {
        found.n_equal += 1;
    }
}
