//! The frontier on real models with a fixed machine.
use ounce_ir::{Graph, OptimizerKind};
use ounce_models::Purpose;
use ounce_plan::{Frontier, PlanOptions, explain};
use ounce_program::{FixedMachine, StepShape};

fn training_graph(model: &str, clip: bool) -> Graph {
    let config = ounce_models::preset(model).unwrap();
    let forward = ounce_models::build(&config, Purpose::Loss, 0.0).unwrap();
    let both = ounce_passes::differentiate(&forward).unwrap();
    ounce_passes::attach_optimizer(&both, OptimizerKind::AdamW, clip).unwrap()
}

#[test]
fn gpt2_scan() {
    let graph = training_graph("gpt2", false);
    let machine = FixedMachine::default();
    let t = std::time::Instant::now();
    let f = Frontier::solve(&graph, &StepShape::new(4, 1024), &machine, &PlanOptions::default());
    println!("solve {:?}", t.elapsed());
    let n = f.points().count();
    println!("{n} points, smallest {}", f.smallest_bytes());
    for (b, t) in f.points().step_by(1.max(n / 20)) {
        println!("{:.1} MiB {t:.3} s", b as f64 / 1048576.0);
    }
    let t = std::time::Instant::now();
    for b in [u64::MAX, 4 << 30, 3 << 30, 2500 << 20, 2 << 30, f.smallest_bytes()] {
        let p = f.plan(b).unwrap();
        println!("{}", explain(&p));
    }
    println!("plan {:?}", t.elapsed());
}
