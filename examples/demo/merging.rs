//! Two fine-tunes of one posterior, merged by adding natural parameters.
//!
//! The base knows centred digits. One fine-tune sees shifted 0-4, the other shifted 5-9; wanted is a network for all
//! shifted digits.

use serde_json::{Map, Value, json};
use tch::Tensor;
use tch_blr::{Builder, DiagonalGaussian, Schedule, Von, combine};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::subset;
use tch_blr_examples::digits::{Digits, SIDE};
use tch_blr_examples::model::{Mlp, accuracy, train};

const BASE_EPOCHS: u64 = 3;
/// Images of a fine-tune, at most.
const FINE_TUNE: i64 = 5000;
const BATCH: usize = 128;
/// Pixels to the right and down.
const SHIFT: i64 = 2;

/// VOGN, whose curvature is never negative: a fine-tune only adds precision, so that any merge has a positive one.
fn vogn(examples: i64, epochs: u64) -> Builder<Von> {
    let steps = (examples as u64).div_ceil(BATCH as u64);
    let vogn = Von::vogn().ess(examples as f64).hess_init(0.01).damping(1e-3).beta2(0.99);
    vogn.schedule(Schedule::Cosine { warmup: steps / 2, total: epochs * steps, end: 0.0 })
}

fn shifted(images: &Tensor) -> Tensor {
    let side = SIDE as i64;
    images.view([-1, side, side]).roll([SHIFT, SHIFT], [1, 2]).reshape([-1, side * side])
}

pub fn run(data: &Digits) -> Outcome<Value> {
    tch::manual_seed(0);
    let net = Mlp::new(&[784, 100, 100, 10]);
    let half = data.train_labels.size()[0] / 2;
    let [centred, other] = [0, half].map(|start| data.train_images.narrow(0, start, half));
    let [labels, other_labels] = [0, half].map(|start| data.train_labels.narrow(0, start, half));
    let (wanted, test) = (shifted(&other), shifted(&data.test_images));

    let mut opt = vogn(half, BASE_EPOCHS).build(&net.vs, 0.01)?;
    train("base on centred digits", &net, &mut opt, (&centred, &labels), (BASE_EPOCHS, BATCH), 0)?;
    let base = opt.posterior()?;

    let fine_tune = |what: &str, digits: &[i64]| -> Outcome<DiagonalGaussian> {
        base.copy_mean_to(&net.vs)?;
        let chosen = subset(&other_labels, digits);
        let chosen = chosen.narrow(0, 0, FINE_TUNE.min(chosen.size()[0]));
        let (x, y) = (wanted.index_select(0, &chosen), other_labels.index_select(0, &chosen));
        let mut opt = vogn(y.size()[0], 1).prior(&base).build(&net.vs, 0.003)?;
        train(what, &net, &mut opt, (&x, &y), (1, BATCH), 100)?;
        Ok(opt.posterior()?)
    };
    let low = fine_tune("fine-tune on shifted 0-4", &[0, 1, 2, 3, 4])?;
    let high = fine_tune("fine-tune on shifted 5-9", &[5, 6, 7, 8, 9])?;
    let average = DiagonalGaussian::new(low.names().map(|name| {
        let mean = |q: &DiagonalGaussian| q.mean(name).expect("fine-tunes have the base's parameters");
        (name.to_owned(), (mean(&low) + mean(&high)) * 0.5, mean(&low).ones_like())
    }))?;
    // Both contain the base once; so does the merge.
    let merged = combine(&[(1.0, &low), (1.0, &high), (-1.0, &base)])?;

    println!("\n  accuracy on all ten digits, shifted");
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
        let accuracy = accuracy(&net, &test, &data.test_labels)?;
        println!("  {name:<20} {:>6.2} %", 100.0 * accuracy);
        report.insert(name.to_owned(), json!(accuracy));
    }
    Ok(Value::Object(report))
}
