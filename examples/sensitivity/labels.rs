//! Which labels are wrong.

use crate::network::{BATCH, DRAWS, Evolution, checkpoint, look, network, sensitivities};
use serde_json::{Value, json};
use std::path::Path;
use tch::{Kind, Tensor};
use tch_blr::selection;
use tch_blr::sensitivity::Sensitivity;
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::digits::Digits;
use tch_blr_examples::model::progress;
use tch_blr_examples::pictures::{self, Curves};
use tch_blr_examples::random::Rng;

/// Share of the labels that are made wrong.
pub const NOISE: f64 = 0.05;
const SCORES: [&str; 3] = ["‖v e‖, of the logits", "Σ|e Λ v|, of the predictions", "‖e‖, the error alone"];

/// An epoch, and for each of [`SCORES`] the share of the wrong labels that it finds, with p of the mean and averaged p.
pub type Found = (u64, [[f64; 2]; 3]);

/// Shares of the wrong labels among the 10 % of highest ‖v e‖, Σ|e Λ v| and ‖e‖, each with p of the mean and averaged
/// p, after some epochs.
pub fn wrong_labels(data: &Digits, (epochs, hess_init): (u64, f64), folder: &Path) -> Outcome<Vec<Found>> {
    let mut rng = Rng::new(0, 7);
    let clean: Vec<i64> = Vec::try_from(&data.train_labels)?;
    let noisy: Vec<i64> =
        clean.iter().map(|&y| if rng.unit() < NOISE { (y + 1 + rng.below(9) as i64) % 10 } else { y }).collect();
    let labels = Tensor::from_slice(&noisy);
    let wrong: Vec<bool> = clean.iter().zip(&noisy).map(|(a, b)| a != b).collect();
    let all = wrong.iter().filter(|w| **w).count() as f64;
    let found = |scores: &Tensor| -> Outcome<f64> {
        let suspects = selection::top(scores, wrong.len() / 10)?;
        Ok(suspects.iter().filter(|i| wrong[**i as usize]).count() as f64 / all)
    };
    let (net, mut opt) = network(clean.len(), epochs, hess_init)?;
    let bar = progress("   IVON", epochs);
    let (mut shares, mut evolution) = (Vec::new(), Vec::new());
    for epoch in 0..epochs {
        for (x, y) in batches(&data.train_images, &labels, BATCH, epoch, Last::Keep) {
            opt.step(|| net.logits(&x).cross_entropy_for_logits(&y))?;
        }
        bar.inc(1);
        if checkpoint(epoch + 1, epochs) {
            let s = sensitivities(&net, &opt, &data.train_images, &labels)?;
            let averaged = s.averaged(DRAWS, epoch)?;
            let size = |s: &Sensitivity| s.errors().square().sum_dim_intlist(1, false, Kind::Double).sqrt();
            let both = |f: &dyn Fn(&Sensitivity) -> Outcome<Tensor>| -> Outcome<[f64; 2]> {
                Ok([found(&f(&s)?)?, found(&f(&averaged)?)?])
            };
            let all = [both(&|s| Ok(s.shift_size()?))?, both(&|s| Ok(s.score()?))?, both(&|s| Ok(size(s)))?];
            shares.push((epoch + 1, all));
            evolution.push(look(epoch + 1, &s)?);
        }
    }
    bar.finish();
    draw_evolution(&evolution, &wrong, folder)?;
    draw_found(&shares, folder)?;
    Ok(shares)
}

/// Shares on the terminal.
pub fn print(found: &[Found]) {
    let half = 5 * found.len() + 4;
    println!("   found (%) among the 10 % of highest{:>half$}{:>half$}", "p of the mean", "averaged p");
    let epochs_of = found.iter().map(|(epoch, _)| format!("{epoch:5}")).collect::<Vec<_>>().concat();
    println!("     {:<32}{epochs_of}    {epochs_of}", "after epochs");
    for (i, name) in SCORES.iter().enumerate() {
        let cell = |share: f64| format!("{:5.1}", 100.0 * share);
        let row = |k: usize| found.iter().map(|(_, all)| cell(all[i][k])).collect::<Vec<_>>().concat();
        println!("     {name:<32}{}    {}", row(0), row(1));
    }
}

pub fn json((epoch, [logits, predictions, errors]): &Found) -> Value {
    json!({"epoch": epoch, "logits": logits, "predictions": predictions, "errors": errors})
}

/// Mean sensitivities of the wrong labels, and of the others by what they are at the end.
fn draw_evolution(evolution: &Evolution, wrong: &[bool], folder: &Path) -> Outcome<()> {
    let end = &evolution.last().ok_or("no epoch")?.1;
    // From the most to the least sensitive one at the end.
    let (_, order) = end.sort(0, true);
    let order: Vec<i64> = Vec::try_from(order)?;
    let (bad, good): (Vec<i64>, Vec<i64>) = order.into_iter().partition(|i| wrong[*i as usize]);
    let tenth = good.len() / 10;
    let groups = [
        ("wrong labels", &bad[..]),
        ("right: most sensitive tenth at the end", &good[..tenth]),
        ("right: middle tenth", &good[good.len() / 2 - tenth / 2..][..tenth]),
        ("right: least sensitive tenth", &good[good.len() - tenth..]),
    ];
    let series = groups.map(|(name, which)| {
        let which = Tensor::from_slice(which);
        let mean = |s: &Tensor| s.index_select(0, &which).mean(Kind::Double).double_value(&[]);
        (name.to_owned(), evolution.iter().map(|(epoch, s, _)| (*epoch as f64, mean(s).log10())).collect())
    });
    let panel = Curves { y_label: "log₁₀ of the mean Σ|e Λ v|".to_owned(), series: series.to_vec() };
    pictures::training_curves(&folder.join("evolution.svg"), "epoch", &[panel])
}

fn draw_found(shares: &[Found], folder: &Path) -> Outcome<()> {
    let panels = ["p of the mean", "p averaged"].iter().enumerate().map(|(k, name)| {
        let line = |score: usize| shares.iter().map(|(epoch, all)| (*epoch as f64, 100.0 * all[score][k])).collect();
        let series = SCORES.iter().enumerate().map(|(score, name)| ((*name).to_owned(), line(score)));
        Curves { y_label: format!("wrong labels found (%), {name}"), series: series.collect() }
    });
    pictures::training_curves(&folder.join("found.svg"), "epoch", &panels.collect::<Vec<_>>())
}
