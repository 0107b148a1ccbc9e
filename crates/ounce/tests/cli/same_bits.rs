//! The budget buys speed and never changes the result: runs are compared with each other, bit by bit.

use crate::lab::{Lab, smallest_budget, words};

/// Dropout and clipping on, so that both must be independent of the plan too.
const RUN: &str = "--max-length 80 --max-steps 3 --learning-rate 1e-2 --warmup-steps 1 \
    --weight-decay 0.1 --max-grad-norm 0.5 --sample-steps 0";

fn gpt2() -> Lab {
    let sizes = "--arch gpt2 --n-layers 2 --n-heads 2 --hidden-size 32 --context-length 80";
    Lab::with_model(&words(sizes))
}

/// A plan is unrolled: hundreds of micro-batches of a small model are thousands of instructions, which are planned and
/// kept in the same budget.
#[test]
fn many_micro_batches_are_planned_within_the_budget() {
    let lab = Lab::with_model(&words(
        "--arch gpt2 --n-layers 6 --n-heads 2 --hidden-size 16 --context-length 64",
    ));
    // 240 has twenty divisors, each a number of micro-batches with lists of its own.
    for rows in [64, 240, 512] {
        let run = format!(
            "--model model --data train.txt --max-length 64 --per-device-train-batch-size 1 \
             --gradient-accumulation-steps {rows} --threads 1 --max-steps 1 --sample-steps 0"
        );
        let refused = lab.fail(3, &words(&format!("plan {run} --memory 1MiB")));
        let budget = smallest_budget(&refused);
        // Kernels are timed by each run: that takes memory beside planning.
        let _ = std::fs::remove_file(lab.path("cache/costs-1"));
        let lines = lab.json(&words(&format!("train {run} --memory {budget} --output-dir out")));
        let done = lines.last().unwrap();
        let bytes = |key: &str| done[key].as_u64().unwrap();
        assert!(bytes("rss_peak_bytes") <= bytes("budget_bytes"), "{rows} rows: {done}");
        assert!(bytes("rss_peak_bytes") <= bytes("plan_peak_bytes"), "{rows} rows: {done}");
    }
}

#[test]
fn budgets_from_unconstrained_to_the_smallest_give_the_same_bits() {
    let lab = gpt2();
    for precision in PRECISIONS {
        check_budgets(&lab, precision);
    }
}

/// Precisions with everything that must not change a bit in them.
const PRECISIONS: [&str; 3] = ["f32", "bf16", "f16"];

fn check_budgets(lab: &Lab, precision: &str) {
    let run = format!(
        "{RUN} --per-device-train-batch-size 6 --dropout 0.1 --threads 2 --precision {precision}"
    );
    let free = lab.train(&run, &format!("free-{precision}"));
    let refused =
        format!("train --model model --data train.txt --output-dir x {run} --memory 1MiB");
    let error = lab.fail(3, &words(&refused));
    let smallest = smallest_budget(&error);
    let mib: f64 = smallest.trim_end_matches("MiB").parse().unwrap();
    for extra in [0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0] {
        let memory = format!("{}MiB", mib + extra);
        let out = format!("{memory}-{precision}");
        let tight = lab.train(&format!("{run} --memory {memory}"), &out);
        tight.assert_same_bits(&free, &out);
        let (rss, budget) = (&tight.done["rss_peak_bytes"], &tight.done["budget_bytes"]);
        assert!(rss.as_u64() <= budget.as_u64(), "{rss} of {budget}");
    }
    // The very figure works; less is refused, also by a process that has measured nothing yet.
    std::fs::remove_dir_all(lab.path("cache")).unwrap();
    lab.fail(3, &words(&format!("plan --model model {run} --memory {}MiB", mib - 0.0625)));
    let less = (mib * 1048576.0) as u64 - 1;
    lab.fail(3, &words(&format!("plan --model model {run} --memory {less}B")));
    lab.succeed(&words(&format!("plan --model model {run} --memory {mib}MiB")));
}

#[test]
fn threads_give_the_same_bits() {
    let lab = Lab::llama();
    for precision in PRECISIONS {
        let run = format!("{RUN} --per-device-train-batch-size 3 --precision {precision}");
        let one = lab.train(&format!("{run} --threads 1"), &format!("t1-{precision}"));
        for threads in [2, 3] {
            let out = format!("t{threads}-{precision}");
            lab.train(&format!("{run} --threads {threads}"), &out).assert_same_bits(&one, &out);
        }
    }
}

/// Goal: recomputing, accumulating, clipping, scaling and releasing gradients into the update hold
/// together in every precision. Method: every way to cut the rows, in a large and in the smallest
/// budget; without clipping the small plan releases gradients, which f16 never may.
#[test]
fn recompute_accumulation_clipping_and_release_compose_in_every_precision() {
    let lab = Lab::llama();
    for precision in PRECISIONS {
        for clip in ["0", "0.5"] {
            let run = format!(
                "--max-length 64 --max-steps 2 --learning-rate 1e-2 --sample-steps 0 \
                 --precision {precision} --max-grad-norm {clip}"
            );
            let rows = "--per-device-train-batch-size 4 --gradient-accumulation-steps 1";
            let whole = lab.train(&format!("{run} {rows}"), &format!("{precision}-{clip}"));
            let tiny = format!("plan --model model {run} {rows} --memory 1MiB");
            let smallest = smallest_budget(&lab.fail(3, &words(&tiny)));
            let mut released = false;
            for (b, n) in [(4, 1), (2, 2), (1, 4)] {
                let rows =
                    format!("--per-device-train-batch-size {b} --gradient-accumulation-steps {n}");
                for memory in ["1GiB", &smallest] {
                    let line = format!("{run} {rows} --memory {memory}");
                    let out = format!("{precision}-{clip}-{b}-{memory}");
                    lab.train(&line, &out).assert_same_bits(&whole, &out);
                    let plan = lab.json(&words(&format!("plan --model model {line}")));
                    released |= plan[0]["release_gradients"] == true;
                }
            }
            assert_eq!(released, clip == "0" && precision != "f16", "{precision}, clip {clip}");
        }
    }
}

#[test]
fn twelve_by_one_and_three_by_four_are_the_same_run() {
    let lab = gpt2();
    let rows = |b, n| {
        let flags = format!(
            "{RUN} --dropout 0.2 --per-device-train-batch-size {b} --gradient-accumulation-steps {n}"
        );
        lab.train(&flags, &format!("{b}x{n}"))
    };
    let whole = rows(12, 1);
    rows(3, 4).assert_same_bits(&whole, "3 x 4");
    rows(1, 12).assert_same_bits(&whole, "1 x 12");
    // Comparing says something: what does change the mathematics changes the bits.
    let other =
        lab.train(&format!("{RUN} --max-grad-norm 0 --per-device-train-batch-size 12"), "off");
    assert_ne!(other.weights, whole.weights);
}

/// A plan of thousands of instructions leaves much freed heap behind, beside its own tables: the
/// process must still be as small as is declared for it.
#[test]
fn a_deep_model_runs_in_its_smallest_budget() {
    let lab = Lab::empty();
    std::fs::create_dir(lab.path("deep")).unwrap();
    let config = r#"{"model_type": "gpt2", "n_embd": 64, "n_layer": 16, "n_head": 2,
        "n_positions": 1024, "vocab_size": 2048, "activation_function": "gelu_new"}"#;
    std::fs::write(lab.path("deep/config.json"), config).unwrap();
    let run = "bench step --model deep --batch-size 4 --max-length 1024 --warmup 0 --steps 1";
    let smallest = smallest_budget(&lab.fail(3, &words(&format!("{run} --memory 1MiB"))));
    lab.succeed(&words(&format!("{run} --memory {smallest}")));
}
