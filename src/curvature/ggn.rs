//! The diagonal of the generalized Gauss-Newton matrix (1/B) Σᵢ JᵢᵀΛᵢJᵢ from tapped layers.
//!
//! Jᵢ is the Jacobian of example i's output zᵢ, and Λᵢ the Hessian of its loss with respect to zᵢ. With Λᵢ = Σ_c sᵢ_c
//! sᵢ_cᵀ the diagonal is
//!
//! ```text
//! Σ_c (1/B) Σᵢ (Jᵢᵀ sᵢ_c)²
//! ```
//!
//! by one backward pass over the layers' outputs per vector; no gradient of a weight is formed.

use super::linearized::{Linearized, Looked};
use super::squares::add;
use super::tapped::PerParameter;
use crate::likelihood::Outputs;
use crate::nn::tape::Tape;
use crate::{Error, Result};
use tch::Tensor;

/// The diagonal per parameter, as [`per_example`](super::per_example()) has its squares; and whether it found a
/// parameter that is used by tapped layers and outside of them.
pub(crate) struct Ggn {
    pub diagonal: PerParameter,
    pub mixed: bool,
}

/// * `check`: look for parameters that are used outside of the tapped layers too, as
///   [`per_example`](super::per_example()) does.
/// * `vectors(i, output)`: the s of output i of the model, each in its shape.
///
/// # Errors
/// [`Error::Likelihood`] if the closure did not compute its loss with a likelihood of [`crate::nn`].
pub(crate) fn ggn(
    tape: &Tape,
    params: &[(&str, &Tensor)],
    check: bool,
    vectors: impl Fn(usize, &Outputs) -> Result<Vec<Tensor>>,
) -> Result<Ggn> {
    let mut found = Ggn { diagonal: params.iter().map(|_| None).collect(), mixed: false };
    for (i, output) in outputs(tape)?.iter().enumerate() {
        let vectors = vectors(i, output)?;
        // Each output is looked at by itself: a parameter may be tapped for one head and untapped for another.
        let mut looked = if check { Looked::default() } else { Looked::before(params.len()) };
        let mut model = Linearized::of(tape, &output.z, params, &mut looked)?;
        let squares = model.squares(vectors.len() as i64, |c| Ok(vectors[c as usize].shallow_clone()))?;
        found.mixed |= model.mixed;
        let _no_grad = tch::no_grad_guard();
        for (sum, squares) in found.diagonal.iter_mut().zip(squares) {
            if let Some(mut squares) = squares {
                // In place: the squares were made for this sum.
                add(sum, squares.f_div_scalar_(output.examples() as f64)?)?;
            }
        }
    }
    Ok(found)
}

/// The outputs of the model, of which there is at least one.
pub(super) fn outputs(tape: &Tape) -> Result<&[Outputs]> {
    if tape.outputs().is_empty() {
        return Err(Error::Likelihood(
            "the curvature needs the model's output beside the loss; compute the loss with cross_entropy, \
             binary_cross_entropy or squared_error of `tch_blr::nn`, or choose Labels::Observed"
                .to_owned(),
        ));
    }
    Ok(tape.outputs())
}
