//! Which part of a rendered conversation is supervised: what the assistant says, and the token that ends its turn.
//!
//! Where the template has `{% generation %}` blocks, they say it. Where not:
//! 1. The conversation is rendered once more with a stand-in for each answer. What stands around the stand-ins is the
//!    template's own text; it must stand around the answers in the true text, in the same order. This needs no
//!    template whose text for a part is the start of its text for the whole, which Qwen3's is not.
//! 2. An answer that the template takes apart (reasoning, calls of tools) is found by rendering what comes before it,
//!    with the prompt to answer: if the true text begins with that, the answer is what follows, up to the end of turn,
//!    which must come before the next message does.
//! 3. An answer that is found by neither is not supervised, and counted.
//!
//! The end of a turn is what the template writes behind an answer, up to and with its first special token; what
//! follows (mostly a line feed) is not supervised: nobody has to write it.
//!
//! Complexity: two renderings of the conversation; three more for each answer that is taken apart.

use std::ops::Range;

use serde_json::{Value, json};

use super::{ChatTemplate, MARKS};
use crate::dataset::Conversation;

/// What marks a stand-in: characters that no text is meant to hold.
const STAND_IN: [char; 2] = ['\u{fdd2}', '\u{fdd3}'];
/// Where messages have reasoning beside their content.
const REASONING: [&str; 3] = ["reasoning_content", "reasoning", "thinking"];
/// Longest end of turn that is no token.
const MAX_END_BYTES: usize = 40;

/// A conversation as text, with the bytes that are supervised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SupervisedText {
    /// The text.
    pub text: String,
    /// Ascending, without overlap.
    pub supervised: Vec<Range<usize>>,
    /// Answers whose place was not found.
    pub n_lost: usize,
}

/// What a template writes behind an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndOfTurn {
    /// A special token of the tokenizer.
    Token(String),
    /// Something like a special token, which the tokenizer does not know as one.
    NoToken(String),
    /// Nothing of the kind.
    None,
}

impl EndOfTurn {
    /// The text, if there is one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Token(text) | Self::NoToken(text) => Some(text),
            Self::None => None,
        }
    }
}

impl ChatTemplate {
    /// What this template writes behind an answer, found with a conversation of two messages.
    pub fn end_of_turn(&self, is_token: impl Fn(&str) -> bool) -> EndOfTurn {
        let probe = [
            json!({ "role": "user", "content": "a" }),
            json!({ "role": "assistant", "content": stand_in(0) }),
        ];
        let Ok(rendered) = self.render(&probe, None, false) else { return EndOfTurn::None };
        let Some((_, tail)) = rendered.text.split_once(&stand_in(0)) else {
            return EndOfTurn::None;
        };
        let tail = tail.trim_start();
        let ends = tail.char_indices().map(|(at, c)| at + c.len_utf8()).take(MAX_END_BYTES);
        match ends.filter(|&end| is_token(&tail[..end])).last() {
            Some(end) => EndOfTurn::Token(tail[..end].into()),
            None => match tail.find('>').filter(|&at| at < MAX_END_BYTES) {
                Some(at) if tail.starts_with('<') => EndOfTurn::NoToken(tail[..=at].into()),
                _ => EndOfTurn::None,
            },
        }
    }

    /// Renders a conversation and finds what is supervised in it.
    ///
    /// # Errors
    /// What the template refuses: a reason without a place.
    pub fn supervised_text(
        &self,
        conversation: &Conversation,
        end: &EndOfTurn,
    ) -> Result<SupervisedText, String> {
        let messages = self.messages_of(conversation);
        let tools = conversation.tools.as_ref();
        if messages.iter().chain(tools).any(holds_marks) {
            return Err(format!(
                "the row holds U+{:04X} or U+{:04X}, which mark here what the assistant wrote",
                u32::from(MARKS[0]),
                u32::from(MARKS[1])
            ));
        }
        let full = self.render(&messages, tools, false)?;
        let answers = |i: &usize| conversation.messages[*i]["role"] == "assistant";
        let all: Vec<usize> = (0..messages.len()).filter(answers).collect();
        let is_supervised = |i: &usize| conversation.is_supervised(*i);
        if self.generates(tools.is_some()) {
            let wanted: Vec<usize> = all.iter().copied().filter(is_supervised).collect();
            let (supervised, n_lost) = if wanted.len() == all.len() {
                (full.generated, 0)
            } else {
                match self.blocks_of(&messages, tools, &all, full.generated.len())? {
                    // Those of answers that are given, or of no weight, stay unsupervised.
                    Some(owners) => {
                        let blocks = full.generated.into_iter().zip(owners);
                        (blocks.filter(|(_, i)| is_supervised(i)).map(|(b, _)| b).collect(), 0)
                    }
                    None => (Vec::new(), wanted.len()),
                }
            };
            return Ok(SupervisedText { text: full.text, supervised, n_lost });
        }
        let wanted = all.into_iter().filter(is_supervised).collect();
        let search = Search { template: self, messages: &messages, tools, text: &full.text, end };
        let (mut supervised, n_lost) = search.answers(wanted)?;
        supervised.retain(|span: &Range<usize>| !span.is_empty());
        supervised.sort_by_key(|span| span.start);
        Ok(SupervisedText { text: full.text, supervised, n_lost })
    }
}

impl ChatTemplate {
    /// The answer that each of `n_blocks` `{% generation %}` blocks is of: that of the stand-in it holds, or of the
    /// last one before it. `None` where they cannot be told apart.
    fn blocks_of(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        answers: &[usize],
        n_blocks: usize,
    ) -> Result<Option<Vec<usize>>, String> {
        let is_text = |i: &usize| messages[*i]["content"].as_str().is_some_and(|c| !c.is_empty());
        if !answers.iter().all(is_text) {
            // Calls may be written instead of the text: only a block for each answer is clear.
            return Ok((n_blocks == answers.len()).then(|| answers.to_vec()));
        }
        let mut outline = messages.to_vec();
        for &i in answers {
            outline[i]["content"] = stand_in(i).into();
        }
        let outline = self.render(&outline, tools, false)?;
        let mut owners = Vec::with_capacity(n_blocks);
        let mut left = answers.iter().copied().peekable();
        for block in &outline.generated {
            let text = &outline.text[block.clone()];
            let owner = match left.next_if(|&i| text.contains(&stand_in(i))) {
                Some(i) => Some(i),
                None => owners.last().copied(),
            };
            let Some(owner) = owner else { return Ok(None) };
            owners.push(owner);
        }
        Ok((left.peek().is_none() && owners.len() == n_blocks).then_some(owners))
    }
}

/// Whether a text in it holds a character that marks `{% generation %}` blocks.
fn holds_marks(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains(MARKS),
        Value::Array(items) => items.iter().any(holds_marks),
        Value::Object(map) => map.iter().any(|(key, v)| key.contains(MARKS) || holds_marks(v)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn stand_in(i: usize) -> String {
    format!("{}{i}{}", STAND_IN[0], STAND_IN[1])
}

/// The search for answers in a text.
struct Search<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Value],
    tools: Option<&'a Value>,
    text: &'a str,
    end: &'a EndOfTurn,
}

impl Search<'_> {
    /// The spans of the answers `wanted`, and how many were not found.
    fn answers(&self, mut wanted: Vec<usize>) -> Result<(Vec<Range<usize>>, usize), String> {
        let (mut spans, mut n_lost) = (Vec::new(), 0);
        wanted.retain(|&i| {
            let message = &self.messages[i];
            let is_text = |key: &str| message[key].as_str().is_some_and(|text| !text.is_empty());
            let has_calls = message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
            let is_said = is_text("content") && !has_calls;
            if is_said && !REASONING.iter().any(|key| is_text(key)) {
                return true;
            }
            match self.by_prefix(i) {
                Some(span) => spans.push(span),
                // Without its reasoning rather than not at all.
                None if is_said => return true,
                None => n_lost += 1,
            }
            false
        });
        while !wanted.is_empty() {
            let suspects = match self.by_stand_ins(&wanted)? {
                Ok(found) => {
                    spans.extend(found);
                    break;
                }
                Err(suspects) => suspects,
            };
            let found = suspects.iter().find_map(|&k| Some((k, self.by_prefix(wanted[k])?)));
            if let Some((k, span)) = found {
                wanted.remove(k);
                spans.push(span);
            } else {
                wanted.remove(suspects[0]);
                n_lost += 1;
            }
        }
        Ok((spans, n_lost))
    }

    /// The spans of all of `wanted`, or the number of the first that is not found and of one beside it, either of which
    /// the template may have taken apart.
    fn by_stand_ins(
        &self,
        wanted: &[usize],
    ) -> Result<Result<Vec<Range<usize>>, [usize; 2]>, String> {
        let mut messages = self.messages.to_vec();
        for &i in wanted {
            messages[i]["content"] = stand_in(i).into();
        }
        let outline = self.template.render(&messages, self.tools, false)?.text;
        let mut rest = outline.as_str();
        let (mut at, mut spans) = (0, Vec::with_capacity(wanted.len()));
        for (k, &i) in wanted.iter().enumerate() {
            let Some((before, after)) = rest.split_once(&stand_in(i)) else {
                return Ok(Err([k, k]));
            };
            if !self.text[at..].starts_with(before) {
                // Before this one stands what it was begun with, or the one before ends otherwise.
                return Ok(Err([k.saturating_sub(1), k]));
            }
            at += before.len();
            let next = after.find(STAND_IN[0]).map_or(after, |end| &after[..end]);
            let content = self.messages[i]["content"].as_str().unwrap_or_default();
            let Some(answer) = self.spelled(at, content, next) else {
                return Ok(Err([k, (k + 1).min(wanted.len() - 1)]));
            };
            spans.push(at..self.with_end(at + answer, next));
            at += answer;
            rest = after;
        }
        Ok(if self.text[at..] == *rest { Ok(spans) } else { Err([wanted.len() - 1; 2]) })
    }

    /// Bytes of the text at `at` that are `content` as the template spells it, followed by `next`.
    fn spelled(&self, at: usize, content: &str, next: &str) -> Option<usize> {
        let said = content.rsplit("</think>").next().unwrap_or(content);
        let spellings = [
            content,
            content.trim(),
            content.trim_start(),
            content.trim_end(),
            said.trim_start_matches('\n'),
            said.trim(),
            said,
            said.trim_start(),
            said.trim_end(),
        ];
        let here = &self.text[at..];
        let fits = |s: &&str| here.strip_prefix(*s).is_some_and(|rest| rest.starts_with(next));
        spellings.into_iter().find(fits).map(str::len)
    }

    /// `at`, moved behind the end of turn where `next` begins with it, space apart.
    fn with_end(&self, at: usize, next: &str) -> usize {
        let end = self.end.text().filter(|end| next.trim_start().starts_with(end));
        end.map_or(at, |end| at + (next.len() - next.trim_start().len()) + end.len())
    }

    /// What follows the prompt to answer message `i`, up to the end of its turn, which must lie before the next message
    /// begins: a template may write the last message otherwise than one in the middle.
    fn by_prefix(&self, i: usize) -> Option<Range<usize>> {
        let render =
            |n: usize, prompt| self.template.render(&self.messages[..n], self.tools, prompt);
        let prompt = render(i, true).ok()?.text;
        let start = prompt.len();
        let limit = self.next_content(i)?;
        let answer = self.text.strip_prefix(prompt.as_str())?.get(..limit.checked_sub(start)?)?;
        let part = render(i + 1, false).ok()?.text;
        let turn = part.trim_end();
        let is_whole = turn.len() > start && self.text.starts_with(turn);
        if let Some(end) = self.end.text() {
            let found = answer.find(end).map(|at| start + at + end.len());
            // A turn may end in another token, as calls of tools do: what the next one ends in is not its own.
            return match found {
                Some(found) if is_whole && found > part.len() => Some(start..turn.len()),
                None if is_whole => Some(start..turn.len()),
                found => found.map(|found| start..found),
            };
        }
        let same = part.bytes().zip(self.text.bytes()).take_while(|(a, b)| a == b).count();
        let said = self.messages[i]["content"].as_str().unwrap_or_default().trim();
        let found = self.text.get(start..same)?;
        (is_whole || !said.is_empty() && found.contains(said)).then_some(start..same)
    }

    /// Where the content of the message behind `i` begins in the text, the text's end if there is none; `None` where it
    /// cannot be told.
    fn next_content(&self, i: usize) -> Option<usize> {
        let mut messages = self.messages.to_vec();
        let Some(next) = messages.get_mut(i + 1) else { return Some(self.text.len()) };
        next["content"] = stand_in(i + 1).into();
        let outline = self.template.render(&messages, self.tools, false).ok()?.text;
        let at = outline.find(&stand_in(i + 1))?;
        let same = outline.bytes().zip(self.text.bytes()).take_while(|(a, b)| a == b).count();
        Some(same.min(at))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;

    /// The supervised parts of a conversation.
    fn supervised(source: &str, messages: &Value, end: &str) -> Result<Vec<String>, String> {
        let template = ChatTemplate::from_source(source, Map::new(), 0).expect("a template");
        let messages = messages.as_array().expect("a list").clone();
        let conversation = Conversation { messages, ..Conversation::default() };
        let found = template.supervised_text(&conversation, &EndOfTurn::Token(end.into()))?;
        Ok(found.supervised.iter().map(|span| found.text[span.clone()].to_owned()).collect())
    }

    #[test]
    fn a_call_that_ends_in_a_token_of_its_own_does_not_reach_into_the_result() {
        let source = "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}CALL<call>{% else %}\
            {{ m.content }}<end>{% endif %}{% endfor %}\
            {% if add_generation_prompt %}<assistant>{% endif %}";
        let messages = json!([
            { "role": "user", "content": "q" },
            { "role": "assistant", "content": "", "tool_calls": [{}] },
            { "role": "tool", "content": "result" },
            { "role": "assistant", "content": "a" },
        ]);
        let found = supervised(source, &messages, "<end>").expect("rendered");
        assert_eq!(found, ["CALL<call>", "a<end>"]);
    }

    #[test]
    fn an_empty_list_of_calls_is_no_call() {
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}\
            {% if add_generation_prompt %}<assistant><think>{% endif %}";
        let messages = json!([
            { "role": "user", "content": "q" },
            { "role": "assistant", "content": "a", "tool_calls": [] },
        ]);
        assert_eq!(supervised(source, &messages, "<end>").expect("rendered"), ["a<end>"]);
    }

    #[test]
    fn what_others_say_is_never_supervised_where_the_last_message_is_written_otherwise() {
        // Reasoning in the last message only, which alone ends in `<return>`.
        let source = "{% for m in messages %}<{{ m.role }}>\
            {% if m.thinking and loop.last %}{{ m.thinking }}|{% endif %}{{ m.content }}\
            {% if m.role == 'assistant' and loop.last %}<return>{% else %}<end>{% endif %}{% endfor %}\
            {% if add_generation_prompt %}<assistant>{% endif %}";
        let messages = json!([
            { "role": "user", "content": "q" },
            { "role": "assistant", "content": "", "thinking": "hm" },
            { "role": "user", "content": "r" },
            { "role": "assistant", "content": "b", "thinking": "so" },
        ]);
        assert_eq!(supervised(source, &messages, "<return>").expect("rendered"), ["so|b<return>"]);
        assert_eq!(
            supervised(source, &messages, "<end>").expect("rendered"),
            ["<end>", "so|b<return>"]
        );
    }

    #[test]
    fn reasoning_is_supervised_wherever_it_stands() {
        let source = "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}\
            </think>{% endif %}{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        let row = |message: Value| json!([{ "role": "user", "content": "q" }, message]);
        for message in [
            json!({ "role": "assistant", "content": "a", "reasoning_content": "r" }),
            json!({ "role": "assistant", "content": "<think>r</think>a" }),
        ] {
            let found = supervised(source, &row(message), "<end>").expect("rendered");
            assert_eq!(found, ["<think>r</think>a<end>"]);
        }
    }

    #[test]
    fn an_earlier_answer_is_found_where_the_last_one_keeps_its_reasoning() {
        // As Qwen3 thinks: reasoning within the content stays in the last message alone, behind the prompt.
        let source = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% if loop.last %}<think>\
            {{ m.content if '</think>' in m.content else '</think>' + m.content }}{% else %}\
            {{ m.content.split('</think>')[-1] }}{% endif %}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}\
            {% if add_generation_prompt %}<assistant><think>{% endif %}";
        let messages = json!([
            { "role": "user", "content": "q" },
            { "role": "assistant", "content": "r</think>a" },
            { "role": "user", "content": "q" },
            { "role": "assistant", "content": "s</think>b" },
        ]);
        assert_eq!(
            supervised(source, &messages, "<end>").expect("rendered"),
            ["a<end>", "s</think>b<end>"]
        );
    }

    #[test]
    fn an_answer_is_found_where_the_template_cuts_its_reasoning_off() {
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}\
            {% if add_generation_prompt %}<assistant><think>{% endif %}";
        let messages = json!([
            { "role": "user", "content": "q" },
            { "role": "assistant", "content": "<think>\nr\n</think>\n\na" },
        ]);
        assert_eq!(supervised(source, &messages, "<end>").expect("rendered"), ["\n\na<end>"]);
    }

    #[test]
    fn a_piece_of_the_template_is_not_taken_for_an_answer_without_an_end() {
        let source = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>\
            {% if loop.last %}{{ m.content }}{% else %}</think>{{ m.content.split('</think>')[-1] | upper }}{% endif %}\
            {% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        let messages = json!([
            { "role": "user", "content": "q" },
            { "role": "assistant", "content": "r</think>a" },
            { "role": "user", "content": "q" },
            { "role": "assistant", "content": "b" },
        ]);
        let template = ChatTemplate::from_source(source, Map::new(), 0).expect("a template");
        let messages = messages.as_array().expect("a list").clone();
        let conversation = Conversation { messages, ..Conversation::default() };
        let found = template.supervised_text(&conversation, &EndOfTurn::None).expect("rendered");
        let texts: Vec<&str> =
            found.supervised.iter().map(|span| &found.text[span.clone()]).collect();
        // What follows the prompt is the answer, as the model has to write it.
        assert_eq!((&texts[..], found.n_lost), (&["<think>b"][..], 1), "{}", found.text);
    }

    #[test]
    fn answers_without_weight_stay_unsupervised_whatever_blocks_they_have() {
        let source = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}\
            {% generation %}{{ m.content }}{% endgeneration %}|{% generation %}<end>{% endgeneration %}\
            {% else %}{{ m.content }}{% endif %}{% endfor %}";
        let messages = json!([
            { "role": "user", "content": "q" },
            { "role": "assistant", "content": "a", "weight": 0 },
            { "role": "user", "content": "r" },
            { "role": "assistant", "content": "b" },
        ]);
        assert_eq!(supervised(source, &messages, "<end>").expect("rendered"), ["b", "<end>"]);
    }

    #[test]
    fn commented_blocks_mark_nothing_and_marks_in_the_data_are_refused() {
        let source = "{# {% generation %} #}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\
            {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        let row = |text: &str| json!([{ "role": "user", "content": text }, { "role": "assistant", "content": "a" }]);
        assert_eq!(supervised(source, &row("q"), "<end>").expect("rendered"), ["a<end>"]);
        let refused = supervised(source, &row("q \u{fdd0} secret"), "<end>");
        assert!(refused.as_ref().is_err_and(|e| e.contains("U+FDD0")), "{refused:?}");
    }
}
