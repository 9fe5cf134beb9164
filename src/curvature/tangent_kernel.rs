//! Kernels of a model that is linear in its weights: the covariance of its outputs under a diagonal one of the weights.

use super::linearized::{Column, Linearized};
use super::per_example::Contribution;
use crate::nn::tape::Outer;
use crate::{Error, Result};
use tch::{Kind, Tensor, no_grad_guard};

/// Elements of a temporary that is written and read once: 1 MiB in f64, which caches hold.
const CACHE_ELEMENTS: i64 = 1 << 17;

/// What is wanted of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// `[B, B]`
    All,
    /// `[B]`
    Diagonal,
}

impl Linearized<'_> {
    /// For every column s of one vector per example the kernel K\[i, j\] = Gᵢᵀ diag(v) Gⱼ with Gᵢ = Jᵢᵀsᵢ, in f64: then its
    /// smallest eigenvalues are those of the Gram matrix of the Gᵢ that the model has, and not rounding errors of sums.
    ///
    /// `variance(name)`: v of a parameter, in its shape.
    ///
    /// With Gᵢ = δᵢaᵢᵀ of a linear layer no Gᵢ is formed, and the expensive part is shared by all columns:
    ///
    /// ```text
    /// Gᵢᵀ diag(v) Gⱼ = Σₒ δᵢₒ δⱼₒ Aₒ[i, j],    Aₒ[i, j] = Σₖ vₒₖ aᵢₖ aⱼₖ
    /// ```
    pub(crate) fn kernels<'v>(
        &mut self,
        columns: &[Tensor],
        part: Part,
        variance: impl Fn(&str) -> Option<&'v Tensor>,
    ) -> Result<Vec<Tensor>> {
        let columns: Vec<Column> = columns.iter().map(|s| self.pull(s)).collect::<Result<_>>()?;
        let b = self.batch();
        let shape = if part == Part::All { vec![b, b] } else { vec![b] };
        let device = self.leaves.first().map_or(tch::Device::Cpu, |l| l.tensor.device());
        let zeros = |_: &Column| Tensor::f_zeros(&shape, (Kind::Double, device));
        let mut kernels: Vec<Tensor> = columns.iter().map(zeros).collect::<std::result::Result<_, _>>()?;
        for p in 0..self.parameters() {
            let uses: Vec<Vec<Contribution>> = columns.iter().map(|c| self.contributions(p, c)).collect();
            if uses.iter().all(Vec::is_empty) {
                continue;
            }
            let v = self.variance_of(p, &variance)?;
            let _no_grad = no_grad_guard();
            let outer = uses.iter().map(|uses| self.outer(p, uses)).collect::<Result<Option<Vec<_>>>>()?;
            if let Some(outer) = outer {
                add_outer(&outer, &v, part, &mut kernels)?;
                continue;
            }
            for (uses, kernel) in uses.iter().zip(&mut kernels).filter(|(uses, _)| !uses.is_empty()) {
                add_rows(&self.parameter(p, uses).gradients(0, b)?, &v, part, kernel)?;
            }
        }
        if self.loops() {
            for (column, kernel) in columns.iter().zip(&mut kernels) {
                self.add_looped(column, &variance, part, kernel)?;
            }
        }
        Ok(kernels)
    }

    /// v of parameter p in f64.
    fn variance_of<'v>(&self, p: usize, variance: impl Fn(&str) -> Option<&'v Tensor>) -> Result<Tensor> {
        let leaf = self.leaves[p];
        let found = leaf.names.iter().find_map(|name| variance(name));
        let v = found.ok_or_else(|| {
            Error::parameter(leaf.name(), "the outputs depend on it, and the posterior does not know its precision")
        })?;
        if v.size() != leaf.tensor.size() {
            let (theirs, ours) = (v.size(), leaf.tensor.size());
            return Err(Error::parameter(
                leaf.name(),
                format!("the posterior has shape {theirs:?} and the model {ours:?}"),
            ));
        }
        Ok(v.f_to_device(leaf.tensor.device())?.f_to_kind(Kind::Double)?)
    }

    /// The part of the parameters that no tap explains.
    fn add_looped<'v>(
        &self,
        column: &Column,
        variance: impl Fn(&str) -> Option<&'v Tensor>,
        part: Part,
        kernel: &mut Tensor,
    ) -> Result<()> {
        let mut rows: Vec<Vec<Tensor>> = (0..self.parameters()).map(|_| Vec::new()).collect();
        for i in 0..self.batch() {
            for (p, g) in self.of_example(column, i)? {
                // An example whose output does not depend on it has no gradient, and those before it had none.
                while (rows[p].len() as i64) < i {
                    rows[p].push(g.f_zeros_like()?);
                }
                rows[p].push(g);
            }
        }
        let _no_grad = no_grad_guard();
        for (p, mut rows) in rows.into_iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
            while (rows.len() as i64) < self.batch() {
                rows.push(rows[0].f_zeros_like()?);
            }
            add_rows(&Tensor::f_stack(&rows, 0)?, &self.variance_of(p, &variance)?, part, kernel)?;
        }
        Ok(())
    }
}

/// Of Gᵢ as rows `[B, ..]`.
fn add_rows(rows: &Tensor, v: &Tensor, part: Part, kernel: &mut Tensor) -> Result<()> {
    let rows = rows.f_reshape([rows.size()[0], -1])?.f_to_kind(Kind::Double)?;
    let weighted = rows.f_mul(&v.f_reshape([1, -1])?)?;
    *kernel = match part {
        Part::All => kernel.f_addmm(&weighted, &rows.f_tr()?)?,
        Part::Diagonal => &*kernel + (weighted * rows).f_sum_dim_intlist(1, false, None::<Kind>)?,
    };
    Ok(())
}

/// Of Gᵢ = δᵢaᵢᵀ, with the same a in every column.
fn add_outer(columns: &[(Tensor, Outer)], v: &Tensor, part: Part, kernels: &mut [Tensor]) -> Result<()> {
    let deltas: Vec<Tensor> = columns.iter().map(|(d, _)| Ok(d.f_to_kind(Kind::Double)?)).collect::<Result<_>>()?;
    let Some((_, outer)) = columns.first() else { return Ok(()) };
    let a = match outer {
        Outer::Input(a) => a.f_to_kind(Kind::Double)?,
        Outer::One => {
            for (delta, kernel) in deltas.iter().zip(kernels) {
                add_rows(delta, v, part, kernel)?;
            }
            return Ok(());
        }
    };
    if part == Part::Diagonal {
        let spread = Outer::Input(a).spread(v)?;
        for (delta, kernel) in deltas.iter().zip(kernels) {
            *kernel += (delta.f_square()? * &spread).f_sum_dim_intlist(1, false, None::<Kind>)?;
        }
        return Ok(());
    }
    let (b, inputs) = (a.size()[0], a.size()[1]);
    let outputs = v.size()[0];
    let chunk = (CACHE_ELEMENTS / (b * inputs.max(b)).max(1)).clamp(1, outputs);
    let mut first = 0;
    while first < outputs {
        let length = chunk.min(outputs - first);
        // A `[i, o, j]` by one matrix product.
        let rows = a.f_unsqueeze(1)?.f_mul(&v.f_narrow(0, first, length)?)?;
        let shared = rows.f_reshape([b * length, inputs])?.f_matmul(&a.f_tr()?)?.f_reshape([b, length, b])?;
        for (delta, kernel) in deltas.iter().zip(&mut *kernels) {
            let delta = delta.f_narrow(1, first, length)?;
            let weighted = shared.f_mul(&delta.f_tr()?.f_contiguous()?)?;
            *kernel += delta.f_unsqueeze(1)?.f_bmm(&weighted)?.f_squeeze_dim(1)?;
        }
        first += length;
    }
    Ok(())
}
