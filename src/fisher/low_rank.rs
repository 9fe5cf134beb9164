//! The largest eigenvalues of a Fisher information and their eigenvectors.

use super::at::{At, at};
use super::{Batch, Fisher};
use crate::{Error, IntoTensor, Params, Result, check, kernel, linalg};
use tch::{Device, Kind, Tensor};

impl Fisher {
    /// F ≈ U diag(l) Uᵀ with at most `rank` eigenvectors, in one pass: of the eigenvectors so far and the gradients of
    /// a chunk of examples the `rank` leading ones are kept. Exact as long as F has no higher rank; otherwise what was
    /// let go, whose trace is [`LowRankFisher::lost`], is missing: U diag(l) Uᵀ ≤ F.
    ///
    /// Memory: 8·P·(rank + chunk) bytes for P weights; no matrix over all weights.
    ///
    /// # Errors
    /// As [`Fisher::diagonal`]; a rank of 0.
    pub fn low_rank<B: Into<Batch>, L: IntoTensor>(
        &self,
        rank: usize,
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        model: impl Fn(&Tensor) -> L,
    ) -> Result<LowRankFisher> {
        check::count("rank", rank)?;
        let params = Params::separate(params)?;
        params.check()?;
        let solution = params.at_present();
        let weights: usize = solution.leaves().iter().map(|l| l.tensor.numel()).sum();
        let device = solution.leaves().first().map_or(Device::Cpu, |l| l.tensor.device());
        let like = (Kind::Double, device);
        let mut kept = Kept {
            rows: Tensor::f_zeros([0, weights as i64], like)?,
            lost: Tensor::f_zeros([0], like)?.sum(Kind::Double),
        };
        let seen = self.each(&params, batches, model, |batch, columns| {
            batch.each_gradient(
                columns.len(),
                |c| columns.get(c),
                |g| {
                    // Few at a time: their products are a matrix over them.
                    g.f_split(ROWS, 0)?.iter().try_for_each(|g| kept.add(g, rank as i64))
                },
            )
        })?;
        let Kept { rows, lost } = kept;
        let values = rows.f_square()?.f_sum_dim_intlist(1, false, Kind::Double)?;
        let vectors = (rows / values.f_sqrt()?.f_unsqueeze(1)?).f_tr()?;
        let lost = lost.double_value(&[]);
        Ok(LowRankFisher { at: At { solution, seen, fisher: self.clone() }, vectors, values, lost })
    }
}

/// Gradients that are added at once.
const ROWS: i64 = 256;

/// Orthogonal rows √l uᵀ `[k, P]`, and the trace that was let go.
struct Kept {
    rows: Tensor,
    lost: Tensor,
}

impl Kept {
    /// The `rank` leading directions of RᵀR + GᵀG: those of the matrix of products of the rows, which is small.
    fn add(&mut self, g: &Tensor, rank: i64) -> Result<()> {
        let all = Tensor::f_cat(&[&self.rows, g], 0)?;
        let products = all.f_matmul(&all.f_tr()?)?;
        if let Some(value) = kernel::first_non_finite(&products) {
            let problem = "nothing was changed (look at the weights and the inputs)";
            return Err(Error::Curvature(format!("the gradient of an example is not finite ({value}); {problem}")));
        }
        let (values, vectors) = linalg::eigen(&products)?;
        let n = values.size()[0];
        let largest = values.f_narrow(0, n - 1, 1)?;
        // Below rounding they are no directions, and a division by their roots would make some up.
        let there = values.f_gt_tensor(&(largest * (n as f64 * f64::EPSILON)))?.f_sum(Kind::Int64)?.int64_value(&[]);
        let keep = there.min(rank);
        self.lost = &self.lost + values.f_narrow(0, 0, n - keep)?.f_clamp_min(0.0)?.f_sum(Kind::Double)?;
        self.rows = vectors.f_narrow(1, n - keep, keep)?.f_tr()?.f_matmul(&all)?;
        Ok(())
    }
}

/// Leading eigenvectors of a Fisher information, from [`Fisher::low_rank`]: a sum over [`LowRankFisher::examples`]
/// examples.
#[derive(Debug)]
pub struct LowRankFisher {
    at: At,
    vectors: Tensor,
    values: Tensor,
    lost: f64,
}

at!(LowRankFisher);

impl LowRankFisher {
    /// U `[P, K]` in f64, orthonormal columns over the weights of the parameters in order, each parameter's in
    /// row-major order.
    pub fn vectors(&self) -> &Tensor {
        &self.vectors
    }

    /// l `[K]` > 0, ascending, K ≤ the rank asked for.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// tr(F - U diag(l) Uᵀ) ≥ 0: what is missing beside Σ l. 0 up to rounding if F has no higher rank.
    pub fn lost(&self) -> f64 {
        self.lost
    }
}
