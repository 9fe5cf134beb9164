//! Kronecker factors of layers that multiply their input by a weight: sums of aaᵀ and δδᵀ over positions, and which
//! parameters have them.

use super::linearized::{Column, Linearized};
use super::noted::Part;
use super::parameter::{Parameter, chunks};
use super::squares::{Squares, add};
use crate::linalg::matrix_shape;
use crate::nn::tape::Matrix;
use crate::{Error, Result};
use tch::{Kind, Tensor, no_grad_guard};

/// Sums over all positions of all examples.
#[derive(Debug)]
pub(crate) struct Factors {
    /// The parameter that is the bias of the layer, whose input 1 is the last of a.
    pub bias: Option<usize>,
    /// Σ aaᵀ, or with weights Σ w aaᵀ
    pub inputs: Tensor,
    /// Σ_c Σ δδᵀ
    pub outputs: Tensor,
    /// How many, or Σ w.
    pub positions: f64,
}

impl Factors {
    /// Zero, for a weight with that many inputs (a bias's 1 among them) and outputs.
    pub(super) fn zeros(parameter: &Tensor, [outputs, inputs]: [i64; 2], bias: Option<usize>) -> Result<Self> {
        let options = (super::parameter::accumulation_kind(parameter.kind()), parameter.device());
        let zeros = |n: i64| Tensor::f_zeros([n, n], options);
        Ok(Factors { bias, inputs: zeros(inputs)?, outputs: zeros(outputs)?, positions: 0.0 })
    }

    /// Adds the inputs at the positions of all uses of a parameter, which must have matrices. They are the same for all
    /// columns, and belong to the sum once.
    ///
    /// `part`: the output whose weights those examples have, which otherwise count 1.
    pub(super) fn add_inputs(&mut self, parameter: &Parameter, part: Option<&Part>) -> Result<()> {
        let _no_grad = no_grad_guard();
        each_chunk(parameter, |matrix, rows, first, delta| {
            let mut a = matrix.inputs(first, delta)?;
            if self.bias.is_some() {
                // The bias is one more input, of the value 1.
                a = a.f_constant_pad_nd([0, 1])?;
                _ = a.f_narrow(1, a.size()[1] - 1, 1)?.f_fill_(1.0)?;
            }
            let positions = a.size()[0];
            let Some(part) = part else {
                self.positions += positions as f64;
                _ = self.inputs.f_addmm_(&a.f_tr()?, &a)?;
                return Ok(());
            };
            let of_row = positions / delta.size()[0].max(1);
            let (w, share) = of_positions(&part.weights, rows * of_row)?;
            if first == 0 {
                self.positions += part.total * share;
            }
            let w = w.f_narrow(0, first * of_row, positions)?.f_totype(a.kind())?;
            _ = self.inputs.f_addmm_(&a.f_mul(&w.f_unsqueeze(1)?)?.f_tr()?, &a)?;
            Ok(())
        })
    }

    /// Adds the outputs at the positions of all uses of a parameter, which must have matrices, for one column.
    pub(super) fn add_outputs(&mut self, parameter: &Parameter) -> Result<()> {
        let _no_grad = no_grad_guard();
        each_chunk(parameter, |matrix, _, _, delta| {
            let d = matrix.outputs(delta)?;
            _ = self.outputs.f_addmm_(&d.f_tr()?, &d)?;
            Ok(())
        })
    }
}

/// Calls `f(matrix, rows, first, δ)` for the uses of a parameter by matrices, a chunk of their rows at a time.
fn each_chunk(parameter: &Parameter, mut f: impl FnMut(&dyn Matrix, i64, i64, &Tensor) -> Result<()>) -> Result<()> {
    for used in &parameter.uses {
        let Some(matrix) = used.rule.matrix() else { continue };
        for (first, length) in chunks(used.rows(), parameter.chunk(Parameter::scratch(used))) {
            f(matrix, used.rows(), first, &used.delta.f_narrow(0, first, length)?.f_totype(parameter.kind())?)?;
        }
    }
    Ok(())
}

/// Weights of examples `[B]` as those of n positions, which are in the order of the examples, and by how much their sum
/// has grown.
fn of_positions(weights: &Tensor, n: i64) -> Result<(Tensor, f64)> {
    let b = weights.size()[0];
    if b % n == 0 {
        // A row stands for several, as a sentence for its words.
        return Ok((weights.f_reshape([n, b / n])?.f_sum_dim_intlist(1, false, None::<Kind>)?, 1.0));
    }
    let of_each = if n % b == 0 {
        // Each position of an example stands for it.
        weights.f_unsqueeze(1)?.f_expand([b, n / b], false)?.f_reshape([n])?
    } else {
        // The closure has chosen among the rows, nobody knows how.
        weights.f_mean(None::<Kind>)?.f_expand([n], false)?
    };
    Ok((of_each, n as f64 / b as f64))
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
        if first_column {
            factors.add_inputs(&parameter, None)?;
        }
        factors.add_outputs(&parameter)
    }

    fn changed(&self, p: usize) -> Error {
        Error::parameter(
            self.tapped.params[p].0,
            "the model uses it in another way in a later batch; its Kronecker factors need the same computation for \
             every batch (Fisher::diagonal does not)",
        )
    }
}
