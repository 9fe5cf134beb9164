//! One forward pass of a model, as its linearization needs it: recorded, with its graph, and checked.

use super::parameter::accumulation_kind;
use crate::likelihood::{Likelihood, Outputs};
use crate::nn::tape::{Recording, Tape};
use crate::params::Buffers;
use crate::{Error, IntoTensor, Params, Result};
use tch::Tensor;

/// Outputs with their graph, and the layer calls that they came from.
#[derive(Debug)]
pub(crate) struct Pass {
    pub(super) tape: Tape,
    /// `[B]` or `[B, C]`, in f64 or f32.
    pub z: Tensor,
}

impl Pass {
    /// Runs the closure, whose output must be finite.
    pub(crate) fn run<L: IntoTensor>(params: &Params, closure: impl FnOnce() -> L) -> Result<Self> {
        let buffers = Buffers::new(params);
        let recording = Recording::start();
        let z = tch::with_grad(|| closure().into_tensor());
        let tape = recording.finish();
        // Before the closure's own error: also a pass that failed may have moved them, and they must be put back.
        buffers.unchanged()?;
        let z = z?;
        Outputs::check_shape(&z)?;
        if !z.requires_grad() {
            return Err(Error::Curvature(
                "the model's output has no graph; compute it from the trainable variables, with gradients enabled"
                    .to_owned(),
            ));
        }
        // Here, where the message can name the output, and not after it has spread over every gradient.
        Outputs::check_finite_values(&z)?;
        let z = tch::with_grad(|| z.f_to_kind(accumulation_kind(z.kind())))?;
        Ok(Pass { tape, z })
    }

    /// Treats z as the outputs of a likelihood, of which the columns `active` are kept from here on.
    pub(crate) fn outputs(&mut self, likelihood: Likelihood, active: Option<&[i64]>) -> Result<Outputs> {
        let outputs = tch::with_grad(|| Outputs::new(likelihood, &self.z, active))?;
        // The linearization must differentiate the same columns that the likelihood sees.
        self.z = outputs.z.shallow_clone();
        Ok(outputs)
    }

    /// B
    pub(crate) fn examples(&self) -> i64 {
        self.z.size()[0]
    }
}
