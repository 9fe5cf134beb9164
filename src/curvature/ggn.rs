//! ∇L, and the diagonal of the generalized Gauss-Newton matrix Σᵢ wᵢ JᵢᵀΛᵢJᵢ from tapped layers.
//!
//! Jᵢ is the Jacobian of example i's output zᵢ, Λᵢ the Hessian of its loss with respect to zᵢ, and wᵢ = ∂L/∂ℓᵢ what the
//! loss that was returned makes of it, 1/B in a mean. With Λᵢ = Σ_c sᵢ_c sᵢ_cᵀ the diagonal is
//!
//! ```text
//! Σ_c Σᵢ (Jᵢᵀ √wᵢ sᵢ_c)²
//! ```
//!
//! by one backward pass over the layers' outputs per vector; no gradient of a weight is formed but the one of L.

use super::linearized::{Linearized, Looked};
use super::noted::{self, Parts};
use super::squares::add;
use super::tapped::PerParameter;
use crate::Result;
use crate::likelihood::Outputs;
use crate::nn::tape::Tape;
use tch::Tensor;

/// What the backward passes give per parameter; `None` where the loss does not depend on it.
pub(crate) struct Ggn {
    /// ∇L, in the kind of the parameter.
    pub gradient: PerParameter,
    /// The diagonal, as [`per_example`](super::per_example()) has its squares.
    pub diagonal: PerParameter,
    /// Whether the next call has to check again: a parameter is used by tapped layers and outside of them, or not all of
    /// the outputs were looked at.
    pub check_again: bool,
}

/// * `loss`: L, 0-dim, with its graph, computed inside a recording.
/// * `check`: look for parameters that are used outside of the tapped layers too, as
///   [`per_example`](super::per_example()) does.
/// * `vectors(i, output)`: the s of output i of the model, each in its shape.
///
/// # Errors
/// [`Error::Likelihood`](crate::Error::Likelihood) if L is not made of losses of [`crate::nn`], or falls with one of
/// them.
pub(crate) fn ggn(
    loss: &Tensor,
    tape: &Tape,
    params: &[(&str, &Tensor)],
    check: bool,
    vectors: impl Fn(usize, &Outputs) -> Result<Vec<Tensor>>,
) -> Result<Ggn> {
    let inputs: Vec<&Tensor> = params.iter().map(|(_, leaf)| *leaf).chain(noted::losses(tape)?).collect();
    // The graph is kept: the columns of the outputs are differentiated after the loss.
    let found = Tensor::f_run_backward(&[loss], &inputs, true, false)?;
    let mut gradient: PerParameter = found.into_iter().map(|g| g.defined().then_some(g)).collect();
    let Parts { parts, left_out } = Parts::new(tape, gradient.split_off(params.len()))?;
    let mut diagonal: PerParameter = params.iter().map(|_| None).collect();
    let mut check_again = left_out;
    for (i, part) in parts.iter().enumerate() {
        let vectors = vectors(i, part.output)?;
        // Each output is looked at by itself: a parameter may be tapped for one head and untapped for another.
        let mut looked = if check { Looked::default() } else { Looked::before(params.len()) };
        let mut model = Linearized::of(tape, &part.output.z, params, &mut looked)?;
        let squares = model.squares(vectors.len() as i64, |c| part.weighted(&vectors[c as usize]))?;
        check_again |= model.mixed;
        let _no_grad = tch::no_grad_guard();
        for (sum, squares) in diagonal.iter_mut().zip(squares) {
            if let Some(squares) = squares {
                add(sum, squares)?;
            }
        }
    }
    Ok(Ggn { gradient, diagonal, check_again })
}
