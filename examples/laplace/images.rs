//! The last layer of a trained network, its evidence and its prior precision, on all training images.

use serde_json::{Value, json};
use std::time::Instant;
use tch_blr::fisher::Fisher;
use tch_blr::laplace::{Laplace, Link, PriorSearch};
use tch_blr::{Adam, Params, metrics};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::digits::Digits;
use tch_blr_examples::model::{Mlp, train};

const EPOCHS: u64 = 3;
/// Weight decay of the training is this over N; the search starts there.
const PRECISION: f64 = 10.0;

pub fn run() -> Outcome<Value> {
    let data = Digits::load()?;
    let n = data.train_labels.numel();
    tch::manual_seed(0);
    let net = Mlp::new(&[784, 100, 10]);
    let mut adam = Adam::default().weight_decay(PRECISION / n as f64).build(&net.vs, 1e-3)?;
    train("784-100-10, Adam", &net, &mut adam, (&data.train_images, &data.train_labels), (EPOCHS, 128), 0)?;

    let started = Instant::now();
    let pairs = batches(&data.train_images, &data.train_labels, 1000, 0, Last::Keep);
    let f = Fisher::exact().kronecker(Params::from(&net.vs).last_layer()?, pairs, |x| net.logits(x))?;
    let mut laplace = Laplace::new(f, PRECISION)?;
    let before = laplace.log_evidence()?;
    let tuned = laplace.optimize_prior(&PriorSearch::mackay())?;
    let seconds = started.elapsed().as_secs_f64();
    let p = laplace.precisions().next().map_or(f64::NAN, |(_, p)| p);
    println!("\nLast layer of {n} images ({}): {} weights", data.source, laplace.len());
    println!("   log evidence {before:.1} nats at p = {PRECISION}, {:.1} at p = {p:.3}", tuned.log_evidence);
    println!(
        "   {:.1} effective parameters; {:.2} s for curvature, evidence and search",
        tuned.effective_parameters, seconds
    );
    if let Some(warning) = tuned.warning() {
        println!("   {warning}");
    }
    let started = Instant::now();
    let output = laplace.predict(&net.vs, || net.logits(&data.test_images))?;
    let predicted = started.elapsed().as_secs_f64();
    let mut rows = vec![("MAP", net.probabilities(&data.test_images))];
    for (name, link) in [
        ("probit", Link::Probit),
        ("pairwise", Link::PairwiseProbit),
        ("bridge", Link::Bridge),
        ("Monte Carlo", Link::MonteCarlo { samples: 100, seed: 0 }),
    ] {
        rows.push((name, output.probabilities(link)?));
    }
    println!(
        "   {:.2} s for {} predictions\n\n              accuracy     NLL     ECE",
        predicted,
        data.test_labels.numel()
    );
    let mut scores = Vec::new();
    for (name, p) in rows {
        let (accuracy, nll) = (metrics::accuracy(&p, &data.test_labels)?, metrics::nll(&p, &data.test_labels)?);
        let ece = metrics::reliability(&p, &data.test_labels, 15)?.ece();
        println!("   {name:<12} {accuracy:>7.4} {nll:>8.4} {ece:>7.4}");
        scores.push(json!({"prediction": name, "accuracy": accuracy, "nll": nll, "ece": ece}));
    }
    Ok(json!({
        "data": data.source,
        "seconds": {"curvature_evidence_search": seconds, "predictions": predicted},
        "precision": p,
        "log_evidence": {"before": before, "after": tuned.log_evidence},
        "effective_parameters": tuned.effective_parameters,
        "off_mode": tuned.off_mode,
        "test": scores,
    }))
}
