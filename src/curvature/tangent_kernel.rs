//! Kernels of a model that is linear in its weights: the covariance of its outputs under a diagonal one of the weights.

use super::linearized::{Column, Linearized};
use super::parameter::{Parameter, chunks};
use crate::nn::tape::Outer;
use crate::{Error, Result};
use tch::{Kind, Tensor, no_grad_guard};

/// Elements of a temporary that is written and read once: 1 MiB in f64, which caches hold.
const CACHE_ELEMENTS: i64 = 1 << 17;

/// What is wanted of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entries {
    /// `[B, B]`
    All,
    /// `[B]`
    Diagonal,
}

impl Linearized<'_> {
    /// For every column s of one vector per example the kernel K\[i, j\] = Gᵢᵀ diag(v) Gⱼ with Gᵢ = Jᵢᵀsᵢ, in f64: then
    /// its smallest eigenvalues are those of the Gram matrix of the Gᵢ that the model has, and not rounding errors of
    /// sums.
    ///
    /// `variance`: v of each parameter, in its shape; `None` where it is not known, which is an error if the outputs
    /// depend on the parameter.
    ///
    /// With Gᵢ = δᵢaᵢᵀ of a linear layer no Gᵢ is formed, and the expensive part is shared by all columns:
    ///
    /// ```text
    /// Gᵢᵀ diag(v) Gⱼ = Σₒ δᵢₒ δⱼₒ Aₒ[i, j],    Aₒ[i, j] = Σₖ vₒₖ aᵢₖ aⱼₖ
    /// ```
    pub(crate) fn kernels(
        &mut self,
        columns: &[Tensor],
        entries: Entries,
        variance: &[Option<Tensor>],
    ) -> Result<Vec<Tensor>> {
        // All backward passes first: the products below share their expensive part between columns.
        let columns: Vec<Column> = columns.iter().map(|s| self.pull(s)).collect::<Result<_>>()?;
        let b = self.batch();
        let shape = if entries == Entries::All { vec![b, b] } else { vec![b] };
        let zeros = |_: &Column| Tensor::f_zeros(&shape, (Kind::Double, self.z.device()));
        let mut kernels: Vec<Tensor> = columns.iter().map(zeros).collect::<std::result::Result<_, _>>()?;
        for p in 0..self.parameters() {
            let each: Vec<Parameter> = columns.iter().map(|c| self.parameter(p, c)).collect();
            // Not asked for its variance either: a parameter without influence need not be known to the posterior.
            if !each.iter().any(Parameter::is_used) {
                continue;
            }
            let v = self.variance_of(p, variance)?;
            let _no_grad = no_grad_guard();
            let outer = each.iter().map(Parameter::outer).collect::<Result<Option<Vec<_>>>>()?;
            if let Some(outer) = outer {
                add_outer(&outer, &v, entries, &mut kernels)?;
                continue;
            }
            for (parameter, kernel) in each.iter().zip(&mut kernels).filter(|(parameter, _)| parameter.is_used()) {
                add_rows(&parameter.gradients(0, b)?, &v, entries, kernel)?;
            }
        }
        for (column, kernel) in columns.iter().zip(&mut kernels) {
            self.add_looped(column, variance, entries, kernel)?;
        }
        Ok(kernels)
    }

    /// v of parameter p in f64.
    fn variance_of(&self, p: usize, variance: &[Option<Tensor>]) -> Result<Tensor> {
        let (name, leaf) = self.tapped.params[p];
        let v = variance[p].as_ref().ok_or_else(|| {
            Error::parameter(name, "the outputs depend on it, and the posterior does not know its precision")
        })?;
        if v.size() != leaf.size() {
            let (theirs, ours) = (v.size(), leaf.size());
            return Err(Error::parameter(name, format!("the posterior has shape {theirs:?} and the model {ours:?}")));
        }
        Ok(v.f_to_device(leaf.device())?.f_to_kind(Kind::Double)?)
    }

    /// The part of the parameters that no tap explains.
    fn add_looped(
        &self,
        column: &Column,
        variance: &[Option<Tensor>],
        entries: Entries,
        kernel: &mut Tensor,
    ) -> Result<()> {
        let mut rows: Vec<Vec<Tensor>> = (0..self.parameters()).map(|_| Vec::new()).collect();
        self.looped(column, 0..self.batch(), |i, p, g| {
            // An example whose output does not depend on it has no gradient, and those before it had none.
            while (rows[p].len() as i64) < i {
                rows[p].push(g.f_zeros_like()?);
            }
            rows[p].push(g);
            Ok(())
        })?;
        let _no_grad = no_grad_guard();
        for (p, mut rows) in rows.into_iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
            while (rows.len() as i64) < self.batch() {
                rows.push(rows[0].f_zeros_like()?);
            }
            add_rows(&Tensor::f_stack(&rows, 0)?, &self.variance_of(p, variance)?, entries, kernel)?;
        }
        Ok(())
    }
}

/// Of Gᵢ as rows `[B, ..]`.
fn add_rows(rows: &Tensor, v: &Tensor, entries: Entries, kernel: &mut Tensor) -> Result<()> {
    let rows = rows.f_reshape([rows.size()[0], -1])?.f_to_kind(Kind::Double)?;
    let weighted = rows.f_mul(&v.f_reshape([1, -1])?)?;
    *kernel = match entries {
        // Weighted on one side, which needs no square root of v.
        Entries::All => kernel.f_addmm(&weighted, &rows.f_tr()?)?,
        Entries::Diagonal => &*kernel + (weighted * rows).f_sum_dim_intlist(1, false, None::<Kind>)?,
    };
    Ok(())
}

/// Of Gᵢ = δᵢaᵢᵀ, with the same a in every column.
fn add_outer(columns: &[(Tensor, Outer)], v: &Tensor, entries: Entries, kernels: &mut [Tensor]) -> Result<()> {
    let deltas: Vec<Tensor> = columns.iter().map(|(d, _)| Ok(d.f_to_kind(Kind::Double)?)).collect::<Result<_>>()?;
    let Some((_, outer)) = columns.first() else { return Ok(()) };
    let a = match outer {
        Outer::Input(a) => a.f_to_kind(Kind::Double)?,
        Outer::One => {
            for (delta, kernel) in deltas.iter().zip(kernels) {
                add_rows(delta, v, entries, kernel)?;
            }
            return Ok(());
        }
    };
    if entries == Entries::Diagonal {
        let spread = Outer::Input(a).spread(v)?;
        for (delta, kernel) in deltas.iter().zip(kernels) {
            *kernel += (delta.f_square()? * &spread).f_sum_dim_intlist(1, false, None::<Kind>)?;
        }
        return Ok(());
    }
    let (b, inputs) = (a.size()[0], a.size()[1]);
    let outputs = v.size()[0];
    // Over outputs, not examples: every pair of examples is needed at once, and each output adds a term.
    for (first, length) in chunks(outputs, (CACHE_ELEMENTS / (b * inputs.max(b)).max(1)).max(1)) {
        // A `[i, o, j]` by one matrix product.
        let rows = a.f_unsqueeze(1)?.f_mul(&v.f_narrow(0, first, length)?)?;
        let shared = rows.f_reshape([b * length, inputs])?.f_matmul(&a.f_tr()?)?.f_reshape([b, length, b])?;
        for (delta, kernel) in deltas.iter().zip(&mut *kernels) {
            let delta = delta.f_narrow(1, first, length)?;
            // Contiguous, since the product goes over the last dimension, where the transposed view has strides.
            let weighted = shared.f_mul(&delta.f_tr()?.f_contiguous()?)?;
            *kernel += delta.f_unsqueeze(1)?.f_bmm(&weighted)?.f_squeeze_dim(1)?;
        }
    }
    Ok(())
}
