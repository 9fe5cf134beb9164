//! The prior over the weights: isotropic, or yesterday's posterior.

mod gaussian;

pub use gaussian::BlockPrior;
pub use gaussian::Family;
pub(crate) use gaussian::Layout;
use gaussian::Precision;

use crate::params::Leaf;
use crate::posterior::{DiagonalGaussian, FullGaussian, KroneckerGaussian, KroneckerParameter, matrix_shape};
use crate::{Error, Params, Result, check};
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
/// | [`Evon`](crate::Evon), [`Soap`](crate::Soap), [`NoisyKfac`](crate::NoisyKfac) | [`DiagonalGaussian`], [`KroneckerGaussian`] |
/// | [`Newton`](crate::Newton), [`FullVon`](crate::FullVon) | all three |
///
/// Any other is an error of `build`; [`KroneckerGaussian::diagonal`] and [`FullGaussian::diagonal`] are the way out.
#[derive(Debug)]
pub struct Prior {
    form: Form,
    elsewhere: Option<f64>,
}

#[derive(Debug)]
enum Form {
    Isotropic { precision: f64 },
    Diagonal(DiagonalGaussian),
    Kronecker(Vec<KroneckerParameter>),
    Full(FullGaussian),
}

impl Prior {
    /// N(0, 1/precision) for every weight; precision ≥ 0, otherwise building the optimizer is an error. The same as a
    /// weight decay of precision/ess, and it stays so when ess changes. In [`AdamW`](crate::AdamW), whose decay is not a
    /// prior, it acts beside the decay.
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

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match &self.form {
            Form::Isotropic { .. } => Box::new(std::iter::empty()),
            Form::Diagonal(q) => Box::new(q.names()),
            Form::Kronecker(q) => Box::new(q.iter().map(|p| p.name.as_str())),
            Form::Full(q) => Box::new(q.names()),
        }
    }

    fn family(&self) -> Family {
        match self.form {
            Form::Isotropic { .. } | Form::Diagonal(_) => Family::Diagonal,
            Form::Kronecker(_) => Family::Kronecker,
            Form::Full(_) => Family::Full,
        }
    }

    /// Errors if a number is out of range, if the posterior has a parameter that the model does not have, or if it is not
    /// of a family that this row takes.
    pub(crate) fn check(&self, params: &Params, row: &str, widest: Family) -> Result<()> {
        if let Form::Isotropic { precision } = self.form {
            return Isotropic::Precision(precision).validate();
        }
        self.elsewhere.map_or(Ok(()), |delta| Isotropic::Delta(delta).validate())?;
        if self.family() > widest {
            return Err(Error::Posterior(format!(
                "{row} takes a prior that is {}, and this one is {}; `.diagonal()` of the posterior keeps the diagonal of \
                 its precision",
                widest.describe(),
                self.family().describe(),
            )));
        }
        self.names().find(|name| params.find(name).is_none()).map_or(Ok(()), |name| {
            Err(Error::parameter(
                name,
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
            let name = leaf.names.iter().find(|name| self.names().any(|n| n == name.as_str()));
            match (name, self.elsewhere) {
                (Some(name), _) => parts.push(Some(name.as_str())),
                (None, Some(_)) => parts.push(None),
                (None, None) => {
                    return Err(Error::parameter(
                        leaf.name(),
                        "the prior does not know it; give such parameters an isotropic prior with .elsewhere(δ)",
                    ));
                }
            }
        }
        if let (true, Some(delta)) = (parts.iter().all(Option::is_none), self.elsewhere) {
            return Ok(PriorOf::Isotropic(Isotropic::Delta(delta)));
        }
        for (leaf, name) in leaves.iter().zip(&parts) {
            let size = name.and_then(|name| self.size(name));
            if let Some(size) = size.filter(|size| *size != leaf.tensor.size()) {
                let problem = format!("the prior has shape {size:?} and the model {:?}", leaf.tensor.size());
                return Err(Error::parameter(leaf.name(), problem));
            }
        }
        let device = leaves[0].tensor.device();
        let fit = |t: &Tensor| t.to_device(device).to_kind(kind).contiguous();
        if let ([leaf], [Some(name)]) = (leaves, &parts[..]) {
            let (mean, precision) = self.alone(name, leaf)?;
            return Ok(PriorOf::Gaussian(BlockPrior::new(
                fit(&mean.reshape(shape)),
                precision.map(|diagonal| fit(&diagonal.reshape(shape)), fit),
            )));
        }
        let (mean, precision) = self.joint(leaves, &parts, check::ess(ess)? * self.elsewhere.unwrap_or(0.0))?;
        Ok(PriorOf::Gaussian(BlockPrior::new(fit(&mean), precision.map(fit, fit))))
    }

    /// P₀ of one parameter for N examples, elementwise, of a prior that is isotropic or diagonal.
    pub(crate) fn diagonal_of(&self, leaf: &Leaf, examples: f64) -> Result<Tensor> {
        let prior = self.of(&[leaf], &leaf.tensor.size(), leaf.state_kind(), Some(examples))?;
        Ok(match (&prior, prior.diagonal()) {
            (_, Some((_, precision))) => precision.shallow_clone(),
            (PriorOf::Isotropic(isotropic), None) => leaf.tensor.detach().full_like(isotropic.precision(examples)),
            (PriorOf::Gaussian(_), None) => {
                let problem = "its prior is not diagonal; `.diagonal()` of the posterior keeps the diagonal of its precision";
                return Err(Error::parameter(leaf.name(), problem));
            }
        })
    }

    fn size(&self, name: &str) -> Option<Vec<i64>> {
        match &self.form {
            Form::Isotropic { .. } => None,
            Form::Diagonal(q) => q.entry(name).map(|e| e.mean.size()),
            Form::Kronecker(q) => q.iter().find(|p| p.name == name).map(|p| p.mean.size()),
            Form::Full(q) => q.mean(name).map(|m| m.size()),
        }
    }

    /// Mean and precision of one parameter by itself.
    fn alone(&self, name: &str, leaf: &Leaf) -> Result<(Tensor, Precision)> {
        let missing = || Error::parameter(leaf.name(), "the prior does not know it");
        match &self.form {
            Form::Isotropic { .. } => Err(missing()),
            Form::Diagonal(q) => {
                let entry = q.entry(name).ok_or_else(missing)?;
                Ok((entry.mean.shallow_clone(), Precision::Diagonal(entry.precision.shallow_clone())))
            }
            Form::Kronecker(q) => {
                let p = q.iter().find(|p| p.name == name).ok_or_else(missing)?;
                let [left, right] = [&p.left, &p.right].map(|q| q.as_ref().map(Tensor::shallow_clone));
                Ok((p.mean.shallow_clone(), Precision::Kronecker { left, right, values: p.precision.shallow_clone() }))
            }
            Form::Full(q) => {
                let mean = q.mean(name).ok_or_else(missing)?.flatten(0, -1);
                Ok((mean, Precision::Full(q.block(name, name).ok_or_else(missing)?)))
            }
        }
    }

    /// Mean `[n]` and precision of several parameters, one after the other; those without a name have the prior N(0, 1/p).
    fn joint(&self, leaves: &[&Leaf], names: &[Option<&str>], p: f64) -> Result<(Tensor, Precision)> {
        let like = (Kind::Double, leaves[0].tensor.device());
        let n = |leaf: &Leaf| leaf.tensor.numel() as i64;
        let mut means = Vec::new();
        let mut rows = Vec::new();
        for (i, (leaf, name)) in leaves.iter().zip(names).enumerate() {
            let Some(name) = name else {
                means.push(Tensor::zeros([n(leaf)], like));
                rows.push(vec![(i, Precision::Diagonal(Tensor::full([n(leaf)], p, like)))]);
                continue;
            };
            let (mean, precision) = self.alone(name, leaf)?;
            means.push(mean.to_device(like.1).to_kind(Kind::Double).flatten(0, -1));
            rows.push(match &self.form {
                Form::Full(q) => {
                    let others = names.iter().enumerate().filter_map(|(j, other)| Some((j, q.block(name, (*other)?)?)));
                    others.map(|(j, block)| (j, Precision::Full(block))).collect()
                }
                _ => vec![(i, precision.map(|d| d.flatten(0, -1), Tensor::shallow_clone))],
            });
        }
        let mean = Tensor::f_cat(&means, 0)?;
        let fit = |t: &Tensor| t.to_device(like.1).to_kind(Kind::Double);
        if rows.iter().flatten().all(|(_, x)| matches!(x, Precision::Diagonal(_))) {
            let diagonals = rows.iter().flatten().filter_map(|(_, x)| match x {
                Precision::Diagonal(d) => Some(fit(d)),
                _ => None,
            });
            return Ok((mean, Precision::Diagonal(Tensor::f_cat(&diagonals.collect::<Vec<_>>(), 0)?)));
        }
        let starts: Vec<i64> = leaves.iter().scan(0, |end, leaf| Some(std::mem::replace(end, *end + n(leaf)))).collect();
        let whole = Tensor::zeros([mean.size()[0]; 2], like);
        for (i, blocks) in rows.iter().enumerate() {
            for (j, block) in blocks {
                let place = whole.narrow(0, starts[i], n(leaves[i])).narrow(1, starts[*j], n(leaves[*j]));
                place.shallow_clone().f_copy_(&fit(&block.dense()?))?;
            }
        }
        Ok((mean, Precision::Full(whole)))
    }
}

impl From<&DiagonalGaussian> for Prior {
    fn from(q: &DiagonalGaussian) -> Self {
        Prior { form: Form::Diagonal(q.shallow_clone()), elsewhere: None }
    }
}

impl From<&KroneckerGaussian> for Prior {
    fn from(q: &KroneckerGaussian) -> Self {
        Prior { form: Form::Kronecker(q.parameters().map(KroneckerParameter::shallow_clone).collect()), elsewhere: None }
    }
}

impl From<&FullGaussian> for Prior {
    fn from(q: &FullGaussian) -> Self {
        Prior { form: Form::Full(q.shallow_clone()), elsewhere: None }
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

/// N(0, 1/(ess·δ)), by what stays when a hyper-parameter changes.
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
            Isotropic::Precision(precision) => precision / ess.unwrap_or(f64::NAN),
        }
    }

    /// P₀ for N examples; a weight decay belongs to an optimizer and counts as none.
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
    pub(crate) fn diagonal(&self) -> Option<(&Tensor, &Tensor)> {
        if let PriorOf::Gaussian(prior) = self { prior.diagonal() } else { None }
    }

    pub(crate) fn is_posterior(&self) -> bool {
        matches!(self, PriorOf::Gaussian(_))
    }
}

/// Shape of a parameter as a block of its own: the matrix of its rows, or a vector with fewer than two dimensions.
pub(crate) fn block_shape(shape: &[i64]) -> Vec<i64> {
    if shape.len() < 2 { vec![shape.iter().product()] } else { matrix_shape(shape).to_vec() }
}
