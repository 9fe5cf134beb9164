//! Sets of classes.

use super::threshold::threshold;
use crate::metrics::inputs::{Probabilities, check, classes, mean, scores, top};
use crate::{Error, Result, kernel};
use tch::{Kind, Tensor};

/// How little a class is expected: `s(c)` for each class of an example with the probabilities p.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Score {
    /// `1 - p(c)` (least ambiguous classifier, also called THR; Sadinle et al. 2019). A set holds the classes with
    /// p(c) ≥ 1-q, and is empty if none has: see [`ClassSets::at_least_argmax`].
    Lac,
    /// `Σ_{p(j) > p(c)} p(j) + u p(c)` (adaptive prediction sets; Romano et al. 2020), with u of [`Uniforms`].
    /// The sets of the most confident examples, p(c) > q, are empty if u = 1: up to α of all, if the model is sure of
    /// most. None is with [`ClassSets::at_least_argmax`].
    Aps,
    /// That, and `λ max(0, rank(c) - k)` (regularized adaptive prediction sets; Angelopoulos et al. 2021); the most
    /// probable class has rank 1, equal ones in the order of their numbers.
    Raps {
        /// λ ≥ 0: what each rank beyond k costs, on the scale of a probability; usual from 0.001 to 0.1.
        lambda: f64,
        /// k: ranks that cost nothing; usual from 1 to 5.
        k_reg: usize,
    },
}

/// u ∈ [0, 1] of each example, which [`Score::Aps`] and [`Score::Raps`] randomize by; [`Score::Lac`] has none.
#[derive(Debug, Clone, Copy)]
pub enum Uniforms<'a> {
    /// u = 1: nothing random, and one set for one example. That costs somewhat larger sets; their guarantee is the
    /// same.
    Ones,
    /// Drawn, example i by the seed and i alone. Take another seed for new examples than for the calibration.
    Seed(u64),
    /// `[N]`
    Given(&'a Tensor),
}

impl Score {
    /// The scores `[N, C]` of all classes, in f64 on the CPU, from probabilities `[N, C]`.
    ///
    /// # Errors
    /// See the [module](crate::conformal#errors); λ that is negative or not finite, u of another shape or not in [0,
    /// 1].
    pub fn of(self, probs: &Tensor, u: Uniforms) -> Result<Tensor> {
        self.of_rows(&Probabilities::read(probs)?, u)
    }

    /// Finds q from the scores of the labels: of examples that the training has not seen, with probabilities `[n, C]`
    /// and labels `[n]`.
    ///
    /// # Errors
    /// As [`Score::of`].
    pub fn calibrate(self, probs: &Tensor, labels: &Tensor, alpha: f64, u: Uniforms) -> Result<ClassSets> {
        let (p, y) = check(probs, labels)?;
        let y = Tensor::from_slice(&y.iter().map(|y| *y as i64).collect::<Vec<_>>()).f_unsqueeze(1)?;
        let of_labels = self.of_rows(&p, u)?.f_gather(1, &y, false)?.f_squeeze_dim(1)?;
        Ok(ClassSets { score: self, q: threshold(&of_labels, alpha)?, classes: p.classes(), argmax: false })
    }

    fn of_rows(self, p: &Probabilities, u: Uniforms) -> Result<Tensor> {
        if let Score::Raps { lambda, .. } = self
            && !(lambda.is_finite() && lambda >= 0.0)
        {
            return Err(Error::Metric(format!("lambda = {lambda}: expected a finite number ≥ 0")));
        }
        let u = u.values(p.examples())?;
        let all: Vec<f64> = p.rows().zip(u).flat_map(|(row, u)| self.of_row(row, u)).collect();
        Ok(Tensor::from_slice(&all).f_reshape([p.examples() as i64, p.classes() as i64])?)
    }

    fn of_row(self, p: &[f64], u: f64) -> Vec<f64> {
        let (price, free) = match self {
            Score::Lac => return p.iter().map(|p| 1.0 - p).collect(),
            Score::Aps => (0.0, 0),
            Score::Raps { lambda, k_reg } => (lambda, k_reg),
        };
        let mut order: Vec<usize> = (0..p.len()).collect();
        // A stable sort, so that equal classes stay in the order of their numbers.
        order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
        let (mut s, mut above, mut rank) = (vec![0.0; p.len()], 0.0, 0_usize);
        for tied in order.chunk_by(|a, b| p[*a] == p[*b]) {
            for &c in tied {
                rank += 1;
                s[c] = above + u * p[c] + price * rank.saturating_sub(free) as f64;
            }
            above += tied.iter().map(|c| p[*c]).sum::<f64>();
        }
        s
    }
}

impl Uniforms<'_> {
    fn values(self, n: usize) -> Result<Vec<f64>> {
        let given = match self {
            Uniforms::Ones => return Ok(vec![1.0; n]),
            Uniforms::Seed(seed) => {
                return Ok((0..n as u64).map(|i| kernel::uniform(seed, kernel::Stream::Conformal, i)).collect());
            }
            Uniforms::Given(u) => scores("u", u)?,
        };
        if given.len() != n {
            return Err(Error::Metric(format!("u has shape [{}]: expected [{n}] to match probs", given.len())));
        }
        match given.iter().position(|u| !(0.0..=1.0).contains(u)) {
            Some(i) => Err(Error::Metric(format!("u[{i}] = {}: expected a number in [0, 1]", given[i]))),
            None => Ok(given),
        }
    }
}

/// What [`Score::calibrate`] found, ready for new examples.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassSets {
    score: Score,
    q: f64,
    classes: usize,
    argmax: bool,
}

impl ClassSets {
    /// Puts the most probable class into every set (the first among ties), so that none is empty. Sets only grow by it,
    /// and so does their coverage.
    #[must_use]
    pub fn at_least_argmax(self) -> Self {
        ClassSets { argmax: true, ..self }
    }

    /// q, or ∞ where there were too few examples for α: then every set holds all classes.
    pub fn threshold(&self) -> f64 {
        self.q
    }

    /// The sets of new examples, `{c: s(c) ≤ q}`, from their probabilities `[N, C]`.
    ///
    /// # Errors
    /// As [`Score::of`]; another number of classes than in the calibration.
    pub fn sets(&self, probs: &Tensor, u: Uniforms) -> Result<Sets> {
        let p = Probabilities::read(probs)?;
        if p.classes() != self.classes {
            let (now, then) = (p.classes(), self.classes);
            return Err(Error::Metric(format!("probs has {now} classes: expected {then}, those of the calibration")));
        }
        let mut members = self.score.of_rows(&p, u)?.f_le(self.q)?;
        if self.argmax {
            let tops: Vec<i64> = p.rows().map(|row| top(row).0 as i64).collect();
            _ = members.f_scatter_value_(1, &Tensor::from_slice(&tops).f_unsqueeze(1)?, 1)?;
        }
        Ok(Sets { members })
    }
}

/// A set of classes for every example. Comes from [`ClassSets::sets`].
#[derive(Debug)]
pub struct Sets {
    members: Tensor,
}

impl Sets {
    /// Whether class c is in the set of example n: `[N, C]` of kind Bool, on the CPU.
    pub fn members(&self) -> &Tensor {
        &self.members
    }

    /// Number of classes in each set, `[N]` of kind Int64.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sizes(&self) -> Result<Tensor> {
        Ok(self.members.f_sum_dim_intlist(1, false, Kind::Int64)?)
    }

    /// Mean number of classes in a set: the smaller, the more the sets say.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn mean_size(&self) -> Result<f64> {
        mean(&self.sizes()?.f_to_kind(Kind::Double)?)
    }

    /// Share of the labels `[N]` that are in their sets: 1-α or more, up to chance.
    ///
    /// # Errors
    /// See the [module](crate::conformal#errors).
    pub fn coverage(&self, labels: &Tensor) -> Result<f64> {
        let [n, c] = [0, 1].map(|d| self.members.size()[d] as usize);
        let y: Vec<i64> = classes("the sets", labels, n, c)?.iter().map(|y| *y as i64).collect();
        let held = self.members.f_gather(1, &Tensor::from_slice(&y).f_unsqueeze(1)?, false)?;
        mean(&held.f_to_kind(Kind::Double)?)
    }
}
