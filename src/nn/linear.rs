//! z = a Wᵀ + b.

use super::tape::{Features, Matrix, Outer, Rule, Shift, Tap, row_elements, rows};
use crate::Result;
use std::borrow::Borrow;
use tch::Tensor;
use tch::nn::{LinearConfig, Module, Path};

/// A fully connected layer z = a Wᵀ + b that can be tapped.
#[derive(Debug)]
pub struct Linear {
    /// W `[out_dim, in_dim]`, the variable `weight`.
    pub ws: Tensor,
    /// b `[out_dim]`, the variable `bias`.
    pub bs: Option<Tensor>,
}

/// Creates a fully connected layer `[…, in_dim]` → `[…, out_dim]` as [`tch::nn::linear`] does.
///
/// Tapped with inputs `[B, in_dim]` and `[B, …, in_dim]`; not with `[in_dim]`.
pub fn linear<'a, T: Borrow<Path<'a>>>(vs: T, in_dim: i64, out_dim: i64, c: LinearConfig) -> Linear {
    let tch::nn::Linear { ws, bs } = tch::nn::linear(vs, in_dim, out_dim, c);
    Linear { ws, bs }
}

/// Another handle to the same variables.
impl From<&Linear> for Linear {
    fn from(Linear { ws, bs }: &Linear) -> Self {
        Linear { ws: ws.shallow_clone(), bs: bs.as_ref().map(Tensor::shallow_clone) }
    }
}

/// Another handle to the same variables.
impl From<&tch::nn::Linear> for Linear {
    fn from(tch::nn::Linear { ws, bs }: &tch::nn::Linear) -> Self {
        Linear { ws: ws.shallow_clone(), bs: bs.as_ref().map(Tensor::shallow_clone) }
    }
}

impl Module for Linear {
    fn forward(&self, xs: &Tensor) -> Tensor {
        let z = xs.linear(&self.ws, self.bs.as_ref());
        match Tap::of(&z) {
            // A single vector has no leading dimension that would count examples.
            Some(mut tap) if xs.dim() > 1 => {
                tap.uses(Some(&self.ws), Weight { input: xs.detach() });
                tap.uses(self.bs.as_ref(), Shift(Features::Last(1)));
                tap.finish()
            }
            _ => z,
        }
    }
}

/// Gᵢ = Σₜ δᵢₜ aᵢₜᵀ.
#[derive(Debug)]
struct Weight {
    /// a `[B, …, in]`
    input: Tensor,
}

impl Weight {
    /// Positions per example.
    fn length(&self) -> i64 {
        let size = self.input.size();
        size[1..size.len() - 1].iter().product()
    }

    /// `[b, …, features]` → `[b, T, features]`
    fn flat(&self, x: &Tensor) -> Result<Tensor> {
        let size = x.size();
        Ok(x.f_reshape([size[0], self.length(), size[size.len() - 1]])?)
    }
}

impl Rule for Weight {
    fn gradients(&self, first: i64, delta: &Tensor) -> Result<Tensor> {
        let a = self.flat(&rows(&self.input, first, delta)?)?;
        Ok(self.flat(delta)?.f_transpose(1, 2)?.f_bmm(&a)?)
    }

    fn outer(&self, delta: &Tensor) -> Result<Option<Outer>> {
        // With several positions Gᵢ is a sum of outer products, whose square is not the product of squares.
        if self.length() != 1 {
            return Ok(None);
        }
        Ok(Some(Outer::Input(self.flat(&rows(&self.input, 0, delta)?)?.f_squeeze_dim(1)?)))
    }

    fn matrix(&self) -> Option<&dyn Matrix> {
        Some(self)
    }

    fn scratch(&self) -> i64 {
        row_elements(&self.input)
    }
}

impl Matrix for Weight {
    fn inputs(&self, first: i64, delta: &Tensor) -> Result<Tensor> {
        Ok(self.flat(&rows(&self.input, first, delta)?)?.f_flatten(0, 1)?)
    }

    fn outputs(&self, delta: &Tensor) -> Result<Tensor> {
        Ok(self.flat(delta)?.f_flatten(0, 1)?)
    }
}
