//! The prior over the weights: isotropic, or yesterday's posterior.
//!
//! Here belong a prior's forms, the checks that it fits a model and a row, and its restriction to a block of weights.
//! What a step does with it is the row's.

mod closest;
mod gaussian;

pub(crate) use gaussian::Layout;
use gaussian::Precision;
pub use gaussian::{BlockPrior, Family};

use crate::kernel;
use crate::linalg::matrix_shape;
use crate::params::Leaf;
use crate::posterior::{BlockPrecision, DiagonalGaussian, FullGaussian, KroneckerGaussian, Posterior};
use crate::{Error, Params, Result, check};
use std::any::Any;
use tch::{Kind, Tensor};

/// The prior N(m₀, P₀⁻¹) of an optimizer, on the scale of the posterior's own precision (not divided by ess).
///
/// An optimizer's `weight_decay` is the shorthand for an isotropic prior of precision P₀ = ess·δ around zero. A
/// `Prior` given to the row's `prior` takes its place. In every step δ = P₀/ess with the ess of that
/// optimizer, so the same posterior serves tasks of different size (`docs/scales.md`).
///
/// Which posterior a row can take as its prior:
///
/// | rows | prior |
/// |---|---|
/// | elementwise, [`DiagonalNewton`](crate::DiagonalNewton) | [`DiagonalGaussian`] |
/// | [`Evon`], [`Soap`], [`NoisyKfac`] | [`DiagonalGaussian`], [`KroneckerGaussian`] |
/// | [`Newton`](crate::Newton), [`FullVon`](crate::FullVon) | all three |
///
/// Any other is an error of `build`; [`KroneckerGaussian::diagonal`] and [`FullGaussian::diagonal`] are the way out,
/// and for a [`LowRankGaussian`](crate::LowRankGaussian), which no row takes, its
/// [`marginals`](crate::LowRankGaussian::marginals).
///
/// [`Evon`]: crate::Evon
/// [`Soap`]: crate::Soap
/// [`NoisyKfac`]: crate::NoisyKfac
#[derive(Debug)]
pub struct Prior {
    form: Form,
    elsewhere: Option<f64>,
}

#[derive(Debug)]
enum Form {
    Isotropic {
        precision: f64,
    },
    /// Parameters are independent.
    Product {
        family: Family,
        parameters: Vec<Known>,
    },
    /// With one precision `[n, n]` over all parameters.
    Full {
        parameters: Vec<Known>,
        precision: Tensor,
    },
}

/// A parameter of the prior.
#[derive(Debug)]
struct Known {
    name: String,
    size: Vec<i64>,
    mean: Tensor,
    /// By itself.
    precision: Precision,
}

impl Prior {
    /// N(0, 1/precision) for every weight; precision ≥ 0, otherwise building the optimizer is an error. The same as a
    /// weight decay of precision/ess, and it stays so when ess changes. In [`AdamW`](crate::AdamW), whose decay is
    /// not a prior, it acts beside the decay.
    pub fn isotropic(precision: f64) -> Self {
        Prior { form: Form::Isotropic { precision }, elsewhere: None }
    }

    /// For a prior built from a posterior: parameters that the posterior does not know (new heads) get the isotropic
    /// prior N(0, 1/(ess·δ)), δ ≥ 0, instead of being an error. No effect on an isotropic prior.
    #[must_use]
    pub fn elsewhere(self, delta: f64) -> Self {
        let elsewhere = (!matches!(self.form, Form::Isotropic { .. })).then_some(delta);
        Prior { elsewhere, ..self }
    }

    /// P₀ of N(0, P₀⁻¹); `None` if the prior is a posterior.
    pub(crate) fn isotropic_precision(&self) -> Option<f64> {
        if let Form::Isotropic { precision } = self.form { Some(precision) } else { None }
    }

    fn parameters(&self) -> &[Known] {
        match &self.form {
            Form::Isotropic { .. } => &[],
            Form::Product { parameters, .. } | Form::Full { parameters, .. } => parameters,
        }
    }

    /// Whether it says something about this parameter.
    pub(crate) fn knows(&self, leaf: &Leaf) -> bool {
        let known = || self.parameters().iter().any(|known| leaf.names.contains(&known.name));
        matches!(self.form, Form::Isotropic { .. }) || self.elsewhere.is_some() || known()
    }

    fn family(&self) -> Family {
        match self.form {
            Form::Isotropic { .. } => Family::Diagonal,
            Form::Product { family, .. } => family,
            Form::Full { .. } => Family::Full,
        }
    }

    /// Errors if a number is out of range, if the posterior has a parameter that the model lacks, or if this row does
    /// not take a posterior of its family.
    pub(crate) fn check(&self, params: &Params, row: &str, widest: Family) -> Result<()> {
        if let Form::Isotropic { precision } = self.form {
            return Isotropic::Precision(precision).validate();
        }
        self.elsewhere.map_or(Ok(()), |delta| Isotropic::Delta(delta).validate())?;
        // `Family` is ordered from the narrowest, and each contains those before it.
        if self.family() > widest {
            return Err(Error::Posterior(format!(
                "{row} takes a prior that is {}, and this one is {}; `.diagonal()` of the posterior keeps the diagonal \
                 of its precision",
                widest.describe(),
                self.family().describe(),
            )));
        }
        self.parameters().iter().find(|known| params.find(&known.name).is_none()).map_or(Ok(()), |known| {
            Err(Error::parameter(
                &known.name,
                "the prior has it and the model does not; leave it out with posterior.select(..)",
            ))
        })
    }

    /// The prior of one block of parameters, whose mean has this shape and kind. `ess` is that of the row, for what
    /// [`Prior::elsewhere`] says.
    pub(crate) fn of(&self, leaves: &[&Leaf], shape: &[i64], kind: Kind, ess: Option<f64>) -> Result<PriorOf> {
        let _no_grad = tch::no_grad_guard();
        if let Form::Isotropic { precision } = self.form {
            return Ok(PriorOf::Isotropic(Isotropic::Precision(precision)));
        }
        let mut parts = Vec::with_capacity(leaves.len());
        for leaf in leaves {
            let known = self.parameters().iter().position(|known| leaf.names.contains(&known.name));
            if known.is_none() && self.elsewhere.is_none() {
                let problem = "the prior does not know it; give such parameters an isotropic prior with .elsewhere(δ)";
                return Err(Error::parameter(leaf.name(), problem));
            }
            if let Some(size) = known.map(|i| &self.parameters()[i].size).filter(|size| **size != leaf.tensor.size()) {
                let problem = format!("the prior has shape {size:?} and the model {:?}", leaf.tensor.size());
                return Err(Error::parameter(leaf.name(), problem));
            }
            parts.push(known);
        }
        // A number, not a tensor: δ then stays the same when ess changes, which an ess·δ written into a precision
        // would not.
        if let (true, Some(delta)) = (parts.iter().all(Option::is_none), self.elsewhere) {
            return Ok(PriorOf::Isotropic(Isotropic::Delta(delta)));
        }
        let like = Tensor::f_empty([0], (kind, leaves[0].tensor.device()))?;
        // One parameter keeps its basis; only joint blocks need a precision over all their weights. A joint row's block
        // of one parameter is a vector, in which a Kronecker-factored precision has no form.
        let alone = leaves.len() == 1 && matrix_shape(shape) == matrix_shape(&leaves[0].tensor.size());
        if let ([Some(i)], true) = (&parts[..], alone) {
            let Known { mean, precision, .. } = &self.parameters()[*i];
            return Ok(PriorOf::Gaussian(BlockPrior::new(mean.f_reshape(shape)?, precision).like(&like)));
        }
        let (mean, precision) = self.joint(leaves, &parts, check::ess(ess)? * self.elsewhere.unwrap_or(0.0))?;
        Ok(PriorOf::Gaussian(BlockPrior::new(mean, &precision).like(&like)))
    }

    /// P₀ of one parameter for N examples, elementwise, of a prior that is isotropic or diagonal.
    pub(crate) fn diagonal_of(&self, leaf: &Leaf, examples: f64) -> Result<Tensor> {
        let prior = self.of(&[leaf], &leaf.tensor.size(), leaf.state_kind(), Some(examples))?;
        Ok(match (&prior, prior.diagonal()) {
            (_, Some((_, precision))) => precision,
            (PriorOf::Isotropic(isotropic), None) => {
                kernel::filled(&leaf.tensor.to_kind(leaf.state_kind()), isotropic.precision(examples))
            }
            (PriorOf::Gaussian(_), None) => {
                let problem =
                    "its prior is not diagonal; `.diagonal()` of the posterior keeps the diagonal of its precision";
                return Err(Error::parameter(leaf.name(), problem));
            }
        })
    }

    /// Mean `[n]` and precision of several parameters, one after the other; those that are not known have N(0, 1/p).
    fn joint(&self, leaves: &[&Leaf], known: &[Option<usize>], p: f64) -> Result<(Tensor, Precision)> {
        // In f64: parameters of different kinds meet here, and the result is rounded once, by the caller.
        let like = (Kind::Double, leaves[0].tensor.device());
        let wide = |t: &Tensor| t.to_device(like.1).to_kind(like.0);
        let n: Vec<i64> = leaves.iter().map(|leaf| leaf.tensor.numel() as i64).collect();
        let means = known.iter().zip(&n).map(|(known, n)| match known {
            Some(i) => wide(&self.parameters()[*i].mean).f_reshape([-1]),
            None => Tensor::f_zeros([*n], like),
        });
        let mean = Tensor::f_cat(&means.collect::<std::result::Result<Vec<_>, _>>()?, 0)?;
        if self.family() == Family::Diagonal {
            let diagonals = known.iter().zip(&n).map(|(known, n)| match known {
                Some(i) => self.parameters()[*i].precision.diagonal().map(|d| wide(&d)),
                None => Ok(Tensor::f_full([*n], p, like)?),
            });
            let diagonal = Tensor::f_cat(&diagonals.collect::<Result<Vec<_>>>()?, 0)?;
            return Ok((mean, Precision::vector(&diagonal)));
        }
        // Where each parameter starts in the block, and in the prior.
        let starts =
            |n: &[i64]| n.iter().scan(0, |end, n| Some(std::mem::replace(end, *end + n))).collect::<Vec<i64>>();
        let here = starts(&n);
        let there = starts(&self.parameters().iter().map(|k| k.mean.numel() as i64).collect::<Vec<_>>());
        let whole = Tensor::f_zeros([mean.size()[0]; 2], like)?;
        for (i, row) in known.iter().enumerate() {
            for (j, column) in known.iter().enumerate() {
                let block = match (&self.form, row, column) {
                    (Form::Full { precision, .. }, Some(a), Some(b)) => {
                        precision.f_narrow(0, there[*a], n[i])?.f_narrow(1, there[*b], n[j])?
                    }
                    // Not reached for a full prior, whose block (a, a) the arm above has taken.
                    (_, Some(a), _) if i == j => self.parameters()[*a].precision.dense()?,
                    (_, None, _) if i == j => Tensor::f_eye(n[i], like)? * p,
                    // Different parameters of a product are independent, and what the prior does not know is
                    // independent of all: zero.
                    _ => continue,
                };
                whole.f_narrow(0, here[i], n[i])?.f_narrow(1, here[j], n[j])?.f_copy_(&wide(&block))?;
            }
        }
        Ok((mean, Precision::Full(whole)))
    }
}

impl From<&DiagonalGaussian> for Prior {
    fn from(q: &DiagonalGaussian) -> Self {
        Prior::product(Family::Diagonal, q, |name| q.block(name))
    }
}

impl From<&KroneckerGaussian> for Prior {
    fn from(q: &KroneckerGaussian) -> Self {
        Prior::product(Family::Kronecker, q, |name| q.block(name))
    }
}

impl From<&FullGaussian> for Prior {
    fn from(q: &FullGaussian) -> Self {
        let of = |name: &str| {
            let (mean, precision) = (q.mean(name)?, Precision::Full(q.precision(name)?));
            Some(Known { name: name.to_owned(), size: mean.size(), mean, precision })
        };
        let parameters = q.names().filter_map(of).collect();
        Prior { form: Form::Full { parameters, precision: q.precision_matrix().copy() }, elsewhere: None }
    }
}

impl Prior {
    fn product(family: Family, q: &dyn Posterior, block: impl Fn(&str) -> Option<(Tensor, BlockPrecision)>) -> Self {
        let of = |name: &str| {
            let (mean, precision) = block(name)?;
            Some(Known {
                name: name.to_owned(),
                size: q.mean(name)?.size(),
                mean,
                precision: Precision::Block(precision),
            })
        };
        Prior { form: Form::Product { family, parameters: q.names().filter_map(of).collect() }, elsewhere: None }
    }
}

impl TryFrom<&dyn Posterior> for Prior {
    type Error = Error;

    /// From a posterior whose family was chosen at run time, if it is a Gaussian.
    fn try_from(q: &dyn Posterior) -> Result<Self> {
        // A trait object cannot be matched by family; `Posterior: Any` can be asked for its type.
        let q: &dyn Any = q;
        let diagonal = q.downcast_ref::<DiagonalGaussian>().map(Prior::from);
        let kronecker = || q.downcast_ref::<KroneckerGaussian>().map(Prior::from);
        let full = || q.downcast_ref::<FullGaussian>().map(Prior::from);
        diagonal.or_else(kronecker).or_else(full).ok_or_else(|| {
            Error::Posterior(
                "a prior must be a diagonal, Kronecker-factored or full Gaussian, and this posterior is not one; of a \
                 LowRankGaussian take .marginals() or .diagonal()"
                    .to_owned(),
            )
        })
    }
}

macro_rules! owned {
    ($($Q:ty)*) => {
        $(impl From<$Q> for Prior {
            fn from(q: $Q) -> Self {
                Prior::from(&q)
            }
        })*
    };
}
owned!(DiagonalGaussian KroneckerGaussian FullGaussian);

/// The prior of one parameter, or of one block of parameters.
#[derive(Debug)]
pub enum PriorOf {
    Isotropic(Isotropic),
    /// With P₀, not divided by ess.
    Gaussian(BlockPrior),
}

/// N(0, 1/(ess·δ)), told apart by what stays fixed when a hyper-parameter changes.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub enum Isotropic {
    /// δ is the row's weight decay.
    WeightDecay,
    /// δ is this.
    Delta(f64),
    /// ess·δ is this.
    Precision(f64),
}

impl Isotropic {
    /// δ in a row with this weight decay and effective sample size.
    pub(crate) fn delta(self, weight_decay: f64, ess: Option<f64>) -> f64 {
        match self {
            Isotropic::WeightDecay => weight_decay,
            Isotropic::Delta(delta) => delta,
            // The driver refuses such a prior to rows without ess. Should that fail, a NaN is found by the checks of
            // the step, and a guessed 1 would not be.
            Isotropic::Precision(precision) => precision / ess.unwrap_or(f64::NAN),
        }
    }

    /// P₀ for N examples; a weight decay belongs to an optimizer, and contributes nothing here.
    pub(crate) fn precision(self, examples: f64) -> f64 {
        match self {
            Isotropic::WeightDecay => 0.0,
            Isotropic::Delta(delta) => examples * delta,
            Isotropic::Precision(precision) => precision,
        }
    }

    pub(crate) fn validate(self) -> Result<()> {
        match self {
            Isotropic::WeightDecay => Ok(()),
            Isotropic::Delta(delta) => check::non_negative("elsewhere", delta),
            Isotropic::Precision(precision) => check::non_negative("prior precision", precision),
        }
    }
}

impl PriorOf {
    /// m₀ and P₀ of a posterior that is diagonal.
    pub(crate) fn diagonal(&self) -> Option<(&Tensor, Tensor)> {
        if let PriorOf::Gaussian(prior) = self { prior.diagonal() } else { None }
    }

    pub(crate) fn is_posterior(&self) -> bool {
        matches!(self, PriorOf::Gaussian(_))
    }
}

/// Shape of a parameter as a block by itself: the matrix of its rows, or a vector if it has fewer than two dimensions.
pub(crate) fn block_shape(shape: &[i64]) -> Vec<i64> {
    if shape.len() < 2 { vec![shape.iter().product()] } else { matrix_shape(shape).to_vec() }
}
