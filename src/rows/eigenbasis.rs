//! The basis in which a Kronecker-factored second moment of the gradients is diagonal: its state, how it follows the
//! gradients, rotations into it and back.
//!
//! For rows that keep the moments themselves (Evon, Soap). The factors of noisy K-FAC come from layers, and are in
//! `noisy_kfac.rs`.

use crate::driver::{BlockRule, Learned};
use crate::linalg::{into_basis, matrix_shape, out_of_basis, sides};
use crate::posterior::{KroneckerGaussian, KroneckerParameter};
use crate::prior::BlockPrior;
use crate::{Result, linalg};
use tch::Tensor;

/// For a matrix of shape `[r, c]`: L = EMA GGᵀ and R = EMA GᵀG with bases Q_L, Q_R of their eigenvectors, as four state
/// tensors in this order. A side that is not rotated has empty ones.
///
/// Tensors come in the shape of the block and go so; which matrix they are in between, the sizes of the bases say.
#[derive(Debug)]
pub(super) struct Eigenbasis<'a>(&'a [Tensor]);

/// Names of the four state tensors.
pub(super) const EIGENBASIS: [&str; 4] = ["left_moment", "right_moment", "left_basis", "right_basis"];

/// The matrix of a parameter's rows, which is the usual one; `None` for a vector.
pub(super) fn rows(shape: &[i64]) -> Option<[i64; 2]> {
    (shape.len() > 1).then(|| matrix_shape(shape))
}

/// The matrix of a parameter whose neighbouring dimensions are multiplied, from the first on, as long as the product is
/// at most `limit`: the first of these products against all others. `None` if there is only one.
pub(super) fn merged(shape: &[i64], limit: i64) -> Option<[i64; 2]> {
    let n: i64 = shape.iter().product();
    let mut first = 1;
    for size in shape {
        // Dimensions of 1 belong to what comes after them, so that the first product is not theirs.
        if first > 1 && first * size > limit {
            break;
        }
        first *= size;
    }
    (first < n).then(|| [first, n / first])
}

impl<'a> Eigenbasis<'a> {
    /// From the state tensors.
    pub(super) fn of(state: &'a [Tensor]) -> Self {
        Eigenbasis(state)
    }

    /// Zero moments, with the prior's bases where it has some and identities elsewhere, of the prior's matrix where the
    /// mean is one. What is no matrix (`None`) is not rotated, nor are sides with more than `max_dim` rows or only one.
    pub(super) fn initial(mean: &Tensor, matrix: Option<[i64; 2]>, max_dim: i64, prior: &BlockPrior) -> Vec<Tensor> {
        let like = (mean.kind(), mean.device());
        let matrix = prior.sides().filter(|_| mean.dim() > 1).or(matrix);
        let n = |side: usize| matrix.map_or(0, |sides| sides[side]);
        let n = |side: usize| if (2..=max_dim).contains(&n(side)) { n(side) } else { 0 };
        let zero = |side| Tensor::zeros([n(side); 2], like);
        let bases = prior.bases();
        let basis = |side: usize| {
            // The prior may rotate a side that `max_dim` leaves as it is here.
            let own = bases[side].filter(|q| q.size() == [n(side); 2]);
            own.map_or_else(|| Tensor::eye(n(side), like), Tensor::copy)
        };
        vec![zero(0), zero(1), basis(0), basis(1)]
    }

    fn basis(&self, side: usize) -> Option<&'a Tensor> {
        self.0.get(2 + side).filter(|q| q.numel() > 0)
    }

    /// Q_L, if that side is rotated.
    pub(super) fn left(&self) -> Option<&'a Tensor> {
        self.basis(0)
    }

    /// Q_R, if that side is rotated.
    pub(super) fn right(&self) -> Option<&'a Tensor> {
        self.basis(1)
    }

    /// The diagonal of a prior's Δ in this basis; a 0-dim δ for an isotropic prior.
    pub(super) fn delta(&self, prior: &BlockPrior, shape: &[i64]) -> Result<Tensor> {
        prior.in_basis(self.left(), self.right(), shape)
    }

    /// X as the matrix whose sides have these bases; a vector stays one where it is not rotated.
    pub(super) fn matrix(&self, x: &Tensor) -> Result<Tensor> {
        let (left, right) = (self.left(), self.right());
        if left.is_none() && right.is_none() {
            return Ok(x.shallow_clone());
        }
        Ok(x.f_reshape(sides(&x.size(), left, right))?)
    }

    /// Q_Lᵀ X Q_R
    pub(super) fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        Ok(into_basis(&self.matrix(x)?, self.left(), self.right())?.f_reshape(x.size())?)
    }

    /// Q_L X Q_Rᵀ
    pub(super) fn back(&self, x: &Tensor) -> Result<Tensor> {
        Ok(out_of_basis(&self.matrix(x)?, self.left(), self.right())?.f_reshape(x.size())?)
    }

    /// GGᵀ and GᵀG for the sides that are rotated.
    pub(super) fn moments(&self, g: &Tensor) -> Result<Vec<Tensor>> {
        let g = &self.matrix(g)?;
        let none = |side: usize| Ok(self.0[side].zeros_like());
        Ok(vec![
            self.left().map_or_else(|| none(0), |_| Ok::<_, crate::Error>(g.f_matmul(&g.f_tr()?)?))?,
            self.right().map_or_else(|| none(1), |_| Ok::<_, crate::Error>(g.f_tr()?.f_matmul(g)?))?,
        ])
    }

    /// The four state tensors after the moments of the t-th update, which enter with weight 1-β. The first ones do so,
    /// too: L and R start at zero, and are small at first, which their eigenvectors do not see. The basis follows after
    /// the first update, by its eigenvectors, and after every `frequency`-th one, by a step of the power method and
    /// orthogonalization, which costs less and keeps the order of the vectors. Moments of zero turn nothing. Without fresh moments, the basis still follows those that there are.
    pub(super) fn updated(&self, moments: Option<&[Tensor]>, beta: f64, t: u64, frequency: u64) -> Result<Vec<Tensor>> {
        let mut new = Vec::with_capacity(4);
        for (side, old) in self.0[..2].iter().enumerate() {
            new.push(match moments.map(|moments| &moments[side]) {
                None => old.shallow_clone(),
                Some(fresh) => old.f_lerp(fresh, 1.0 - beta)?,
            });
        }
        for side in 0..2 {
            let (moment, basis) = (&new[side], &self.0[2 + side]);
            let due = basis.numel() > 0 && (t <= 1 || t.is_multiple_of(frequency));
            // Without any gradient the basis stays: it may be that of a prior, which another would know only in part.
            new.push(if !due || linalg::is_zero(moment)? {
                basis.shallow_clone()
            } else if t <= 1 {
                // Descending, as the power method would sort them in time. The row's second moments belong to one
                // vector each and are not permuted with them.
                linalg::eigen(moment)?.1.f_flip([1])?
            } else {
                linalg::nearer_eigenvectors(moment, basis)?
            });
        }
        Ok(new)
    }

    /// The Gaussian with this precision in the basis of each block, which starts at number `first` of the state
    /// tensors; `precision(learned, delta)` with the prior's δ in that basis.
    pub(super) fn posterior<R: BlockRule>(
        blocks: Vec<Learned<R>>,
        first: usize,
        precision: impl Fn(&Learned<R>, Tensor) -> Result<Tensor>,
    ) -> Result<KroneckerGaussian> {
        let mut parameters = Vec::new();
        for learned in blocks {
            let basis = Eigenbasis::of(&learned.state[first..]);
            let s = precision(&learned, basis.delta(learned.prior, &learned.state[0].size())?)?;
            parameters.extend(learned.means.into_iter().map(|(name, mean)| {
                let [left, right] = [basis.left(), basis.right()].map(|q| q.map(Tensor::shallow_clone));
                let precision = s.reshape(mean.size());
                KroneckerParameter { name, mean, left, right, precision }
            }));
        }
        KroneckerGaussian::new(parameters)
    }
}
