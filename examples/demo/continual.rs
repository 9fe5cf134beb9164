//! Yesterday's posterior as today's prior.

use serde_json::{Value, json};
use tch::Kind;
use tch_blr::{DiagonalGaussian, Ivon, Prior, Schedule};
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::{Digits, rotate90};
use tch_blr_examples::model::{Mlp, accuracy, train};

/// Steps per task: three epochs of MNIST.
const STEPS: usize = 1400;
const BATCH: usize = 128;
const LR: f64 = 0.7;

/// β₂ and h₀ such that the precision leaves its start within these steps.
fn ivon(examples: usize) -> Ivon {
    Ivon::default().ess(examples as f64).hess_init(0.03).beta2(0.9995).weight_decay(1e-4)
}

pub fn run(data: &Digits) -> Outcome<Value> {
    let n = data.train_labels.numel();
    let per_epoch = n.div_ceil(BATCH) as u64;
    let epochs = (STEPS as u64).div_ceil(per_epoch);
    let schedule = Schedule::Cosine { warmup: per_epoch / 2, total: epochs * per_epoch, end: 0.0 };
    let (x, y) = (&data.train_images, &data.train_labels);
    let (rotated, rotated_test) = (rotate90(x), rotate90(&data.test_images));

    tch::manual_seed(0);
    let net = Mlp::new(&[784, 100, 100, 10]);
    let mut first = ivon(n).schedule(schedule).build(&net.vs, LR)?;
    train("upright", &net, &mut first, (x, y), (epochs, BATCH), 0)?;
    let sigma = first.diagnostics()?.sigma.expect("IVON has a posterior");
    let yesterday = first.posterior()?;
    let alone = accuracy(&net, &data.test_images, &data.test_labels)?;

    let rotated_after = |what: &str, prior: Option<Prior>| -> Outcome<(f64, f64)> {
        yesterday.copy_mean_to(&net.vs)?;
        let second = ivon(n).schedule(schedule);
        let second = if let Some(prior) = prior { second.prior(prior) } else { second };
        let mut second = second.build(&net.vs, LR)?;
        train(what, &net, &mut second, (&rotated, y), (epochs, BATCH), 100)?;
        let (up, on_side) = (&data.test_images, &rotated_test);
        Ok((accuracy(&net, up, &data.test_labels)?, accuracy(&net, on_side, &data.test_labels)?))
    };
    let with = rotated_after("rotated, with that prior", Some(Prior::from(&yesterday)))?;
    let without = rotated_after("rotated, with an isotropic prior", None)?;
    let uniform = rotated_after("rotated, uniform precision", Some(uniform(&yesterday)?.into()))?;

    let percent = |(upright, rotated): (f64, f64)| format!("{:>6.1} %  {:>6.1} %", 100.0 * upright, 100.0 * rotated);
    println!("\n  {:<40} upright   rotated", "accuracy on");
    println!("  {:<40} {:>6.1} %", "after the upright digits", 100.0 * alone);
    println!("  {:<40} {}", "then rotated, isotropic prior", percent(without));
    println!("  {:<40} {}", "then rotated, uniform precision as prior", percent(uniform));
    println!("  {:<40} {}", "then rotated, the posterior as prior", percent(with));
    println!("  (posterior after the upright digits: σ from {:.1e} to {:.1e})", sigma.min, sigma.max);
    let pair = |(upright, rotated): (f64, f64)| json!({"upright": upright, "rotated": rotated});
    Ok(json!({
        "upright_before": alone,
        "posterior_as_prior": pair(with),
        "uniform_precision": pair(uniform),
        "isotropic_prior": pair(without),
    }))
}

/// The same means, and for all weights the mean of their precisions: what the learned precision adds to "stay close".
fn uniform(q: &DiagonalGaussian) -> tch_blr::Result<DiagonalGaussian> {
    let tensors =
        || q.names().map(|name| (name, q.mean(name).expect("a name of q"), q.precision(name).expect("a name of q")));
    let total: f64 = tensors().map(|(.., s)| s.sum(Kind::Double).double_value(&[])).sum();
    let precision = total / q.len() as f64;
    DiagonalGaussian::new(tensors().map(|(name, m, _)| {
        let s = m.full_like(precision);
        (name, m, s)
    }))
}

/// The point of the second part: at least 30 points of accuracy on the first task.
pub fn check(report: &Value) -> Outcome<()> {
    let upright = |prior: &str| report[prior]["upright"].as_f64().unwrap_or(f64::NAN);
    let gain = 100.0 * (upright("posterior_as_prior") - upright("isotropic_prior"));
    if gain >= 30.0 {
        return Ok(());
    }
    Err(format!(
        "the posterior as prior keeps {gain:.1} points of accuracy on the upright digits: expected at least 30"
    )
    .into())
}
