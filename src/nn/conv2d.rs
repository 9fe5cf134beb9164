//! z = W ∗ a + b on images.

use super::tape::{Features, Rule, Shift, Tap, rows};
use crate::Result;
use std::borrow::Borrow;
use tch::Tensor;
use tch::nn::{ConvConfig, Module, PaddingMode, Path};

/// A two-dimensional convolution that can be tapped.
#[derive(Debug)]
pub struct Conv2D {
    /// W `[out_dim, in_dim / groups, k, k]`, the variable `weight`.
    pub ws: Tensor,
    /// b `[out_dim]`, the variable `bias`.
    pub bs: Option<Tensor>,
    config: ConvConfig,
}

/// Creates a convolution `[B, i, H, W]` → `[B, o, H′, W′]` with kernels of k × k as [`tch::nn::conv2d`] does.
///
/// Not tapped with inputs `[i, H, W]`.
pub fn conv2d<'a, T: Borrow<Path<'a>>>(vs: T, i: i64, o: i64, k: i64, c: ConvConfig) -> Conv2D {
    let made = tch::nn::conv2d(vs, i, o, k, c);
    Conv2D { ws: made.ws, bs: made.bs, config: c }
}

impl Module for Conv2D {
    fn forward(&self, xs: &Tensor) -> Tensor {
        let c = &self.config;
        let (xs, padding) = match c.padding_mode {
            PaddingMode::Zeros => (xs.shallow_clone(), c.padding),
            mode => (mode.pad(xs, &[c.padding; 4]), 0),
        };
        let both = |n: i64| [n, n];
        let z = xs.conv2d(&self.ws, self.bs.as_ref(), both(c.stride), both(padding), both(c.dilation), c.groups);
        match Tap::of(&z) {
            Some(mut tap) if xs.dim() == 4 => {
                let kernel = self.ws.size();
                let weight = Weight {
                    input: xs.detach(),
                    shape: [kernel[0], kernel[1], kernel[2], kernel[3]],
                    positions: z.size()[2..].iter().product(),
                    stride: both(c.stride),
                    padding: both(padding),
                    dilation: both(c.dilation),
                    groups: c.groups,
                };
                tap.uses(Some(&self.ws), weight);
                tap.uses(self.bs.as_ref(), Shift(Features::Channel));
                tap.finish()
            }
            _ => z,
        }
    }
}

/// Gᵢ = Σₜ δᵢₜ uᵢₜᵀ in each group, where uᵢₜ is the patch of the input that the output's position t sees.
#[derive(Debug)]
struct Weight {
    /// a `[B, in, H, W]`, padded already unless with zeros
    input: Tensor,
    /// `[out, in / groups, k, k]`
    shape: [i64; 4],
    /// H′W′
    positions: i64,
    stride: [i64; 2],
    padding: [i64; 2],
    dilation: [i64; 2],
    groups: i64,
}

impl Rule for Weight {
    fn gradients(&self, first: i64, delta: &Tensor) -> Result<Tensor> {
        let [out, channels, height, width] = self.shape;
        let b = delta.size()[0];
        // [b, in·k·k, H′W′], channels outermost, so that the groups are contiguous.
        let patches =
            rows(&self.input, first, delta)?.f_im2col([height, width], self.dilation, self.padding, self.stride)?;
        let patches = patches.f_reshape([b * self.groups, channels * height * width, self.positions])?;
        let delta = delta.f_reshape([b * self.groups, out / self.groups, self.positions])?;
        Ok(delta.f_bmm(&patches.f_transpose(1, 2)?)?.f_reshape([b, out, channels, height, width])?)
    }

    fn scratch(&self) -> i64 {
        let [_, channels, height, width] = self.shape;
        self.groups * channels * height * width * self.positions
    }
}
