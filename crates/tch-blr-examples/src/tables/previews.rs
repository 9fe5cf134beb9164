//! Previews of weighted training on USPS, by posteriors that know more and more of the curvature.
//!
//! The tasks of [`d4`](super::d4): odd digits against even ones, on {4,5}, {6,7} and {8,9}, after a base on the digits
//! 0-3 whose posterior is the prior N(θ₀, S₀⁻¹) of each. For every weighting α of the tasks with Σα = 1 on a grid we
//! know the exact minimum of Σ α_t l_t + ½(θ-θ₀)ᵀS₀(θ-θ₀), and what the previews have there. Once with squares, l =
//! ½Σ(y - xᵀw)², which a Gaussian describes exactly, and once with logistic losses.

use super::{Figure, Job, Section};
use crate::logistic::{Examples, Logistic, Objective};
use crate::usps::Usps;
use crate::{Outcome, data};
use std::path::Path;
use tch::{Kind, Tensor};
use tch_blr::merge::{self, Preview, Trial};
use tch_blr::{DiagonalGaussian, FullGaussian, Posterior, Result};

const DELTA: f64 = 25.0;
/// Weights: a constant and 256 pixels.
const FEATURES: i64 = 257;
/// The digits of each task.
pub const TASKS: [[u8; 2]; 3] = [[4, 5], [6, 7], [8, 9]];
/// Of α, in the table.
pub const STEPS: usize = 10;

/// What a loss is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// ½(y - xᵀw)²
    Squared,
    /// softplus(xᵀw) - y xᵀw
    Logistic,
}

/// Where θ(α) comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Family {
    /// Training on the weighting itself.
    Exact,
    /// Posteriors with all covariances.
    Full,
    /// The diagonals of their precisions.
    Diagonal,
    /// Σ α_t θ_t
    Isotropic,
}

/// All of them, the best first.
pub const FAMILIES: [(&str, Family); 4] = [
    ("training on each weighting", Family::Exact),
    ("full posteriors", Family::Full),
    ("diagonal posteriors", Family::Diagonal),
    ("isotropic posteriors", Family::Isotropic),
];

/// What one family says at every weighting.
#[derive(Debug)]
pub struct Front {
    /// α, and the sum of each task's losses over its examples, in nats.
    pub trials: Vec<Trial>,
    /// θ of each.
    pub thetas: Vec<Tensor>,
    /// The mean over the weightings of Σ α_t l_t + ½(θ-θ₀)ᵀS₀(θ-θ₀), in nats: the area under the front of the weighted
    /// losses, per area of the simplex.
    pub area: f64,
}

/// The tasks, their prior and their posteriors.
#[derive(Debug)]
pub struct Previews {
    loss: Loss,
    model: Logistic,
    tasks: Vec<Examples>,
    prior: FullGaussian,
    posteriors: Vec<FullGaussian>,
}

impl Previews {
    /// From a folder that has `usps/`.
    pub fn load(folder: &Path, loss: Loss) -> Outcome<Previews> {
        let train = Usps::load(folder, "train")?;
        let parity = |digits: &[u8]| {
            let some = train.of(digits);
            Examples { x: some.features(), y: some.odd() }
        };
        let model = Logistic::new(FEATURES);
        let nothing = model.isotropic(DELTA)?;
        let tasks: Vec<Examples> = TASKS.iter().map(|digits| parity(digits)).collect();
        let mut previews = Previews { loss, model, tasks, prior: nothing, posteriors: Vec::new() };
        previews.prior = previews.posterior(&[(1.0, &parity(&[0, 1, 2, 3]))])?;
        previews.posteriors =
            previews.tasks.iter().map(|task| previews.posterior(&[(1.0, task)])).collect::<Outcome<Vec<_>>>()?;
        Ok(previews)
    }

    /// Of Σ α l under the present prior: the exact minimum and the Hessian there.
    fn posterior(&self, weighted: &[(f64, &Examples)]) -> Outcome<FullGaussian> {
        let start = self.prior.mean_vector();
        let name = self.prior.names().next().expect("one parameter");
        let named = |mean: &Tensor, precision: &Tensor| FullGaussian::new([(name, mean.view([1, -1]))], precision);
        if self.loss == Loss::Squared {
            let mut precision = self.prior.precision_matrix().copy();
            let mut scaled = precision.mv(&start);
            for (alpha, on) in weighted {
                precision += on.x.tr().matmul(&on.x) * *alpha;
                scaled += on.x.tr().mv(&on.y) * *alpha;
            }
            let mean = scaled.unsqueeze(1).cholesky_solve(&precision.linalg_cholesky(false), false).squeeze_dim(1);
            return Ok(named(&mean, &precision)?);
        }
        self.model.set(&start);
        let mut objective = Objective::new().after(&self.prior);
        for (alpha, on) in weighted.iter().filter(|(alpha, _)| *alpha > 0.0) {
            objective = objective.weighted_loss(on, *alpha)?;
        }
        self.model.fit(&objective)?;
        let w = self.model.weights();
        let mut precision = self.prior.precision_matrix().copy();
        for (alpha, on) in weighted {
            let p = tch::no_grad(|| self.model.forward(&on.x)).sigmoid();
            precision += on.x.tr().matmul(&(&on.x * (&p - p.square()).unsqueeze(1))) * *alpha;
        }
        Ok(named(&w, &precision)?)
    }

    /// The sum over the examples of each task at the model's weights, `[T]`.
    fn losses(&self) -> Tensor {
        let of = |on: &Examples| {
            let f = self.model.forward(&on.x);
            match self.loss {
                Loss::Squared => (&f - &on.y).square().sum(Kind::Double) * 0.5,
                Loss::Logistic => (f.softplus() - &on.y * &f).sum(Kind::Double),
            }
        };
        Tensor::stack(&self.tasks.iter().map(of).collect::<Vec<_>>(), 0)
    }

    /// Over all weightings in steps of 1/`steps`.
    pub fn front(&self, family: Family, steps: usize) -> Outcome<Front> {
        match family {
            Family::Exact => self.by(steps, |alpha| {
                let weighted: Vec<_> = alpha.iter().copied().zip(&self.tasks).collect();
                // An optimum that is not found is no error of the crate, and its own type has no place for one.
                self.posterior(&weighted).map_err(|e| tch_blr::Error::Loss(e.to_string()))
            }),
            Family::Full => self.previews(steps, &self.prior, &self.posteriors),
            Family::Diagonal => self.diagonal_previews(steps, FullGaussian::diagonal),
            Family::Isotropic => self.diagonal_previews(steps, |q| {
                let entry = |name| q.mean(name).map(|mean| (name, mean.copy(), mean.ones_like()));
                DiagonalGaussian::new(q.names().filter_map(entry))
            }),
        }
    }

    fn diagonal_previews(
        &self,
        steps: usize,
        of: impl Fn(&FullGaussian) -> Result<DiagonalGaussian>,
    ) -> Outcome<Front> {
        self.previews(steps, &of(&self.prior)?, &self.posteriors.iter().map(&of).collect::<Result<Vec<_>>>()?)
    }

    fn previews<Q: Preview>(&self, steps: usize, prior: &Q::Merged, tasks: &[Q]) -> Outcome<Front> {
        let tasks: Vec<&Q> = tasks.iter().collect();
        self.by(steps, |alpha| merge::preview(prior, &tasks, alpha))
    }

    fn by<Q: Posterior>(&self, steps: usize, mut preview: impl FnMut(&[f64]) -> Result<Q>) -> Outcome<Front> {
        let mut thetas = Vec::new();
        let weightings = merge::simplex(self.tasks.len(), steps);
        let means = |alpha: &[f64]| {
            let q = preview(alpha)?;
            Ok(q.names().filter_map(|name| Some((name.to_owned(), q.mean(name)?))).collect())
        };
        let trials = merge::sweep(self.model.params(), weightings, means, || {
            thetas.push(self.model.weights());
            self.losses()
        })?;
        let objective = |(trial, theta): (&Trial, &Tensor)| {
            let moved = theta - self.prior.mean_vector();
            let penalty = 0.5 * moved.dot(&self.prior.precision_matrix().mv(&moved)).double_value(&[]);
            trial.alpha.iter().zip(&trial.losses).map(|(alpha, loss)| alpha * loss).sum::<f64>() + penalty
        };
        let area = trials.iter().zip(&thetas).map(objective).sum::<f64>() / trials.len() as f64;
        Ok(Front { trials, thetas, area })
    }
}

/// The areas under the fronts, beside that of training on every weighting.
///
/// # Errors
/// If the data are not there, or an optimum is not found.
pub fn table(_: &Job) -> Outcome<Section> {
    let folder = data::folder_with("usps")?;
    let (mut rows, mut figures) = (Vec::new(), Vec::new());
    for (name, loss) in [("squares", Loss::Squared), ("logistic", Loss::Logistic)] {
        let previews = Previews::load(&folder, loss)?;
        let fronts = FAMILIES.map(|(label, family)| Ok((label, previews.front(family, STEPS)?)));
        let fronts = fronts.into_iter().collect::<Outcome<Vec<_>>>()?;
        let exact = &fronts[0].1;
        for (label, front) in &fronts {
            let far = front.thetas.iter().zip(&exact.thetas);
            let far = far.map(|(a, b)| ((a - b).norm() / b.norm()).double_value(&[])).fold(0.0, f64::max);
            let efficient = front.trials.iter().filter(|trial| trial.efficient).count();
            rows.push(vec![
                format!("{name}: {label}"),
                format!("{:.3}", front.area),
                format!("{:.3}", front.area - exact.area),
                format!("{far:.1e}"),
                format!("{efficient} of {}", front.trials.len()),
            ]);
            let row = format!("{name}: {label}: area");
            figures.push(Figure { row, published: None, ours: front.area, sd: None, seeds: 1, seconds: None });
        }
    }
    Ok(Section {
        title: "Previews of weighted training on USPS".to_owned(),
        text: format!(
            "Three tasks (odd against even digits, of 4/5, 6/7 and 8/9), each trained once after a base on 0-3, and every \
             weighting Σα = 1 in steps of 1/{STEPS}. Area: mean over the weightings of the weighted loss with the \
             prior's term, in nats; distance: the largest relative distance from the weights that training on a \
             weighting finds; efficient: weightings that no other of the same row beats in all three losses. Isotropic \
             posteriors are the average Σ α_t θ_t. Everything in f64, and training to the exact optimum."
        ),
        header: ["", "area", "above training", "distance", "efficient"].map(str::to_owned).into(),
        rows,
        figures,
    })
}
