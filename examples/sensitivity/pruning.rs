//! Which weights the network can do without.

use crate::network::{BATCH, ivon};
use serde_json::{Value, json};
use std::path::Path;
use tch_blr::fisher::Fisher;
use tch_blr::{Ivon, Optimizer, pruning};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::digits::Digits;
use tch_blr_examples::model::{Mlp, accuracy};
use tch_blr_examples::pictures::{self, Curves};

/// Accuracy (%) of the network without its least important weights; biases stay.
pub fn prune(data: &Digits, net: &Mlp, opt: &Optimizer<Ivon>, hess_init: f64, folder: &Path) -> Outcome<Value> {
    let q = opt.posterior()?;
    let few = data.train_images.narrow(0, 0, data.train_images.size()[0].min(2000));
    let fisher = Fisher::exact().diagonal(&net.vs, few.split(500, 0), |x| net.logits(x))?;
    let mut importances = [
        ("magnitude |m|", pruning::magnitude(&net.vs)),
        ("signal to noise |m|√s", q.signal_to_noise()),
        ("Fisher ½m²F", pruning::saliency(&fisher, &net.vs)?),
    ];
    let shares = [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99];
    let score = || accuracy(net, &data.test_images, &data.test_labels).map(|a| 100.0 * a);
    let mut series = Vec::new();
    println!("   {:<24} accuracy (%) without 50, 80, 90, 95 % of the weights", "");
    for (name, importance) in &mut importances {
        importance.retain(|(name, _)| name.ends_with("weight"));
        let mut points = Vec::new();
        for share in shares {
            pruning::prune(importance, share)?.apply(&net.vs)?;
            points.push((100.0 * share, score()?));
            q.copy_mean_to(&net.vs)?;
        }
        let at = |share: f64| points.iter().find(|p| p.0 == 100.0 * share).map_or(f64::NAN, |p| p.1);
        println!("   {name:<24} {:.2}  {:.2}  {:.2}  {:.2}", at(0.5), at(0.8), at(0.9), at(0.95));
        series.push(((*name).to_owned(), points));
    }
    let panel = Curves { y_label: "test accuracy (%)".to_owned(), series: series.clone() };
    pictures::training_curves(&folder.join("pruning.svg"), "weights pruned (%)", &[panel])?;

    // And on with the training of what is left.
    let mask = pruning::prune(&importances[1].1, 0.95)?;
    mask.apply(&net.vs)?;
    let n = data.train_labels.numel();
    let mut opt = ivon(n, n.div_ceil(BATCH) as u64, hess_init).build(&net.vs, 0.1)?;
    for (x, y) in batches(&data.train_images, &data.train_labels, BATCH, 1000, Last::Keep) {
        mask.step(&mut opt, || net.logits(&x).cross_entropy_for_logits(&y))?;
    }
    let trained = score()?;
    println!("   with 5 % of the weights by signal to noise, after another epoch: {trained:.2}");
    Ok(json!({"curves": series, "five_percent_trained_on": trained}))
}
