//! Templates that mean harm: texts that grow by themselves, and values nested so deep that a stack would overflow.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use ounce_io::chat_template::ChatTemplate;
use serde_json::{Map, Value, json};

fn render(source: &str, messages: &[Value]) -> Result<String, String> {
    let template = ChatTemplate::from_source(source, Map::new(), 0).unwrap();
    template.render(messages, None, false).map(|rendered| rendered.text)
}

#[test]
fn a_text_that_grows_too_long_is_refused_before_it_exists() {
    for grow in [
        "{% set s = 'a' * 100000 %}{{ s.replace('a', s) | length }}",
        "{% set s = 'a' * 100000 %}{{ s.replace('', s) | length }}",
        "{% set s = 'a' * 100000 %}{{ s.join([''] * 100000) | length }}",
        "{% set s = 'a' * 100000 %}{{ ('{0}' * 100000).format(s) | length }}",
        "{{ '{:1000000000}'.format('x') | length }}",
        "{{ '{:.1000000000f}'.format(1.5) | length }}",
        "{% set ns = namespace(x=0) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=0) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}\
         {{ ns.x | tojson }}",
    ] {
        let said = render(grow, &[]).unwrap_err();
        assert!(said.contains("too long"), "{grow}: {said}");
    }
}

#[test]
fn what_python_methods_return_is_as_it_was() {
    let text = "{{ 'a-b'.replace('-', '+') }} {{ 'a-b-c'.replace('-', '++', 1) }} {{ ', '.join(['x', 'y']) }} \
                {{ '{:>4}|{}'.format('x', 'y') }} {{ ''.join([]) }}";
    assert_eq!(render(text, &[]).unwrap(), "a+b a++b-c x, y    x|y ");
    let said = render("{{ ','.join([1]) }}", &[]).unwrap_err();
    assert!(said.contains("what is joined must be text"), "{said}");
}

#[test]
fn a_value_nested_as_deep_as_its_fuel_allows_leaves_the_stack_whole() {
    // Sixty lists per assignment, a few hundred thousand in all.
    let brackets = ["[", "]"].map(|bracket| bracket.repeat(60));
    let nest = |n: usize, then: &str| {
        let [open, close] = &brackets;
        format!(
            "{{% set ns = namespace(x=0, y=0) %}}{{% for i in range({n}) %}}{{% set ns.x = {open}ns.x{close} %}}\
             {{% set ns.y = {open}ns.y{close} %}}{{% endfor %}}{then}"
        )
    };
    assert_eq!(render(&nest(4000, "{{ ns.x == ns.y }}"), &[]).unwrap(), "True");
    assert!(render(&nest(4000, "{{ ns.x }}"), &[]).unwrap_err().contains("nested"));
    assert!(render(&nest(4000, "{{ ns.x | tojson }}"), &[]).unwrap_err().contains("nested"));
    assert!(render(&nest(90_000, ""), &[]).unwrap_err().contains("fuel"));
}

#[test]
fn as_many_branches_as_are_allowed_leave_the_stack_whole() {
    let branches =
        |n: usize| format!("{{% if a %}}{}{{% else %}}x{{% endif %}}", "{% elif b %}".repeat(n));
    let nested = |n: usize| {
        format!("{}{}{}", "{% if true %}".repeat(n), branches(200), "{% endif %}".repeat(n))
    };
    // As deep as the library allows.
    let deepest = (0..200)
        .take_while(|&n| ChatTemplate::from_source(&nested(n), Map::new(), 0).is_ok())
        .last()
        .unwrap();
    assert!(deepest > 40, "{deepest}");
    assert_eq!(render(&nested(deepest), &[]).unwrap(), "x");
    let refused =
        ChatTemplate::from_source(&branches(80_000), Map::new(), 0).unwrap_err().to_string();
    assert!(refused.contains("it has more than 200 `elif`"), "{refused}");
}

#[test]
fn a_conversation_too_long_for_any_stack_is_rendered_all_the_same() {
    let messages: Vec<Value> =
        (0..2000).map(|i| json!({"role": "user", "content": format!("number {i}")})).collect();
    let text =
        render("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", &messages);
    let text = text.unwrap();
    assert_eq!(text.lines().count(), 2000);
    assert!(text.lines().enumerate().all(|(i, line)| line == format!("user: number {i}")));
}
