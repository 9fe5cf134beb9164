//! Leave-one-out loss of a logistic regression: 1,000 exact refits, and estimates of them from the one fit on all data.

use super::{Figure, Job, Section};
use crate::libsvm;
use crate::logistic::{Examples, Logistic, Objective};
use crate::{Outcome, data};
use std::path::Path;
use tch::{Kind, Tensor};
use tch_blr::nn::Likelihood;
use tch_blr::sensitivity::Sensitivity;
use tch_blr::{GaussianPosterior, Prior};

/// Features of the data; index 123 does not occur in the training file.
const COLUMNS: usize = 123;
const EXAMPLES: i64 = 1000;

/// What one δ gives. NLLs in nats per example.
#[derive(Debug)]
pub struct Row {
    /// Precision of the prior.
    pub delta: f64,
    /// On the training data.
    pub train: f64,
    /// By refits.
    pub exact: f64,
    /// f + v e
    pub estimate: f64,
    /// f + v e / (1 - βv)
    pub corrected: f64,
    /// f + v e with the diagonal of the Hessian.
    pub diagonal: f64,
    /// On the test data.
    pub test: f64,
    /// Between estimated and exact changes of the logits.
    pub correlation: f64,
    /// The same of the corrected ones.
    pub corrected_correlation: f64,
    /// Largest share that an example has in its own prediction.
    pub largest_leverage: f64,
    /// Sum of the leverages.
    pub effective_parameters: f64,
    /// Largest |gradient| at a leave-one-out optimum.
    pub residual: f64,
}

/// Precisions of the prior.
pub const DELTAS: [f64; 2] = [0.1, 5.0];

/// Reference values (an independent computation of the same optima), in the order of [`Row::numbers`].
pub const REFERENCE: [[f64; 10]; 2] = [
    [0.3056, 0.3936, 0.3636, 0.3871, 0.3819, 0.3717, 0.9147, 0.9924, 0.672, 72.1],
    [0.3417, 0.3747, 0.3725, 0.3745, 0.3859, 0.3413, 0.9995, 1.0000, 0.162, 36.5],
];

impl Row {
    /// What [`Row::numbers`] are.
    pub const NAMES: [&str; 10] = [
        "training NLL",
        "leave-one-out NLL, exact",
        "f + ve",
        "f + ve/(1-βv)",
        "f + ve, diagonal Hessian",
        "test NLL",
        "correlation of ve",
        "correlation of ve/(1-βv)",
        "largest leverage",
        "sum of leverages",
    ];

    /// In the order of [`Row::NAMES`].
    pub fn numbers(&self) -> [f64; 10] {
        [
            self.train,
            self.exact,
            self.estimate,
            self.corrected,
            self.diagonal,
            self.test,
            self.correlation,
            self.corrected_correlation,
            self.largest_leverage,
            self.effective_parameters,
        ]
    }
}

/// From the folder with a7a and a7a_test.
pub fn run(folder: &Path) -> Outcome<Vec<Row>> {
    let all = libsvm::load(&folder.join("a7a"), COLUMNS)?;
    let test = libsvm::load(&folder.join("a7a_test"), COLUMNS)?;
    let train = all.select(&(0..EXAMPLES).collect::<Vec<_>>());
    DELTAS.iter().map(|&delta| row(delta, &train, &test)).collect()
}

fn row(delta: f64, train: &Examples, test: &Examples) -> Outcome<Row> {
    let model = Logistic::new(train.x.size()[1]);
    model.fit(&Objective::new().decay(&model, delta)?.loss(train)?)?;
    let full = model.full_laplace(&train.x, &model.isotropic(delta)?)?;
    let diagonal = model.laplace(&train.x, Prior::isotropic(delta))?;
    let s = of(&full, &model, train)?;
    let (shift, corrected) = (s.shift()?, s.leave_one_out_shift()?);
    let (truth, residual) = refits(&model.weights(), train, delta)?;
    let d = of(&diagonal, &model, train)?;
    Ok(Row {
        delta,
        train: s.nll(&shift.zeros_like())?,
        exact: s.nll(&truth)?,
        estimate: s.nll(&shift)?,
        corrected: s.nll(&corrected)?,
        diagonal: d.nll(&d.shift()?)?,
        test: Objective::new().loss(test)?.value(&model)? / test.len() as f64,
        correlation: correlation(&shift, &truth),
        corrected_correlation: correlation(&corrected, &truth),
        largest_leverage: s.leverage()?.max().double_value(&[]),
        effective_parameters: s.effective_parameters()?,
        residual,
    })
}

fn of(q: &impl GaussianPosterior, model: &Logistic, on: &Examples) -> Outcome<Sensitivity> {
    Ok(Sensitivity::of(q, model.params(), [(&on.x, &on.y)], Likelihood::Bernoulli, |x| model.forward(x))?)
}

/// The change of each example's logit when the model is fitted to the others, and the largest gradient that is left.
///
/// All N problems at once: row i of W is the weights without example i, and every iteration is a Newton step with the
/// Hessian at the optimum of all, from which the curvature of example i is taken (Sherman and Morrison). That converges
/// linearly, and to the same weights as a Newton's method for each of them.
fn refits(w: &Tensor, on: &Examples, delta: f64) -> Outcome<(Tensor, f64)> {
    let _no_grad = tch::no_grad_guard();
    let (x, y) = (&on.x, &on.y);
    let n = on.len() as i64;
    let f = x.mv(w);
    let p = f.sigmoid();
    let beta = &p - p.square();
    let like = (Kind::Double, x.device());
    let hessian = x.tr().matmul(&(x * beta.unsqueeze(1))) + Tensor::eye(w.size()[0], like) * delta;
    // Row i: H⁻¹xᵢ
    let solved = x.tr().cholesky_solve(&hessian.linalg_cholesky(false), false).tr();
    let inverse = Tensor::eye(w.size()[0], like).cholesky_solve(&hessian.linalg_cholesky(false), false);
    let leverage = &beta * (x * &solved).sum_dim_intlist(1, false, None::<Kind>);
    let others = 1.0 - Tensor::eye(n, like);
    let mut weights = w.unsqueeze(0).repeat([n, 1]);
    let mut residual = f64::INFINITY;
    for _ in 0..400 {
        // Row i: the errors of all examples at the weights without i, its own set to zero.
        let errors = (weights.matmul(&x.tr()).sigmoid() - y) * &others;
        let gradient = errors.matmul(x) + &weights * delta;
        residual = gradient.abs().max().double_value(&[]);
        if residual < 1e-9 {
            break;
        }
        let along: Tensor = &beta * (&gradient * &solved).sum_dim_intlist(1, false, None::<Kind>) / (1.0 - &leverage);
        weights -= gradient.matmul(&inverse) + &solved * along.unsqueeze(1);
    }
    if residual >= 1e-9 {
        return Err(format!("the refits did not converge: a gradient of {residual:e} is left").into());
    }
    Ok(((x * weights).sum_dim_intlist(1, false, None::<Kind>) - f, residual))
}

fn correlation(a: &Tensor, b: &Tensor) -> f64 {
    Tensor::stack(&[a, b], 0).corrcoef().double_value(&[0, 1])
}

/// The table beside the reference.
///
/// # Errors
/// If the data are not there, or an optimum is not found.
pub fn table(_: &Job) -> Outcome<Section> {
    let data = data::folder_with("adult")?;
    let found = run(&data.join("adult"))?;
    let mut figures = Vec::new();
    for (row, reference) in found.iter().zip(REFERENCE) {
        for ((name, ours), published) in Row::NAMES.iter().zip(row.numbers()).zip(reference) {
            let row = format!("δ = {}: {name}", row.delta);
            figures.push(Figure { row, published: Some(published), ours, sd: None, seeds: 1, seconds: None });
        }
    }
    let residual = found.iter().map(|row| row.residual).fold(1e-9, f64::max);
    let line = |i: usize| {
        let cells = found.iter().zip(REFERENCE).map(|(row, reference)| {
            let digits = if i < 8 { 4 } else { 3 };
            format!("{:.digits$} ({})", row.numbers()[i], reference[i])
        });
        [Row::NAMES[i].to_owned()].into_iter().chain(cells).collect()
    };
    Ok(Section {
        title: "Leave-one-out loss on Adult".to_owned(),
        text: format!(
            "Logistic regression on the first 1,000 rows of a7a with ½δ‖w‖², in f64, refits to gradients below \
             {residual:.0e}; in brackets the reference values, computed by an independent program. The \
             memory-perturbation equation knows the leave-one-out loss from the one fit on all data; taking an \
             example's own curvature out as well (1-βv) matters where leverages are large."
        ),
        header: [String::new()].into_iter().chain(found.iter().map(|row| format!("δ = {}", row.delta))).collect(),
        rows: (0..Row::NAMES.len()).map(line).collect(),
        figures,
    })
}
