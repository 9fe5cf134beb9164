//! z = γ ⊙ x̂ + β, normalized over groups of channels.

use super::tape::{Features, Rule, Shift, Tap, row_elements, rows};
use crate::Result;
use std::borrow::Borrow;
use tch::Tensor;
use tch::nn::{GroupNormConfig, Module, Path};

/// A group normalization (Wu and He 2018, arXiv:1803.08494) z = γ ⊙ x̂ + β that can be tapped.
#[derive(Debug)]
pub struct GroupNorm {
    /// γ `[num_channels]`, the variable `weight`.
    pub ws: Option<Tensor>,
    /// β `[num_channels]`, the variable `bias`.
    pub bs: Option<Tensor>,
    /// How many groups of adjacent channels are normalized separately.
    pub num_groups: i64,
    /// Channels of the input.
    pub num_channels: i64,
    config: GroupNormConfig,
}

/// Creates a group normalization of `[B, num_channels, …]` as [`tch::nn::group_norm`] does.
pub fn group_norm<'a, T: Borrow<Path<'a>>>(
    vs: T,
    num_groups: i64,
    num_channels: i64,
    config: GroupNormConfig,
) -> GroupNorm {
    let made = tch::nn::group_norm(vs, num_groups, num_channels, config);
    GroupNorm { ws: made.ws, bs: made.bs, num_groups: made.num_groups, num_channels: made.num_channels, config }
}

impl Module for GroupNorm {
    fn forward(&self, xs: &Tensor) -> Tensor {
        let GroupNormConfig { eps, cudnn_enabled, .. } = self.config;
        let z = xs.group_norm(self.num_groups, self.ws.as_ref(), self.bs.as_ref(), eps, cudnn_enabled);
        match Tap::of(&z) {
            Some(mut tap) if xs.dim() > 1 => {
                tap.uses(self.ws.as_ref(), Scale { input: xs.detach(), groups: self.num_groups, eps });
                tap.uses(self.bs.as_ref(), Shift(Features::Channel));
                tap.finish()
            }
            _ => z,
        }
    }
}

/// Gᵢ = Σₜ δᵢₜ ⊙ x̂ᵢₜ, with x̂ from the input: (z - β)/γ does not exist at γ = 0.
#[derive(Debug)]
struct Scale {
    /// `[B, C, …]`
    input: Tensor,
    groups: i64,
    eps: f64,
}

impl Rule for Scale {
    fn gradients(&self, first: i64, delta: &Tensor) -> Result<Tensor> {
        let x = rows(&self.input, first, delta)?;
        // Computed again from the input: keeping x̂ would double what the tape holds.
        let normalized = x.f_group_norm(self.groups, None::<Tensor>, None::<Tensor>, self.eps, false)?;
        Features::Channel.sum_positions(&normalized.f_mul(delta)?)
    }

    fn scratch(&self) -> i64 {
        // x̂ and its product with δ.
        2 * row_elements(&self.input)
    }
}
