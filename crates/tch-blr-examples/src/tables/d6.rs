//! Snelson's data: a linear regression on Gaussian bumps and the Gaussian process that it is.

use super::{Figure, Job, Section};
use crate::{Outcome, data};
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tch_blr::nn::Likelihood;
use tch_blr::sensitivity::DualView;

const SIGMA: f64 = 0.286;
const DELTA: f64 = 0.1;

/// What is compared.
#[derive(Debug)]
pub struct Found {
    /// Log marginal likelihood with the weights, and with the kernel.
    pub evidence: [f64; 2],
    /// Root mean square error of leave-one-out predictions.
    pub rmse: f64,
    /// Largest difference of y + e/(1-h), e = f - y, from predictions of fits to the other examples.
    pub identity: f64,
    /// Of 20.
    pub effective_parameters: f64,
}

/// Log marginal likelihood and leave-one-out error, by an independent program.
pub const REFERENCE: [f64; 2] = [-67.676_738, 0.292_536];

/// From the folder with `train_inputs` and `train_outputs`.
///
/// # Errors
/// If the data are not there.
pub fn run(folder: &Path) -> Outcome<Found> {
    let (x, y) = (column(&folder.join("train_inputs"))?, column(&folder.join("train_outputs"))?);
    let (features, noise) = (bumps(&x), Likelihood::Gaussian { variance: SIGMA * SIGMA });
    let view = DualView::fitted(&features, &y, noise, DELTA)?;
    let left_out = view.leave_one_out()?;
    let n = y.size()[0];
    let mut identity = 0.0f64;
    for i in 0..n {
        let others = Tensor::from_slice(&(0..n).filter(|j| *j != i).collect::<Vec<_>>());
        let fit = DualView::fitted(&features.index_select(0, &others), &y.index_select(0, &others), noise, DELTA)?;
        let f = fit.predict(&features.narrow(0, i, 1))?.output.double_value(&[0]);
        identity = identity.max((f - left_out.double_value(&[i])).abs());
    }
    Ok(Found {
        evidence: [view.log_marginal_likelihood()?, view.log_marginal_likelihood_of_kernel()?],
        rmse: (left_out - y).square().mean(Kind::Double).sqrt().double_value(&[]),
        identity,
        effective_parameters: view.effective_parameters()?,
    })
}

/// exp(-(x-c)²/(2·0.5²)) for 20 centres c from -1 to 7.
fn bumps(x: &Tensor) -> Tensor {
    let centres = Tensor::linspace(-1.0, 7.0, 20, (Kind::Double, Device::Cpu));
    (-((x.unsqueeze(1) - centres) / 0.5).square() * 0.5).exp()
}

fn column(file: &Path) -> Outcome<Tensor> {
    Ok(Tensor::from_slice(&data::numbers(file)?))
}

/// The table beside the reference.
///
/// # Errors
/// If the data are not there.
pub fn table(_: &Job) -> Outcome<Section> {
    let data = data::folder_with("snelson")?;
    let found = run(&data.join("snelson"))?;
    let rows = [
        ("log marginal likelihood, by the weights (nats)", Some(REFERENCE[0]), found.evidence[0]),
        ("log marginal likelihood, by the kernel (nats)", Some(REFERENCE[0]), found.evidence[1]),
        ("leave-one-out RMSE", Some(REFERENCE[1]), found.rmse),
        ("largest error of the leave-one-out identity", None, found.identity),
        ("effective number of parameters, of 20", None, found.effective_parameters),
    ];
    let cells = |(name, published, ours): &(&str, Option<f64>, f64)| {
        let shown = if ours.abs() < 1e-6 { format!("{ours:.1e}") } else { format!("{ours:.6}") };
        vec![(*name).to_owned(), shown, published.map_or_else(|| "-".to_owned(), |p| format!("{p}"))]
    };
    let figure = |(name, published, ours): &(&str, Option<f64>, f64)| Figure {
        row: (*name).to_owned(),
        published: *published,
        ours: *ours,
        sd: None,
        seeds: 1,
        seconds: None,
    };
    Ok(Section {
        title: "Snelson's data, by weights and by kernel".to_owned(),
        text:
            "Linear regression on 20 Gaussian bumps of width 0.5, σ = 0.286, δ = 0.1, all 200 points: the same model \
               as a Gaussian process, and the leave-one-out predictions that follow from one fit, against 200 fits."
                .to_owned(),
        header: ["", "ours", "reference"].map(str::to_owned).into(),
        rows: rows.iter().map(cells).collect(),
        figures: rows.iter().map(figure).collect(),
    })
}
