//! A batch of a model's outputs to first order in the weights: per-example gradients of sᵢᵀzᵢ for any vectors s.
//!
//! With the Jacobian Jᵢ of example i's output zᵢ `[C]`, a column s of one vector per example gives Gᵢ = Jᵢᵀsᵢ by one
//! backward pass over the layers' outputs; the gradients of the weights are never formed. Each kind of result that is
//! made of the Gᵢ has its own file: squares, Kronecker factors, Jacobians and kernels.

use super::parameter::{Parameter, accumulation_kind};
use super::pass::Pass;
use super::tapped::{Deltas, PerParameter, Tapped, by_example, unexplained};
use crate::nn::tape::Tape;
use crate::{Error, Params, Result};
use tch::{Kind, Tensor, no_grad_guard};

/// At most how many examples show whether a parameter is used outside of the tapped layers: enough to find a use that only some
/// examples make, and few compared with a batch.
const LOOK_AT: i64 = 16;

/// How the per-example gradients of a parameter are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// It has no part in the output, as far as is known.
    Unused,
    Tapped,
    /// It is used outside of the tapped layers: a backward pass for every example.
    Loop,
}

/// What was found out about a model by its first batch: which parameters are used outside of the tapped layers.
#[derive(Debug, Default)]
pub(crate) struct Looked(Option<Vec<Way>>);

impl Looked {
    /// Of a model that was looked at before: parameters that layers use are used by them alone.
    pub(super) fn before(parameters: usize) -> Self {
        Looked(Some(vec![Way::Unused; parameters]))
    }
}

/// A forward pass, and how each parameter's gradients follow from it.
#[derive(Debug)]
pub(crate) struct Linearized<'a> {
    /// `[B, C]`
    pub(super) z: Tensor,
    pub(super) tapped: Tapped<'a>,
    ways: Vec<Way>,
    /// Whether the first look has found a parameter that is used by tapped layers and outside of them.
    pub(super) mixed: bool,
}

/// sᵢᵀzᵢ and its derivatives by the outputs of the tapped layers.
#[derive(Debug)]
pub(crate) struct Column {
    /// `[B]`, with its graph
    losses: Tensor,
    pub(super) deltas: Deltas,
}

/// sᵢᵀzᵢ of every example `[B]` and their sum, with the graph of z.
pub(super) struct Along {
    losses: Tensor,
    pub sum: Tensor,
}

/// For z `[B]` or `[B, C]`, and s of as many elements.
pub(super) fn along(z: &Tensor, s: &Tensor) -> Result<Along> {
    tch::with_grad(|| {
        let each = z.f_mul(&s.f_reshape(z.size())?)?.f_reshape([z.size()[0], -1])?;
        let losses = each.f_sum_dim_intlist(1, false, None::<Kind>)?;
        Ok(Along { sum: losses.f_sum(None::<Kind>)?, losses })
    })
}

impl<'a> Linearized<'a> {
    /// With the trained parameters of `params`. The first batch of a model is compared with plain gradients.
    pub(crate) fn new(pass: &'a Pass, params: &'a Params, looked: &mut Looked) -> Result<Self> {
        let trained = params.leaves().iter().filter(|l| l.trainable());
        let named: Vec<(&str, &Tensor)> = trained.map(|l| (l.name(), &l.tensor)).collect();
        Self::of(&pass.tape, &pass.z, &named, looked)
    }

    /// The same of an output z on a tape.
    pub(super) fn of(
        tape: &'a Tape,
        z: &Tensor,
        params: &[(&'a str, &'a Tensor)],
        looked: &mut Looked,
    ) -> Result<Self> {
        // With gradients, whatever the caller has set: the conversion must be part of the graph.
        let z = tch::with_grad(|| z.f_to_kind(accumulation_kind(z.kind()))?.f_reshape([z.size()[0], -1]))?;
        let batch = z.size()[0];
        let mut tapped = Tapped::new(tape, params)?;
        if (0..params.len()).any(|p| tapped.batches(p).any(|b| b != batch)) {
            tapped.only_before(&z)?;
        }
        let first = looked.0.is_none();
        let mut ways = looked.0.take().unwrap_or_else(|| vec![Way::Unused; params.len()]);
        for (p, way) in ways.iter_mut().enumerate() {
            // Once found to be used outside of the layers, a parameter stays so: a batch without that use proves
            // nothing.
            if *way != Way::Loop {
                let used = !tapped.uses(p).is_empty();
                // A layer that saw another number of rows (a token axis in front, say) does not count examples.
                let fits = tapped.batches(p).all(|b| b == batch);
                *way = if !used {
                    Way::Unused
                } else if fits {
                    Way::Tapped
                } else {
                    Way::Loop
                };
            }
            // Otherwise its taps would be differentiated for nothing in every column.
            if *way != Way::Tapped {
                tapped.forget(p);
            }
        }
        let mut linearized = Linearized { z, tapped, ways, mixed: false };
        if first {
            linearized.look()?;
        }
        looked.0 = Some(linearized.ways.clone());
        Ok(linearized)
    }

    /// Number of parameters.
    pub(crate) fn parameters(&self) -> usize {
        self.tapped.params.len()
    }

    /// B
    pub(super) fn batch(&self) -> i64 {
        self.z.size()[0]
    }

    /// C
    pub(super) fn outputs(&self) -> i64 {
        self.z.size()[1]
    }

    /// Compares the tapped gradients of a few examples with plain ones, for a column of numbers without a pattern.
    fn look(&mut self) -> Result<()> {
        // An irrational-like step, so that no two examples or outputs have the same weight and nothing cancels.
        let wave = Tensor::f_arange(self.z.numel() as i64, (self.z.kind(), self.z.device()))?;
        let s = wave.f_mul_scalar(1.7)?.f_add_scalar(0.3)?.f_sin()?.f_reshape(self.z.size())?;
        // Not all of them: an example whose output depends on the rows of others shows by what those get.
        let few = LOOK_AT.min(self.batch() - 1).max(1);
        // The others get no weight instead of being cut off: the graph is that of the whole batch.
        _ = s.f_narrow(0, few, self.batch() - few)?.f_zero_()?;
        let mut column = self.pull(&s)?;
        let total = tch::with_grad(|| column.losses.f_sum(None::<Kind>))?;
        // The graph is kept: the columns that were asked for come after the look.
        let plain = Tensor::f_run_backward(&[&total], &self.tapped.leaves(), true, false)?;
        let plain: PerParameter = plain.into_iter().map(|g| g.defined().then_some(g)).collect();
        if plain.iter().all(Option::is_none) {
            let problem = "the outputs depend on none of the parameters: is this the model that they belong to?";
            return Err(Error::Curvature(problem.to_owned()));
        }
        let _no_grad = no_grad_guard();
        for delta in column.deltas.values_mut() {
            *delta = delta.f_narrow(0, 0, few)?;
        }
        let parameters = self.tapped.parameters(&column.deltas, few);
        let scales = parameters.iter().map(|p| p.is_used().then(|| p.scale(&p.squares()?)).transpose());
        let outside = unexplained(&parameters, &plain, &scales.collect::<Result<Vec<_>>>()?)?;
        drop(parameters);
        for p in outside {
            // An unused parameter with a gradient is only untapped; a tapped one with an unexplained gradient is
            // both.
            self.mixed |= self.ways[p] == Way::Tapped;
            self.loop_over(p);
        }
        Ok(())
    }

    fn loop_over(&mut self, p: usize) {
        self.ways[p] = Way::Loop;
        self.tapped.forget(p);
    }

    /// One backward pass, for s `[B, C]`.
    pub(crate) fn pull(&mut self, s: &Tensor) -> Result<Column> {
        let Along { losses, sum } = along(&self.z, s)?;
        // A parameter that had no part so far may have one in this batch.
        let unused: Vec<usize> = (0..self.ways.len()).filter(|&p| self.ways[p] == Way::Unused).collect();
        let leaves: Vec<&Tensor> = unused.iter().map(|&p| self.tapped.params[p].1).collect();
        let (of_unused, deltas) = self.tapped.differentiate(&sum, &leaves, true)?;
        for (p, g) in unused.into_iter().zip(of_unused) {
            if g.is_some() {
                self.loop_over(p);
            }
        }
        Ok(Column { losses, deltas })
    }

    /// A parameter with its uses in a column.
    pub(super) fn parameter<'b>(&self, p: usize, column: &'b Column) -> Parameter<'b>
    where
        'a: 'b,
    {
        self.tapped.parameter(p, &column.deltas, self.batch())
    }

    /// Whether no tap explains the gradients of a parameter.
    pub(super) fn is_looped(&self, p: usize) -> bool {
        self.ways[p] == Way::Loop
    }

    /// Gᵢ of the parameters that no tap explains, example by example: (i, p, Gᵢ).
    pub(super) fn looped(
        &self,
        column: &Column,
        examples: std::ops::Range<i64>,
        mut f: impl FnMut(i64, usize, Tensor) -> Result<()>,
    ) -> Result<()> {
        let looped: Vec<usize> = (0..self.ways.len()).filter(|&p| self.is_looped(p)).collect();
        let leaves: Vec<&Tensor> = looped.iter().map(|&p| self.tapped.params[p].1).collect();
        by_example(&column.losses, examples, &leaves, |i, k, g| f(i, looped[k], g))
    }
}
