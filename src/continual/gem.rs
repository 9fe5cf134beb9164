//! Gradient episodic memory: a step that raises the loss of no past task.
//!
//! With g the gradient of the present loss and g_k those of the losses on the memories of past tasks, a step along -g
//! raises the loss of task k where ⟨g, g_k⟩ < 0. Then another direction is taken, the nearest one that does not:
//!
//! ```text
//! GEM      g̃ = argmin ½‖g̃ - g‖²  s.t.  ⟨g̃, g_k⟩ ≥ 0 for all k            (Lopez-Paz and Ranzato 2017)
//!            = g + Σ v_k g_k,  v = argmin over v ≥ γ of ½ vᵀGGᵀv + (Gg)ᵀv,  γ = 0
//! A-GEM    g̃ = g - (⟨g, r⟩/⟨r, r⟩) r,  r: one gradient on all memories        (Chaudhry et al. 2019)
//! ```
//!
//! The promise holds for a small step along -g̃. An optimizer that scales weights differently (Adam) goes elsewhere;
//! [`Sgd`](crate::Sgd) does not.
//!
//! Gradients go in and out in the form that [`Derivatives`](crate::Derivatives) has:
//!
//! ```
//! # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
//! use tch_blr::continual::gem;
//! use tch_blr::{Derivatives, Params, Sgd};
//! # fn main() -> tch_blr::Result<()> {
//! # let vs = VarStore::new(Device::Cpu);
//! # let net = tch::nn::linear(vs.root(), 4, 3, Default::default());
//! # let inputs = || Tensor::randn([8, 4], (Kind::Float, Device::Cpu));
//! # let data = || (inputs(), Tensor::randint(3, [8], (Kind::Int64, Device::Cpu)));
//! # let (new, memories) = (data(), [data(), data()]);
//! let params = Params::from(&vs);
//! let mut opt = Sgd::default().build(&vs, 0.1)?;
//! let loss_of = |(x, y): &(Tensor, Tensor)| net.forward(x).cross_entropy_for_logits(y);
//! for _ in 0..10 {
//!     let step = opt.perturbed()?;
//!     let loss = loss_of(&new);
//!     let past = memories.iter().map(|m| gem::gradients(&loss_of(m), &params)).collect::<Result<Vec<_>, _>>()?;
//!     let gradients = gem::project(&gem::gradients(&loss, &params)?, &past, 0.0)?;
//!     step.step(Derivatives { loss: loss.double_value(&[]), examples: None, gradients, squares: vec![] })?;
//! }
//! # Ok(())
//! # }
//! ```

use super::past::gradient;
use crate::{Error, Params, Result, check};
use tch::{Kind, Tensor};

/// One per parameter in the order of [`Params::names`], `None` where the loss does not depend on it.
type Gradients = Vec<Option<Tensor>>;

/// ∇ of a 0-dim loss, by a backward pass that uses up its graph; `None` for frozen parameters.
///
/// # Errors
/// A loss that is not 0-dim.
pub fn gradients(loss: &Tensor, params: impl Into<Params>) -> Result<Gradients> {
    let params = Params::separate(params)?;
    let mut found = gradient(loss, &params)?.into_iter();
    let each = params
        .leaves()
        .iter()
        .map(|l| if l.trainable() { found.next().map(|g| g.to_kind(l.tensor.kind())) } else { None });
    Ok(each.collect())
}

/// GEM: g, or the g̃ above if some ⟨g, g_k⟩ < 0. The quadratic program has one unknown per past task, and is solved
/// exactly, by active sets on the normalised gradients in f64. γ ≥ 0 biases the step in favour of the past; 0 is the
/// projection.
///
/// With gradients in f64, ⟨g̃, g_k⟩ ≥ 0 up to rounding; in f32 the result is rounded.
///
/// # Errors
/// Other numbers of gradients or other shapes, gradients that are not finite; γ that is negative or not finite.
pub fn project(gradients: &[Option<Tensor>], memories: &[Vec<Option<Tensor>>], gamma: f64) -> Result<Gradients> {
    let _no_grad = tch::no_grad_guard();
    check::non_negative("gamma", gamma)?;
    for memory in memories {
        fits(gradients, memory)?;
    }
    let sizes: Vec<f64> = memories.iter().map(|g| dot(g, g).sqrt()).collect();
    let size = dot(gradients, gradients).sqrt();
    // Only tasks that have a gradient: the others say nothing, and would divide by zero below.
    let towards: Vec<f64> = memories.iter().map(|g| dot(gradients, g)).collect();
    let tasks: Vec<usize> = (0..memories.len()).filter(|k| sizes[*k] > 0.0).collect();
    // To the bit, where no past task objects.
    if !tasks.iter().any(|k| towards[*k] < 0.0) {
        return Ok(copy(gradients));
    }
    // Of unit gradients, so that what counts as zero does not depend on the scale of a task's loss.
    let cosines: Vec<Vec<f64>> = tasks
        .iter()
        .map(|i| tasks.iter().map(|j| dot(&memories[*i], &memories[*j]) / (sizes[*i] * sizes[*j])).collect())
        .collect();
    // In units of ‖g‖: v_k = u_k ‖g‖/‖g_k‖.
    let bounds: Vec<f64> = tasks.iter().map(|k| gamma * sizes[*k] / size).collect();
    let slopes: Vec<f64> = tasks.iter().map(|k| towards[*k] / (sizes[*k] * size)).collect();
    let weights = bounded_minimum(&cosines, &slopes, &bounds)?;
    let terms = tasks.iter().zip(weights).map(|(k, u)| (u * size / sizes[*k], &memories[*k]));
    Ok(plus(gradients, &terms.collect::<Vec<_>>()))
}

/// A-GEM: g, or if ⟨g, r⟩ < 0 what is left of it across r.
///
/// # Errors
/// As [`project`].
pub fn project_average(gradients: &[Option<Tensor>], reference: &Vec<Option<Tensor>>) -> Result<Gradients> {
    let _no_grad = tch::no_grad_guard();
    fits(gradients, reference)?;
    let towards = dot(gradients, reference);
    if towards >= 0.0 {
        return Ok(copy(gradients));
    }
    // Never 0/0: the inner product with a reference of zero is not negative.
    Ok(plus(gradients, &[(-towards / dot(reference, reference), reference)]))
}

fn fits(gradients: &[Option<Tensor>], memory: &[Option<Tensor>]) -> Result<()> {
    if gradients.len() != memory.len() {
        let (now, then) = (gradients.len(), memory.len());
        let problem = format!("its gradient has {then} tensors and that of the loss {now}: expected the same");
        return Err(Error::Memory(problem));
    }
    for (i, (a, b)) in gradients.iter().zip(memory).enumerate() {
        if let (Some(a), Some(b)) = (a, b)
            && a.size() != b.size()
        {
            let problem =
                format!("gradient {i} is {:?} on it and {:?} of the loss: expected one shape", b.size(), a.size());
            return Err(Error::Memory(problem));
        }
        for (what, g) in [("of the loss", a), ("on the memory", b)] {
            if let Some(value) = g.as_ref().and_then(crate::kernel::first_non_finite) {
                return Err(Error::Memory(format!("gradient {i} {what} is not finite ({value})")));
            }
        }
    }
    Ok(())
}

fn copy(gradients: &[Option<Tensor>]) -> Gradients {
    gradients.iter().map(|g| g.as_ref().map(Tensor::copy)).collect()
}

fn dot(a: &[Option<Tensor>], b: &[Option<Tensor>]) -> f64 {
    let each = a.iter().zip(b).filter_map(|(a, b)| {
        // In f64, because what decides is the sign of a sum of cancelling products.
        let (a, b) = (a.as_ref()?.to_kind(Kind::Double), b.as_ref()?.to_kind(Kind::Double));
        Some((a * b).sum(Kind::Double).double_value(&[]))
    });
    each.sum()
}

/// g + Σ w_k g_k, in the kinds of g.
fn plus(gradients: &[Option<Tensor>], terms: &[(f64, &Vec<Option<Tensor>>)]) -> Gradients {
    let of = |i: usize| {
        let parts = terms.iter().filter_map(|(w, g)| Some(g[i].as_ref()?.to_kind(Kind::Double) * *w));
        let own = gradients[i].as_ref();
        let kind = own.or_else(|| terms.iter().find_map(|(_, g)| g[i].as_ref())).map(Tensor::kind)?;
        // The projection cancels most of g where tasks oppose each other, so it is rounded only at the end.
        let sum = own.map(|g| g.to_kind(Kind::Double)).into_iter().chain(parts).reduce(|a, b| a + b)?;
        Some(sum.to_kind(kind))
    };
    (0..gradients.len()).map(of).collect()
}

/// What counts as zero among cosines: some hundred roundings of f64.
const ROUNDING: f64 = 1e-13;

/// argmin over u ≥ `bounds` of ½ uᵀAu + bᵀu, A of cosines: the method of Lawson and Hanson (1974) for non-negative
/// least squares. A gradient that depends on those in use has no slope left once they are, so no singular system comes
/// up.
fn bounded_minimum(a: &[Vec<f64>], b: &[f64], bounds: &[f64]) -> Result<Vec<f64>> {
    let n = b.len();
    let slope = |u: &[f64], i: usize| b[i] + a[i].iter().zip(u).map(|(a, u)| a * u).sum::<f64>();
    let mut u = bounds.to_vec();
    let (mut used, mut dependent) = (vec![false; n], vec![false; n]);
    // The method ends in exact arithmetic. A limit, because rounding could make it cycle.
    let rounds = 100 * (n + 1);
    for _ in 0..rounds {
        let candidates = (0..n).filter(|i| !used[*i] && !dependent[*i]);
        let steepest = candidates.map(|i| (i, slope(&u, i))).min_by(|x, y| x.1.total_cmp(&y.1));
        let Some((new, _)) = steepest.filter(|(_, s)| *s < -ROUNDING) else { return Ok(u) };
        used[new] = true;
        loop {
            let set: Vec<usize> = (0..n).filter(|i| used[*i]).collect();
            let others = |i: usize| (0..n).filter(|j| !used[*j]).map(|j| a[i][j] * u[j]).sum::<f64>();
            let right: Vec<f64> = set.iter().map(|i| -b[*i] - others(*i)).collect();
            let Some(target) = solve(a, &set, &right) else {
                used[new] = false;
                dependent[new] = true;
                break;
            };
            // As far towards the minimum on this set as the bounds allow; the weight that stops it leaves the set.
            let reach = set.iter().zip(&target).filter(|(i, t)| **t < bounds[**i]);
            let reach = reach.map(|(i, t)| (*i, (u[*i] - bounds[*i]) / (u[*i] - t)));
            let stop = reach.min_by(|x, y| x.1.total_cmp(&y.1));
            let share = stop.map_or(1.0, |(_, share)| share);
            for (i, t) in set.iter().zip(&target) {
                u[*i] += share * (t - u[*i]);
            }
            let Some((stop, _)) = stop else {
                dependent.fill(false);
                break;
            };
            (u[stop], used[stop]) = (bounds[stop], false);
            // Its slope asked for it and the minimum does not want it: that can only be rounding.
            dependent[new] |= stop == new;
            if !used.contains(&true) {
                break;
            }
        }
    }
    Err(Error::Memory(format!("the quadratic program of {n} past gradients was not solved in {rounds} rounds")))
}

/// Solves the rows and columns of a set by Cholesky's method; `None` if they are dependent.
fn solve(a: &[Vec<f64>], set: &[usize], right: &[f64]) -> Option<Vec<f64>> {
    let n = set.len();
    let mut l = vec![vec![0.0; n]; n];
    let mut x = right.to_vec();
    for i in 0..n {
        for j in 0..=i {
            let rest = a[set[i]][set[j]] - (0..j).map(|k| l[i][k] * l[j][k]).sum::<f64>();
            if i > j {
                l[i][j] = rest / l[j][j];
            } else if rest > ROUNDING {
                l[i][i] = rest.sqrt();
            } else {
                return None;
            }
        }
        x[i] = (x[i] - (0..i).map(|k| l[i][k] * x[k]).sum::<f64>()) / l[i][i];
    }
    for i in (0..n).rev() {
        x[i] = (x[i] - (i + 1..n).map(|k| l[k][i] * x[k]).sum::<f64>()) / l[i][i];
    }
    Some(x)
}
