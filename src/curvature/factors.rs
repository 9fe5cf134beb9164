//! Kronecker factors of layers that multiply their input by a weight: sums of aaᵀ and δδᵀ over positions, and which
//! parameters have them.

use super::linearized::{Column, Linearized};
use super::parameter::{Parameter, chunks};
use super::squares::{Squares, add};
use crate::linalg::matrix_shape;
use crate::{Error, Result};
use tch::{Tensor, no_grad_guard};

/// Sums over all positions of all examples.
#[derive(Debug)]
pub(crate) struct Factors {
    /// The parameter that is the bias of the layer, whose input 1 is the last of a.
    pub bias: Option<usize>,
    /// Σ aaᵀ
    pub inputs: Tensor,
    /// Σ_c Σ δδᵀ
    pub outputs: Tensor,
    /// How many.
    pub positions: i64,
}

impl Factors {
    /// Zero, for a weight with that many inputs (a bias's 1 among them) and outputs.
    pub(super) fn zeros(parameter: &Tensor, [outputs, inputs]: [i64; 2], bias: Option<usize>) -> Result<Self> {
        let options = (super::parameter::accumulation_kind(parameter.kind()), parameter.device());
        let zeros = |n: i64| Tensor::f_zeros([n, n], options);
        Ok(Factors { bias, inputs: zeros(inputs)?, outputs: zeros(outputs)?, positions: 0 })
    }

    /// Adds the positions of all uses of a parameter, which must have matrices: to the sum of inputs, which is the same
    /// for all columns, and to that of outputs.
    pub(super) fn add(&mut self, parameter: &Parameter, inputs: bool, outputs: bool) -> Result<()> {
        let _no_grad = no_grad_guard();
        for used in &parameter.uses {
            let Some(matrix) = used.rule.matrix() else { continue };
            for (first, length) in chunks(parameter.batch, parameter.chunk(parameter.scratch(used))) {
                let delta = used.delta.f_narrow(0, first, length)?.f_totype(parameter.kind())?;
                if inputs {
                    let mut a = matrix.inputs(first, &delta)?;
                    // Counted with the inputs, which are added once, and not with the outputs, which come once per
                    // column.
                    self.positions += a.size()[0];
                    if self.bias.is_some() {
                        // The bias is one more input, of the value 1.
                        a = a.f_constant_pad_nd([0, 1])?;
                        _ = a.f_narrow(1, a.size()[1] - 1, 1)?.f_fill_(1.0)?;
                    }
                    _ = self.inputs.f_addmm_(&a.f_tr()?, &a)?;
                }
                if outputs {
                    let d = matrix.outputs(&delta)?;
                    _ = self.outputs.f_addmm_(&d.f_tr()?, &d)?;
                }
            }
        }
        Ok(())
    }
}

/// What a Kronecker-factored sum keeps of a parameter.
#[derive(Debug)]
pub(crate) enum Factored {
    /// Of a weight.
    Layer(Factors),
    /// Of a bias: it belongs to the factors of its layer's weight.
    Bias,
    /// Of everything else, in its shape; `None` for zero.
    Diagonal(Option<Tensor>),
}

impl Linearized<'_> {
    /// What each parameter has: a weight that one layer call uses has factors, which its bias shares.
    pub(crate) fn factored(&self) -> Result<Vec<Factored>> {
        let leaf = |p: usize| self.tapped.params[p].1;
        // Tied weights have a sum of products, of which no pair of factors is known.
        let only_use = |p: usize| if let [only] = self.tapped.uses(p) { Some(only) } else { None };
        let is_weight = |p: usize| leaf(p).dim() > 1 && only_use(p).is_some_and(|(_, rule)| rule.matrix().is_some());
        let of = |p: usize| {
            // A weight and a bias belong together if their only use is the same layer call.
            let partner = |weight: bool| {
                let tap = only_use(p)?.0;
                (0..self.parameters())
                    .find(|&q| q != p && is_weight(q) == weight && only_use(q).is_some_and(|&(other, _)| other == tap))
            };
            if is_weight(p) {
                let [out, width] = matrix_shape(&leaf(p).size());
                let bias = partner(false);
                let width = width + i64::from(bias.is_some());
                return Ok(Factored::Layer(Factors::zeros(leaf(p), [out, width], bias)?));
            }
            Ok(if partner(true).is_some() { Factored::Bias } else { Factored::Diagonal(None) })
        };
        (0..self.parameters()).map(of).collect()
    }

    /// Adds the factors of the parameters that have them to `all`, and Σ_c Σᵢ Gᵢ_c² to the others.
    pub(crate) fn add_factors(
        &mut self,
        columns: i64,
        column: impl Fn(i64) -> Result<Tensor>,
        all: &mut [Factored],
    ) -> Result<()> {
        let mut squares = Squares::new(self.parameters());
        for c in 0..columns {
            let column = self.pull(&column(c)?)?;
            for (p, part) in all.iter_mut().enumerate() {
                match part {
                    // The first batch decided on the structure. Sums of two structures would be neither.
                    Factored::Layer(_) | Factored::Bias if self.is_looped(p) => return Err(self.changed(p)),
                    // The inputs are the same in every column and count once.
                    Factored::Layer(factors) => self.add_to_factors(p, &column, c == 0, factors)?,
                    Factored::Bias | Factored::Diagonal(_) => {}
                }
            }
            squares.add(self, &column, |p| matches!(all[p], Factored::Diagonal(_)))?;
        }
        for (part, more) in all.iter_mut().zip(squares.finish()?) {
            if let (Factored::Diagonal(sum), Some(more)) = (part, more) {
                add(sum, more)?;
            }
        }
        Ok(())
    }

    fn add_to_factors(&self, p: usize, column: &Column, first_column: bool, factors: &mut Factors) -> Result<()> {
        let parameter = self.parameter(p, column);
        if parameter.uses.len() > 1 || parameter.uses.iter().any(|u| u.rule.matrix().is_none()) {
            return Err(self.changed(p));
        }
        factors.add(&parameter, first_column, true)
    }

    fn changed(&self, p: usize) -> Error {
        Error::parameter(
            self.tapped.params[p].0,
            "the model uses it in another way in a later batch; its Kronecker factors need the same computation for \
             every batch (Fisher::diagonal does not)",
        )
    }
}
