//! Kronecker factors of a Fisher information, layer by layer.

use super::at::{At, at, finite, parameter};
use super::{Batch, Fisher};
use crate::curvature::{Factored, Factors};
use crate::linalg::{self, matrix_shape};
use crate::prior::Family;
use crate::{Error, IntoTensor, KroneckerGaussian, KroneckerParameter, Params, Prior, Result};
use tch::{Kind, Tensor};

impl Fisher {
    /// One Kronecker product for every layer (K-FAC; Martens and Grosse 2015, Ritter et al. 2018).
    ///
    /// For a weight W `[out, in]` with inputs aᵢ, to which a 1 is appended if there is a bias, and with gᵢ_c the
    /// gradients of sᵢ_cᵀzᵢ by the layer's output for the columns s_c of Λ^½,
    ///
    /// ```text
    /// A = (1/N) Σᵢ aᵢaᵢᵀ    a mean      G = Σᵢ Σ_c gᵢ_c gᵢ_cᵀ    a sum
    /// F of the layer ≈ G ⊗ A            (rows of [W b] one after the other)
    /// ```
    ///
    /// so that the product is a sum over the data. It is exact for one example, and where aaᵀ and ggᵀ are uncorrelated.
    /// In layers with T positions for each example (convolutions, sequences) each position counts as an example: A is a
    /// mean over N·T, G a sum over N·T.
    ///
    /// Parameters that are not the weight or bias of a single call of [`crate::nn::linear`] or [`crate::nn::conv2d`]
    /// without groups (normalizations, embeddings, tied weights, what is used outside of the layers) have their exact
    /// diagonal instead.
    ///
    /// # Errors
    /// As [`Fisher::diagonal`]; [`Error::Parameter`] for a weight that a later batch uses in another way than the
    /// first.
    pub fn kronecker<B: Into<Batch>, L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        model: impl Fn(&Tensor) -> L,
    ) -> Result<KroneckerFisher> {
        let params = Params::separate(params)?;
        let solution = params.at_present();
        let mut parts: Option<Vec<Factored>> = None;
        let seen = self.each(&params, batches, model, |batch, columns| {
            let parts = match &mut parts {
                Some(parts) => parts,
                // The first batch decides which parameters have factors.
                new => new.insert(batch.factored()?),
            };
            batch.add_factors(columns.len(), |c| columns.get(c), parts)
        })?;
        let _no_grad = tch::no_grad_guard();
        let name = |p: usize| solution.leaves()[p].name();
        let (mut layers, mut diagonal) = (Vec::new(), Vec::new());
        for (p, part) in parts.into_iter().flatten().enumerate() {
            match part {
                Factored::Layer(Factors { bias, inputs, outputs, positions }) => {
                    finite(&parameter(name(p)), &inputs, seen.examples)?;
                    finite(&parameter(name(p)), &outputs, seen.examples)?;
                    // Only one side becomes a mean: the product of two sums would count the data twice.
                    let inputs = inputs.f_div_scalar(positions.max(1.0))?;
                    let (weight, bias) = (name(p).to_owned(), bias.map(|q| name(q).to_owned()));
                    layers.push(LayerFactors { weight, bias, inputs, outputs });
                }
                Factored::Bias => {}
                Factored::Diagonal(sum) => {
                    // A parameter without influence (another head) has no curvature, and keeps its prior.
                    let sum = sum.unwrap_or_else(|| solution.leaves()[p].tensor.zeros_like());
                    finite(&parameter(name(p)), &sum, seen.examples)?;
                    diagonal.push((name(p).to_owned(), sum));
                }
            }
        }
        Ok(KroneckerFisher { at: At { solution, seen, fisher: self.clone() }, layers, diagonal })
    }
}

/// A Kronecker-factored Fisher information, from [`Fisher::kronecker`]: a sum over [`KroneckerFisher::examples`]
/// examples.
#[derive(Debug)]
pub struct KroneckerFisher {
    at: At,
    layers: Vec<LayerFactors>,
    diagonal: Vec<(String, Tensor)>,
}

/// The factors of one layer: its Fisher information, summed over the data, is about G ⊗ A.
#[derive(Debug)]
pub struct LayerFactors {
    /// Name of the weight `[out, …]`, a matrix `[out, in]`.
    pub weight: String,
    /// Name of the bias `[out]`, which has the last row and column of A.
    pub bias: Option<String>,
    /// A `[in, in]`, or `[in+1, in+1]` with a bias: the mean of aaᵀ.
    pub inputs: Tensor,
    /// G `[out, out]`: the sum of ggᵀ.
    pub outputs: Tensor,
}

at!(KroneckerFisher);

impl KroneckerFisher {
    /// The layers, in the order of their weights.
    pub fn layers(&self) -> &[LayerFactors] {
        &self.layers
    }

    /// The exact diagonal of one of the parameters that belong to no layer, in its shape.
    pub fn diagonal(&self, name: &str) -> Option<&Tensor> {
        let leaf = self.at.solution.find(name)?;
        self.diagonal.iter().find_map(|(n, f)| (n == leaf.name()).then_some(f))
    }

    /// Laplace's approximation around the weights at which the factors were computed, with an isotropic prior N(0,
    /// 1/P₀): with G = U_G diag(g) U_Gᵀ and A = U_A diag(a) U_Aᵀ the precision of a weight is g aᵀ + P₀ in the basis
    /// (U_G, U_A), which adds the prior to the product and not to its factors.
    ///
    /// A weight and its bias are separate blocks, because a [`KroneckerGaussian`] has a basis for each parameter: A
    /// for the weight is the block without the appended 1, and the bias has precision g + P₀ in the basis U_G. What the
    /// full G ⊗ A says about their correlation is left out. Parameters without factors get diag F + P₀.
    ///
    /// With a posterior as prior, the sum has no such basis. A loss term needs none:
    /// [`continual::Quadratic`](crate::continual::Quadratic) is made from this, keeps the products of all tasks as a
    /// list, and treats a weight together with its bias.
    ///
    /// # Errors
    /// A prior that is a posterior; a precision that is not positive and finite, as where both F and P₀ vanish.
    pub fn laplace(&self, prior: impl Into<Prior>) -> Result<KroneckerGaussian> {
        let prior = prior.into();
        prior.check(&self.at.solution, "a Kronecker-factored Fisher information", Family::Full)?;
        let Some(p0) = prior.isotropic_precision() else {
            return Err(Error::Posterior(
                "a Kronecker-factored Fisher information was given a posterior as prior: expected \
                 Prior::isotropic(..), because the sum has no Kronecker basis otherwise; take \
                 continual::Quadratic::from(&fisher) as a loss term, or Fisher::diagonal or Fisher::full"
                    .to_owned(),
            ));
        };
        self.with_precisions(1.0, |_| p0)
    }

    /// N(θ, (scale·F + P₀)⁻¹) with the P₀ of each parameter by its name.
    pub(crate) fn with_precisions(&self, scale: f64, p0: impl Fn(&str) -> f64) -> Result<KroneckerGaussian> {
        let _no_grad = tch::no_grad_guard();
        let mut parameters = Vec::new();
        for leaf in self.at.solution.leaves() {
            let mean = leaf.tensor.copy();
            let kind = mean.kind();
            let like = |t: &Tensor| t.to_kind(kind);
            let name = leaf.name().to_owned();
            let p0 = p0(&name);
            let layer = self.layers.iter().find(|l| l.weight == name || l.bias.as_ref() == Some(&name));
            parameters.push(if let Some(layer) = layer {
                let (g, left) = eigen(&layer.outputs)?;
                let g = g * scale;
                if layer.weight == name {
                    let width = matrix_shape(&mean.size())[1];
                    // Without the last row and column, which belong to the bias.
                    let (a, right) = eigen(&layer.inputs.f_narrow(0, 0, width)?.f_narrow(1, 0, width)?)?;
                    let precision = like(&(g.f_outer(&a)? + p0)).f_reshape(mean.size())?;
                    KroneckerParameter { name, mean, left: Some(like(&left)), right: Some(like(&right)), precision }
                } else {
                    // A bias is the row [1, out].
                    let precision = like(&(g + p0));
                    KroneckerParameter { name, mean, left: None, right: Some(like(&left)), precision }
                }
            } else {
                let zero = mean.zeros_like();
                let precision = self.diagonal(&name).unwrap_or(&zero) * scale + p0;
                KroneckerParameter { name, mean, left: None, right: None, precision }
            });
        }
        KroneckerGaussian::new(parameters)
    }
}

/// Eigenvalues and eigenvectors of a second moment, in f64; the eigenvalues are negative by rounding at most, and are
/// then 0.
pub(crate) fn eigen(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let (values, vectors) = linalg::eigen(&x.f_to_kind(Kind::Double)?)?;
    // A precision g a + P₀ must not fall below P₀ by rounding.
    Ok((values.f_clamp_min(0.0)?, vectors))
}
