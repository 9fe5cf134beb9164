//! Pseudo-examples in the place of many: a memory of a fixed number of places with the curvature of all that was seen.
//!
//! Selections of real examples are in `stream.rs` and `features.rs`.

use super::error;
use super::score::random_scores;
use super::stream::top;
use crate::continual::{Forward, Memory};
use crate::likelihood::Likelihood;
use crate::{IntoTensor, Result, check, kernel, linalg};
use tch::{Kind, Tensor};

/// k pseudo-examples uₖ with weights wₖ that have the curvature of all the examples given, for a model that is linear
/// in its features, f = φᵀθ:
///
/// ```text
/// Σₖ wₖ β(uₖ) uₖuₖᵀ ≈ H = Σᵢ wᵢ β(φᵢ) φᵢφᵢᵀ        β: the Hessian of the loss by f, at the model's present weights
/// ```
///
/// As the memory of a K-prior ([`SoftLabels`](crate::continual::SoftLabels) plus
/// [`Quadratic::isotropic`](crate::continual::Quadratic::isotropic)) they then stand for the past. Where k ≥ rank H the
/// equation is exact: choose such a k if you can. With a smaller one, only δ constrains the directions that are left
/// out, and the left side is the best of rank k, from the largest eigenvalues λ of H and their eigenvectors V, which
/// the EM algorithm for probabilistic PCA comes to without noise. They leave a rotation R free, and the one taken leads
/// closest to k examples, which `seed` draws:
///
/// ```text
/// Ũ = V √λ R,     √(wₖ β(uₖ)) uₖ = ũₖ,     ‖uₖ‖ = 1,     R = argmin ‖Ũ - [√(wᵢβᵢ) φᵢ]‖
/// ```
///
/// `parts` are those of the past with their weights: what was compact before, and the examples of the last task. Inputs
/// are features `[M, d]`, with a 1 among them where there is a bias; d×d matrices are formed. Outputs are one logit
/// ([`Likelihood::Bernoulli`]), or values ([`Likelihood::Gaussian`]), of which there may be several. Gives k inputs
/// `[k, d]` in the kind of the first part, without targets; or all the examples with their weights, where there are no
/// more than k.
///
/// ```
/// # use tch::{Device, Kind, Tensor};
/// use tch_blr::continual::{Memory, SoftLabels};
/// use tch_blr::{nn::Likelihood, selection};
/// # fn main() -> tch_blr::Result<()> {
/// # let theta = Tensor::randn([5], (Kind::Double, Device::Cpu));
/// # let task = || Tensor::randn([80, 5], (Kind::Double, Device::Cpu));
/// let examples = |x: &Tensor| Memory::new(x, Likelihood::Bernoulli);
/// let first = selection::compact(&[&examples(&task())], 5, 0, |x| x.mv(&theta))?;
/// let both = selection::compact(&[&first, &examples(&task())], 5, 1, |x| x.mv(&theta))?;
/// let past = SoftLabels::of(both, |x| x.mv(&theta))?;
/// # assert_eq!(past.predictions().size(), [5]);
/// # Ok(())
/// # }
/// ```
///
/// Source: Jung et al. (2025), *Compact Memory for Continual Logistic Regression*; Tipping and Bishop (1999),
/// *Probabilistic Principal Component Analysis*, section 3.2.
///
/// # Errors
/// k = 0; no part, parts of different likelihoods or numbers of features, inputs that are not `[M, d]` or not finite; a
/// categorical likelihood or several logits, whose curvature is not a number; outputs that are not finite or not 0 for
/// inputs of 0; weights of another shape or negative; named labels.
pub fn compact<L: IntoTensor>(
    parts: &[&Memory],
    k: usize,
    seed: u64,
    forward: impl Fn(&Tensor) -> L,
) -> Result<Memory> {
    check::count("k", k)?;
    let forward = |x: &Tensor| forward(x).into_tensor();
    let _no_grad = tch::no_grad_guard();
    let Some(first) = parts.first() else {
        return Err(error("there is no part of the past: give at least one memory"));
    };
    let likelihood = first.likelihood();
    let (mut inputs, mut weights, mut curvatures) = (Vec::new(), Vec::new(), Vec::new());
    for (i, part) in parts.iter().enumerate() {
        fits(i, part, first)?;
        let x = part.inputs();
        let w = part.weights_or_one()?;
        if w.numel() > 0 && w.min().double_value(&[]) < 0.0 {
            return Err(error(format!("part {i} has a negative weight: pseudo-examples stand for a sum of squares")));
        }
        curvatures.push(curvature(part, &forward)?.to_device(first.inputs().device()));
        // Parts may come from several devices; a d×d eigenproblem wants f64.
        inputs.push(x.to_device(first.inputs().device()).to_kind(Kind::Double));
        weights.push(w.to_device(first.inputs().device()));
    }
    let [inputs, weights, curvatures] = [inputs, weights, curvatures].map(|parts| Tensor::f_cat(&parts, 0));
    let (inputs, weights, curvatures) = (inputs?, weights?, curvatures?);
    let memory = |inputs: &Tensor, weights: &Tensor| {
        Memory::new(&inputs.to_kind(first.inputs().kind()), likelihood).weights(weights)
    };
    let n = inputs.size()[0];
    if k as i64 >= n {
        return Ok(memory(&inputs, &weights));
    }
    // [n, d]
    let rows = &inputs * (&weights * &curvatures).f_sqrt()?.f_unsqueeze(1)?;
    // Eigenvalues come in ascending order, so the largest are the last.
    let (values, vectors) = linalg::eigen(&rows.f_tr()?.f_matmul(&rows)?)?;
    let rank = (k as i64).min(values.numel() as i64);
    let first_of_them = values.numel() as i64 - rank;
    // H is a sum of squares, so only rounding makes an eigenvalue negative; its root would be NaN.
    let root = values.f_narrow(0, first_of_them, rank)?.f_clamp_min(0.0)?.f_sqrt()?;
    let axes = vectors.f_narrow(1, first_of_them, rank)? * &root; // V √λ [d, rank]

    let drawn = Tensor::from_slice(&top(&random_scores(n as usize, seed), k)?).to_device(rows.device());
    let near = rows.f_index_select(0, &drawn)?; // [k, d]
    // The orthogonal matrix nearest to a product is that of its singular vectors (Procrustes).
    let (p, _, q) = axes.f_tr()?.f_matmul(&near.f_tr()?)?.f_svd(true, true)?;
    let found = axes.f_matmul(&p.f_matmul(&q.f_tr()?)?)?.f_tr()?; // [k, d]

    let size = found.f_square()?.f_sum_dim_intlist(1, true, Kind::Double)?; // wₖ β(uₖ)
    // Where there is no curvature, there is neither weight nor direction, and 0/0 must not become NaN.
    let u = &found / size.f_sqrt()?.f_clamp_min(f64::MIN_POSITIVE)?;
    let pseudo = Memory::new(&u.to_kind(first.inputs().kind()), likelihood);
    // β depends on the logit at u, so the weight can only follow the direction.
    let beta = curvature(&pseudo, &forward)?;
    let weights = size.f_squeeze_dim(1)? / beta.f_clamp_min(f64::MIN_POSITIVE)?;
    Ok(memory(&u, &weights))
}

fn fits(i: usize, part: &Memory, first: &Memory) -> Result<()> {
    let (x, d) = (part.inputs(), first.inputs().size().get(1).copied());
    if part.likelihood() != first.likelihood() {
        let (this, that) = (part.likelihood(), first.likelihood());
        return Err(error(format!("part {i} has the likelihood {this:?} and part 0 {that:?}")));
    }
    if part.likelihood() == Likelihood::Categorical {
        return Err(error(
            "a categorical likelihood has a matrix of curvatures for each example: take Likelihood::Bernoulli for one \
             logit, or Likelihood::Gaussian for values",
        ));
    }
    if part.active_outputs().is_some() {
        let problem = "names its active outputs: make the memory of each head compact by itself, without naming them";
        return Err(error(format!("part {i} {problem}")));
    }
    if x.dim() != 2 || x.size().get(1).copied() != d || !x.is_floating_point() {
        let (form, d) = (format!("{:?} {:?}", x.kind(), x.size()), d.unwrap_or(0));
        return Err(error(format!("the inputs of part {i} are {form}: expected features [M, {d}]")));
    }
    match kernel::first_non_finite(x) {
        Some(value) => Err(error(format!("the inputs of part {i} are not finite ({value})"))),
        None => Ok(()),
    }
}

/// β of each example, `[M]`.
fn curvature(part: &Memory, forward: Forward) -> Result<Tensor> {
    let outputs = part.checked_outputs(forward)?;
    // A bias would shift the logits of rescaled examples, and their curvature with them.
    let at_zero = forward(&part.inputs().f_narrow(0, 0, 1)?.f_zeros_like()?)?;
    let off = at_zero.f_abs()?.f_max()?.double_value(&[]);
    if off > 0.0 {
        return Err(error(format!(
            "the outputs for inputs of 0 are {off:e}: the model must be linear in them; for a bias give it a feature \
             of 1"
        )));
    }
    let (m, size) = (outputs.examples(), outputs.z.size());
    // Of a Gaussian, whose curvature is the same number for all outputs, there may be several.
    if !matches!(outputs.likelihood, Likelihood::Gaussian { .. }) && outputs.z.numel() as i64 != m {
        return Err(error(format!("the outputs are {size:?}: expected one logit for each example")));
    }
    let each = outputs.with_values(|z| z.f_to_kind(Kind::Double))?.curvature_diagonal()?;
    Ok(each.f_reshape([m, -1])?.f_select(1, 0)?)
}
