//! The structures of a curvature that Laplace's approximation can have, and their blocks.

use super::Laplace;
use super::block::{Basis, Block};
use crate::fisher::{DiagonalFisher, FullFisher, KroneckerFisher, LowRankFisher, Seen, SubsetFisher, eigen};
use crate::likelihood::{Labels, Likelihood};
use crate::{DiagonalGaussian, Error, FullGaussian, Params, Posterior, Result};
use tch::{Kind, Tensor};

/// A Fisher information of any structure.
#[derive(Debug)]
#[non_exhaustive]
pub enum Curvature {
    /// Of every weight by itself.
    Diagonal(DiagonalFisher),
    /// Of every layer, as a Kronecker product.
    Kronecker(KroneckerFisher),
    /// Of all weights together.
    Full(FullFisher),
    /// Of some single weights together.
    Subset(SubsetFisher),
    /// Its leading eigenvectors.
    LowRank(LowRankFisher),
}

macro_rules! of_any {
    ($self:ident, $f:ident => $value:expr) => {
        match $self {
            Curvature::Diagonal($f) => $value,
            Curvature::Kronecker($f) => $value,
            Curvature::Full($f) => $value,
            Curvature::Subset($f) => $value,
            Curvature::LowRank($f) => $value,
        }
    };
}

macro_rules! from {
    ($($Form:ident $F:ident)*) => {
        $(impl From<$F> for Curvature {
            fn from(f: $F) -> Self {
                Curvature::$Form(f)
            }
        })*
    };
}
from!(Diagonal DiagonalFisher Kronecker KroneckerFisher Full FullFisher Subset SubsetFisher LowRank LowRankFisher);

/// All elements in f64, one tensor after the other.
pub(super) fn flat(tensors: &[Tensor]) -> Result<Tensor> {
    let each = tensors.iter().map(|t| t.f_to_kind(Kind::Double)?.f_reshape([-1]));
    Ok(Tensor::f_cat(&each.collect::<std::result::Result<Vec<_>, _>>()?, 0)?)
}

impl Curvature {
    pub(super) fn solution(&self) -> &Params {
        of_any!(self, f => f.solution())
    }

    pub(super) fn seen(&self) -> &Seen {
        of_any!(self, f => f.seen())
    }

    pub(super) fn likelihood(&self) -> Likelihood {
        of_any!(self, f => f.likelihood())
    }

    pub(super) fn active(&self) -> Option<&[i64]> {
        of_any!(self, f => f.active())
    }

    /// Errors unless there is a noise whose inverse H is proportional to.
    pub(super) fn check_noise(&self) -> Result<()> {
        if of_any!(self, f => f.labels()) == Labels::Observed {
            return Err(Error::Likelihood(
                "the curvature is of observed labels, which does not go with 1/σ²: take Fisher::exact or \
                 Fisher::sampled to change or search the noise"
                    .to_owned(),
            ));
        }
        if matches!(self.likelihood(), Likelihood::Gaussian { .. }) {
            return Ok(());
        }
        Err(Error::Likelihood(format!("{:?} has no noise σ² to be changed: only a Gaussian has", self.likelihood())))
    }

    /// Where each parameter's weights are among all, one after the other.
    fn starts(&self) -> Vec<i64> {
        let sizes = self.solution().leaves().iter().map(|leaf| leaf.tensor.numel() as i64);
        sizes.scan(0, |end, n| Some(std::mem::replace(end, *end + n))).collect()
    }

    /// With the offset from a prior mean of 0.
    pub(super) fn blocks(&self, precision: f64) -> Result<Vec<Block>> {
        let leaves = self.solution().leaves();
        let device = leaves.first().map_or(tch::Device::Cpu, |leaf| leaf.tensor.device());
        let starts = self.starts();
        // Places of one parameter's weights.
        let range = |i: usize| {
            Tensor::f_arange_start(starts[i], starts[i] + leaves[i].tensor.numel() as i64, (Kind::Int64, device))
        };
        let name = |i: usize| leaves[i].name().to_owned();
        let number = |name: &str| self.solution().number(name).ok_or_else(|| Error::parameter(name, "it is unknown"));
        let weights = |i: usize, h: &Tensor| {
            let values = h.f_to_kind(Kind::Double)?.f_reshape([-1])?;
            Block::new(vec![name(i)], range(i)?, Basis::Weights, values, precision)
        };
        let everything = |places: Tensor, basis: Tensor, values: Tensor| {
            let names = leaves.iter().map(|leaf| leaf.name().to_owned()).collect();
            Ok::<_, Error>(vec![Block::new(names, places, Basis::Vectors(basis), values, precision)?])
        };
        let all = || {
            Ok::<_, Error>(Tensor::f_arange(
                starts.last().map_or(0, |s| s + leaves[leaves.len() - 1].tensor.numel() as i64),
                (Kind::Int64, device),
            )?)
        };
        let mut blocks = match self {
            Curvature::Diagonal(f) => {
                let of = |i: usize| weights(i, f.get(leaves[i].name()).unwrap_or(&leaves[i].tensor.zeros_like()));
                (0..leaves.len()).map(of).collect::<Result<Vec<_>>>()?
            }
            Curvature::Kronecker(f) => {
                let mut blocks = Vec::new();
                for layer in f.layers() {
                    let w = number(&layer.weight)?;
                    let out = leaves[w].tensor.size()[0];
                    let mut names = vec![name(w)];
                    let mut places = range(w)?.f_reshape([out, -1])?;
                    if let Some(bias) = &layer.bias {
                        let b = number(bias)?;
                        names.push(name(b));
                        // [W b]: the bias is the last column.
                        places = Tensor::f_cat(&[places, range(b)?.f_unsqueeze(1)?], 1)?;
                    }
                    let ((g, left), (a, right)) = (eigen(&layer.outputs)?, eigen(&layer.inputs)?);
                    let values = g.f_outer(&a)?.f_reshape([-1])?;
                    let basis = Basis::Kronecker { left, right, g, a };
                    blocks.push(Block::new(names, places.f_reshape([-1])?, basis, values, precision)?);
                }
                for (i, leaf) in leaves.iter().enumerate() {
                    if let Some(h) = f.diagonal(leaf.name()) {
                        blocks.push(weights(i, h)?);
                    }
                }
                blocks
            }
            Curvature::Full(f) => {
                let (values, vectors) = eigen(f.matrix())?;
                everything(all()?, vectors, values)?
            }
            Curvature::Subset(f) => {
                let (values, vectors) = eigen(f.matrix())?;
                everything(f.places().shallow_clone(), vectors, values)?
            }
            Curvature::LowRank(f) => everything(all()?, f.vectors().shallow_clone(), f.values().shallow_clone())?,
        };
        let offset = flat(&leaves.iter().map(|leaf| leaf.tensor.shallow_clone()).collect::<Vec<_>>())?;
        let gradient = self.seen().fit.as_ref().and_then(|fit| fit.gradient.as_ref()).map(|g| flat(g)).transpose()?;
        for block in &mut blocks {
            block.set_offset(&offset)?;
            if let Some(gradient) = &gradient {
                block.set_gradient(gradient)?;
            }
        }
        Ok(blocks)
    }
}

impl Laplace {
    /// N(m, S⁻¹) at the present precisions and noise, to be sampled, saved, merged, or a prior.
    ///
    /// Of a Kronecker-factored curvature it leaves out what is known of a weight and its bias together, as
    /// [`KroneckerFisher::laplace`] says; [`Laplace::predict`] and the evidence do not.
    ///
    /// # Errors
    /// A curvature of single weights or of low rank, for which there is no posterior of this crate: predict with
    /// [`Laplace::predict`].
    pub fn posterior(&self) -> Result<Box<dyn Posterior>> {
        let _no_grad = tch::no_grad_guard();
        let scale = self.scale();
        let precision =
            |name: &str| self.blocks.iter().find(|b| b.names.iter().any(|n| n == name)).map_or(0.0, |b| b.precision);
        let leaves = self.curvature.solution().leaves();
        Ok(match &self.curvature {
            Curvature::Diagonal(f) => {
                let entries = leaves.iter().map(|leaf| {
                    let zero = leaf.tensor.zeros_like();
                    let s = f.get(leaf.name()).unwrap_or(&zero) * scale + precision(leaf.name());
                    (leaf.name(), leaf.tensor.copy(), s)
                });
                Box::new(DiagonalGaussian::new(entries)?)
            }
            Curvature::Kronecker(f) => Box::new(f.with_precisions(scale, precision)?),
            Curvature::Full(f) => {
                let n = f.matrix().size()[0];
                let p0 = Tensor::f_eye(n, (Kind::Double, f.matrix().device()))? * self.blocks[0].precision;
                let means = leaves.iter().map(|leaf| (leaf.name(), leaf.tensor.copy()));
                Box::new(FullGaussian::new(means, &(f.matrix() * scale + p0))?)
            }
            Curvature::Subset(_) | Curvature::LowRank(_) => {
                return Err(Error::Posterior(
                    "a curvature of single weights or of low rank has no posterior of its own; predict with \
                     Laplace::predict(..), or take Fisher::diagonal, kronecker or full"
                        .to_owned(),
                ));
            }
        })
    }
}
