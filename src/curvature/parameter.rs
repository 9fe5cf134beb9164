//! Sums over the per-example gradients of one parameter, a chunk of examples at a time; and the test whether those
//! gradients explain the plain one.

use crate::nn::tape::{Outer, Rule};
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// Elements of the temporaries that hold the per-example gradients of some examples at a time; one example may exceed
/// it.
///
/// 16 MiB in f32, which allocators keep for the next chunk instead of returning it to the system.
pub(super) const CHUNK_ELEMENTS: i64 = 1 << 22;

/// One use of a parameter, and δ = ∂L/∂z of that layer call.
#[derive(Clone, Copy)]
pub(super) struct Contribution<'a> {
    pub rule: &'a dyn Rule,
    pub delta: &'a Tensor,
}

impl Contribution<'_> {
    /// The leading dimension.
    pub(super) fn rows(&self) -> i64 {
        self.delta.size()[0]
    }
}

/// A parameter and its uses by tapped layers; G̃ᵢ is what they make of δᵢ, summed over the uses.
pub(super) struct Parameter<'a> {
    pub tensor: &'a Tensor,
    pub uses: Vec<Contribution<'a>>,
    /// Number of examples.
    pub batch: i64,
    /// Elements of a chunk.
    pub elements: i64,
}

impl Parameter<'_> {
    /// Whether the loss depends on it by some tapped layer.
    pub(super) fn is_used(&self) -> bool {
        !self.uses.is_empty()
    }

    /// The leading dimension of each use's δ.
    pub(super) fn batches(&self) -> impl Iterator<Item = i64> {
        self.uses.iter().map(Contribution::rows)
    }

    /// Its uses by themselves, which need not have seen the same examples.
    fn apart(&self) -> impl Iterator<Item = Self> {
        self.uses.iter().map(|u| Parameter { uses: vec![*u], batch: u.rows(), ..*self })
    }

    /// Kind of what is summed for it.
    pub(super) fn kind(&self) -> Kind {
        accumulation_kind(self.tensor.kind())
    }

    /// How many examples to take at a time, when the work on one takes `elements`.
    pub(super) fn chunk(&self, elements: i64) -> i64 {
        (self.elements / elements.max(1)).max(1)
    }

    /// Elements of memory that the gradient of one example takes.
    pub(super) fn per_example(&self) -> i64 {
        // Twice: the gradients, and what a sum makes of them (their squares).
        self.uses.iter().map(Self::scratch).sum::<i64>() + 2 * self.tensor.numel() as i64
    }

    /// Of these, those for one use, without the gradient itself.
    pub(super) fn scratch(u: &Contribution) -> i64 {
        u.rule.scratch() + (u.delta.numel() as i64) / u.rows().max(1)
    }

    /// Calls `f(first, G̃)` for a chunk of examples at a time, as many as fit `share` times.
    pub(super) fn each_chunk(&self, share: i64, mut f: impl FnMut(i64, Tensor) -> Result<()>) -> Result<()> {
        let mut chunks = chunks(self.batch, (self.chunk(self.per_example()) / share).max(1));
        chunks.try_for_each(|(first, length)| f(first, self.gradients(first, length)?))
    }

    /// Σᵢ f(G̃ᵢ); `f` keeps the shape.
    fn sum(&self, f: impl Fn(Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let mut total: Option<Tensor> = None;
        self.each_chunk(1, |_, g| {
            let sum = f(g)?.f_sum_dim_intlist(0, false, None::<Kind>)?;
            total = Some(match total.take() {
                // In place: the first chunk's sum is ours.
                Some(mut total) => total.f_add_(&sum)?,
                None => sum,
            });
            Ok(())
        })?;
        match total {
            Some(total) => Ok(total),
            None => Ok(Tensor::f_zeros(self.tensor.size(), (self.kind(), self.tensor.device()))?),
        }
    }

    /// G̃ᵢ `[length, …]`
    pub(super) fn gradients(&self, first: i64, length: i64) -> Result<Tensor> {
        let of_use = |u: &Contribution| {
            let delta = u.delta.f_narrow(0, first, length)?.f_totype(self.kind())?;
            u.rule.gradients(first, &delta)
        };
        let (head, tail) = self.uses.split_first().ok_or_else(|| Error::PerExample("no use".to_owned()))?;
        tail.iter().try_fold(of_use(head)?, |sum, u| Ok(sum.f_add(&of_use(u)?)?))
    }

    /// δ and aᵢ if G̃ᵢ = δᵢaᵢᵀ.
    pub(super) fn outer(&self) -> Result<Option<(Tensor, Outer)>> {
        // A sum of two outer products is not one.
        let [only] = &self.uses[..] else { return Ok(None) };
        let delta = only.delta.f_totype(self.kind())?;
        Ok(only.rule.outer(&delta)?.map(|outer| (delta, outer)))
    }

    /// Σᵢ G̃ᵢ
    fn total(&self) -> Result<Tensor> {
        let mut total = Tensor::f_zeros(self.tensor.size(), (self.kind(), self.tensor.device()))?;
        for used in self.apart() {
            total = total.f_add(&match used.outer()? {
                Some((delta, outer)) => outer.total(&delta)?,
                None => used.sum(Ok)?,
            })?;
        }
        Ok(total)
    }

    /// Σᵢ G̃ᵢ²
    pub(super) fn sum_of_squares(&self) -> Result<Tensor> {
        let closed_form = match &self.uses[..] {
            [only] => only.rule.squares(&only.delta.f_totype(self.kind())?)?,
            _ => None,
        };
        match closed_form {
            Some(sum) => Ok(sum),
            None => self.sum(|g| Ok(g.f_square()?)),
        }
    }

    /// Σᵢ |G̃ᵢ|
    pub(super) fn sum_of_absolutes(&self) -> Result<Tensor> {
        self.sum(|g| Ok(g.f_abs()?))
    }

    /// c = B Σᵢ G̃ᵢ².
    pub(super) fn squares(&self) -> Result<Tensor> {
        Ok(self.sum_of_squares()?.f_mul_scalar_(self.batch as f64)?)
    }

    /// Whether g = Σᵢ G̃ᵢ up to rounding, given g, the scale of its own per-example gradients and that of the whole
    /// model's.
    pub(super) fn explains(&self, g: &Tensor, scale: f64, all: f64) -> Result<bool> {
        let g = g.f_totype(self.kind())?;
        let error = norm(&self.total()?.f_sub(&g)?)?;
        // Rounding errors of examples add up like independent ones, so that they are measured against
        // (Σᵢ ‖G̃ᵢ‖²)^½ and not against ‖g‖ alone, which vanishes at an optimum. The scale of the whole model is there
        // for parameters on which the loss depends only formally (a bias in front of a normalization, the bias of
        // attention's keys), whose gradients are nothing but rounding errors: a hundredth of it is far above those and
        // far below a use that is missed.
        let own = norm(&g)?.max(scale);
        // NaN passes: a gradient that is not finite is reported as such by its reader.
        Ok(error.is_nan() || error <= self.tolerance() * own.max(all / 100.0))
    }

    /// The scale of its per-example gradients, (Σᵢ ‖G̃ᵢ‖²)^½, if the uses are those of different examples.
    pub(super) fn scale_apart(&self) -> Result<f64> {
        let mut sum = 0.0;
        for used in self.apart() {
            sum += f64::try_from(used.sum_of_squares()?.f_sum(Kind::Double)?)?;
        }
        Ok(sum.sqrt())
    }

    /// The same from c = B Σᵢ G̃ᵢ².
    pub(super) fn scale(&self, c: &Tensor) -> Result<f64> {
        // c carries a factor B that the norm of the gradients does not have.
        Ok((f64::try_from(c.f_sum(Kind::Double)?)? / self.batch as f64).sqrt())
    }

    /// About ten unit round-offs of the least exact arithmetic that may be at work: bf16 (2⁻⁹, and f16 loses more to
    /// its narrow range), TF32 (2⁻¹¹, cuDNN's convolutions on f32); for f64 far above rounding and far below any real
    /// use.
    fn tolerance(&self) -> f64 {
        let kinds = || self.uses.iter().map(|u| u.delta.kind()).chain([self.tensor.kind()]);
        if kinds().any(|k| matches!(k, Kind::Half | Kind::BFloat16)) {
            2e-2
        } else if kinds().all(|k| k == Kind::Double) {
            1e-8
        } else {
            5e-3
        }
    }
}

/// (first, length) of the chunks of `size` examples that `batch` examples are cut into.
pub(super) fn chunks(batch: i64, size: i64) -> impl Iterator<Item = (i64, i64)> {
    // One example may need more than a chunk, and is still taken.
    let size = size.max(1);
    (0..batch).step_by(size as usize).map(move |first| (first, size.min(batch - first)))
}

/// f64 for f64, and f32 for all others.
pub(crate) fn accumulation_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

fn norm(x: &Tensor) -> Result<f64> {
    Ok(f64::try_from(x.f_square()?.f_sum(Kind::Double)?)?.sqrt())
}
