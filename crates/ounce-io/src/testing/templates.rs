//! Templates compared with what Python's jinja2 made of them, set up as `transformers` does.

use serde_json::Value;

use crate::chat_template::ChatTemplate;

/// What a comparison found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// Templates compared.
    pub n_templates: usize,
    /// Renderings that are equal byte by byte, with equal `{% generation %}` spans.
    pub n_equal: usize,
    /// Renderings that both refuse.
    pub n_refused: usize,
    /// Those that differ, in words.
    pub differences: Vec<String>,
}

/// Renders every case of a file that `tests/data/make_template_goldens.py` wrote.
///
/// # Panics
/// If the file is not of that form.
pub fn compare_templates(goldens: &Value) -> Comparison {
    let mut found = Comparison::default();
    let special = goldens["special"].as_object().expect("special tokens");
    let now_s = goldens["now_s"].as_u64().expect("a time");
    for entry in goldens["templates"].as_array().expect("a list of templates") {
        found.n_templates += 1;
        let (name, source) = (&entry["name"], entry["template"].as_str().expect("a template"));
        let template = match ChatTemplate::from_source(source, special.clone(), now_s) {
            Ok(template) => template,
            Err(e) => {
                found.differences.push(format!("{name}: {e}"));
                continue;
            }
        };
        for case in entry["cases"].as_array().expect("a list of cases") {
            compare(&mut found, goldens, &template, name, case);
        }
    }
    found
}

fn compare(
    found: &mut Comparison,
    goldens: &Value,
    template: &ChatTemplate,
    name: &Value,
    case: &Value,
) {
    let conversation = case["conversation"].as_str().expect("a name");
    let messages = goldens["conversations"][conversation].as_array().expect("messages");
    let tools = Value::Array(vec![goldens["tool"].clone()]);
    let tools = (conversation == "tools").then_some(&tools);
    let prompt = case["prompt"].as_bool().expect("whether to prompt");
    let what = format!("{name}, {conversation}, prompt {prompt}");
    match (template.render(messages, tools, prompt), case["error"].as_str()) {
        (Err(_), Some(_)) => found.n_refused += 1,
        (Err(e), None) => found.differences.push(format!("{what}: refused: {e}")),
        (Ok(_), Some(e)) => found.differences.push(format!("{what}: not refused: {e}")),
        (Ok(rendered), None) => {
            let want = case["text"].as_str().expect("a text");
            if rendered.text != want {
                let same = rendered.text.bytes().zip(want.bytes()).take_while(|(a, b)| a == b);
                let at = same.count();
                let near = |text: &str| {
                    let bytes = &text.as_bytes()[at.saturating_sub(20)..text.len().min(at + 60)];
                    String::from_utf8_lossy(bytes).into_owned()
                };
                let (ours, theirs) = (near(&rendered.text), near(want));
                found.differences.push(format!("{what}: byte {at}: {ours:?} for {theirs:?}"));
                return;
            }
            // Python counts characters.
            let chars = |at: usize| rendered.text[..at].chars().count();
            let spans: Vec<Value> = rendered
                .generated
                .iter()
                .map(|s| Value::from(vec![chars(s.start), chars(s.end)]))
                .collect();
            if case["generated"] != Value::Array(spans.clone()) {
                let want = &case["generated"];
                found.differences.push(format!("{what}: spans {spans:?} for {want}"));
                return;
            }
            found.n_equal += 1;
        }
    }
}
