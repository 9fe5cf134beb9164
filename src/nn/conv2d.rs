//! z = W ∗ a + b on images, and its per-example gradients from patches of the input.

use super::tape::{Features, Matrix, Rule, Shift, Tap, rows};
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
        // Other modes pad as an operation of its own, as tch's layer does; what is recorded is then the padded input.
        let (xs, padding) = match c.padding_mode {
            PaddingMode::Zeros => (xs.shallow_clone(), c.padding),
            mode => (mode.pad(xs, &[c.padding; 4]), 0),
        };
        let both = |n: i64| [n, n];
        let z = xs.conv2d(&self.ws, self.bs.as_ref(), both(c.stride), both(padding), both(c.dilation), c.groups);
        match Tap::of(&z) {
            // A single image [i, H, W] has no leading dimension that would count examples.
            Some(mut tap) if xs.dim() == 4 => {
                let kernel = self.ws.size();
                let weight = Weight {
                    // Without its graph: it enters products that nobody differentiates.
                    input: xs.detach(),
                    shape: [kernel[0], kernel[1], kernel[2], kernel[3]],
                    positions: [z.size()[2], z.size()[3]],
                    stride: c.stride,
                    padding,
                    dilation: c.dilation,
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
    /// H′, W′
    positions: [i64; 2],
    stride: i64,
    padding: i64,
    dilation: i64,
    groups: i64,
}

impl Weight {
    /// uᵢₜ as the columns of `[b·groups, in/groups·k·k, H′W′]`, for the examples of `delta`.
    fn patches(&self, first: i64, delta: &Tensor) -> Result<Tensor> {
        let a = rows(&self.input, first, delta)?;
        let a = if self.padding == 0 { a } else { a.f_constant_pad_nd([self.padding; 4])? };
        let ([_, channels, height, width], [down, right]) = (self.shape, self.positions);
        let (size, s) = (a.size(), a.stride());
        // All patches are one view, whose copy takes whole runs of the input's rows where libtorch's im2col takes one
        // element at a time.
        // The strides are those of `a` as it lies, so no layout has to be made contiguous first.
        let view = a.f_as_strided(
            [size[0], size[1], height, width, down, right],
            [s[0], s[1], s[2] * self.dilation, s[3] * self.dilation, s[2] * self.stride, s[3] * self.stride],
            None,
        )?;
        Ok(view.f_reshape([size[0] * self.groups, channels * height * width, down * right])?)
    }
}

impl Rule for Weight {
    fn gradients(&self, first: i64, delta: &Tensor) -> Result<Tensor> {
        let ([out, channels, height, width], [down, right]) = (self.shape, self.positions);
        let b = delta.size()[0];
        let patches = self.patches(first, delta)?;
        let delta = delta.f_reshape([b * self.groups, out / self.groups, down * right])?;
        Ok(delta.f_bmm(&patches.f_transpose(1, 2)?)?.f_reshape([b, out, channels, height, width])?)
    }

    fn matrix(&self) -> Option<&dyn Matrix> {
        // With groups the layer is several products, and has no single pair of Kronecker factors.
        (self.groups == 1).then_some(self)
    }

    /// The patches; the padded input is small beside them.
    fn scratch(&self) -> i64 {
        let ([_, channels, height, width], [down, right]) = (self.shape, self.positions);
        self.groups * channels * height * width * down * right
    }
}

impl Matrix for Weight {
    fn inputs(&self, first: i64, delta: &Tensor) -> Result<Tensor> {
        Ok(self.patches(first, delta)?.f_transpose(1, 2)?.f_flatten(0, 1)?)
    }

    fn outputs(&self, delta: &Tensor) -> Result<Tensor> {
        Ok(delta.f_flatten(2, 3)?.f_transpose(1, 2)?.f_flatten(0, 1)?)
    }
}
