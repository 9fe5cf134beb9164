//! Natural parameters of either sign.

use super::layout::{Layout, Part};
use super::moments::{Moments, joined, times};
use crate::fisher::{DiagonalFisher, FullFisher};
use crate::params::Leaf;
use crate::{Error, Params, Result, linalg};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// (v, V): the natural parameters of exp(θᵀv - ½θᵀVθ), a linear term and a precision over named parameters.
///
/// It is what the data of one client say about the weights. V may have either sign, so this need not be a posterior. V
/// is diagonal, in the shapes of the parameters, or one matrix over all weights, which lie one after the other in
/// order. Everything is held in f64.
///
/// A loss ½θᵀHθ - bᵀθ, summed over the examples, has the dual (b, H). A Fisher information F at the weights θ̂ has the
/// dual (Fθ̂, F), by `Dual::from(&fisher)`.
#[derive(Debug)]
pub struct Dual {
    pub(super) layout: Arc<Layout>,
    /// v `[n]`
    pub(super) linear: Tensor,
    /// V: its diagonal `[n]`, or the matrix `[n, n]`
    pub(super) precision: Tensor,
}

impl Dual {
    /// From (name, v, diagonal of V) of each parameter.
    ///
    /// # Errors
    /// No entry, a name twice, shapes that differ, values that are not finite.
    pub fn diagonal<S: Into<String>>(entries: impl IntoIterator<Item = (S, Tensor, Tensor)>) -> Result<Self> {
        let (mut linear, mut precisions) = (Vec::new(), Vec::new());
        for (name, v, precision) in entries {
            let name = name.into();
            if v.size() != precision.size() {
                let (v, precision) = (v.size(), precision.size());
                return Err(Error::parameter(&name, format!("v has shape {v:?} and V {precision:?}")));
            }
            precisions.push(precision);
            linear.push((name, v));
        }
        let (layout, linear) = placed(&linear)?;
        Dual { layout, linear, precision: joined(&precisions)?.detach() }.finite("dual")
    }

    /// From (name, v) of each parameter and V `[n, n]` over the weights of all.
    ///
    /// # Errors
    /// No entry, a name twice, a matrix of another shape or that is not symmetric, values that are not finite.
    pub fn full<S: Into<String>>(linear: impl IntoIterator<Item = (S, Tensor)>, precision: &Tensor) -> Result<Self> {
        let (layout, linear) = placed(&linear.into_iter().map(|(name, v)| (name.into(), v)).collect::<Vec<_>>())?;
        let n = layout.len();
        if precision.size() != [n, n] {
            let problem = format!("V has shape {:?}: expected [{n}, {n}] for {n} weights", precision.size());
            return Err(Error::Posterior(problem));
        }
        let precision = precision.detach().f_to_kind(Kind::Double)?.f_to_device(linear.device())?;
        let dual = Dual { layout, linear, precision }.finite("dual")?;
        dual.check_symmetric()?;
        Ok(dual)
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.layout.parts.iter().map(|p| p.name.as_str())
    }

    /// v of one parameter, in its shape.
    pub fn linear(&self, name: &str) -> Option<Tensor> {
        let (p, first, n) = self.layout.place(name)?;
        Some(self.linear.narrow(0, first, n).copy().view(&p.shape[..]))
    }

    /// V of one parameter: its diagonal in the parameter's shape, or its block `[k, k]` of the matrix.
    pub fn precision(&self, name: &str) -> Option<Tensor> {
        let (p, first, n) = self.layout.place(name)?;
        let part = self.precision.narrow(0, first, n);
        Some(if part.dim() == 1 { part.copy().view(&p.shape[..]) } else { part.narrow(1, first, n).copy() })
    }

    /// v of all weights, `[n]`, one parameter after the other.
    pub fn linear_vector(&self) -> Tensor {
        self.linear.copy()
    }

    /// V over all weights: its diagonal `[n]`, or `[n, n]`.
    pub fn precision_matrix(&self) -> Tensor {
        self.precision.copy()
    }

    /// No information at all, in the form of these moments.
    pub(super) fn zero(like: &Moments) -> Self {
        let (linear, precision) = (like.mean.zeros_like(), like.precision.zeros_like());
        Dual { layout: like.layout.clone(), linear, precision }
    }

    /// x (v, V)
    pub(super) fn times(&self, x: f64) -> Self {
        Dual { layout: self.layout.clone(), linear: &self.linear * x, precision: &self.precision * x }
    }

    /// (v, V) + x (v', V') for one of the same layout and form.
    pub(super) fn plus(&self, x: f64, other: &Dual) -> Self {
        Dual {
            layout: self.layout.clone(),
            linear: &self.linear + &other.linear * x,
            precision: &self.precision + &other.precision * x,
        }
    }

    /// The sum of this and of all others.
    pub(super) fn plus_all<'a>(&self, others: impl IntoIterator<Item = &'a Dual>) -> Self {
        others.into_iter().fold(self.times(1.0), |sum, dual| sum.plus(1.0, dual))
    }

    /// The Gaussian of these natural parameters.
    ///
    /// # Errors
    /// [`Error::NotPositiveDefinite`]; `what` names the precision.
    pub(super) fn moments(&self, what: &str) -> Result<Moments> {
        let mean = if self.precision.dim() == 1 {
            self.check_positive(what)?;
            &self.linear / &self.precision
        } else {
            linalg::solve(&linalg::cholesky(what, &self.precision)?, &self.linear)?
        };
        Ok(Moments { layout: self.layout.clone(), mean, precision: self.precision.shallow_clone() })
    }

    fn check_positive(&self, what: &str) -> Result<()> {
        if self.precision.numel() == 0 {
            return Ok(());
        }
        let least = self.precision.argmin(0, false).int64_value(&[]);
        let value = self.precision.double_value(&[least]);
        // Written so that a NaN fails, too.
        if value.partial_cmp(&0.0) == Some(std::cmp::Ordering::Greater) {
            return Ok(());
        }
        let problem = format!(
            "an element becomes {value:e}; a smaller step of the duals (their `damping`) takes less away at a time"
        );
        let what = format!("{what} of parameter `{}`", self.layout.owner(least));
        Err(Error::NotPositiveDefinite { what, problem })
    }

    pub(super) fn check_symmetric(&self) -> Result<()> {
        let v = &self.precision;
        if v.numel() > 0 {
            let (skew, scale) = ((v - v.tr()).abs().max().double_value(&[]), v.abs().max().double_value(&[]));
            if skew > 1e-6 * scale {
                return Err(Error::Posterior(format!("V differs from its transpose by {skew:e}")));
            }
        }
        Ok(())
    }

    /// Errors if a value is not finite.
    pub(super) fn finite(self, what: &str) -> Result<Self> {
        for (t, part) in [(&self.linear, "linear term"), (&self.precision, "precision")] {
            let bad = t.isfinite().logical_not();
            if bad.any().int64_value(&[]) == 1 {
                let rows = if bad.dim() == 1 { bad } else { bad.any_dim(1, false) };
                let first = rows.to_kind(Kind::Int64).argmax(0, false).int64_value(&[]);
                let problem = format!("the {part} of its {what} is not finite");
                return Err(Error::parameter(self.layout.owner(first), problem));
            }
        }
        Ok(self)
    }

    /// With the parameters in the order of another layout.
    ///
    /// # Errors
    /// Other parameters.
    pub(super) fn precision_in(&self, layout: &Arc<Layout>, whose: &str) -> Result<Tensor> {
        // `arranged` is a permutation, and does not care what the vector is.
        let as_moments = Moments {
            layout: self.layout.clone(),
            mean: self.linear.shallow_clone(),
            precision: self.precision.shallow_clone(),
        };
        Ok(as_moments.arranged(layout, whose)?.precision)
    }

    fn of_fisher(solution: &Params, precision: Tensor) -> Self {
        let _no_grad = tch::no_grad_guard();
        let part = |l: &Leaf| Part::new(l.name(), &l.tensor);
        let layout = Arc::new(Layout { parts: solution.leaves().iter().map(part).collect() });
        let theta = joined(solution.leaves().iter().map(|l| &l.tensor)).expect("the Fisher information has parameters");
        let linear = times(&precision, &theta);
        Dual { layout, linear, precision }
    }
}

/// One vector from named tensors.
fn placed(linear: &[(String, Tensor)]) -> Result<(Arc<Layout>, Tensor)> {
    if linear.is_empty() {
        return Err(Error::Posterior("it has no parameter".to_owned()));
    }
    let layout = Layout { parts: linear.iter().map(|(name, v)| Part::new(name, v)).collect() };
    if layout.checked_len().is_none() {
        return Err(Error::Posterior("a parameter is given twice".to_owned()));
    }
    Ok((Arc::new(layout), joined(linear.iter().map(|(_, v)| v))?.detach()))
}

/// (Fθ̂, F) at the weights θ̂ where F was computed.
impl From<&DiagonalFisher> for Dual {
    fn from(f: &DiagonalFisher) -> Self {
        let parts = f.solution().leaves().iter().map(|l| f.get(l.name()).expect("its name"));
        let precision = joined(parts).expect("the Fisher information has parameters");
        Dual::of_fisher(f.solution(), precision)
    }
}

/// (Fθ̂, F) at the weights θ̂ where F was computed.
impl From<&FullFisher> for Dual {
    fn from(f: &FullFisher) -> Self {
        Dual::of_fisher(f.solution(), f.matrix().to_kind(Kind::Double).copy())
    }
}
