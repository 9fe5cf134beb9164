//! Diagonals: Σ_c Σᵢ Gᵢ_c² over the columns of the output curvature.

use super::linearized::{Column, Linearized};
use super::tapped::PerParameter;
use crate::Result;
use crate::nn::tape::Outer;
use tch::{Tensor, no_grad_guard};

impl Linearized<'_> {
    /// Σ_c Σᵢ Gᵢ_c² over the columns `column(0..columns)`, f64 for parameters in f64 and f32 for all others; `None` for
    /// parameters that have no part in the outputs.
    pub(crate) fn squares(&mut self, columns: i64, column: impl Fn(i64) -> Result<Tensor>) -> Result<PerParameter> {
        let mut squares = Squares::new(self.parameters());
        for c in 0..columns {
            let column = self.pull(&column(c)?)?;
            squares.add(self, &column, |_| true)?;
        }
        squares.finish()
    }
}

/// The sums while the columns come in: of what layers with Gᵢ = δᵢaᵢᵀ leave, Σ_c δ_c² is enough until the end, which
/// takes one matrix product for all columns together.
pub(super) struct Squares {
    outer: Vec<Option<(Tensor, Outer)>>,
    sums: PerParameter,
}

impl Squares {
    pub(super) fn new(parameters: usize) -> Self {
        let none = || (0..parameters).map(|_| None);
        Squares { outer: none().collect(), sums: (0..parameters).map(|_| None).collect() }
    }

    /// Adds a column for the parameters that are `wanted`.
    pub(super) fn add(&mut self, batch: &Linearized, column: &Column, wanted: impl Fn(usize) -> bool) -> Result<()> {
        let _no_grad = no_grad_guard();
        for p in (0..self.sums.len()).filter(|p| wanted(*p)) {
            let parameter = batch.parameter(p, column);
            if let Some((delta, outer)) = parameter.outer()? {
                match &mut self.outer[p] {
                    // In place: the first column's square was made for the sum, and a is the same in every column.
                    Some((sum, _)) => _ = sum.f_addcmul_(&delta, &delta)?,
                    new => *new = Some((delta.f_square()?, outer)),
                }
            } else if parameter.is_used() {
                add(&mut self.sums[p], parameter.sum_of_squares()?)?;
            }
        }
        batch.looped(
            column,
            0..batch.batch(),
            |_, p, g| {
                if wanted(p) { add(&mut self.sums[p], g.f_square()?) } else { Ok(()) }
            },
        )
    }

    pub(super) fn finish(mut self) -> Result<PerParameter> {
        let _no_grad = no_grad_guard();
        for (sum, found) in self.sums.iter_mut().zip(self.outer) {
            if let Some((squares, outer)) = found {
                add(sum, outer.squares(&squares)?)?;
            }
        }
        Ok(self.sums)
    }
}

/// Adds to a sum that may be empty.
pub(super) fn add(sum: &mut Option<Tensor>, more: Tensor) -> Result<()> {
    match sum {
        Some(sum) => _ = sum.f_add_(&more)?,
        none => *none = Some(more),
    }
    Ok(())
}
