//! Jacobians, and the covariance of the outputs that follows from a diagonal one of the weights.

use super::linearized::{Column, Linearized};
use super::parameter::{CHUNK_ELEMENTS, Parameter, chunks};
use crate::Result;
use std::collections::HashMap;
use tch::{Kind, Tensor, no_grad_guard};

impl Linearized<'_> {
    /// Calls `f` with Gᵢ_c over all weights, one parameter after the other, `[b, P]` in f64: a chunk of examples of a
    /// column at a time.
    pub(crate) fn each_gradient(
        &mut self,
        columns: i64,
        column: impl Fn(i64) -> Result<Tensor>,
        mut f: impl FnMut(Tensor) -> Result<()>,
    ) -> Result<()> {
        let weights = self.weights();
        for c in 0..columns {
            let column = self.pull(&column(c)?)?;
            let _no_grad = no_grad_guard();
            // Fewer than in f32: the rows in f64 and the gradients that they are copied from are in memory together.
            for (first, length) in chunks(self.batch(), CHUNK_ELEMENTS / (4 * weights).max(1)) {
                f(self.rows(&column, first, length, weights)?)?;
            }
        }
        Ok(())
    }

    /// Calls `f` with the number of the first example and Jᵢ `[b, C, P]` in f64, its columns as in
    /// [`Linearized::each_gradient`]: a chunk of examples at a time.
    pub(crate) fn each_jacobian(&mut self, mut f: impl FnMut(i64, Tensor) -> Result<()>) -> Result<()> {
        let weights = self.weights();
        // All columns at once: an example's outputs are needed together.
        let columns = (0..self.outputs()).map(|k| self.pull(&self.unit(k)?)).collect::<Result<Vec<_>>>()?;
        let _no_grad = no_grad_guard();
        for (first, length) in chunks(self.batch(), CHUNK_ELEMENTS / (4 * weights * self.outputs()).max(1)) {
            let all = columns.iter().map(|column| self.rows(column, first, length, weights));
            f(first, Tensor::f_stack(&all.collect::<Result<Vec<_>>>()?, 1)?)?;
        }
        Ok(())
    }

    /// P
    fn weights(&self) -> i64 {
        self.tapped.params.iter().map(|(_, leaf)| leaf.numel() as i64).sum()
    }

    /// Gᵢ over all weights, one parameter after the other, `[length, P]` in f64.
    fn rows(&self, column: &Column, first: i64, length: i64, weights: i64) -> Result<Tensor> {
        // Zeros stay where a parameter has no part in the output.
        let rows = Tensor::f_zeros([length, weights], (Kind::Double, self.z.device()))?;
        let mut places = Vec::with_capacity(self.parameters());
        let mut start = 0;
        for p in 0..self.parameters() {
            let n = self.tapped.params[p].1.numel() as i64;
            let place = rows.f_narrow(1, start, n)?;
            let parameter = self.parameter(p, column);
            if parameter.is_used() {
                place.shallow_clone().f_copy_(&parameter.gradients(first, length)?.f_reshape([length, n])?)?;
            }
            places.push(place);
            start += n;
        }
        self.looped(column, first..first + length, |i, p, g| {
            places[p].f_select(0, i - first)?.f_copy_(&g.f_reshape([-1])?)?;
            Ok(())
        })?;
        Ok(rows)
    }

    /// Jᵢ of every example, `[B, C, P]` in f64, its columns as in [`Linearized::rows`].
    pub(crate) fn jacobian(&mut self) -> Result<Tensor> {
        let weights = self.weights();
        let mut all = Vec::with_capacity(self.outputs() as usize);
        for k in 0..self.outputs() {
            let column = self.pull(&self.unit(k)?)?;
            let _no_grad = no_grad_guard();
            all.push(self.rows(&column, 0, self.batch(), weights)?);
        }
        Ok(Tensor::f_stack(&all, 1)?)
    }

    /// One for output k of every example.
    fn unit(&self, k: i64) -> Result<Tensor> {
        let _no_grad = no_grad_guard();
        // One backward pass serves output k of all examples, since z of one example does not depend on the others.
        let unit = self.z.detach().f_zeros_like()?;
        _ = unit.f_narrow(1, k, 1)?.f_fill_(1.0)?;
        Ok(unit)
    }

    /// Jᵢ diag(V) Jᵢᵀ of every example, its diagonal `[B, C]`; V of each parameter in its shape and the kind of its
    /// sums, `None` for zero.
    pub(crate) fn variance(&mut self, v: &[Option<Tensor>]) -> Result<Tensor> {
        let mut all = Vec::with_capacity(self.outputs() as usize);
        let mut spread: Vec<Option<Tensor>> = v.iter().map(|_| None).collect();
        for k in 0..self.outputs() {
            let column = self.pull(&self.unit(k)?)?;
            let _no_grad = no_grad_guard();
            let mut sum = Tensor::f_zeros([self.batch()], (self.z.kind(), self.z.device()))?;
            for (p, v) in v.iter().enumerate() {
                let Some(v) = v else { continue };
                let parameter = self.parameter(p, &column);
                if let Some((delta, outer)) = parameter.outer()? {
                    // The weights of the squares are the same for every output.
                    let w = match &mut spread[p] {
                        Some(w) => w,
                        new => new.insert(outer.spread(v)?),
                    };
                    let squares = delta.f_square()?.f_reshape([self.batch(), -1])?;
                    sum = sum.f_add(&squares.f_mul(w)?.f_sum_dim_intlist(1, false, None::<Kind>)?)?;
                } else if parameter.is_used() {
                    parameter.each_chunk(1, |first, g| {
                        let n = g.size()[0];
                        let each = g.f_square()?.f_mul(v)?.f_reshape([n, -1])?;
                        let each = each.f_sum_dim_intlist(1, false, None::<Kind>)?;
                        _ = sum.f_narrow(0, first, n)?.f_add_(&each)?;
                        Ok(())
                    })?;
                }
            }
            self.looped(&column, 0..self.batch(), |i, p, g| {
                if let Some(v) = &v[p] {
                    _ = sum.f_select(0, i)?.f_add_(&g.f_square()?.f_mul(v)?.f_sum(None::<Kind>)?)?;
                }
                Ok(())
            })?;
            all.push(sum);
        }
        Ok(Tensor::f_stack(&all, 1)?)
    }

    /// Jᵢ diag(V) Jᵢᵀ `[B, C, C]`, as [`Linearized::variance`].
    pub(crate) fn covariance(&mut self, v: &[Option<Tensor>]) -> Result<Tensor> {
        // All columns at once, because a covariance needs them in pairs; `variance` needs one at a time.
        let columns = (0..self.outputs()).map(|k| self.pull(&self.unit(k)?)).collect::<Result<Vec<_>>>()?;
        let _no_grad = no_grad_guard();
        let (batch, outputs) = (self.batch(), self.outputs());
        let sum = Tensor::f_zeros([batch, outputs, outputs], (self.z.kind(), self.z.device()))?;
        for (p, v) in v.iter().enumerate() {
            let Some(v) = v else { continue };
            let each: Vec<Parameter> = columns.iter().map(|c| self.parameter(p, c)).collect();
            // The outputs are one tensor, so a layer has a part either in all of them or in none.
            let Some(first_column) = each.first().filter(|parameter| parameter.is_used()) else { continue };
            if let Some((_, outer)) = first_column.outer()? {
                let deltas = each.iter().flat_map(|parameter| &parameter.uses);
                let deltas = deltas.map(|u| Ok(u.delta.f_totype(v.kind())?.f_reshape([batch, -1])?));
                let deltas = Tensor::f_stack(&deltas.collect::<Result<Vec<_>>>()?, 1)?;
                let weighted = deltas.f_mul(&outer.spread(v)?.f_unsqueeze(1)?)?;
                _ = sum.shallow_clone().f_add_(&weighted.f_bmm(&deltas.f_transpose(1, 2)?)?)?;
                continue;
            }
            first_column.each_chunk(outputs, |first, g| {
                let n = g.size()[0];
                let rows = each.iter().map(|parameter| Ok(parameter.gradients(first, n)?.f_reshape([n, -1])?));
                let rows = Tensor::f_stack(&rows.collect::<Result<Vec<_>>>()?, 1)?;
                let weighted = rows.f_mul(&v.f_reshape([-1])?)?;
                _ = sum.f_narrow(0, first, n)?.f_add_(&weighted.f_bmm(&rows.f_transpose(1, 2)?)?)?;
                Ok(())
            })?;
        }
        // Example by example, so that no more than C gradients per untapped parameter are in memory.
        for i in 0..batch {
            let mut each: Vec<HashMap<usize, Tensor>> = Vec::with_capacity(columns.len());
            for column in &columns {
                let mut found = HashMap::new();
                self.looped(column, i..i + 1, |_, p, g| {
                    found.insert(p, g);
                    Ok(())
                })?;
                each.push(found);
            }
            for k in 0..each.len() {
                for l in 0..each.len() {
                    for (p, g) in &each[k] {
                        if let (Some(v), Some(other)) = (&v[*p], each[l].get(p)) {
                            let product = g.f_mul(v)?.f_mul(other)?.f_sum(None::<Kind>)?;
                            _ = sum.f_select(0, i)?.f_select(0, k as i64)?.f_select(0, l as i64)?.f_add_(&product)?;
                        }
                    }
                }
            }
        }
        Ok(sum)
    }
}
