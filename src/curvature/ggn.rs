//! The diagonal of the generalized Gauss-Newton matrix (1/B) Σᵢ JᵢᵀΛᵢJᵢ from tapped layers.
//!
//! Jᵢ is the Jacobian of example i's output zᵢ, and Λᵢ the Hessian of its loss with respect to zᵢ. With Λᵢ = Σ_c sᵢ_c sᵢ_cᵀ
//! the diagonal is
//!
//! ```text
//! Σ_c (1/B) Σᵢ (Jᵢᵀ sᵢ_c)²,    Jᵢᵀ sᵢ_c = the gradient of sᵢ_cᵀ zᵢ with s held fixed
//! ```
//!
//! a sum of per-example squares of losses sᵢ_cᵀ zᵢ: one backward pass per vector.

use super::per_example::per_example;
use crate::nn::tape::{Output, Tape};
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// The diagonal per parameter, as [`per_example`] has its squares; and whether it found a parameter used outside of the
/// tapped layers.
pub(crate) struct Ggn {
    pub diagonal: Vec<Option<Tensor>>,
    pub mixed: bool,
}

/// `vectors(output)`: the s of one output of the model, each in its shape.
///
/// # Errors
/// [`Error::PerExample`] if the closure did not compute its loss with a likelihood of [`crate::nn`].
pub(crate) fn ggn(
    tape: &Tape,
    params: &[(&str, &Tensor)],
    check: bool,
    vectors: impl Fn(usize, &Output) -> Result<Vec<Tensor>>,
) -> Result<Ggn> {
    if tape.outputs().is_empty() {
        return Err(Error::PerExample(
            "the Gauss-Newton matrix needs the model's output; compute the loss with cross_entropy, binary_cross_entropy \
             or squared_error of `tch_blr::nn`"
                .to_owned(),
        ));
    }
    let mut found = Ggn { diagonal: params.iter().map(|_| None).collect(), mixed: false };
    for (i, output) in tape.outputs().iter().enumerate() {
        for s in vectors(i, output)? {
            let each = (&output.z * s).f_reshape([output.z.size()[0], -1])?;
            let losses = each.f_sum_dim_intlist(1, false, None::<Kind>)?;
            let one = per_example(&losses.f_mean(None::<Kind>)?, Some(&losses), tape, params, check)?;
            found.mixed |= one.mixed;
            let _no_grad = tch::no_grad_guard();
            for (sum, squares) in found.diagonal.iter_mut().zip(one.squares) {
                *sum = match (sum.take(), squares) {
                    (Some(sum), Some(squares)) => Some(sum + squares),
                    (a, b) => a.or(b),
                };
            }
        }
    }
    Ok(found)
}
