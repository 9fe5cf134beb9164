//! Weight-space priors: a Gaussian without its constant, with a precision that may vanish. What posteriors and Fisher
//! informations become in this form is in `of_gaussian.rs`.

use super::past::{Model, Regularizer, sum};
use crate::linalg::{into_basis, matrix_shape, sides};
use crate::params::Leaf;
use crate::{Error, Params, Result, check};
use tch::{Kind, Tensor};

/// K(θ) = Σ ½ (θ-m)ᵀ S (θ-m), a sum of quadratic forms with S ≥ 0, on the scale of the loss summed over examples.
///
/// What the methods of weight regularization differ in is where S comes from, and around which m (t: the task just
/// learned, F: its Fisher information at θₜ, from [`Fisher`](crate::fisher::Fisher)):
///
/// | method | m | S | here |
/// |---|---|---|---|
/// | L2 to the previous weights | θₜ | δI | [`Quadratic::isotropic`] |
/// | online EWC = online Laplace | θₜ | γ Sₜ₋₁ + F | `past.scaled(γ)?.recentred(&params)?.plus(&new)?`, from δI |
/// | separate EWC | each θₖ | λ Σ Fₖ | `past.plus(&new.scaled(λ)?)?`, not `recentred`: still two tensors |
/// | Synaptic Intelligence | θₜ | 2cΩ | [`SynapticIntelligence`](super::SynapticIntelligence) |
/// | a posterior | its mean | its precision | `Quadratic::from(&q)` |
///
/// where `new` is `Quadratic::from(&fisher)` of a Fisher information that is diagonal, Kronecker-factored or full.
///
/// Separate EWC counts the past twice, compared with Bayes: θ₂ was pulled to θ₁ already (Huszár 2018). Parameters that
/// it does not name (new heads) are free.
///
/// What a sum takes: diagonal terms on the same parameter are added as natural parameters, s = s₁ + s₂ and
/// s·m = s₁m₁ + s₂m₂, with the constant that this leaves, so values are those of the sum. Full matrices around the same
/// weights are added. Kronecker products are kept as a list, a pair of factors for each task, because their sum is
/// not a Kronecker product, and least of all (A₁ + A₂) ⊗ (G₁ + G₂).
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::continual::{Past, Quadratic};
/// use tch_blr::{Adam, Params, fisher::Fisher, nn};
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root(), 4, 3, Default::default());
/// # let inputs = |n: i64| Tensor::randn([n, 4], (Kind::Float, Device::Cpu));
/// # let data = |n: i64| (inputs(n), Tensor::randint(3, [n], (Kind::Int64, Device::Cpu)));
/// # let tasks = [data(30), data(50)];
/// let params = Params::from(&vs);
/// let forward = |x: &Tensor| net.forward(x);
/// let mut past = Quadratic::towards_zero(&params, 1.0)?;
/// for (x, y) in &tasks {
///     let all = Past::new().with(past.clone());
///     let mut opt = Adam::default().build(&vs, 1e-2)?;
///     for _ in 0..10 {
///         let loss = || forward(x).cross_entropy_for_logits(y);
///         opt.step(|| all.beside(loss(), x.size()[0] as f64, &params, forward))?;
///     }
///     let fisher = Fisher::exact().kronecker(&vs, [x], forward)?; // or diagonal, or full
///     past = past.recentred(&params)?.plus(&Quadratic::from(&fisher))?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Quadratic {
    pub(super) terms: Vec<Term>,
    /// What completing squares has left over.
    pub(super) constant: f64,
}

/// A tensor that is never written to, so that clones may share it.
#[derive(Debug)]
pub(super) struct Shared(pub Tensor);

impl Clone for Shared {
    fn clone(&self) -> Self {
        Shared(self.0.shallow_clone())
    }
}

impl std::ops::Deref for Shared {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.0
    }
}

#[derive(Debug, Clone)]
pub(super) enum Term {
    /// `mean` and `precision` in the parameter's shape; the precision in the basis, as in
    /// [`KroneckerGaussian`](crate::KroneckerGaussian), or of the weights themselves where there is none.
    Diagonal { name: String, mean: Shared, precision: Shared, basis: [Option<Shared>; 2] },
    /// G ⊗ A of a layer's `[W b]`: `mean` `[out, in]` or `[out, in+1]`, `inputs` A, `outputs` G.
    Layer { weight: Shaped, bias: Option<Shaped>, mean: Shared, inputs: Shared, outputs: Shared },
    /// `mean` `[n]` and `precision` `[n, n]` of all these together, in f64.
    Full { parameters: Vec<Shaped>, mean: Shared, precision: Shared },
}

/// Name and shape of a parameter.
pub(super) type Shaped = (String, Vec<i64>);

impl Quadratic {
    /// Diagonal, from (name, m, s) of each parameter, which it copies.
    ///
    /// # Errors
    /// A name twice, shapes that differ, values that are not finite, a negative s.
    pub fn new<S: Into<String>>(entries: impl IntoIterator<Item = (S, Tensor, Tensor)>) -> Result<Self> {
        let mut terms: Vec<Term> = Vec::new();
        for (name, mean, precision) in entries {
            let name = name.into();
            if terms.iter_mut().any(|t| t.diagonal_of(&name).is_some()) {
                return Err(Error::parameter(&name, "it is given twice"));
            }
            if mean.size() != precision.size() {
                let problem = format!("m is {:?} and s {:?}: expected one shape", mean.size(), precision.size());
                return Err(Error::parameter(&name, problem));
            }
            for (what, t) in [("m", &mean), ("s", &precision)] {
                if let Some(value) = crate::kernel::first_non_finite(t) {
                    return Err(Error::parameter(&name, format!("its {what} is not finite ({value})")));
                }
            }
            if precision.numel() > 0 && precision.min().double_value(&[]) < 0.0 {
                let smallest = precision.min().double_value(&[]);
                return Err(Error::parameter(&name, format!("its smallest s is {smallest:e}: expected numbers ≥ 0")));
            }
            terms.push(Term::diagonal(&name, &mean.detach().copy(), &precision.detach().copy()));
        }
        Ok(Quadratic { terms, constant: 0.0 })
    }

    /// ½ δ‖θ - θ_now‖² with the present weights, δ ≥ 0: "L2 to the previous weights".
    ///
    /// # Errors
    /// A δ that is negative or not finite.
    pub fn isotropic(params: impl Into<Params>, delta: f64) -> Result<Self> {
        let params = Params::separate(params)?;
        check::non_negative("delta", delta)?;
        let entry = |l: &Leaf| {
            let mean = l.tensor.detach().to_kind(l.state_kind());
            let delta = crate::kernel::filled(&mean, delta);
            (l.name().to_owned(), mean.copy(), delta)
        };
        Self::new(params.leaves().iter().map(entry))
    }

    /// ½ δ‖θ‖², the prior N(0, 1/δ).
    ///
    /// # Errors
    /// As [`Quadratic::isotropic`].
    pub fn towards_zero(params: impl Into<Params>, delta: f64) -> Result<Self> {
        let mut all = Self::isotropic(params, delta)?;
        for term in &mut all.terms {
            *term.mean_mut() = Shared(term.mean_mut().zeros_like());
        }
        Ok(all)
    }

    /// ½ δ_b‖θ - (δ_a/δ_b) θ_now‖²: the weight part ½δ_a‖θ - θ_now‖² of a K-prior, for the present weights trained with
    /// ½δ_a‖θ‖², when the regularizer changes to ½δ_b‖θ‖², δ_b > 0 (Khan and Swaroop 2021).
    ///
    /// # Errors
    /// A δ_a that is negative, a δ_b that is not positive, or not finite.
    pub fn change_of_regularizer(params: impl Into<Params>, delta_a: f64, delta_b: f64) -> Result<Self> {
        check::non_negative("delta_a", delta_a)?;
        check::positive("delta_b", delta_b)?;
        let mut all = Self::isotropic(params, delta_b)?;
        for term in &mut all.terms {
            *term.mean_mut() = Shared(&term.mean_mut().0 * (delta_a / delta_b));
        }
        Ok(all)
    }

    /// w·K with w ≥ 0: λ of EWC, the forgetting γ, or 1/τ of a temperature.
    ///
    /// # Errors
    /// A w that is negative or not finite.
    pub fn scaled(&self, w: f64) -> Result<Self> {
        check::non_negative("w", w)?;
        let mut all = self.clone();
        for term in &mut all.terms {
            let (Term::Diagonal { precision, .. }
            | Term::Layer { outputs: precision, .. }
            | Term::Full { precision, .. }) = term;
            // One of the two factors carries w, because G ⊗ A is linear in each. Multiplied into a new tensor: clones
            // share the old.
            *precision = Shared(&precision.0 * w);
        }
        all.constant *= w;
        Ok(all)
    }

    /// The same S around the present weights: Laplace's approximation moves to the newest mode.
    ///
    /// # Errors
    /// Parameters that the model does not have in this shape, weights that are not finite.
    pub fn recentred(&self, params: impl Into<Params>) -> Result<Self> {
        let params = Params::separate(params)?;
        for leaf in params.leaves() {
            if let Some(value) = crate::kernel::first_non_finite(&leaf.tensor) {
                return Err(Error::parameter(leaf.name(), format!("its weights are not finite ({value})")));
            }
        }
        let mut all = self.clone();
        for term in &mut all.terms {
            let now = term.weights(&params)?.detach();
            let mean = term.mean_mut();
            *mean = Shared(now.to_kind(mean.kind()).copy());
        }
        // It completed the squares around the old centres.
        all.constant = 0.0;
        Ok(all)
    }

    /// The sum of both.
    ///
    /// # Errors
    /// Diagonal terms on one parameter in different shapes.
    pub fn plus(&self, other: &Quadratic) -> Result<Self> {
        let mut all = self.clone();
        all.constant += other.constant;
        for term in &other.terms {
            all.add(term)?;
        }
        Ok(all)
    }

    fn add(&mut self, new: &Term) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        match new {
            Term::Diagonal { name, mean, precision, basis: [None, None] } => {
                let there = self.terms.iter_mut().find_map(|t| t.diagonal_of(name));
                if let Some((m, s)) = there {
                    self.constant += add_diagonal(name, m, s, mean, precision)?;
                    return Ok(());
                }
            }
            Term::Full { parameters, mean, precision } => {
                // Only around one centre: otherwise the sum would need S⁻¹ for its own.
                let same = |p: &[Shaped], m: &Tensor| p == parameters && m.device() == mean.device() && m.equal(mean);
                let there = self.terms.iter_mut().find_map(|t| match t {
                    Term::Full { parameters: p, mean: m, precision: s } if same(p, m) => Some(s),
                    _ => None,
                });
                if let Some(s) = there {
                    *s = Shared(s.f_add(precision)?);
                    return Ok(());
                }
            }
            Term::Diagonal { .. } | Term::Layer { .. } => (),
        }
        self.terms.push(new.clone());
        Ok(())
    }

    /// s of a parameter, summed over its diagonal terms; `None` if there is none.
    pub fn precision(&self, name: &str) -> Option<Tensor> {
        // A clone shares its tensors, so it costs little; `diagonal_of` wants `&mut`.
        self.clone().terms.iter_mut().find_map(|t| t.diagonal_of(name).map(|(_, s)| s.copy()))
    }

    /// m of a parameter's diagonal term; `None` if there is none.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        self.clone().terms.iter_mut().find_map(|t| t.diagonal_of(name).map(|(m, _)| m.copy()))
    }
}

/// (m, s) ← the sum of both diagonal terms of a parameter, as natural parameters; the constant that this leaves.
fn add_diagonal(name: &str, m: &mut Shared, s: &mut Shared, mean: &Tensor, precision: &Tensor) -> Result<f64> {
    if m.size() != mean.size() {
        return Err(Error::parameter(name, format!("shapes {:?} and {:?} differ", m.size(), mean.size())));
    }
    let wide = |t: &Tensor| t.to_kind(Kind::Double).to_device(m.device());
    // In f64: m₁ + (m₂-m₁)s₂/s has small differences of weights in it.
    let (m1, s1, m2, s2) = (wide(m), wide(s), wide(mean), wide(precision));
    let sum = &s1 + &s2;
    // m₁ + (m₂-m₁)s₂/s, which is m₁ where neither knows anything and s₂/s would be 0/0.
    let share = (&s2 / &sum).f_masked_fill(&sum.f_eq(0.0)?, 0.0)?;
    let apart = &m2 - &m1;
    // ½s₁(m₁-m)² + ½s₂(m₂-m)² = ½ (s₁s₂/s)(m₂-m₁)²
    let constant = 0.5 * (&s1 * &share * apart.square()).sum(Kind::Double).double_value(&[]);
    *m = Shared((m1 + apart * share).to_kind(m.kind()));
    *s = Shared(sum.to_kind(s.kind()));
    Ok(constant)
}

impl Term {
    pub(super) fn diagonal(name: &str, mean: &Tensor, precision: &Tensor) -> Self {
        let share = |t: &Tensor| Shared(t.shallow_clone());
        Term::Diagonal { name: name.to_owned(), mean: share(mean), precision: share(precision), basis: [None, None] }
    }

    /// m and s of a diagonal term without a basis, if it is on this parameter.
    fn diagonal_of(&mut self, parameter: &str) -> Option<(&mut Shared, &mut Shared)> {
        match self {
            Term::Diagonal { name, mean, precision, basis: [None, None] } if name == parameter => {
                Some((mean, precision))
            }
            _ => None,
        }
    }

    fn mean_mut(&mut self) -> &mut Shared {
        let (Term::Diagonal { mean, .. } | Term::Layer { mean, .. } | Term::Full { mean, .. }) = self;
        mean
    }

    /// θ in the form of the mean, with its graph.
    fn weights(&self, params: &Params) -> Result<Tensor> {
        match self {
            Term::Diagonal { name, mean, .. } => Ok(find(params, name, &mean.size())?.shallow_clone()),
            Term::Layer { weight: (weight, shape), bias, .. } => {
                let w = find(params, weight, shape)?.f_reshape(matrix_shape(shape))?;
                let Some((bias, shape)) = bias else { return Ok(w) };
                let b = find(params, bias, shape)?.f_unsqueeze(1)?;
                Ok(Tensor::f_cat(&[w, b], 1)?)
            }
            Term::Full { parameters, .. } => {
                let parts = parameters
                    .iter()
                    .map(|(name, shape)| Ok(find(params, name, shape)?.f_reshape([-1])?.f_to_kind(Kind::Double)?));
                Ok(Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
            }
        }
    }

    /// ½ (θ-m)ᵀ S (θ-m)
    fn value(&self, params: &Params) -> Result<Tensor> {
        let theta = self.weights(params)?;
        let apart =
            // The model may have moved to another device since; the difference is taken in the kind of the mean.
            |mean: &Tensor| Ok::<_, Error>(theta.f_to_kind(mean.kind())?.f_sub(&mean.to_device(theta.device()))?);
        let twice = match self {
            Term::Diagonal { mean, precision, basis, .. } => {
                let there = |q: &Option<Shared>| q.as_ref().map(|q| q.to_device(theta.device()));
                let d = match (apart(mean)?, basis) {
                    (d, [None, None]) => d,
                    (d, [left, right]) => {
                        let (left, right) = (there(left), there(right));
                        let d = d.f_reshape(sides(&mean.size(), left.as_ref(), right.as_ref()))?;
                        into_basis(&d, left.as_ref(), right.as_ref())?.f_reshape(mean.size())?
                    }
                };
                d.square() * precision.to_device(theta.device())
            }
            Term::Layer { mean, inputs, outputs, .. } => {
                // tr(G D A Dᵀ), by two products of the layer's size and never by G ⊗ A.
                let d = apart(mean)?;
                let [a, g] = [inputs, outputs].map(|t| t.to_device(theta.device()));
                g.f_matmul(&d.f_matmul(&a)?)? * d
            }
            Term::Full { mean, precision, .. } => {
                let d = apart(mean)?;
                precision.to_device(theta.device()).f_mv(&d)? * d
            }
        };
        Ok(twice.f_sum(None::<Kind>)? * 0.5)
    }
}

/// The variable of this name, in this shape.
fn find<'a>(params: &'a Params, name: &str, shape: &[i64]) -> Result<&'a Tensor> {
    let Some(leaf) = params.find(name) else {
        let problem = "the prior has it and the model does not; is it the prior of another model?";
        return Err(Error::parameter(name, problem));
    };
    if leaf.tensor.size() != shape {
        let now = leaf.tensor.size();
        return Err(Error::parameter(name, format!("the prior has shape {shape:?} and the model {now:?}")));
    }
    Ok(&leaf.tensor)
}

impl Regularizer for Quadratic {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let sum = sum(self.terms.iter().map(|term| term.value(model.params)))?;
        let sum = sum.ok_or_else(|| Error::Posterior("a quadratic of no parameters".to_owned()))?;
        Ok(sum + self.constant)
    }
}
