//! Memory of an optimizer: what it keeps per weight, and that a step in steady state allocates nothing the size of the
//! weights. Alone in its binary, which measures its own process; Linux only, where /proc tells.
#![cfg(target_os = "linux")]

use std::process::Command;
use tch::nn::{Init, VarStore};
use tch::{Device, Tensor};
use tch_blr::rule::Rule;
use tch_blr::{Adam, Derivatives, Ivon, Optimizer, Philox, RmsProp, Sgd, Von};

/// Weights of GPT-2 small.
const GPT2: i64 = 124_439_808;

/// A child process runs one row on so many weights and says what it used.
const ROW: &str = "TCH_BLR_TEST_MEMORY_ROW";
const WEIGHTS: &str = "TCH_BLR_TEST_MEMORY_WEIGHTS";

/// Largest resident memory so far, in bytes.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
}

/// Minor page faults so far: fresh memory from the system shows here, a page at a time.
fn faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // Fields after the command in parentheses: state, then six numbers, then the minor faults.
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(7).unwrap().parse().unwrap()
}

fn run<R: Rule>(rule: R, weights: i64) {
    let vs = VarStore::new(Device::Cpu);
    let squares = rule.statistic() == tch_blr::Statistic::Fisher(tch_blr::Labels::Observed);
    let parts = [weights / 2, weights - weights / 2];
    let w: Vec<Tensor> = (0..2).map(|i| vs.root().var(&format!("w{i}"), &[parts[i]], Init::Const(0.1))).collect();
    let gradients: Vec<Option<Tensor>> = w.iter().map(|w| Some(w.detach().full_like(1e-3))).collect();
    let copy = || gradients.iter().map(|g| g.as_ref().map(Tensor::shallow_clone)).collect();
    let mut opt = rule.builder().noise(Philox { seed: 1 }).build(&vs, 1e-3).unwrap();
    let step = |opt: &mut Optimizer<R>| {
        let squares = if squares { copy() } else { Vec::new() };
        let given = Derivatives { loss: 1.0, examples: None, gradients: copy(), squares };
        opt.perturbed().unwrap().step(given).unwrap();
    };
    step(&mut opt);
    step(&mut opt);
    let before = faults();
    for _ in 0..4 {
        step(&mut opt);
    }
    println!("measured {} {}", peak(), (faults() - before) / 4);
}

#[test]
#[ignore = "not a test: the process that the tests here start"]
fn child() {
    let (Ok(row), Ok(weights)) = (std::env::var(ROW), std::env::var(WEIGHTS)) else { return };
    let weights = weights.parse().unwrap();
    match row.as_str() {
        "sgd" => run(Sgd::default(), weights),
        "rmsprop" => run(RmsProp::default(), weights),
        "adam" => run(Adam::default(), weights),
        "vogn" => run(Von::vogn().ess(1e5), weights),
        _ => run(Ivon::default().ess(1e5), weights),
    }
}

/// Peak memory in bytes and page faults per step.
fn measured(row: &str, weights: i64) -> (f64, u64) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--ignored", "--exact", "child", "--nocapture"]).env(ROW, row).env(WEIGHTS, weights.to_string());
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let numbers = text.lines().find_map(|l| l.split_once("measured ")).unwrap_or_else(|| panic!("{output:?}")).1;
    let (bytes, faults) = numbers.split_once(' ').unwrap();
    (bytes.parse().unwrap(), faults.trim().parse().unwrap())
}

fn check(weights: i64) {
    let (sgd, _) = measured("sgd", weights);
    println!("beside plain SGD, {weights} weights:");
    // v; b and v; b, h and the point of the evaluation.
    for (row, floats) in [("rmsprop", 1.0), ("adam", 2.0), ("vogn", 3.0), ("ivon", 3.0)] {
        let (bytes, faults) = measured(row, weights);
        let found = (bytes - sgd) / (4.0 * weights as f64);
        println!("{row}: {found:.3} floats per weight, {faults} page faults per step");
        // Threads' stacks and bookkeeping are some MB.
        assert!((bytes - sgd) < 4.0 * floats * weights as f64 + 4e6, "{row}: {found} floats per weight, not {floats}");
        let pages = 4 * weights as u64 / 4096;
        assert!(
            faults < pages / 50,
            "{row}: {faults} page faults in a step; a tensor of all weights has {pages} pages"
        );
    }
}

/// Extra memory over plain SGD, and none that comes and goes with each step.
#[test]
fn a_row_keeps_its_state_and_nothing_else() {
    check(1 << 22);
}

/// The same with the weights of GPT-2 small: 2.5 GB for IVON.
#[test]
#[ignore = "gigabytes; make test-statistics"]
fn a_row_keeps_its_state_and_nothing_else_at_124_million_weights() {
    check(GPT2);
}
