//! The budget buys speed and never changes the result: runs are compared with each other, bit by bit.

use crate::lab::{Lab, smallest_budget, words};

/// Dropout and clipping on, so that both must be independent of the plan too.
const RUN: &str = "--max-length 80 --max-steps 3 --learning-rate 1e-2 --warmup-steps 1 \
    --weight-decay 0.1 --max-grad-norm 0.5 --sample-steps 0";

fn gpt2() -> Lab {
    let sizes = "--arch gpt2 --n-layers 2 --n-heads 2 --hidden-size 32 --context-length 80";
    Lab::with_model(&words(sizes))
}

#[test]
fn budgets_from_unconstrained_to_the_smallest_give_the_same_bits() {
    let lab = gpt2();
    let run = format!("{RUN} --per-device-train-batch-size 6 --dropout 0.1 --threads 2");
    let free = lab.train(&run, "free");
    let refused =
        format!("train --model model --data train.txt --output-dir x {run} --memory 1MiB");
    let error = lab.fail(3, &words(&refused));
    let smallest = smallest_budget(&error);
    let mib: f64 = smallest.trim_end_matches("MiB").parse().unwrap();
    for extra in [0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0] {
        let memory = format!("{}MiB", mib + extra);
        let tight = lab.train(&format!("{run} --memory {memory}"), &memory);
        tight.assert_same_bits(&free, &memory);
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
    let run = format!("{RUN} --per-device-train-batch-size 3");
    let one = lab.train(&format!("{run} --threads 1"), "t1");
    for threads in [2, 3] {
        let more = lab.train(&format!("{run} --threads {threads}"), &format!("t{threads}"));
        more.assert_same_bits(&one, &format!("{threads} threads"));
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
