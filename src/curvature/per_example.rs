//! g = ∇L and c = (1/B) Σᵢ (∇ℓᵢ)² from one backward pass through tapped layers.
//!
//! L = (1/B) Σᵢ ℓᵢ is a mean, so δᵢ = ∂L/∂zᵢ is (1/B) ∂ℓᵢ/∂zᵢ, and what a layer's rule makes of δᵢ is G̃ᵢ = ∇ℓᵢ/B. Hence
//!
//! ```text
//! g = Σᵢ G̃ᵢ,    c = (1/B) Σᵢ (B G̃ᵢ)² = B Σᵢ G̃ᵢ²
//! ```
//!
//! A parameter that several layer calls use (tied weights, a layer applied twice) has G̃ᵢ = the sum over its uses, taken
//! before squaring.

use crate::nn::tape::{Rule, Tape};
use crate::{Error, Result};
use std::collections::HashMap;
use tch::{Kind, Tensor, no_grad_guard};

/// Elements of the temporaries that hold the per-example gradients of some examples at a time; one example may exceed it.
///
/// 16 MiB in f32, which allocators keep for the next chunk instead of returning it to the system.
const CHUNK_ELEMENTS: i64 = 1 << 22;

const WAYS_OUT: &str = "either build the model from the layers of `tch_blr::nn`, with the batch as leading dimension, or \
                        return the [B] per-example losses from the closure instead of their mean (slower: B backward \
                        passes for the parameters concerned)";

/// What a backward pass gives per parameter; `None` where the loss does not depend on the parameter.
#[derive(Debug)]
pub(crate) struct PerExample {
    /// g, in the kind of the parameter.
    pub gradient: Vec<Option<Tensor>>,
    /// c, f64 for parameters in f64 and f32 for all others.
    pub squares: Vec<Option<Tensor>>,
    /// Whether the check found a parameter that is used outside the tapped layers too, so that a later call without the
    /// check would give wrong squares for it.
    pub mixed: bool,
    /// B; 0 if the loss depends on none of the parameters and came without per-example losses.
    #[cfg_attr(not(test), allow(dead_code))]
    pub batch: i64,
}

/// g = ∇L and c = (1/B) Σᵢ (∇ℓᵢ)² of L = (1/B) Σᵢ ℓᵢ.
///
/// * `loss`: L, 0-dim, with its graph, computed inside [`Tape::record`].
/// * `losses`: ℓ `[B]`, of which `loss` is the mean, if the closure returned them. They allow parameters that are not
///   tapped, at the price of B backward passes for those.
/// * `params`: name and leaf of each parameter; all require gradients.
/// * `check`: compare Σᵢ G̃ᵢ with g, which differ where a parameter is also used outside the tapped layers. It costs about
///   as much as the squares do and reads values back from the device; once per model is enough, unless the result is
///   [`PerExample::mixed`].
///
/// Without `losses`, one backward pass and the graph is freed. Call with gradients enabled.
///
/// # Errors
/// [`Error::PerExample`] if, without `losses`, a parameter is used outside the tapped layers or B is ambiguous;
/// [`Error::Loss`] for a loss of another shape or without a graph.
pub(crate) fn per_example(
    loss: &Tensor,
    losses: Option<&Tensor>,
    tape: &Tape,
    params: &[(&str, &Tensor)],
    check: bool,
) -> Result<PerExample> {
    in_chunks(CHUNK_ELEMENTS, loss, losses, tape, params, check)
}

fn in_chunks(
    elements: i64,
    loss: &Tensor,
    losses: Option<&Tensor>,
    tape: &Tape,
    params: &[(&str, &Tensor)],
    check: bool,
) -> Result<PerExample> {
    let given = validate(loss, losses)?;
    let count = params.len();
    if params.is_empty() {
        // A backward pass with respect to nothing would accumulate into every leaf's `.grad`.
        return Ok(PerExample { gradient: Vec::new(), squares: Vec::new(), mixed: false, batch: given.unwrap_or(0) });
    }

    let matched = match_uses(tape, params)?;
    let outputs: Vec<usize> = {
        let mut taps: Vec<usize> = matched.iter().flatten().map(|&(tap, _)| tap).collect();
        taps.sort_unstable();
        taps.dedup();
        taps
    };
    let mut inputs: Vec<&Tensor> = params.iter().map(|&(_, p)| p).collect();
    inputs.extend(outputs.iter().map(|&tap| &tape.taps()[tap].output));
    let mut gradient: Vec<Option<Tensor>> = Tensor::f_run_backward(&[loss], &inputs, losses.is_some(), false)?
        .into_iter()
        .map(|g| g.defined().then_some(g))
        .collect();
    let deltas: HashMap<usize, Tensor> =
        outputs.into_iter().zip(gradient.split_off(count)).filter_map(|(tap, delta)| Some((tap, delta?))).collect();

    let contributions: Vec<Vec<Contribution>> = matched
        .iter()
        .map(|uses| {
            let contribution = |&(tap, rule)| Some(Contribution { rule, delta: deltas.get(&tap)? });
            uses.iter().filter_map(contribution).collect()
        })
        .collect();
    let used: Vec<usize> = (0..count).filter(|&p| gradient[p].is_some()).collect();
    let batch = match given {
        Some(batch) => batch,
        None => common_batch(params, &contributions, &used)?,
    };

    let mut squares: Vec<Option<Tensor>> = params.iter().map(|_| None).collect();
    let mut untapped = Vec::new();
    let guard = no_grad_guard();
    for &p in &used {
        let uses = &contributions[p];
        if uses.is_empty() || uses.iter().any(|u| u.batch() != batch) {
            untapped.push(p);
        } else {
            squares[p] = Some(Parameter { tensor: params[p].1, uses, batch, elements }.squares()?);
        }
    }
    let mut mixed = false;
    if check {
        let all = global_scale(&squares, batch)?;
        for &p in &used {
            let (Some(g), Some(c)) = (&gradient[p], &squares[p]) else { continue };
            let parameter = Parameter { tensor: params[p].1, uses: &contributions[p], batch, elements };
            if !parameter.explains(g, c, all)? {
                if losses.is_none() {
                    return Err(Error::PerExample(format!(
                        "parameter `{}` is used by tapped layers and outside of them too, so that its per-example \
                         gradients are unknown; {WAYS_OUT}",
                        params[p].0
                    )));
                }
                mixed = true;
                untapped.push(p);
            }
        }
    }
    drop(guard);
    if let Some(losses) = losses {
        one_by_one(losses, params, &untapped, &mut squares)?;
    }
    Ok(PerExample { gradient, squares, mixed, batch })
}

/// The number of per-example losses, if they are given.
fn validate(loss: &Tensor, losses: Option<&Tensor>) -> Result<Option<i64>> {
    if !loss.size().is_empty() || !loss.requires_grad() {
        return Err(Error::Loss(format!("expected a 0-dim mean loss with a graph; its shape is {:?}", loss.size())));
    }
    let Some(losses) = losses else { return Ok(None) };
    match losses.size()[..] {
        [batch] if batch > 0 && losses.requires_grad() => Ok(Some(batch)),
        _ => Err(Error::Loss(format!(
            "expected [B] per-example losses with a graph; their shape is {:?}",
            losses.size()
        ))),
    }
}

/// The index of a tap, and how the per-example gradients of a parameter that it uses follow from it.
pub(super) type Match<'a> = (usize, &'a dyn Rule);

/// For each parameter the taps that use it.
///
/// Identity is that of the storage and its layout: every handle to a variable shares it, also after the variable's data
/// were swapped for a perturbation.
pub(super) fn match_uses<'a>(tape: &'a Tape, params: &[(&str, &Tensor)]) -> Result<Vec<Vec<Match<'a>>>> {
    let mut at_address: HashMap<_, Vec<usize>> = HashMap::new();
    for (p, (_, tensor)) in params.iter().enumerate() {
        at_address.entry(tensor.data_ptr()).or_default().push(p);
    }
    let mut matched: Vec<Vec<_>> = params.iter().map(|_| Vec::new()).collect();
    for (index, tap) in tape.taps().iter().enumerate() {
        for used in &tap.uses {
            for &p in at_address.get(&used.parameter.data_ptr()).into_iter().flatten() {
                if params[p].1.f_is_set_to(&used.parameter)? {
                    matched[p].push((index, used.rule.as_ref()));
                }
            }
        }
    }
    Ok(matched)
}

/// The leading dimension that all taps share.
fn common_batch(params: &[(&str, &Tensor)], uses: &[Vec<Contribution>], used: &[usize]) -> Result<i64> {
    let mut first: Option<(&str, i64)> = None;
    for &p in used {
        let name = params[p].0;
        if uses[p].is_empty() {
            return Err(Error::PerExample(format!(
                "the loss depends on parameter `{name}`, but not through a tapped layer, so that its per-example \
                 gradients are unknown; {WAYS_OUT}"
            )));
        }
        for batch in uses[p].iter().map(Contribution::batch) {
            let (other, expected) = *first.get_or_insert((name, batch));
            if batch != expected {
                return Err(Error::PerExample(format!(
                    "the layer of parameter `{other}` saw {expected} examples and that of `{name}` {batch} (leading \
                     dimensions of their outputs), so that the number of examples is ambiguous; {WAYS_OUT}"
                )));
            }
        }
    }
    Ok(first.map_or(0, |(_, batch)| batch))
}

/// One use of a parameter, and δ = ∂L/∂z of that layer call.
struct Contribution<'a> {
    rule: &'a dyn Rule,
    delta: &'a Tensor,
}

impl Contribution<'_> {
    fn batch(&self) -> i64 {
        self.delta.size()[0]
    }
}

/// A parameter all of whose uses by layers are tapped.
struct Parameter<'a> {
    tensor: &'a Tensor,
    uses: &'a [Contribution<'a>],
    batch: i64,
    elements: i64,
}

impl Parameter<'_> {
    fn kind(&self) -> Kind {
        accumulation_kind(self.tensor.kind())
    }

    /// Σᵢ f(G̃ᵢ), a chunk of examples at a time; `f` keeps the shape.
    fn sum(&self, f: impl Fn(Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let per_example: i64 =
            self.uses.iter().map(|u| u.rule.scratch() + (u.delta.numel() as i64) / self.batch).sum::<i64>()
                + 2 * self.tensor.numel() as i64;
        let chunk = (self.elements / per_example.max(1)).clamp(1, self.batch);
        let mut total: Option<Tensor> = None;
        let mut first = 0;
        while first < self.batch {
            let length = chunk.min(self.batch - first);
            let sum = f(self.gradients(first, length)?)?.f_sum_dim_intlist(0, false, None::<Kind>)?;
            total = Some(match total {
                Some(mut total) => total.f_add_(&sum)?,
                None => sum,
            });
            first += length;
        }
        match total {
            Some(total) => Ok(total),
            None => Ok(Tensor::f_zeros(self.tensor.size(), (self.kind(), self.tensor.device()))?),
        }
    }

    /// G̃ᵢ `[length, …]`, summed over the uses.
    fn gradients(&self, first: i64, length: i64) -> Result<Tensor> {
        let of_use = |u: &Contribution| {
            let delta = u.delta.f_narrow(0, first, length)?.f_totype(self.kind())?;
            u.rule.gradients(first, &delta)
        };
        let (head, tail) = self.uses.split_first().ok_or_else(|| Error::PerExample("no use".to_owned()))?;
        tail.iter().try_fold(of_use(head)?, |sum, u| Ok(sum.f_add(&of_use(u)?)?))
    }

    /// c = B Σᵢ G̃ᵢ².
    fn squares(&self) -> Result<Tensor> {
        let closed_form = match self.uses {
            [only] => only.rule.squares(&only.delta.f_totype(self.kind())?)?,
            _ => None,
        };
        let mut sum = match closed_form {
            Some(sum) => sum,
            None => self.sum(|g| Ok(g.f_square()?))?,
        };
        Ok(sum.f_mul_scalar_(self.batch as f64)?)
    }

    /// Whether g = Σᵢ G̃ᵢ up to rounding, given g, c and the scale of the whole model's per-example gradients.
    fn explains(&self, g: &Tensor, c: &Tensor, all: f64) -> Result<bool> {
        let g = g.f_totype(self.kind())?;
        let error = norm(&self.sum(Ok)?.f_sub(&g)?)?;
        // Rounding errors of examples add up like independent ones, so that they are measured against
        // (Σᵢ ‖G̃ᵢ‖²)^½ and not against ‖g‖ alone, which vanishes at an optimum. The scale of the whole model is there
        // for parameters on which the loss depends in form only (a bias in front of a normalization, the bias of
        // attention's keys), whose gradients are nothing but rounding errors.
        let own = norm(&g)?.max(root_sum(c, self.batch)?);
        // NaN passes: a gradient that is not finite is reported as such by its reader.
        Ok(error.is_nan() || error <= self.tolerance() * own.max(all / 100.0))
    }

    /// About ten unit round-offs of the least exact arithmetic that may be at work: bf16 (2⁻⁹, and f16 loses more to its
    /// narrow range), TF32 (2⁻¹¹, cuDNN's convolutions on f32); for f64 far above rounding and far below any real use.
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

fn accumulation_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

fn norm(x: &Tensor) -> Result<f64> {
    Ok(f64::try_from(x.f_square()?.f_sum(Kind::Double)?)?.sqrt())
}

/// (Σᵢ ‖G̃ᵢ‖²)^½ from c.
fn root_sum(c: &Tensor, batch: i64) -> Result<f64> {
    Ok((f64::try_from(c.f_sum(Kind::Double)?)? / batch as f64).sqrt())
}

/// (Σᵢ ‖G̃ᵢ‖²)^½ over all tapped parameters.
fn global_scale(squares: &[Option<Tensor>], batch: i64) -> Result<f64> {
    let mut sum = 0.0;
    for c in squares.iter().flatten() {
        sum += root_sum(c, batch)?.powi(2);
    }
    Ok(sum.sqrt())
}

/// c of the parameters `which` by a backward pass for every example.
fn one_by_one(
    losses: &Tensor,
    params: &[(&str, &Tensor)],
    which: &[usize],
    squares: &mut [Option<Tensor>],
) -> Result<()> {
    if which.is_empty() {
        return Ok(());
    }
    let leaves: Vec<&Tensor> = which.iter().map(|&p| params[p].1).collect();
    let mut sums = Vec::with_capacity(which.len());
    for leaf in &leaves {
        sums.push(Tensor::f_zeros(leaf.size(), (accumulation_kind(leaf.kind()), leaf.device()))?);
    }
    let batch = losses.size()[0];
    for i in 0..batch {
        let gradients = Tensor::f_run_backward(&[losses.f_select(0, i)?], &leaves, true, false)?;
        for (sum, g) in sums.iter_mut().zip(gradients) {
            if g.defined() {
                let g = g.f_totype(sum.kind())?;
                let _ = sum.f_addcmul_(&g, &g)?;
            }
        }
    }
    for (&p, mut sum) in which.iter().zip(sums) {
        squares[p] = Some(sum.f_div_scalar_(batch as f64)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
