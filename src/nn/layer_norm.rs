//! z = γ ⊙ x̂ + β, normalized over trailing dimensions.

use super::tape::{Features, Rule, Shift, Tap, row_elements, rows};
use crate::Result;
use std::borrow::Borrow;
use tch::Tensor;
use tch::nn::{LayerNormConfig, Module, Path};

/// A layer normalization z = γ ⊙ x̂ + β that can be tapped.
#[derive(Debug)]
pub struct LayerNorm {
    /// γ `normalized_shape`, the variable `weight`.
    pub ws: Option<Tensor>,
    /// β `normalized_shape`, the variable `bias`.
    pub bs: Option<Tensor>,
    /// The trailing dimensions of the input over which x̂ has mean 0 and variance 1.
    pub normalized_shape: Vec<i64>,
    config: LayerNormConfig,
}

/// Creates a layer normalization of `[…, normalized_shape]` as [`tch::nn::layer_norm`] does.
///
/// Not tapped with inputs that have no other dimension than `normalized_shape`.
pub fn layer_norm<'a, T: Borrow<Path<'a>>>(vs: T, normalized_shape: Vec<i64>, config: LayerNormConfig) -> LayerNorm {
    let made = tch::nn::layer_norm(vs, normalized_shape, config);
    LayerNorm { ws: made.ws, bs: made.bs, normalized_shape: made.normalized_shape, config }
}

impl Module for LayerNorm {
    fn forward(&self, xs: &Tensor) -> Tensor {
        let LayerNormConfig { eps, cudnn_enabled, .. } = self.config;
        let z = xs.layer_norm(&self.normalized_shape, self.ws.as_ref(), self.bs.as_ref(), eps, cudnn_enabled);
        match Tap::of(&z) {
            // Without a dimension in front of the normalized ones there is none that counts examples.
            Some(mut tap) if xs.dim() > self.normalized_shape.len() => {
                let scale = Scale { input: xs.detach(), normalized_shape: self.normalized_shape.clone(), eps };
                tap.uses(self.ws.as_ref(), scale);
                tap.uses(self.bs.as_ref(), Shift(Features::Last(self.normalized_shape.len())));
                tap.finish()
            }
            _ => z,
        }
    }
}

/// Gᵢ = Σₜ δᵢₜ ⊙ x̂ᵢₜ, with x̂ from the input: (z - β)/γ does not exist at γ = 0.
#[derive(Debug)]
struct Scale {
    /// `[B, …, normalized_shape]`
    input: Tensor,
    normalized_shape: Vec<i64>,
    eps: f64,
}

impl Rule for Scale {
    fn gradients(&self, first: i64, delta: &Tensor) -> Result<Tensor> {
        let x = rows(&self.input, first, delta)?;
        // Computed again from the input: keeping x̂ would double what the tape holds.
        let normalized = x.f_layer_norm(&self.normalized_shape, None::<Tensor>, None::<Tensor>, self.eps, false)?;
        Features::Last(self.normalized_shape.len()).sum_positions(&normalized.f_mul(delta)?)
    }

    fn scratch(&self) -> i64 {
        // x̂ and its product with δ.
        2 * row_elements(&self.input)
    }
}
