//! Gradient clipping, before any curvature is estimated from the gradient.

use crate::check;
use crate::{Result, kernel};
use tch::{Kind, Tensor};

/// What to do with large gradients of one evaluation of the loss.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Clip {
    /// Limit each element to ±max.
    Value(f64),
    /// Scale all gradients together so that their global L2 norm is at most max.
    Norm(f64),
}

impl Clip {
    pub(crate) fn validate(self) -> Result<()> {
        match self {
            Clip::Value(max) => check::positive("clip_grad_value", max),
            Clip::Norm(max) => check::positive("clip_grad_norm", max),
        }
    }

    /// Gradients are finite. Gives the factor that they were scaled by: 1 if their norm is within its limit.
    pub(crate) fn apply(self, gradients: &mut [Option<Tensor>]) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        match self {
            Clip::Value(max) => {
                for g in gradients.iter_mut().flatten() {
                    // libtorch refuses a limit that the gradient's kind does not hold.
                    let max = if g.kind() == Kind::Double { max } else { max.min(f32::MAX.into()) };
                    *g = g.clamp(-max, max);
                }
                Ok(1.0)
            }
            Clip::Norm(max) => {
                // In f64: the square of a gradient above 10¹⁹ would overflow in f32.
                let norm = kernel::sum_of_squares(gradients.iter().flatten())?.sqrt();
                if norm <= max {
                    return Ok(1.0);
                }
                let factor = max / norm;
                for g in gradients.iter_mut().flatten() {
                    // One factor, rounded once from f64, so that the direction of the gradient stays the same in every
                    // parameter.
                    *g = &*g * factor;
                }
                Ok(factor)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clipped(clip: Clip) -> Vec<Vec<f64>> {
        let mut g = [Some(Tensor::from_slice(&[3.0, -0.5])), None, Some(Tensor::from_slice(&[4.0, 0.0]))];
        clip.apply(&mut g).unwrap();
        g.iter().flatten().map(|t| Vec::try_from(t).unwrap()).collect()
    }

    #[test]
    fn by_value_and_by_global_norm() {
        assert_eq!(clipped(Clip::Value(1.0)), [[1.0, -0.5], [1.0, 0.0]]);
        let total = |g: Vec<Vec<f64>>| g.iter().flatten().map(|x| x * x).sum::<f64>().sqrt();
        assert!((total(clipped(Clip::Norm(2.0))) - 2.0).abs() < 1e-12);
        assert_eq!(clipped(Clip::Norm(6.0)), [[3.0, -0.5], [4.0, 0.0]]);
        assert!(Clip::Norm(0.0).validate().is_err() && Clip::Value(f64::NAN).validate().is_err());
    }
}
