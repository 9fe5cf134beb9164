//! Two fine-tunes of one posterior, merged by adding natural parameters.

use crate::Outcome;
use crate::digits::{Digits, subset};
use crate::model::{Mlp, accuracy, train};
use serde_json::{Map, Value, json};
use tch::Tensor;
use tch_blr::{Builder, DiagonalGaussian, Rule, Schedule, Von, combine};

const BASE_EXAMPLES: i64 = 2000;
const BASE_EPOCHS: u64 = 10;
const EPOCHS: u64 = 2;
const BATCH: usize = 128;
const LR: f64 = 0.01;

/// VOGN, whose curvature is never negative: a fine-tune only adds precision, so that any merge has a positive one. Ten
/// times as many examples as there are (a cold posterior), because so small a base is too noisy to learn otherwise.
fn vogn(examples: i64, epochs: u64) -> Builder<Von> {
    let steps = (examples as u64).div_ceil(BATCH as u64);
    let vogn = Von::vogn().ess(10.0 * examples as f64).hess_init(0.01).damping(1e-3).beta2(0.99);
    vogn.builder().schedule(Schedule::WarmupCosine { warmup: steps / 2, total: epochs * steps })
}

pub fn run(data: &Digits) -> Outcome<Value> {
    tch::manual_seed(0);
    let net = Mlp::new(&[784, 100, 100, 10]);
    let rest = data.train_labels.numel() as i64 - BASE_EXAMPLES;
    let of_base = |t: &Tensor| t.narrow(0, 0, BASE_EXAMPLES);
    let (x, y) = (data.train_images.narrow(0, BASE_EXAMPLES, rest), data.train_labels.narrow(0, BASE_EXAMPLES, rest));

    let mut opt = vogn(BASE_EXAMPLES, BASE_EPOCHS).build(&net.vs, LR)?;
    let base_data = (&of_base(&data.train_images), &of_base(&data.train_labels));
    train("base (2,000 examples)", &net, &mut opt, base_data, (BASE_EPOCHS, BATCH), 0)?;
    let base = opt.posterior()?;

    let fine_tune = |what: &str, digits: &[i64]| -> Outcome<DiagonalGaussian> {
        base.copy_mean_to(&net.vs)?;
        let half = subset(&y, digits);
        let (x, y) = (x.index_select(0, &half), y.index_select(0, &half));
        let mut opt = vogn(y.size()[0], EPOCHS).prior(&base).build(&net.vs, LR)?;
        train(what, &net, &mut opt, (&x, &y), (EPOCHS, BATCH), 50)?;
        Ok(opt.posterior()?)
    };
    let low = fine_tune("fine-tune on digits 0-4", &[0, 1, 2, 3, 4])?;
    let high = fine_tune("fine-tune on digits 5-9", &[5, 6, 7, 8, 9])?;
    let average = DiagonalGaussian::new(low.names().map(|name| {
        let mean = |q: &DiagonalGaussian| q.mean(name).expect("fine-tunes have the base's parameters").shallow_clone();
        (name.to_owned(), (mean(&low) + mean(&high)) * 0.5, mean(&low).ones_like())
    }))?;
    // Both contain the base once; so does the merge.
    let merged = combine(&[(1.0, &low), (1.0, &high), (-1.0, &base)])?;

    println!("\n  accuracy on all ten digits");
    let mut report = Map::new();
    let models = [
        ("base", &base),
        ("fine-tune on 0-4", &low),
        ("fine-tune on 5-9", &high),
        ("plain average", &average),
        ("posterior merge", &merged),
    ];
    for (name, q) in models {
        q.copy_mean_to(&net.vs)?;
        let accuracy = accuracy(&net, &data.test_images, &data.test_labels)?;
        println!("  {name:<20} {:>6.2} %", 100.0 * accuracy);
        report.insert(name.to_owned(), json!(accuracy));
    }
    Ok(Value::Object(report))
}
